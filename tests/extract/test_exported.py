"""A directory is loaded as a member only if it is that member; damaged ones are in test_load."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.strategies import random_tokens, tiny_shape

import elastic
from elastic.extract.export import extract
from elastic.extract.exported import PROVENANCE, load_exported
from elastic.members.architecture import Architecture, AttentionLayer, MambaLayer, MLPLayer


def member(first: int, last: int) -> Architecture:
    """Two MLPs of these widths around attention."""
    layers = (MambaLayer(0, 4, 5), MLPLayer(1, first), AttentionLayer(2, 4), MLPLayer(4, last))
    return Architecture(9, layers)


MEMBERS = {"falling": member(9, 3), "rising": member(3, 9), "even": member(9, 9)}
"""All have the same widest layers."""


@pytest.fixture
def family(write: Callable[..., Any], tmp_path: Path) -> Any:
    return write(tmp_path / "elastic", tiny_shape(), MEMBERS)


@pytest.mark.parametrize(
    ("budget", "export"), [("even", "native"), ("falling", "padded"), ("falling", "per_layer")]
)
def test_every_form_of_a_member_is_that_member(
    family: Any, tmp_path: Path, budget: str, export: str
) -> None:
    """Also when another program has loaded and saved it, which writes config.json anew."""
    output = extract(family.config(tmp_path / "out", budget, export=export, verify=False))
    tokens = random_tokens(family.parent.shape)
    with torch.no_grad():
        expected = elastic.load(output)(tokens).logits
        model = load_exported(output, family.path, budget)
        assert torch.equal(model(tokens).logits, expected)
        model.save_pretrained(tmp_path / "saved")
        again = load_exported(tmp_path / "saved", family.path, budget, "float32")
        assert torch.equal(again(tokens).logits, expected)


def test_sizes_per_layer_must_be_those_of_the_member(family: Any, tmp_path: Path) -> None:
    """Where config.json holds the same size for all, and no provenance says what was cut."""
    settings = {"export": "per_layer", "verify": False}
    output = extract(family.config(tmp_path / "out", "falling", **settings))
    (output / PROVENANCE).unlink()
    line = (
        r"out/config\.json: layer 1=\{'intermediate_size': 9\}, but elastic\.json gives "
        r"\{'intermediate_size': 3\}; this is not that member: extract it again"
    )
    with pytest.raises(ValueError, match=line):
        load_exported(output, family.path, "rising")


def test_zeros_do_not_hide_another_member(family: Any, tmp_path: Path) -> None:
    """Padded members of the same widest layers differ in what was cut, and provenance says it."""
    settings = {"export": "padded", "verify": False}
    output = extract(family.config(tmp_path / "out", "falling", **settings))
    line = r"provenance\.json: layer 1=\{'intermediate_size': 9\}, but elastic\.json gives \{'int"
    with pytest.raises(ValueError, match=line):
        load_exported(output, family.path, "rising")
    (output / PROVENANCE).write_text("{}")
    with pytest.raises(ValueError, match=r"provenance\.json: damaged \(KeyError"):
        load_exported(output, family.path, "falling")
