"""python -m elastic.plan experiment=nano_v2_12b [key=value ...] [json=PATH]."""

from pathlib import Path

from elastic.cli.command import command
from elastic.cluster.start import given_settings
from elastic.config import PlanConfig
from elastic.plan.text import describe
from elastic.plan.work import make_plan
from elastic.storage.files import write_json


def main(config: PlanConfig) -> None:
    """Print what a run would do and whether it fits; exit code 2 for one that cannot be."""
    plan = make_plan(config, given_settings())
    if config.json is not None:
        write_json(Path(config.json), plan)
    print(describe(plan))


if __name__ == "__main__":
    command("plan", PlanConfig, main)
