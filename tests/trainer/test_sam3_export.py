"""A SAM3 in Meta's layout takes its name on disk only when the official builder has loaded all of it and agrees."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from copied_runs import copied
from official_sam3 import SHAPE, SIDE, merges, tiny
from torch import Tensor

from trainer.cli import main
from trainer.export import sam3 as exporting
from trainer.export.gate import Verdict, compare, real_samples
from trainer.export.sam3 import SAM3Exporter
from trainer.models import SAM3
from trainer.models.sam3_names import META_POSITIONS
from trainer.models.weights import sha256_of
from trainer.prompts.concepts import ConceptPrompts
from trainer.restore import restore
from trainer.run import Run

model_builder = pytest.importorskip("sam3.model_builder")
POINTS = "geometry_encoder.points_"


@pytest.fixture(scope="module")
def trained(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a tiny SAM3 after two steps from weights in Meta's layout."""
    folder = tmp_path_factory.mktemp("sam3")
    torch.manual_seed(0)
    torch.save({"model": {f"detector.{name}": tensor for name, tensor in tiny().state_dict().items()}}, folder / "w.pt")
    shape = {**asdict(SHAPE), "global_blocks": list(SHAPE.global_blocks)}
    arguments = {"weights": str(folder / "w.pt"), "image_size": SIDE, "shape": shape}
    shards = {split: str(tiny_shards / split) for split in ("train", "test")}
    content = {
        "seed_everything": 0,
        "model": {
            "class_path": "trainer.modules.SAM3Module",
            "init_args": {"model": {"class_path": "trainer.models.SAM3", "init_args": arguments}},
        },
        "data": {"class_path": "data_shards.datamodule.TripletDataModule", "init_args": {**shards, "batch_size": 2}},
        "trainer": {"default_root_dir": str(folder / "run"), "max_steps": 2, "accelerator": "cpu"},
        "checkpoint": {"every_n_steps": 1},
    }
    (folder / "r.yaml").write_text("# Does it run?\n" + yaml.safe_dump(content))
    assert main(["fit", "-c", str(folder / "r.yaml")]) == 0
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of that run, without its exports."""
    return copied(trained, tmp_path / "run")


@pytest.fixture
def small_builder(monkeypatch):
    """The official builder, whose parts are smaller; it puts them together and loads them itself."""
    monkeypatch.setattr(exporting, "RELEASED", SHAPE)
    monkeypatch.setattr(SAM3Exporter, "image_size", SIDE)
    made: dict[str, Any] = {}

    def part(name: str) -> Callable[..., Any]:
        def make(*arguments: object, **named: object) -> Any:
            if name == "backbone.vision_backbone":  # the first that the builder asks for
                made["model"] = tiny()
            return made["model"].get_submodule(name)

        return make

    for factory, name in (
        ("_create_vision_backbone", "backbone.vision_backbone"),
        ("_create_text_encoder", "backbone.language_backbone"),
        ("_create_vl_backbone", "backbone"),
        ("_create_sam3_transformer", "transformer"),
        ("_create_dot_product_scoring", "dot_prod_scoring"),
        ("_create_segmentation_head", "segmentation_head"),
        ("_create_geometry_encoder", "geometry_encoder"),
    ):
        monkeypatch.setattr(model_builder, factory, part(name))


def command(run: Path, out: Path, *options: object) -> tuple[object, ...]:
    return "export", run, "--to", "sam3", "--out", out, *options


def ask(official: Any, image: Tensor, shown: Any, text: str = "disc") -> dict[str, Any]:
    """The official model's answer to one text; exemplars as it takes them."""
    from sam3.model.data_misc import FindStage

    first = torch.zeros(1, dtype=torch.int64)
    stage = FindStage(first, first, None, None, None, None, None, None)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "pin_memory", lambda self: self)
        encoded = {**official.backbone.forward_image(image), **official.backbone.forward_text([text], device="cpu")}
        answer: dict[str, Any] = official.forward_grounding(encoded, stage, None, shown)
    return answer


def test_the_official_builder_loads_an_export_and_agrees(run, tmp_path, trainer_command, small_builder):
    out = tmp_path / "new/folder/disc.pt"
    code, stdout, err = trainer_command(*command(run, out))
    assert (code, err) == (0, "")
    assert "verified: sam3 0.1.4 loads" in stdout and "confidences and boxes differ by at most" in stdout
    record = json.loads((run / "exports/sam3/export.json").read_text())
    assert record["verified"] is True and record["samples"] == 2
    assert record["sha256"] == sha256_of(out)
    assert 0 < record["max_logit_difference"] <= 1e-5 and 0 < record["max_confidence_difference"] <= 1e-5
    assert record["dsc_run"] == pytest.approx(record["dsc_consumer"], abs=1e-3)
    assert any("--base FILE" in note for note in record["notes"])
    assert json.loads(out.with_name("disc.pt.preprocessing.json").read_text())["scaling"] == "centred"

    # the same by hand, with other input, and by the official loader alone
    official = tiny()
    before = official.state_dict()
    model_builder._load_checkpoint(official, str(out))
    written = torch.load(out, weights_only=True)["model"]
    assert {name.removeprefix("detector.") for name in written} == before.keys()
    assert all(name.startswith("detector.") for name in written)
    assert {tensor.dtype for tensor in written.values()} == {torch.float32, torch.complex64}
    model = restore(Run(run)).model
    assert isinstance(model, SAM3)
    again = SAM3(weights=str(out), image_size=SIDE, shape=SHAPE).state_dict()  # a recipe may begin with it
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    image = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(7))
    theirs = ask(official, image, official._get_dummy_prompt())
    with torch.no_grad():
        ours = model.detect(model.encode(image), ConceptPrompts(torch.tensor([0]), ["disc"]))
    assert (ours.logits[0] - theirs["pred_logits"][..., 0]).abs().max() < 1e-5
    assert ours.masks is not None
    assert (ours.masks.of(0, torch.arange(SHAPE.queries)) - theirs["pred_masks"][0]).abs().max() < 1e-4


def refused(run: Path, out: Path, trainer_command, *options: object) -> str:
    """The one line of an export that is refused; nothing is left."""
    code, _, err = trainer_command(*command(run, out, *options))
    assert code == 2 and err.startswith("trainer: error: ") and err.count("\n") == 1
    assert not list(out.parent.glob(f"*{out.name}*")) and not (run / "exports").exists()
    return str(err)


def test_what_is_missing_or_unknown_or_without_its_prefix_does_not_load(
    run, tmp_path, trainer_command, small_builder, monkeypatch
):
    honest, out = exporting.to_meta, tmp_path / "x.pt"
    lost = "geometry_encoder.cls_embed.weight"
    monkeypatch.setattr(exporting, "to_meta", lambda state: {n: t for n, t in honest(state).items() if n != lost})
    line = refused(run, out, trainer_command)
    assert "sam3 cannot load it" in line and lost in line
    monkeypatch.setattr(exporting, "to_meta", lambda state: {**honest(state), "head.weight": torch.zeros(1)})
    assert "1 unknown (head.weight)" in refused(run, out, trainer_command)
    monkeypatch.setattr(exporting, "to_meta", honest)
    monkeypatch.setattr(exporting, "PREFIX", "")
    assert "sam3 cannot load it" in refused(run, out, trainer_command)


@pytest.mark.parametrize(
    ("which", "what"),
    [
        ("transformer.decoder.layers.#.linear1.weight", "differ by"),
        ("backbone.language_backbone.encoder.transformer.resblocks.#.mlp.c_fc.weight", "differ by"),
    ],
)
def test_swapped_weights_do_not_pass(run, tmp_path, trainer_command, small_builder, monkeypatch, which, what):
    """Every key is there and every shape fits: only the answers can tell."""
    honest = exporting.to_meta

    def swapped(state):
        renamed = honest(state)
        a, b = (which.replace("#", str(i)) for i in (0, 1))
        renamed[a], renamed[b] = renamed[b], renamed[a]
        return renamed

    monkeypatch.setattr(exporting, "to_meta", swapped)
    line = refused(run, tmp_path / "x.pt", trainer_command)
    assert what in line and "nothing was written" in line


def base_of(folder: Path, **changes: Tensor) -> Path:
    """A checkpoint as Meta's: another detector, a tracker, and the tracker's neck in the detector."""
    torch.manual_seed(11)
    state = {f"detector.{name}": tensor for name, tensor in tiny().state_dict().items()}
    state["detector.backbone.vision_backbone.sam2_convs.0.conv_1x1.bias"] = torch.randn(4)
    state["tracker.no_mem_embed"] = torch.randn(1, 1, 4)
    torch.save({"model": {**state, **changes}}, folder / "base.pt")
    return folder / "base.pt"


def test_a_base_brings_the_tracker_and_what_ours_does_not_have(run, tmp_path, trainer_command, small_builder):
    base = base_of(tmp_path)
    code, _, err = trainer_command(*command(run, tmp_path / "x.pt", "--base", base))
    assert (code, err) == (0, "")
    written = torch.load(tmp_path / "x.pt", weights_only=True)["model"]
    theirs = torch.load(base, weights_only=True)["model"]
    assert written.keys() == theirs.keys()
    first, *_, last = written
    assert first.startswith("detector.") and last.startswith("tracker.")
    same = {name for name in written if torch.equal(written[name], theirs[name])}
    copied = {name for name in theirs if "sam2_convs" in name or name.startswith(("tracker.", f"detector.{POINTS}"))}
    assert same == copied | {name for name in theirs if name.endswith("freqs_cis")}
    positions = f"detector.{META_POSITIONS}"
    assert torch.equal(written[positions][:, 0], theirs[positions][:, 0])
    assert not torch.equal(written[positions][:, 1:], theirs[positions][:, 1:])
    record = json.loads((run / "exports/sam3/export.json").read_text())
    assert record["verified"] is True and any("tracker and its neck are those of base.pt" in n for n in record["notes"])


def test_a_base_that_is_none(run, tmp_path, trainer_command, small_builder):
    out = tmp_path / "x.pt"
    assert "no such file" in refused(run, out, trainer_command, "--base", tmp_path / "none.pt")
    bare = tmp_path / "bare.pt"
    torch.save({"model": tiny().state_dict()}, bare)
    assert "detector.backbone" in refused(run, out, trainer_command, "--base", bare)
    wide = base_of(tmp_path, **{f"detector.{POINTS}direct_project.bias": torch.zeros(9)})
    assert "is (9,) and not (32,)" in refused(run, out, trainer_command, "--base", wide)
    state = torch.load(base_of(tmp_path), weights_only=True)["model"]
    torch.save({"model": {n: t for n, t in state.items() if not n.startswith("tracker.")}}, tmp_path / "still.pt")
    assert "has no tracker" in refused(run, out, trainer_command, "--base", tmp_path / "still.pt")


def test_other_exports_take_no_base(run, tmp_path, trainer_command):
    code, _, err = trainer_command("export", run, "--to", "medsam", "--out", tmp_path / "x.pth", "--base", "sam3.pt")
    assert code == 2 and "leave --base out" in err


def test_what_is_written_as_zero_changes_nothing_for_texts_and_boxes():
    """In the official model itself: the class token's position, and the projections of points."""
    from sam3.model.geometry_encoders import Prompt

    torch.manual_seed(3)
    official, image = tiny(), torch.rand(1, 3, SIDE, SIDE)
    labels, shown = torch.ones(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.bool)
    prompts = {
        "text": official._get_dummy_prompt,
        "box": lambda: Prompt(torch.tensor([[[0.5, 0.5, 0.3, 0.2]]]), shown, box_labels=labels),
        "point": lambda: Prompt(
            torch.zeros(0, 1, 4), point_embeddings=torch.tensor([[[0.4, 0.6]]]), point_mask=shown, point_labels=labels
        ),
    }
    before = {name: ask(official, image, make()) for name, make in prompts.items()}
    with torch.no_grad():
        official.get_parameter(META_POSITIONS)[:, 0] = 0
        for name, parameter in official.named_parameters():
            if name.startswith(POINTS):
                parameter.zero_()
    after = {name: ask(official, image, make()) for name, make in prompts.items()}
    for key in ("pred_logits", "pred_boxes", "pred_masks", "semantic_seg", "presence_logit_dec"):
        assert torch.equal(before["text"][key], after["text"][key])
        assert torch.equal(before["box"][key], after["box"][key])
        assert not torch.equal(before["text"][key], before["box"][key])
    assert not torch.equal(before["point"]["pred_logits"], after["point"]["pred_logits"])


def test_points_that_were_learnt_are_written(tmp_path, small_builder):
    model = SAM3(SHAPE, SIDE, weights=None, tokenizer=merges(), points=True)
    SAM3Exporter(base_of(tmp_path)).write(model, tmp_path / "x.pt")
    written = torch.load(tmp_path / "x.pt", weights_only=True)["model"]
    assert model.point_encoder is not None
    for ours, theirs in (("direct", "direct"), ("pool", "pool"), ("position", "pos_enc")):
        name = f"detector.{POINTS}{theirs}_project.weight"
        assert torch.equal(written[name], model.get_parameter(f"point_encoder.{ours}.weight"))


def test_another_input_side_is_compared_at_the_consumers(tmp_path, tiny_shards, small_builder):
    torch.manual_seed(0)
    model = SAM3(SHAPE, 56, weights=None, tokenizer=merges()).eval()
    exporter = SAM3Exporter()
    exporter.write(model, tmp_path / "x.pt")
    verdict = compare(exporter, tmp_path / "x.pt", model, real_samples(str(tiny_shards / "test"), 1))
    assert verdict.verified and verdict.image_size == SIDE


def test_only_the_released_shape_is_taken(run, tmp_path, trainer_command):
    line = refused(run, tmp_path / "x.pt", trainer_command, "--unverified")
    assert "shape.width 32 cannot be exported to 'sam3'" in line and "takes 1024" in line


def test_without_the_byte_pair_merges_the_gate_says_what_to_install(run, tmp_path, trainer_command, monkeypatch):
    monkeypatch.setattr(SAM3Exporter, "also", ("no-such-distribution",))
    line = refused(run, tmp_path / "x.pt", trainer_command)
    assert "pip install sam3==0.1.4 open-clip-torch" in line


def test_whatever_is_not_a_number_differs():
    verdict = Verdict(False, "sam3", "0", 1e-6, 1e-3, 1, SIDE, 0.5, 0.5, 1e-5)
    assert (verdict.worst, verdict.difference) == ("confidences", 1e-5)
    assert not replace(verdict, max_confidence_difference=float("nan")).difference <= 1e-3
    assert not replace(verdict, max_logit_difference=float("nan")).difference <= 1e-3
    assert replace(verdict, max_logit_difference=0.5).worst == "logits"
    assert replace(verdict, max_confidence_difference=None).difference == 1e-6
