"""What every command does around its work: compose, parse, run, and say what is wrong in one
line."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from elastic.config import explain, parse

CONF = Path(__file__).resolve().parents[1] / "conf"
T = TypeVar("T")


def command(config_name: str, schema: type[T], run: Callable[[T], None]) -> None:
    """Run `run` on the configuration `conf/<config_name>.yaml` plus the command line.

    Exit code 2 and one line for anything the user can mend; HYDRA_FULL_ERROR=1 shows the traceback
    instead. Under --multirun each job gets a run directory of its own.
    """
    show_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors to us instead of printing them

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)
    def main(raw: DictConfig) -> None:
        hydra_config = HydraConfig.get()
        if hydra_config.mode == RunMode.MULTIRUN and "run_dir" in raw:
            OmegaConf.update(raw, "run_dir", hydra_config.runtime.output_dir)
        with one_line():  # here too: past this point Hydra would print a line of its own
            run(parse(raw, schema))

    @contextmanager
    def one_line() -> Iterator[None]:
        try:
            yield
        except (HydraException, OmegaConfBaseException, ValueError, FileExistsError) as error:
            if show_traceback:
                raise
            print(f"error: {explain(error)}", file=sys.stderr)
            sys.exit(2)

    with one_line():
        main()
