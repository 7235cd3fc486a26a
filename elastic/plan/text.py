"""A plan as text: aligned tables for a terminal of 120 columns."""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH = 120
LARGE = 1_000_000_000
"""Parameters from which amounts are in GiB and GB; those of smaller parents are in MiB and MB."""


def describe(plan: dict[str, Any]) -> str:
    """What `elastic.plan.work.make_plan` returns, for people."""
    large = plan["family"]["parent"]["parameters"] >= LARGE
    units = Units("GiB", 2**30, "GB", 1e9) if large else Units("MiB", 2**20, "MB", 1e6)
    parts = [
        f"Plan of {plan['name']}",
        *_family(plan, units),
        *_training(plan, large),
        *_memory(plan, units),
    ]
    return "\n\n".join(parts)


@dataclass(frozen=True)
class Units:
    """Names and sizes of the units of memory and of stored bytes."""

    memory_name: str
    memory_bytes: float
    stored_name: str
    stored_bytes: float

    def memory(self, value: float) -> str:
        amount = value / self.memory_bytes
        return f"{amount:,.1f}" if amount >= 0.05 or not value else f"{amount:.1g}"

    def stored(self, value: float) -> str:
        return f"{value / self.stored_bytes:,.4g}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns: the first to the left, the others to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _lines(*sentences: str) -> str:
    """Paragraphs, each on lines of its own."""
    return "\n".join(
        textwrap.fill(sentence, WIDTH, break_long_words=False, break_on_hyphens=False)
        for sentence in sentences
    )


def _family(plan: dict[str, Any], units: Units) -> Iterator[str]:
    family = plan["family"]
    budgets = family["budgets"]
    nested = ", each inside the next larger one" if family["nested"] else ""
    yield (
        f"FAMILY  parent of {family['parent']['parameters']:,} parameters; members within "
        f"{family['tolerance']:.1%} of their targets{nested}"
    )
    rows = []
    for name, entry in budgets.items():
        if "sizes" not in entry:
            rows.append([name, f"{entry['target']:,}", *["-"] * 9])
            continue
        sizes = entry["sizes"]
        kinds = [sizes["layers"].get(kind, 0) for kind in ("mamba", "mlp", "attention")]
        rows.append(
            [
                name,
                f"{entry['parameters']:,}",
                f"{entry['share']:.1%}",
                units.stored(entry["weight_bytes"]),
                str(entry["homogeneous_members"]),
                *(str(sizes[axis]) for axis in ("hidden", "ffn")),
                f"{sizes['mamba_heads']} x {sizes['mamba_head_dim']}",
                *(str(sizes[axis]) for axis in ("attention_heads", "depth")),
                "{} M {} - {} *".format(*kinds),
            ]
        )
    header = (
        "budget", "parameters", "share", f"{units.stored_name} bf16", "members", "hidden", "ffn",
        "mamba heads", "query heads", "layers", "of kinds",
    )  # fmt: skip
    yield table(header, rows)
    yield _family_notes(family)
    yield _ranges(family)
    yield _running(budgets, plan["settings"], units)
    one, each = family["one_checkpoint_bytes"], family["separate_checkpoints_bytes"]
    yield (
        f"One checkpoint for all: {units.stored(one)} {units.stored_name}; one for each: "
        f"{units.stored(each)} {units.stored_name}."
    )


def _family_notes(family: dict[str, Any]) -> str:
    notes = [
        "members: homogeneous ones within tolerance. Shown is the most balanced family: the "
        "smallest variance over the elastic axes of size / parent's size. The ranking of layers is "
        "not known yet: kinds are assumed to be dropped in turns."
    ]
    if family["heterogeneous"]:
        axes = " and ".join(family["heterogeneous"])
        notes.append(
            f"{axes} may differ from layer to layer: far more members than are counted here reach "
            "each target, and nobody can count them; the run finds its own."
        )
    for name, entry in family["budgets"].items():
        if "sizes" not in entry:
            notes.append(
                f"{name}: no homogeneous member reaches the target under this assumption; other "
                "rankings or sizes layer by layer do. It is planned as the parent, which is more."
            )
        elif not entry["balanced"]:
            notes.append(f"{name}: no nested family under this assumption; the nearest is shown.")
    return _lines(*notes)


def _ranges(family: dict[str, Any]) -> str:
    axes, rows = list(family["choices"]), []
    for name, entry in family["budgets"].items():
        if "ranges" in entry:
            spans = [entry["ranges"][axis] for axis in axes]
            rows.append([name, *(str(a) if a == b else f"{a} .. {b}" for a, b in spans)])
    return table(["sizes within tolerance", *axes], rows)


def _running(budgets: dict[str, Any], settings: dict[str, Any], units: Units) -> str:
    """Caches and expected speed, a row per budget and context."""
    rows = []
    for name, entry in budgets.items():
        for context, figures in entry.get("contexts", {}).items():
            states = entry["ssm_state_bytes"] + entry["conv_state_bytes"]
            rows.append(
                [
                    name,
                    f"{int(context):,}",
                    f"{figures['kv_cache_bytes'] / units.memory_bytes:,.3f}",
                    f"{states / units.memory_bytes:,.3f}",
                    f"{figures['flops_per_token'] / 1e9:.4g}",
                    f"{figures['prefill_speed']:.2f} x",
                    units.stored(figures["decode_bytes"]),
                    f"{figures['decode_speed']:.2f} x",
                ]
            )
    header = (
        "running", "context", f"KV {units.memory_name}", f"SSM+conv {units.memory_name}",
        "GFLOPs/token", "prefill, training", f"{units.stored_name}/decoding step", "decoding",
    )  # fmt: skip
    note = _lines(
        f"Batch {settings['batch']}. Speeds are beside the parent's and are expectations: prefill "
        "and training by FLOPs, decoding by bytes moved (weights once, caches of every sequence)."
    )
    return f"{table(header, rows)}\n{note}"


def _training(plan: dict[str, Any], large: bool) -> Iterator[str]:
    work, settings = plan["training"], plan["settings"]
    names = ("forward", "backward", "recomputed", "teacher")
    yield f"TRAINING  {work['gpus']} {_counted(plan, work['gpus'])}, as configured"
    rows = []
    for stage in work["stages"]:
        rows.append(
            [
                stage["name"],
                _count(stage["tokens"]),
                f"{stage['steps']:,}",
                f"{stage['batch_tokens']:,}",
                f"{stage['sequence_length']:,}",
                f"{stage['passes_per_step']} of {stage['sequences_per_pass']} seq",
                f"{stage['soft_share']:.0%}",
                *(f"{stage[name]:.3g}" for name in names),
                *([f"{stage['gpu_hours']:,.0f}"] if plan["device"] == "GPU" else []),
            ]
        )
    header = [
        "stage", "tokens", "steps", "batch", "length", "passes", "soft", "forward", "backward",
        "again", "teacher", *(["GPU-hours"] if plan["device"] == "GPU" else []),
    ]  # fmt: skip
    note = _lines(
        "passes: forward passes of a process for an optimizer step. soft: share of the tokens "
        "before the router freezes. forward to teacher: FLOPs."
    )
    yield f"{table(header, rows)}\n{note}"
    notes = [f"{work['flops']:.3g} FLOPs, {_count(work['elastic_tokens'])} tokens for the family."]
    if plan["device"] == "GPU":
        notes[0] += (
            f" {work['gpu_hours']:,.0f} GPU-hours at an assumed {settings['utilisation']:.0%} of "
            f"{settings['gpu_tflops']:g} TFLOP/s: {work['days']:.2g} days."
        )
    if large:
        notes.append(
            "Published for 6B and 9B beside the 12B (arXiv 2511.16664, table 2): "
            f"{_count(work['separate_tokens'])} tokens by separate compression "
            f"({work['separate_over_elastic']:.3g} x these), {_count(work['scratch_tokens'])} from "
            f"scratch ({work['scratch_over_elastic']:.3g} x)."
        )
    yield _lines(*notes)


def _memory(plan: dict[str, Any], units: Units) -> Iterator[str]:
    memory, settings = plan["memory"], plan["settings"]
    limit = units.memory(memory["limit_bytes"])
    spare = (
        f"of {settings['gpu_gib']:g} GiB, {settings['reserve_gib']:g} are left to CUDA, NCCL and "
        "fragmentation"
        if plan["device"] == "GPU"
        else "its part of the node's memory"
    )
    yield (
        f"MEMORY  {units.memory_name} per {plan['device']}; {limit} can be used: {spare}; "
        f"{memory['precision']}"
    )
    yield _configured(plan, units)
    for entry in memory["gpus"]:
        yield from _one_count(entry, plan, units)


def _configured(plan: dict[str, Any], units: Units) -> str:
    memory, node = plan["memory"], plan["settings"]["node_gib"] * 2**30
    row, unit = memory["configured"], units.memory_name
    words = [f"trainer.strategy={row['strategy']}", f"objective.teacher={row['teacher']}"]
    words += ["activation checkpointing"] if row["checkpointing"] else []
    words += ["offloaded optimizer"] if row["offload"] else []
    sentences = [
        f"As configured, {row['gpus']} {_counted(plan, row['gpus'])}, {', '.join(words)}: "
        + _verdict(row, units)
    ]
    if "host" in row and plan["device"] == "GPU":
        start, run = row["host"]["start"], row["host"]["run"]
        sentences.append(
            f"Host memory of a node: {units.memory(start)} {unit} while a stage starts, since "
            "every process reads the parent in float32, "
            f"{'which is MORE THAN' if start > node else 'of'} {units.memory(node)}; "
            f"{units.memory(run)} afterwards."
        )
    ranking = memory["ranking_bytes"]
    sentences.append(
        f"Ranking, by the first process alone, in float32: {units.memory(ranking)} {unit}, "
        + ("fits." if ranking <= memory["limit_bytes"] else "DOES NOT FIT.")
    )
    return _lines(*sentences)


def _verdict(row: dict[str, Any], units: Units) -> str:
    if "refused" in row:
        return f"refused. {row['refused']}. {_way(row)}"
    peak = f"{units.memory(row['peak'])} {units.memory_name} ({row['worst']})"
    return f"fits, {peak}." if row["fits"] else f"DOES NOT FIT, {peak}. {_way(row)}"


def _way(row: dict[str, Any]) -> str:
    if row.get("change") is None:
        return "No change that was tried makes it fit."
    return "It fits with " + " ".join(row["change"]) + "."


def _one_count(entry: dict[str, Any], plan: dict[str, Any], units: Units) -> Iterator[str]:
    """The tables of one number of GPUs."""
    rows = []
    for stage in entry["stages"]:
        cells = [stage["name"], f"{stage['sequences_per_pass']} x {stage['sequence_length']:,}"]
        for how in ("checkpointed", "all"):
            amounts = (units.memory(stage[how][name]) for name in ("activations", "peak"))
            cells += [*amounts, stage[how]["worst"]]
        rows.append([*cells, units.memory(stage["loss"])])
    header = (
        "a pass", "sequences", "kept, ckpt", "peak", "in", "kept, no ckpt", "peak", "in", "loss",
    )  # fmt: skip
    title = f"{entry['gpus']} {_counted(plan, entry['gpus'])}"
    yield f"{title}\n{table(header, rows)}" if rows else title
    yield _strategies(entry, units)


def _strategies(entry: dict[str, Any], units: Units) -> str:
    """Parts and peaks by strategy, with the run's own checkpointing; the other way round as one
    figure."""
    names = [stage["name"] for stage in entry["stages"]]
    lines, ways = [], list[str]()
    for row in entry["rows"]:
        cells = [row["strategy"] + (" offload" if row["offload"] else "")]
        if "refused" in row:
            lines.append([*cells, *["-"] * (6 + len(names)), _marked(row, ways)])
            continue
        cells += [
            units.memory(row["parts"][part])
            for part in ("weights", "gradients", "optimizer", "teacher", "buffers")
        ]
        cells += [units.memory(row["stages"][name]) for name in names]
        other = row["other"]
        cells.append(units.memory(max(other.values())) if other else "-")
        lines.append([*cells, _marked(row, ways)])
    checkpointing = any(row["checkpointing"] for row in entry["rows"])
    header = (
        "strategy", "weights", "gradients", "optimizer", "teacher", "buffers",
        *(f"{name} peak" for name in names), "no ckpt" if checkpointing else "with ckpt", "verdict",
    )  # fmt: skip
    marks = _lines(*(f"({chr(97 + index)}) {way}" for index, way in enumerate(ways)))
    return f"{table(header, lines)}\n{marks}".rstrip()


def _marked(row: dict[str, Any], ways: list[str]) -> str:
    """A verdict that fits into a column; what would help goes into `ways`."""
    if row.get("fits"):
        return "fits"
    way = (f"{row['refused']}. " if "refused" in row else "") + _way(row)
    if way not in ways:
        ways.append(way)
    return f"no ({chr(97 + ways.index(way))})"


def _counted(plan: dict[str, Any], count: int) -> str:
    """The device's name, in the plural where there are several."""
    plural = "es" if plan["device"] == "process" else "s"
    return plan["device"] + (plural if count != 1 else "")


def _count(value: float) -> str:
    """A number of tokens."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= unit:
            return f"{value / unit:.4g}{name}"
    return f"{value:,.0f}"
