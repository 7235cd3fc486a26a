"""What every command does around its work: compose, parse, run, and say what is wrong in one
line."""

import os
import re
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

from elastic.cluster.requeue import may_requeue, requeue
from elastic.config import explain, parse
from elastic.console import clear_of_bars

CONF = Path(__file__).resolve().parents[2] / "conf"
T = TypeVar("T")


class JobError(RuntimeError):
    """A job that Slurm ran for this process has failed. The message is one line."""


def command(config_name: str, schema: type[T], run: Callable[[T], None]) -> None:
    """Run `run` on the configuration `conf/<config_name>.yaml` plus the command line.

    Exit code 2 and one line for anything the user can mend; HYDRA_FULL_ERROR=1 shows the traceback
    instead. Under --multirun each job gets a run directory of its own. Exit code 1 and one line for
    a disk, a training or a job of Slurm (hydra/launcher=slurm) that has failed.
    """
    show_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors to us instead of printing them
    sys.argv[1:] = [addressable(argument) for argument in sys.argv[1:]]
    os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")  # the one that we stop at

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)
    def main(raw: DictConfig) -> None:
        clear_of_bars()
        hydra_config = HydraConfig.get()
        if hydra_config.mode == RunMode.MULTIRUN and "run_dir" in raw:
            OmegaConf.update(raw, "run_dir", hydra_config.runtime.output_dir)
        # One line here too: past this point Hydra would print one of its own.
        with reported(), one_line():
            run(parse(raw, schema))

    @contextmanager
    def one_line() -> Iterator[None]:
        try:
            yield
        except (HydraException, OmegaConfBaseException, ValueError, FileExistsError) as error:
            if show_traceback:
                raise
            print(f"error: {explain(error)}{_way_out(error)}", file=sys.stderr)
            sys.exit(2)
        except (OSError, FloatingPointError) as error:  # a full disk; training that diverged
            if show_traceback:
                raise
            print(f"error: {explain(error)}", file=sys.stderr)
            sys.exit(1)
        except RuntimeError as error:
            if show_traceback or not _of_launcher(error):
                raise
            print(f"error: {' '.join(str(error).split())[:500]}", file=sys.stderr)
            sys.exit(1)

    with one_line():
        main()


_DIGIT_KEY = re.compile(
    r"(\+{0,2}[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)\.(\d\w*(?:\.\w+)*)=(.*)", re.DOTALL
)


def addressable(argument: str) -> str:
    """`budgets.6b.params=X` in a form that Hydra reads: `budgets={6b:{params:X}}`.

    Its keys cannot begin with a digit, but those of a mapping can, and mappings are merged.
    """
    match = _DIGIT_KEY.fullmatch(argument)
    if match is None:
        return argument
    outer, inner, value = match.groups()
    for key in reversed(inner.split(".")):
        value = f"{{{key}:{value}}}"
    return f"{outer}={value}"


@contextmanager
def reported() -> Iterator[None]:
    """Let a job of submitit fail with an error: of one that exits, nobody who waits would hear.

    One that a signal has stopped goes back into the queue.
    """
    try:
        yield
    except SystemExit as stop:
        requeued = stop.code == -1  # submitit's own way out
        if "SUBMITIT_EXECUTOR" not in os.environ or requeued or not stop.code:
            raise
        from submitit import JobEnvironment

        job = JobEnvironment()
        if stop.code == 75 and may_requeue():
            if job.global_rank != 0:
                sys.exit(0)  # a bad exit code would end rank 0 before it has asked
            requeue()
            sys.exit(-1)
        log = job.paths.stdout
        raise JobError(f"a job ended with exit code {stop.code}; its log is {log}") from None


def _way_out(error: BaseException) -> str:
    """What to do about a launcher that is not installed."""
    missing = isinstance(error, HydraException) and "submitit" in str(error)
    return " It is a plugin: pip install hydra-submitit-launcher" if missing else ""


def _of_launcher(error: BaseException) -> bool:
    """Whether submitit has raised this, or a job that it ran."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))
    return isinstance(error, JobError) or module.startswith("submitit.")
