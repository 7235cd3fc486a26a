"""The memory of a plan as text: what a pass adds, then parts and peaks by strategy."""

from collections.abc import Iterator, Sequence
from typing import Any

from elastic.plan.tables import Units, amount, lines, table


def memory(plan: dict[str, Any], units: Units) -> Iterator[str]:
    """Blocks that are the same on several numbers of GPUs are there once."""
    found, settings = plan["memory"], plan["settings"]
    spare = (
        f"of {settings['gpu_gib']:g} GiB, {settings['reserve_gib']:g} are left to CUDA, NCCL and "
        "fragmentation"
        if plan["device"] == "GPU"
        else "its part of the node's"
    )
    yield lines(
        f"MEMORY  {units.memory_name} per {plan['device']}; {amount(found['limit_bytes'])} can be "
        f"used: {spare}; {found['precision']}"
    )
    yield _configured(plan)
    entries = found["gpus"]
    if any(entry["stages"] for entry in entries):
        yield _passes(entries, plan, units)
    printed = [(_strategies(entry, units), entry["gpus"]) for entry in entries]
    for text in dict.fromkeys(text for text, _ in printed):
        numbers = [gpus for same, gpus in printed if same == text]
        yield f"{_numbers(numbers)} {counted(plan, numbers[-1])}\n{text}"


def counted(plan: dict[str, Any], count: int) -> str:
    """The device's name, in the plural where there are several."""
    plural = "es" if plan["device"] == "process" else "s"
    return plan["device"] + (plural if count != 1 else "")


def _configured(plan: dict[str, Any]) -> str:
    """What the verdict does not say: how it is set, the host's memory, the ranking."""
    found = plan["memory"]
    row = found["configured"]
    words = [f"trainer.strategy={row['strategy']}", f"objective.teacher={row['teacher']}"]
    words += ["activation checkpointing"] if row["checkpointing"] else []
    words += ["offloaded optimizer"] if row["offload"] else []
    sentences = [f"As configured: {', '.join(words)}."]
    if "host" in row and plan["device"] == "GPU":
        start, run = (amount(row["host"][when]) for when in ("start", "run"))
        sentences.append(
            f"Host memory of a node: {start} of {amount(found['node_bytes'])} while a stage starts "
            f"(every process reads the parent in float32), {run} afterwards."
        )
    fits = "fits" if found["ranking_bytes"] <= found["limit_bytes"] else "DOES NOT FIT"
    sentences.append(
        f"Ranking, on every {plan['device']}: {amount(found['ranking_bytes'])}, {fits}."
    )
    return lines(*sentences)


def _passes(entries: Sequence[dict[str, Any]], plan: dict[str, Any], units: Units) -> str:
    """What a pass adds in each stage, whatever the strategy."""
    where: dict[tuple[str, ...], list[int]] = {}
    for entry in entries:
        for stage in entry["stages"]:
            cells = [stage["name"], f"{stage['sequences_per_pass']} x {stage['sequence_length']:,}"]
            for how in ("checkpointed", "all"):
                amounts = (units.memory(stage[how][name]) for name in ("activations", "peak"))
                cells += [*amounts, stage[how]["worst"]]
            where.setdefault((*cells, units.memory(stage["loss"])), []).append(entry["gpus"])
    rows = [
        [cells[0], _numbers(numbers), *cells[1:]]
        for cells, numbers in sorted(where.items(), key=lambda item: item[1][0])
    ]
    header = [
        "a pass", counted(plan, 2), "sequences", "kept, ckpt", "peak", "in", "kept, all", "peak",
        "in", "loss",
    ]  # fmt: skip
    if len(entries) == 1:
        header, rows = [header[0], *header[2:]], [[row[0], *row[2:]] for row in rows]
    return table(header, rows)


def _numbers(values: Sequence[int]) -> str:
    return ", ".join(str(value) for value in values)


def _strategies(entry: dict[str, Any], units: Units) -> str:
    """Parts and peaks by strategy, with the run's own checkpointing; the other way round as one
    figure."""
    rows, ways = [], list[str]()
    refused: dict[str, list[dict[str, Any]]] = {}
    for row in entry["rows"]:
        if "refused" in row:
            refused.setdefault(row["refused"], []).append(row)
            continue
        parts = ("weights", "gradients", "optimizer", "teacher", "buffers")
        highest = max(row["stages"], key=lambda stage: row["stages"][stage])
        other = row["other"]
        rows.append(
            [
                _name(row),
                *(units.memory(row["parts"][part]) for part in parts),
                units.memory(row["peak"]),
                highest if row["worst"] != "optimizer step" else "step",
                units.memory(max(other.values())) if other else "-",
                _marked(row, ways),
            ]
        )
    checkpointing = any(row["checkpointing"] for row in entry["rows"])
    header = (
        "strategy", "weights", "gradients", "optimizer", "teacher", "buffers", "peak", "in",
        "no ckpt" if checkpointing else "with ckpt", "verdict",
    )  # fmt: skip
    notes = [f"({chr(97 + index)}) {way}" for index, way in enumerate(ways)]
    for why, those in refused.items():
        if len(those) == len(entry["rows"]):
            notes.append(f"Impossible: {why}.")
        else:
            names = ", ".join(_name(row) for row in those)
            notes.append(f"{names}: impossible. {why}. {_way(those[0])}")
    blocks = [table(header, rows)] if rows else []
    return "\n".join([*blocks, *([lines(*notes)] if notes else [])])


def _name(row: dict[str, Any]) -> str:
    return row["strategy"] + (" offload" if row["offload"] else "")


def _way(row: dict[str, Any]) -> str:
    if row["change"] is None:
        return "No change that was tried makes it fit."
    return "It fits with " + " ".join(row["change"]) + "."


def _marked(row: dict[str, Any], ways: list[str]) -> str:
    """A verdict that fits into a column; what would help goes into `ways`."""
    if row["fits"]:
        return "fits"
    if _way(row) not in ways:
        ways.append(_way(row))
    return f"no ({chr(97 + ways.index(_way(row)))})"
