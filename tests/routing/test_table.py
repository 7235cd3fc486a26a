"""The table of a family: exact sizes, ranges, dropped layers by name, printed once per change."""

from helpers.goals import in_params

from elastic.config import ParentShape, SpaceConfig
from elastic.members.architecture import Architecture, Selection, Space
from elastic.members.cost import parameters
from elastic.members.search import Choice
from elastic.routing.table import describe, sizes

SHAPE = ParentShape(
    pattern="M-*M-",
    hidden_size=16,
    vocab_size=64,
    intermediate_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    mamba_num_heads=6,
    mamba_head_dim=4,
    n_groups=2,
    ssm_state_size=8,
)
SPACE = Space.build(
    SpaceConfig(
        hidden=[16, 14],
        ffn=[32, 28, 16],
        mamba_heads=[6, 4],
        depth=[5, 4, 3],
        heterogeneous=["ffn"],
    ),
    SHAPE,
)


def chosen(drop_order: tuple[int, ...] = (1, 3), **picks: tuple[int, ...]) -> Choice:
    """A member of `SPACE`; axes that are not named are whole."""
    selection: Selection = {axis: (0,) * SPACE.decisions(axis) for axis in SPACE.choices} | picks
    architecture = SPACE.architecture(selection, drop_order)
    return Choice(selection, architecture, parameters(SHAPE, architecture))


def test_a_budget_has_a_line_with_target_exact_size_and_distance() -> None:
    choices = {"full": chosen(), "small": chosen(hidden=(1,))}
    targets = {"full": choices["full"].params, "small": choices["small"].params // 2}
    header, full, small = describe(in_params(SHAPE, targets), choices).splitlines()
    assert header.split()[:3] == ["budget", "target", "parameters"]
    assert full.startswith("full") and small.startswith("small")
    assert f"{choices['small'].params:,}" in small and "+100.0" in small and "+0.00%" in full
    assert small.endswith("5 of 5") and "6 x 4" in small


def test_sizes_that_differ_are_a_range_not_a_mean() -> None:
    choice = chosen(ffn=(0, 2))
    line = describe(in_params(SHAPE, {"small": choice.params}), {"small": choice}).splitlines()[1]
    assert " 16-32 " in line and " 24 " not in line


def test_dropped_layers_are_named_by_kind_and_index() -> None:
    choices = {"full": chosen(), "medium": chosen(depth=(1,)), "small": chosen(depth=(2,))}
    targets = in_params(SHAPE, {name: c.params for name, c in choices.items()})
    lines = describe(targets, choices).splitlines()
    assert lines[4:] == ["medium drops mlp 1", "small drops mlp 1, mamba 3"]


def test_a_kind_without_a_kept_layer_has_no_size() -> None:
    whole = Architecture.full(SHAPE)
    architecture = whole.without({1, 4})
    choice = Choice({}, architecture, parameters(SHAPE, architecture))
    line = describe(in_params(SHAPE, {"small": choice.params}), {"small": choice}).splitlines()[1]
    assert line.split()[5] == "-"


def test_five_budgets_of_a_large_parent_fit_100_columns() -> None:
    """As wide as it gets: 12B sizes, sizes layer by layer, twenty dropped layers."""
    large = ParentShape(
        pattern="M-M-M-M*-" * 6 + "M-M-M-M-",
        hidden_size=5120,
        vocab_size=131_072,
        intermediate_size=20_480,
        num_attention_heads=40,
        num_key_value_heads=8,
        head_dim=128,
        mamba_num_heads=128,
        mamba_head_dim=80,
        n_groups=8,
        ssm_state_size=128,
    )
    space = Space.build(
        SpaceConfig(
            ffn=[20_480, 10_240],
            mamba_heads=[128, 112],
            attention_heads=[40, 32],
            depth=[62, 42],
            heterogeneous=["ffn", "mamba_heads", "attention_heads"],
        ),
        large,
    )
    mixed = {axis: (0,) * space.decisions(axis) for axis in space.choices}
    for axis in space.heterogeneous:
        mixed[axis] = mixed[axis][:-1] + (1,)
    architecture = space.architecture(mixed | {"depth": (1,)}, tuple(range(2, 22)))
    choice = Choice(mixed, architecture, parameters(large, architecture))
    choices = {f"budget_{i}b": choice for i in range(5)}
    text = describe(in_params(large, {name: 9_500_000_000 for name in choices}), choices)
    assert max(map(len, text.splitlines())) <= 100
    assert "10240-20480" in text and "112-128 x 80" in text and "32-40" in text
    assert text.count("drop mamba 2") == 1, "budgets that drop the same layers share a line"


def test_figures_for_metrics_are_means_over_the_kept_layers() -> None:
    choice = chosen(ffn=(1, 2), hidden=(1,))
    figures = sizes(choice)
    assert figures["ffn"] == (28 + 16) / 2
    assert (figures["hidden"], figures["depth"], figures["mamba_heads"]) == (14, 5, 6)
    assert figures["params"] == choice.params
    dropped = chosen(ffn=(1, 2), depth=(1,))
    assert sizes(dropped)["ffn"] == 16 and sizes(dropped)["depth"] == 4
