"""Compare our losses and matchers with recorded ones: `python tests/golden/check.py FOLDER`.

Every .npz of the folder is read; which arrays it has says what it is (see README.md beside this file), and sizes are
those of the arrays. The relative error of an array is max |ours − theirs| / max(max |theirs|, 1e-6): one number an
array, so that a gradient's small entries are measured by its large ones, and an array of zeros by 1e-6. Matches are
equal as sets or have an error of 1, and so has an array that is not finite just where theirs is not.

The last line is one JSON object:
  files                 how many were compared
  worst_relative_error  the largest of all arrays
  worst_file            where it is
  worst_array           which one
  arrays                how many were compared
  unchecked             recorded arrays that nothing was compared with

Exit code: 0, 1 where the worst error is above 1e-5, 2 where a file cannot be read or the folder has none.
"""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Callable, Iterable
from math import inf, isfinite, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from trainer.losses import (
    DenseMasks,
    HungarianMatcher,
    ObjectSets,
    OneToManyMatcher,
    Pairs,
    SetPrediction,
    SetPredictionLoss,
)
from trainer.losses.semantic import semantic_losses, semantic_truth
from trainer.losses.set_prediction import present_of

BAR = 1e-5
TINY = 1e-6
MANY = 2.0  # the weight of the one-to-many half, which their components include
WEIGHTS = {"paper": {}, "paper_sempres": {}, "yamlseg": {"mask_weight": 200.0, "dice_weight": 10.0}}

Arrays = dict[str, np.ndarray]
Found = dict[str, Any]  # by the name of a recorded array: a number, an array or a set of matches


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The relative error of an array."""
    if ours.shape != theirs.shape or not np.array_equal(np.isfinite(ours), np.isfinite(theirs)):
        return 1.0
    finite = np.isfinite(theirs)
    ours, theirs = ours[finite].astype(np.float64), theirs[finite].astype(np.float64)
    return float(np.abs(ours - theirs).max(initial=0) / max(np.abs(theirs).max(initial=0), TINY))


def targets_of(arrays: Arrays) -> ObjectSets:
    counts = arrays["in_num_boxes"].tolist()
    valid = arrays.get("in_is_valid_mask")
    masks = arrays.get("in_masks")
    return ObjectSets(
        counts=counts,
        boxes=torch.from_numpy(arrays.get("in_boxes", np.zeros((sum(counts), 4), np.float32))),
        masks=None if masks is None else torch.from_numpy(masks),
        has_mask=None if valid is None else torch.from_numpy(valid.astype(bool)),
    )


def triples(pairs: Pairs) -> set[tuple[int, ...]]:
    return set(zip(pairs.prompts.tolist(), pairs.queries.tolist(), pairs.targets.tolist(), strict=True))


def recorded(arrays: Arrays, prefix: str, suffix: str = "") -> set[tuple[int, ...]]:
    names = (f"{prefix}{part}_idx{suffix}" for part in ("batch", "src", "tgt"))
    return set(zip(*(arrays[name].tolist() for name in names), strict=True))


class Comparison:
    """What one file's arrays differ by."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays
        self.errors: dict[str, float] = {}

    def number(self, name: str, ours: Tensor | float | np.ndarray) -> None:
        """Compare one array, where it was recorded."""
        if f"out_{name}" in self.arrays:
            value = ours.detach().numpy() if isinstance(ours, Tensor) else np.asarray(ours)
            self.errors[f"out_{name}"] = error(value, self.arrays[f"out_{name}"])

    def matches(self, ours: Pairs, prefix: str = "out_", suffix: str = "") -> None:
        """Compare the three arrays of one layer's matches."""
        same = triples(ours) == recorded(self.arrays, prefix, suffix)
        size = len(ours) == len(self.arrays[f"{prefix}src_idx{suffix}"])
        for part in ("batch", "src", "tgt"):
            self.errors[f"{prefix}{part}_idx{suffix}"] = 0.0 if same and size else 1.0

    def unchecked(self) -> list[str]:
        """Recorded arrays that nothing was compared with."""
        return sorted(name for name in self.arrays if name.startswith("out_") and name not in self.errors)


def twice(pairs: Pairs) -> int:
    """How many matches take a query that another match has taken."""
    return len(pairs) - len(pairs.last_of_query())


def one_to_one(found: Comparison) -> None:
    """Files a_*."""
    arrays, targets, matcher = found.arrays, targets_of(found.arrays), HungarianMatcher()
    logits, boxes = torch.from_numpy(arrays["in_pred_logits"])[None, ..., 0], torch.from_numpy(arrays["in_pred_boxes"])
    costs = matcher.costs(logits, boxes[None], targets)
    pairs = matcher.assign(costs.numpy(), targets.counts)[0]
    found.matches(pairs)
    padded = np.full_like(arrays["out_cost"], np.nan)
    for prompt, (start, count) in enumerate(zip(targets.starts, targets.counts, strict=True)):
        padded[prompt, :, :count] = costs[0, start : start + count].T.numpy()
    found.number("cost", padded)
    complete = all(
        count <= logits.shape[2] for count in targets.counts
    )  # then theirs says no targets: they are in order
    in_order = pairs.targets.tolist() == list(range(sum(targets.counts)))
    found.number("tgt_idx_is_none", complete and in_order)


def one_to_many(found: Comparison) -> None:
    """Files b_*."""
    arrays, targets, matcher = found.arrays, targets_of(found.arrays), OneToManyMatcher()
    logits, boxes = torch.from_numpy(arrays["in_pred_logits"])[..., 0], torch.from_numpy(arrays["in_pred_boxes"])
    queries, kept = matcher(logits, boxes, targets)
    pairs = matcher.pairs(queries.numpy(), kept.numpy(), targets.counts)
    found.matches(pairs)
    found.number("num_queries_matched_twice", twice(pairs))


LEAVES = (
    "pred_logits",
    "pred_boxes",
    "pred_logits_o2m",
    "pred_boxes_o2m",
    "presence_logit_dec",
    "semantic_seg",
    "presence_logit",
    "pred_masks",
    "pred_masks_o2m",
)


def prediction_of(leaves: dict[str, Tensor]) -> SetPrediction:
    masks = {name: DenseMasks(leaves[name]) for name in ("pred_masks", "pred_masks_o2m") if name in leaves}
    return SetPrediction(
        logits=leaves["pred_logits"][..., 0],
        boxes=leaves["pred_boxes"],
        presence=leaves["presence_logit_dec"][..., 0],
        masks=masks.get("pred_masks"),
        semantic=leaves["semantic_seg"][:, 0],
        many=SetPrediction(
            logits=leaves["pred_logits_o2m"][..., 0],
            boxes=leaves["pred_boxes_o2m"],
            masks=masks.get("pred_masks_o2m"),
        ),
    )


def whole_loss(found: Comparison) -> None:
    """Files c_*."""
    arrays, targets = found.arrays, targets_of(found.arrays)
    inputs = {name: torch.from_numpy(arrays[f"in_{name}"]) for name in LEAVES if f"in_{name}" in arrays}
    loss = SetPredictionLoss(mask_at="target")
    matches = loss.match(prediction_of(inputs), targets)
    for layer, (first, many) in enumerate(zip(matches.first, matches.many, strict=True)):
        found.matches(first, "out_o2o_", f"_l{layer}")
        found.matches(many, "out_o2m_", f"_l{layer}")
    found.number("num_queries_matched_twice", twice(matches.many[-1]))
    logged(
        found,
        inputs,
        targets,
        [(matches.first, "pred_logits", "", 1.0), (matches.many, "pred_logits_o2m", "_o2m", MANY)],
    )
    for name, weights in WEIGHTS.items():
        if f"out_{name}_core_loss" in arrays:
            weighting(found, name, weights, inputs, targets)


def weighting(
    found: Comparison, name: str, weights: dict[str, float], inputs: dict[str, Tensor], targets: ObjectSets
) -> None:
    """Components, totals and gradients of a c_* file under one weighting."""
    leaves = {key: value.clone().requires_grad_() for key, value in inputs.items()}
    loss = SetPredictionLoss(mask_at="target", scale_by_prompts=False, **weights)
    prediction = prediction_of(leaves)
    components(found, loss.components(prediction, targets))
    total = loss(prediction, targets)["loss"]
    truth = semantic_truth(targets)
    assert truth is not None
    term = semantic_losses(prediction.semantic, truth, presence=leaves["presence_logit"][:, 0])["semantic_presence"]
    asked = name == "paper_sempres"
    total = total + term if asked else total
    right = (leaves["presence_logit"][:, 0].sigmoid() > 0.5) == truth.flatten(1).any(1)
    found.number(f"{name}_loss_semantic_presence", term if asked else 0.0)
    found.number(f"{name}_presence_acc", right.float().mean() if asked else 0.0)
    found.number(f"{name}_core_loss_unscaled", total)
    found.number(f"{name}_core_loss", total * sqrt(len(targets.counts)))
    (total * sqrt(len(targets.counts))).backward()
    for key, leaf in leaves.items():
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        found.number(f"{name}_grad_{key}", gradient)
        found.number(f"{name}_gradnorm_{key}", gradient.norm())
    scaled = SetPredictionLoss(mask_at="target", **weights)(prediction_of(inputs), targets)["loss"]
    if not asked:
        found.number(f"{name}_core_loss", scaled)


def components(found: Comparison, values: dict[str, Tensor]) -> None:
    """Compare the components, layer by layer."""
    names = {"box_loss": "loss_bbox", "giou_loss": "loss_giou", "class_loss": "loss_ce"}
    names |= {"presence_loss": "presence_loss", "mask_loss": "loss_mask", "dice_loss": "loss_dice"}
    names |= {"semantic_loss": "loss_semantic_seg", "semantic_dice": "loss_semantic_dice"}
    for ours, layers in values.items():
        many = ours.endswith("_many")
        name, half, factor = names[ours.removesuffix("_many")], "_o2m" * many, MANY if many else 1.0
        for layer, value in enumerate(layers):
            suffix = "" if layer == len(layers) - 1 else f"_aux_{layer}"
            found.number(f"{name}{suffix}{half}", value * factor)


def logged(
    found: Comparison,
    inputs: dict[str, Tensor],
    targets: ObjectSets,
    halves: Iterable[tuple[list[Pairs], str, str, float]],
) -> None:
    """Compare what is logged beside the loss, from our matches."""
    present = present_of(targets, torch.device("cpu")) > 0
    for layers, logits, half, factor in halves:
        for layer, pairs in enumerate(layers):
            suffix = ("" if layer == len(layers) - 1 else f"_aux_{layer}") + half
            said = inputs[logits][layer, ..., 0].sigmoid() > 0.5
            truth = torch.zeros_like(said)
            truth[pairs.prompts, pairs.queries] = True
            both = 2 * (said & truth).sum()
            found.number(f"ce_f1{suffix}", factor * both / (said.sum() + truth.sum()).clamp(min=1))
            right = (inputs["presence_logit_dec"][layer, :, 0].sigmoid() > 0.5) == present
            found.number(f"presence_dec_acc{suffix}", 0.0 if half else right.float().mean())
            if half:
                found.number(f"presence_loss{suffix}", 0.0)
    found.number("miou_semantic_seg", overlap_of(inputs["semantic_seg"][:, 0], semantic_truth(targets)))


def overlap_of(logits: Tensor, truth: Tensor | None) -> Tensor:
    """Mean IoU of semantic masks over the prompts that have one; 1 where none has."""
    assert truth is not None
    truth = truth.bool()
    said = F.interpolate(logits[:, None], truth.shape[-2:], mode="bilinear", align_corners=False)[:, 0].sigmoid() > 0.5
    present = truth.flatten(1).any(1).sum()
    iou = (said & truth).sum((1, 2)) / ((said | truth).sum((1, 2)) + 1e-8)
    return iou.sum() / present if present else torch.ones(())


def semantic(found: Comparison) -> None:
    """Files d_*."""
    arrays, targets = found.arrays, targets_of(found.arrays)
    assert targets.masks is not None
    for name in [name for name in arrays if name.startswith("out_head") and name.endswith("_core_loss")]:
        prefix = name.removeprefix("out_").removesuffix("core_loss")
        options = {part[:-1]: part[-1] == "1" for part in prefix.strip("_").split("_")}
        logits = torch.from_numpy(arrays["in_semantic_seg"]).clone().requires_grad_()
        presence = torch.from_numpy(arrays["in_presence_logit"])[:, 0]
        instances = targets.masks
        if options["down"]:  # their way down: a pixel counts where the bilinear value is not 0
            instances = F.interpolate(instances[:, None].float(), logits.shape[-2:], mode="bilinear")[:, 0].bool()
        truth = semantic_truth(ObjectSets(targets.counts, targets.boxes, instances))
        assert truth is not None
        if not len(instances):
            truth = truth.new_zeros(len(targets.counts), 1, 1)  # theirs, where nothing is there at all
        losses = semantic_losses(
            logits[:, 0],
            truth,
            at="target",
            focal=options["focal"],
            present_only=options["head"],
            presence=presence,
        )
        total = 20 * losses["semantic_loss"] + 30 * losses["semantic_dice"]
        if options["ploss"]:
            total = total + losses["semantic_presence"]
        total.backward()
        right = ((presence.sigmoid() > 0.5) == truth.flatten(1).any(1)).float().mean()
        found.number(f"{prefix}core_loss", total)
        found.number(f"{prefix}loss_semantic_seg", losses["semantic_loss"])
        found.number(f"{prefix}loss_semantic_dice", losses["semantic_dice"])
        found.number(f"{prefix}loss_semantic_presence", losses["semantic_presence"] if options["ploss"] else 0.0)
        found.number(f"{prefix}presence_acc", right if options["ploss"] else 0.0)
        found.number(f"{prefix}miou_semantic_seg", overlap_of(logits[:, 0].detach(), truth))
        assert logits.grad is not None
        found.number(f"{prefix}grad_semantic_seg", logits.grad)


LAYOUTS: tuple[tuple[Callable[[Comparison], None], set[str]], ...] = (
    (whole_loss, {"in_pred_logits", "in_pred_logits_o2m", "in_pred_boxes_o2m", "in_semantic_seg", "in_num_boxes"}),
    (one_to_one, {"in_pred_logits", "in_pred_boxes", "in_boxes", "in_num_boxes", "out_src_idx", "out_cost"}),
    (one_to_many, {"in_pred_logits", "in_pred_boxes", "in_boxes", "in_num_boxes", "out_src_idx"}),
    (semantic, {"in_semantic_seg", "in_presence_logit", "in_masks", "in_num_boxes"}),
)


class UnknownLayoutError(Exception):
    """A file that is none of the four kinds."""


def compare(path: Path) -> Comparison:
    """Compare one file.

    Raises:
        UnknownLayoutError: If it cannot be read or is none of the four kinds.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as problem:
        raise UnknownLayoutError(f"{path}: cannot be read: {problem}") from problem
    for run, needed in LAYOUTS:
        if needed <= arrays.keys():
            found = Comparison(arrays)
            try:
                run(found)
            except KeyError as missing:
                raise UnknownLayoutError(f"{path}: array {missing} is missing") from missing
            except (IndexError, RuntimeError, ValueError) as problem:
                line = " ".join(str(problem).split())
                raise UnknownLayoutError(f"{path}: its arrays do not fit together: {line}") from problem
            return found
    raise UnknownLayoutError(
        f"{path}: unknown layout: its arrays are those of none of a_*, b_*, c_* and d_* (README.md)"
    )


def report(folder: Path) -> dict[str, Any]:
    """Compare all files of a folder; prints one line a file."""
    paths = sorted(folder.glob("*.npz"))
    if not paths:
        raise UnknownLayoutError(f"{folder}: no .npz file: give a folder that has some")
    worst, where, which, arrays, unchecked = -inf, "", "", 0, []
    for path in paths:
        found = compare(path)
        name, value = max(found.errors.items(), key=lambda item: item[1])
        print(f"{path.name}: {value:.1e} in {name}, {len(found.errors)} arrays")
        if value > worst:
            worst, where, which = value, path.name, name
        arrays += len(found.errors)
        unchecked += [f"{path.name}:{name}" for name in found.unchecked()]
    return {
        "files": len(paths),
        "worst_relative_error": worst if isfinite(worst) else 1.0,
        "worst_file": where,
        "worst_array": which,
        "arrays": arrays,
        "unchecked": unchecked,
    }


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print((__doc__ or "").strip(), file=sys.stderr)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    try:
        found = report(Path(arguments[0]))
    except UnknownLayoutError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    print(json.dumps(found, allow_nan=False))
    return int(found["worst_relative_error"] > BAR)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
