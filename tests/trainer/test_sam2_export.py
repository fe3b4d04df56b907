"""A SAM2 takes its name on disk only when Meta's video predictor has loaded all of it and follows the same masks."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from copied_runs import copied
from torch import Tensor

from data_shards.errors import UserError
from trainer.cli import main
from trainer.export import EXPORTERS, following, gate
from trainer.export.gate import FRAMES, Verdict, compare, real_clip, real_samples
from trainer.export.sam2 import SAM2Exporter
from trainer.models import SAM2Shape
from trainer.models.sam2_memory import RecentMemory
from trainer.models.weights import sha256_of
from trainer.prompts import Prompts
from trainer.report.gate import gate_section
from trainer.restore import restore
from trainer.run import Run
from trainer.tuning import LoRATuning

build_sam = pytest.importorskip("sam2.build_sam")
from trainer.models import SAM2  # noqa: E402  (needs sam2)
from trainer.models.sam2_tracking import Tracking  # noqa: E402  (needs sam2)

pytestmark = pytest.mark.filterwarnings("ignore:cannot import name")  # without CUDA, holes are not filled
SIDE = 64
CONFIG = "configs/sam2.1/sam2.1_hiera_t.yaml"
OVERRIDES = [f"++model.image_size={SIDE}"]


def random_model(**arguments: Any) -> SAM2:
    """SAM2-Tiny with random weights, none of them zero or one, that takes objects to be there."""
    torch.manual_seed(0)
    model = SAM2("tiny", SIDE, weights=None, **arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(5.0)
    return model


@pytest.fixture(scope="module")
def trained(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a SAM2-Tiny after two steps of LoRA on clips of two slices, from weights in Meta's layout."""
    folder = tmp_path_factory.mktemp("sam2")
    torch.save({"model": random_model().state_dict()}, folder / "w.pt")
    content = {
        "seed_everything": 0,
        "model": {
            "class_path": "trainer.modules.SAM2Module",
            "init_args": {
                "model": {
                    "class_path": "trainer.models.SAM2",
                    "init_args": {"image_size": SIDE, "weights": str(folder / "w.pt")},
                },
                "tuning": {"class_path": "trainer.tuning.LoRATuning", "init_args": {"train": ["sam_mask_decoder"]}},
                "lr": 1.0e-3,
            },
        },
        "data": {
            "class_path": "data_shards.datamodule.TripletDataModule",
            "init_args": {
                **{split: str(tiny_shards / split) for split in ("train", "test")},
                "batch_size": 2,
                "clip_length": 2,
            },
        },
        "trainer": {"default_root_dir": str(folder / "run"), "max_steps": 2, "accelerator": "cpu"},
        "checkpoint": {"every_n_steps": 2},
    }
    (folder / "r.yaml").write_text("# Does it run?\n" + yaml.safe_dump(content))
    assert main(["fit", "-c", str(folder / "r.yaml")]) == 0
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of that run, without its exports."""
    return copied(trained, tmp_path / "run")


def command(run: Path, out: Path, *options: object) -> tuple[object, ...]:
    return "export", run, "--to", "sam2", "--out", out, "--samples", 2, *options


def test_the_official_predictor_loads_an_export_and_follows_the_same(run, trained, tmp_path, trainer_command):
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    out = tmp_path / "new/folder/disc.pt"
    code, stdout, err = trainer_command(*command(run, out))
    assert (code, err) == (0, "")
    assert "verified: sam2 1.1.0 loads" in stdout and f"followed through {FRAMES} frames" in stdout
    record = json.loads((run / "exports/sam2/export.json").read_text())
    assert json.loads(out.with_name("disc.pt.export.json").read_text()) == record
    assert record["verified"] is True and record["sha256"] == sha256_of(out)
    assert (record["image_size"], record["samples"], record["frames"]) == (SIDE, 2, FRAMES)
    assert record["frames_shown"] == FRAMES - 1 and not any("untested" in note for note in record["notes"])
    assert record["asked"] == ["boxes", "points", "points and masks"] and record["followed"] == ["box", "mask"]
    assert (record["tensors"], record["unequal"], record["frames_shown_raised"]) == (471, [], None)
    assert record["compared"] == (
        "answers to boxes, points, points and masks in 2 images; objects shown 1 by box and 1 by mask and followed "
        f"through {FRAMES} frames; all 471 tensors"
    )
    assert record["compared"] in stdout
    assert record["compared"] in gate_section([record])
    assert record["max_logit_difference"] <= 1e-5 and record["max_followed_difference"] <= 1e-4
    assert record["dsc_run"] == pytest.approx(record["dsc_consumer"], abs=1e-3)
    told = {"config_file": CONFIG, "hydra_overrides_extra": OVERRIDES, "apply_postprocessing": True}
    assert record["builder"] == told
    assert any("++model.image_size=64" in note and "_bb_feat_sizes = [(16, 16)," in note for note in record["notes"])
    assert json.loads(out.with_name("disc.pt.preprocessing.json").read_text())["scaling"] == "mean_std"

    # what is written is the official state dict in fp32, with what was learnt merged into it
    written = torch.load(out, weights_only=True)["model"]
    before = torch.load(trained.parent / "w.pt", weights_only=True)["model"]
    assert written.keys() == before.keys()
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    changed = {name for name, tensor in written.items() if not torch.equal(tensor, before[name])}
    assert any(".attn.qkv." in name for name in changed) and changed != written.keys()

    # a recipe may begin with it
    module = restore(Run(run))
    module.tuning.merge(module.model)
    again = SAM2("tiny", SIDE, weights=str(out)).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in module.model.state_dict().items())

    # the same by hand, with the other predictor, and the sizes that the note gives
    theirs = SAM2ImagePredictor(build_sam.build_sam2(CONFIG, str(out), device="cpu", hydra_overrides_extra=OVERRIDES))
    theirs._bb_feat_sizes = [(16, 16), (8, 8), (4, 4)]
    noise = np.random.default_rng(3).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    box = torch.tensor([[10.0, 12.0, 50.0, 40.0]])
    theirs.set_image(noise)
    expected = torch.from_numpy(theirs.predict(box=box.numpy(), multimask_output=False)[2])
    image = module.model.preprocessing.images([torch.from_numpy(noise).permute(2, 0, 1)])
    with torch.no_grad():
        ours = module.model.decode(module.model.encode(image), Prompts(torch.zeros(1, dtype=torch.int64), box))[0][0]
    assert (ours.clamp(-32, 32) - expected).abs().max() < 1e-4 < expected.std()


def tamper(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Let something change what is written."""
    honest = SAM2Exporter.write

    def write(self: SAM2Exporter, model: SAM2, path: Path) -> None:
        honest(self, model, path)
        content = torch.load(path, weights_only=True)
        change(content["model"])
        torch.save(content, path)

    monkeypatch.setattr(SAM2Exporter, "write", write)


def swap(one: str, other: str) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        state[one], state[other] = state[other], state[one]

    return change


@pytest.mark.parametrize(
    ("change", "what"),
    [
        # every key is there and every shape fits: only the answers can tell, and for the memory only those over frames
        (swap(*(f"sam_mask_decoder.transformer.layers.{i}.norm1.weight" for i in (0, 1))), ": logits differ by"),
        (swap(*(f"memory_attention.layers.{i}.linear2.weight" for i in (0, 3))), "of followed objects differ by"),
        (lambda state: state["memory_encoder.out_proj.bias"].mul_(torch.nan), "of followed objects differ by"),
        (swap(*(f"sam_prompt_encoder.point_embeddings.{i}.weight" for i in (0, 1))), ": logits differ by"),
        (lambda state: state["sam_prompt_encoder.mask_downscaling.6.weight"].mul_(-5), ": logits differ by"),
        (lambda state: state["mask_downsample.weight"].mul_(torch.nan), "of followed objects differ by"),
        # no clip is long enough for these; and what moves logits less than rounding may, is still not the run's
        (
            lambda state: state["maskmem_tpos_enc"][2:6].zero_(),
            "1 of its 471 tensors are not those of the run, such as",
        ),
        (lambda state: state["mask_downsample.weight"].mul_(1.01), "such as mask_downsample.weight"),
        (lambda state: state.pop("no_obj_ptr"), "sam2 cannot load it"),
        (lambda state: state.update(head=torch.zeros(1)), 'Unexpected key(s) in state_dict: "head"'),
    ],
)
def test_what_was_tampered_with_does_not_pass(run, tmp_path, trainer_command, monkeypatch, change, what):
    tamper(monkeypatch, change)
    out = tmp_path / "x.pt"
    code, _, err = trainer_command(*command(run, out))
    assert code == 2 and err.startswith("trainer: error: ") and err.count("\n") == 1
    assert what in err
    assert not list(tmp_path.glob("*x.pt*")) and not (run / "exports").exists()


class Oldest(RecentMemory):
    """Another way to choose memories."""


def absent(model: SAM2) -> None:
    """Let a model hold everything to be absent."""
    model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.data.fill_(-50.0)


def test_a_memory_of_nothing_is_no_proof(run, tmp_path, trainer_command, monkeypatch):
    honest = LoRATuning.merge
    monkeypatch.setattr(LoRATuning, "merge", lambda self, model: (honest(self, model), absent(model)))
    code, out, err = trainer_command(*command(run, tmp_path / "x.pt"))
    assert (code, err) == (0, "")
    record = json.loads((run / "exports/sam2/export.json").read_text())
    assert record["verified"] is True and record["frames_shown"] == 0
    assert "holds everything to be absent after the first frame" in record["notes"][-1]
    # so both have followed once more, as if everything were there
    assert record["frames_shown_raised"] == FRAMES - 1 and 0 < record["max_followed_difference"] <= 1e-4
    assert "the verdict rests on that" in record["notes"][-1]
    assert "being there raised in both" in record["compared"] and record["compared"] in out
    tamper(monkeypatch, swap(*(f"memory_attention.layers.{i}.linear2.weight" for i in (0, 3))))
    code, _, err = trainer_command(*command(run, tmp_path / "y.pt"))
    assert code == 2 and "logits of followed objects differ by" in err
    assert not list(tmp_path.glob("*y.pt*"))


def test_models_are_given_back_as_they_were(tmp_path, tiny_shards, monkeypatch):
    model = random_model(memory=Oldest())
    absent(model)
    policy, before = model.memory, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exporter = EXPORTERS["sam2"].for_model(model)
    exporter.write(model, tmp_path / "x.pt")
    consumer = exporter.load(tmp_path / "x.pt")
    samples = real_samples(str(tiny_shards / "test"), 1)
    clip = real_clip(str(tiny_shards / "test"), samples)

    def untouched() -> bool:
        mine = model.memory is policy and not following.unequal_tensors(model, restored)
        return mine and not following.unequal_tensors(consumer.module, restored)

    restored = random_model()
    restored.load_state_dict(before)
    found = following.follow_both(consumer, model, clip)
    assert (found["frames_shown"], found["frames_shown_raised"]) == (0, FRAMES - 1)
    assert untouched()
    follow, calls, most = Tracking.follow, [], [0]

    def fails(self: Tracking, *arguments: Any) -> Any:
        calls.append(self)
        if len(calls) > most[0]:
            raise RuntimeError("out of memory")
        return follow(self, *arguments)

    monkeypatch.setattr(Tracking, "follow", fails)
    for most[0] in (1, 2 * (FRAMES - 1)):  # while it follows the first time, and as if everything were there
        calls.clear()
        with pytest.raises(RuntimeError, match="out of memory"):
            following.follow_both(consumer, model, clip)
        assert untouched()


def test_without_a_mask_the_box_is_one(tiny_shards):
    clip = real_clip(str(tiny_shards / "test"), real_samples(str(tiny_shards / "test"), 1))
    assert clip.mask is not None and clip.mask.sum() > 0
    x0, y0, x1, y1 = clip.boxes[0].int().tolist()
    filled = following._mask(replace(clip, mask=None))
    assert filled.sum() == (x1 - x0 + 1) * (y1 - y0 + 1) and filled[y0, x0] and filled[y1, x1]
    assert (filled | (clip.mask.numpy() != 0)).sum() == filled.sum(), "the mask lies in it"


def test_a_run_without_postprocessing_is_compared_without(tmp_path, tiny_shards):
    model = random_model(postprocessing=False)
    exporter = EXPORTERS["sam2"].for_model(model)
    exporter.write(model, tmp_path / "x.pt")
    samples = real_samples(str(tiny_shards / "test"), 1)
    clip = real_clip(str(tiny_shards / "test"), samples)
    verdict = compare(exporter, tmp_path / "x.pt", model, samples, clip=clip)
    assert verdict.verified and verdict.max_followed_difference is not None
    assert any("apply_postprocessing=False" in note for note in exporter.notes)
    # and it makes a difference here
    verdict = compare(EXPORTERS["sam2"].for_model(random_model()), tmp_path / "x.pt", model, samples, clip=clip)
    assert not verdict.verified


def test_notes_say_in_what_the_consumer_is_not_the_run():
    exporter = EXPORTERS["sam2"]
    plain = exporter.for_model(SAM2("tiny", 1024, weights=None))
    assert plain.builder["hydra_overrides_extra"] == [] and len(plain.notes) == 2
    other = exporter.for_model(SAM2("small", 512, weights=None, scaling="zscore", memory=Oldest()))
    assert other.image_size == 512 and other.builder["config_file"].endswith("hiera_s.yaml")
    text = " ".join(other.notes)
    assert "sam2.1_hiera_s.yaml" in text and '["++model.image_size=512"]' in text
    assert "scaled by zscore" in text and "Trained with Oldest" in text


@pytest.mark.parametrize("variant", ["tiny", "small", "base_plus", "large"])
def test_every_variant_has_its_configuration(variant, tmp_path):
    model = SAM2(variant, 32, weights=None)
    exporter = EXPORTERS["sam2"].for_model(model)
    assert EXPORTERS["sam2"].accepts(model)
    path = str(Path(build_sam.__file__).parent / exporter.builder["config_file"])
    trunk = yaml.safe_load(Path(path).read_text())["model"]["image_encoder"]["trunk"]
    assert (trunk["embed_dim"], trunk["num_heads"]) == (model.shape.embed_dim, model.shape.num_heads)
    assert tuple(trunk.get("stages", (2, 3, 16, 3))) == model.shape.stages
    if variant in ("tiny", "base_plus"):  # the larger the slower
        exporter.write(model, tmp_path / "x.pt")
        exporter.load(tmp_path / "x.pt")


def test_only_released_shapes_are_taken():
    exporter = EXPORTERS["sam2"]
    small = SAM2(SAM2Shape(embed_dim=16, stages=(1, 1, 2, 1), global_blocks=(3,)), 64, weights=None)
    with pytest.raises(UserError, match=r"variant\.\w+ .* cannot be exported to 'sam2'.* tiny, small, base_plus"):
        exporter.accepts(small)
    assert exporter.accepts(torch.nn.Linear(1, 1)) is False  # type: ignore[arg-type]


def test_neighbours_are_followed_or_else_whatever_there_is(tiny_shards, monkeypatch):
    folder = str(tiny_shards / "test")
    samples = real_samples(folder, 2)
    volume = real_clip(folder, samples)
    assert len(volume.frames) == FRAMES == len({frame.tobytes() for frame in volume.frames})
    assert {frame.shape for frame in volume.frames} == {(48, 40)} and volume.boxes.shape == (1, 4)
    monkeypatch.setattr(gate.views, "clip_starts", lambda index, frames, step: np.zeros(len(index), bool))
    still = real_clip(folder, samples)
    assert len(still.frames) == FRAMES and len({frame.tobytes() for frame in still.frames}) == 2
    assert np.array_equal(still.frames[0], still.frames[2])
    assert torch.equal(still.boxes, samples[0].boxes)


def test_without_the_consumer_the_gate_says_how_to_install_it(run, tmp_path, trainer_command, monkeypatch):
    def version(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr("trainer.export.gate.importlib.metadata.version", version)
    code, _, err = trainer_command(*command(run, tmp_path / "x.pt"))
    assert code == 2 and err.count("\n") == 1
    assert "pip install sam2==1.1.0 (with SAM2_BUILD_CUDA=0" in err


def test_followed_objects_that_are_not_numbers_differ():
    verdict = Verdict(False, "sam2", "0", 1e-6, 1e-3, 1, SIDE, 0.5, 0.5, None, 1e-5, FRAMES)
    assert (verdict.worst, verdict.difference) == ("logits of followed objects", 1e-5)
    assert not replace(verdict, max_followed_difference=float("nan")).difference <= 1e-3
    assert replace(verdict, max_logit_difference=1e-4).worst == "logits"
