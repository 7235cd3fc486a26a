"""Step 3 of a run: rank widths and layers of the trained parent, and sort its weights by them."""

import logging
from pathlib import Path

from elastic.cluster.place import first_alone
from elastic.importance import Ranking, is_sorted, rank, sort_checkpoint
from elastic.parent import HybridParent
from elastic.storage.files import atomic_directory
from elastic.teacher.online import weight_dtype
from elastic.training.build import load
from elastic.training.setup import Setup
from elastic.training.text import calibration_text

log = logging.getLogger(__name__)


def scores_of(setup: Setup) -> Path:
    """File of the importance scores."""
    return setup.run_dir / "importance" / "scores.safetensors"


def rank_parent(setup: Setup) -> Ranking:
    """Rank on all processes, in the type in which the run makes its products."""
    ranking = rank(
        setup.original,
        lambda: load(setup, setup.original),
        calibration_text(setup),
        setup.config.importance,
        setup.space,
        setup.config.seed,
        setup.data.fingerprint,
        scores_of(setup),
        setup.seals,
        weight_dtype(setup.config.trainer.precision),
        setup.place,
    )
    what = "coordinates" if ranking.orders.rotation is None else "directions"
    for width, share in list(ranking.shares(setup.space).items())[1:]:
        log.info(
            "hidden %s: the first %s hold %.1f%% of the energy, as many best coordinates %.1f%%",
            width, what, 100 * share["basis"], 100 * share["coordinates"],
        )  # fmt: skip
    if ranking.drop_order:
        kinds = setup.shape.kinds
        order = ", ".join(f"{kinds[layer]} {layer}" for layer in ranking.drop_order)
        log.info("layers by importance, least first: %s", order)
    return ranking


def sorted_parent(setup: Setup, ranking: Ranking) -> HybridParent:
    """Where elastic training starts; sorted on disk by the first process, once."""
    directory = setup.run_dir / "sorted"
    with first_alone(setup.place):
        if setup.place.rank == 0 and not is_sorted(directory, ranking.key):
            log.info(
                "%s the weights into %s",
                "sorting" if ranking.orders.rotation is None else "rotating",
                directory,
            )
            with atomic_directory(directory, replace=True) as temporary:
                sort_checkpoint(
                    setup.original, temporary, ranking.orders, ranking.key, seals=setup.seals
                )
    return load(setup, directory)
