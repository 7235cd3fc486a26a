"""elastic prepare: the text of a run, before the run."""

import sys
from contextlib import nullcontext
from pathlib import Path

from elastic.cluster.lock import RunLock
from elastic.config import PrepareConfig
from elastic.data import prepare_data
from elastic.data.preview import blend, sample, shown_tokens
from elastic.parent.weights import locate
from elastic.routing.curriculum import plan
from elastic.routing.text import stage_texts
from elastic.training.origin import trained_tokens


def prepare_text(config: PrepareConfig) -> None:
    """Prepare the text of a run, and show what it is.

    Raises:
        ConfigError: a source cannot be read.
    """
    stages = plan(config.curriculum.stages, config.trainer)
    source = None if config.parent.path is None else str(locate(config.parent.path))
    run_dir = Path(config.run_dir)
    trained = trained_tokens(run_dir / "checkpoints")
    with RunLock(run_dir) if config.data.prepared is None else nullcontext():
        data = prepare_data(config.data, run_dir, source, trained, inline=False)
        texts = stage_texts(stages)
        data.store_packs(texts)
    print("\n".join(blend(data, texts)))
    print(f"\n{shown_tokens(data)}")
    for text in texts if config.preview else []:
        order = data.order(texts, text.name, config.seed)
        sequences = data.sequences(text.sequence_length)
        for place, key in enumerate(order.keys(0, config.preview).tolist()):
            print(f"\n=== stage {text.name}, sequence {place + 1}")
            print(sample(data, sequences[key], colour=sys.stdout.isatty()))
