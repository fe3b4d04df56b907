"""Writing beside the training."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from data_shards.errors import UserError
from trainer.checkpoints.ranks import group_of_its_own
from trainer.checkpoints.staging import Buffers, stage

EXIT_SECONDS = 20.0
"""How long the end of the program waits for a write: a rank that waits for a lost one would wait for ever."""


class Background:
    """One thread that does one thing after the other while the training goes on.

    What goes wrong there is raised here, at the next call: by all ranks at the same one, so that none is left waiting.
    Writes of several ranks need a connection of their own: all ranks make this object at the same point.
    """

    def __init__(self) -> None:
        self.group = group_of_its_own()
        self._buffers = Buffers()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        _all.add(self)

    def stage(self, content: dict[str, Any]) -> dict[str, Any]:
        """Copy a checkpoint into memory that is kept for the next one, as soon as the last is written.

        Raises:
            UserError: The last went wrong.
        """
        self.wait()
        return stage(content, self._buffers)

    def submit(self, work: Callable[[], object]) -> None:
        """Start something, as soon as the last is done.

        Raises:
            UserError: The last went wrong; the new is not started.
        """
        self.wait()
        # a daemon, for a program must be able to end while a lost rank is waited for
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong, without waiting.

        With several ranks nothing is raised here: one could leave the training while another waits for it in there.

        Raises:
            UserError: The last thing submitted went wrong.
        """
        alone = not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1
        if not self.busy and alone:
            self._raise()

    def wait(self) -> None:
        """Wait until everything is done.

        Raises:
            UserError: Something went wrong.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise()

    @property
    def busy(self) -> bool:
        """Whether something is being done."""
        return self._thread is not None and self._thread.is_alive()

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:  # DCP's own are no Exceptions
            self._error = error

    def _raise(self) -> None:
        error, self._error = self._error, None
        if isinstance(error, UserError):
            raise error
        if error is not None:
            text = " ".join(str(error).split())[:300]
            raise UserError(f"a checkpoint could not be written ({type(error).__name__}: {text})") from error

    def _finish(self) -> None:
        if self._thread is not None:
            self._thread.join(EXIT_SECONDS)


_all: weakref.WeakSet[Background] = weakref.WeakSet()


@atexit.register
def _finish_all() -> None:
    for background in list(_all):
        background._finish()
