"""Step 2 of a run: take the run directory."""

from elastic.parent.sealed import seal_parent
from elastic.storage.files import elastic_directory, recover, sweep
from elastic.training.run_dir import write_config
from elastic.training.setup import Setup


def prepare(setup: Setup) -> None:
    """Write settings and the parent's seals, remove what a killed run has left; the first
    process alone."""
    if setup.place.rank != 0:
        return
    setup.run_dir.mkdir(parents=True, exist_ok=True)
    sweep(setup.run_dir)
    kept = [elastic_directory(setup.run_dir, stage.name) for stage in setup.stages]
    written = [setup.run_dir / "parent", setup.run_dir / "sorted", elastic_directory(setup.run_dir)]
    for directory in (*written, *kept):
        recover(directory)
    write_config(setup.config)
    if setup.source is not None:
        seal_parent(setup.source, setup.run_dir)
