"""A folder takes its name on disk only when transformers has loaded all of it and answers alike."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from copied_runs import copied
from family_runs import BOXES, SIDES, image_of, logits, node, refused, trained
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("sam2")
from trainer.callbacks.panels import to_uint8
from trainer.export.transformers import TransformersExporter, family_of
from trainer.export.transformers_family import Family, image_settings, quietly, read_images
from trainer.export.transformers_sam2 import SAM2Family
from trainer.models import LiteMedSAM, MedSAM, Preprocessing, SegmentationModel
from trainer.models.medsam import ViT
from trainer.restore import instantiate, restore
from trainer.run import Run

FAMILIES = ("sam", "sam2", "sam3")
CLASSES = {"sam": "SamModel", "sam2": "Sam2VideoModel", "sam3": "Sam3Model"}
PROCESSORS = {"sam": "Sam2Processor", "sam2": "Sam2VideoProcessor", "sam3": "Sam3Processor"}
pytestmark = pytest.mark.filterwarnings("ignore:cannot import name")  # without CUDA, holes are not filled


@pytest.fixture(scope="module")
def runs(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of a family; not to be changed."""
    return functools.cache(lambda family: trained(family, tmp_path_factory.mktemp(family), tiny_shards))


@pytest.fixture
def run(runs: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a family's run, without its exports."""
    return lambda family: copied(runs(family), tmp_path / family / "run")


def loaded(name: str, folder: Path) -> Any:
    """What a class of transformers loads from a folder."""
    import transformers

    with quietly():
        found = getattr(transformers, name).from_pretrained(folder, local_files_only=True)
    return found.eval() if hasattr(found, "eval") else found


def ours(run: Path) -> SegmentationModel:
    return restore(Run(run)).model


@torch.no_grad()
def theirs(family: str, folder: Path) -> Tensor:
    """What a user of transformers gets for the input of `logits`."""
    if family == "sam3":
        text = loaded("AutoProcessor", folder).tokenizer("disc", padding="max_length", return_tensors="pt")
        none = {"input_boxes": torch.zeros(1, 1, 4), "input_boxes_labels": torch.tensor([[-10]])}
        found = loaded("AutoModel", folder)(pixel_values=image_of(family), **text, **none)
        masks: Tensor = found.pred_masks[:, found.pred_logits.argmax(1)[0]]
        return masks
    model = loaded("Sam2Model" if family == "sam2" else "AutoModel", folder)
    answer: Tensor = model(pixel_values=image_of(family), input_boxes=BOXES[None], multimask_output=False).pred_masks
    return answer[0, :, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_a_run_and_answers_alike_and_so_does_a_recipe(run, family, tmp_path, trainer_command):
    copy, out = run(family), tmp_path / "new/out"
    code, stdout, err = trainer_command("export", copy, "--to", "transformers", "--out", out, "--samples", 2)
    assert (code, err) == (0, "")
    assert "verified: transformers 5." in stdout
    record = json.loads((copy / "exports/transformers/export.json").read_text())
    assert record["verified"] is True and record["image_size"] == SIDES[family]
    assert 0 < record["max_logit_difference"] <= 1e-5 and record["max_input_difference"] < 0.3
    assert record["sha256"].keys() >= {"config.json", "model.safetensors", "preprocessor_config.json"}
    config = json.loads((out / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == ([CLASSES[family]], "float32")
    if family == "sam2":
        assert record["frames"] == 4 and set(record["followed"]) == {"box"} and record["unequal"] == []
        assert record["max_followed_difference"] <= 1e-5
    if family == "sam3":
        assert record["max_confidence_difference"] <= 1e-5
        assert any("input_boxes_labels" in note for note in record["notes"])

    # by hand, on other input
    expected = logits(ours(copy), family)
    assert expected.std() > 1e-3
    assert (theirs(family, out) - expected).abs().max() < 1e-5
    assert type(loaded("AutoProcessor", out)).__name__ == PROCESSORS[family]

    # and back: a recipe takes the folder for its weights
    again = instantiate(node(family, weights=str(out)), SegmentationModel, "here").eval()
    assert torch.equal(logits(again, family), expected)


def test_sam3s_answers_need_its_token_for_exemplars(run, tmp_path, trainer_command):
    """What the note says: with a text alone, transformers' class is asked something else than the run was."""
    copy, out = run("sam3"), tmp_path / "out"
    assert trainer_command("export", copy, "--to", "transformers", "--out", out, "--samples", 1)[0] == 0
    text = loaded("AutoProcessor", out).tokenizer("disc", padding="max_length", return_tensors="pt")
    with torch.no_grad():
        found = loaded("Sam3Model", out)(pixel_values=image_of("sam3"), **text)
    best = found.pred_masks[:, found.pred_logits.argmax(1)[0]]
    assert (best - logits(ours(copy), "sam3")).abs().max() > 1e-4


def test_sam3s_tokenizer_cleans_texts_as_the_run_did(run, tmp_path, trainer_command):
    copy, out = run("sam3"), tmp_path / "out"
    assert trainer_command("export", copy, "--to", "transformers", "--out", out, "--unverified")[0] == 0
    tokenizer = loaded("AutoProcessor", out).tokenizer
    model: Any = ours(copy)
    for text in ("disc", "Crohn’s  Disease", "ﬁbrosis, left", "a " * 60):
        (expected,), (valid,) = model.tokenizer([text])
        found = tokenizer(text, padding="max_length", max_length=32, truncation=True, return_tensors="pt")
        assert torch.equal(found["input_ids"][0][valid], expected[valid])
        assert torch.equal(found["attention_mask"][0].bool(), valid)


def renamed_otherwise(monkeypatch: pytest.MonkeyPatch, family: str, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Let the weights of a family be written otherwise."""
    kind = {"sam": "transformers_sam.SAMFamily", "sam2": "transformers_sam2.SAM2Family"}
    kind["sam3"] = "transformers_sam3.SAM3Family"
    place = f"trainer.export.{kind[family]}.renamed"
    module, _, name = f"trainer.export.{kind[family]}".rpartition(".")
    honest = getattr(__import__(module, fromlist=[name]), name).renamed

    def renamed(self: Family, state: dict[str, Tensor]) -> dict[str, Tensor]:
        found = honest(self, state)
        change(found)
        return found

    monkeypatch.setattr(place, renamed)


def swapped(first: str, second: str) -> Callable[[dict[str, Tensor]], None]:
    def swap(state: dict[str, Tensor]) -> None:
        state[first], state[second] = state[second], state[first]

    return swap


@pytest.mark.parametrize(
    ("family", "change", "what"),
    [
        ("sam", swapped(*(f"vision_encoder.layers.{i}.mlp.lin1.weight" for i in (0, 1))), "logits differ by"),
        ("sam2", swapped(*(f"mask_decoder.transformer.layers.{i}.mlp.proj_in.weight" for i in (0, 1))), "differ by"),
        # nothing that is asked in one image needs it
        ("sam2", swapped(*(f"memory_encoder.memory_fuser.layers.{i}.layer_norm.bias" for i in (0, 1))), "fuser.layers"),
        ("sam3", swapped(*(f"detr_encoder.layers.{i}.mlp.fc1.weight" for i in (0, 1))), "differ by"),
        ("sam", lambda state: state["mask_decoder.iou_token.weight"].fill_(float("nan")), "logits differ by nan"),
        ("sam", lambda state: state.pop("mask_decoder.iou_token.weight"), "1 missing (mask_decoder.iou_token.weight)"),
        ("sam3", lambda state: state.pop("text_projection.bias"), "1 missing (text_projection.bias)"),
        ("sam2", lambda state: state.pop("no_object_pointer"), "1 missing (no_object_pointer)"),
        # transformers itself says nothing of this one
        ("sam2", lambda state: state.update({"memory_more": torch.zeros(1)}), "1 unknown (memory_more)"),
        ("sam3", lambda state: state.update({"tracker_model.x": torch.zeros(1)}), "1 unknown (tracker_model.x)"),
    ],
)
def test_what_is_not_the_runs_does_not_pass(run, family, change, what, tmp_path, trainer_command, monkeypatch):
    renamed_otherwise(monkeypatch, family, change)
    assert what in refused(run(family), "transformers", tmp_path / "out", trainer_command)


@pytest.mark.parametrize(("dtype", "stored"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_in_half_the_bits_are_compared_as_they_were_rounded(run, tmp_path, trainer_command, dtype, stored):
    copy, out = run("sam"), tmp_path / "out"
    options = ("--out", out, "--samples", 1, "--dtype", dtype)
    code, _, err = trainer_command("export", copy, "--to", "transformers", *options)
    assert (code, err) == (0, "")
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {stored}
    assert json.loads((out / "config.json").read_text())["dtype"] == str(stored).removeprefix("torch.")
    record = json.loads((out / "export.json").read_text())
    assert record["verified"] is True and record["dtype"] == dtype
    assert any("dtype=torch.float32" in note for note in record["notes"])
    assert loaded("AutoModel", out).dtype == stored  # which is why the note says how to load it


def test_one_matrix_is_written_once(run, tmp_path, trainer_command):
    out = tmp_path / "out"
    assert trainer_command("export", run("sam"), "--to", "transformers", "--out", out, "--unverified")[0] == 0
    with safe_open(out / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert file.metadata() == {"format": "pt"}
    assert "shared_image_embedding.positional_embedding" in names
    assert "prompt_encoder.shared_embedding.positional_embedding" not in names


PREPROCESSINGS = {
    "medsam": Preprocessing(64, resize="squash", scaling="minmax", interpolation="bicubic"),
    "sam": Preprocessing(64, resize="pad", scaling="mean_std"),
}


@pytest.mark.parametrize("like", PREPROCESSINGS)
def test_boxes_of_the_processor_are_those_of_the_run(like, tmp_path):
    model = MedSAM(ViT(32, 1, 2, (0,), 3), 64, weights=None, input_like=like)
    assert model.preprocessing == PREPROCESSINGS[like]
    exporter = TransformersExporter().for_model(model)
    exporter.write(model, tmp_path)
    processor = loaded("AutoProcessor", tmp_path)
    image, box = torch.randint(0, 256, (3, 48, 40), dtype=torch.uint8), torch.tensor([[4.0, 6.0, 30.0, 44.0]])
    found = processor(images=image.permute(1, 2, 0).numpy(), input_boxes=[box.tolist()], return_tensors="pt")
    expected, _ = model.preprocessing.boxes(box, torch.tensor([[48, 40]]))
    assert (found["input_boxes"][0] - expected).abs().max() < 1e-4
    assert found["pixel_values"].shape == (1, 3, 64, 64)


@pytest.mark.parametrize(("like", "most", "mean"), [("medsam", 0.05, 1e-3), ("sam", 0.018, 3e-3)])
def test_real_images_are_read_as_in_the_run_but_for_rounding(like, most, mean, tmp_path, real_slice):
    """Of a picture that fills 8 bits; a grey value is 0.004 of minmax, and 0.017 of ImageNet's narrowest deviation."""
    model = MedSAM(ViT(32, 1, 2, (0,), 3), 256, weights=None, input_like=like)
    TransformersExporter().for_model(model).write(model, tmp_path)
    image = torch.from_numpy(to_uint8(real_slice("mr axial").float().numpy()))[None]
    read = read_images(tmp_path)
    difference = (read(image) - model.preprocessing.images([image])).abs()
    assert difference.max() < most and difference.mean() < mean
    assert (read(image.flip(1)) - model.preprocessing.images([image])).abs().mean() > 10 * mean


def test_a_run_of_other_scaling_says_what_the_processor_does_not_do(tmp_path):
    settings = image_settings(Preprocessing(64, resize="squash", scaling="zscore"), 16)
    assert settings["image_mean"] == pytest.approx([0.485, 0.456, 0.406])


def test_a_litemedsam_has_no_class():
    assert not TransformersExporter().accepts(LiteMedSAM(64, weights=None))


def test_memories_of_another_width_are_refused():
    import tiny_sam2

    from data_shards.errors import UserError

    with pytest.raises(UserError, match=r"variant\.memory_width 16 cannot be exported to 'transformers'"):
        TransformersExporter().accepts(tiny_sam2.make())


def test_without_postprocessing_single_images_are_compared(tmp_path):
    import tiny_sam2
    from family_runs import SAM2_SHAPE

    from trainer.models import SAM2

    torch.manual_seed(0)
    model = SAM2(SAM2_SHAPE, tiny_sam2.SIDE, weights=None, postprocessing=False).eval()
    family = family_of(model)
    assert isinstance(family, SAM2Family)
    assert family.config().mask_decoder_config.dynamic_multimask_via_stability is False
    assert any("binarises" in note for note in family.notes("fp32"))
    exporter = TransformersExporter().for_model(model)
    exporter.write(model, tmp_path)
    assert callable(exporter.load(tmp_path))
