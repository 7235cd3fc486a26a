"""A family as a table, and the sizes of its members as figures. No torch."""

import textwrap
from collections.abc import Mapping, Sequence

from elastic.console import short, table
from elastic.members.architecture import AXIS_FIELD, AXIS_KIND, Architecture
from elastic.members.goals import Target
from elastic.members.search import Choice
from elastic.routing.decide import Decision

WIDTH = 100
"""Columns of the table."""


def _values(architecture: Architecture, axis: str) -> list[int]:
    """Sizes on an axis, one per kept layer of its kind."""
    kind, field = AXIS_KIND[axis], AXIS_FIELD[axis]
    return [getattr(layer, field) for layer in architecture.layers if layer.kind == kind]


def sizes(choice: Choice) -> dict[str, float]:
    """Sizes of a member for rows of metrics; means over the kept layers where they differ."""
    architecture = choice.architecture
    figures: dict[str, float] = {
        "params": choice.params,
        "hidden": architecture.hidden_size,
        "depth": len(architecture.layers),
    }
    for axis in AXIS_FIELD:
        values = _values(architecture, axis)
        if values:
            figures[axis] = sum(values) / len(values)
    return figures


def describe(targets: Mapping[str, Target], choices: Mapping[str, Choice]) -> str:
    """A family, one line per budget, then the layers that each drops; `WIDTH` columns at most.

    A size that differs between layers is a range; layers are named by their kind and their index in
    the parent, from 0.
    """
    rows, kinds = [], next(iter(targets.values())).shape.kinds
    for name, choice in choices.items():
        kept = choice.architecture
        channels = span(kept, "mamba_head_dim")
        rows.append(
            [
                name,
                _short(targets[name]),
                f"{choice.params:,}",
                f"{targets[name].off_by(kept):+.2%}",
                str(kept.hidden_size),
                span(kept, "ffn"),
                span(kept, "mamba_heads") + ("" if channels == "-" else f" x {channels}"),
                span(kept, "attention_heads"),
                f"{len(kept.layers)} of {len(kinds)}",
            ]
        )
    header = (
        "budget", "target", "parameters", "off by", "hidden", "ffn", "mamba heads", "attention",
        "layers",
    )  # fmt: skip
    return "\n".join([*table(header, rows), *_drops(kinds, choices)])


def _short(target: Target) -> str:
    """Values in few characters, those of other units than parameters with their unit."""
    return ", ".join(
        short(goal.value) + ("" if goal.measure.unit == "params" else f" {goal.measure.unit}")
        for goal in target.goals
    )


def account(budget: str, target: Target, decision: Decision, chosen: Choice) -> str:
    """How the member of a budget was decided, in lines: the router's own choice, the loss of every
    candidate, and where the two part."""
    own = decision.router_choice
    lines = [
        f"{budget}: the router's own choice is {_brief(own)}, {decision.router_params:,} "
        f"parameters ({target.off_by(own):+.1%} off its target)"
    ]
    for candidate in sorted(decision.candidates, key=lambda candidate: candidate.kl):
        mark = "  <- frozen" if candidate.architecture == chosen.architecture else ""
        lines.append(f"    KL {candidate.kl:.4f}  {_brief(candidate.architecture)}{mark}")
    if own != chosen.architecture:
        lines.append(
            f"    frozen is another: ln p = {decision.log_probability:.1f} under the router"
        )
    return "\n".join(lines)


def _brief(architecture: Architecture) -> str:
    """Sizes on one line."""
    named = (("ffn", "ffn"), ("heads", "mamba_heads"), ("query heads", "attention_heads"))
    sizes = ", ".join(f"{name} {span(architecture, axis)}" for name, axis in named)
    return f"hidden {architecture.hidden_size}, {sizes}, {len(architecture.layers)} layers"


def span(architecture: Architecture, axis: str) -> str:
    """The size on an axis, or its smallest and largest; - where no layer of its kind is kept."""
    values = _values(architecture, axis)
    if not values:
        return "-"
    least, most = min(values), max(values)
    return str(least) if least == most else f"{least}-{most}"


def _drops(kinds: Sequence[str], choices: Mapping[str, Choice]) -> list[str]:
    """The layers that each budget drops; budgets that drop the same ones share a line."""
    budgets: dict[str, list[str]] = {}
    for name, choice in choices.items():
        kept = {layer.index for layer in choice.architecture.layers}
        dropped = [f"{kind} {i}" for i, kind in enumerate(kinds) if i not in kept]
        if dropped:
            budgets.setdefault(", ".join(dropped), []).append(name)
    lines = []
    for dropped_layers, names in budgets.items():
        line = f"{' and '.join(names)} {'drops' if len(names) == 1 else 'drop'} {dropped_layers}"
        lines += textwrap.wrap(line, WIDTH, subsequent_indent="    ")
    return lines
