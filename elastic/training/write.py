"""Step 5 of a run: write the parent and the elastic checkpoint, directories that are replaced
whole."""

import logging
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from elastic.cluster.place import wait_for_all
from elastic.config import BudgetConfig, ParentShape
from elastic.importance import Ranking
from elastic.importance.basis import gated_norms
from elastic.members.cut import norm_cuts, tensor_shapes
from elastic.members.search import Choice
from elastic.parent.layers import narrow
from elastic.parent.norms import own_name, width_scale
from elastic.parent.small_files import copy_small_files, licence_of
from elastic.parent.weights import open_weights, save_weights
from elastic.routing.curriculum import Stage
from elastic.routing.family import Family
from elastic.storage.files import atomic_directory, digest, elastic_directory
from elastic.storage.manifest import ENERGIES, MEMBERS, Manifest, Member
from elastic.storage.seals import REMEDY, Seals, damage
from elastic.storage.writing import Pending
from elastic.training.resume import Pieces
from elastic.training.setup import Setup

log = logging.getLogger(__name__)

PACKAGES = ("elastic", "torch", "transformers", "lightning", "safetensors", "tokenizers")


def git_revision() -> str | None:
    """Revision of the code that runs, if it runs from a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def _weights(
    shape: ParentShape, pieces: Pieces, dtypes: Mapping[str, torch.dtype]
) -> list[Pending]:
    """A checkpoint's weights under their stored names, each assembled when it is written."""

    def pending(name: str, size: tuple[int, ...]) -> Pending:
        tied = shape.tied_head and name == "lm_head.weight"  # stored twice all the same
        stored = "backbone.embeddings.weight" if tied else name
        dtype = dtypes.get(name, pieces.dtype(stored))
        return Pending.of(name, size, dtype, lambda: pieces.weight(stored, size))

    return [pending(name, size) for name, size in tensor_shapes(shape).items()]


def _dtypes(source: Path, seals: Seals | None) -> dict[str, torch.dtype]:
    """Type of every tensor of a checkpoint."""
    return {name: tensor.dtype for name, tensor in open_weights(source, seals)[1].items()}


def write_parent(setup: Setup, pieces: Pieces) -> None:
    """Write the parent that was trained here as an ordinary checkpoint with its tokenizer: on the
    first process, once all have come here; the others wait."""
    if setup.place.rank == 0:
        with atomic_directory(setup.original, replace=True) as temporary:
            weights = _weights(setup.shape, pieces, {})
            sealed = save_weights(temporary, setup.shape, weights, setup.base_config)
            setup.data.tokenizer.save_pretrained(temporary)
            Seals.of(temporary, sealed).write()
        log.info("parent written to %s", setup.original)
    wait_for_all()


def _tokens_seen(setup: Setup, stage: Stage) -> dict[str, int]:
    """Tokens of every stage at the end of `stage`."""
    return {s.name: s.tokens for s in setup.stages if s.index <= stage.index}


def is_written(setup: Setup, stage: Stage) -> bool:
    """Whether the elastic checkpoint of the end of `stage` is there, to the last byte; damage is
    named."""
    directory = elastic_directory(setup.run_dir)
    if not directory.is_dir():
        return False
    try:
        seen = Manifest.read(directory).provenance["tokens_seen"]
        problem = damage(directory) if seen == _tokens_seen(setup, stage) else ""
    except (ValueError, KeyError) as error:
        problem = str(error).removesuffix(f"; {REMEDY}")
    if problem:
        log.warning("%s: the elastic checkpoint is written again from the last checkpoint", problem)
    return problem is None


def _own_norms(
    setup: Setup,
    pieces: Pieces,
    family: Family,
    choices: Mapping[str, Choice],
    ranking: Ranking,
    dtypes: Mapping[str, torch.dtype],
) -> dict[str, Tensor]:
    """Norms of members' own in the members' sizes, with the scale of their width folded in."""
    if not setup.config.norms.own:
        return {}
    shape, sizes, gated = setup.shape, tensor_shapes(setup.shape), gated_norms(setup.shape)
    found = {}
    for budget, position in family.smaller.items():
        for cut in norm_cuts(shape, choices[budget].architecture):
            name = cut.source
            size, groups = sizes[name][0], shape.n_groups if name in gated else 1
            weight = pieces.read("weight", own_name(name), position * size, size)
            scale = width_scale(ranking.energies[name], groups, cut.cut, None)
            value = narrow(weight.float(), cut.cut) * scale
            found[f"{budget}/{name}"] = value.to(dtypes.get(name, weight.dtype))
    return found


def _hub_id(path: str | None) -> str | None:
    """What the hub calls a parent; None for a directory, which others do not have."""
    return None if path is None or Path(path).is_dir() else path


def _target(budget: BudgetConfig, choice: Choice) -> dict[str, float | str]:
    """What was asked for, and what it was counted with; the member's own size where only that was
    given."""
    asked = budget.asked
    if not asked:
        return {"params": choice.params}
    read = {key: getattr(budget, key) for key in ("weight_dtype", "context", "batch")}
    return asked | {key: value for key, value in read.items() if value is not None}


def keep_stage(setup: Setup, stage: Stage) -> None:
    """Keep the elastic checkpoint of a stage's end beside `elastic`, which the next stage replaces:
    hard links where the file system has them, on the first process. One that is there stays."""
    kept = elastic_directory(setup.run_dir, stage.name)
    if setup.place.rank == 0 and not kept.exists():
        with atomic_directory(kept) as temporary:
            for file in sorted(elastic_directory(setup.run_dir).iterdir()):
                try:
                    os.link(file, temporary / file.name)
                except OSError:
                    shutil.copy2(file, temporary / file.name)
        log.info("kept as %s", kept)
    wait_for_all()


def write_elastic(
    setup: Setup, stage: Stage, pieces: Pieces, family: Family, ranking: Ranking
) -> None:
    """Write the elastic checkpoint at a stage's end, on the first process; the others wait.

    The old one stays until the new one is whole; one that this stage has written is left as it is.
    """
    if setup.place.rank == 0 and not is_written(setup, stage):
        choices = family.choices(stage.progress(stage.steps))
        seen = _tokens_seen(setup, stage)
        _write_directory(
            setup, elastic_directory(setup.run_dir), pieces, family, choices, ranking, seen
        )
        log.info("elastic checkpoint after stage %s; %s", stage.name, family.news(choices))
    wait_for_all()


def _write_directory(
    setup: Setup,
    directory: Path,
    pieces: Pieces,
    family: Family,
    choices: dict[str, Choice],
    ranking: Ranking,
    tokens_seen: dict[str, int],
) -> None:
    """The sorted parent, tokenizer, router and elastic.json.

    No more than one tensor of the weights is in memory. Those of a parent that came as a checkpoint
    are written in the types that they had there, and its licence comes along.
    """
    config, source = setup.config, setup.source
    budgets = {
        name: Member(
            _target(config.budgets[name], choice),
            choice.params,
            choice.architecture,
            family.decisions[name].to_json() if name in family.decisions else None,
        )
        for name, choice in choices.items()
    }
    provenance = {
        "parent": config.parent.path or "trained in this run",
        "base_model": _hub_id(config.parent.path),
        "config": digest(asdict(config)),
        "tokens_seen": tokens_seen,
        "versions": {name: version(name) for name in PACKAGES},
        "git_revision": git_revision(),
        "frozen": family.frozen is not None,
        "licence": {} if source is None else licence_of(source),
    }
    manifest = Manifest(
        budgets,
        family.space.to_json(),
        ranking.to_json(config.importance),
        provenance,
        ranking.shares(family.space),
    )
    with atomic_directory(directory, replace=True) as temporary:
        seals = setup.seals
        dtypes = {} if source is None else _dtypes(source, seals)
        sealed = save_weights(
            temporary, setup.shape, _weights(setup.shape, pieces, dtypes), setup.base_config
        )
        setup.data.tokenizer.save_pretrained(temporary)
        if source is not None:
            copy_small_files(source, temporary, tokenizer=False, seals=seals)
        router = {
            name: weight.detach().cpu().clone()
            for name, weight in family.router.state_dict().items()
        }
        save_file(router, temporary / "router.safetensors")
        save_file(_own_norms(setup, pieces, family, choices, ranking, dtypes), temporary / MEMBERS)
        save_file(ranking.energies, temporary / ENERGIES)
        manifest.write(temporary)
        Seals.of(temporary, sealed).write()
