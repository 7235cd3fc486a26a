"""elastic.json: what is written is read again, and what cannot be read is refused in one line."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.strategies import tiny_member, tiny_shape

from elastic.members.architecture import Architecture
from elastic.members.cost import parameters
from elastic.storage.manifest import FORMAT_VERSION, NAME, Manifest, Member


def example() -> Manifest:
    return Manifest(
        budgets={
            "full": Member({"params": 1.0}, 5000, Architecture.full(tiny_shape())),
            "small": Member({"params": 0.5}, 2500, tiny_member()),
        },
        space={"choices": {"hidden": [13, 8]}, "heterogeneous": ["ffn"]},
        ranking={"drop_order": [3, 1]},
        provenance={"parent": None, "tokens": 12, "versions": {"torch": "2"}},
    )


def test_round_trip_is_exact_and_keeps_the_order_of_budgets(tmp_path: Path) -> None:
    example().write(tmp_path)
    again = Manifest.read(tmp_path)
    assert again == example()
    assert list(again.budgets) == ["full", "small"]
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_the_file_has_the_documented_form(tmp_path: Path) -> None:
    """Anyone may cut with this file and safetensors alone: its form is a contract."""
    example().write(tmp_path)
    value = json.loads((tmp_path / "elastic.json").read_text())
    assert list(value) == ["format_version", "budgets", "space", "ranking", "energy", "provenance"]
    assert value["format_version"] == FORMAT_VERSION == 2
    assert value["budgets"]["small"] == {
        "target": {"params": 0.5},
        "params": 2500,
        "architecture": tiny_member().to_json(),
    }


def test_writing_again_replaces_the_whole(tmp_path: Path) -> None:
    example().write(tmp_path)
    Manifest({}, {}, {}, {}).write(tmp_path)
    assert Manifest.read(tmp_path) == Manifest({}, {}, {}, {})


def test_version_1_has_no_energy_and_is_read(tmp_path: Path) -> None:
    dataclasses.replace(example(), version=1).write(tmp_path)
    value = json.loads((tmp_path / NAME).read_text())
    (tmp_path / NAME).write_text(json.dumps(without(value, "energy")))
    assert Manifest.read(tmp_path) == dataclasses.replace(example(), version=1)


def test_unknown_budget_lists_those_there_are() -> None:
    assert example().member("small").params == 2500
    with pytest.raises(ValueError, match=r"^budget=tiny: must be one of full, small$"):
        example().member("tiny")


def refused(directory: Path, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Manifest.read(directory)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_without_one_is_not_an_elastic_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path, r"elastic\.json: not found; .* is not an elastic checkpoint")
    refused(tmp_path / "nowhere", r"elastic\.json: not found")


def without(value: dict[str, Any], *path: str) -> dict[str, Any]:
    """The value with one entry deleted."""
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return value


@pytest.mark.parametrize(
    "path",
    [
        ("format_version",),
        ("budgets",),
        ("space",),
        ("ranking",),
        ("energy",),
        ("provenance",),
        ("budgets", "small", "target"),
        ("budgets", "small", "params"),
        ("budgets", "small", "architecture"),
        ("budgets", "small", "architecture", "hidden_size"),
        ("budgets", "small", "architecture", "layers"),
    ],
    ids=".".join,
)
def test_a_missing_entry_is_damage(tmp_path: Path, path: tuple[str, ...]) -> None:
    example().write(tmp_path)
    value = json.loads((tmp_path / NAME).read_text())
    (tmp_path / NAME).write_text(json.dumps(without(value, *path)))
    refused(tmp_path, rf"elastic\.json: damaged.*{path[-1]}")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe\x00", b'{"format_version": 1}']
)
def test_what_is_not_an_elastic_json_is_damage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    refused(tmp_path, r"elastic\.json: damaged")


@pytest.mark.parametrize("budgets", [[], 3, None, {"small": 3}, {"small": {"params": "many"}}])
def test_budgets_of_another_form_are_damage(tmp_path: Path, budgets: Any) -> None:
    value = {"format_version": 1, "budgets": budgets, "space": {}, "ranking": {}, "provenance": {}}
    (tmp_path / NAME).write_text(json.dumps(value))
    refused(tmp_path, r"elastic\.json: damaged")


@pytest.mark.parametrize("version", [0, 3, "1"])
def test_another_version_says_which_one_is_read(tmp_path: Path, version: object) -> None:
    (tmp_path / NAME).write_text(json.dumps({"format_version": version}))
    refused(tmp_path, rf"format_version={version}, this version reads 1 and 2")


def changed(value: dict[str, Any], path: str, new: Any) -> dict[str, Any]:
    """The value with one entry, `a.b.c`, replaced."""
    *outer, last = path.split(".")
    inner: Any = value
    for key in outer:
        inner = inner[int(key) if isinstance(inner, list) else key]
    inner[int(last) if isinstance(inner, list) else last] = new
    return value


SMALL = "budgets.small"
BY_ITSELF = [
    *((f"{SMALL}.params", value) for value in (2500.0, "2500", 0, -1, True, None)),
    *((f"{SMALL}.target", value) for value in ([], 3, None)),
    *((f"{SMALL}.target.params", value) for value in ("0.5", 0, -1, True, None, 1e999)),
    *((f"{SMALL}.architecture.hidden_size", value) for value in (8.5, "8", None, True, [8])),
    *((f"{SMALL}.architecture.layers", value) for value in (3, None, [3], [[]], {"a": 1})),
    *((f"{SMALL}.architecture.layers.0.index", value) for value in (0.5, "0", None)),
    *((f"{SMALL}.architecture.layers.0.num_heads", value) for value in (6.5, "6", None)),
    *((f"{SMALL}.architecture.layers.0.kind", value) for value in ("moe", 3, None, [])),
    *((f"{SMALL}.architecture.layers.0.size", value) for value in (3,)),
    *(("space", value) for value in ([], 3, None)),
    *(("space.choices", value) for value in ([], 3)),
    *(("space.choices.hidden", value) for value in ([], 13, [13, 13], [8, 13], [13, 8.5], [13, 0])),
    *(("space.choices.width", value) for value in ([13],)),
    *(("space.heterogeneous", value) for value in (3, "ffn", ["hidden"], [3])),
    *(("ranking", value) for value in ([], None)),
    *(("ranking.drop_order", value) for value in (3, [1, 1], [-1], ["1"], [1.0], None)),
    *(("provenance", value) for value in ([], 3, None)),
]


@pytest.mark.parametrize(("path", "value"), BY_ITSELF, ids=str)
def test_every_entry_has_its_type_and_range(tmp_path: Path, path: str, value: Any) -> None:
    example().write(tmp_path)
    written = json.loads((tmp_path / NAME).read_text())
    (tmp_path / NAME).write_text(json.dumps(changed(written, path, value)))
    refused(tmp_path, r"elastic\.json: damaged, ")


@pytest.mark.parametrize("name", ["../x", "a/b", "", "x\n"])
def test_a_budget_that_names_no_file_is_damage(tmp_path: Path, name: str) -> None:
    example().write(tmp_path)
    written = json.loads((tmp_path / NAME).read_text())
    written["budgets"][name] = written["budgets"].pop("small")
    (tmp_path / NAME).write_text(json.dumps(written))
    refused(tmp_path, r"elastic\.json: damaged, budgets: the name '.*' must be a plain file name")


def test_deep_nesting_is_damage(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("[" * 200_000)
    refused(tmp_path, r"elastic\.json: damaged")


def fitting() -> Manifest:
    """A manifest that fits the tiny parent."""
    shape = tiny_shape()
    members = {"full": Architecture.full(shape), "small": tiny_member()}
    budgets = {n: Member({"params": 0.5}, parameters(shape, a), a) for n, a in members.items()}
    space = {"choices": {"hidden": [13, 8], "mamba_heads": [6, 2]}, "heterogeneous": []}
    return Manifest(budgets, space, {"drop_order": [3, 1]}, {})


BESIDE = [
    (f"{SMALL}.params", 2500, "budget small: params=2500, but its architecture has"),
    (f"{SMALL}.architecture.hidden_size", 10**9, r"hidden_size=1000000000 must be in 1\.\.13"),
    (f"{SMALL}.architecture.hidden_size", 0, "hidden_size=0 must be in"),
    (f"{SMALL}.architecture.layers.0.num_heads", 3, "num_heads=3 must be a multiple of 2"),
    (f"{SMALL}.architecture.layers.3.index", 99, r"index=99\]=99 must be in 0"),
    (f"{SMALL}.architecture.layers", [], "at least one kept layer"),
    ("space.choices.hidden", [26, 13], "space.choices.hidden=.* must be multiples of 1, 13 the"),
    ("space.choices.mamba_heads", [6, 3], "space.choices.mamba_heads=.* multiples of 2, 6 the"),
    ("ranking.drop_order", [3, 99], "ranking.drop_order=.* must be below 5"),
]


@pytest.mark.parametrize(("path", "value", "message"), BESIDE)
def test_every_budget_is_held_against_the_parent(
    tmp_path: Path, path: str, value: Any, message: str
) -> None:
    """Whichever of them is wanted."""
    fitting().write(tmp_path)
    Manifest.read(tmp_path).check(tiny_shape())
    written = json.loads((tmp_path / NAME).read_text())
    (tmp_path / NAME).write_text(json.dumps(changed(written, path, value)))
    with pytest.raises(ValueError, match=message) as caught:
        Manifest.read(tmp_path).check(tiny_shape())
    assert "\n" not in str(caught.value)
