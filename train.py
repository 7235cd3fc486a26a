"""Train a nested family: python train.py [experiment=NAME] [key=value ...]."""

from elastic.cli.command import command
from elastic.cluster.start import check_started
from elastic.config import RunConfig


def main(config: RunConfig) -> None:
    """Train as configured."""
    check_started(config.trainer)  # before the import, which takes a while
    from elastic.training.launch import (
        launch,  # imports torch: only once the settings are known to be good
    )

    launch(config)


if __name__ == "__main__":
    command("train", RunConfig, main)
