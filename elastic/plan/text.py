"""A plan as text: the verdict, then members, memory and time."""

from collections.abc import Iterator
from typing import Any

from elastic.plan.memory_text import counted, memory
from elastic.plan.tables import LARGE, SMALL, Units, amount, count, labelled, lines, shell, table

LARGE_PARENT = 1_000_000_000
"""Parameters from which amounts are in GiB and GB; those of smaller parents are in MiB and MB."""


def describe(plan: dict[str, Any]) -> str:
    """What `elastic.plan.work.make_plan` returns, for people."""
    large = plan["family"]["parent"]["parameters"] >= LARGE_PARENT
    units = LARGE if large else SMALL
    parts = [_verdict(plan), *_members(plan, units), *memory(plan, units), *_time(plan, large)]
    return "\n\n".join(parts)


def _verdict(plan: dict[str, Any]) -> str:
    """Whether it fits, what it takes, and how to start it."""
    found, settings, row = plan["verdict"], plan["settings"], plan["memory"]["configured"]
    where = f"{found['gpus']} {counted(plan, found['gpus'])}"
    title = "FITS" if found["fits"] else "DOES NOT FIT"
    said = [lines(f"Plan of {plan['name']}: {title} on {where}")]
    if "refused" in row:
        said.append(labelled("refused", row["refused"]))
    else:
        needs = f"{amount(found['peak_bytes'])} of {amount(found['limit_bytes'])}"
        peak = f"at its peak ({found['worst']})"
        said.append(labelled("memory", f"{needs} per {plan['device']} {peak}"))
    if "host" in found["short_of"]:
        most = max(row["host"].values())
        said.append(
            labelled("host", f"{amount(most)} of a node's {amount(plan['memory']['node_bytes'])}")
        )
    if "ranking" in found["short_of"]:
        needs = amount(plan["memory"]["ranking_bytes"])
        said.append(labelled("ranking", f"{needs} on every {plan['device']}, before it trains"))
    said += _change(found)
    changed = ", with the change" if found["change"] else ""
    if found["days"] is None:
        said.append(labelled("time", f"{found['flops']:.3g} FLOPs; no speed is assumed of a CPU"))
    else:
        speed = f"{settings['utilisation']:.0%} of {settings['gpu_tflops']:g} TFLOP/s"
        launched = f"{found['launched_gpus']} {counted(plan, found['launched_gpus'])}"
        said.append(
            labelled(
                "time",
                f"{_duration(found['days'])} on {launched}, {_hours(found['gpu_hours'])} GPU-hours "
                f"at an assumed {speed}{changed}",
            )
        )
    if found["cost"] is not None:
        price = settings["price_per_gpu_hour"]
        said.append(labelled("cost", f"{found['cost']:,.2f} at {price:g} per GPU-hour{changed}"))
    if found["command"] is not None:
        said.append(f"  start{changed}:\n{shell(found['command'], ' ' * 4)}")
    return "\n".join(said)


def _change(found: dict[str, Any]) -> list[str]:
    """The smallest change that makes it fit, in words."""
    if found["fits"]:
        return []
    if found["change"] is None:
        return [labelled("change", "none that was tried makes it fit")]
    return [labelled("change", "it fits with " + " ".join(found["change"]))]


def _duration(days: float) -> str:
    if days < 2:
        hours = 24 * days
        return f"{hours:.2g} hours" if hours >= 1 else f"{max(1, round(60 * hours))} min"
    return f"{days:,.1f} days" if days < 10 else f"{days:,.0f} days"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def _members(plan: dict[str, Any], units: Units) -> Iterator[str]:
    family, settings = plan["family"], plan["settings"]
    budgets = family["budgets"]
    nested = ", each inside the next larger one" if family["nested"] else ""
    yield lines(
        f"MEMBERS  parent of {family['parent']['parameters']:,} parameters; within "
        f"{family['tolerance']:.1%} of their targets{nested}"
    )
    rows = []
    for name, entry in budgets.items():
        sizes = entry["sizes"]
        kinds = (sizes["layers"].get(kind, 0) for kind in ("mamba", "mlp", "attention"))
        rows.append(
            [
                name,
                f"{entry['parameters']:,}",
                f"{entry['share']:.1%}",
                _span(sizes["hidden"]),
                _span(sizes["ffn"]),
                f"{_span(sizes['mamba_heads'])} x {_span(sizes['mamba_head_dim'])}",
                _span(sizes["attention_heads"]),
                _span(sizes["depth"]),
                " + ".join(str(number) for number in kinds),
            ]
        )
    header = (
        "budget", "parameters", "share", "hidden", "ffn", "mamba heads", "query heads", "layers",
        "M + - + *",
    )  # fmt: skip
    yield table(header, rows)
    yield _reach(family)
    yield f"{_running(budgets, settings, units)}\n{_stored(family, units)}"


def _span(sizes: tuple[int, int]) -> str:
    """One size, or the smallest and the largest."""
    smallest, largest = sizes
    return str(smallest) if smallest == largest else f"{smallest}..{largest}"


def _reach(family: dict[str, Any]) -> str:
    """What else the targets allow."""
    axes = list(family["choices"])
    rows = [
        [
            name,
            str(entry["homogeneous_members"]),
            *(_span(entry["ranges"][axis]) if entry["ranges"] else "-" for axis in axes),
        ]
        for name, entry in family["budgets"].items()
    ]
    notes = [
        "Above, the most balanced family: all elastic axes shrink by about the same factor. The "
        "run's router chooses its own; here, how many members with one size per kind of layer are "
        "within tolerance, and between which sizes. Layers are not ranked yet: Mamba and MLP "
        "layers are dropped in turns, as far as the targets allow."
    ]
    if family["heterogeneous"]:
        layered = " and ".join(family["heterogeneous"])
        notes.append(f"{layered} may differ from layer to layer: far more members than these.")
    return f"{table(['budget', 'members', *axes], rows)}\n{lines(*notes)}"


def _running(budgets: dict[str, Any], settings: dict[str, Any], units: Units) -> str:
    """Weights, caches and expected speed, a row per budget and context."""
    rows = []
    for name, entry in budgets.items():
        for context, figures in entry["contexts"].items():
            states = entry["ssm_state_bytes"] + entry["conv_state_bytes"]
            rows.append(
                [
                    name,
                    units.stored(entry["weight_bytes"]),
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
        "running", f"{units.stored_name} bf16", "context", f"KV {units.memory_name}",
        f"states {units.memory_name}", "GFLOPs", "prefill", f"{units.stored_name}/step", "decoding",
    )  # fmt: skip
    note = lines(
        f"Batch {settings['batch']}. states: SSM and convolution. GFLOPs: forward, per token. "
        "Speeds are beside the parent's and are expectations: prefill (and training) by FLOPs, "
        "decoding by the bytes that a step moves."
    )
    return f"{table(header, rows)}\n{note}"


def _stored(family: dict[str, Any], units: Units) -> str:
    one, each = family["one_checkpoint_bytes"], family["separate_checkpoints_bytes"]
    return lines(
        f"One checkpoint for all: {units.stored(one)} {units.stored_name}; one for each: "
        f"{units.stored(each)} {units.stored_name}."
    )


def _time(plan: dict[str, Any], large: bool) -> Iterator[str]:
    work, settings = plan["training"], plan["settings"]
    on_gpu = plan["device"] == "GPU"
    yield f"TIME  {work['gpus']} {counted(plan, work['gpus'])}, as configured"
    ranking = work["ranking"]
    rows = [
        ["ranking", count(ranking["width_tokens"]), *"----", f"{ranking['flops']:.3g}", *"---"]
        + ([_hours(ranking["gpu_hours"])] if on_gpu else [])
    ]
    for stage in work["stages"]:
        rows.append(
            [
                stage["name"],
                count(stage["tokens"]),
                f"{stage['steps']:,}",
                f"{stage['batch_tokens']:,}",
                f"{stage['passes_per_step']} of {stage['sequences_per_pass']}",
                f"{stage['soft_share']:.0%}",
                *(
                    f"{stage[name]:.3g}"
                    for name in ("forward", "backward", "recomputed", "teacher")
                ),
                *([_hours(stage["gpu_hours"])] if on_gpu else []),
            ]
        )
    header = [
        "stage", "tokens", "steps", "batch", "passes", "soft", "forward", "backward", "again",
        "teacher", *(["GPU-hours"] if on_gpu else []),
    ]  # fmt: skip
    note = lines(
        "passes: forward passes of a process per optimizer step, of so many sequences each. soft: "
        "share of the tokens before the router freezes. forward to teacher: FLOPs."
    )
    yield f"{table(header, rows)}\n{note}"
    text, rate = plan["preparing"], settings["tokens_per_core_second"]
    when = "the run prepares it itself" if text["inline"] else "elastic prepare goes first"
    prepared = (
        f"Text: {count(text['tokens'])} tokens, {amount(text['disk_bytes'])} on disk, "
        f"{_hours(text['core_hours'])} core-hours at an assumed {count(rate)} tokens/s per core; "
        f"{when}."
    )
    notes = [
        prepared,
        f"{work['flops']:.3g} FLOPs, {count(work['elastic_tokens'])} tokens for the family.",
    ]
    within = f" {_duration(ranking['days'])}, and the eigenproblems of the basis." if on_gpu else ""
    notes.append(
        f"Ranking, on all {counted(plan, 2)}: widths {ranking['widths']:.3g} FLOPs, "
        f"{ranking['trials']} trials of layers on {count(ranking['depth_tokens'])} tokens "
        f"{ranking['depth']:.3g}.{within}"
    )
    if on_gpu and settings["gpus"]:
        numbers = sorted({work["gpus"], *settings["gpus"]})
        each = ", ".join(
            f"{_duration(work['gpu_hours'] / number / 24)} on {number}" for number in numbers
        )
        notes.append(f"At the same utilisation {each} GPUs; MEMORY says where it fits.")
    if large and work["elastic_tokens"]:
        notes.append(
            "Published for 6B and 9B beside the 12B (arXiv 2511.16664, table 2): "
            f"{count(work['separate_tokens'])} tokens by separate compression "
            f"({work['separate_over_elastic']:.3g} x these), {count(work['scratch_tokens'])} from "
            f"scratch ({work['scratch_over_elastic']:.3g} x)."
        )
    yield lines(*notes)
