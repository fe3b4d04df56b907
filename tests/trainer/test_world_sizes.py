"""The same training on one, two and four processes, and on others after a kill.

The suite takes some of the ways; ``SAM_TRAINER_WORLDS=all pytest tests/trainer/test_world_sizes.py`` takes all.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import world_ranks
from world_ranks import BATCH, passes, run, steps, weights

ALL = os.environ.get("SAM_TRAINER_WORLDS") == "all"
PER_EPOCH = {"medsam": 4, "litemedsam": 4, "sam2": 3, "sam3": 4}
"""Steps: the last samples of an epoch, too few for another, are left out."""

Cut = tuple[int, int]
"""Ranks, and samples that each takes at once."""
WHOLE: Cut = (1, BATCH)
Trained = Callable[..., Path]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world_ranks.write(tmp_path_factory.mktemp("worlds") / "train")


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train undisturbed, once for each way: the folder of the run."""
    done: dict[tuple[Any, ...], Path] = {}

    def train(family: str, cut: Cut, **options: Any) -> Path:
        needs(family)
        way = (family, cut, *sorted(options.items()))
        if way not in done:
            root = tmp_path_factory.mktemp("run")
            run(root, cut[0], family=family, shards=str(shards), micro=cut[1], **options)
            done[way] = root
        return done[way]

    return train


def needs(family: str) -> None:
    """Skip where the package is missing that a family is made of, or reads text with."""
    for package in {"sam2": ["sam2"], "sam3": ["open_clip"]}.get(family, []):
        pytest.importorskip(package)


def ways(chosen: list[tuple[Any, ...]], others: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return [*chosen, *(way for way in others if ALL and way not in chosen)]


def same_steps(found: Path, expected: Path) -> None:
    """The same samples in every step, in the same order, and the same losses."""
    mine, theirs = steps(found), steps(expected)
    assert mine.keys() == theirs.keys()
    assert [keys for _, keys in mine.values()] == [keys for _, keys in theirs.values()]
    for place, (loss, _) in theirs.items():
        assert mine[place][0] == pytest.approx(loss, rel=1e-6), place


def apart(found: Path, expected: Path) -> float:
    """Norm of the difference of the weights at the end, as a share of theirs."""
    mine, theirs = weights(found), weights(expected)
    assert mine.keys() == theirs.keys() and len(theirs) > 50
    squares = [((mine[n] - theirs[n]).double().square().sum(), theirs[n].double().square().sum()) for n in theirs]
    return math.sqrt(sum(float(one) for one, _ in squares) / sum(float(one) for _, one in squares))


SIZES = [
    *(("medsam", cut, "ddp", 2) for cut in ((1, 1), (2, 2), (4, 1))),
    *(("sam2", cut, "ddp", 2) for cut in ((1, 1), (2, 2), (4, 1))),
    *(("sam3", cut, "ddp", 2) for cut in ((2, 2), (4, 1))),
    ("litemedsam", (2, 2), "ddp", 1),
]
OTHER_SIZES = [
    (family, cut, strategy, 1 if family == "litemedsam" else 2)
    for strategy in ("ddp", "fsdp2")
    for family in PER_EPOCH
    for cut in ((1, 1), (1, 2), (2, 2), (2, 1), (4, 1))
    # SAM3's terms are divided by the targets of each pass: a step in more passes is another
    if not (family == "sam3" and cut[0] * cut[1] < BATCH) and not (strategy == "fsdp2" and cut[0] == 1)
]


@pytest.mark.parametrize(("family", "cut", "strategy", "epochs"), ways(SIZES, OTHER_SIZES))
def test_a_training_is_the_same_at_any_world_size(
    family: str, cut: Cut, strategy: str, epochs: int, trained: Trained
) -> None:
    whole, other = trained(family, WHOLE, epochs=epochs), trained(family, cut, strategy=strategy, epochs=epochs)
    assert len(steps(whole)) == epochs * PER_EPOCH[family]
    each = passes(other)
    assert len(each) == len(steps(whole)) * BATCH // cut[1]
    sizes = {len(keys) for _, keys in each.values()}
    assert len(sizes) > 1, "one sample is damaged"
    if family != "sam2" and cut[1] == 1:
        losses = [float(loss) for loss, keys in each.values() if "v1-4" in keys or not keys]
        assert losses and (family == "sam3" or set(losses) == {0.0}), "others have no target"
    same_steps(other, whole)
    assert apart(other, whole) < 1e-6


def test_a_run_learns_and_another_rate_shows(trained: Trained) -> None:
    """What is compared above is not all alike anyway: a rate that differs by a thousandth is seen in the weights."""
    whole, faster = trained("medsam", WHOLE, epochs=2), trained("medsam", WHOLE, epochs=2, lr=1.001e-4)
    first, *_, last = [loss for loss, _ in steps(whole).values()]
    assert last < first and apart(faster, whole) > 3e-7
    with pytest.raises(AssertionError):
        same_steps(faster, whole)


MOMENTS = ("in mid-epoch", "in mid-accumulation", "during validation")


def kill_at(moment: str, family: str, before: Cut) -> dict[str, Any]:
    """In the second epoch: before its second step, after the first of that step's passes, or in a validation."""
    step, pass_ = PER_EPOCH[family] + 1, BATCH // (before[0] * before[1])
    return {
        "in mid-epoch": {"step": step, "hook": "on_train_batch_start"},
        "in mid-accumulation": {"step": step, "hook": "on_train_batch_end", "batch": pass_},
        "during validation": {"step": step + 1, "hook": "on_validation_batch_start"},
    }[moment]


KILLS = [
    ("medsam", "in mid-epoch", (2, 1), ((4, 1),), "ddp"),
    ("medsam", "in mid-accumulation", (2, 1), ((2, 1), (1, 4)), "ddp"),
    ("medsam", "during validation", (2, 1), ((2, 1), (4, 1)), "ddp"),
    ("sam2", "in mid-accumulation", (2, 1), ((2, 1), (4, 1)), "ddp"),
    ("sam3", "during validation", (2, 2), ((2, 2), (1, 4)), "ddp"),
]
OTHER_KILLS = [
    (family, moment, (2, 2 if family == "sam3" else 1), ((2, 2 if family == "sam3" else 1), (1, 4), (4, 1)), strategy)
    for strategy in ("ddp", "fsdp2")
    for family in ("medsam", "sam2", "sam3")
    for moment in MOMENTS
    if not (family == "sam3" and moment == "in mid-accumulation")  # in one pass there is no middle
]


@pytest.mark.parametrize(("family", "moment", "before", "afterwards", "strategy"), ways(KILLS, OTHER_KILLS))
def test_a_killed_training_goes_on_at_any_world_size(
    family: str,
    moment: str,
    before: Cut,
    afterwards: tuple[Cut, ...],
    strategy: str,
    shards: Path,
    trained: Trained,
    tmp_path: Path,
) -> None:
    whole, undisturbed = trained(family, WHOLE, epochs=2), trained(family, before, strategy=strategy, epochs=2)
    killed = tmp_path / "killed"
    options: dict[str, Any] = {"family": family, "shards": str(shards), "strategy": strategy}
    options |= {"validated": True, "every": 1}
    run(killed, before[0], dies=True, micro=before[1], kill=kill_at(moment, family, before), **options)
    done = len(steps(killed))
    assert PER_EPOCH[family] < done <= PER_EPOCH[family] + 2 and not (killed / "weights.pt").exists()
    for ranks, micro in afterwards:
        root = tmp_path / f"{ranks}-{micro}"
        shutil.copytree(killed, root, symlinks=True)
        run(root, ranks, micro=micro, **options)
        same_steps(root, whole)
        assert apart(root, whole) < 1e-6
        if (ranks, micro) == before:
            assert passes(root) == passes(undisturbed), "to the bit"
            assert all(torch.equal(weight, weights(root)[name]) for name, weight in weights(undisturbed).items())
