"""The command `elastic`: which sub-command is meant, help, versions, completion."""

import contextlib
import difflib
import os
import re
import sys

from elastic.cli.command import command, quiet_pipe
from elastic.cli.commands import COMMANDS, NAMES
from elastic.config import BENCHES


def main() -> None:
    """`elastic`, and `python -m elastic`."""
    with quiet_pipe():
        first = sys.argv[1] if len(sys.argv) > 1 else "--help"
        if first in ("-h", "--help", "--version"):
            _print(first, "")
        elif first in ("-sc", "--shell-completion"):
            _complete()
        elif first in NAMES:
            sys.argv.pop(1)
            run(first)
        else:
            _refuse(first, NAMES, "command", "elastic")


def run(name: str) -> None:
    """One command; its settings and options are the arguments of this process."""
    with quiet_pipe():
        asked = [word for word in sys.argv[1:] if word in ("-h", "--help", "--version")]
        if name == "bench":
            bench = sys.argv[1] if len(sys.argv) > 1 else ""
            if bench in BENCHES:
                sys.argv.pop(1)
                run(f"bench {bench}")
            elif asked:
                _print(asked[0], name)
            else:
                _refuse(bench, tuple(BENCHES), "bench", "elastic bench")
        elif asked:
            _print(asked[0], name)
        else:
            entry = COMMANDS[name]
            command(entry.config, entry.schema, entry.run, printed_only=name == "plan")


def _print(asked: str, name: str) -> None:
    """Help on a command, or on all where `name` is empty; or the versions."""
    from elastic.cli import help  # reads sources: not on the way to a run

    if asked == "--version":
        print(help.versions())
    elif name in ("", "bench"):
        print(help.overview() if name == "" else help.benches())
    else:
        print(help.about(COMMANDS[name]))


def _refuse(word: str, known: tuple[str, ...], kind: str, before: str) -> None:
    """One line and exit code 2."""
    close = difflib.get_close_matches(word, known, 1)
    meant = f"; did you mean {before} {close[0]}?" if close else ""
    misplaced = "=" in word or word.startswith("-")
    if misplaced:
        meant = f"; settings and options come after it: {before} {known[0]} {word}"
    what = f"no {kind} is named" if not word or misplaced else f"{word}: no such {kind}"
    print(f"error: {what}; must be one of {', '.join(known)}{meant}", file=sys.stderr)
    sys.exit(2)


def _complete() -> None:
    """Shell completion. Hydra's own, and its scripts; the names of sub-commands are added here.

    For `query=SHELL` the line so far is in COMP_LINE; Hydra gets it without the sub-command.
    """
    if not sys.argv[-1].startswith("query="):
        command(COMMANDS["train"].config, COMMANDS["train"].schema, COMMANDS["train"].run)
        return
    line = os.environ.get("COMP_LINE", "")
    program, _, typed = line.lstrip().partition(" ")
    typed = typed.lstrip()
    for name in sorted([*COMMANDS, *NAMES], key=len, reverse=True):
        match = re.match(rf"{re.sub(' ', ' +', name)} +", typed)
        if match is not None and name in COMMANDS:
            os.environ["COMP_LINE"] = f"elastic {typed[match.end() :]}"
            # A line that is not finished is no error to be told in the middle of it.
            with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
                command(COMMANDS[name].config, COMMANDS[name].schema, COMMANDS[name].run)
            return
    *above, word = re.split(" +", typed)
    known = tuple(BENCHES) if above == ["bench"] else NAMES if not above else ()
    print("\n".join(name for name in known if name.startswith(word)))
