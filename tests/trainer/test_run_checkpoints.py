"""A run's checkpoints: what is kept, when it is written, what is refused, and what a failure of the disk ends with."""

from __future__ import annotations

import io
import json
import shutil
import struct
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

import trainer.callbacks.checkpoint as saving
import trainer.resuming as resuming
from data_shards.errors import UserError
from trainer.callbacks import RunCheckpoint
from trainer.callbacks.retention import Clock
from trainer.callbacks.writing import are_finite
from trainer.checkpoints import is_complete, verify
from trainer.restore import find_checkpoint, restore
from trainer.resuming import CheckpointFiles, refuse_another_recipe, warn_of_other_code
from trainer.run import Run
from trainer.version import CODE, code, code_changes

Command = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.filterwarnings("ignore")


class Line(LightningModule):
    """A layer whose gradient is the same at every step, and whose metric is as it is told."""

    def __init__(self, scores: dict[int, float] | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1, bias=False)
        nn.init.zeros_(self.layer.weight)
        self.scores = scores or {}
        self.bad_steps = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/dsc", torch.tensor(self.scores[self.trainer.global_step]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class At(Callback):
    """Does something at the end of some steps, before checkpoints are saved."""

    def __init__(self, what: Callable[[Trainer, Any, int], object]) -> None:
        self.what = what

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.what(trainer, pl_module, trainer.global_step)


def fit(
    folder: Path,
    saver: RunCheckpoint,
    *callbacks: Callback,
    steps: int = 6,
    scores: dict[int, float] | None = None,
    resume: Path | None = None,
    **arguments: Any,
) -> Line:
    module = Line(scores)
    trainer = Trainer(
        **{"accelerator": "cpu", "devices": 1, "max_steps": steps, "num_sanity_val_steps": 0, **arguments},
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[saver, *callbacks],
        plugins=[CheckpointFiles()],
    )
    batches: Any = torch.ones(20, 2)
    loaders = [torch.utils.data.DataLoader(batches, batch_size=None)]
    if scores:
        loaders.append(torch.utils.data.DataLoader(batches[:1], batch_size=None))
        trainer.val_check_interval = 1
    trainer.fit(module, *loaders, ckpt_path=None if resume is None else str(resume), weights_only=True)
    return module


def saver(folder: Path, every: int = 1, **arguments: Any) -> RunCheckpoint:
    return RunCheckpoint(every, dirpath=str(folder / "checkpoints"), **arguments)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("*.ckpt"))


def content(folder: Path, name: str = "last") -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / f"checkpoints/{name}.ckpt", weights_only=True)
    return found


def step_names(*steps: int) -> list[str]:
    return [*(["last.ckpt"] if steps else []), *(f"step-{step:06d}.ckpt" for step in steps)]


def test_the_newest_are_kept_and_last_is_a_link_to_the_newest(tmp_path: Path) -> None:
    fit(tmp_path, saver(tmp_path, 2), steps=7)
    assert names(tmp_path) == step_names(6, 7)
    last = tmp_path / "checkpoints/last.ckpt"
    assert last.is_symlink() and last.readlink() == Path("step-000007.ckpt"), "relative: a run can be moved"
    assert content(tmp_path)["global_step"] == 7 and content(tmp_path, "step-000006")["global_step"] == 6
    assert all(is_complete(tmp_path / "checkpoints" / name) for name in names(tmp_path))
    others = {path.name for path in (tmp_path / "checkpoints").iterdir()} - set(names(tmp_path))
    assert others == {"step-000006.ckpt.json", "step-000007.ckpt.json"}, "marks alone"


def test_one_in_so_many_hours_is_kept_for_good_over_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps take 1,000 s: at 4,000 s the first hour is over, at 8,000 s the second."""
    now = [50.0]
    monkeypatch.setattr("trainer.callbacks.retention.time.monotonic", lambda: now[0])

    def pass_time(trainer: Trainer, module: Any, step: int) -> None:
        now[0] += 1000

    def kept() -> RunCheckpoint:
        return saver(tmp_path, keep_last=1, every_n_hours=1)

    fit(tmp_path, kept(), At(pass_time), steps=5)
    assert names(tmp_path) == step_names(4, 5)
    now[0] = 7.0  # another process, and hours later: only training counts
    fit(tmp_path, kept(), At(pass_time), steps=9, resume=tmp_path / "checkpoints/last.ckpt")
    assert names(tmp_path) == step_names(4, 8, 9)


def test_the_clock_keeps_by_the_hour() -> None:
    clock = Clock(None)
    clock.keep("any")
    assert clock.kept == []
    for hours in (0, -1.0):
        with pytest.raises(UserError, match=r"checkpoint\.every_n_hours is above 0"):
            RunCheckpoint(every_n_hours=hours)
    with pytest.raises(UserError, match=r"checkpoint\.keep_last is 1 or more, not 0"):
        RunCheckpoint(keep_last=0)


def test_nothing_is_removed_before_the_newer_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[list[str]] = []

    def watched(*arguments: Any, **options: Any) -> None:
        there.append([name for name in names(tmp_path) if is_complete(tmp_path / "checkpoints" / name)])
        write(*arguments, **options)

    write = saving.write
    monkeypatch.setattr(saving, "write", watched)
    scores = {1: 0.1, 2: 0.3, 3: 0.2, 4: 0.4}
    fit(tmp_path, saver(tmp_path, monitor="val/dsc", keep_last=1), steps=4, scores=scores)
    before = [[name for name in one if name != "last.ckpt"] for one in there]
    one, two, three = (f"step-{step:06d}.ckpt" for step in (1, 2, 3))
    assert before == [[], ["best-000001.ckpt", one], ["best-000002.ckpt", two], ["best-000002.ckpt", three]]
    assert names(tmp_path) == ["best-000004.ckpt", *step_names(4)]


def test_the_best_of_a_steps_moment_is_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    write = saving.write

    def counted(staged: dict[str, Any], path: Path, **options: Any) -> None:
        written.append(path.name)
        write(staged, path, **options)

    monkeypatch.setattr(saving, "write", counted)
    scores = {1: 0.5, 2: 0.6, 3: 0.1, 4: 0.55}
    fit(tmp_path, saver(tmp_path, 2, monitor="val/dsc", keep=2), steps=4, scores=scores)
    assert written == ["best-000001.ckpt", "best-000002.ckpt", "best-000004.ckpt"], "each moment once"
    assert names(tmp_path) == ["best-000002.ckpt", "best-000004.ckpt", *step_names(2, 4)]
    folder = tmp_path / "checkpoints"
    for step in ("000002", "000004"):
        assert (folder / f"best-{step}.ckpt").samefile(folder / f"step-{step}.ckpt")
        verify(folder / f"best-{step}.ckpt")
    assert find_checkpoint("best", Run(tmp_path)) == folder / "best-000002.ckpt", "0.6 is better than the newest, 0.55"


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, done = threading.Event(), list[str]()
    write = saving.write

    def slow(staged: dict[str, Any], path: Path, **options: Any) -> None:
        assert go_on.wait(30)
        done.append(path.name)
        write(staged, path, **options)

    def watch(trainer: Trainer, module: Any, step: int) -> None:
        seen.append((step, list(done)))
        if step == 4:
            go_on.set()

    seen: list[tuple[int, list[str]]] = []
    monkeypatch.setattr(saving, "write", slow)
    fit(tmp_path, saver(tmp_path, 2), At(watch), steps=5)
    assert seen[:4] == [(1, []), (2, []), (3, []), (4, [])], "steps 3 and 4 were taken meanwhile"
    assert done == ["step-000002.ckpt", "step-000004.ckpt", "step-000005.ckpt"]
    weights = content(tmp_path, "step-000004")["state_dict"]["layer.weight"]
    assert torch.equal(weights, torch.full((1, 2), -4.0)), "as it was at that step"


@pytest.mark.parametrize(("background", "taken"), [(True, 3), (False, 2)])
def test_what_cannot_be_written_ends_the_run_with_its_line(
    background: bool, taken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = saving.write

    def full(staged: dict[str, Any], path: Path, **options: Any) -> None:
        if path.name == "step-000002.ckpt":
            failed.set()
            raise UserError("the disk is full")
        write(staged, path, **options)

    def watch(trainer: Trainer, module: Any, step: int) -> None:
        steps.append(step)
        if background and step == 3:
            assert failed.wait(30)
            while saver_.__dict__["_writer"]._thread.busy:
                pass

    failed, steps = threading.Event(), list[int]()
    monkeypatch.setattr(saving, "write", full)
    saver_ = saver(tmp_path, background=background)
    with pytest.raises(UserError, match="the disk is full"):
        fit(tmp_path, saver_, At(watch))
    assert steps[-1] == taken
    assert names(tmp_path) == step_names(1) and content(tmp_path)["global_step"] == 1


def test_a_run_that_breaks_down_writes_what_it_had_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, write = threading.Event(), saving.write

    def slow(staged: dict[str, Any], path: Path, **options: Any) -> None:
        begun.set()
        threading.Event().wait(0.3)
        write(staged, path, **options)

    def crash(trainer: Trainer, module: Any, step: int) -> None:
        if step == 3:
            raise RuntimeError("crash")

    monkeypatch.setattr(saving, "write", slow)
    with pytest.raises(RuntimeError, match="crash"):
        fit(tmp_path, saver(tmp_path, 2), At(crash))
    assert begun.is_set() and content(tmp_path)["global_step"] == 2
    verify(tmp_path / "checkpoints/last.ckpt")


def test_in_a_streak_of_bad_steps_nothing_is_saved(tmp_path: Path) -> None:
    def streak(trainer: Trainer, module: Any, step: int) -> None:
        module.bad_steps = max(0, step - 2) if step < 5 else 0

    fit(tmp_path, saver(tmp_path, 3, keep_last=9), At(streak), steps=7)
    assert names(tmp_path) == step_names(5, 6, 7), "that of step 3 is made up for as soon as there is a good step"

    def at_the_end(trainer: Trainer, module: Any, step: int) -> None:
        module.bad_steps = step

    fit(tmp_path / "end", saver(tmp_path / "end", 2, keep_last=9), At(at_the_end), steps=5)
    assert names(tmp_path / "end") == step_names(5), "what was learnt before the streak is not lost"


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def break_down(trainer: Trainer, module: Any, step: int) -> None:
        with torch.no_grad():
            if step in (3, 4):
                module.layer.weight[0, 1] = torch.inf if step == 3 else torch.nan
            elif step == 5:
                module.layer.weight.fill_(1.0)

    scores = {1: 0.1, 2: 0.2, 3: 0.9, 4: 0.9, 5: 0.15, 6: 0.1}
    fit(tmp_path, saver(tmp_path, monitor="val/dsc", keep_last=9), At(break_down), scores=scores)
    assert names(tmp_path) == ["best-000002.ckpt", *step_names(1, 2, 5, 6)]
    lines = capsys.readouterr().err.splitlines()
    assert lines == [line for line in lines if line.startswith("weights are not finite after step 3: nothing is saved")]
    assert len(lines) == 1
    parts = [torch.full((2,), 3e38, requires_grad=True), torch.tensor([torch.nan])]
    assert are_finite(parts), "their sum is not, and what is frozen does not count"
    assert are_finite([]) and not are_finite([torch.tensor([1.0, -torch.inf], requires_grad=True)])


def test_a_run_that_goes_on_from_an_earlier_one_leaves_the_later_ones(tmp_path: Path) -> None:
    fit(tmp_path, saver(tmp_path, keep_last=9), steps=6)
    assert names(tmp_path) == step_names(1, 2, 3, 4, 5, 6)
    fit(tmp_path, saver(tmp_path, 2, keep_last=9), steps=5, resume=tmp_path / "checkpoints/step-000003.ckpt")
    assert names(tmp_path) == step_names(1, 2, 3, 4, 5)
    assert find_checkpoint("last", Run(tmp_path)) == tmp_path / "checkpoints/last.ckpt"
    assert content(tmp_path)["global_step"] == 5


def test_what_a_kill_left_is_cleared_up(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    fit(tmp_path, saver(tmp_path, keep_last=3), steps=3)
    (folder / "step-000002.ckpt.json").unlink()  # half removed
    (folder / "step-000004.ckpt.partial").write_bytes(b"half")
    (folder / "step-000005.ckpt").write_bytes(b"never written to its end")
    fit(tmp_path, saver(tmp_path, keep_last=3), steps=4, resume=folder / "step-000003.ckpt")
    assert names(tmp_path) == step_names(1, 3, 4)
    assert not list(folder.glob("*.partial"))


def test_an_older_runs_file_is_gone_on_from(tmp_path: Path) -> None:
    fit(tmp_path, saver(tmp_path), steps=2)
    folder = tmp_path / "checkpoints"
    older = (folder / "step-000002.ckpt").read_bytes()
    for path in folder.iterdir():
        path.unlink()
    (folder / "last.ckpt").write_bytes(older)
    assert find_checkpoint("last", Run(tmp_path)) == folder / "last.ckpt"
    fit(tmp_path, saver(tmp_path, keep_last=9), steps=3, resume=folder / "last.ckpt")
    assert names(tmp_path) == step_names(3) and (folder / "last.ckpt").is_symlink()
    damaged = tmp_path / "damaged/checkpoints/last.ckpt"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(flipped(older))
    with pytest.raises(UserError, match=r"last\.ckpt: damaged"):
        find_checkpoint("last", Run(tmp_path / "damaged"))


def flipped(data: bytes) -> bytes:
    """A file with one bit changed, in its first tensor."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        start = next(item for item in archive.infolist() if item.filename.endswith("/data/0")).header_offset
    place = start + 30 + sum(struct.unpack_from("<HH", data, start + 26))  # behind the part's name and padding
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def damage(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()  # a best checkpoint may be the same file
    path.write_bytes(flipped(data))


def test_the_newest_that_is_whole_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, run = tmp_path / "checkpoints", Run(tmp_path)
    assert find_checkpoint("last", run) is None and run.newest_checkpoint() is None
    scores = {1: 0.2, 2: 0.1, 3: 0.1}
    fit(tmp_path, saver(tmp_path, keep_last=9, monitor="val/dsc"), steps=3, scores=scores)
    capsys.readouterr()
    assert run.newest_checkpoint() == folder / "last.ckpt"
    damage(folder / "step-000003.ckpt")
    assert find_checkpoint("last", run) == folder / "step-000002.ckpt"
    (line,) = capsys.readouterr().err.splitlines()
    assert "step-000003.ckpt" in line and "damaged" in line and "step-000002.ckpt is taken instead" in line
    (folder / "step-000002.ckpt").write_bytes(b"short")
    assert find_checkpoint("last", run) == folder / "step-000001.ckpt"
    assert len(capsys.readouterr().err.splitlines()) == 2
    (folder / "step-000001.ckpt.json").unlink()
    with pytest.raises(UserError, match="none of its checkpoints is complete and undamaged"):
        find_checkpoint("last", run)
    assert len(names(tmp_path)) == 5, "nothing is deleted"
    assert find_checkpoint("best", run) == folder / "best-000001.ckpt"
    damage(folder / "best-000001.ckpt")
    for name in ("best", str(folder / "best-000001.ckpt")):
        with pytest.raises(UserError, match=r"best-000001\.ckpt: damaged"):
            find_checkpoint(name, run)
    with pytest.raises(UserError, match=r"step-000001\.ckpt\.json: no completion mark"):
        find_checkpoint(str(folder / "step-000001.ckpt"), run)


def test_what_others_save_through_lightning_is_marked_too(tmp_path: Path) -> None:
    def save(trainer: Trainer, module: Any, step: int) -> None:
        if step == 2:
            trainer.save_checkpoint(tmp_path / "mine.ckpt")

    fit(tmp_path, saver(tmp_path), At(save), steps=2)
    verify(tmp_path / "mine.ckpt")
    module = fit(tmp_path, saver(tmp_path), steps=3, resume=tmp_path / "mine.ckpt")
    assert torch.equal(module.layer.weight, torch.full((1, 2), -3.0))
    files = CheckpointFiles()
    loaded = files.load_checkpoint(tmp_path / "mine.ckpt")
    damage(tmp_path / "mine.ckpt")
    with pytest.raises(UserError, match=r"mine\.ckpt: damaged"):
        files.load_checkpoint(tmp_path / "mine.ckpt")
    files.remove_checkpoint(tmp_path / "mine.ckpt")
    assert not list(tmp_path.glob("mine*"))
    assert loaded["global_step"] == 2 and torch.equal(loaded["state_dict"]["layer.weight"], torch.full((1, 2), -2.0))


def test_ranks_end_together_when_one_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_initialized():
        pytest.skip("ranks are forked, which CUDA does not allow once it is in use")

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.checkpoints.file.save", full)
    ranks: dict[str, Any] = {"devices": 2, "strategy": "ddp_fork"}
    with pytest.raises(Exception, match=r"step-000001\.ckpt: cannot be written \(No space left on device\)"):
        fit(tmp_path, saver(tmp_path), At(note_step), **ranks)
    steps = [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)]
    assert steps[0] == steps[1] and steps[0] in ("2", "3"), "both at the same step, and soon"
    assert names(tmp_path) == []


def note_step(trainer: Trainer, module: Any, step: int) -> None:
    (Path(trainer.default_root_dir) / f"rank-{trainer.global_rank}").write_text(str(step))


def test_what_changed_of_the_code_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = code()
    assert now["sha256"] and {"torch", "lightning"} <= now["versions"].keys()
    assert code_changes(now, now) == []
    other = {**now, "sha256": "0" * 64}
    assert code_changes(other, now) == ["the code"], "of the same commit, or of none"
    assert code_changes({**other, "commit": "1" * 40}, {**now, "commit": "2" * 40}) == [
        "commit 1111111111 → 2222222222"
    ]
    assert code_changes({**now, "versions": {"torch": "1.0"}}, {**now, "versions": {"torch": "2.0", "new": "1"}}) == [
        "torch 1.0 → 2.0"
    ]
    warn_of_other_code({CODE: now})
    assert capsys.readouterr().err == ""
    warn_of_other_code({CODE: other})
    line = "warning: since the checkpoint changed the code: results may differ from an undisturbed run's\n"
    assert capsys.readouterr().err == line
    warn_of_other_code({})
    assert capsys.readouterr().err == line, "a checkpoint from before this was noted"


def test_keys_of_one_recipe_alone_count_where_the_code_is_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path)
    run.record.write_text("{}")
    layer = {"class_path": "a.B", "init_args": {"scale": {"x": 1}, "lr": 1}}
    then = {"model": layer, "data": {"init_args": {"batch_size": 4}}}
    now = {"model": {**layer, "init_args": {"scale": {"x": 1, "y": 2}, "lr": 1}}, "data": then["data"]}
    run.recipe.write_text(yaml.safe_dump(then))
    same, other = {CODE: code()}, {CODE: {**code(), "sha256": "0"}}
    refuse_another_recipe(run, yaml.safe_dump(then), same)
    line = r"cannot go on with another model\.init_args\.scale\.y: nothing in .*recipe\.yaml, now 2; set it back"
    with pytest.raises(UserError, match=line):
        refuse_another_recipe(run, yaml.safe_dump(now), same)
    refuse_another_recipe(run, yaml.safe_dump(now), other)
    (told,) = capsys.readouterr().err.splitlines()
    assert "was written by other code" in told and "model.init_args.scale.y (nothing then, 2 now)" in told
    wrong = {**now, "data": {"init_args": {"batch_size": 2}}}
    with pytest.raises(UserError, match=r"another data\.init_args\.batch_size: 4 in .*, now 2"):
        refuse_another_recipe(run, yaml.safe_dump(wrong), other)


def test_a_run_goes_on_from_what_is_whole_and_says_what_changed(
    tiny_run: Path, tiny_recipe: Path, trainer_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run, symlinks=True)
    damage(run / "checkpoints/step-000004.ckpt")
    more = ("fit", "-c", tiny_recipe, "--trainer.max_steps", 5, "--ckpt_path", "last")
    monkeypatch.setattr(resuming, "code", lambda: {**code(), "versions": {"torch": "9.9"}})
    exit_code, out, err = trainer_command(*more)
    assert exit_code == 0, err
    assert f"going on from {run}/checkpoints/step-000003.ckpt, step 3" in out
    refused, changed = err.splitlines()
    assert "step-000004.ckpt: damaged" in refused and "step-000003.ckpt is taken instead" in refused
    assert changed.startswith("warning: since the checkpoint changed torch ") and "→ 9.9: results may" in changed
    for path in (run / "checkpoints").glob("step-*.ckpt"):
        damage(path)
    for command in (more, ("test", "-c", tiny_recipe, "--ckpt_path", "last")):
        exit_code, _, err = trainer_command(*command)
        assert exit_code == 2 and "none of its checkpoints is complete and undamaged" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_the_other_commands_read_a_run_of_shards(
    tiny_recipe: Path, trainer_command: Command, trainer_process: Callable[..., Any], tmp_path: Path
) -> None:
    size = ("--model.init_args.model.init_args.image_size", 32, "--data.init_args.micro_batch_size", 1)
    average = ("--trainer.callbacks", '[{"class_path": "trainer.callbacks.EMA"}]')
    small = ("-c", tiny_recipe, *size, *average, "--trainer.max_steps", 2)
    ranks = ("--trainer.devices", 2, "--trainer.strategy", '{"class_path": "trainer.distributed.FSDP2"}')
    process = trainer_process("fit", *small, *ranks)
    shown, _ = process.communicate(timeout=300)
    assert process.returncode == 0, shown
    run = tmp_path / "run"
    assert (run / "checkpoints/last.ckpt").is_dir() and names(run) == step_names(1, 2)
    code_, _, err = trainer_command("test", *small, "--ckpt_path", "last")
    assert code_ == 0, err
    record = json.loads((run / "evaluation/tuned/evaluation.json").read_text())
    assert record["step"] == 2 and record["weights"] == "average"
    raw, averaged = (restore(Run(run), weights=weights).state_dict() for weights in ("raw", None))
    assert raw.keys() == averaged.keys() and any(not torch.equal(raw[name], averaged[name]) for name in raw)
    assert trainer_command("report", run)[0] == 0
    code_, out, err = trainer_command("fit", *small, "--trainer.max_steps", 3, "--ckpt_path", "last")
    assert code_ == 0 and "step 2" in out, err
    assert (run / "checkpoints/last.ckpt").is_file() and names(run) == step_names(2, 3)
