"""One process of a run, started as torchrun would, that also notes what it drew.

    RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python -m tests.rank draws.json

Settings come as JSON on standard input.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

from elastic.config import RunConfig, parse
from elastic.family import Draw, Family
from elastic.launch import launch


def spy(family: type[Family]) -> list[list[Any]]:
    """Note every draw from now on: budget, seed, and all numbers in what came of them."""
    draws: list[list[Any]] = []
    original = family.draw

    def draw(self: Family, budget: str, progress: float, seed: int) -> Draw:
        drawn = original(self, budget, progress, seed)
        hidden = getattr(drawn.member, "hidden", None)
        noise = None if hidden is None else hidden.detach().flatten().tolist()
        figures = {name: float(value) for name, value in drawn.figures.items()}
        draws.append([budget, seed, figures, noise])
        return drawn

    family.draw = draw  # type: ignore[method-assign]
    return draws


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    noted = spy(Family)
    launch(parse(json.load(sys.stdin), RunConfig))
    Path(sys.argv[1]).write_text(json.dumps(noted))
