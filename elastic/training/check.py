"""Step 1 of a run: everything that can be known to be wrong is found before anything is written."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from elastic.cluster.place import Place, find_device
from elastic.cluster.strategies import check_zero
from elastic.config import ParentShape, RunConfig
from elastic.config.checks import require
from elastic.data import check_vocabulary, prepare_data
from elastic.losses import check_objective
from elastic.members.families import nested_families
from elastic.members.search import Search
from elastic.parent.sealed import parent_seals
from elastic.parent.ssd import resolve_kernels
from elastic.parent.stock import read_config
from elastic.parent.weights import locate, open_weights
from elastic.routing.curriculum import plan
from elastic.routing.sizes import Sizes, check_sizes
from elastic.routing.text import stage_texts
from elastic.storage.files import refuse_inside
from elastic.teacher import check_teacher
from elastic.training.origin import trained_tokens
from elastic.training.run_dir import check_run_dir
from elastic.training.setup import Setup
from elastic.training.text import calibration_text, stage_text


def check(config: RunConfig, place: Place) -> Setup:
    """Check settings against one another, the run directory, the parent, the text and the machine.

    Nothing is written but the prepared text, which another run may use as well; a parent is
    downloaded where it has to be.

    Raises:
        ConfigError: the first thing that is wrong, in one line.
        ValueError: the parent's checkpoint cannot be read.
    """
    check_run_dir(config, first=place.rank == 0)
    stages = plan(config.curriculum.stages, config.trainer)
    if config.parent.path is not None and config.parent.shape is not None:
        _sizes(config, config.parent.shape)  # before a download of hours
    source, parent_config, shape = find_parent(config)
    if source is not None:
        refuse_inside("run_dir", Path(config.run_dir), source)
    sizes = _sizes(config, shape)
    if config.router.kind == "members" and not sizes.given:  # before layers are ranked
        search = Search(sizes.space, sizes.drop_order, config.space.tolerance)
        nested_families(search, sizes.targets, config.space.nested)
    config.importance.rotates(shape.tied_head)  # refuses what this parent cannot do
    check_objective(config.objective, shape.vocab_size)
    device = find_device(config.trainer)
    check_zero(config.trainer, device)
    check_teacher(config.objective.teacher, config.trainer.world_size)
    kernels = resolve_kernels(config.parent.kernels, device)
    tokenizer = None if source is None else str(source)
    run_dir = Path(config.run_dir)
    trained = trained_tokens(run_dir / "checkpoints")
    if config.data.tokenizer == "train":
        require(
            config.data.tokenizer_vocab <= shape.vocab_size,
            "data.tokenizer_vocab",
            config.data.tokenizer_vocab,
            f"at most the parent's vocabulary of {shape.vocab_size}: lower it, or raise "
            "parent.shape.vocab_size",
        )
    lengths = {
        **{f"curriculum.stages.{s.name}.sequence_length": s.config.sequence_length for s in stages},
        "importance.sequence_length": config.importance.sequence_length,
        "importance.depth_sequence_length": config.importance.depth_sequence_length,
    }
    data = prepare_data(
        config.data, run_dir, tokenizer, trained, vocabulary=shape.vocab_size, lengths=lengths
    )
    check_vocabulary(data.tokenizer, shape.vocab_size)
    base_config = stock_base(data.tokenizer, parent_config)
    setup = Setup(
        config,
        place,
        stages,
        source,
        shape,
        sizes.space,
        sizes.targets,
        sizes.given,
        data,
        base_config,
        device,
        kernels,
    )
    if place.rank == 0:
        data.store_packs(stage_texts(stages))
    stage_text(setup, stages[-1], 0)  # and with it all before: each must have text to read
    calibration_text(setup)
    return setup


def stock_base(tokenizer: PreTrainedTokenizerBase, parent_config: dict[str, Any] | None) -> dict:
    """Fields of config.json beside the sizes: the parent's fields, or the tokenizer's ids."""
    if parent_config is not None:
        return parent_config
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return {"chunk_size": 128, **ids}


def find_parent(config: RunConfig) -> tuple[Path | None, dict[str, Any] | None, ParentShape]:
    """Where the parent is, its config.json and its sizes; None, None for one trained here.

    Raises:
        SealBroken: it is not what it was when the run began, by the sizes and headers of its files.
    """
    if config.parent.path is None:
        assert config.parent.shape is not None
        return None, None, config.parent.shape
    source = locate(config.parent.path)
    seals = parent_seals(source, Path(config.run_dir))
    if seals is not None:
        seals.check_sizes()
    shape, _ = open_weights(source, seals)
    config.parent.check_shape(shape)
    return source, read_config(source), shape


def _sizes(config: RunConfig, shape: ParentShape) -> Sizes:
    """The space, and targets that are all reachable."""
    parts = config.space, config.budgets, config.importance, config.curriculum.stages
    return check_sizes(shape, *parts, in_place=config.objective.teacher == "in_place")
