"""What ends a run from outside is one line; the rest is left alone."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from data_shards.errors import UserError
from trainer.callbacks import watch
from trainer.callbacks.breakdown import ending
from trainer.run import Run, naming


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with a checkpoint of step 40."""
    made = Run(tmp_path / "run")
    made.checkpoints.mkdir(parents=True)
    made.recipe.touch()
    (made.checkpoints / "step-000040.ckpt").touch()
    (made.checkpoints / "last.ckpt").symlink_to("step-000040.ckpt")
    return made


def ended(error: BaseException, run: Run, ranks: int = 1, fitting: bool = True, **values: Any) -> BaseException:
    launcher = SimpleNamespace(procs=[])
    trainer: Any = SimpleNamespace(
        default_root_dir=str(run.root), world_size=ranks, global_rank=1, global_step=43, interrupted=False,
        callbacks=[], datamodule=None, strategy=SimpleNamespace(launcher=launcher), **values,
    )  # fmt: skip
    return ending(error, trainer, watch.RankWatch(trainer), fitting=fitting)


def line(error: BaseException, run: Run, **values: Any) -> str:
    told = ended(error, run, **values)
    assert isinstance(told, UserError) and "\n" not in str(told)
    return str(told).replace(str(run.root), "RUN")


GO_ON = "--ckpt_path last goes on from the last checkpoint, of step 40"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_names_the_file_and_the_last_checkpoint(number: int, run: Run) -> None:
    try:
        with naming(run.trace):
            raise OSError(number, os.strerror(number))
    except OSError as error:
        said = line(error, run)
    assert said.startswith(f"cannot write RUN/trace.csv ({os.strerror(number)}, ")
    assert said.endswith(f" bytes free): make room; then {GO_ON}")
    hidden = RuntimeError("unable to write")
    hidden.__context__ = OSError(number, os.strerror(number))
    assert line(hidden, run).startswith(f"cannot write in RUN ({os.strerror(number)}")
    assert line(UserError(f"checkpoint x: cannot be written ({os.strerror(number)})"), run).endswith(GO_ON)
    assert line(OSError(number, os.strerror(number)), run, fitting=False).endswith("make room; then start it again")


def test_a_lost_rank_is_told_by_the_one_that_noticed(run: Run) -> None:
    gloo = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:1")
    said = line(gloo, run, ranks=2)
    assert said.startswith("rank 1 lost another rank at step 43 (Connection closed by peer): see what that one or")
    assert said.endswith(GO_ON)
    nccl = torch.distributed.DistBackendError(
        "NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited or has failed"
    )
    assert "lost another rank at step 43 (NCCL error)" in line(nccl, run, ranks=2)
    own = UserError("a checkpoint was broken off: another rank is gone")
    assert "lost another rank at step 43 (another rank is gone)" in line(own, run, ranks=2)
    assert ended(gloo, run, ranks=1) is gloo, "there is no other rank"


def test_a_vanished_folder_is_named(run: Run) -> None:
    missing = FileNotFoundError(errno.ENOENT, "No such file or directory", str(run.trace))
    assert line(missing, run).startswith("cannot write RUN/trace.csv (No such file or directory): mend that; then ")
    run.recipe.unlink()
    assert line(missing, run) == "RUN was moved or removed under the run: put it back, then --ckpt_path last goes on"
    other = FileNotFoundError(errno.ENOENT, "No such file or directory", "/elsewhere/x")
    assert ended(other, run) is other


def test_what_is_no_ending_from_outside_stays_as_it_is(run: Run) -> None:
    for error in (ValueError("a bug"), UserError("a mistake"), SystemExit(3), KeyboardInterrupt(), RuntimeError("bug")):
        assert ended(error, run, ranks=2) is error
    assert line(MisconfigurationException("no"), run) == "no"
    assert line(torch.OutOfMemoryError("CUDA"), run).startswith("out of GPU memory: lower the model's image_size")


def test_signals_end_with_a_line_and_a_code(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    told = ended(SIGTERMException(), run)
    assert isinstance(told, SystemExit) and told.code == 143
    assert capsys.readouterr().out == f"stopped by SIGTERM at step 43: {GO_ON}\n"
    (run.checkpoints / "last.ckpt").unlink()
    (run.checkpoints / "step-000040.ckpt").rename(run.checkpoints / "step-000043.ckpt")
    ended(SIGTERMException(), run)
    assert capsys.readouterr().out == "stopped by SIGTERM at step 43: --ckpt_path last goes on\n"
    (run.checkpoints / "step-000043.ckpt").unlink()
    ended(SIGTERMException(), run)
    assert capsys.readouterr().out == "stopped by SIGTERM at step 43: start it again: no checkpoint was saved yet\n"


def stuck(child: str, seconds: float) -> None:
    """Wait in one rank for another, as on a device, which does not hear that the other is gone."""
    watch._PATIENCE = 0.3
    process = subprocess.Popen([sys.executable, "-S", "-c", child])
    observer: Any = threading.Thread(target=time.sleep, args=(60,), name="child-process-observer", daemon=True)
    observer._child_processes = [process]
    observer.start()
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(launcher=SimpleNamespace(procs=[process])))
    with watch.RankWatch(trainer):
        while observer._child_processes:  # Lightning's own is sent away: it would end all without a word
            time.sleep(0.01)
        time.sleep(seconds)


@pytest.mark.parametrize(
    ("child", "code", "said"),
    [
        ("import os; os.kill(os.getpid(), 9)", 2, "rank 1 was killed by SIGKILL: see what its machine says"),
        ("raise SystemExit(3)", 2, "rank 1 ended with exit code 3: see what its machine says"),
        ("raise SystemExit(2)", 2, ""),  # it has said why
        ("raise SystemExit(143)", 0, ""),  # stopped by a signal, as this one will be
    ],
)
def test_a_rank_that_waits_for_ever_for_one_that_is_gone_is_ended(
    child: str, code: int, said: str, tmp_path: Path
) -> None:
    fork = os.fork()
    if fork == 0:
        os.dup2(os.open(tmp_path / "said", os.O_WRONLY | os.O_CREAT), 2)
        with contextlib.suppress(BaseException):
            stuck(child, 60 if code else 2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) == code
    lines = (tmp_path / "said").read_text().splitlines()
    assert lines == ([f"trainer: error: {said}; then start it again, with --ckpt_path last"] if said else [])
