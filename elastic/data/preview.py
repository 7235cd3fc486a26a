"""What was prepared, for people: the blend's table, and samples as training sees them."""

from collections.abc import Sequence

import numpy as np

from elastic.console import short, table
from elastic.data.batches import Row
from elastic.data.prepared import PreparedData, StageText
from elastic.data.tokens import total

GREY, RED, RESET = "\033[90m", "\033[31m", "\033[0m"


def blend(data: PreparedData, stages: Sequence[StageText]) -> list[str]:
    """Lines: every source, and what each stage makes of it."""
    rows = []
    for name, store in data.stores.items():
        found = total(store.summaries)
        source = data.config.sources[name]
        rows.append(
            [
                name,
                source.kind,
                f"{found.documents:,}",
                f"{found.tokens:,}",
                f"{found.targets / max(found.tokens, 1):.1%}",
                f"{sum(found.skipped.values()):,}",
                f"{found.empty:,}",
            ]
        )
    header = ("source", "kind", "documents", "tokens", "targets", "skipped", "empty")
    lines = table(header, rows)
    rows = []
    for stage in stages:
        shares = data.shares(stage.weights)
        for name, share in shares.items():
            if share == 0:
                continue
            packed = data.train_pack(name, stage.sequence_length).packed
            counts = np.bincount(data.stores[name].document_of(packed.starts))
            capacity = len(packed) * (stage.sequence_length + 1)
            rows.append(
                [
                    stage.name,
                    name,
                    f"{stage.sequence_length:,}",
                    f"{share:.1%}",
                    f"{len(packed):,}",
                    f"{stage.sequences * share / max(len(packed), 1):.2f}",
                    f"{int((counts > 1).sum()):,}",
                    f"{1 - int(packed.tokens.sum()) / max(capacity, 1):.2%}",
                ]
            )
    stage_header = ("stage", "source", "length", "share", "sequences", "epochs", "cut", "waste")
    note = (
        f"packing: {data.config.packing}; epochs: how often the stage reads the source; cut: "
        "documents in several pieces; waste: padding"
    )
    return [*lines, "", *table(stage_header, rows), note]


def sample(data: PreparedData, row: Row, colour: bool) -> str:
    """A packed sequence as text: a line for each document's border; what is no target is grey, or
    in brackets where there is no colour."""
    decode = data.tokenizer.decode
    ends = np.flatnonzero(np.diff(row.documents)) + 1
    starts = [0, *ends.tolist(), len(row.tokens)]
    counted = np.concatenate([[False], row.counted])
    lines = []
    for number in range(len(starts) - 1):
        here = slice(starts[number], starts[number + 1])
        tokens, targets = row.tokens[here], counted[here]
        # A document's first token is no target, but is not what a mask leaves out.
        targets = np.concatenate([targets[1:2], targets[1:]])
        if not targets.any() and number == len(starts) - 2 and not tokens.any():
            lines.append(_mark(f"padding, {len(tokens)} tokens", colour))
            continue
        lines.append(_mark(f"document {number + 1}, {len(tokens)} tokens", colour))
        borders = [0, *(np.flatnonzero(np.diff(targets)) + 1).tolist(), len(tokens)]
        parts = []
        for first, last in zip(borders[:-1], borders[1:], strict=True):
            text = str(decode(tokens[first:last].tolist()))
            if targets[first]:
                parts.append(text)
            else:
                parts.append(f"{GREY}{text}{RESET}" if colour else f"[{text}]")
        lines.append("".join(parts))
    return "\n".join(lines)


def _mark(text: str, colour: bool) -> str:
    return f"{RED}--- {text}{RESET}" if colour else f"--- {text}"


def shown_tokens(data: PreparedData) -> str:
    """One line: how much there is."""
    count = sum(store.tokens for store in data.stores.values())
    parts = [path for store in data.stores.values() for path in store.directories]
    size = sum(each.stat().st_size for path in parts for each in path.iterdir())
    sources = len(data.stores)
    return f"{short(count)} tokens of {sources} source(s), {short(size)}B in {data.directory}"
