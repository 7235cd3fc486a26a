"""Back into Slurm's queue, where the job script leaves that to the run's processes. No torch."""

import os
import subprocess

LIMIT = "REQUEUE_AT_MOST"
"""How many times; set in the job scripts of hydra/launcher=slurm, which runs the processes itself.
slurm/train.sbatch requeues its job when they have left."""


def may_requeue() -> bool:
    """Whether it is for rank 0 to requeue this job, and it has not been requeued too often."""
    limit = os.environ.get(LIMIT)
    return limit is not None and int(os.environ.get("SLURM_RESTART_COUNT") or 0) < int(limit)


def requeue() -> None:
    """Let this job start again. Slurm ends its processes then.

    Raises:
        OSError: Slurm refuses, with its reason.
    """
    environment = os.environ
    job = environment["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in environment:
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, check=False, timeout=60
        )
        answer = " ".join((done.stderr or done.stdout).split())
    except subprocess.TimeoutExpired:
        done, answer = None, "no answer within 60 s"
    if done is None or done.returncode != 0:
        raise OSError(f"job {job} cannot be requeued ({answer}); start the same command again")
