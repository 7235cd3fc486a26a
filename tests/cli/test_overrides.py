"""What is typed on the command line: keys that begin with a digit, order, and how to quote."""

import shlex
from pathlib import Path

import pytest
from helpers.runs import settings
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException
from hypothesis import given
from hypothesis import strategies as st
from omegaconf.errors import OmegaConfBaseException

from elastic.cli.command import CONF, _explained, arranged
from elastic.cli.overrides import addition, several, unreadable
from elastic.config import ConfigError, RunConfig, parse


def read(argument: str) -> object:
    """The value that Hydra reads."""
    return OverridesParser.create().parse_override(argument).value()


def budgets(*overrides: str) -> dict[str, float]:
    """Budgets of the published family after these overrides."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("train", ["experiment=nano_v2_12b", *overrides])
    return {name: float(budget.params) for name, budget in composed.budgets.items()}


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("budgets.6b.params=6.1e9", {"6b": 6.1e9}),
        ("budgets.6b={params:6.1e9}", {"6b": 6.1e9}),
        ("+budgets.7b.params=7e9", {"7b": 7e9}),
        ("+budgets.7b={params:7e9}", {"7b": 7e9}),
        ("+budgets.7b-wide.params=7e9", {"7b-wide": 7e9}),
        ("++budgets.1e3.params=7e9", {"1e3": 7e9}),
        ("~budgets.9b", {"9b": None}),
    ],
)
def test_keys_may_begin_with_a_digit(override: str, changed: dict[str, float | None]) -> None:
    """Set, added and deleted like any other."""
    expected = {"12b": 1.0, "9b": 9e9, "6b": 6e9} | changed
    assert budgets(override) == {name: size for name, size in expected.items() if size is not None}


def test_what_is_not_there_cannot_be_deleted() -> None:
    with pytest.raises(ConfigCompositionException, match=r"'budgets\.10b' does not exist"):
        budgets("~budgets.10b")


def test_an_entry_of_a_list_is_still_set_by_its_index() -> None:
    hidden = settings(Path("unused"), "space.hidden.1=116").space.hidden
    assert hidden is not None and hidden[1] == 116


@pytest.mark.parametrize(
    "value",
    ["/tmp/ä b=c#1.txt", "a=b", "a#b", "(1)", "it's", 'say "so"', "back\\", '\\"', "x,y=z", "日本"],
)
def test_the_way_to_quote_is_shown_with_the_very_argument(value: str) -> None:
    """What is shown, typed into a shell, gives that value."""
    argument = f"data.path={value}"
    line = unreadable(argument)
    assert line.startswith(argument) and "\n" not in line
    typed = line.rpartition(" shell too: ")[2]
    [word] = shlex.split(typed)
    assert read(word) == value


@given(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=12))
def test_any_text_that_is_not_read_is_answered_with_one_that_is(value: str) -> None:
    """Lists and opened quotes aside, which get a sentence of their own."""
    argument = f"data.path=/{value}"
    try:
        read(argument)
    except HydraException:
        [word] = shlex.split(unreadable(argument).rpartition(" shell too: ")[2])
        if "${" not in value:  # stays an interpolation, quoted or not
            assert read(word) == f"/{value}"


@pytest.mark.parametrize(
    ("argument", "before", "words"),
    [
        ("nonsense", "", "settings are given as key=value"),
        ("texts/*.txt", "data.path=/my", "a value with spaces is quoted: 'data.path=\"/my texts/"),
        ("größe=1", "", "settings are given as key=value"),
        ("space.hidden=[1,2", "", "[ is opened and not closed by ]"),
        ("data.path='a", "", "' is opened and not closed by '"),
        ("prompts=[a=b]", "", """as in 'prompts=["a=b","c d"]'"""),
        ("data.path=~/x", "", f"write data.path={Path.home()}/x"),
        ("data.path=~/ä", "", f"write 'data.path=\"{Path.home()}/ä\"'"),
    ],
)
def test_other_arguments_that_cannot_be_read(argument: str, before: str, words: str) -> None:
    line = unreadable(argument, before)
    assert line.startswith(f"{argument}: ") and words in line and "\n" not in line


def test_several_values_are_a_sweep_a_list_or_a_text() -> None:
    line = several("data.path=a,b")
    assert "--multirun" in line
    assert """'data.path=[a,b]'""" in line and """'data.path="a,b"'""" in line


@pytest.mark.parametrize(
    ("key", "argument", "expected"),
    [
        ("budgets.7b", "budgets.7b.params=7e9", "; to add it: +budgets.7b.params=7e9"),
        ("budgets.x", "budgets.x={params:1}", "; to add it: '+budgets.x={params:1}'"),
        ("curriculum.stages.s", "curriculum.stages.s.tokens=1", "; to add it: +curriculum"),
        ("trainer.speed", "trainer.speed=1", ""),
        ("budgets.full.param", "budgets.full.param=1", ""),
        ("budgets.y", "seed=1", ""),
    ],
)
def test_only_where_names_are_free_is_an_addition_offered(
    key: str, argument: str, expected: str
) -> None:
    shown = addition(key, [argument], RunConfig)
    assert shown.startswith(expected) and bool(shown) == bool(expected)


PLACES = "must be one of budgets, curriculum, data, "
REFUSED = (HydraException, OmegaConfBaseException, ValueError)
"""What a command makes one line of."""

OPTIM = "must be one of beta1, beta2, eps, gradient_clip, weight_decay"


@pytest.mark.parametrize(
    ("argument", "begins", "ends"),
    [
        ("speed=1", f"speed: unknown; {PLACES}", "trainer"),
        ("+speed=1", f"speed: unknown; {PLACES}", "trainer"),
        ("++speed=1", f"speed: unknown; {PLACES}", "trainer"),
        ("+trainer.speed=1", "trainer.speed: unknown; must be one of accelerator, ", "every"),
        ("++trainer.speed=1", "trainer.speed: unknown; must be one of accelerator, ", "every"),
        ("+nowhere.deep.key=1", f"nowhere: unknown; {PLACES}", "trainer"),
        ("+optim.temperature=2", f"optim.temperature: unknown; {OPTIM}; obj", "is a setting"),
        ("++optim.temperature=2", f"optim.temperature: unknown; {OPTIM}; obj", "is a setting"),
        ("+budgets.x.param=0.5", "budgets.x.param: unknown; must be one of ", "weight_dtype"),
        ("++budgets.full.param=1", "budgets.full.param: unknown; must be one of ", "weight_dtype"),
        ("+seed=3", "+seed: is set already; to change it: seed=3", "3"),
        ("+name=a b", "+name: is set already; to change it: 'name=a b'", "'"),
        ("+parent=tiny", "+parent: is set already; to change it: parent=tiny", "tiny"),
    ],
)
def test_what_cannot_be_added_is_named_without_its_sign(
    argument: str, begins: str, ends: str
) -> None:
    """And nobody is told to add what was just added."""
    with initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(REFUSED) as caught:
        parse(compose("train", [argument]), RunConfig)
    line = _explained(caught.value, [argument], RunConfig)
    assert line.startswith(begins) and line.endswith(ends) and "\n" not in line, line
    assert "to add it" not in line


@pytest.mark.parametrize(
    ("typed", "understood"),
    [
        ("seed=1 --multirun name=x", "seed=1 name=x --multirun"),
        ("--cfg job seed=1 --resolve seed=2", "seed=1 seed=2 --cfg --resolve job"),
        ("--config-dir D ~budgets -cn N", "~budgets --config-dir D -cn N"),
        ("--info", "--info"),
    ],
)
def test_settings_may_stand_on_both_sides_of_an_option(typed: str, understood: str) -> None:
    given = arranged(typed.split())
    count = sum("=" in word or word.startswith("~") for word in given)
    assert given[:count] == understood.split()[:count]
    assert sorted(given) == sorted(understood.split())


@pytest.mark.parametrize("typed", ["--speed", "seed=1 --cfg", "--cfg nothing"])
def test_an_option_that_is_none_is_one_line(typed: str) -> None:
    with pytest.raises(ConfigError, match="--hydra-help") as caught:
        arranged(typed.split())
    assert "\n" not in str(caught.value)
