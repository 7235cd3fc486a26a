r"""One process of a run, started as torchrun would, that notes what it drew and spoils a step.

    RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... \
        python -m tests.helpers.rank draws.json

Settings come as JSON on standard input.
"""

import json
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

import elastic.training.module
from elastic.config import RunConfig, parse
from elastic.routing.family import Draw, Family
from elastic.training.launch import launch


def spy(family: type[Family]) -> list[list[Any]]:
    """Note every draw from now on: budget, seed, and all numbers in what came of them."""
    draws: list[list[Any]] = []
    original = family.draw

    def draw(self: Family, budget: str, progress: float, seed: int, tokens: int) -> Draw:
        drawn = original(self, budget, progress, seed, tokens)
        hidden = getattr(drawn.member, "hidden", None)
        noise = None if hidden is None else hidden.detach().flatten().tolist()
        figures = {name: float(value) for name, value in drawn.figures.items()}
        draws.append([budget, seed, figures, noise])
        return drawn

    family.draw = draw  # type: ignore[method-assign]
    return draws


def spoiled(original: Callable[..., Any]) -> Callable[..., Any]:
    """`ElasticModule.training_step` whose loss is infinite once, on the last process alone: in the
    second pass of the fourth step of the first elastic stage. Its gradient is not."""

    def training_step(
        self: elastic.training.module.ElasticModule, batch: Tensor, batch_idx: int
    ) -> Any:
        last = self.global_rank + 1 == self.trainer.world_size
        if self.stage.name != "short" or self.micro_step != 7 or not last:
            return original(self, batch, batch_idx)
        terms = elastic.training.module.token_terms

        def infinite(*arguments: Any) -> dict[str, Tensor]:
            found = terms(*arguments)
            return found | {"total": found["total"] + math.inf}

        elastic.training.module.token_terms = infinite
        try:
            return original(self, batch, batch_idx)
        finally:
            elastic.training.module.token_terms = terms

    return training_step


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    noted = spy(Family)
    module = elastic.training.module.ElasticModule
    module.training_step = spoiled(module.training_step)  # type: ignore[method-assign]
    launch(parse(json.load(sys.stdin), RunConfig))
    Path(sys.argv[1]).write_text(json.dumps(noted))
