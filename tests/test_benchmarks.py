from __future__ import annotations

import ast
import importlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("nilearn", reason="the benchmarks read a volume that it carries")

FOLDER = Path(__file__).parents[1] / "benchmarks"
# what benchmarks are made with, their page, and a GPU's run of them
SHARED = {"measuring.py", "racing.py", "rendering.py", "steps.py", "suite.py"}
NAMES = sorted(path.name for path in FOLDER.glob("*.py") if path.name not in SHARED)
Check = Callable[[dict[str, Any]], bool]


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / name), *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def strictly(text: str) -> dict[str, Any]:
    """Read JSON that has no NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def documented(name: str) -> set[str]:
    """The keys that a benchmark's docstring lists for its last line."""
    doc = ast.get_docstring(ast.parse((FOLDER / name).read_text())) or ""
    table = doc.partition("The last line is one JSON object:\n")[2].split("\n\n")[0]
    rows = re.findall(r"^  ([a-z]\w*(?:, [a-z]\w*)*) ", table, re.MULTILINE)
    return {key for row in rows for key in row.split(", ")}


@pytest.mark.parametrize("name", NAMES)
def test_help_tells_what_is_printed(name: str, monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:  # in this process, where torch is imported already
        runpy.run_path(str(FOLDER / name), run_name="__main__")
    assert not ended.value.code
    told = capsys.readouterr().out
    assert "--quick" in told and "The last line is one JSON object:" in told
    assert {"benchmark", "quick"} <= documented(name)


def positive(values: Any) -> bool:
    """Whether every number inside is above 0."""
    if isinstance(values, dict):
        return all(map(positive, values.values()))
    if isinstance(values, list):
        return all(map(positive, values))
    return values is None or isinstance(values, str) or values > 0


def samples_are_sane(found: dict[str, Any]) -> bool:
    sizes = found["kilobytes_per_sample"]
    return (
        positive(found["encoded_per_second"])
        and found["targets_per_sample"] == 3.4
        and 100 < sizes["png"] < 170  # neither too smooth nor mere noise
        and sizes["png"] < sizes["zstd"] < 262
        and sizes["png_1024"] > 3 * sizes["png"]
    )


def readers_are_sane(readers: dict[str, Any], count: int) -> bool:
    own, others = readers["data_shards"], {name: row for name, row in readers.items() if name != "data_shards"}
    return (
        own["unique_after_resume"] == count
        and own["delivered_over_3_ranks"] == [count // 3] * 3
        and own["slower_than_ours"] == {"png": 1, "zstd": 1}
        and others.keys() == {"webdataset", "torchdata", "litdata"}
        and all(row is None or sum(row["delivered_over_3_ranks"]) == count for row in others.values())
        and all(row is None or len(set(row["delivered_over_3_ranks"])) > 1 for row in others.values())
        and all(row is None or count * 0.6 <= row["unique_after_resume"] <= count for row in others.values())
        and positive(readers)
    )


def alone_is_sane(found: dict[str, Any]) -> bool:
    return found["samples"] == 48 and readers_are_sane(found["readers"], 48)


def loader_is_sane(found: dict[str, Any]) -> bool:
    rates, speed = found["samples_per_second"], found["bar"]["samples_per_second_per_core"]
    return (
        positive(rates)
        and found["ratio_to_png_1024"]["zstd"] > found["ratio_to_png_1024"]["png"] > 2
        and found["ratio_to_png_1024"]["png"]
        == pytest.approx(rates["png"]["loader"] / rates["png_1024"]["loader"], rel=0.01)
        and found["ratio_to_reference"]["png"] > 2
        and found["ratio"] == found["ratio_to_reference"]["zstd"]
        and speed == rates["zstd"]["loader"]
        and found["bar"]["met"] is (speed >= 1000)
        and all(0 <= share < 1 for share in found["wait_share"].values())
        and found["wait_bar"]["met"] is (found["wait_share"]["30"] < 0.01)
        and found["content"]["targets_per_sample"] == 3.4
        and readers_are_sane(found["readers"], found["samples"]["native"])
    )


def decoders_are_sane(found: dict[str, Any]) -> bool:
    rates, damaged = found["samples_per_second"], found["damaged"]
    return (
        rates.keys() == found["ratios"].keys() == {"png_grey", "png_rgb", "jpeg_grey", "jpeg_rgb", "zstd_grey"}
        and positive(rates)
        and rates["zstd_grey"]["ours"] > rates["png_grey"]["ours"] > rates["png_rgb"]["ours"]
        and 0.3 < found["ratio"] < 3
        and all(
            row["files"] == sum(row[end] for end in ("read", "refused", "crashed")) == 3 for row in rows_of(damaged)
        )
        and all(damaged[form]["ours"]["crashed"] == damaged[form]["ours"]["lines"] == 0 for form in ("png", "jpeg"))
        and found["bar"] == {"crashes": 0, "needed": 0, "met": True}
    )


def rows_of(table: dict[str, dict[str, Any]]) -> list[Any]:
    return [row for part in table.values() for row in part.values()]


def index_is_sane(found: dict[str, Any]) -> bool:
    return (
        (found["samples"], found["targets"], found["shards"]) == (3000, 10200, 3)
        and found["first_batch_seconds"] > found["first_batch_without_imports_seconds"] > found["open_seconds"] > 0
        and found["getitem_us"] > found["read_us"] > found["row_us"] > 0
        and found["rss_mb"] > 0 < found["file_mb"]
        and all(item["met"] is (item["value"] < item["needed"]) for item in found["bar"].values())
        and found["bar"].keys() == {"open_seconds", "rss_mb", "first_batch_seconds"}
        and positive(found["weighted_seconds"])
        and found["ratio"] == pytest.approx(found["tar_seconds"] / found["open_seconds"], rel=0.01)
    )


def shards_are_sane(found: dict[str, Any]) -> bool:
    return (
        positive(found["built_per_second"])
        and 0 < found["slices"] <= 60
        and found["read_per_second"]["zstd"] > found["read_per_second"]["png"] > 0
        and positive(found["megabytes"])
    )


def pairs_is_sane(found: dict[str, Any]) -> bool:
    rates, packing = found["pairs_per_second"], found["packing"]
    return (
        positive([rates, packing, found["lowest"]])
        and (found["images"], found["masks"], found["image_size"]) == (5, 17, 64)
        and max(found["loss_difference"], found["gradient_difference"]) < 1e-4
        and found["ratio"] == pytest.approx(rates["ours"] / rates["reference"], rel=0.01)
        and found["lowest"] == found["highest"] == found["ratio"] > 1
        and found["bar"] == {"needed": 2.8, "met": found["ratio"] >= 2.8}
        and packing["ratio"] == pytest.approx(packing["packed"] / packing["single"], rel=0.01)
        and 1.3 < packing["ratio"] < 5
    )


def rows_are_sane(found: dict[str, Any]) -> bool:
    """What the step benchmarks have alike, on a CPU."""
    best = max((row for row in found["rows"] if row["ratio"]), key=lambda row: row["precision"] == "fp32")
    return (
        all(row["images_per_second"] > 0 < row["tflops"] and 0 < row["mfu"] < 2 for row in found["rows"])
        and all(row["peak_gib"] is row["reference_peak_gib"] is None for row in found["rows"])
        and all(row["lowest"] <= row["ratio"] <= row["highest"] for row in found["rows"] if row["ratio"])
        and best["ratio"] == found["ratio"]
        and found["headline"] == f"{best['way']}, {best['precision']}, {best['images']} × {best['masks']}"
        and found["bar"] == {"needed": 1.0, "met": found["ratio"] >= 1}
        and found["left_out"] == []
    )


def step_medsam_is_sane(found: dict[str, Any]) -> bool:
    rows = found["rows"]
    return (
        rows_are_sane(found)
        and found["image_size"] == 64
        and [(row["precision"], row["images"], row["masks"]) for row in rows] == [("fp32", 1, 1), ("bf16", 1, 1)]
        and max(found["loss_difference"], found["gradient_difference"]) < 1e-4
        and all(row["ratio"] == pytest.approx(row["images_per_second"] / row["reference"], rel=0.01) for row in rows)
    )


def step_sam2_is_sane(found: dict[str, Any]) -> bool:
    return (
        rows_are_sane(found)
        and [(row["way"], row["precision"]) for row in found["rows"]] == [("tiny", "fp32")]
        and max(found["loss_difference"], found["gradient_difference"]) < 1e-4
    )


def overhead_is_sane(found: dict[str, Any]) -> bool:
    return (
        positive(found["step_ms"])
        and (found["image_size"], found["batch"], found["steps"]) == (64, 1, 3)
        and found["loss_difference"] < 1e-4
        and -1 < found["overhead"] < 3
        and found["ratio"] == pytest.approx(1 / (1 + found["overhead"]), rel=0.01)
        and found["bar"]["value"] == found["overhead"]
        and found["bar"]["met"] == (found["overhead"] <= found["bar"]["needed"] == 0.03)
    )


def sam2_memory_is_sane(found: dict[str, Any]) -> bool:
    (volume,) = found["volumes"]
    return (
        found["steps"] == 4
        and positive([found["seconds"], found["parameters"]])
        and (volume["name"], volume["objects"]) == ("drifting 2, axial", 2)
        and 0.6 < volume["copied"] < 0.75
        and all(0 <= volume[name] < 1 for name in ("start", "learnt"))
    )


def step_sam3_is_sane(found: dict[str, Any]) -> bool:
    return (
        (found["images"], found["prompts"], found["image_size"]) == (2, 2, 112)
        and found["images_per_second"].keys() == found["peak_gib"].keys() == {"recomputed", "kept"}
        and positive(found["images_per_second"])
        and None not in found["images_per_second"].values()
        and [row["way"] for row in found["rows"]] == ["recomputed", "kept"]
        and rows_are_sane(found)
        and found["difference"] < 1e-2
        and 1e6 < found["parameters"] < 1e7
    )


def matcher_is_sane(found: dict[str, Any]) -> bool:
    rows = {str(number) for number in found["targets"]}
    syncs = found["syncs"]["10"]
    per_layer = 2 * 3 * found["layers"] - 2  # of each layer counts, costs and indices; of the one-to-many layer one
    per_image = 2 * 3 * (2 * found["layers"] - 1) + 3  # of each of three prompts costs and indices
    return (
        rows == found["milliseconds"].keys() == found["syncs"].keys() == found["ratios"].keys() == found["share"].keys()
        and positive(found["milliseconds"])
        and syncs["batched"] == 1 == found["loss_syncs"]["10"]
        and (found["counted"] != "calls" or (syncs["per_layer"], syncs["per_image"]) == (per_layer, per_image))
        and found["bar"] == {"value": 1, "needed": 1, "met": True}
        and found["ratios"]["10"]
        == pytest.approx(found["milliseconds"]["10"]["per_image"] / found["milliseconds"]["10"]["batched"], rel=0.01)
        and found["ratio"] == pytest.approx((found["ratios"]["1"] * found["ratios"]["10"]) ** 0.5, rel=0.01)
        and found["step_ms"] == pytest.approx(1000 * found["prompts"] / 4 * 18.2 / found["matmul_tflops"], rel=0.01)
        and found["share"]["10"]
        == pytest.approx(found["milliseconds"]["10"]["batched"] / found["step_ms"], rel=0.01)
        == found["share_bar"]["share"]
        and found["share_bar"]["met"] is (found["share"]["10"] < 0.01)
    )


def checkpoint_is_sane(found: dict[str, Any]) -> bool:
    forms, ways = {"file", "folder"}, {"blocking", "background"}
    stops = found["stop_seconds"]
    return (
        (found["megabytes"], found["rounds"]) == (30, 1)
        and all(found[key].keys() == forms for key in ("step_ms", "ratios", "first_seconds"))
        and all(found[f"{key}_seconds"].keys() == forms for key in ("stop", "lost", "complete"))
        and all(found[f"{key}_seconds"][form].keys() == ways for key in ("stop", "lost", "complete") for form in forms)
        and all(found["complete_seconds"][form][way] > 0 for form in forms for way in ways)
        and positive(stops)
        and positive([found["sha256_seconds"], found["plain_seconds"], found["step_ms"], found["first_seconds"]])
        and all(
            found["ratios"][form] == pytest.approx(stops[form]["blocking"] / stops[form]["background"], rel=0.01)
            for form in forms
        )
        and found["ratio"] == min(found["ratios"].values())
        and found["bar"] == {"needed": 1, "met": found["ratio"] > 1}
    )


def ablation_is_sane(found: dict[str, Any]) -> bool:
    untouched, full = found["rows"]
    return (
        (untouched["cell"], full["cell"]) == ("untouched", "full")
        and untouched["learning"] == 0 < full["learning"]
        and all(0 <= row[metric] <= 1 for row in found["rows"] for metric in ("dsc", "nsd"))
        and full["difference"] is full["p_holm"] is None
        and 0 < untouched["p_holm"] <= 1
        and min(*found["images"].values(), found["targets"], found["seconds"]) > 0
    )


def metrics_is_sane(found: dict[str, Any]) -> bool:
    ours, theirs = (found["milliseconds"][name] for name in ("ours", "surface_distance"))
    return (
        positive(found["milliseconds"])
        and found["difference"]["surface_distance"] < 1e-12
        and found["difference"]["monai"] < 1e-6
        and found["ratio"] == pytest.approx(theirs / ours, rel=1e-2)
        and found["bar"] == {"least": 5.0, "met": found["ratio"] >= 5}
        and (found["side"], found["pairs"]) == (256, 2)
    )


def exports_are_sane(found: dict[str, Any]) -> bool:
    held = [(row["family"], row["format"]) for row in found["rows"]]
    return (
        held == [("litemedsam", "litemedsam"), ("medsam", "peft"), ("medsam", "transformers")]
        and all(row["ended"] is None and 0 <= row["largest_difference"] < 1e-3 for row in found["rows"])
        and all(row["megabytes"] > 1 and row["consumer"] for row in found["rows"])
    )


def projection_is_sane(found: dict[str, Any]) -> bool:
    """What is reckoned for DDP on 1,000 GPUs, in other words."""
    size, ways = found["counted"]["MedSAM ViT-B"], found["projected"]["MedSAM ViT-B"]
    compute = 4 * 2.831 / (989 * 0.35)
    ring = 2 * 0.999 * 4 * 93_596_640 / (0.75 * 8 * 50e9)  # the cards of a node are slower together than its NVLink
    tree = 15 * 2 * (7 * 6e-6 + 7 * 2e-6)  # 15 buckets, 2^7 nodes, 8 GPUs in each
    step = compute + (ring + tree) / 15  # all but the last bucket hides
    efficiencies = [way[gpus]["efficiency"] for way in ways.values() for gpus in ("8", "64", "256", "1000")]
    return (
        size == {"parameters": 93735728, "trainable": 93596640, "groups": 13, "tflop_per_image": 2.831}
        and ways.keys() == {"ddp", "fsdp2", "hsdp"}
        and ways["ddp"]["1000"]["step_seconds"] == pytest.approx(step, rel=2e-3)
        and ways["ddp"]["1000"]["efficiency"] == pytest.approx(compute / step, rel=2e-3)
        and all(0 < efficiency < 1 for efficiency in efficiencies)
        and ways["fsdp2"]["1000"]["efficiency"] < ways["hsdp"]["1000"]["efficiency"]  # a ring of 1,000 takes its time
    )


def scaling_is_sane(found: dict[str, Any]) -> bool:
    weak, strong, wire = (found[key] for key in ("weak", "strong", "wire"))
    one, two = weak["ddp"]["1"], weak["ddp"]["2"]
    return (
        projection_is_sane(found)
        and positive([weak, strong, wire])
        and all(table.keys() == {"ddp", "fsdp2"} for table in (weak, strong))
        and all(rows.keys() == {"1", "2", "4"} for table in (weak, strong) for rows in table.values())
        and [row["images"] for row in weak["fsdp2"].values()] == [2, 4, 8]
        and {row["images"] for row in strong["fsdp2"].values()} == {4}
        and {one[key] for key in one if key.startswith("efficiency")} == {1}
        and two["efficiency"] == pytest.approx(two["images_per_second"] / (2 * one["images_per_second"]), rel=1e-2)
        and [row["counted_bytes"] for row in wire.values()] == [n * found["gradient_bytes"] for n in (2, 6)]
        and all(
            row["measured_bytes"] is None or row["measured_bytes"] > 0.9 * row["counted_bytes"] for row in wire.values()
        )
    )


def sharded_step_is_sane(found: dict[str, Any]) -> bool:
    """Two ways begin with the same loss, and rates follow from what a step takes."""
    (family,) = found["families"].values()
    plain, sharded = (family["ways"][way] for way in ("plain", "fsdp2"))
    return (
        (found["device"], found["steps"], family["image_size"], family["images"]) == ("CPU", 1, 64, 2)
        and len(family["ways"]) == 2
        and 1e6 < family["parameters"] < 1e7
        and positive([plain, sharded])
        and all(row["ended"] is None and None not in (row["peak_gib"], row["first_loss"]) for row in (plain, sharded))
        and 0 <= family["largest_difference"] < 0.02
        and sharded["first_norm"] == pytest.approx(plain["first_norm"], rel=0.02)
        and plain["images_per_second"] == pytest.approx(2 * 1000 / plain["step_ms"], rel=0.01)
        and sharded["images_per_second"] == pytest.approx(2 * 2 * 1000 / sharded["step_ms"], rel=0.01)
        and (plain["devices"], sharded["devices"]) == (1, 2)
    )


def attention_is_sane(found: dict[str, Any]) -> bool:
    """Every way was timed, the ratio is that of the rule's choice, and all give the same."""
    ways = {"reference", "eager", "sdpa", "widened", "chunked" if found["device"] == "cpu" else "flex"}
    times = [kinds for precision in found["milliseconds"].values() for kinds in precision.values()]
    return (
        len(times) == 4
        and all(set(each) == ways and min(each.values()) > 0 for each in times)
        and found["chosen"] in ways
        and 0 < found["difference"] < 1e-3
        and (found["hiera"] is None or all(each["ratio"] > 0 for each in found["hiera"].values()))
        and found["ratio"] == min(found["ratios"].values()) > 0
        and found["bar"] == {"needed": 1.0, "met": found["ratio"] >= 1}
    )


def memory_is_sane(found: dict[str, Any]) -> bool:
    sizes = {(kind, way): both for kind, ways in found["saved_mib"].items() for way, both in ways.items()}
    ratios = {key: both["ours"] / both["reference"] for key, both in sizes.items()}
    return (
        len(ratios) == 4
        and all(found["ratios"][kind][way] == pytest.approx(ratio, rel=0.01) for (kind, way), ratio in ratios.items())
        and found["ratio"] == max(share for ways in found["ratios"].values() for share in ways.values())
        and all(share == pytest.approx(1, abs=0.02) for share in found["real"].values())
        and found["bar"] == {"needed": 0.6, "met": found["ratio"] <= 0.6}
    )


RUNS: list[Any] = [
    pytest.param("ablation.py", (), ablation_is_sane, marks=pytest.mark.slow),
    ("samples.py", ("--distinct", "5"), samples_are_sane),
    ("checkpoint.py", ("--megabytes", "30", "--rounds", "1"), checkpoint_is_sane),
    ("decoders.py", ("--images", "1", "--files", "3", "--rounds", "1"), decoders_are_sane),
    (
        "exports.py",
        (*("--families", "litemedsam", "medsam"), *("--formats", "litemedsam", "peft", "transformers")),
        exports_are_sane,
    ),
    ("shards.py", ("--volumes", "10", "--slices", "6"), shards_are_sane),
    ("index.py", ("--samples", "3000", "--repeats", "1"), index_is_sane),
    ("readers.py", ("--samples", "48"), alone_is_sane),
    ("overhead.py", ("--steps", "3", "--side", "64", "--batch", "1"), overhead_is_sane),
    ("pairs.py", ("--rounds", "1", "--side", "64", "--depth", "2"), pairs_is_sane),
    ("sam2_memory.py", (), sam2_memory_is_sane),
    ("step_medsam.py", ("--side", "64", "--depth", "2", "--rounds", "1"), step_medsam_is_sane),
    ("step_sam2.py", ("--side", "64", "--rounds", "1", "--cases", "1"), step_sam2_is_sane),
    ("step_sam3.py", ("--images", "2", "--prompts", "2", "--steps", "1", "--rounds", "1"), step_sam3_is_sane),
    ("matcher.py", ("--prompts", "4", "--layers", "2", "--rounds", "1"), matcher_is_sane),
    ("attention.py", ("--side", "8", "--rounds", "1"), attention_is_sane),
    ("memory.py", ("--side", "64", "--depth", "2"), memory_is_sane),
    ("metrics.py", ("--pairs", "1", "--rounds", "1"), metrics_is_sane),
    ("projection.py", (), projection_is_sane),
    (
        "sharded_step.py",
        (*("--families", "medsam"), *("--ways", "plain", "fsdp2"), *("--devices", "2"), *("--steps", "1")),
        sharded_step_is_sane,
    ),
    pytest.param("scaling.py", ("--steps", "2"), scaling_is_sane, marks=pytest.mark.slow),
    pytest.param("loader.py", ("--samples", "48"), loader_is_sane, marks=pytest.mark.slow),
]
"""File, options, and what its last line is checked with."""


@pytest.mark.parametrize(("name", "size", "is_sane"), RUNS)
def test_the_last_line_is_what_the_docstring_says(name: str, size: tuple[str, ...], is_sane: Check) -> None:
    done = run(name, "--quick", *size)
    assert done.returncode == 0, done.stderr
    *before, last = done.stdout.splitlines()
    found = strictly(last)
    assert before, "nothing for people to read"
    assert found.keys() == documented(name)
    assert found["benchmark"] == name.removesuffix(".py") and found["quick"] is True
    assert is_sane(found), last


def test_the_suite_for_a_gpu_says_the_same(modules: Callable[[str], ModuleType]) -> None:
    """So that whatever it would run without a GPU has been run here."""
    sizes = {name: " ".join(("--quick", *size)) for name, size, _ in (getattr(one, "values", one) for one in RUNS)}
    for part in modules("suite").PARTS:
        assert part.tiny == sizes[f"{part.name}.py"]


def test_every_benchmark_is_run_above() -> None:
    assert NAMES == [
        "ablation.py",
        "attention.py",
        "checkpoint.py",
        "decoders.py",
        "exports.py",
        "index.py",
        "loader.py",
        "matcher.py",
        "memory.py",
        "metrics.py",
        "overhead.py",
        "pairs.py",
        "projection.py",
        "readers.py",
        "sam2_memory.py",
        "samples.py",
        "scaling.py",
        "sharded_step.py",
        "shards.py",
        "step_medsam.py",
        "step_sam2.py",
        "step_sam3.py",
    ]


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Import a benchmark by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in (*NAMES, *SHARED):
        sys.modules.pop(name.removesuffix(".py"), None)


@pytest.mark.parametrize("codec", ["png", "zstd"])
def test_other_readers_give_the_same_tensors(
    codec: str, tmp_path: Path, modules: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("webdataset")
    monkeypatch.setenv("RANK", "0")  # the readers set them: here they are put back
    monkeypatch.setenv("WORLD_SIZE", "1")
    samples, readers = modules("samples"), modules("readers")
    sources = [samples.encoded(source, codec) for source in samples.slices(5)]
    folder = samples.write_shards(tmp_path / "shards", sources, 16, 5)
    expected = {key: parts for batch in readers.ours(folder, 0, 0, 1) for key, parts in by_key(vars(batch)).items()}
    for name, (make, packages) in readers.READERS.items():
        if name != "data_shards" and readers.found(packages) is not None:
            loader = make(folder, 0, 0, 1)
            got = {key: parts for batch in loader for key, parts in by_key(batch).items()}
            assert got.keys() == expected.keys() and len(got) == 16
            for key, (image, masks, boxes, terms) in got.items():
                assert torch.equal(image, expected[key][0]) and image.dtype == torch.uint8
                assert len(masks) == len(expected[key][1]) in (3, 4)
                assert all(torch.equal(*pair) for pair in zip(masks, expected[key][1], strict=True))
                assert torch.equal(boxes, expected[key][2]) and terms == expected[key][3]


def by_key(batch: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """The parts of a batch by sample: image, masks, boxes, terms."""
    parts = {}
    for number, key in enumerate(batch["keys"]):
        mine = torch.nonzero(batch["image_index"] == number).flatten().tolist()
        masks, terms = ([batch[name][target] for target in mine] for name in ("masks", "terms"))
        parts[key] = (batch["images"][number], masks, batch["boxes"][mine], terms)
    return parts


def test_a_reader_that_is_not_installed_is_null(modules: Callable[[str], ModuleType]) -> None:
    found = modules("readers").found
    assert found(("no-such-package-here",)) is None and found(("numpy", "no-such-package-here")) is None
    assert found(("numpy",)) == np.__version__ and found(()) == ""


@pytest.mark.parametrize(
    ("changed", "plus"),
    [
        ([], ""),
        (["benchmarks/README.md"], ""),
        (["benchmarks/README.md", "benchmarks/results/one.json"], ""),
        (["benchmarks/one.py"], "+"),
        (["benchmarks/results/one.json", "trainer/one.py"], "+"),
        (["README.md"], ""),
    ],
)
def test_a_commit_has_a_plus_where_what_is_measured_was_changed(
    tmp_path: Path,
    modules: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    changed: list[str],
    plus: str,
) -> None:
    """What a benchmark or the page about them writes is no such change."""

    def git(*words: str) -> str:
        settings = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *settings, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    names = ["README.md", "benchmarks/README.md", "benchmarks/one.py", "benchmarks/results/one.json"]
    for name in [*names, "trainer/one.py", "data_shards/one.py"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "one")
    for name in changed:
        (tmp_path / name).write_text("after")
    measuring = modules("measuring")
    monkeypatch.setattr(measuring, "RESULTS", tmp_path / "benchmarks/results")
    assert measuring._commit() == git("rev-parse", "--short=12", "HEAD") + plus


def test_medians_run_in_turn_and_leave_out_the_first_round(
    modules: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    measuring, order, now = modules("measuring"), [], [0.0]
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now[0])
    seconds = {"a": iter([100.0, 1.0, 2.0, 4.0]), "b": iter([100.0, 5.0, 5.0, 5.0])}

    def takes(name: str) -> Callable[[], int]:
        def call() -> int:
            order.append(name)
            now[0] += next(seconds[name])
            return 10

        return call

    assert measuring.medians({"a": takes("a"), "b": takes("b")}, repeats=3) == {"a": 5.0, "b": 2.0}
    assert order == ["a", "b"] * 4


def test_a_grown_index_reads_the_samples_that_it_repeats(tmp_path: Path, modules: Callable[[str], ModuleType]) -> None:
    from data_shards.dataset import ShardDataset

    index, samples = modules("index"), modules("samples")
    index.BASE = 10
    sources = [samples.encoded(source, "zstd") for source in samples.slices(5)]
    samples.write_shards(tmp_path / "base", sources, 10, 10)
    index.grow(tmp_path / "base", tmp_path / "grown", 200)
    base, grown = ShardDataset(tmp_path / "base"), ShardDataset(tmp_path / "grown")
    rows = grown.index
    assert len(grown) == 200 == len(set(rows.keys.tolist())) and len(rows.target_term) == 680
    for number in (0, 9, 10, 57, 199):
        assert grown.read(number) == base.read(number % 10)
        assert rows.targets(number) == base.index.targets(number % 10)
    assert len(rows.patients) == 4 and len(rows.volumes) == 5
    follows = np.flatnonzero(rows.following >= 0)
    assert len(follows) == 200 - 5
    assert (rows.volume[rows.following[follows]] == rows.volume[follows]).all()
    assert np.bincount(rows.modality).tolist() == [140, 50, 10]


def test_a_way_that_ends_badly_is_a_row_and_the_others_go_on(
    modules: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = modules("sharded_step")

    def ends(rank: int, port: int, asked: dict[str, Any], out: str) -> None:
        if asked["way"] == "plain":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")
        if asked["way"] == "recompute":
            os.kill(os.getpid(), signal.SIGKILL)  # as the system does where its memory runs out
        if asked["way"] == "compile":
            raise ValueError("no compiler here")
        found = {"device": "CPU", "parameters": 7, "step_ms": 2.0, "images_per_second": 1.0, "first_step_seconds": 1.0}
        Path(out, "found.json").write_text(
            json.dumps({**found, "first_norm": 1.0, "first_loss": 2.0 if asked["way"] == "all" else 1.6})
        )
        Path(out, f"peak-{rank}").write_text(str(1.0 + rank))

    monkeypatch.setattr(step, "rank_main", ends)
    arguments = ["sharded_step.py", "--quick", "--families", "sam3", "--devices", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match=r"sam3, compile: ValueError: no compiler here\nsam3: losses differ"):
        step.main()
    *_, last = capsys.readouterr().out.splitlines()
    family = strictly(last)["families"]["sam3"]
    ways = family["ways"]
    assert {way: row["ended"] for way, row in ways.items()} == {
        **{"plain": "out of memory", "recompute": "out of memory", "compile": "ValueError: no compiler here"},
        **{"fsdp2": None, "all": None},
    }
    assert all(ways["plain"][key] is None for key in ("step_ms", "images_per_second", "peak_gib", "first_loss"))
    assert (ways["fsdp2"]["peak_gib"], ways["fsdp2"]["devices"]) == (2.0, 2)  # that of the fullest
    assert family["largest_difference"] == pytest.approx(0.25)
