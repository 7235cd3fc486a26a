"""What a member is, and which members there are: pure data, no torch.

An `Architecture` is one concrete member. A `Space` holds the choices on each axis. A `Selection`
says which choice was taken: axis -> one index per decision (one for a homogeneous axis, one per
layer of its kind for a heterogeneous one). Every member is a prefix of the sorted parent.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from elastic.config import AXES, ConfigError, ParentShape, SpaceConfig

AXIS_KIND = {
    "ffn": "mlp",
    "mamba_heads": "mamba",
    "mamba_head_dim": "mamba",
    "attention_heads": "attention",
}
"""Kind of layer that each per-layer size belongs to; `hidden` and `depth` belong to the whole
stack."""

WIDTH_AXIS = {"mamba": "mamba_heads", "mlp": "ffn", "attention": "attention_heads"}
"""Axis that sets the width of a kind of layer."""

AXIS_FIELD = {
    "ffn": "intermediate_size",
    "mamba_heads": "num_heads",
    "mamba_head_dim": "head_dim",
    "attention_heads": "num_heads",
}
"""Field of a layer that holds its size on a per-layer axis."""

LETTERS = {"mamba": "M", "mlp": "-", "attention": "*"}

Selection = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class MambaLayer:
    """A kept Mamba-2 layer: `num_heads` over all SSM groups, the same number in each."""

    index: int
    num_heads: int
    head_dim: int
    kind = "mamba"


@dataclass(frozen=True)
class MLPLayer:
    """A kept MLP layer."""

    index: int
    intermediate_size: int
    kind = "mlp"


@dataclass(frozen=True)
class AttentionLayer:
    """A kept attention layer: `num_heads` query heads over all KV groups, the same number in
    each."""

    index: int
    num_heads: int
    kind = "attention"


Layer = MambaLayer | MLPLayer | AttentionLayer
_LAYERS: dict[str, type[Layer]] = {
    "mamba": MambaLayer,
    "mlp": MLPLayer,
    "attention": AttentionLayer,
}


@dataclass(frozen=True)
class Architecture:
    """One member: the hidden size, and the layers kept with their sizes, in the parent's order."""

    hidden_size: int
    layers: tuple[Layer, ...]

    @classmethod
    def full(cls, shape: ParentShape) -> "Architecture":
        """The whole parent."""
        makers: dict[str, Callable[[int], Layer]] = {
            "mamba": lambda i: MambaLayer(i, shape.mamba_num_heads, shape.mamba_head_dim),
            "mlp": lambda i: MLPLayer(i, shape.intermediate_size),
            "attention": lambda i: AttentionLayer(i, shape.num_attention_heads),
        }
        layers = tuple(makers[kind](index) for index, kind in enumerate(shape.kinds))
        return cls(shape.hidden_size, layers)

    def without(self, dropped: set[int]) -> "Architecture":
        """The same member with the layers of these parent indices bypassed."""
        kept = tuple(layer for layer in self.layers if layer.index not in dropped)
        return Architecture(self.hidden_size, kept)

    @property
    def pattern(self) -> str:
        """One letter per kept layer."""
        return "".join(LETTERS[layer.kind] for layer in self.layers)

    def check(self, shape: ParentShape) -> None:
        """Raise `ValueError` unless this is a legal member of a parent of that shape."""

        def need(condition: bool, what: str, value: object, allowed: str) -> None:
            if not condition:
                raise ValueError(f"architecture: {what}={value} must be {allowed}")

        need(
            0 < self.hidden_size <= shape.hidden_size,
            "hidden_size",
            self.hidden_size,
            f"in 1..{shape.hidden_size}",
        )
        indices = [layer.index for layer in self.layers]
        need(indices == sorted(set(indices)), "layers", indices, "ascending, each index once")
        need(bool(indices), "layers", indices, "at least one kept layer")
        for layer in self.layers:
            where = f"layers[index={layer.index}]"
            legal = 0 <= layer.index < len(shape.kinds)
            need(legal, where, layer.index, f"in 0..{len(shape.kinds) - 1}")
            kind = shape.kinds[layer.index]
            need(kind == layer.kind, f"{where}.kind", layer.kind, f"{kind}, as in the parent")
            if isinstance(layer, MLPLayer):
                checks = [("intermediate_size", shape.intermediate_size, 1)]
            elif isinstance(layer, MambaLayer):
                checks = [
                    ("num_heads", shape.mamba_num_heads, shape.n_groups),
                    ("head_dim", shape.mamba_head_dim, 1),
                ]
            else:
                checks = [("num_heads", shape.num_attention_heads, shape.num_key_value_heads)]
            for name, largest, unit in checks:
                value = getattr(layer, name)
                need(
                    0 < value <= largest and value % unit == 0,
                    f"{where}.{name}",
                    value,
                    f"a multiple of {unit} in {unit}..{largest}",
                )

    def is_within(self, other: "Architecture") -> bool:
        """Whether this member is nested in `other`: no larger on any axis or layer."""
        theirs = {layer.index: layer for layer in other.layers}
        if self.hidden_size > other.hidden_size:
            return False
        for layer in self.layers:
            outer = theirs.get(layer.index)
            if outer is None or any(
                getattr(layer, name) > getattr(outer, name) for name in vars(layer)
            ):
                return False
        return True

    def to_json(self) -> dict[str, Any]:
        """The `architecture` entry of elastic.json."""
        layers = []
        for layer in self.layers:
            sizes = {name: value for name, value in vars(layer).items() if name != "index"}
            layers.append({"index": layer.index, "kind": layer.kind, **sizes})
        return {"hidden_size": self.hidden_size, "layers": layers}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "Architecture":
        """Inverse of `to_json`; `ValueError` when the entry does not have that form."""
        try:
            layers = []
            for fields in entry["layers"]:
                sizes = {n: _whole(n, value) for n, value in fields.items() if n != "kind"}
                layers.append(_LAYERS[fields["kind"]](**sizes))
            return cls(_whole("hidden_size", entry["hidden_size"]), tuple(layers))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"architecture entry is malformed: {error!r}") from error


def _whole(name: str, value: object) -> int:
    """A size as JSON has it: neither 88.5 nor "88", which would be taken for 88."""
    if type(value) is not int:
        raise ValueError(f"architecture: {name}={value!r} must be a whole number")
    return value


def extents(shape: ParentShape) -> dict[str, tuple[int, int]]:
    """axis -> the parent's size, and in how many equal groups it is kept: a choice is a multiple of
    that, with as many units in each group."""
    return {
        "hidden": (shape.hidden_size, 1),
        "ffn": (shape.intermediate_size, 1),
        "mamba_heads": (shape.mamba_num_heads, shape.n_groups),
        "mamba_head_dim": (shape.mamba_head_dim, 1),
        "attention_heads": (shape.num_attention_heads, shape.num_key_value_heads),
        "depth": (len(shape.pattern), 1),
    }


@dataclass(frozen=True)
class Space:
    """Choices per axis, largest first; an axis that is left alone has the parent's size only."""

    shape: ParentShape
    choices: dict[str, tuple[int, ...]]
    heterogeneous: frozenset[str]

    @classmethod
    def build(cls, config: SpaceConfig, shape: ParentShape) -> "Space":
        """Check the configured choices against the parent; `ConfigError` names what does not
        fit."""
        sizes = extents(shape)
        names = {"mamba_heads": "n_groups", "attention_heads": "num_key_value_heads"}
        choices: dict[str, tuple[int, ...]] = {}
        for axis in AXES:
            configured = getattr(config, axis)
            kind = AXIS_KIND.get(axis)
            if configured is not None and kind is not None and kind not in shape.kinds:
                raise ConfigError(
                    f"space.{axis}={configured}: must be null, the parent {shape.pattern} has no "
                    f"{kind} layer"
                )
            full, unit = sizes[axis]
            values = tuple(configured) if configured is not None else (full,)
            for value in values:
                if value > full:
                    raise ConfigError(
                        f"space.{axis}={list(values)}: {value} is larger than the parent's {full}"
                    )
                if value % unit:
                    raise ConfigError(
                        f"space.{axis}={list(values)}: {value} must be a multiple of "
                        f"{names[axis]}={unit}"
                    )
            if values[0] != full:
                raise ConfigError(
                    f"space.{axis}={list(values)}: must start with the parent's {full}"
                )
            choices[axis] = values
        return cls(shape, choices, frozenset(config.heterogeneous))

    def layers_of(self, axis: str) -> tuple[int, ...]:
        """Parent indices of the layers whose size `axis` sets; empty for `hidden` and `depth`."""
        kind = AXIS_KIND.get(axis)
        return tuple(index for index, k in enumerate(self.shape.kinds) if k == kind)

    def decisions(self, axis: str) -> int:
        """How many choices are taken on `axis`: one, or one per layer of its kind."""
        return len(self.layers_of(axis)) if axis in self.heterogeneous else 1

    @property
    def elastic_axes(self) -> tuple[str, ...]:
        """Axes with more than one choice."""
        return tuple(axis for axis in AXES if len(self.choices[axis]) > 1)

    @property
    def max_dropped(self) -> int:
        """Largest number of layers that a member drops."""
        return self.choices["depth"][0] - self.choices["depth"][-1]

    def size(self, axis: str, selection: Selection, layer: int) -> int:
        """Size on `axis` of the layer with that parent index."""
        indices = selection[axis]
        position = self.layers_of(axis).index(layer) if axis in self.heterogeneous else 0
        return self.choices[axis][indices[position]]

    def architecture(self, selection: Selection, drop_order: tuple[int, ...]) -> Architecture:
        """The member of a selection; `drop_order` lists layers, least important first."""
        kept = self.choices["depth"][selection["depth"][0]]
        dropped = set(drop_order[: len(self.shape.pattern) - kept])
        assert len(self.shape.pattern) - len(dropped) == kept, "the ranking is too short"
        layers: list[Layer] = []
        for index, kind in enumerate(self.shape.kinds):
            if index in dropped:
                continue
            if kind == "mamba":
                heads = self.size("mamba_heads", selection, index)
                channels = self.size("mamba_head_dim", selection, index)
                layers.append(MambaLayer(index, heads, channels))
            elif kind == "mlp":
                layers.append(MLPLayer(index, self.size("ffn", selection, index)))
            else:
                layers.append(AttentionLayer(index, self.size("attention_heads", selection, index)))
        hidden = self.choices["hidden"][selection["hidden"][0]]
        return Architecture(hidden, tuple(layers))

    def to_json(self) -> dict[str, Any]:
        """The `space` entry of elastic.json."""
        choices = {axis: list(values) for axis, values in self.choices.items()}
        return {"choices": choices, "heterogeneous": sorted(self.heterogeneous)}


def droppable_layers(
    shape: ParentShape, drop_attention: bool, drop_ends: bool, count: int
) -> tuple[int, ...]:
    """Parent indices of the layers that may be dropped; `ConfigError` if there are under
    `count`."""
    last = len(shape.pattern) - 1
    layers = tuple(
        index
        for index, kind in enumerate(shape.kinds)
        if (drop_attention or kind != "attention") and (drop_ends or index not in (0, last))
    )
    if count > len(layers):
        raise ConfigError(
            f"space.depth: drops up to {count} layers, but only {len(layers)} of {shape.pattern} "
            "may be dropped; keep more, or set importance.drop_attention or importance.drop_ends"
        )
    return layers
