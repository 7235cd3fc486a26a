"""Budgets and stages name files, folders, tensors and metrics: only names that can be all of
these."""

import pytest
from helpers.gate import run_settings

from elastic.config import ConfigError, RunConfig, parse


def renamed(group: str, *names: str) -> dict:
    """A run whose budgets or stages have these names, and nothing that lists them."""
    settings = run_settings()
    if group == "budgets":
        settings["budgets"] = {name: {"params": 0.5} for name in names}
    else:
        first, last = settings["curriculum"]["stages"].values()
        named = {name: dict(last) for name in names}
        settings["curriculum"]["stages"] = {"first": first, **named}
    return settings


def refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse(settings, RunConfig)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("group", ["budgets", "stages"])
@pytest.mark.parametrize("name", ["12b", "a", "9b-v2", "x_1.5", "_", "Small", "n" * 100])
def test_plain_file_names_pass(group: str, name: str) -> None:
    assert parse(renamed(group, name), RunConfig)


@pytest.mark.parametrize("group", ["budgets", "stages"])
@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "a/b", "a\\b", "../x", "-x", "a b", "a\nb", "a\0", "x.", "größe"]
    + ["n" * 101, "a:b", "a,b", "*"],
)
def test_others_are_refused(group: str, name: str) -> None:
    refused(renamed(group, name), r"(budgets|curriculum\.stages): the name '.*' must be a plain")


@pytest.mark.parametrize("name", ["parent", "Parent", "temperature", "scale"])
def test_a_budget_is_not_called_like_something_of_ours(name: str) -> None:
    """Its losses would be written over the parent's in metrics.csv."""
    said = "must be another name: metrics call something else parent or temperature or scale"
    refused(renamed("budgets", "full", name), f"^budgets={name}: {said}")
    assert parse(renamed("stages", name), RunConfig)


@pytest.mark.parametrize("group", ["budgets", "stages"])
def test_names_that_differ_by_case_alone_are_refused(group: str) -> None:
    """Some file systems do not tell them apart."""
    refused(renamed(group, "small", "Small"), "small and Small must differ by more than case")
