"""FSDP2 equals DDP equals one process, for every family and every way of tuning, on 2 and 4 gloo ranks.

The suite takes some of the ways of tuning; ``SAM_TRAINER_WORLDS=all pytest tests/trainer/test_sharded.py`` takes all.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import family_training
import pytest
import tiny_sam2
import torch
from family_training import start

from data_shards.errors import UserError
from trainer.distributed import FSDP2, zero_of
from trainer.models import MedSAM

ALL = os.environ.get("SAM_TRAINER_WORLDS") == "all"
FAMILIES = list(family_training.FAMILIES)
NEEDS = {"sam2": "sam2", "sam3": "open_clip"}
ALONE: dict[tuple[str, str], dict[str, Any]] = {}
"""What one process found, by family and options: the same for every number of ranks."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sam2.write_volumes(tmp_path_factory.mktemp("sharded") / "train", range(4))


def check(family: str, ranks: int, shards: Path, root: Path, strategy: dict[str, Any] | str, **options: Any) -> Any:
    """Compare some ranks with one process that takes as much at once as they do together."""
    pytest.importorskip(NEEDS.get(family, "torch"))
    steps = {"steps": 3, **options}
    alone = (family, str(options))
    if alone not in ALONE:
        (ALONE[alone],) = start(family, 1, shards, root / "one", micro=family_training.BATCH, **steps)
    one, named = ALONE[alone], isinstance(strategy, str)
    arguments = {"strategy": strategy} if named else {"strategy": "fsdp2", "strategy_arguments": strategy}
    found = start(family, ranks, shards, root / "many", micro=family_training.BATCH // ranks, **arguments, **steps)
    assert len(found) == ranks
    compare(one, found)
    if not named:  # spread over the ranks of a copy, evenly but for what does not divide
        sharing = ranks // strategy.get("replicas", 1)
        assert max(each["held"] for each in found) < 1.02 * one["held"] / sharing
        assert sum(each["held"] for each in found) == one["held"] * ranks // sharing
    assert all(each["moments"] == {"torch.float32"} for each in found)
    return found


def compare(one: dict[str, Any], found: list[dict[str, Any]], close: float = 1e-5) -> None:
    """Gradients of the first step, and losses and norms of all, which follow from the weights after each."""
    largest = max(float(gradient.abs().max()) for gradient in one["gradients"].values())
    for each in found:
        assert each["gradients"].keys() == one["gradients"].keys()
        for name, gradient in one["gradients"].items():
            torch.testing.assert_close(each["gradients"][name], gradient, rtol=0, atol=close * largest, msg=name)
        torch.testing.assert_close(each["norms"], one["norms"], rtol=5 * close, atol=0)
        for mine, theirs in zip(each["parts"], one["parts"], strict=True):  # of every part of the model, and rates
            assert len(mine) > 3 and mine.keys() == theirs.keys()
            torch.testing.assert_close(mine, theirs, rtol=5 * close, atol=close * theirs["train/grad_norm"])
    mean = torch.tensor([each["losses"] for each in found]).mean(0)
    # Adam's step of a gradient that is nothing but rounding is not: later steps are as far apart as that makes them
    torch.testing.assert_close(mean, torch.tensor(one["losses"]), rtol=5 * close, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("ranks", "strategy"),
    [(2, "ddp"), (2, {}), (4, {"replicas": 2})],
    ids=["2 ddp", "2 fsdp2", "4 hsdp"],
)
def test_ranks_equal_one_process(family: str, ranks: int, strategy: Any, shards: Path, tmp_path: Path) -> None:
    check(family, ranks, shards, tmp_path, strategy)


METHODS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("sam3", "LoRATuning", {}),
    "lora lite": ("litemedsam", "LoRATuning", {}),
    "dora": ("medsam", "LoRATuning", {"dora": True}),
    "frozen encoder": ("sam2", "FrozenEncoderTuning", {}),
    "selective": ("medsam", "SelectiveTuning", {"norms": True, "last_blocks": 1}),
    "houlsby": ("medsam", "HoulsbyTuning", {}),
    "adaptformer": ("sam3", "AdaptFormerTuning", {}),
    "ssf": ("litemedsam", "SSFTuning", {}),
    "fact": ("medsam", "FacTTuning", {}),
    "prompts": ("medsam", "VisualPromptTuning", {}),
    "adapter": ("medsam", "MedicalSAMAdapterTuning", {}),
    "layer decay": ("sam3", "FullTuning", {"freeze": [], "layer_decay": 0.8}),
}


@pytest.mark.parametrize("method", METHODS if ALL else ["lora", "frozen encoder", "houlsby"])
def test_every_method_of_tuning_is_sharded(method: str, shards: Path, tmp_path: Path) -> None:
    """Frozen and learning parameters beside each other, new ones among those of a block."""
    family, tuning, arguments = METHODS[method]
    check(family, 2, shards, tmp_path, {}, tuning=tuning, tuning_arguments=arguments, steps=2)


def test_recomputed_and_compiled_blocks(shards: Path, tmp_path: Path) -> None:
    again = {"model": {"checkpoint_activations": True}}
    check(
        "medsam", 2, shards, tmp_path, {}, module_arguments=again, callbacks=[["CompileBlocks", {"backend": "eager"}]]
    )


@pytest.mark.parametrize("family", FAMILIES if ALL else ["medsam", "sam3"])
def test_a_rank_with_nothing_to_learn_from_goes_along(family: str, shards: Path, tmp_path: Path) -> None:
    """It gathers and sums up as the other does, and adds nothing."""
    pytest.importorskip(NEEDS.get(family, "torch"))
    options = {"micro": 2, "steps": 2, "empty": [1]}
    expected = start(family, 2, shards, tmp_path / "ddp", strategy="ddp", **options)
    found = start(family, 2, shards, tmp_path / "fsdp2", strategy="fsdp2", **options)
    for one, other in zip(expected, found, strict=True):
        compare(one, [other])
    assert found[1]["losses"][0] == 0 < found[0]["losses"][0]


@pytest.mark.parametrize("family", FAMILIES if ALL else ["sam2", "sam3"])
def test_bf16_computes_and_fp32_remembers(family: str, shards: Path, tmp_path: Path) -> None:
    pytest.importorskip(NEEDS.get(family, "torch"))
    options = {"micro": 2, "steps": 1, "precision": "bf16-mixed"}
    expected = start(family, 2, shards, tmp_path / "ddp", strategy="ddp", **options)
    found = start(family, 2, shards, tmp_path / "fsdp2", strategy="fsdp2", **options)
    for one, other in zip(expected, found, strict=True):
        compare(one, [other], 5e-3)  # what is used several times sums up its gradients in bf16 with ddp, in fp32 here
        assert other["moments"] == {"torch.float32"}
        assert {weight.dtype for weight in other["weights"].values()} == {torch.float32}


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_at_two_gone_on_with_at_one_and_four(family: str, shards: Path, tmp_path: Path) -> None:
    """With an average of the weights, and validations that score it, as the undisturbed run."""
    pytest.importorskip(NEEDS.get(family, "torch"))
    checkpoints = tmp_path / "saved/checkpoints"
    saving = [["RunCheckpoint", {"every_n_steps": 1, "dirpath": str(checkpoints)}], ["EMA", {"decay": 0.5}]]
    scored = {"val_check_interval": 1, "limit_val_batches": 1, "callbacks": [["EMA", {"decay": 0.5}]]}
    (whole,) = start(family, 1, shards, tmp_path / "whole", micro=4, steps=3, **scored)
    start(family, 2, shards, tmp_path / "saved", strategy="fsdp2", micro=2, steps=2, **{**scored, "callbacks": saving})
    for ranks, strategy in ((1, "auto"), (4, "fsdp2")):
        root = tmp_path / f"gone on {ranks}"
        options = {"strategy": strategy, "micro": 4 // ranks, "resume": str(checkpoints / "last.ckpt"), **scored}
        found = start(family, ranks, shards, root, steps=3, **options)
        mean = sum(each["losses"][-1] for each in found) / ranks
        assert [len(each["losses"]) for each in found] == [1] * ranks
        assert mean == pytest.approx(whole["losses"][-1], rel=5e-5)
        assert found[0]["norms"][-1] == pytest.approx(whole["norms"][-1], rel=2e-4)
        for each in found:
            assert each["metrics"]["val/dsc"] == pytest.approx(whole["metrics"]["val/dsc"], abs=0.02)
            assert each["weights"].keys() == whole["weights"].keys()


def test_one_process_can_be_sharded_too(shards: Path, tmp_path: Path) -> None:
    check("medsam", 1, shards, tmp_path, {})


def test_what_cannot_be_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="replicas 0: 1 or more"):
        FSDP2(replicas=0)
    with pytest.raises(UserError, match="timeout_minutes 0: above 0"):
        FSDP2(timeout_minutes=0)
    with pytest.raises(Exception, match="replicas 2 do not divide 1 ranks"):
        start("medsam", 1, shards, tmp_path / "a", strategy="fsdp2", strategy_arguments={"replicas": 2})
    with pytest.raises(Exception, match="precision bf16-true"):
        start("medsam", 1, shards, tmp_path / "b", strategy="fsdp2", precision="bf16-true")
    with pytest.raises(UserError, match="no blocks of kind image_encodr; did you mean 'image_encoder'"):
        MedSAM(weights=None, checkpoint_activations=["image_encodr"])


def test_zero_of_reaches_every_tensor_and_forgives_what_is_no_number() -> None:
    first, second = torch.tensor([1.0, torch.nan], requires_grad=True), torch.tensor([torch.inf], requires_grad=True)
    zero = zero_of([first * 2, (second,)], "no tensor", torch.ones(1))
    assert float(zero) == 0
    zero.backward()
    assert first.grad.tolist() == [0, 0] and second.grad.tolist() == [0]
    assert float(zero_of()) == 0
