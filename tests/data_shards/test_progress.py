from __future__ import annotations

import io

import pytest

from data_shards import progress
from data_shards.progress import Meter, clock


class Watch:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    found = Watch()
    monkeypatch.setattr(progress, "time", found)
    return found


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_every_ten_seconds(watch: Watch, capsys: pytest.CaptureFixture[str]) -> None:
    with Meter(40, 1000) as meter:
        for second in range(61):
            watch.now = 100.0 + second
            meter.show(second // 5, second * 10, second * 57)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    assert lines[0] == "2/40 blocks, 570 slices, 57/s, left 0:01:30"
    assert lines[-1] == "12/40 blocks, 3,420 slices, 57/s, left 0:00:40"


def test_a_quick_build_says_nothing(watch: Watch, capsys: pytest.CaptureFixture[str]) -> None:
    with Meter(1, 0) as meter:
        meter.show(0, 0, 1)
        watch.now += 9
        meter.show(1, 0, 2)
    assert capsys.readouterr().err == ""
    assert (meter.slices, meter.seconds) == (2, 9)


def test_nothing_done_has_no_time_left(watch: Watch) -> None:
    meter = Meter(3, 100)
    watch.now += 5
    assert meter.line(0) == "0/3 blocks, 0 slices, 0/s"


def test_who_watches_sees_a_bar(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with Meter(4, 200) as meter:
        watch.now += 10
        meter.show(2, 100, 30)
    shown = screen.getvalue()
    assert "2/4 blocks, 30 slices, 3/s, left 0:00:10" in shown and "50%" in shown


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00:00"), (92, "0:01:32"), (3599.6, "1:00:00"), (90061, "25:01:01")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
