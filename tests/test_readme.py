"""The README: short, and its links lead somewhere. `make docs` checks those inside docs/."""

import re

import pytest
from helpers.paths import ROOT

README = ROOT / "README.md"
LINES = 150


def missing(text: str) -> list[str]:
    """Relative links of a page at the root that lead to no file."""
    links = re.findall(r"\]\(([^)#\s]+)", text)
    return [link for link in links if "://" not in link and not (ROOT / link).is_file()]


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= LINES


def test_every_link_leads_to_a_file() -> None:
    text = README.read_text()
    assert text.count("](docs/") >= 8
    assert missing(text) == []


@pytest.mark.parametrize("link", ["docs/nowhere.md", "docs/nowhere.md#here"])
def test_a_dead_link_is_seen(link: str) -> None:
    assert missing(f"see [this]({link}) and [that](docs/train.md#stages)") == ["docs/nowhere.md"]
