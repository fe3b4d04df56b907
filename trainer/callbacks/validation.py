"""The course of a training's validations, and what tuning made worse."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from trainer.modules.scoring import ScoredModule
from trainer.ranks import every_rank
from trainer.report.tables import Row, read_rows
from trainer.run import Run, naming
from trainer.scores import SPREAD_COLUMNS, CaseScore, pair, read_scores, spreads, write_scores, write_table

COLUMNS = ("step", "epoch", *SPREAD_COLUMNS)


class ValidationRecord(Callback):
    """Writes every validation's mean and quartiles, by data set, modality and term, to ``validation.csv`` of the run.

    ``validation/last.csv`` has each target's scores at the last one. With ``trainer.num_sanity_val_steps: -1`` the
    untouched model is validated before the first step: that is step 0, kept in ``validation/untouched.csv``, and every
    later validation logs ``val/dsc_gain``, the mean gain of the same targets, and ``val/targets_worse``, the share of
    them that lost more than `worse`.

    Args:
        worse: Loss of DSC from which a target counts as worse than untouched.
    """

    def __init__(self, worse: float = 0.05) -> None:
        self.worse = worse
        self._untouched: list[CaseScore] = []
        self._written = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with what an earlier attempt recorded; a training that starts anew keeps nothing of one before."""
        run = Run(trainer.default_root_dir)
        if trainer.global_step == 0:
            if trainer.is_global_zero and not self._untouched:
                _forget(run)
            return
        if trainer.is_global_zero:
            keep_before(run.validations, trainer.global_step + 1)
        self._written = trainer.global_step  # a validation at this very step may come again
        kept = run.validation / "untouched.csv"
        self._untouched = every_rank(list(read_scores(kept)) if trainer.is_global_zero and kept.is_file() else [])[0]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record a validation of the training, and log what became of the untouched model's targets."""
        assert isinstance(pl_module, ScoredModule)
        if trainer.state.fn != "fit":
            return
        scores, run = pl_module.gathered_scores(), Run(trainer.default_root_dir)
        if trainer.sanity_checking:
            if trainer.global_step:  # a run that goes on: these weights are not the untouched ones
                return
            if scores and trainer.num_sanity_val_batches == trainer.num_val_batches:  # a part is no reference
                self._untouched = scores
                if trainer.is_global_zero:
                    _forget(run)
                    write_scores(run.validation / "untouched.csv", scores)
                    self._record(run, trainer, scores)
            return
        pairs = pair(self._untouched, scores)
        if pairs:
            gains = np.array([after.dsc - before.dsc for before, after in pairs])
            logged = {"val/dsc_gain": gains.mean(), "val/targets_worse": (gains < -self.worse).mean()}
            # every rank holds the same rows, so reducing changes nothing, and spares Lightning's warning
            pl_module.log_dict({name: float(value) for name, value in logged.items()}, sync_dist=True)
        if scores and trainer.is_global_zero:
            write_scores(run.validation / "last.csv", scores)
            self._record(run, trainer, scores)

    def _record(self, run: Run, trainer: Trainer, scores: Sequence[CaseScore]) -> None:
        step = trainer.global_step
        if step <= self._written:
            keep_before(run.validations, step)
        if not run.validations.exists():
            write_table(run.validations, COLUMNS, [])
        rows = [(step, trainer.current_epoch, *astuple(spread)) for spread in spreads(scores)]
        with naming(run.validations), run.validations.open("a", newline="", encoding="utf-8") as handle:
            writer = csv.writer(handle, lineterminator="\n")
            writer.writerows([f"{cell:.6f}" if isinstance(cell, float) else cell for cell in row] for row in rows)
        self._written = step


def keep_before(path: Path, step: int) -> None:
    """Leave of a table of validations those before a step; what a kill left of a last row is cut away.

    Raises:
        UserError: The table is damaged elsewhere.
    """
    if path.is_file():
        rows = list(read_rows(path, _row, "table of validations"))
        write_table(path, COLUMNS, [cells for at, cells in rows if at < step])


def _row(row: Row) -> tuple[int, tuple[str, ...]]:
    return int(row["step"]), tuple(row[name] for name in COLUMNS)


def _forget(run: Run) -> None:
    for path in (run.validations, run.validation / "untouched.csv", run.validation / "last.csv"):
        path.unlink(missing_ok=True)
