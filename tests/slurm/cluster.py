"""A real Slurm on this machine: one node of four pretended cores and GPUs, in a folder of its own.

Own key, own ports, own sockets and own state: a Slurm that the machine belongs to is not touched.
"""

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

CONF = """
ClusterName=elastic
SlurmctldHost=localhost
SlurmctldPort={slurmctld_port}
SlurmdPort={slurmd_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits until its old credential has run out.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,batch_sched_delay=1
KillWait=5
ReturnToService=2
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=localhost CPUs=4 Gres=gpu:4
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


class Cluster:
    """A running cluster, as its user sees it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        theirs = ("SLURM", "SBATCH", "SRUN", "SCANCEL", "SQUEUE")
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(theirs)},
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        self.logs: dict[str, Path] = {}

    def run(self, *command: str | Path, check: bool = True) -> str:
        """A client command's output."""
        result = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False, timeout=60
        )
        if check and result.returncode != 0:
            raise RuntimeError(f"{' '.join(map(str, command))}: {result.stderr.strip()}")
        return result.stdout.strip()

    def submit(self, script: str, *arguments: str | Path, options: list[str], log: Path) -> str:
        """Job id of `sbatch options script arguments`."""
        job = self.run("sbatch", "--parsable", f"--output={log}", *options, script, *arguments)
        self.logs[job] = log
        return job

    def show(self, job: str) -> dict[str, str]:
        """What scontrol says of a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, state: str, timeout: float) -> dict[str, str]:
        """Wait until a job is in `state`; if it has failed or is late, its log says why."""
        end = time.monotonic() + timeout
        while (shown := self.show(job))["JobState"] != state:
            if shown["JobState"] in ENDED or time.monotonic() > end:
                number, _, task = job.partition("_")
                log = Path(str(self.logs[number]).replace("%a", task))
                said = log.read_text()[-5000:] if log.is_file() else ""
                raise RuntimeError(f"job {job} is {shown['JobState']}, not {state}:\n{said}")
            time.sleep(0.5)
        return shown

    def report(self) -> str:
        """All that may say why something does not end."""
        jobs = [
            self.run(*words, check=False) for words in (["squeue"], ["scontrol", "show", "job"])
        ]
        logs = [self.folder / f"{name}.log" for name in ("slurmctld", "slurmd")]
        processes = subprocess.run(["ps", "axf"], capture_output=True, text=True, check=False)
        return "\n".join([*jobs, *(log.read_text()[-3000:] for log in logs), processes.stdout])

    def empty(self) -> None:
        """Cancel what still runs, and wait until it is gone."""
        end = time.monotonic() + 30
        while jobs := self.run("squeue", "--noheader", "--format=%i", check=False).split():
            self.run("scancel", "--full", "--signal=KILL", *jobs, check=False)
            self.run("scancel", *jobs, check=False)
            if time.monotonic() > end:
                return
            time.sleep(1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _daemon(name: str, *arguments: str, log: Path, environment: dict[str, str]) -> Iterator[None]:
    """A daemon in the foreground, away from the terminal's Ctrl-C, so that it outlives its jobs."""
    program = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    assert program is not None, name
    with log.open("w") as output:
        process = subprocess.Popen(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
    try:
        time.sleep(0.5)
        if process.poll() is not None:
            raise RuntimeError(f"{name} does not start: {log.read_text()[-2000:]}")
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Start the daemons, wait for the node, and take everything away again, whatever happens."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="elastic-slurm-")))
        folder.chmod(0o755)
        for name in ("state", "spool"):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        settings = CONF.format(
            folder=folder,
            user=pwd.getpwuid(os.getuid()).pw_name,
            slurmctld_port=_free_port(),
            slurmd_port=_free_port(),
        )
        (folder / "slurm.conf").write_text(settings)
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-3]\n")
        for index in range(4):
            (folder / f"gpu{index}").touch()
        made = Cluster(folder)
        munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        munge += [f"--socket={folder}/munge.socket", "--foreground", "--force"]
        for name, arguments in {
            "munged": munge,
            "slurmctld": ["-D"],
            "slurmd": ["-D", "-N", "localhost"],
        }.items():
            log = folder / f"{name}.log"
            stack.enter_context(_daemon(name, *arguments, log=log, environment=made.environment))
        stack.callback(made.empty)
        end = time.monotonic() + 60
        while made.run("sinfo", "--noheader", "--format=%T", check=False) != "idle":
            if time.monotonic() > end:
                raise TimeoutError(f"no node: {(folder / 'slurmd.log').read_text()[-2000:]}")
            time.sleep(0.5)
        yield made
