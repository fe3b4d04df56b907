"""Errors that a user can mend: one clear line, exit code 2, never a traceback."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a damaged file could tell a terminal to do, or what cannot be printed at all."""


class UserError(Exception):
    """A mistake in the user's input.

    The message is one line: it names the file, key or sample and says what to do.
    """

    def __str__(self) -> str:
        # A DataLoader worker wraps the message of what it raises in a traceback, whose last entry is the error itself
        # (those before it are its causes): give back that line only.
        text = super().__str__()
        if "Original Traceback" in text:
            text = re.split(r"^[\w.]*(?:User|Damage)Error: ", text, flags=re.MULTILINE)[-1]
        return _UNPRINTABLE.sub("?", " ".join(text.split()))


class DamageError(UserError):
    """A sample that cannot be read, whatever is tried again: its own bytes are wrong, or its shard is gone."""


def nearest(name: str, options: Iterable[str]) -> str:
    """Return a hint such as ``; did you mean 'lr'?`` or, with nothing near, the options.

    Args:
        name: What the user wrote.
        options: What would have been accepted.
    """
    options = sorted(set(options))
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(options)}" if options else ""


class CommandParser(argparse.ArgumentParser):
    """A parser without abbreviations, whose complaints are `UserError` and name the nearest option."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **kwargs, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving.

        Raises:
            UserError: Always.
        """
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            name = unknown.group(1).partition("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            message = f"unexpected '{name}'{nearest(name, known) if name.startswith('-') else ''}"
        raise UserError(f"{message}; see {self.prog} --help")


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun, as ``1 sample`` or ``2,000 samples``; a plural may be another than with an s."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def run_command(main: Callable[[], int | None], name: str) -> int:
    """Run a command's body and turn its `UserError` into one line on stderr.

    Args:
        main: The body; its result is the exit code, ``None`` being 0.
        name: The command's name, put before the message.

    Returns:
        The exit code: 2 for a user's mistake, 130 when interrupted.
    """
    try:
        return main() or 0
    except UserError as error:
        _say(name, f"error: {error}", error)
        return 2
    except PermissionError as error:
        _say(name, f"error: {error.filename}: permission denied: change the path or its rights", error)
        return 2
    except SystemExit as done:  # argparse after --help
        _say(name, "", done)
        return done.code if isinstance(done.code, int) else 0
    except KeyboardInterrupt as error:
        _say(name, "interrupted", error)
        return 130


def _say(name: str, message: str, error: BaseException) -> None:
    """Print a message, if any, and the notes of an error, which say what is left and how to go on."""
    for line in (*filter(None, [message]), *getattr(error, "__notes__", ())):
        print(f"{name}: {line}", file=sys.stderr)
