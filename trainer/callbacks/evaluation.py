"""What an evaluation leaves in the run: a row a target, and pictures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from data_shards.batch import TripletBatch
from data_shards.errors import UserError, counted
from data_shards.splits import EXTERNAL
from trainer.callbacks.ema import scored_weights
from trainer.callbacks.panels import PanelKeeper, RankKeeper, spread_samples
from trainer.callbacks.record import describe_data
from trainer.modules.scoring import Prediction
from trainer.modules.tuned import TunedModule
from trainer.presence import TermAnswer, record_answers
from trainer.ranks import every_rank
from trainer.report.panels import save_panels
from trainer.restore import outline_checkpoint
from trainer.run import Run, write_json
from trainer.scores import CaseScore, write_scores, write_spreads


class EvaluationRecord(Callback):
    """Writes what ``trainer test`` found to ``evaluation/NAME``, with ``panels.npz`` for the report.

    ``per_case.csv`` has a row for each target, ``summary.csv`` mean and quartiles of each data set, modality and term;
    ``evaluation.json`` says what was scored: the checkpoint, its step and which of its weights (raw, or their average),
    the split and the hash of its index.

    Of a model that is asked by text, ``presence.csv`` has a row for each term that an image was asked for, and
    ``presence.json`` says how often terms were found where they are, and where they are not.

    Args:
        name: The evaluation's name; by default ``untouched`` without a checkpoint and ``tuned`` with one. For an
            external set the folder's name follows, as in ``tuned-external-busi``, so that the report can pair them.
        panels: How many targets are kept as pictures, evenly spread over the split: the same ones in every evaluation.
            Besides, the best, the median and the worst by DSC are kept; at 0, none at all.
    """

    def __init__(self, name: str | None = None, panels: int = 16) -> None:
        if name is not None and not re.fullmatch(r"[\w-]+", name):
            raise UserError(f"an evaluation's name has letters, digits, - and _, not '{name}'")
        if panels < 0:
            raise UserError(f"panels is 0 or more, not {panels}")
        self.name, self.panels = name, panels

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the samples to show."""
        self._keeper = PanelKeeper(spread_samples(trainer.test_dataloaders, trainer.num_test_batches[0], self.panels))
        self._ranked = RankKeeper()
        self._skipped: dict[str, str] = {}

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Prediction, batch: TripletBatch, batch_idx: int
    ) -> None:
        """Keep the pictures of the chosen samples, and count those that could not be read."""
        self._skipped.update({item.key: item.reason for item in batch.skipped})
        self._keeper.keep(batch, outputs)
        assert isinstance(pl_module, TunedModule)
        for q in range(len(batch.masks)) if self.panels else ():
            if pl_module.counts(batch, q):
                self._ranked.keep(batch, outputs, q)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the tables and the pictures."""
        assert isinstance(pl_module, TunedModule)
        scores, kept = pl_module.gathered_scores(), self._keeper.gathered()
        shown = {(panel.key, panel.target) for panel in kept}
        ranked = self._ranked.gathered(scores, trainer.test_dataloaders.dataset.shards)
        kept += [panel for panel in ranked if (panel.key, panel.target) not in shown]
        answers: list[TermAnswer] = getattr(pl_module, "gathered_answers", list)()  # of modules that are asked in words
        skipped = {key: reason for part in every_rank(self._skipped) for key, reason in sorted(part.items())}
        if not trainer.is_global_zero:
            return
        folder = evaluation_folder(trainer)
        write_scores(folder / "per_case.csv", scores)
        write_spreads(folder / "summary.csv", scores)
        described = describe_evaluation(trainer, pl_module, folder.name, scores)
        write_json(folder / "evaluation.json", {**described, "skipped": skipped})
        record_answers(folder, answers, getattr(pl_module, "threshold", 0.5))
        if skipped:
            what = counted(len(skipped), "damaged sample was", "damaged samples were")
            print(f"{what} not scored: {folder / 'evaluation.json'} names them")
        if kept:
            save_panels(folder / "panels.npz", kept)


def evaluation_folder(trainer: Trainer) -> Path:
    """Where the evaluation that is running is recorded: as its `EvaluationRecord` names it."""
    named = [callback.name for callback in trainer.callbacks if isinstance(callback, EvaluationRecord)]
    name = next(filter(None, named), None) or _default_name(trainer)
    if trainer.num_test_batches[0] < len(trainer.test_dataloaders):
        name += "-partial"  # limit_test_batches: never in the place of a whole one
    return Run(trainer.default_root_dir).evaluation(name)


def _default_name(trainer: Trainer) -> str:
    name = "tuned" if trainer.ckpt_path else "untouched"
    folder = Path(str(trainer.datamodule.folders["test"]))
    external = next((one for one in (folder.name, folder.resolve().name) if one.startswith(EXTERNAL)), None)
    return f"{name}-{re.sub(r'[^A-Za-z0-9_-]', '_', external)}" if external else name


def describe_evaluation(trainer: Trainer, module: TunedModule, name: str, scores: list[CaseScore]) -> dict[str, Any]:
    """What was scored, on what data."""
    checkpoint = trainer.ckpt_path
    step: int | None = 0
    if checkpoint:  # its step is restored in a fit only
        step = outline_checkpoint(Path(checkpoint)).get("global_step")
    return {
        "name": name,
        "checkpoint": str(checkpoint) if checkpoint else None,
        "step": step,
        "weights": scored_weights(trainer),
        "data": describe_data(trainer.datamodule),
        "targets": len(scores),
        "preprocessing": module.model.preprocessing.to_dict(),
        "prompts": module.describe_prompts(),
        "precision": str(trainer.precision),
    }
