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


@pytest.mark.parametrize(
    ("of_bytes", "unit", "lines"),
    [
        (False, 1, ["lint: 100/1,000, 10/s, left 0:01:30", "lint: 200/1,000, 10/s, left 0:01:20"]),
        (
            True,
            1e6,
            ["lint: 100.0/1,000.0 MB, 10.0 MB/s, left 0:01:30", "lint: 200.0/1,000.0 MB, 10.0 MB/s, left 0:01:20"],
        ),
    ],
)
@pytest.mark.parametrize("by", ["advance", "update"])
def test_any_bar_is_a_line_every_ten_seconds_in_a_log(
    watch: Watch, capsys: pytest.CaptureFixture[str], of_bytes: bool, unit: float, lines: list[str], by: str
) -> None:
    with progress.progress(of_bytes) as bar:
        task = bar.add_task("lint", total=1000 * unit)
        for second in range(1, 26):
            watch.now = 100.0 + second
            if by == "advance":
                bar.advance(task, 10 * unit)
            else:
                bar.update(task, completed=10 * unit * second)
    assert capsys.readouterr().err.splitlines() == lines


def test_a_bar_without_a_total_says_what_is_done(watch: Watch, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress() as bar:
        task = bar.add_task("verify", total=None)
        watch.now += 9.9
        bar.advance(task, 1200)
        assert capsys.readouterr().err == ""
        watch.now += 0.1
        bar.advance(task, 1200)
    assert capsys.readouterr().err == "verify: 2,400, 240/s\n"


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
