"""What every command does around its work: compose, parse, run, and say what is wrong in one
line."""

import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TypeVar

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from elastic.cli.overrides import addition, several, unreadable
from elastic.cluster.requeue import may_requeue, requeue
from elastic.config import ConfigError, explain, parse
from elastic.console import clear_of_bars

CONF = (Path(__file__).resolve().parents[1] / "conf").resolve()
"""The configuration files: a folder of the installed package, a link to conf/ in a checkout."""

T = TypeVar("T")


class JobError(RuntimeError):
    """A job that Slurm ran for this process has failed. The message is one line."""


def command(config_name: str, schema: type[T], run: Callable[[T], None]) -> None:
    """Run `run` on the configuration `conf/<config_name>.yaml` plus the command line.

    Exit code 2 and one line for anything the user can mend; HYDRA_FULL_ERROR=1 shows the traceback
    instead. Under --multirun each job gets a run directory of its own. Exit code 1 and one line for
    a disk, a training or a job of Slurm (hydra/launcher=slurm) that has failed. 130 at Ctrl-C. 141,
    and no line, when the reader of standard output has left: `elastic train --cfg job | head`.
    """
    show_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors to us instead of printing them
    os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")  # the one that we stop at

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)
    def main(raw: DictConfig) -> None:
        clear_of_bars()
        hydra_config = HydraConfig.get()
        if hydra_config.mode == RunMode.MULTIRUN and "run_dir" in raw:
            OmegaConf.update(raw, "run_dir", hydra_config.runtime.output_dir)
        # One line here too: past this point Hydra would print one of its own.
        with reported(), quiet_pipe(), one_line():
            run(parse(raw, schema))

    @contextmanager
    def one_line() -> Iterator[None]:
        try:
            yield
        except (HydraException, OmegaConfBaseException, ValueError, FileExistsError) as error:
            if show_traceback:
                raise
            print(f"error: {_explained(error, sys.argv[1:], schema)}", file=sys.stderr)
            sys.exit(2)
        except (OSError, FloatingPointError) as error:  # a full disk; training that diverged
            if show_traceback or _reader_left():
                raise
            print(f"error: {explain(error)}", file=sys.stderr)
            sys.exit(1)
        except RuntimeError as error:
            if show_traceback or not _of_launcher(error):
                raise
            print(f"error: {' '.join(str(error).split())[:500]}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:  # Ctrl-C; a run's own steps have saved and said so
            if show_traceback:
                raise
            print("\ninterrupted", file=sys.stderr)
            sys.exit(130)

    with quiet_pipe(), one_line():
        sys.argv[1:] = arranged(sys.argv[1:])
        main()


def arranged(arguments: list[str]) -> list[str]:
    """Settings first, options after them: Hydra refuses settings on both sides of an option."""
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    read, rest = parser.parse_known_args(arguments)
    for option in rest:
        if option.startswith("-"):
            raise ConfigError(f"{option}: no such option; --help and --hydra-help list them")
    settings = [*read.overrides, *rest]
    options = list(arguments)
    for setting in settings:
        options.remove(setting)
    settings.sort(key=arguments.index)  # of two settings of one key the later one counts
    return settings + options


def _refuse(message: str) -> NoReturn:
    raise ConfigError(f"{message}; --help and --hydra-help list the options")


@contextmanager
def quiet_pipe() -> Iterator[None]:
    """Exit quietly, with exit code 141, when standard output is a pipe without a reader."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_left():
            raise  # another pipe: that is an error
        # What is still in the buffer must not fail again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def _reader_left() -> bool:
    """Whether standard output is a pipe whose reader has gone."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # no file at all
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


@contextmanager
def reported() -> Iterator[None]:
    """Let a job of submitit fail with an error: of one that exits, the waiting side learns nothing.

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


def _explained(error: BaseException, arguments: list[str], schema: type) -> str:
    """One line for what is wrong, and what to do about it."""
    if isinstance(error, OverrideParseException):
        place = arguments.index(error.override) if error.override in arguments else 0
        return unreadable(error.override, arguments[place - 1] if place else "")
    if isinstance(error, HydraException):
        ambiguous = re.match(r"Ambiguous value for argument '(.*)'$", str(error), re.MULTILINE)
        if ambiguous is not None:
            return several(ambiguous[1])
        if "submitit" in str(error):
            return f"{explain(error)} It is a plugin: pip install hydra-submitit-launcher"
    line = explain(error)
    key, unknown, _ = line.partition(": unknown")
    return line + (addition(key, arguments, schema) if unknown else "")


def _of_launcher(error: BaseException) -> bool:
    """Whether submitit has raised this, or a job that it ran."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))
    return isinstance(error, JobError) or module.startswith("submitit.")
