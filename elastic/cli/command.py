"""What every command does around its work: compose, parse, run, and say what is wrong in one
line."""

import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn, TypeVar

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from elastic.cli.overrides import added_twice, addition, at_default, several, unreadable
from elastic.cluster.requeue import may_requeue, requeue
from elastic.config import CONF, ConfigError, explain, parse
from elastic.console import clear_of_bars, keep_going, lost

T = TypeVar("T")


class JobError(RuntimeError):
    """A job that Slurm ran for this process has failed. The message is one line."""


def command(
    config_name: str, schema: type[T], run: Callable[[T], None], printed_only: bool = False
) -> None:
    """Run `run` on the configuration `conf/<config_name>.yaml` plus the command line.

    Exit code 2 and one line for anything the user can mend; HYDRA_FULL_ERROR=1 shows the traceback
    instead. Under --multirun each job gets a run directory of its own. Exit code 1 and one line for
    a disk, a training or a job of Slurm (hydra/launcher=slurm) that has failed.
    130 at Ctrl-C, 143 at SIGTERM. 141, and no line, when the reader of standard output has left and
    that was all there was to do: `elastic train --cfg job | head`.
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
            if not printed_only:
                _worked.append(config_name)

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
            if show_traceback:
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

    _end_at(signal.SIGTERM)
    with quiet_pipe(), one_line():
        sys.argv[1:] = arranged(sys.argv[1:])
        main()


def _end_at(number: signal.Signals) -> None:
    """Leave at a signal as at an error: what is half written is removed on the way.

    A run's own handlers take its place while it trains (cluster/signals.py).
    """

    def leave(received: int, frame: FrameType | None) -> None:
        signal.signal(received, signal.SIG_IGN)  # a second one must not stop the removal
        print(f"\nended by {signal.Signals(received).name}", file=sys.stderr)
        sys.exit(128 + received)

    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(number) is signal.SIG_DFL:
        signal.signal(number, leave)


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
    """No write to standard output or error fails in the block.

    Where standard output has lost its reader, what was only to be read ends with exit code 141, as
    a shell shows it for SIGPIPE. What has written a result has done its work all the same.
    """
    keep_going()
    yield
    sys.stdout.flush()
    reason = lost(1)
    if reason is None or _worked:
        return
    if reason == errno.EPIPE:
        sys.exit(128 + signal.SIGPIPE)
    if reason != errno.EBADF:  # else it was closed on purpose
        print(f"error: standard output: {os.strerror(reason)}", file=sys.stderr)
        sys.exit(1)


_worked: list[str] = []
"""Commands that have left a result of their own in this process."""


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
    line = added_twice(explain(error), arguments) or explain(error)
    key, unknown, _ = line.partition(": unknown")
    if not unknown:
        return line
    return at_default(key, arguments, schema) or line + addition(key, arguments, schema)


def _of_launcher(error: BaseException) -> bool:
    """Whether submitit has raised this, or a job that it ran."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))
    return isinstance(error, JobError) or module.startswith("submitit.")
