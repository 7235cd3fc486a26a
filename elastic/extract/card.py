"""The model card of an exported member: what it is, where it comes from, and how to load it."""

from pathlib import Path
from typing import Any

import yaml

from elastic.extract.slice import LAYERS, OpenMember, sizes_of
from elastic.members.architecture import Architecture, AttentionLayer, Layer, MambaLayer, MLPLayer
from elastic.members.cost import parameters
from elastic.parent.small_files import licence_of, small_files
from elastic.storage.manifest import Member

NAME = "README.md"

LOADERS = {
    "native": "loads in stock transformers; vLLM reads the same config class",
    "padded": "loads wherever a native checkpoint does, at a cost in memory",
    "per_layer": "loads with this package: elastic.load, or AutoModelForCausalLM once elastic is "
    "imported; stock transformers refuses it",
}
"""Who can load each form of export."""


def loads_in(member: OpenMember) -> str:
    """Who can load an export, and who would compute something else."""
    if member.parent.time_step_limit is None or member.export == "per_layer":
        return LOADERS[member.export]
    return (
        f"for engines that honour time_step_limit={member.parent.time_step_limit}, and for "
        "elastic.load; stock transformers loads it and computes another function"
    )


def _licence(member: OpenMember) -> tuple[dict[str, str], str]:
    """Front matter and a sentence about the licence, only what the parent's card states."""
    stated = member.manifest.provenance.get("licence") or licence_of(member.checkpoint)
    files = [path.name for path in small_files(member.checkpoint, tokenizer=False)]
    licences = [name for name in files if name.startswith(("LICENSE", "LICENCE"))]
    notices = [name for name in files if name.startswith("NOTICE")]
    links = " and ".join(f"[{name}]({name})" for name in (*licences, *notices))
    see = f" See {links}." if links else ""
    if stated:
        shown = ", ".join(f"`{key}: {value}`" for key, value in stated.items())
        return dict(stated), f"That of the parent, whose card has {shown}.{see}"
    if licences:
        head = {"license": "other", "license_link": licences[0]}
        return head, f"That of the parent, whose card does not name it.{see}"
    return {}, (
        "Not known: the elastic checkpoint states none. Find it out before you pass this model "
        f"on.{see}"
    )


def write_card(directory: Path, member: OpenMember, name: str, verified: str | None) -> None:
    """Write README.md of an export that will be called `name`.

    `verified` is what was compared with the masked parent; None if nothing was.
    """
    licence, about_licence = _licence(member)
    provenance = member.manifest.provenance
    head: dict[str, Any] = {"library_name": "transformers"}
    base_model = provenance.get("base_model")
    if base_model:
        head["base_model"] = base_model
    head |= licence
    head["pipeline_tag"] = "text-generation"
    head["tags"] = ["elastic", "nemotron_h", "mamba2"]
    sections = [
        f"# {name}",
        _introduction(member),
        "## Family",
        _family_table(member),
        "## This member",
        _member_table(member),
        "## How to load",
        _loading(member, name),
        "## Step sizes",
        _steps(member),
        "## Verified",
        "Nothing: it was exported with `verify=false`."
        if verified is None
        else f"Against the elastic checkpoint, before this directory got its name: {verified}.",
        "## Provenance",
        _provenance(member, base_model),
        "## Licence",
        about_licence,
    ]
    yaml_head = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    (directory / NAME).write_text(f"---\n{yaml_head}---\n\n" + "\n\n".join(sections) + "\n")


def _introduction(member: OpenMember) -> str:
    share = member.parameters / parameters(member.parent, Architecture.full(member.parent))
    lines = [
        f"`{member.budget}`, a language model of {member.parameters:,} parameters: {share:.1%} of "
        "its parent, of which it is a prefix. One training run made all members of the family; "
        "this one was cut out of it without further training."
    ]
    if member.stored_parameters != member.parameters:
        lines.append(
            f"Layers that differ in width are zero-padded to the widest, which changes no output: "
            f"{member.stored_parameters:,} parameters are stored."
        )
    return "\n".join(lines)


def _family_table(member: OpenMember) -> str:
    """One row per budget, largest first."""
    whole = parameters(member.parent, Architecture.full(member.parent))
    rows = [["budget", "parameters", "of the parent", "hidden", "layers", *LAYERS.values()]]
    by_size = sorted(member.manifest.budgets.items(), key=lambda entry: -entry[1].params)
    for budget, entry in by_size:
        rows.append(
            [
                f"**{budget}** (this one)" if budget == member.budget else budget,
                f"{entry.params:,}",
                f"{entry.params / whole:.1%}",
                str(entry.architecture.hidden_size),
                f"{len(entry.architecture.layers)} of {len(member.parent.pattern)}",
                *_widths(entry),
            ]
        )
    return _table(rows)


def _widths(entry: Member) -> list[str]:
    """Sizes of each kind of layer, largest first."""
    found = []
    for kind in LAYERS:
        sizes = sizes_of(entry.architecture, kind)
        few = sizes if len(sizes) <= 3 else [sizes[0], "...", sizes[-1]]
        found.append(", ".join(few) or "none")
    return found


def _member_table(member: OpenMember) -> str:
    """One row per kind and size of layer, in the order in which they first come."""
    kept: dict[tuple[str, str], list[str]] = {}
    for layer in member.member.architecture.layers:
        kept.setdefault((layer.kind, _size(layer)), []).append(str(layer.index))
    rows = [["kind", "size", "layers", "their places in the parent"]]
    rows += [
        [kind, size, str(len(places)), ", ".join(places)] for (kind, size), places in kept.items()
    ]
    shape = member.parent
    fixed = (
        f"Hidden size {member.shape.hidden_size}, vocabulary {shape.vocab_size:,}, "
        f"{shape.num_key_value_heads} KV heads of {shape.head_dim} channels, {shape.n_groups} SSM "
        f"groups, state {shape.ssm_state_size}; layers `{member.shape.pattern}` (M Mamba-2, - MLP, "
        "* attention)."
    )
    return f"{fixed}\n\n{_table(rows)}"


def _size(layer: Layer) -> str:
    if isinstance(layer, MLPLayer):
        return f"{layer.intermediate_size} wide"
    if isinstance(layer, AttentionLayer):
        return f"{layer.num_heads} query heads"
    assert isinstance(layer, MambaLayer)
    return f"{layer.num_heads} heads x {layer.head_dim} channels"


def _loading(member: OpenMember, name: str) -> str:
    lines = ["import elastic  # before the model is loaded"] if member.export == "per_layer" else []
    lines += [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")',
    ]
    ours = ["import elastic", "", f'model = elastic.load("{name}", device="cpu")']
    code = ["```python\n" + "\n".join(block) + "\n```" for block in (lines, ours)]
    return (
        f"Exported as `{member.export}`: {loads_in(member)}. No remote code is involved.\n\n"
        f"{code[0]}\n\nor, reading tensor by tensor onto a device,\n\n{code[1]}"
    )


def _steps(member: OpenMember) -> str:
    """Which function of the step size this is, and what config.json says for whom."""
    said = member.config["time_step_limit"], member.config["time_step_min"]
    limit = member.parent.time_step_limit
    if limit is None:
        return (
            "The step size of a Mamba-2 layer is softplus(dt + dt_bias) without a limit, as "
            f"Nemotron-H is published. `config.json` says so twice: `time_step_limit: {said[0]}` "
            f"for engines that read it, and `time_step_min: {said[1]}` for transformers, which "
            "clamps there. Neither bound is ever reached; leave them as they are."
        )
    text = f"The step size of a Mamba-2 layer is softplus(dt + dt_bias) within {limit}. "
    if member.export == "per_layer":
        return f"{text}This package honours that, with and without a cache."
    return (
        f"{text}**Stock transformers computes another function**: it has no upper limit, and none "
        "at all when it decodes with a cache. The model of `elastic.load`, which this export is "
        "verified with, honours the limit, as do engines that read `time_step_limit`."
    )


def _provenance(member: OpenMember, base_model: str | None) -> str:
    """Training, as recorded in the elastic checkpoint."""
    provenance = member.manifest.provenance
    parent = str(provenance.get("parent", "unknown"))
    # Of a directory only the name: the rest of the path is of another machine.
    rows = [["parent", base_model or Path(parent).name]]
    seen = provenance.get("tokens_seen")
    if isinstance(seen, dict):
        rows += [[f"tokens, stage {stage}", f"{int(count):,}"] for stage, count in seen.items()]
    elif seen is not None:
        rows.append(["tokens", f"{seen:,}"])
    for key, label in (("config", "configuration hash"), ("git_revision", "git revision")):
        if provenance.get(key):
            rows.append([label, str(provenance[key])])
    versions = provenance.get("versions") or {}
    rows += [[f"{package}", str(version)] for package, version in versions.items()]
    return _table([["", ""], *rows]) + "\n\nIn full in `provenance.json`."


def _table(rows: list[list[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])
