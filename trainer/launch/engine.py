"""How the commands of SLURM and Kubernetes are asked."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from data_shards.errors import UserError


def ask(words: Sequence[str], failed: str, where: str, text: str | None = None) -> str:
    """Run a command of an engine and return what it says.

    Args:
        words: The command; no shell reads it.
        failed: What to say before the engine's own words if it fails.
        where: What to do where the command is not there.
        text: Its standard input.

    Raises:
        UserError: It is not there, or fails.
    """
    try:
        done = subprocess.run(words, input=text, capture_output=True, text=True, check=False)  # noqa: S603
    except FileNotFoundError:
        raise UserError(f"{words[0]} is not here: {where}") from None
    if done.returncode:
        raise UserError(f"{failed}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout
