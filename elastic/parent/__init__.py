"""The parent: our own Nemotron-H, whole, sliced to an Architecture, or under keep masks."""

from elastic.parent.hybrid import HybridParent, Member
from elastic.parent.layers import Keep, LayerKeep

__all__ = ["HybridParent", "Keep", "LayerKeep", "Member"]
