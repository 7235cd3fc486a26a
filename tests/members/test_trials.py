"""Trials are all made, once each and in stretches of about the same cost; what they cost is what a
plain loop over the layers counts."""

from hypothesis import given
from hypothesis import strategies as st

from elastic.members.trials import Round, rounds


@st.composite
def some_round(draw: st.DrawFn) -> Round:
    """Of up to 12 layers, some dropped; at least one is tried."""
    count = draw(st.integers(2, 12))
    candidates = draw(st.lists(st.integers(0, count - 1), min_size=1, unique=True))
    dropped = draw(st.sets(st.sampled_from(candidates), max_size=len(candidates) - 1))
    return Round.after(count, candidates, dropped)


BATCHES = st.lists(st.integers(1, 4), min_size=1, max_size=9)


def cost(at: Round, rows: int, layer: int) -> int:
    """Of one trial, as it is shared out."""
    return rows * (len(at.layers) - at.layers.index(layer))


@given(some_round(), BATCHES, st.integers(1, 40))
def test_every_trial_has_one_process(at: Round, rows: list[int], processes: int) -> None:
    """In the order of batches and of layers, so that prefixes are shared."""
    shares = at.share_out(rows, processes)
    assert len(shares) == processes
    made = [(batch, layer) for share in shares for batch in share for layer in share[batch]]
    assert made == [(batch, layer) for batch in range(len(rows)) for layer in at.tried]


@given(some_round(), BATCHES, st.integers(1, 40))
def test_no_process_has_more_than_its_part_and_a_trial(
    at: Round, rows: list[int], processes: int
) -> None:
    costs = [
        sum(cost(at, rows[batch], layer) for batch in share for layer in share[batch])
        for share in at.share_out(rows, processes)
    ]
    largest = max(cost(at, count, layer) for count in rows for layer in at.tried)
    assert max(costs) <= sum(costs) / processes + largest


def test_more_processes_than_batches_all_have_work() -> None:
    at = Round.after(62, range(1, 61), [])
    shares = at.share_out([1] * 64, 128)
    assert all(shares)
    work = [sum(at.work(tried, [1] * 62) for tried in share.values()) for share in shares]
    assert max(work) < 1.1 * sum(work) / len(work)


@given(some_round(), st.lists(st.integers(1, 9), min_size=12, max_size=12), st.data())
def test_work_is_that_of_the_layers_that_run(
    at: Round, costs: list[int], data: st.DataObject
) -> None:
    """The network up to the last layer that is tried, and all behind each that is."""
    tried = sorted(data.draw(st.sets(st.sampled_from(at.tried), min_size=1)))
    run = [layer for layer in at.layers if layer < tried[-1]]
    for layer in tried:
        run += [later for later in at.layers if later > layer]
    assert at.work(tried, costs) == sum(costs[layer] for layer in run)


def test_rounds_drop_one_layer_after_another() -> None:
    found = list(rounds(4, [1, 2, 3], (2, 1), "iterative"))
    assert found == [Round((0, 1, 2, 3), (1, 2, 3)), Round((0, 1, 3), (1, 3))]
    assert list(rounds(4, [1, 2, 3], (2, 1), "one_pass")) == found[:1]
    assert list(rounds(4, [1, 2, 3], (), "one_pass")) == []
