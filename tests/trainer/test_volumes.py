"""Objects in three dimensions: linked slices against volumes made by hand, the tracker's real code at a tiny size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from data_shards.batch import TripletBatch
from data_shards.datamodule import TripletDataModule
from data_shards.errors import UserError
from data_shards.scan import write_index
from data_shards.triplet import Provenance, Target, Triplet
from data_shards.writer import ShardWriter
from trainer.callbacks.evaluation import EvaluationRecord
from trainer.callbacks.volumes import LINKED, TRACKED, VolumeRecord
from trainer.models.sam3 import SAM3, SAM3Shape, config_of
from trainer.modules.sam3 import SAM3Module
from trainer.run import read_json
from trainer.volumes import Instances
from trainer.volumes.linking import SliceObjects, distinct, link, overlaps, paint
from trainer.volumes.objects import VolumeObjects, runs, write_volume
from trainer.volumes.tracking import Tracker, tracker_weights

SIZE = (8, 40)


def bar(start: int, stop: int) -> np.ndarray:
    """A mask with some columns inside, so that overlaps can be counted."""
    mask = np.zeros(SIZE, bool)
    mask[:, start:stop] = True
    return mask


def seen(index: int, *bars: tuple[int, int], confidence: tuple[float, ...] = ()) -> SliceObjects:
    masks = np.stack([bar(*ends) for ends in bars]) if bars else np.zeros((0, *SIZE), bool)
    return SliceObjects.encoded(index, masks, np.array(confidence or [0.9] * len(bars)))


def numbers(slices: list[SliceObjects], **settings: Any) -> list[list[int]]:
    return [found.tolist() for found in link(slices, **settings)]


class TestLinking:
    def test_overlap_of_bars(self) -> None:
        one, other = seen(0, (0, 10), (20, 30)), seen(1, (5, 15), (20, 30), (35, 36))
        expected = [[1 / 3, 0, 0], [0, 1, 0]]
        assert overlaps(one.rles, other.rles).tolist() == pytest.approx(np.array(expected))
        assert overlaps(one.rles, ()).shape == (2, 0)

    def test_two_objects_that_never_touch_keep_their_numbers_in_any_order(self) -> None:
        slices = [seen(3, (0, 10), (20, 30)), seen(4, (21, 31), (1, 11)), seen(5, (2, 12), (22, 32))]
        assert numbers(slices) == [[1, 2], [2, 1], [1, 2]]

    def test_the_larger_part_of_one_that_splits_goes_on(self) -> None:
        slices = [seen(0, (0, 20)), seen(1, (0, 8), (9, 20)), seen(2, (0, 8), (9, 20))]
        assert numbers(slices) == [[1], [2, 1], [2, 1]], "11 of 20 columns are more than 8"

    def test_one_ends_and_another_begins(self) -> None:
        assert numbers([seen(0, (0, 10)), seen(1, (9, 19)), seen(2, (10, 20))]) == [[1], [2], [2]]

    def test_pairs_overlap_most_in_sum(self) -> None:
        # the first of the second slice overlaps the second object more, but then nothing is left for the other
        slices = [seen(0, (0, 10), (6, 16)), seen(1, (4, 14), (10, 20))]
        found = overlaps(slices[1].rles, slices[0].rles)
        assert found.round(2).tolist() == [[0.43, 0.67], [0.0, 0.43]]
        assert numbers(slices) == [[1, 2], [1, 2]]
        assert numbers(slices, least_overlap=0.5) == [[1, 2], [2, 3]], "a pair that is too far apart does not count"

    @pytest.mark.parametrize(("gap", "last"), [(0, 2), (1, 2), (2, 1), (3, 1)])
    def test_a_gap_is_bridged_up_to_so_many_slices(self, gap: int, last: int) -> None:
        empty = [seen(0, (0, 10)), seen(1), seen(2), seen(3, (0, 10))]
        assert numbers(empty, gap=gap) == [[1], [], [], [last]]
        missing = [empty[0], empty[3]]
        assert numbers(missing, gap=gap) == [[1], [last]], "slices that are not there are slices without the object"

    def test_the_slice_before_comes_first(self) -> None:
        # both could be what is seen last: the one that was there in the slice before is
        slices = [seen(0, (0, 10)), seen(1, (3, 13)), seen(2, (0, 10))]
        assert numbers([seen(0, (0, 10)), seen(1, (20, 30)), seen(2, (20, 30), (0, 10))]) == [[1], [2], [2, 1]]
        assert numbers(slices) == [[1], [1], [1]]

    def test_below_the_least_overlap_nothing_is_linked(self) -> None:
        slices = [seen(0, (0, 10)), seen(1, (5, 15))]
        assert numbers(slices, least_overlap=1 / 3 - 1e-6) == [[1], [1]]
        assert numbers(slices, least_overlap=1 / 3 + 1e-6) == [[1], [2]]

    def test_short_objects_are_dropped_if_asked(self) -> None:
        slices = [seen(0, (0, 10), (20, 30)), seen(1, (20, 30)), seen(2, (20, 30), (33, 35))]
        assert numbers(slices) == [[1, 2], [2], [2, 3]]
        assert numbers(slices, min_slices=2) == [[0, 1], [1], [1, 0]]

    def test_nothing_at_all(self) -> None:
        assert numbers([seen(0), seen(1)]) == [[], []] and numbers([]) == []

    def test_of_two_answers_for_one_object_the_more_confident_stays(self) -> None:
        found = seen(0, (0, 10), (1, 10), (20, 30), (5, 5), confidence=(0.6, 0.8, 0.7, 0.99))
        assert distinct(found, 0.5) == [1, 2], "the first is the second once more, and the last is empty"
        assert distinct(found, 0.95) == [1, 2, 0]

    def test_the_most_confident_object_is_seen(self) -> None:
        found = seen(0, (0, 10), (5, 15), (30, 40), confidence=(0.9, 0.6, 0.8))
        assert paint(found, np.array([4, 7, 0]), SIZE)[0].tolist() == [4] * 10 + [7] * 5 + [0] * 25


class TestObjects:
    def test_labels_are_the_masks(self) -> None:
        slices = [seen(0, (0, 10), confidence=(0.5,)), seen(1, (0, 10), (20, 22), confidence=(0.7, 0.9))]
        objects = VolumeObjects.of(slices, link(slices), SIZE)
        assert objects.labels.dtype == np.uint8 and objects.labels.shape == (2, *SIZE)
        assert np.array_equal(objects.labels[0], bar(0, 10))
        assert np.array_equal(objects.labels[1], bar(0, 10) + 2 * bar(20, 22))
        assert objects.confidence.tolist() == pytest.approx([0.6, 0.9])
        assert objects.describe((5.0, 1.0, 0.5)) == {"objects": 2, "voxels": 176, "ml": 0.44}
        assert objects.describe((np.nan, 1.0, 1.0))["ml"] is None

    def test_many_objects_take_wider_numbers(self) -> None:
        slices = [seen(index, (0, 1)) for index in range(0, 900, 3)]
        labels = VolumeObjects.of(slices, link(slices), SIZE).labels
        assert labels.dtype == np.uint16 and labels.max() == 300

    def test_nothing_found(self) -> None:
        objects = VolumeObjects.of([seen(0)], link([seen(0)]), SIZE)
        assert objects.labels.shape == (1, *SIZE) and not objects.labels.any() and objects.confidence.shape == (0,)

    def test_slices_are_cut_where_too_many_are_missing(self) -> None:
        assert runs([1, 2, 4, 7, 8], 1) == [[1, 2, 4], [7, 8]]
        assert runs([1, 2, 4, 7, 8], 0) == [[1, 2], [4], [7, 8]]
        assert runs([3], 1) == [[3]]

    def test_the_file_needs_no_pickle(self, tmp_path: Path) -> None:
        slices = [seen(4, (0, 10)), seen(6, (0, 10))]
        objects = VolumeObjects.of(slices, link(slices), SIZE)
        write_volume(tmp_path / "a-b.npz", {"left/right kidney": objects}, [4, 6], (2.0, np.nan, np.nan), "axial")
        with np.load(tmp_path / "a-b.npz", allow_pickle=False) as content:
            assert content["terms"].tolist() == ["left/right kidney"] and str(content["axis"]) == "axial"
            assert content["slice_index"].tolist() == [4, 6] and content["spacing"][0] == 2
            assert np.array_equal(content["labels_0"], objects.labels)
        assert [path.name for path in tmp_path.iterdir()] == ["a-b.npz"]


SHAPE = SAM3Shape(
    width=32, depth=2, heads=2, mlp=64, global_blocks=(1,), window=4, pretrained_size=56,
    text_width=32, text_depth=1, text_heads=2, text_mlp=64, context=8,
    hidden=128, hidden_heads=4, hidden_mlp=64, geometry_layers=1, encoder_layers=1, decoder_layers=2, queries=5,
)  # fmt: skip
"""The tracker's own code asks for a multiple of 64 channels, and for more than 64."""
SIDE = 112


def tokens_of(texts: Any) -> tuple[Tensor, Tensor]:
    """Tokens without a vocabulary."""
    rows = [([49406] + [ord(letter) for letter in text[:5]] + [49407] + [0] * 8)[:8] for text in texts]
    tokens = torch.tensor(rows)
    return tokens, tokens != 0


words: Any = tokens_of


def video_folder(folder: Path) -> Path:
    """Weights of a tiny Sam3VideoModel, as transformers saves them."""
    from transformers import Sam3VideoConfig, Sam3VideoModel

    detector = config_of(SHAPE, SIDE)
    wide, few = SHAPE.hidden, 64
    config = Sam3VideoConfig(
        detector_config=detector,
        tracker_config={
            "vision_config": detector.vision_config.to_dict(),
            "prompt_encoder_config": {"hidden_size": wide, "mask_input_channels": 4},
            "mask_decoder_config": {
                "hidden_size": wide, "mlp_dim": few, "num_attention_heads": 4, "iou_head_hidden_dim": few,
            },
            "memory_attention_hidden_size": wide,
            "memory_attention_num_layers": 1,
            "memory_attention_feed_forward_hidden_size": few,
            "memory_encoder_hidden_size": wide,
            "mask_downsampler_embed_dim": wide,
            "memory_fuser_num_layers": 1,
            "memory_fuser_embed_dim": wide,
            "memory_fuser_intermediate_dim": few,
            "memory_attention_rope_feat_sizes": [8, 8],
        },
    )  # fmt: skip
    config.image_size = SIDE
    torch.manual_seed(0)
    Sam3VideoModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return video_folder(tmp_path_factory.mktemp("video") / "weights")


@pytest.fixture(scope="module")
def detector(weights: Path) -> SAM3:
    model = SAM3(SHAPE, SIDE, weights=str(weights)).eval()
    model._tokenizer = words
    return model


def slices_of(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 255, (1, 30, 44), dtype=torch.uint8, generator=generator) for _ in range(count)]


class TestTracker:
    def test_the_detector_is_ours_and_every_weight_of_the_tracker_arrived(self, detector: SAM3, weights: Path) -> None:
        from safetensors.torch import load_file

        state, why = tracker_weights(str(weights))
        assert not why
        tracker = Tracker(detector, state, str(weights), 0.5, 0.7)
        assert tracker.video.detector_model.model is detector
        stored = load_file(weights / "model.safetensors")
        for name in ("tracker_model", "tracker_neck"):
            own = getattr(tracker.video, name).state_dict()
            twice = f"{name}." * (2 if f"{name}.{name}" in " ".join(stored) else 1)  # as transformers 5.23 writes it
            assert len(own) == sum(key.startswith(twice) for key in stored)
            assert all(torch.equal(own[key], stored[twice + key]) for key in own)

    def test_it_runs_from_end_to_end(self, detector: SAM3, weights: Path) -> None:
        images = slices_of(4)
        tracker = Tracker(detector, tracker_weights(str(weights))[0], str(weights), 0.0, 0.0)
        found = tracker.track([3, 4, 5, 7], images.__getitem__, {"liver": "liver", "spleen": "a spleen"})
        assert list(found) == ["liver", "spleen"]
        for term in found.values():
            assert [objects.index for objects in term.slices] == [3, 4, 5, 7]
            assert all(len(o.rles) == len(n) for o, n in zip(term.slices, term.numbers, strict=True))
            assert all(tuple(rle["size"]) == (30, 44) for objects in term.slices for rle in objects.rles)
        first = set(found["liver"].numbers[0].tolist())
        assert first and first <= set(found["liver"].numbers[3].tolist()), "what began is followed to the end"
        everything = [set(np.concatenate(term.numbers).tolist()) for term in found.values()]
        assert not everything[0] & everything[1], "an object belongs to one term"

    def test_the_first_slice_is_what_the_detector_says(self, detector: SAM3, weights: Path) -> None:
        from trainer.prompts.concepts import ConceptPrompts

        images = slices_of(2)
        tracker = Tracker(detector, tracker_weights(str(weights))[0], str(weights), 0.0, 0.0)
        found = tracker.track([0, 1], images.__getitem__, {"liver": "liver"})["liver"].slices[0]
        with torch.no_grad():
            pixels = detector.preprocessing.images(images[:1])
            asked = ConceptPrompts(torch.zeros(1, dtype=torch.int64), ["liver"])
            answer = detector.detect(detector.encode(pixels), asked)
        assert answer.masks is not None
        masks = detector.preprocessing.to_native(answer.masks.of(0, torch.arange(SHAPE.queries)), 30, 44) > 0
        alone = SliceObjects.encoded(0, masks.numpy(), answer.confidence[0].numpy())
        kept = alone.subset(distinct(alone, 0.1))
        assert sorted(found.confidences) == pytest.approx(sorted(kept.confidences.tolist()), abs=1e-5)

    def test_nothing_is_found_below_the_threshold(self, detector: SAM3, weights: Path) -> None:
        tracker = Tracker(detector, tracker_weights(str(weights))[0], str(weights), 0.999, 0.0)
        found = tracker.track([0, 1, 2], slices_of(3).__getitem__, {"liver": "liver"})["liver"]
        assert [len(objects.rles) for objects in found.slices] == [0, 0, 0]

    def test_weights_without_a_tracker_say_so(self, detector: SAM3, tmp_path: Path) -> None:
        torch.save({"model": {"detector.a": torch.zeros(1), "tracker.b": torch.zeros(1)}}, tmp_path / "meta.pt")
        assert "Meta's layout" in tracker_weights(str(tmp_path / "meta.pt"))[1]
        torch.save({"a": torch.zeros(1)}, tmp_path / "none.pt")
        assert tracker_weights(str(tmp_path / "none.pt")) == (
            {},
            f"{tmp_path / 'none.pt'} holds no tracker (no tracker_model.*)",
        )

    def test_a_weight_that_is_missing_is_an_error(self, detector: SAM3, weights: Path) -> None:
        state = tracker_weights(str(weights))[0]
        gone = next(key for key in state if key.startswith("tracker_neck."))
        with pytest.raises(UserError, match="1 missing"):
            Tracker(detector, {key: v for key, v in state.items() if key != gone}, str(weights), 0.5, 0.7)


class Told(SAM3Module):
    """Finds what is as bright as its term says, whatever else it learnt."""

    asked: ClassVar[list[tuple[str, str]]] = []

    def instances(self, batch: TripletBatch, terms: Sequence[Sequence[str]]) -> list[Instances]:
        found = []
        for image, some in enumerate(terms):
            for term in some:
                self.asked.append((batch.keys[image], term))
                mask = batch.images[image] == {"bright": 100, "brighter": 200}[term]
                there = mask[mask.any(dim=(1, 2))]
                twice = torch.cat([there, there])  # duplicates, as a detector may give them
                found.append(Instances(image, term, twice, torch.linspace(0.9, 0.8, len(twice))))
        return found


SLICES = {"a": {0: 100, 1: 100, 2: 100, 3: 0, 4: 100}, "b": {5: 200, 6: 200, 9: 200}}
"""By volume and slice, what its object is as bright as."""


def sample_of(volume: str, index: int, bright: int, **more: Any) -> Triplet:
    image = np.zeros((30, 44), np.uint8)
    image[5:20, 4 + index : 24 + index] = bright
    term = {100: "bright", 200: "brighter"}.get(bright)
    targets = (Target.from_mask(image, term),) if term else ()
    origin = Provenance(
        "toy set", f"p{volume}", f"v{volume}", "CT", "0" * 64, axis="axial", slice_index=index, spacing=(0.5, 2.0),
        slice_spacing=3.0 if volume == "a" else None, **more,
    )  # fmt: skip
    return Triplet(f"{volume}-a{index:05d}", image, targets, (), origin)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slices") / "test"
    samples = [sample_of(volume, *one) for volume, slices in SLICES.items() for one in slices.items()]
    samples.append(replace(sample_of("c", 0, 0), key="c-a00000"))
    plain = replace(samples[0].provenance, volume="plain", slice_index=None, axis="")
    samples.append(replace(samples[0], key="plain", provenance=plain))
    with ShardWriter(folder, 50, 2**20) as writer:
        for sample in samples:
            writer.write(sample.key, sample.encode())
    write_index(folder)
    return folder


def predict(
    shards: Path,
    root: Path,
    module: SAM3Module,
    record: VolumeRecord,
    ranks: int = 1,
    test: bool = False,
    precision: Any = "32-true",
) -> None:
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp_fork" if ranks > 1 else "auto",
        default_root_dir=str(root),
        precision=precision,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[record, *([EvaluationRecord()] if test else [])],
    )
    data = TripletDataModule(test=str(shards), micro_batch_size=3, batch_size=3)
    if test:
        trainer.test(module, datamodule=data, verbose=False)
    else:
        trainer.predict(module, datamodule=data, return_predictions=False)


def told() -> Told:
    module = Told(SAM3(SHAPE, SIDE, weights=None))
    module.model._tokenizer = words
    Told.asked.clear()
    return module


def content_of(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as content:
        return {name: content[name] for name in content}


class TestVolumeRecord:
    def test_slices_become_objects(self, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        predict(shards, tmp_path, told(), VolumeRecord())
        folder = tmp_path / "volumes"
        assert sorted(path.name for path in folder.iterdir()) == ["toy_set-va.npz", "toy_set-vb.npz", "volumes.json"]
        first = content_of(folder / "toy_set-va.npz")
        assert first["terms"].tolist() == ["bright"] and first["slice_index"].tolist() == [0, 1, 2, 3, 4]
        assert first["spacing"].tolist() == [3, 0.5, 2] and first["labels_0"].dtype == np.uint8
        expected = np.stack([sample_of("a", *one).image == 100 for one in SLICES["a"].items()])
        assert np.array_equal(first["labels_0"], expected), "one object, through the slice that lacks it"
        assert first["confidence_0"] == pytest.approx([0.9])
        second = content_of(folder / "toy_set-vb.npz")["labels_0"]
        assert [sorted(set(labels.ravel().tolist()) - {0}) for labels in second] == [[1], [1], [2]], "two are missing"
        summary = read_json(folder / "volumes.json")
        assert summary["method"] == LINKED and "random" in summary["why"] and summary["settings"]["threshold"] == 0.5
        va, vb, vc = summary["volumes"]
        assert va["method"] == LINKED and va["terms"] == {"bright": {"objects": 1, "voxels": 1200, "ml": 3.6}}
        assert vb["missing_slices"] == 2 and vb["terms"]["brighter"] == {"objects": 2, "voxels": 900, "ml": None}
        assert "no term to ask for" in vc["left_out"] and summary["images_without_a_slice"] == 1
        shown = capsys.readouterr().out
        assert f"volumes: {LINKED}: the model's weights are random" in shown
        assert "3 objects in 2 volumes" in shown and "toy set vc is left out" in shown

    def test_a_slice_without_the_target_is_asked_too(self, shards: Path, tmp_path: Path) -> None:
        predict(shards, tmp_path, told(), VolumeRecord())
        assert ("a-a00003", "bright") in Told.asked and ("a-a00003", "brighter") not in Told.asked
        predict(shards, tmp_path, told(), VolumeRecord(terms=["brighter"]))
        assert {term for _, term in Told.asked} == {"brighter"} and ("c-a00000", "brighter") in Told.asked

    def test_settings_reach_the_linking(self, shards: Path, tmp_path: Path) -> None:
        predict(shards, tmp_path, told(), VolumeRecord(gap=0, min_slices=3))
        labels = content_of(tmp_path / "volumes" / "toy_set-va.npz")["labels_0"]
        assert labels.reshape(5, -1).max(axis=1).tolist() == [1, 1, 1, 0, 0], "the last slice alone is too short"

    def test_two_ranks_write_what_one_does(self, shards: Path, tmp_path: Path) -> None:
        if torch.cuda.is_initialized():
            pytest.skip("ranks are forked, which CUDA does not allow once it is in use")
        predict(shards, tmp_path / "one", told(), VolumeRecord())
        predict(shards, tmp_path / "two", told(), VolumeRecord(), ranks=2)
        one, two = (sorted((tmp_path / name / "volumes").iterdir()) for name in ("one", "two"))
        assert [path.name for path in one] == [path.name for path in two]
        for mine, other in zip(one[:-1], two[:-1], strict=True):
            first, second = content_of(mine), content_of(other)
            assert all(np.array_equal(first[name], second[name], equal_nan=name == "spacing") for name in first)
        assert one[-1].read_bytes() == two[-1].read_bytes()

    def test_an_evaluation_keeps_its_own(self, shards: Path, tmp_path: Path) -> None:
        predict(shards, tmp_path, told(), VolumeRecord(), test=True)
        assert (tmp_path / "evaluation" / "untouched" / "volumes" / "toy_set-va.npz").is_file()

    def test_where_there_is_a_tracker_it_is_used(
        self, shards: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        module = SAM3Module(SAM3(SHAPE, SIDE, weights=str(weights)), threshold=0.0)
        module.model._tokenizer = words
        predict(shards, tmp_path, module, VolumeRecord(begin=0.0))
        summary = read_json(tmp_path / "volumes" / "volumes.json")
        assert summary["method"] == TRACKED and [volume["method"] for volume in summary["volumes"]] == [TRACKED] * 3
        assert f"volumes: {TRACKED}: {weights} holds the tracker" in capsys.readouterr().out
        labels = content_of(tmp_path / "volumes" / "toy_set-vb.npz")["labels_0"]
        apart = {*labels[:2].ravel().tolist()} & {*labels[2].ravel().tolist()}
        assert labels.shape == (3, 30, 44) and labels.any() and apart <= {0}, "nothing is followed over a wide gap"
        predict(shards, tmp_path / "linked", module, VolumeRecord(method="link"))
        assert read_json(tmp_path / "linked" / "volumes" / "volumes.json")["why"] == "the recipe says so"

    def test_a_tracker_of_its_own_in_mixed_precision(self, shards: Path, weights: Path, tmp_path: Path) -> None:
        module = SAM3Module(SAM3(SHAPE, SIDE, weights=None), threshold=0.0)
        module.model._tokenizer = words
        predict(shards, tmp_path, module, VolumeRecord(tracker=str(weights), begin=0.0), precision="bf16-mixed")
        assert read_json(tmp_path / "volumes" / "volumes.json")["method"] == TRACKED

    def test_windows_and_odd_slices_are_left_out_by_name(self, tmp_path: Path) -> None:
        samples = [sample_of("a", index, 100, patch=(0, index)) for index in range(2)]
        samples += [sample_of("b", 0, 200), sample_of("b", 1, 200)]
        samples[3] = replace(samples[3], image=samples[3].image[:20], targets=())
        with ShardWriter(tmp_path / "test", 50, 2**20) as writer:
            for sample in samples:
                writer.write(sample.key, sample.encode())
        write_index(tmp_path / "test")
        predict(tmp_path / "test", tmp_path / "run", told(), VolumeRecord())
        why = [volume["left_out"] for volume in read_json(tmp_path / "run/volumes/volumes.json")["volumes"]]
        assert why == ["its samples are windows of slices", "its slices have different sizes"]

    @pytest.mark.parametrize(
        ("make", "complaint"),
        [
            (lambda: VolumeRecord(gap=-1), "gap is 0 or more"),
            (lambda: VolumeRecord(least_overlap=0), "least_overlap above 0"),
            (lambda: VolumeRecord(terms=[]), "terms null or at least one"),
            (lambda: VolumeRecord(method="link", tracker="x"), "takes no tracker"),
        ],
    )
    def test_mistakes_are_one_line(self, make: Any, complaint: str) -> None:
        with pytest.raises(UserError, match=complaint):
            make()

    def test_tracking_without_a_tracker_is_refused(self, shards: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="weights are random: no tracker comes with them"):
            predict(shards, tmp_path, told(), VolumeRecord(method="track"))
