"""Train a nested family: python train.py [experiment=NAME] [key=value ...]."""

from elastic.cli.command import command
from elastic.config import RunConfig


def main(config: RunConfig) -> None:
    """Train as configured."""
    from elastic.training.opening import show

    show(config)
    from elastic.training.launch import launch  # imports torch: once there is something to read

    launch(config)


if __name__ == "__main__":
    command("train", RunConfig, main)
