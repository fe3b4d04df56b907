"""Ranks that Lightning's launcher started from one another: when one is gone, the others end too, with one line."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time

from lightning.pytorch import Trainer

from trainer.run import STOPPED

_PARENT = "SAM_TRAINER_FIRST_RANK"
"""Environment variable with the process that started the other ranks."""
_POLL = 0.5
_PATIENCE = 5.0
"""Seconds in which a rank that lost another one may find out by itself: it knows more."""
_PATIENCE_AT_THE_END = 30.0
"""The same where the first rank is gone: it may just have finished first."""


class RankWatch(threading.Thread):
    """Watches the processes of the other ranks while a command runs; to be used in a ``with`` statement.

    A rank that waits on a device for one that was killed hears nothing of it for minutes, and what started it would be
    gone. Lightning's own watch over the ranks that it starts kills them all without a word, the first one too, also
    where that is still writing what a signal told it to save. Ranks that come from elsewhere (torchrun, srun) are
    watched there.

    Args:
        trainer: The trainer, about to run.
        advice: How the run goes on, put at the end of the line.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(daemon=True, name="rank-watch")
        self._trainer = trainer
        self._over = threading.Event()
        child = int(os.environ.get("LOCAL_RANK") or 0) > 0 and os.environ.get(_PARENT) == str(os.getppid())
        self._parent = os.getppid() if child else None
        if not child:
            os.environ[_PARENT] = str(os.getpid())

    def __enter__(self) -> RankWatch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def run(self) -> None:
        """Look now and then; end this process if it does not end by itself once another rank is gone."""
        while not self._over.wait(_POLL):
            self._send_lightning_away()
            lost = self.lost()
            if lost is None:
                continue
            if not self._over.wait(_PATIENCE if self._parent is None else _PATIENCE_AT_THE_END):
                if not self.explained():
                    os.write(2, f"trainer: error: {lost}; then start it again, with --ckpt_path last\n".encode())
                self.end()
                os._exit(2)
            return

    def lost(self) -> str | None:
        """Which rank is gone, and how, in a few words; None while all are there."""
        if self._parent is not None:
            return "rank 0 is gone: see what its machine says" if os.getppid() != self._parent else None
        for number, process in enumerate(self._others(), start=1):
            code = process.poll()
            if code not in (None, 0, STOPPED):
                how = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
                return f"rank {number} {how}: see what its machine says"
        return None

    def explained(self) -> bool:
        """Whether a rank that was started from here ended with a line that says why."""
        return any(process.poll() == 2 for process in self._others())

    def wait_for_loss(self, seconds: float = 2.0) -> str | None:
        """What `lost` says as soon as it does: the system knows a little later than the connections to that rank."""
        end = time.monotonic() + seconds
        while (found := self.lost()) is None and time.monotonic() < end and (self._others() or self._parent):
            time.sleep(0.05)
        return found

    def end(self, patience: float = 0.0) -> None:
        """End the ranks that were started from here, at last by force.

        Args:
            patience: Seconds in which they may end by themselves.
        """
        end = time.monotonic() + patience
        for process in self._others():
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()

    def _others(self) -> list[subprocess.Popen[bytes]]:
        processes = getattr(self._trainer.strategy.launcher, "procs", [])
        return [process for process in processes if isinstance(process, subprocess.Popen)]

    @staticmethod
    def _send_lightning_away() -> None:
        for thread in threading.enumerate():
            if thread.name == "child-process-observer":
                thread._child_processes = []  # type: ignore[attr-defined]  # with nothing to watch, it ends


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
