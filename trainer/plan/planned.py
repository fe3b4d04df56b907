"""What a recipe makes, without its weights, its data or a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningDataModule
from torch import Tensor

from data_shards.errors import UserError
from data_shards.sampler import GlobalOrderSampler
from trainer.flops import step_flops
from trainer.lightning_cli import RecipeCLI, RecipeParser
from trainer.models import SegmentationModel
from trainer.models.recomputing import recomputed_for_now
from trainer.modules.tuned import TunedModule
from trainer.plan.activations import memory_at, pass_bytes
from trainer.plan.groups import memory, parameter_groups
from trainer.plan.memory import parts, sharing_of
from trainer.plan.recompute import Choice, blocks_of, choose
from trainer.recipe import explain
from trainer.restore import build, instantiate, without_weights
from trainer.run import opening


class ReadCLI(RecipeCLI):
    """The command line of ``trainer fit`` up to the point where it would make anything.

    Attributes:
        resolved: The recipe with its overlays and keys, as plain values.
    """

    def _set_seed(self) -> None:
        """Nothing is drawn."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is run."""

    def instantiate_classes(self) -> None:
        """Nothing is made: only what the recipe says is looked at."""
        text = self._parser("fit").dump(self.config["fit"], skip_none=False, skip_link_targets=False, format="yaml")
        self.resolved: dict[str, Any] = yaml.safe_load(text)


class PlanCLI(ReadCLI):
    """The same up to the point where it would read weights and look for a GPU."""

    def instantiate_classes(self) -> None:
        """Make the module without weights, and the data module, which checks its arguments.

        Raises:
            UserError: An argument is refused.
        """
        super().instantiate_classes()
        node = self.resolved["model"]
        where = "recipe " + " + ".join(RecipeParser.recipes)
        self.notes = _leave_unquantised(node)
        try:
            with torch.device("meta"):
                self.module: TunedModule = build(node, where)
                model = without_weights(node["init_args"]["model"])
                untouched: SegmentationModel = instantiate(model, SegmentationModel, where)
            self.planned_data = instantiate(self.resolved["data"], LightningDataModule, where)
        except (ValueError, TypeError) as error:
            raise UserError(f"{where}: {explain(str(error), set(), [])}") from error
        self.own_names = {name for name, _ in untouched.named_parameters()}
        callbacks = self.resolved["trainer"].get("callbacks") or []
        self.averaged = any(str(node.get("class_path", "")).endswith(".EMA") for node in callbacks)
        self.to_fit: bool = any(str(node.get("class_path", "")).endswith(".RecomputeToFit") for node in callbacks)
        self._room: tuple[int, int] | None = None
        self._passes: dict[tuple[int, int], int] = {}
        self._chosen: dict[tuple[int, int], Choice] = {}

    def plan(self, devices: int | None = None) -> dict[str, Any]:
        """The plan, as JSON.

        Args:
            devices: GPUs in all; None takes the recipe's.

        Raises:
            UserError: The batches do not divide.
        """
        module, resolved = self.module, self.resolved
        groups = parameter_groups(module, self.own_names)
        nodes = resolved["model"]["init_args"]
        return {
            "recipes": RecipeParser.recipes,
            "question": opening(self.opening)[0],
            "model": {name: nodes["model"].get(name) for name in ("class_path", "init_args")},
            "tuning": nodes.get("tuning") or {"class_path": f"trainer.tuning.{type(module.tuning).__name__}"},
            "parameters": sum(group.parameters for group in groups),
            "learning": sum(group.learning for group in groups),
            "groups": [asdict(group) for group in groups],
            "memory_bytes": memory(module, self.averaged),
            "optimizer": optimizer(module, resolved["trainer"]),
            "step": step(resolved["data"]["init_args"], resolved["trainer"], devices),
            "terms_per_image": nodes.get("terms_per_image"),
            "frames": resolved["data"]["init_args"].get("clip_length") or 1,
            "prompts_per_image": prompts_per_image(resolved["data"]["init_args"], nodes.get("terms_per_image")),
            "length": {name: resolved["trainer"].get(name) for name in ("max_steps", "max_epochs", "max_time")},
            "nodes": resolved["trainer"].get("num_nodes") or 1,
            "precision": str(resolved["trainer"].get("precision") or "32-true"),
            "notes": self.notes,
        }

    def memory_at(self, plan: dict[str, Any], prompts: int | None) -> list[dict[str, int]]:
        """Memory by images a pass and prompts an image."""
        kept, images = plan["memory_bytes"]["total"], plan["step"]["micro_batch"]
        return memory_at(self.module, plan["precision"], kept, images, prompts, plan["frames"], self._passes)

    def pass_bytes(self, plan: Mapping[str, Any], images: int, prompts: int) -> int:
        """What a pass takes beside weights and gradients; measured once."""
        if (chosen := self.recomputed(plan, images, prompts)) is not None:
            return chosen.activations
        if (images, prompts) not in self._passes:
            self._passes[images, prompts] = pass_bytes(
                self.module, self._pass(plan, images, prompts), plan["precision"]
            )
        return self._passes[images, prompts]

    def least_bytes(self, plan: Mapping[str, Any], images: int, prompts: int) -> int:
        """The same, with everything computed twice that `RecomputeToFit` may: what tells whether a pass fits at all."""
        if not self.to_fit or self._room is None:
            return self.pass_bytes(plan, images, prompts)
        with recomputed_for_now(blocks_of(self.module)):
            return pass_bytes(self.module, self._pass(plan, images, prompts), plan["precision"])

    def put_on(self, devices: int, room: int | None) -> None:
        """Say where it is to run: what `RecomputeToFit` would choose there counts from now on.

        Args:
            devices: GPUs in all.
            room: Bytes that a training may take of each; None is not known.
        """
        self._room, self._chosen = None if room is None else (devices, room), {}

    def recomputed(self, plan: Mapping[str, Any], images: int, prompts: int) -> Choice | None:
        """What `RecomputeToFit` chooses for a pass; None where the recipe has none, or no GPU is known.

        Raises:
            UserError: The model has blocks computed twice besides.
        """
        if not self.to_fit or self._room is None:
            return None
        devices, room = self._room
        if (images, prompts) not in self._chosen:
            step = self._pass(plan, images, prompts)
            left = room - sum(self.parts(devices, 0).values())
            self._chosen[images, prompts] = choose(self.module, step, plan["precision"], left)
        return self._chosen[images, prompts]

    def _pass(self, plan: Mapping[str, Any], images: int, prompts: int) -> Callable[[], Tensor]:
        """What runs a pass on tensors without content."""
        clip = {"frames": plan["frames"]} if plan["frames"] > 1 else {}
        return partial(self.module.rehearse, images, prompts, **clip)

    def parts(self, devices: int, activations: int) -> dict[str, int]:
        """Bytes of each part on one of some GPUs."""
        return parts(self.module, self.averaged, sharing_of(self.resolved["trainer"], devices), activations)

    def checkpoint(self, plan: dict[str, Any]) -> dict[str, int]:
        """Bytes of one checkpoint, and how many are kept: weights, AdamW's moments and an average, in whole."""
        sizes, settings = plan["memory_bytes"], self.resolved.get("checkpoint") or {}
        best = settings.get("keep", 1) if settings.get("monitor") else 0
        size = sizes["weights"] + sizes["adamw"] + sizes["average"]
        return {"bytes": size, "kept": settings.get("keep_last", 2) + best}

    def flops(self, plan: dict[str, Any], prompts: int) -> dict[str, float]:
        """FLOPs of forward and backward of an image: ``model``, which MFU divides, and ``hardware``."""
        images = plan["step"]["micro_batch"]
        found = step_flops(self.module, images, prompts, plan["frames"])
        each = images * plan["frames"]
        return {"model": found.model / each, "hardware": found.hardware / each}


def optimizer(module: TunedModule, trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Optimiser, schedule and clipping."""
    limit = trainer.get("gradient_clip_val")
    clipping = f"{trainer.get('gradient_clip_algorithm') or 'norm'} {limit:g}" if limit else None
    return {
        "name": "AdamW",
        "learning_rate": module.lr,
        "weight_decay": module.weight_decay,
        "betas": list(module.betas),
        "schedule": module.schedule.describe(),
        "gradient_clipping": clipping,
    }


def step(data: Mapping[str, Any], trainer: Mapping[str, Any], given: int | None = None) -> dict[str, Any]:
    """What one optimiser step is made of.

    Args:
        data: Arguments of the data module.
        trainer: Arguments of the trainer.
        given: Devices in all, in the place of the recipe's.

    Returns:
        Images (or clips) a step and a pass, the devices (None if the recipe takes as many as there are) and the passes
        of each in a step, on one device where their number is not known.

    Raises:
        UserError: The batches do not divide.
    """
    images, micro, devices = data["batch_size"], data["micro_batch_size"], given or _devices(trainer)
    GlobalOrderSampler(images, images, micro, 0, devices or 1, 0)  # as it refuses them in a training
    return {
        "images": images,
        "micro_batch": micro,
        "devices": devices,
        "passes": images // (micro * (devices or 1)),
        "targets_per_image": data.get("targets_per_image"),
    }


def prompts_per_image(data: Mapping[str, Any], terms: int | None = None) -> int | None:
    """The most prompts that the recipe asks an image: targets or terms, and absent terms; None where all are taken."""
    targets = data.get("targets_per_image") or terms
    return None if targets is None else targets + (data.get("negatives_per_image") or 0)


def _devices(trainer: Mapping[str, Any]) -> int | None:
    """Devices over all nodes; None where the recipe takes as many as there are."""
    devices, nodes = trainer.get("devices", "auto"), trainer.get("num_nodes") or 1
    if isinstance(devices, str) and "," in devices:
        devices = [part for part in devices.split(",") if part.strip()]
    if isinstance(devices, list):
        return len(devices) * nodes
    text = str(devices)
    return int(text) * nodes if text.isdigit() and int(text) else None


def _leave_unquantised(node: dict[str, Any]) -> list[str]:
    """Take `quantize` out of a module's tuning, since there are no weights to quantise, and say so."""
    arguments = ((node.get("init_args") or {}).get("tuning") or {}).get("init_args") or {}
    bits = arguments.get("quantize")
    if bits is None:
        return []
    arguments["quantize"] = None
    return [f"quantize {bits}: planned as if not; as much learns, and the frozen linear layers take less than shown"]
