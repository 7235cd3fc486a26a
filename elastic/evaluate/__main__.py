"""python -m elastic.evaluate run_dir=runs/tiny [members.small=DIR ...]."""

from elastic.cli.command import command
from elastic.config import EvaluateConfig


def main(config: EvaluateConfig) -> None:
    """Measure every member of a run."""
    from elastic.evaluate.family import evaluate

    evaluate(config)


if __name__ == "__main__":
    command("evaluate", EvaluateConfig, main)
