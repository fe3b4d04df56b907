"""An adapter takes its name on disk only when peft has taken all of it, and answers as the run does, merged and not."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from copied_runs import copied
from family_runs import BOXES, SAM2_SHAPE, image_of, logits, refused, trained
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("sam2")
import tiny_sam2
import tiny_sam3

from data_shards.errors import UserError
from trainer.export.adapter import adapter_of
from trainer.export.peft import FILE, MERGED, PEFTExporter
from trainer.export.transformers import family_of
from trainer.export.transformers_family import quietly
from trainer.models import SAM2, LiteMedSAM, MedSAM, SegmentationModel
from trainer.models.medsam import ViT
from trainer.prompts import Prompts
from trainer.restore import restore
from trainer.run import Run
from trainer.tuning import LoRATuning, SAMedTuning

FAMILIES = ("sam", "sam2", "sam3")
LORA = {"class_path": "trainer.tuning.LoRATuning", "init_args": {"rank": 2, "alpha": 6}}
pytestmark = pytest.mark.filterwarnings("ignore:cannot import name")  # without CUDA, holes are not filled


@pytest.fixture(scope="module")
def runs(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The LoRA run of a family; not to be changed."""
    return functools.cache(lambda family: trained(family, tmp_path_factory.mktemp(family), tiny_shards, LORA))


@pytest.fixture
def run(runs: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a family's run, without its exports."""
    return lambda family: copied(runs(family), tmp_path / family / "run")


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_takes_an_adapter_and_answers_alike(run, family, tmp_path, trainer_command):
    copy, out = run(family), tmp_path / "new/out"
    code, stdout, err = trainer_command("export", copy, "--to", "peft", "--merge", "--out", out, "--samples", 2)
    assert (code, err) == (0, "")
    assert "verified: peft 0." in stdout
    record = json.loads((copy / "exports/peft/export.json").read_text())
    assert record["verified"] is True and record["max_logit_difference"] <= 1e-5
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 6, None)
    assert config["target_modules"] == sorted(config["target_modules"])
    assert any("does not name on the hub" in note for note in record["notes"])
    state = load_file(out / FILE)
    assert all(".lora_" in name or name.startswith("base_model.model.mask_decoder.") for name in state)
    assert sum(".lora_A." in name for name in state) == len(config["target_modules"]) > 0
    # the whole model in merged/ is what --to transformers writes
    whole = tmp_path / "whole"
    assert trainer_command("export", copy, "--to", "transformers", "--out", whole, "--unverified")[0] == 0
    one, other = (load_file(folder / "model.safetensors") for folder in (out / MERGED, whole))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def test_a_user_puts_it_on_a_base_of_transformers(run, tmp_path, trainer_command):
    """By hand: the frozen weights in transformers' class, the adapter on it, and merged."""
    copy, out = run("sam"), tmp_path / "out"
    assert trainer_command("export", copy, "--to", "peft", "--out", out, "--samples", 1)[0] == 0
    assert {path.name for path in out.iterdir()} >= {"adapter_config.json", FILE}
    assert not (out / MERGED).exists()
    model = restore(Run(copy)).model
    family = family_of(model)
    assert family is not None
    made = adapter_of(model, family)
    base = family.base(made.base, made.layers)
    assert "mask_decoder.iou_token.weight" not in made.base  # random in the base

    def answer(one: Any) -> Tensor:
        found = one(pixel_values=image_of("sam"), input_boxes=BOXES[None], multimask_output=False)
        return found.pred_masks[0, :, 0]

    expected = logits(model, "sam")
    assert (answer(base) - expected).abs().max() > 1e-3
    put = PeftModel.from_pretrained(base, out).eval()
    assert (answer(put) - expected).abs().max() < 1e-5
    assert (answer(put.merge_and_unload()) - expected).abs().max() < 1e-5


def written_otherwise(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Let the adapter's file be written otherwise."""
    honest = PEFTExporter.write

    def write(self: PEFTExporter, model: SegmentationModel, path: Path) -> None:
        honest(self, model, path)
        state = load_file(path / FILE)
        change(state)
        save_file(state, path / FILE, metadata={"format": "pt"})

    monkeypatch.setattr(PEFTExporter, "write", write)


B = "base_model.model.vision_encoder.layers.{}.attn.qkv.lora_B.weight"
TOKEN = "base_model.model.mask_decoder.iou_token.weight"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda state: state.update({B.format(0) + ".x": state.pop(B.format(0))}), "peft cannot load it"),
        (lambda state: state.update({B.format(7): state[B.format(0)].clone()}), "1 unknown"),
        (lambda state: state.pop(B.format(1)), f"1 missing ({B.format(1)})"),
        (lambda state: state.pop(TOKEN), "peft cannot load it"),
        (lambda state: state[B.format(0)].add_(1.0), "differ by"),
        (lambda state: state[TOKEN].fill_(float("nan")), f"1 not taken ({TOKEN})"),
    ],
)
def test_what_peft_does_not_take_does_not_pass(run, change, what, tmp_path, trainer_command, monkeypatch):
    written_otherwise(monkeypatch, change)
    assert what in refused(run("sam"), "peft", tmp_path / "out", trainer_command)


def test_a_merged_model_that_is_another_does_not_pass(run, tmp_path, trainer_command, monkeypatch):
    honest = PEFTExporter.write

    def write(self: PEFTExporter, model: SegmentationModel, path: Path) -> None:
        honest(self, model, path)
        state = load_file(path / MERGED / "model.safetensors")
        state["mask_decoder.upscale_conv2.weight"] *= 2
        save_file(state, path / MERGED / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(PEFTExporter, "write", write)
    line = refused(run("sam"), "peft", tmp_path / "out", trainer_command, "--merge")
    assert "answers of the model of merged/ differ by" in line


def test_bf16_and_the_name_of_the_base(run, tmp_path, trainer_command):
    copy, out = run("sam"), tmp_path / "out"
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text())
    recipe["model"]["init_args"]["model"]["init_args"]["weights"] = "facebook/sam-vit-base"
    (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    options = ("--out", out, "--samples", 1, "--dtype", "bf16")
    code, _, err = trainer_command("export", copy, "--to", "peft", *options)
    assert (code, err) == (0, "")
    assert {tensor.dtype for tensor in load_file(out / FILE).values()} == {torch.bfloat16}
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "facebook/sam-vit-base"
    notes = json.loads((out / "export.json").read_text())["notes"]
    assert any("the weights that the run began with: facebook/sam-vit-base" in note for note in notes)


def sam(width: int = 32) -> MedSAM:
    return MedSAM(ViT(width=width, depth=2, heads=2, global_blocks=(1,), window=3), 64, weights=None)


def sam2() -> SAM2:
    torch.manual_seed(0)
    return SAM2(SAM2_SHAPE, 64, weights=None, dropout=0.0)


def tuned(model: SegmentationModel, **arguments: Any) -> SegmentationModel:
    """A model whose adapters, and what else learns, are random."""
    torch.manual_seed(1)
    LoRATuning(rank=2, alpha=6, **arguments).apply(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def exported(model: SegmentationModel, folder: Path) -> tuple[PEFTExporter, Any]:
    """The export of a model, and its consumer."""
    exporter = PEFTExporter()
    assert exporter.accepts(model)
    exporter = exporter.for_model(model)
    exporter.write(model, folder)
    with quietly():
        return exporter, exporter.load(folder)


@torch.no_grad()
def worst(model: SegmentationModel, consumer: Any) -> float:
    """Largest difference of what a consumer answers to two boxes."""
    image = image_of("sam")
    asked = Prompts(torch.zeros(2, dtype=torch.int64), BOXES)
    return float((consumer(image, [asked])[0] - logits(model, "sam")).abs().max())


@pytest.mark.parametrize(
    "arguments",
    [
        {"dora": True, "rslora": True},
        {"train": ["prompt_encoder", "mask_decoder", "image_encoder.neck"]},
        {"train": ["image_encoder.layers.0.layer_norm1", "mask_decoder.iou_prediction_head"]},
        {"targets": r"mask_decoder\.transformer\..*_proj", "train": []},
    ],
)
def test_ways_of_lora_in_sam(arguments, tmp_path):
    model = tuned(sam(), **arguments)
    _, consumer = exported(model, tmp_path)
    assert worst(model, consumer) < 1e-5


def test_four_bits_belong_on_a_base_of_the_same_four_bits(tmp_path):
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    model = tuned(sam(64), quantize="4bit")
    exporter, consumer = exported(model, tmp_path)
    assert worst(model, consumer) < 1e-4
    assert any("BitsAndBytesConfig" in note for note in exporter.notes)
    with pytest.raises(UserError, match="base is in 8 bits"):
        PEFTExporter().accepts(tuned(sam(64), quantize="8bit"))


@pytest.mark.parametrize(
    ("train", "kind"),
    [(["sam_mask_decoder", "sam_prompt_encoder"], "Sam2Model"), (["memory_attention"], "Sam2VideoModel")],
)
def test_an_adapter_of_sam2_goes_onto_the_class_that_has_all_of_it(train, kind, tmp_path):
    model = tuned(sam2(), train=train)
    exporter, consumer = exported(model, tmp_path)
    made = adapter_of(model, exporter.family)
    assert type(exporter.family.base(made.base, made.layers)).__name__ == kind
    image = torch.randn(1, 3, 64, 64)
    asked = Prompts(torch.zeros(2, dtype=torch.int64), BOXES)
    with torch.no_grad():
        found = consumer(image, [asked])[0]
        assert (found - model.decode(model.encode(image), asked)[0][:, 0]).abs().max() < 1e-5


def message(model: SegmentationModel) -> str:
    """Why a model is refused, in one line."""
    with pytest.raises(UserError) as error:
        exporter = PEFTExporter()
        exporter.accepts(model)
        adapter_of(model, exporter.for_model(model).family)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_peft_has_no_place_for_is_refused():
    assert "has no class in transformers" in message(LiteMedSAM(64, weights=None))
    assert "was not tuned with LoRATuning" in message(sam())
    samed = sam()
    SAMedTuning().apply(samed)
    assert "was not tuned with LoRATuning" in message(samed) and "--to transformers" in message(samed)
    whole = message(tuned(sam(), train=["image_encoder.pos_embed"]))
    assert "vision_encoder.pos_embed learnt fully" in whole and "--to transformers" in whole
    assert "attn.rel_pos_h learnt fully" in message(tuned(sam(), train=["image_encoder.layers.0.attn.rel_pos_h"]))
    assert "no_memory_embedding learnt, which is no module of its own" in message(tuned(sam2(), train=["no_mem_embed"]))
    both = tuned(sam(), targets=r"mask_decoder\.transformer\.layers\.0\..*_proj", train=["mask_decoder"])
    assert "learnt fully" in message(both)
    assert "point_encoder" in message(tuned(tiny_sam3.make(points=True), train=["point_encoder"]))
    assert "variant.memory_width 16" in message(tuned(tiny_sam2.make()))


def test_other_formats_have_nothing_to_merge(run, tmp_path, trainer_command):
    line = refused(run("sam"), "transformers", tmp_path / "out", trainer_command, "--merge")
    assert "leave --merge out" in line
