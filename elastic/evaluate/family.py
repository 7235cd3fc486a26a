"""Every member of a family: size, validation loss, and a few generated lines."""

import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import NemotronHForCausalLM
from transformers.utils import logging as transformers_logging

from elastic import load
from elastic.config import ConfigError, EvaluateConfig, RunConfig, parse
from elastic.data import PackedTokens, load_tokenizer, load_tokens
from elastic.data.packing import Tokens
from elastic.extract.exported import load_exported
from elastic.importance import read_ranking, sort_parent
from elastic.parent import HybridParent
from elastic.parent.sealed import parent_seals
from elastic.parent.weights import load_parent, locate
from elastic.storage.files import refuse_inside, require_writable, run_folders, write_json
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
    untrained_loss: float
    """The same cut of the sorted parent, without elastic training."""


@torch.no_grad()
def mean_loss(model: Any, batches: list[Tensor]) -> float:
    """Negative log-likelihood per token; `model` maps (b, t) tokens to (b, t, v) logits."""
    total, count = 0.0, 0
    for batch in batches:
        logits = model(batch[:, :-1])
        targets = batch[:, 1:].flatten()
        total += float(F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="sum"))
        count += len(targets)
    return total / count


def validation_batches(config: EvaluateConfig, tokens: Tokens, vocabulary: int) -> list[Tensor]:
    """Windows spread evenly over the held-out text, (b, t + 1) each."""
    windows = PackedTokens(
        tokens,
        config.sequence_length,
        setting="sequence_length",
        text="validation text",
        vocabulary=vocabulary,
    )
    count = min(config.sequences, len(windows))
    chosen = torch.stack([windows[i * len(windows) // count] for i in range(count)])
    return list(chosen.split(config.batch_size))


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


def _parent(run_dir: Path) -> HybridParent:
    """The parent as it was before elastic training."""
    source = run_dir / "parent"
    if source.is_dir():
        return load_parent(source)
    run = parse(read_yaml(run_dir / "config.yaml"), RunConfig)
    assert run.parent.path is not None
    source = locate(run.parent.path)
    return load_parent(source, seals=parent_seals(source, run_dir))


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measure every budget of a run, print the table, write the JSON."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    run_dir = Path(config.run_dir)
    elastic = run_dir / "elastic"
    output = Path(config.output) if config.output else run_dir / "family.json"
    refuse_inside("output", output, *run_folders(run_dir))
    require_writable("output", output)
    manifest = Manifest.read(elastic)
    if config.members is not None and not Path(config.members).is_dir():
        raise ConfigError(f"members={config.members}: must be a directory of extracted members")
    tokens = load_tokens(run_dir / "data" / "validation.npy")
    parent = _parent(run_dir)
    batches = validation_batches(config, tokens, parent.shape.vocab_size)
    parent_loss = mean_loss(parent.logits, batches)
    parent_params = sum(weight.numel() for weight in parent.state_dict().values())
    smallest_head_dim = manifest.space["choices"]["mamba_head_dim"][-1]
    scores = run_dir / "importance" / "scores.safetensors"
    sort_parent(parent, read_ranking(scores, parent.shape, smallest_head_dim).orders)
    rows = []
    for budget, member in manifest.budgets.items():
        model = _model(config, elastic, budget)
        loss = mean_loss(lambda tokens, m=model: m(tokens, use_cache=False).logits, batches)
        untrained = mean_loss(
            lambda tokens, a=member.architecture: parent.logits(tokens, a), batches
        )
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
                untrained_loss=untrained,
            )
        )
        log.info("%s: validation loss %.4f", budget, loss)
    smallest = min(rows, key=lambda row: row.params).budget
    text = generate(config, elastic, smallest)
    family = {
        "parent": {"params": parent_params, "loss": parent_loss},
        "members": [asdict(row) for row in rows],
        "validation": {"sequences": sum(map(len, batches)), "length": config.sequence_length},
        "generated": {"budget": smallest, "text": text},
    }
    write_json(output, family)
    print(table(parent_loss, parent_params, rows))
    print(f"\n{smallest}, loaded by transformers, continues:")
    for continuation in text:
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
    lines = [
        "member         params   share        bytes     loss  perplexity  to parent  untrained cut",
        f"{'parent':<10} {parent_params:>10,} {1:>7.1%} {parent_params * 4:>12,} "
        f"{parent_loss:>8.4f} {math.exp(parent_loss):>11.2f} {'':>10} {'':>14}",
    ]
    for row in rows:
        lines.append(
            f"{row.budget:<10} {row.params:>10,} {row.share:>7.1%} {row.bytes:>12,} "
            f"{row.loss:>8.4f} {row.perplexity:>11.2f} {row.gap:>+10.2%} "
            f"{row.untrained_loss:>14.4f}"
        )
    return "\n".join(lines)
