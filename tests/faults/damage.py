"""Checkpoints that were damaged between two parts of a run: refused, and the one before is taken."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from cases import ONE, SAME, SHARDED, Case, told
from harness import Lane, Variant, compare, left_by

NEWEST, BEFORE = "step-000008.ckpt", "step-000006.ckpt"
Harm = Callable[[Path], None]


def half_done(lane: Lane, variant: Variant) -> None:
    """Put a run in place that was killed at the end of step 10, before it saved that."""
    kept = lane.home / f"half-{variant.ranks}"
    lane.undisturbed(variant)
    lane.anew()
    if not kept.exists():
        faults = {
            rank: {"at": "hook", "hook": "on_train_batch_end", "step": 10, "do": "kill"}
            for rank in range(variant.ranks)
        }
        lane.run(variant, faults)
        shutil.copytree(lane.root, kept, symlinks=True)
    lane.anew()
    shutil.copytree(kept, lane.root, symlinks=True)


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def flip(path: Path, share: float, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[min(int(len(content) * share), len(content) - 1)] ^= 1 << bit
    path.write_bytes(content)


def lose(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def relink(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def taken_before(variant: Variant, harms: list[tuple[str, Harm]], refused: bool) -> Callable[[Lane], str]:
    """Damage files; the run goes on from what is whole and ends as undisturbed, with a line for what is refused."""

    def strike(lane: Lane) -> str:
        half_done(lane, variant)
        for name, harm in harms:
            harm(lane.root / "checkpoints" / name)
        ended = lane.go_on(variant)
        said = [line for line in ended.lines if ".ckpt" in line and "going on" not in line]
        begun = next(line for line in ended.lines if line.startswith("going on from"))
        assert ("step 8" in begun) is not refused, begun
        assert not refused or any(NEWEST in line for line in said), ended.lines
        return f"{told(said[0], lane) if said else 'not needed'}; went on and ended {SAME}"

    return strike


def nothing_left(lane: Lane, variant: Variant = ONE) -> str:
    """Damage all checkpoints: one line, and nothing is overwritten."""
    half_done(lane, variant)
    folder = lane.root / "checkpoints"
    for path in folder.glob("step-*.ckpt"):
        flip(path, 0.5, 3)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    line = lane.run(variant).stopped_by()
    assert "none of its checkpoints is complete and undamaged" in line, line
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    return f"stopped: {told(line, lane)}"


def by_name(name: str, harm: Harm) -> Callable[[Lane], str]:
    """Ask for a damaged checkpoint itself: it is refused, and no other is taken in its place."""

    def strike(lane: Lane) -> str:
        half_done(lane, ONE)
        paths = sorted((lane.root / "checkpoints").glob("best-*.ckpt" if name == "best" else name))
        for path in paths:
            harm(path)
        given = "best" if name == "best" else path
        line = lane.run(ONE, None, "--ckpt_path", given).stopped_by()
        assert any(path.name in line for path in paths), line
        lane.go_on(ONE)
        return f"stopped: {told(line, lane)}; --ckpt_path last ended {SAME}"

    return strike


def checkpoints(rng: random.Random) -> Iterator[Case]:
    """Every file of a checkpoint, in both forms: cut off, one bit flipped, gone; the link; both of the newest; all."""
    mark = f"{NEWEST}.json"
    for kind, members in (
        (ONE, (NEWEST, mark)),
        (
            SHARDED,
            tuple(
                f"{NEWEST}/{name}"
                for name in ("shard-00000.safetensors", "shard-00001.safetensors", "state.pt", "complete.json")
            ),
        ),
    ):
        for name in members:
            harms: list[tuple[str, Harm]] = [("gone", lose), ("empty", partial(cut, share=0.0))]
            for share in (rng.random(), 0.999):
                harms.append((f"cut off at {share:.1%}", partial(cut, share=share)))
            for share in (0.0, rng.random(), rng.random(), 1.0):
                bit = rng.randrange(8)
                harms.append((f"bit {bit} at {share:.1%} flipped", partial(flip, share=share, bit=bit)))
            if kind is SHARDED:
                harms = rng.sample(harms, 3)
            for what, harm in harms:
                strike = taken_before(kind, [(name, harm)], refused=True)
                quick = (
                    kind is ONE
                    and name == NEWEST
                    and "flipped" in what
                    and what.startswith("bit")
                    and "at 0.0%" in what
                )
                yield Case("damaged checkpoint", f"{kind.name}: {name} {what}", strike, quick)
    for what, harm in (
        ("gone", lose),
        ("to nowhere", partial(relink, target="step-000099.ckpt")),
        ("to the one before", partial(relink, target=BEFORE)),
        ("to itself", partial(relink, target="last.ckpt")),
    ):
        yield Case(
            "damaged checkpoint", f"the link last.ckpt {what}", taken_before(ONE, [("last.ckpt", harm)], refused=False)
        )
    for name in (NEWEST, "best"):
        yield Case(
            "damaged checkpoint", f"{name} asked for, a bit flipped", by_name(name, partial(flip, share=0.4, bit=1))
        )
    yield Case("damaged checkpoint", "all of them, a bit flipped", nothing_left)
    yield Case("damaged checkpoint", "a later one that is half written", half_written)


def half_written(lane: Lane) -> str:
    """What a kill may leave of a later checkpoint, in every form, beside whole ones."""
    half_done(lane, ONE)
    folder = lane.root / "checkpoints"
    (folder / "step-000010.ckpt.partial").write_bytes((folder / NEWEST).read_bytes()[:5000])
    (folder / "step-000010.ckpt").write_bytes((folder / NEWEST).read_bytes())  # without its mark
    (folder / "step-000012.ckpt").mkdir()
    ended = lane.go_on(ONE)
    compare(left_by(lane.root), lane.expected[ONE.name])
    said = [line for line in ended.lines if "step-00001" in line]
    assert said, ended.lines
    return f"{told(said[0], lane)}; went on and ended {SAME}"
