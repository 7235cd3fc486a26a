"""Which members meet a budget: the most probable family, or the closest sizes. No torch.

A budget is met when the exact cost of a member is within the tolerance of its target, in every unit
that the target has. Of all families that meet every budget (and are nested, when asked) the most
probable one is taken.
"""

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from elastic.config import AXES, ConfigError
from elastic.members.architecture import AXIS_KIND, WIDTH_AXIS, Architecture, Selection, Space
from elastic.members.cost import LayerSize, parameters
from elastic.members.goals import Target

T = TypeVar("T")

LogProbabilities = Mapping[str, np.ndarray]
"""axis -> (decisions, choices); an axis that is left alone may be absent."""

Table = tuple[str, np.ndarray, np.ndarray, list[np.ndarray], int]
"""A heterogeneous axis: its name, costs (measures, sums) and score per sum of widths, choices per
layer, unit."""

FILLINGS = 32
"""Fillings of the layers that are tried per combination of the other axes."""

ATTEMPTS, PATIENCE = 100, 2_000
"""Members that are tried for one family before the best one so far is taken, and while none is."""


@dataclass(frozen=True)
class Choice:
    """The member that a budget got."""

    selection: Selection
    architecture: Architecture
    params: int


class Unreachable(ConfigError):
    """A target that no member meets; names the nearest members' costs.

    Args:
        nearest: costs in the order of the target's goals; where there is one goal, the nearest
            below and the nearest above, else the one member that misses its worst goal least.
    """

    def __init__(
        self,
        name: str,
        target: Target,
        nearest: Sequence[tuple[int, ...]],
        tolerance: float,
        nested: bool,
    ) -> None:
        self.name, self.target, self.nearest = name, target, list(nearest)
        self.tolerance, self.nested = tolerance, nested
        one = len(target.goals) == 1
        costs = " and ".join(
            f"{values[0]:,}"
            if one
            else " with ".join(m.text(v) for m, v in zip(target.measures, values, strict=True))
            for values in self.nearest
        )
        super().__init__(
            f"budgets.{name}: no combination of space is within {tolerance:.1%} of {target}; the "
            f"closest reachable {'are' if one else 'has'} {costs}" + (", nested" if nested else "")
        )

    def together(self, other: "Unreachable") -> "Unreachable":
        """One error for the members of both."""
        points = np.array([*self.nearest, *other.nearest]).T
        nearest = nearest_costs(points, self.target)
        return Unreachable(self.name, self.target, nearest, self.tolerance, self.nested)


def nearest_costs(costs: np.ndarray, target: Target) -> list[tuple[int, ...]]:
    """Of (goals, members) costs those that `Unreachable` names."""
    values = np.array(target.values)[:, None]
    if len(values) > 1:
        worst = np.abs(costs / values - 1).max(axis=0)
        return [tuple(map(int, costs[:, worst.argmin()]))]
    below, above = costs[costs <= values[0]], costs[costs >= values[0]]
    ends = [*([below.max()] if below.size else []), *([above.min()] if above.size else [])]
    return [(int(end),) for end in ends]


class Search:
    """Members of one space under one drop order, by size and by probability."""

    def __init__(self, space: Space, drop_order: Sequence[int], tolerance: float) -> None:
        self.space = space
        self.drop_order = tuple(drop_order)
        self.tolerance = tolerance
        self._once = [axis for axis in AXES if axis not in space.heterogeneous]
        self._layered = [axis for axis in AXES if axis in space.heterogeneous]
        self._kinds: dict[int, Counter[str]] = {}

    def family(
        self,
        targets: Mapping[str, Target],
        log_probabilities: Mapping[str, LogProbabilities],
        nested: bool,
    ) -> dict[str, Choice]:
        """The most probable member for every budget, `targets` largest first.

        The parent itself is the only member of its own size. With heterogeneous axes the layers are
        set to their best for every combination of the other axes.

        Raises:
            ConfigError: no combination reaches a target; the message names the closest sizes.
        """
        names = list(targets)
        largest = self._whole()
        ceiling = []  # best score of every budget on its own, without nesting
        for name in names:
            first = next(self._candidates(targets[name], log_probabilities[name], largest, 1), None)
            if first is None:
                raise self._unreachable(name, targets[name], largest, False)
            ceiling.append(first[0])

        failed: dict[str, Selection] = {}

        def best(
            position: int, outer: Selection, fillings: int
        ) -> tuple[float, list[Selection]] | None:
            if position == len(names):
                return 0.0, []
            name = names[position]
            found: tuple[float, list[Selection]] | None = None
            hope = sum(ceiling[position + 1 :])
            limit = outer if nested else largest
            for score, selection in self._candidates(
                targets[name], log_probabilities[name], limit, fillings
            ):
                patience = ATTEMPTS if found is not None and fillings > 1 else PATIENCE
                if next(attempts) > patience or found is not None and score + hope <= found[0]:
                    break
                rest = best(position + 1, selection, fillings)
                if rest is not None and (found is None or score + rest[0] > found[0]):
                    found = score + rest[0], [selection, *rest[1]]
            if found is None:
                failed[name] = outer
            return found

        # One filling per combination is quick and nearly always enough; more only when it is not.
        for fillings in (1, FILLINGS):
            attempts = itertools.count()
            solution = best(0, largest, fillings)
            if solution is not None:
                break
        if solution is None:
            name, outer = next(iter(failed.items()))
            raise self._unreachable(name, targets[name], outer, nested)
        members = map(self.choice, solution[1])
        return dict(zip(names, members, strict=True))

    def members(
        self, target: Target, log_probabilities: LogProbabilities, count: int
    ) -> list[Choice]:
        """The most probable members that meet a target, at most `count`; nested or not."""
        found: dict[Architecture, Choice] = {}
        for _, selection in self._candidates(target, log_probabilities, self._whole(), FILLINGS):
            choice = self.choice(selection)
            found.setdefault(choice.architecture, choice)
            if len(found) == count:
                break
        return list(found.values())

    def choice(self, selection: Selection) -> Choice:
        """The member of a selection."""
        architecture = self.space.architecture(selection, self.drop_order)
        return Choice(selection, architecture, parameters(self.space.shape, architecture))

    def _whole(self) -> Selection:
        return {axis: (0,) * self.space.decisions(axis) for axis in AXES}

    def _candidates(
        self, target: Target, log_probabilities: LogProbabilities, outer: Selection, fillings: int
    ) -> Iterator[tuple[float, Selection]]:
        """Members within tolerance of the target and within `outer`, most probable first."""
        if target.whole:
            if outer == self._whole():
                yield self.log_probability(log_probabilities, outer), outer
            return
        heap: list[tuple[float, int, bool, Selection]] = []
        tickets = itertools.count()  # ties keep their order
        ranges = [range(outer[axis][0], len(self.space.choices[axis])) for axis in self._once]
        for indices in itertools.product(*ranges):
            once: Selection = {
                axis: (index,) for axis, index in zip(self._once, indices, strict=True)
            }
            bound = self.log_probability(log_probabilities, once)
            for axis in self._layered:  # the best that the layers could add
                for layer, floor in enumerate(outer[axis]):
                    bound += float(_log(log_probabilities, self.space, axis)[layer, floor:].max())
            heapq.heappush(heap, (-bound, next(tickets), False, once))
        while heap:
            score, _, complete, selection = heapq.heappop(heap)
            if complete:
                yield -score, selection
                continue
            found = self._fill_layers(target, log_probabilities, selection, outer)
            for filled in itertools.islice(found, fillings):
                total = self.log_probability(log_probabilities, filled)
                heapq.heappush(heap, (-total, next(tickets), True, filled))

    def log_probability(self, log_probabilities: LogProbabilities, selection: Selection) -> float:
        """Of a selection, or of a part of it, under independent choices."""
        return sum(
            float(_log(log_probabilities, self.space, axis)[position, index])
            for axis, indices in selection.items()
            for position, index in enumerate(indices)
        )

    def _sums(
        self, axis: str, log: np.ndarray, once: Selection, outer: Selection
    ) -> tuple[np.ndarray, list[np.ndarray], int]:
        """Best log-probability for every sum of one axis' sizes over the kept layers.

        A layer's cost is linear in its width, so that only the sum matters: an exact knapsack.
        Returns (sums,) scores in units of the sizes' common divisor, the choice of every layer at
        every sum (-1 for a dropped layer), and the unit.
        """
        sizes = np.array(self.space.choices[axis])
        unit = int(np.gcd.reduce(sizes))
        steps = sizes // unit
        dropped = self._dropped(once)
        scores = np.zeros(1)
        taken = []
        for position, layer in enumerate(self.space.layers_of(axis)):
            floor = outer[axis][position]
            if layer in dropped:
                taken.append(np.full(len(scores), floor + int(log[position, floor:].argmax())))
                continue
            grown = np.full(len(scores) + int(steps[floor]), -np.inf)
            choice = np.full(len(grown), -1)
            for index in range(floor, len(sizes)):
                shifted = np.full(len(grown), -np.inf)
                start = int(steps[index])
                shifted[start : start + len(scores)] = scores + log[position, index]
                better = shifted > grown
                grown[better] = shifted[better]
                choice[better] = index
            scores = grown
            taken.append(choice)
        return scores, taken, unit

    def _kept(self, depth: int) -> Counter[str]:
        """Layers of each kind that a choice of depth keeps."""
        if depth not in self._kinds:
            kept = self.space.choices["depth"][depth]
            dropped = self.drop_order[: len(self.space.shape.pattern) - kept]
            kinds = self.space.shape.kinds
            self._kinds[depth] = Counter(kinds) - Counter(kinds[layer] for layer in dropped)
        return self._kinds[depth]

    def _dropped(self, once: Selection) -> set[int]:
        kept = self.space.choices["depth"][once["depth"][0]]
        return set(self.drop_order[: len(self.space.shape.pattern) - kept])

    def _layer_tables(
        self,
        target: Target,
        log_probabilities: LogProbabilities,
        once: Selection,
        outer: Selection,
    ) -> tuple[np.ndarray, list[Table]]:
        """Base costs (goals,) without the heterogeneous widths, and their tables."""
        shape = self.space.shape
        hidden = self.space.choices["hidden"][once["hidden"][0]]
        channels = self.space.choices["mamba_head_dim"][once["mamba_head_dim"][0]]
        sizes = []
        for kind, count in self._kept(once["depth"][0]).items():
            axis = WIDTH_AXIS[kind]
            # a layer's cost is linear in its width: what depends on it is in the tables
            width = 0 if axis in self._layered else self.space.choices[axis][once[axis][0]]
            sizes.append(LayerSize(kind, width, channels, gate=count))
        measures = target.measures
        base = np.array([measure.of(shape, hidden, sizes) for measure in measures])
        tables = []
        for axis in self._layered:
            kind = AXIS_KIND[axis]
            slopes = [measure.per_width(shape, hidden, kind, channels) for measure in measures]
            log = _log(log_probabilities, self.space, axis)
            scores, taken, unit = self._sums(axis, log, once, outer)
            widths = np.arange(len(scores), dtype=np.int64) * unit
            tables.append((axis, np.outer(slopes, widths), scores, taken, unit))
        return base, tables

    def _fill_layers(
        self, target: Target, log_probabilities: LogProbabilities, once: Selection, outer: Selection
    ) -> Iterator[Selection]:
        """Complete a selection with widths per layer that meet the target, most probable first.

        One filling, the best, for each way of sharing the widths between the axes; a nested
        family may need another than the first, since the next budget has to fit inside.
        """
        base, tables = self._layer_tables(target, log_probabilities, once, outer)
        costs, scores = base[:, None], np.zeros(1)
        for _, more_costs, more_scores, _, _ in tables:
            costs = _all_sums(costs, more_costs)
            scores = (scores[:, None] + more_scores).ravel()
        values = np.array(target.values)[:, None]
        near = (np.abs(costs - values) <= self.tolerance * values).all(axis=0)
        met = np.flatnonzero(near & (scores > -np.inf))
        for winner in met[np.argsort(-scores[met], kind="stable")]:
            yield self._trace(int(winner), tables, once)

    def _trace(self, winner: int, tables: list[Table], once: Selection) -> Selection:
        """The choice of every layer behind one entry of the combined tables."""
        selection = dict(once)
        dropped = self._dropped(once)
        for axis, more_costs, _, taken, unit in reversed(tables):
            winner, total = divmod(winner, more_costs.shape[1])
            indices = []
            layers = self.space.layers_of(axis)
            for layer, choice in zip(reversed(layers), reversed(taken), strict=True):
                at = min(total, len(choice) - 1) if layer in dropped else total
                indices.append(int(choice[at]))
                if layer not in dropped:
                    total -= self.space.choices[axis][indices[-1]] // unit
            selection[axis] = tuple(reversed(indices))
        return {axis: selection[axis] for axis in AXES}

    def _unreachable(
        self, name: str, target: Target, outer: Selection, nested: bool
    ) -> Unreachable:
        """The error that names the nearest costs within `outer`."""
        flat = {
            axis: np.zeros((self.space.decisions(axis), len(self.space.choices[axis])))
            for axis in AXES
        }
        nearest: list[tuple[int, ...]] = []
        ranges = [range(outer[axis][0], len(self.space.choices[axis])) for axis in self._once]
        for indices in itertools.product(*ranges):
            once: Selection = {
                axis: (index,) for axis, index in zip(self._once, indices, strict=True)
            }
            base, tables = self._layer_tables(target, flat, once, outer)
            costs = base[:, None]
            for _, more_costs, more_scores, _, _ in tables:
                costs = _all_sums(costs, more_costs[:, more_scores > -np.inf])
            known = np.array(nearest, dtype=np.int64).reshape(-1, len(costs)).T
            nearest = nearest_costs(np.concatenate((known, costs), axis=1), target)
        return Unreachable(name, target, nearest, self.tolerance, nested)


def _all_sums(costs: np.ndarray, more: np.ndarray) -> np.ndarray:
    """(goals, n) and (goals, m) -> (goals, n * m), every pair."""
    return (costs[:, :, None] + more[:, None, :]).reshape(len(costs), -1)


def _log(log_probabilities: LogProbabilities, space: Space, axis: str) -> np.ndarray:
    """Log-probabilities of an axis; flat where none are given."""
    if axis in log_probabilities:
        return log_probabilities[axis]
    return np.zeros((space.decisions(axis), len(space.choices[axis])))


def chains(
    members: Sequence[Sequence[T]], nested: bool, of: Callable[[T], Architecture]
) -> Iterator[tuple[T, ...]]:
    """Every family of one member per budget, largest budget first; nested ones alone if asked."""

    def extend(taken: tuple[T, ...]) -> Iterator[tuple[T, ...]]:
        if len(taken) == len(members):
            yield taken
            return
        for member in members[len(taken)]:
            if not nested or not taken or of(member).is_within(of(taken[-1])):
                yield from extend((*taken, member))

    yield from extend(())
