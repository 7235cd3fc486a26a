"""Which job goes back into the queue, how often, and what is said when Slurm does not want to."""

import subprocess

import pytest

from elastic.cluster.requeue import may_requeue, requeue


@pytest.mark.parametrize(
    ("limit", "restarts", "may"),
    [(None, "0", False), ("2", None, True), ("2", "1", True), ("2", "2", False), ("0", "0", False)],
)
def test_only_so_often(
    limit: str | None, restarts: str | None, may: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("REQUEUE_AT_MOST", limit), ("SLURM_RESTART_COUNT", restarts)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert may_requeue() is may


@pytest.mark.parametrize("array", [False, True])
def test_a_refusal_is_one_line(array: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    if array:
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    job = "7_1" if array else "8"

    def refuse(command: list[str], **how: object) -> subprocess.CompletedProcess[str]:
        assert command == ["scontrol", "requeue", job]
        return subprocess.CompletedProcess(command, 1, "", "not\nnow")

    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(OSError, match=rf"job {job} cannot be requeued \(not now\)"):
        requeue()


def test_silence_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watchdog's thread, which asks, must live to end its process."""
    monkeypatch.setenv("SLURM_JOB_ID", "8")

    def wait(command: list[str], **how: object) -> None:
        raise subprocess.TimeoutExpired(command, 60)

    monkeypatch.setattr(subprocess, "run", wait)
    with pytest.raises(OSError, match="no answer within 60 s"):
        requeue()
