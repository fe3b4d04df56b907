"""What ends a run from outside, each as one line that says how to go on: a full disk, a lost rank, a signal."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from data_shards.errors import UserError
from trainer.callbacks.heartbeat import heartbeat_of
from trainer.callbacks.stopping import signal_that_stopped
from trainer.callbacks.watch import RankWatch
from trainer.checkpoints import step_in_name
from trainer.run import STOPPED, Run

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXT = re.compile(r"No space left on device|Disk quota exceeded|File too large")
_PATIENCE = 60.0
"""Seconds in which the other ranks end after a signal, before they are ended."""
_LOST = re.compile(
    r"Connection (?:closed|reset|refused)(?: by peer)?|Broken pipe|Socket Timeout|Timed out waiting|NCCL error|"
    r"(?:collective|operation) time(?:d )?out|ncclRemoteError|failed to recv|remote process (?:exited|has failed)|"
    r"(?<=/)gloo/transport(?!.*(?:Connection|Broken|Timed))"
)
"""What gloo, NCCL and c10d say when another rank is gone; they have no class of error for it."""
_GONE = "another rank is gone"
"""What `trainer.checkpoints` says then."""


def ending(error: BaseException, trainer: Trainer, ranks: RankWatch, *, fitting: bool) -> BaseException:
    """What a command ends with in the place of an error: a line where it came from outside, else the error itself.

    Ranks that were started from here have ended after this.

    Args:
        error: What was raised.
        trainer: The trainer that was at it.
        ranks: The other ranks.
        fitting: Whether it was a fit: there is something to go on from.

    Returns:
        A `UserError`, an exit with a code where a line was printed already, or the error.
    """
    run = Run(trainer.default_root_dir)
    if isinstance(error, SIGTERMException):
        ranks.end(_PATIENCE)
        step = trainer.global_step
        say(f"stopped by {signal_that_stopped(trainer)} at step {step}: {how_to_go_on(run, step)}")
        return SystemExit(STOPPED)
    said = lost_rank(error) if trainer.world_size > 1 else None
    gone = _lost_ranks(trainer, ranks) if said else None
    ranks.end()
    if gone and ranks.explained():
        return SystemExit(2)  # that rank has said why it ended
    if isinstance(error, SystemExit) and trainer.interrupted:  # so Lightning ends after Ctrl-C, and says nothing
        if fitting:
            say(f"stopped at step {trainer.global_step}; {how_to_go_on(run)}")
        return KeyboardInterrupt()
    if isinstance(error, torch.OutOfMemoryError):
        return UserError(_out_of_memory(trainer))
    if isinstance(error, MisconfigurationException):
        return UserError(str(error))
    vanished = _vanished(error, run) if fitting and trainer.global_step else None
    if vanished is not None:
        return UserError(f"{vanished} was moved or removed under the run: put it back, then --ckpt_path last goes on")
    if isinstance(error, UserError) and not said:
        full = fitting and _FULL_TEXT.search(str(error))
        return UserError(f"{error}; then {how_to_go_on(run)}") if full else error
    line = _lost(trainer, said, gone) or _full_disk(error, run) or _not_written(error, run)
    if line is None:
        return error
    return UserError(f"{line}; then {how_to_go_on(run)}" if fitting else f"{line}; then start it again")


def how_to_go_on(run: Run, step: int | None = None) -> str:
    """Say how a run goes on, and from which step where that is not a given one."""
    last = run.newest_checkpoint()
    if last is None:
        return "start it again: no checkpoint was saved yet"
    saved = step_in_name(last.resolve())
    if saved == step:
        return "--ckpt_path last goes on"
    return "--ckpt_path last goes on from the last checkpoint" + (f", of step {saved}" if saved >= 0 else "")


def say(line: str) -> None:
    """Print a line, once for all ranks."""
    if rank_zero_only.rank == 0:
        print(line, flush=True)


def lost_rank(error: BaseException) -> str | None:
    """What an error says of another rank that is gone; None if it is about something else."""
    if isinstance(error, UserError):  # what was told already, but for the checkpoints' own word
        return _GONE if _GONE in str(error) else None
    found = (_LOST.search(str(cause)) for cause in _causes(error) if isinstance(cause, RuntimeError))
    return next((match.group() for match in found if match), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from, the first of them last."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _full_disk(error: BaseException, run: Run) -> str | None:
    for cause in _causes(error):
        named = cause.filename if isinstance(cause, OSError) and cause.errno in _FULL else None
        found = _FULL_TEXT.search(str(cause))
        if found and (named is not None or isinstance(cause, OSError | RuntimeError)):
            place = Path(named or run.root)
            what = place if named else f"in {place}"
            free = f"{shutil.disk_usage(_there(place)).free:,} bytes free"
            return f"cannot write {what} ({found.group()}, {free}): make room"
    return None


def _vanished(error: BaseException, run: Run) -> Path | None:
    """The folder of a training run that is not there any more, if an error is about a file in it."""
    text = " ".join(map(str, _causes(error)))
    lost = [
        folder for folder, sign in ((run.root, run.recipe), (run.checkpoints, run.checkpoints)) if not sign.exists()
    ]
    return next((folder for folder in lost if f"{folder}/" in text), None)


def _not_written(error: BaseException, run: Run) -> str | None:
    """A file of the run that cannot be written for any other reason."""
    for cause in _causes(error):
        if isinstance(cause, PermissionError) or not isinstance(cause, OSError) or not isinstance(cause.filename, str):
            continue
        if run.root.absolute() in Path(cause.filename).absolute().parents:
            return f"cannot write {cause.filename} ({cause.strerror}): mend that"
    return None


def _lost(trainer: Trainer, said: str | None, gone: str | None) -> str | None:
    if said is None:
        return None
    who = gone or "see what that one or its machine says"
    return f"rank {trainer.global_rank} lost another rank at step {trainer.global_step} ({said}): {who}"


def _lost_ranks(trainer: Trainer, ranks: RankWatch) -> str | None:
    """Which ranks are gone, as those say that were started from here, or else the heartbeats; this rank leaves."""
    heartbeat = heartbeat_of(trainer)
    gone = ranks.wait_for_loss()
    if heartbeat is not None:
        gone = gone or heartbeat.lost()
        heartbeat.leave()
    return gone


def _there(path: Path) -> Path:
    """The nearest folder above that is there."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _out_of_memory(trainer: Trainer) -> str:
    size = getattr(trainer.datamodule, "micro_batch_size", 1)
    lower = f"lower data.init_args.micro_batch_size (now {size}; a step stays the same) or the"
    how = f"{lower if size > 1 else 'lower the'} model's image_size, in another trainer.default_root_dir"
    return f"out of GPU memory: {how}"
