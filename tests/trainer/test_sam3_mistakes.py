"""Mistakes with a text-prompted model: each one line that names the place, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from test_mistakes import refused
from tiny_sam3 import SHAPE, SIDE, make

from data_shards.datamodule import TripletDataModule
from data_shards.errors import UserError
from trainer.callbacks import VolumeRecord
from trainer.callbacks.checkpoint import check_monitor
from trainer.losses import SetPredictionLoss
from trainer.models import SAM3, LiteMedSAM
from trainer.models.sam3_names import to_meta
from trainer.modules import MedSAMModule, SAM3Module
from trainer.modules.concepts import nothing_absent
from trainer.tuning import FullTuning, LoRATuning, MedicalSAMAdapterTuning, Tuning

RECIPE = Path(__file__).parents[2] / "recipes/sam3/tiny.yaml"
Command = Callable[..., tuple[int, str, str]]
Fit = Callable[..., str]
MODULE, MODEL, LOSS = "model.init_args", "model.init_args.model.init_args", "model.init_args.loss.init_args"
"""Dotted keys of the recipe."""


@pytest.fixture
def fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer_command: Command) -> Fit:
    """Fit the tiny recipe with keys changed; return the line that refuses it. The data do not exist."""
    monkeypatch.chdir(tmp_path)

    def run(changed: dict[str, Any], *arguments: object) -> str:
        part: dict[str, Any] = {}
        for key, value in changed.items():
            node, (*path, last) = part, key.split(".")
            for name in path:
                node = node.setdefault(name, {})
            node[last] = value
        Path("part.yaml").write_text(yaml.safe_dump(part))
        nowhere = ("--data.init_args.train=nowhere/train", "--data.init_args.test=nowhere/train")
        recipes = ("-c", RECIPE, "-c", "part.yaml")
        line = refused(trainer_command("fit", *recipes, "--trainer.default_root_dir=run", *nowhere, *arguments))
        assert "nowhere" not in line, "refused before data are looked for"
        assert not Path("run").exists()
        return line

    return run


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (f"{MODEL}.shape.heads", 3, "shape.width 64: a multiple of 12, for shape.heads"),
        (f"{MODEL}.shape.global_blocks", [4], "shape.global_blocks 4: shape.depth 4 has the blocks 0 to 3"),
        (f"{MODEL}.shape.global_blocks", [-1], "shape.global_blocks -1: shape.depth 4"),
        (f"{MODEL}.shape.depth", 1, "shape.global_blocks 1: shape.depth 1 has the blocks 0 to 0"),
        (f"{MODEL}.shape.context", 2, "shape.context 2: a text takes 3 tokens or more"),
        (f"{MODEL}.shape.patch", 112, "shape.pretrained_size 56: at least shape.patch, 112 pixels"),
        (f"{MODEL}.shape.norm_eps", -1, "shape.norm_eps -1.0: a small number above 0"),
        (f"{MODEL}.shape.norm_eps", float("nan"), "shape.norm_eps nan: a small number above 0"),
        (f"{MODEL}.shape.widht", 64, "unknown key 'widht'; did you mean 'width'?"),
        (f"{MODEL}.image_size", 100, "image_size 100: SAM3 takes a multiple of its patch of 7 pixels"),
        (f"{MODEL}.dropout", 1, "dropout 1.0 and drop_path 0.0 are in [0, 1)"),
        (f"{LOSS}.class_weight", float("nan"), "class_weight is nan: give 0 or more"),
        (f"{LOSS}.mask_chunk", 0, "mask_chunk is 0: give 1 or more, or null"),
        (f"{LOSS}.many_matcher", {"class_path": "trainer.losses.OneToManyMatcher", "init_args": {"topk": 0}}, "topk 1"),
        (f"{MODULE}.threshold", 1.5, "threshold is in [0, 1], not 1.5"),
        (f"{MODULE}.answer", "all", "key 'answer': Expected a Literal['best', 'semantic']. Got value: all"),
        (f"{MODULE}.resolve_overlaps", "maybe", "key 'resolve_overlaps': Expected a bool"),
        (f"{MODULE}.terms_per_image", 0, "terms_per_image 0: 1 or more, or null for all"),
        (f"{MODULE}.prompts", "trainer.prompts.BoxPrompts", "unknown key 'prompts'"),
        (f"{MODULE}.model", {"class_path": "trainer.models.MedSAM"}, "trainer.models.MedSAM does not correspond to"),
        (f"{MODULE}.exemplars", {"class_path": "trainer.prompts.Exemplars", "init_args": {"points": 1}},
         "set model.init_args.points to true"),
        (f"{MODULE}.wording", {"class_path": "trainer.prompts.Wording", "init_args": {"templates": ["{organ}"]}},
         "template '{organ}': there is no place '{organ}'; known: modality, plane, term"),
        (f"{MODULE}.tuning", {"class_path": "trainer.tuning.FullTuning"},
         "freeze: pattern 'prompt_encoder' matches no parameter of SAM3; its parts: detr_decoder"),
        ("checkpoint.monitor", "val/fond", "no validation logs that; did you mean 'val/found'?"),
    ],
)  # fmt: skip
def test_in_a_recipe(key: str, value: object, expected: str, fit: Fit) -> None:
    assert expected in fit({key: value})


def test_a_module_takes_models_that_it_can_ask() -> None:
    with pytest.raises(UserError, match=r"SAM3 is asked in words: take trainer\.modules\.SAM3Module"):
        MedSAMModule(make(), FullTuning(freeze=()))


@pytest.mark.parametrize(
    ("tuning", "expected"),
    [
        (FullTuning(freeze=(), learning_rates={"vison_encoder": 1e-5}), r"^learning_rates: pattern 'vison_encoder'"),
        (FullTuning(freeze=("text_encoder",), learning_rates={"text_encoder": 1e-5}), "lets nothing of it learn"),
        (FullTuning(freeze=("*",)), "leaves nothing to learn"),
        (LoRATuning(train=["decoder"]), r"^train: pattern 'decoder' matches no parameter"),
        (LoRATuning(targets=r"text_encoder\.text_projection"), "on which nothing depends"),
        (LoRATuning(targets=r"detr_decoder\.query_embed"), "a Embedding, which takes no adapter"),
        (MedicalSAMAdapterTuning(), "SAM3 has no two-way blocks of SAM's decoder: set decoder to false"),
    ],
)
def test_tuning_of_what_there_is_not(tuning: Tuning, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        SAM3Module(make(), tuning)


def test_a_loss_learns_something() -> None:
    nothing: dict[str, Any] = dict.fromkeys(("box_weight", "giou_weight", "class_weight", "presence_weight"), 0.0)
    with pytest.raises(UserError, match=r"nothing is learnt: box_weight, .* are all 0"):
        SetPredictionLoss(**nothing, semantic_weight=0, semantic_dice_weight=0)
    SetPredictionLoss(**nothing, semantic_weight=1, semantic_dice_weight=0)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"

    def said(content: object) -> str:
        if isinstance(content, str):
            path.write_text(content)
        else:
            torch.save(content, path)
        with pytest.raises(UserError) as caught:
            SAM3(SHAPE, SIDE, weights=str(path))
        return str(caught.value)

    own = {name: tensor.detach() for name, tensor in make().state_dict().items()}
    meta = {f"detector.{name}": tensor for name, tensor in to_meta(own).items()}
    lost = next(name for name in meta if name.startswith("detector.dot_prod_scoring"))
    for content in ("", "no weights"):
        assert "it is empty, cut off or another kind of file; fetch it again" in said(content)
    assert "holds no state dict of tensors by name: give a file of weights" in said([1, 2])
    assert "do not fit SAM3: 1 missing (dot_product_scoring" in said({"model": {k: meta[k] for k in meta if k != lost}})
    assert "unknown (image_encoder" in said(LiteMedSAM(image_size=64, weights=None).state_dict())
    module = SAM3Module(make(), LoRATuning(train=["detr_decoder"]))
    assert "LoRA's additions beside them: `trainer export` merges these" in said({"state_dict": module.state_dict()})
    with pytest.raises(UserError, match="they have nothing for points"):
        torch.save(own, path)
        SAM3(SHAPE, SIDE, weights=str(path), points=True)


def test_a_term_of_a_volume_has_a_name() -> None:
    with pytest.raises(UserError, match=r"terms .*: one is empty"):
        VolumeRecord(terms=["liver", " "])


@pytest.mark.parametrize("name", ["val/found", "val/false_positives", "val/presence_auroc"])
def test_the_best_may_be_chosen_by_what_is_found(name: str) -> None:
    check_monitor(name)


def test_says_where_no_negative_can_be_drawn(shape_shards: Path) -> None:
    train = str(shape_shards / "train")
    data = TripletDataModule(train, batch_size=1, negatives_per_image=1)
    data.setup("fit")
    assert nothing_absent(data, "fit") == []
    for absent, expected in (([0, 0], True), ([0, 3], False), ([-1, -1], False)):  # -1: an old index cannot say
        other = {"train": SimpleNamespace(index=SimpleNamespace(absent=np.array(absent)))}
        made_up = SimpleNamespace(shards=other, folders={"train": "corpus/train"}, negatives_per_image=2)
        line = (
            "data.init_args.negatives_per_image 2: corpus/train has no term that was looked for in an image of it and "
            "not there: nothing is asked for in vain"
        )
        assert nothing_absent(made_up, "fit") == ([line] if expected else [])
