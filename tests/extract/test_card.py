"""The model card of an export: every fact that it states, and no licence that nobody gave."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from elastic.extract.export import extract
from elastic.members import cost

PROVENANCE = {
    "parent": "owner/nano-12b",
    "base_model": "owner/nano-12b",
    "config": "0123456789abcdef",
    "tokens_seen": {"short": 65_000_000_000, "long": 45_000_000_000},
    "versions": {"elastic": "0.1.0", "torch": "2.13.0"},
    "git_revision": "f" * 40,
}


def card_of(directory: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text."""
    _, head, text = (directory / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


@pytest.fixture
def cut(write: Callable[..., Any], checkpoint: Any, tmp_path: Path) -> Callable[..., Any]:
    """Extract from a checkpoint with this provenance and these files beside it."""

    def run(budget: str, files: dict[str, str], **settings: Any) -> tuple[dict[str, Any], str]:
        members = {name: checkpoint.member(name) for name in ("full", "small", "uneven")}
        provenance = PROVENANCE | settings.pop("provenance", {})
        path = tmp_path / "elastic"
        written = write(path, checkpoint.parent.shape, members, provenance=provenance)
        for name, text in files.items():
            (path / name).write_text(text)
        return card_of(extract(written.config(tmp_path / "nano-x", budget, **settings)))

    return run


def test_it_states_family_member_provenance_and_what_was_verified(
    cut: Any, checkpoint: Any
) -> None:
    head, text = cut("small", {})
    assert head["library_name"] == "transformers" and head["base_model"] == "owner/nano-12b"
    assert "elastic" in head["tags"] and text.lstrip().startswith("# nano-x\n")
    shape = checkpoint.parent.shape
    whole = cost.parameters(shape, checkpoint.member("full"))
    for budget, widths in (("full", "17 | 6 | 6x7"), ("small", "3 | 4 | 4x5")):
        params = cost.parameters(shape, checkpoint.member(budget))
        row = next(line for line in text.splitlines() if line.startswith("|") and budget in line)
        hidden, layers = (13, 5) if budget == "full" else (8, 4)
        assert f"| {params:,} | {params / whole:.1%} | {hidden} | {layers} of 5 | {widths} |" in row
    assert "**small** (this one)" in text and "uneven | " in text
    assert (
        "| mlp | 3 wide | 2 | 1, 4 |" in text and "| mamba | 4 heads x 5 channels | 1 | 0 |" in text
    )
    for word in ("65,000,000,000", "stage long", "0123456789abcdef", "f" * 40, "torch | 2.13.0"):
        assert word in text
    assert "logits are within" in text.split("## Verified")[1].split("##")[0]


def test_every_snippet_is_python_that_names_the_directory(cut: Any) -> None:
    """The first is for people who have never heard of this package."""
    _, text = cut("small", {}, verify=False)
    first, second = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "elastic" not in first and "elastic.load" in second
    for block in (first, second):
        compile(block, "card", "exec")
        assert '"nano-x"' in block


def test_at_true_size_the_snippet_imports_elastic_first(cut: Any) -> None:
    _, text = cut("uneven", {}, export="per_layer", verify=False)
    first, second = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert first.index("import elastic") < first.index("from transformers")
    assert "stock transformers refuses it" in text
    assert "Nothing: it was exported with `verify=false`." in text
    assert "| mamba | 4 heads x 6 channels | 1 | 0 |" in text
    assert "| mamba | 2 heads x 7 channels | 1 | 3 |" in text


HEAD = "---\nlicense: other\nlicense_name: a-licence\nlicense_link: https://x.y/z\ntags: [q]\n---\n"
CARD = HEAD + "what the parent says in its own words\n"
STATED = {"license": "other", "license_name": "a-licence", "license_link": "https://x.y/z"}
LICENCES: dict[str, tuple[dict[str, str], dict[str, Any], dict[str, str], list[str]]] = {
    "in provenance": ({}, {"licence": {"license": "mit"}}, {"license": "mit"}, ["`license: mit`"]),
    "in the card": ({"README.md": CARD, "LICENSE": "x"}, {}, STATED, ["a-licence", "(LICENSE)"]),
    "in a file": (
        {"LICENSE.md": "x", "NOTICE": "y"},
        {},
        {"license": "other", "license_link": "LICENSE.md"},
        ["[LICENSE.md](LICENSE.md) and [NOTICE](NOTICE)", "does not name it"],
    ),
    "nowhere": ({"NOTICE": "y"}, {}, {}, ["Not known", "(NOTICE)"]),
    "in a card that cannot be read": ({"README.md": "---\n: [\n---\n"}, {}, {}, ["Not known"]),
}


@pytest.mark.parametrize("name", LICENCES)
def test_the_licence_is_the_parents_or_unknown(cut: Any, name: str) -> None:
    files, provenance, expected, words = LICENCES[name]
    head, text = cut("small", files, provenance=provenance, verify=False)
    assert {key: value for key, value in head.items() if key.startswith("license")} == expected
    licence = text.split("## Licence")[1]
    assert all(word in licence for word in words), licence
    assert "own words" not in text


def test_a_parent_on_somebodys_disk_is_named_but_not_placed(cut: Any) -> None:
    """And it is no base_model, since nobody else could find it."""
    local = {"parent": "/home/me/models/nano", "base_model": None}
    head, text = cut("small", {}, provenance=local, verify=False)
    assert "base_model" not in head and "/home/me" not in text
    assert "| parent | nano |" in text
