"""What goes wrong inside of a run: installed in a forked process before the command begins.

A fault is ``{"at": …, "do": …}`` with where it strikes and what happens there:

- ``{"at": "hook", "hook": "on_train_batch_end", "step": 4, "nth": 1}``: before the nth call of a hook at a step;
- ``{"at": "file", "nth": 3, "path": "/checkpoints/"}``: before the nth call that changes something in the file system
  under such a path: opening to write, renaming, linking, removing;
- ``{"at": "write", "bytes": 5000}``: in the middle of a checkpoint's file, after so many bytes of it.

``do`` is ``kill`` (-9), ``term``, ``full`` (from now on no file may grow beyond `bytes`), ``enospc`` (this and every
later opening to write fails), ``nan`` (the step's loss), ``nan gradient``, ``sleep`` (for `seconds`), or ``hold``
(until whoever watches for the file `held` has struck and removed it). What was about to happen to which file is written
to `log`.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CHANGES = ("os.rename", "os.remove", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.truncate")
_TAKES_ROOM = ("os.link", "os.symlink", "os.mkdir")


def install(fault: dict[str, Any]) -> None:
    """Lie in wait."""
    act = _action(fault)
    {"hook": _at_hook, "file": _at_file, "write": _at_write}[fault["at"]](fault, act)


def _action(fault: dict[str, Any]) -> Callable[[], None]:
    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], resource.RLIM_INFINITY))

    def enospc() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def hold() -> None:
        place = Path(fault["held"])
        place.touch()
        while place.exists():
            time.sleep(0.001)

    return {
        "hold": hold,
        "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
        "sleep": lambda: time.sleep(fault["seconds"]),
        "full": full,
        "enospc": enospc,
        "nan": _poison,
        "nan gradient": lambda: None,
    }[fault["do"]]


def _at_hook(fault: dict[str, Any], act: Callable[[], None]) -> None:
    from lightning.pytorch.trainer import call

    usual, calls = call._call_callback_hooks, 0

    def watched(trainer: Any, hook_name: str, *arguments: Any, **options: Any) -> None:
        nonlocal calls
        before = trainer.sanity_checking == fault.get("sanity", False)
        if hook_name == fault["hook"] and trainer.global_step == fault["step"] and before:
            calls += 1
            if calls == fault.get("nth", 1):
                act() if fault["do"] != "nan gradient" else _poison_gradient(trainer)
        usual(trainer, hook_name, *arguments, **options)

    call._call_callback_hooks = watched


def _at_file(fault: dict[str, Any], act: Callable[[], None]) -> None:
    calls = 0

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal calls
        if event == "open":
            mode, flags = arguments[1], arguments[2] or 0
            changes = any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool(flags & 3)
        else:
            changes = event in (_CHANGES if fault["do"] != "enospc" else _TAKES_ROOM)
        if not changes or not any(fault["path"] in str(part) for part in arguments[:2]):
            return
        calls += 1
        if calls == fault["nth"]:
            names = (Path(str(part)).name for part in arguments[:2] if isinstance(part, str | os.PathLike))
            struck = os.open(fault["log"], os.O_WRONLY | os.O_CREAT, 0o644)
            os.write(struck, f"{event.removeprefix('os.')} {' '.join(names)}".encode())
            os.close(struck)
        if calls == fault["nth"] or (calls > fault["nth"] and fault["do"] == "enospc" and event == "open"):
            act()

    sys.addaudithook(hear)


def _at_write(fault: dict[str, Any], act: Callable[[], None]) -> None:
    from trainer.checkpoints.mark import HashedFile

    usual, done = HashedFile.write, 0

    def watched(self: Any, data: Any) -> int:
        nonlocal done
        written = usual(self, data)
        done += written
        if done - written < fault["bytes"] <= done:
            self._file.flush()
            act()
        return written

    HashedFile.write = watched  # type: ignore[method-assign]


def _poison_gradient(trainer: Any) -> None:
    """Make a gradient of this rank no number."""
    from trainer.modules.optimization import own_shard

    gradients = (parameter.grad for parameter in trainer.lightning_module.parameters())
    own_shard(next(gradient for gradient in gradients if gradient is not None)).fill_(float("nan"))


def _poison() -> None:
    """Make the loss of the next batch no number."""
    from trainer.modules import MedSAMModule

    usual = MedSAMModule.training_step

    def poisoned(self: Any, batch: Any, batch_idx: int) -> Any:
        MedSAMModule.training_step = usual
        return usual(self, batch, batch_idx) * float("nan")

    MedSAMModule.training_step = poisoned
