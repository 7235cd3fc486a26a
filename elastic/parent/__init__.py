"""The parent: our own Nemotron-H, whole, sliced to an Architecture, or under keep masks.

torch is imported with the first of these names; `elastic.parent.stock` needs none.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic.parent.hybrid import HybridParent, Member
    from elastic.parent.layers import Keep, LayerKeep

__all__ = ["HybridParent", "Keep", "LayerKeep", "Member"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("HybridParent", "Member"):
        from elastic.parent import hybrid as module
    else:
        from elastic.parent import layers as module  # type: ignore[no-redef]
    return getattr(module, name)
