"""Progress without a terminal: a line every ten seconds of a clock that the test turns."""

import pytest

from elastic.storage.progress import Progress


def test_a_line_every_ten_seconds_says_how_long_the_rest_may_take(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = [100.0]
    with Progress(4_000_000_000, "writing", clock=lambda: now[0]) as progress:
        for _ in range(40):
            now[0] += 1
            progress(50_000_000)
    captured = capsys.readouterr()
    assert captured.err == "", "a bar is for terminals"
    lines = captured.out.splitlines()
    assert len(lines) == 4
    assert lines[0] == "writing: 0.50 of 4.00 GB (12%), 50 MB/s, 70 s left"
    assert lines[3] == "writing: 2.00 of 4.00 GB (50%), 50 MB/s, 40 s left"


def test_on_a_terminal_there_is_a_bar_and_no_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    now = [0.0]
    with Progress(100, "writing", clock=lambda: now[0]) as progress:
        now[0] += 60
        progress(50)
    captured = capsys.readouterr()
    assert captured.out == "" and "writing" in captured.err
