"""Greedy generation, many prompts at a time."""

from collections.abc import Callable, Collection, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

Writer = Callable[[Tensor, int], Tensor]
"""(b, t) prompts of one length, and how many tokens at most -> (b, new) tokens, where what stands
behind an end token is nobody's."""

AT_ONCE = 64
"""Prompts of one length that are continued together."""


def greedy_writer(model: Any, ends: Collection[int]) -> Writer:
    """Of a model of transformers, with its cache; rows go on until all have come to one of `ends`.

    Prompts have no padding: that each model, kernel and release keeps it out of a Mamba state is
    not to be relied on.
    """
    last = torch.tensor(sorted(ends))

    @torch.no_grad()
    def write(prompts: Tensor, most: int) -> Tensor:
        tokens, cache, written = prompts, None, list[Tensor]()
        ended = torch.zeros(len(prompts), dtype=torch.bool)
        while len(written) < most and not ended.all():
            out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            tokens = out.logits[:, -1].argmax(-1, keepdim=True)  # (b, 1)
            written.append(tokens)
            ended |= torch.isin(tokens[:, 0], last)
        return torch.cat(written, 1)

    return write


def write_all(
    writer: Writer,
    prompts: Sequence[Sequence[int]],
    ends: Collection[int],
    most: int,
    done: Callable[[int], object] = lambda count: None,
) -> list[list[int]]:
    """What is written after each prompt, in their order: up to `most` tokens, the first of `ends`
    included if it came. `done` is told how many prompts each batch had."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    written: list[list[int]] = [[] for _ in prompts]
    for _, group in groupby(order, key=lambda i: len(prompts[i])):
        alike = list(group)
        for start in range(0, len(alike), AT_ONCE):
            batch = alike[start : start + AT_ONCE]
            rows = writer(torch.tensor([list(prompts[i]) for i in batch]), most).tolist()
            for i, row in zip(batch, rows, strict=True):
                stop = next((at + 1 for at, token in enumerate(row) if token in ends), len(row))
                written[i] = row[: min(stop, most)]
            done(len(batch))
    return written
