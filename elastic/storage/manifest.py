"""elastic.json: what an elastic checkpoint contains, and which prefixes each member is. No
torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic.members.architecture import Architecture
from elastic.storage.files import write_json
from elastic.storage.seals import check_beside

FORMAT_VERSION = 1
NAME = "elastic.json"


@dataclass(frozen=True)
class Member:
    """One budget's entry: the target as configured, the exact size, the architecture."""

    target: dict[str, float]
    params: int
    architecture: Architecture


@dataclass(frozen=True)
class Manifest:
    """The whole of elastic.json."""

    budgets: dict[str, Member]
    space: dict[str, Any]
    ranking: dict[str, Any]
    provenance: dict[str, Any]

    def member(self, budget: str) -> Member:
        """The entry of a budget; `ValueError` lists the budgets there are."""
        if budget not in self.budgets:
            raise ValueError(f"budget={budget}: must be one of {', '.join(self.budgets)}")
        return self.budgets[budget]

    def write(self, directory: Path) -> None:
        """Write elastic.json."""
        budgets = {
            name: {
                "target": member.target,
                "params": member.params,
                "architecture": member.architecture.to_json(),
            }
            for name, member in self.budgets.items()
        }
        value = {"format_version": FORMAT_VERSION, "budgets": budgets, "space": self.space}
        value |= {"ranking": self.ranking, "provenance": self.provenance}
        write_json(directory / NAME, value)

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Read elastic.json.

        Raises:
            ValueError: there is none, it is damaged, differs from what was sealed, or is of
                another format version.
        """
        path = directory / NAME
        if not path.is_file():
            raise ValueError(f"{path}: not found; {directory} is not an elastic checkpoint")
        check_beside(directory, NAME)
        try:
            value = json.loads(path.read_text())
            version = value["format_version"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: damaged, not an elastic.json ({error!r})") from error
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path}: format_version={version}, this version reads {FORMAT_VERSION}; "
                "use the release of elastic that wrote it"
            )
        try:
            budgets = {
                name: Member(
                    entry["target"],
                    int(entry["params"]),
                    Architecture.from_json(entry["architecture"]),
                )
                for name, entry in value["budgets"].items()
            }
            return cls(budgets, value["space"], value["ranking"], value["provenance"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: damaged, {error}") from error
