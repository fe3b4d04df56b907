"""TensorBoard: figures, what the run is made of, and panels, as one event file for each attempt."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from data_shards.errors import UserError
from trainer.recipe import flat
from trainer.run import Run


class TensorBoard(TensorBoardLogger):
    """Logs to ``tensorboard/`` of the run; a run that goes on writes one more file there, and its curves go on too.

    Args:
        panels: Whether the pictures of validations go there.

    Raises:
        UserError: The package is not installed.
    """

    def __init__(self, panels: bool = True) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise UserError("trainer.logger: TensorBoard needs another package: pip install 'sam-trainer[tensorboard]'")
        super().__init__(save_dir=".", name="tensorboard", version="")
        self._experiment: Any = None
        self.panels = panels

    def place(self, run: Run, step: int = 0) -> None:
        """Say whose figures these are.

        Args:
            run: The run.
            step: Where it goes on: what an earlier attempt logged from there on is drawn no more.
        """
        self._root_dir = str(run.root)
        if step and self._experiment is None:
            self._kwargs["purge_step"] = step

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any], *_: Any) -> None:
        """Write what a run is made of, as hyperparameters by dotted key and as a text."""
        from torch.utils.tensorboard.summary import hparams

        plain = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in flat(params).items()
        }
        for summary in hparams(plain, {}):
            self.experiment._get_file_writer().add_summary(summary)
        self.experiment.add_text("run", f"```json\n{json.dumps(params, indent=2)}\n```")

    @rank_zero_only
    def log_image(self, key: str, images: Sequence[Image.Image], step: int | None = None) -> None:
        """Write pictures, where panels are wanted."""
        for number, image in enumerate(images if self.panels else ()):
            name = f"{key}/{number}" if number else key
            self.experiment.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    @rank_zero_only
    def save(self) -> None:
        """Write what is waiting; nothing is begun for it."""
        if self._experiment is not None:
            self._experiment.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the file."""
        if self._experiment is not None:
            self._experiment.close()
            self._experiment = None
