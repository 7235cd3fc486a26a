"""How the processes of a run are started, and whether they are. No torch."""

import os
import shlex
from collections.abc import Sequence

from hydra.core.hydra_config import HydraConfig

from elastic.config import ConfigError, TrainerConfig


def launched() -> bool:
    """Whether a launcher (srun with several tasks, torchrun, ourselves) has started this process as
    one of several."""
    tasks = "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1
    return "WORLD_SIZE" in os.environ or tasks


def given_settings() -> list[str]:
    """What was set on the command line of this process, one `key=value` each."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def start_command(trainer: TrainerConfig, settings: Sequence[str]) -> str:
    """The line for a shell that trains with these settings: `elastic train` where one machine is
    enough, which starts its processes itself, else sbatch, from the repository."""
    if trainer.num_nodes == 1:
        return shlex.join(["elastic", "train", *settings])
    gpus = 0 if trainer.accelerator == "cpu" else trainer.devices
    resources = f"--nodes={trainer.num_nodes} --gpus-per-node={gpus}"
    script = f"--ntasks-per-node={trainer.devices} slurm/train.sbatch"
    return f"sbatch {resources} {script} {shlex.join(_without_place(settings))}".rstrip()


def check_started(trainer: TrainerConfig) -> None:
    """Stop a run over several machines that no launcher has started.

    Raises:
        ConfigError: its message is the line to run instead.
    """
    if trainer.num_nodes == 1 or launched():
        return
    settings = given_settings()
    torchrun = (
        f"torchrun --nnodes={trainer.num_nodes} --nproc-per-node={trainer.devices} "
        f"--rdzv-backend=c10d --rdzv-endpoint=HOST:29500 train.py {shlex.join(settings)}"
    )
    raise ConfigError(
        f"trainer.num_nodes={trainer.num_nodes}: a launcher must start the processes, run "
        f"`{start_command(trainer, settings)}`, or on every node `{torchrun.rstrip()}`, or set "
        "trainer.num_nodes=1 to train on this machine alone"
    )


def _without_place(settings: Sequence[str]) -> list[str]:
    """Without what slurm/train.sbatch sets itself."""
    taken = ("trainer.num_nodes=", "trainer.devices=")
    return [setting for setting in settings if not setting.startswith(taken)]
