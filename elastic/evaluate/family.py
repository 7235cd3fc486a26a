"""Every member of a family: size, loss and KL on text that nothing was chosen by, and a few lines
that it writes."""

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import NemotronHForCausalLM
from transformers.utils import logging as transformers_logging

from elastic import load
from elastic.config import ConfigError, EvaluateConfig, RunConfig, parse
from elastic.console import table as console_table
from elastic.data import load_tokenizer, open_prepared
from elastic.evaluate.answers import arithmetic, as_json, check_chat
from elastic.evaluate.answers import table as score_table
from elastic.evaluate.documents import (
    Logits,
    mean_and_error,
    report_text,
    stock_logits,
    sums_by_document,
)
from elastic.extract.exported import load_exported
from elastic.importance import read_ranking, sort_parent
from elastic.parent import HybridParent
from elastic.parent.sealed import parent_seals
from elastic.parent.weights import load_parent, locate
from elastic.storage.files import (
    elastic_directory,
    kept_stages,
    refuse_inside,
    require_writable,
    run_folders,
    write_json,
)
from elastic.storage.foreign import read_yaml
from elastic.storage.manifest import Manifest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Figures:
    """One member's row; losses are in nats per token."""

    budget: str
    params: int
    share: float
    """Of the parent's parameters."""
    bytes: int
    """Of the weights."""
    loss: float
    perplexity: float
    gap: float
    """Relative distance of the loss from the parent's."""
    gap_error: float
    """Its standard error, paired, over documents."""
    kl: float
    """To the parent."""
    kl_error: float
    untrained_loss: float
    """The same cut of the sorted parent, without elastic training."""


def _directory(config: EvaluateConfig, budget: str) -> Path | None:
    """Where an extracted member is, if it is there."""
    directory = None if config.members is None else Path(config.members) / budget
    return directory if directory is not None and directory.is_dir() else None


def _model(config: EvaluateConfig, elastic: Path, budget: str) -> NemotronHForCausalLM:
    """A member in transformers, float32: from its own directory, which must hold that very member,
    or cut in memory. No code that comes with either is run."""
    directory = _directory(config, budget)
    if directory is None:
        return load(elastic, budget, dtype=torch.float32)
    return load_exported(directory, elastic, budget, torch.float32)


def _parent_directory(run_dir: Path) -> Path:
    """Where the parent is as it was before elastic training."""
    if (run_dir / "parent").is_dir():
        return run_dir / "parent"
    run = parse(read_yaml(run_dir / "config.yaml"), RunConfig)
    assert run.parent.path is not None
    return locate(run.parent.path)


def _parent(run_dir: Path) -> HybridParent:
    source = _parent_directory(run_dir)
    if source == run_dir / "parent":
        return load_parent(source)
    return load_parent(source, seals=parent_seals(source, run_dir))


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measure every budget of a run, print the table, write the JSON."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    run_dir = Path(config.run_dir)
    elastic = elastic_directory(run_dir, config.stage)
    if config.stage is not None and not elastic.is_dir():
        kept = [path.name for path in kept_stages(run_dir)]
        raise ConfigError(
            f"stage={config.stage}: {elastic} is not there; "
            + (f"kept are {', '.join(kept)}" if kept else "keep_stages=true would have kept it")
        )
    output = Path(config.output) if config.output else run_dir / "family.json"
    refuse_inside("output", output, *run_folders(run_dir))
    require_writable("output", output)
    manifest = Manifest.read(elastic)
    if config.members is not None and not Path(config.members).is_dir():
        raise ConfigError(f"members={config.members}: must be a directory of extracted members")
    parent = _parent(run_dir)
    run = parse(read_yaml(run_dir / "config.yaml"), RunConfig)
    data = open_prepared(run.data, run_dir, parent.shape.vocab_size)
    tokenizer = load_tokenizer(elastic, "tokenizer")
    if config.tasks:
        check_chat(tokenizer, str(elastic))
    report = report_text(
        data, "report", config.sequences, config.sequence_length, config.batch_size
    )
    (original,) = sums_by_document([parent.logits], parent.logits, report)
    parent_loss, _ = mean_and_error(original.loss, original.tokens)
    parent_params = sum(weight.numel() for weight in parent.state_dict().values())
    smallest_head_dim = manifest.space["choices"]["mamba_head_dim"][-1]
    scores = run_dir / "importance" / "scores.safetensors"
    sort_parent(parent, read_ranking(scores, parent.shape, smallest_head_dim).orders)
    rows = []
    for budget, member in manifest.budgets.items():
        model = _model(config, elastic, budget)
        # The sorted parent is the parent.
        untrained = partial(parent.logits, member=member.architecture)
        models: list[Logits] = [stock_logits(model), untrained]
        found, cut = sums_by_document(models, parent.logits, report)
        loss, _ = mean_and_error(found.loss, found.tokens)
        _, error = mean_and_error(found.loss - original.loss, found.tokens)
        kl, kl_error = mean_and_error(found.kl, found.tokens)
        weights = list(model.parameters())
        rows.append(
            Figures(
                budget=budget,
                params=member.params,  # without the zeros of a padded export
                share=member.params / parent_params,
                bytes=sum(weight.numel() * weight.element_size() for weight in weights),
                loss=loss,
                perplexity=math.exp(loss),
                gap=loss / parent_loss - 1,
                gap_error=error / parent_loss,
                kl=kl,
                kl_error=kl_error,
                untrained_loss=mean_and_error(cut.loss, cut.tokens)[0],
            )
        )
        log.info("%s: loss %.4f", budget, loss)
    smallest = min(rows, key=lambda row: row.params).budget
    written = generate(config, elastic, smallest)
    family = {
        "parent": {"params": parent_params, "loss": parent_loss},
        "members": [asdict(row) for row in rows],
        "report": {
            "sequences": sum(map(len, report.batches)),
            "length": config.sequence_length,
            "documents": report.document_count,
        },
        "generated": {"budget": smallest, "text": written},
    }
    answers = []
    if config.tasks:
        openers: dict[str, Callable[[], Any]] = {
            "parent": partial(load, _parent_directory(run_dir), dtype=torch.float32)
        }
        for budget in manifest.budgets:
            openers[budget] = partial(_model, config, elastic, budget)
        answers = arithmetic(config, tokenizer, openers)
        family["tasks"] = {"arithmetic": as_json(config, answers)}
    write_json(output, family)
    print(table(parent_loss, parent_params, rows))
    if answers:
        print(f"\n{score_table(answers)}")
    print(f"\n{smallest}, loaded by transformers, continues:")
    for continuation in written:
        print("\n".join("    " + line for line in continuation.splitlines()))
        print("    " + "-" * 40)
    print(f"written to {output}")
    return family


@torch.no_grad()
def generate(config: EvaluateConfig, elastic: Path, budget: str) -> list[str]:
    """Greedy continuations of the prompts by one member."""
    if not config.prompts:
        return []
    tokenizer = load_tokenizer(_directory(config, budget) or elastic, f"tokenizer of {budget}")
    model: Any = _model(config, elastic, budget)
    texts: list[str] = []
    for prompt in config.prompts:
        tokens = tokenizer(prompt, return_tensors="pt").input_ids  # (1, t)
        if not tokens.numel():
            raise ConfigError(f"prompts: the tokenizer makes no token of {prompt!r}; must be text")
        out = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=config.new_tokens,
            do_sample=False,
            repetition_penalty=1.2,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts.append(str(tokenizer.decode(out[0], skip_special_tokens=True)))
    return texts


def table(parent_loss: float, parent_params: int, rows: list[Figures]) -> str:
    """The family as text; the parent first."""
    header = ("member", "params", "share", "bytes", "loss", "perplexity", "to parent", "KL", "cut")
    whole = ["parent", f"{parent_params:,}", "100.0%", f"{parent_params * 4:,}"]
    lines = [[*whole, f"{parent_loss:.4f}", f"{math.exp(parent_loss):.2f}", "", "", ""]]
    for row in rows:
        lines.append(
            [
                row.budget,
                f"{row.params:,}",
                f"{row.share:.1%}",
                f"{row.bytes:,}",
                f"{row.loss:.4f}",
                f"{row.perplexity:.2f}",
                f"{row.gap:+.2%} +- {row.gap_error:.2%}",
                f"{row.kl:.4f} +- {row.kl_error:.4f}",
                f"{row.untrained_loss:.4f}",
            ]
        )
    note = "to parent and KL with their standard errors over documents; cut: untrained"
    return "\n".join([*console_table(header, lines), note])
