"""What libraries say and a user can do nothing about is kept off the screen; what we say is one line."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path


def quieten() -> None:
    """Keep notices that a user can do nothing about off the screen."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for noise in (
        ".*does not have many workers.*",
        ".*LeafSpec.*deprecated.*",
        ".*module\\(s\\) in eval mode.*",  # frozen batch-norm statistics are meant
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*torch.jit.*deprecated.*",
        ".*overridden `on_after_batch_transfer` in `LightningModule`.*",  # meant: each hook has one owner
        ".*smaller than the logging interval.*",  # what is logged is counted over all epochs
        ".*returned a view tensor.*",  # of a sharded block; nothing works in place on it
        ".*callbacks used to create the checkpoint need to be provided.*",  # another monitor, say: harmless
    ):
        warnings.filterwarnings("ignore", noise)
    warnings.formatwarning = _plain(warnings.formatwarning)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # told on a machine without a GPU, whether or not anything is quantised: peft looks for it
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _plain(usual: Callable[..., str]) -> Callable[..., str]:
    """Show our own warnings as a line that says what to do, without the line of code that found it."""

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        ours = {"data_shards", "trainer"} & {*Path(filename).parts}
        return f"trainer: warning: {message}\n" if ours else usual(message, category, filename, lineno, line)

    return show
