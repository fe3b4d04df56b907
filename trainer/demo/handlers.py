"""What happens when a visitor does something; knows nothing of Gradio, and answers with an `Update`.

A mistake of the visitor's, or a damaged file, is one line on the page.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_shards.errors import UserError, counted
from trainer.demo.answering import Answering
from trainer.demo.case import Case, Shown
from trainer.demo.desk import Desk
from trainer.demo.saving import save

EMPTY = "open an image first"
_TELL = 0.25
"""Seconds between two lines about what is being computed."""


@dataclass(frozen=True)
class Update:
    """What the page should show now.

    Attributes:
        case: The visitor's image.
        line: What there is to say.
        error: Whether it is a complaint.
        share: How much of a longer computation is done, 0 to 1; None where there is none.
        whole: Whether picture and objects are to be drawn anew.
        file: What is to be downloaded.
    """

    case: Case | None
    line: str = ""
    error: bool = False
    share: float | None = None
    whole: bool = True
    file: Path | None = None


class Handlers:
    """One for all visitors; each is known by their tab.

    Args:
        desk: Their images.
        answering: The model.
    """

    def __init__(self, desk: Desk, answering: Answering) -> None:
        self.desk, self.answering = desk, answering

    def open(self, who: str, files: Sequence[str]) -> Update:
        """Open what was uploaded; the uploads themselves are deleted."""
        paths = [Path(file) for file in files]
        try:
            return self._tried(who, lambda case: self._opened(self.desk.open(who, paths)), needs=False)
        finally:
            for path in paths:
                path.unlink(missing_ok=True)

    def example(self, who: str, path: Path) -> Update:
        """Open an image that came with a package."""
        return self._tried(who, lambda case: self._opened(self.desk.open_example(who, path)), needs=False)

    def turn(self, who: str, number: float) -> Update:
        """Show another slice."""

        def work(case: Case) -> Update:
            case.slice = max(0, min(len(case.scan) - 1, int(number)))
            return Update(case)

        return self._tried(who, work)

    def step(self, who: str, by: int) -> Update:
        """Show a slice before or after."""
        return self._tried(who, lambda case: self.turn(who, case.slice + (1 if by > 0 else -1)))

    def window(self, who: str, rule: str | None) -> Update:
        """Show the image otherwise, to visitor and model."""

        def work(case: Case) -> Update:
            case.window(rule)
            return Update(case, "The model sees what you see: prompts from now on are answered in this window.")

        return self._tried(who, work)

    def draw(self, who: str, given: Mapping[str, Any]) -> Update:
        """Ask about the active object with a new box, or with one more point."""

        def work(case: Case) -> Update:
            if self.answering.words:
                raise UserError("SAM3 is asked in words: say what to find, and press Find")
            shown = case.scene.current.shown.get(case.slice, Shown())
            if "box" in given:
                shown = replace(shown, box=_numbers(given["box"], 4))
            else:
                x, y, label = _numbers(given.get("point"), 3)
                shown = replace(shown, points=(*shown.points, (x, y, int(label))))
            return self._answered(case, self.answering.show(case, shown))

        return self._tried(who, work)

    def find(self, who: str, term: str, instances: bool) -> Update:
        """Ask for a term on the slice on show."""

        def work(case: Case) -> Update:
            found, seconds = self.answering.find(case, term or "", instances)
            what = counted(found, "object") if instances else f"'{term.strip()}'"
            line = f"Found {what} in {seconds:.2f} s." if found else f"Nothing was found there ({seconds:.2f} s)."
            return Update(case, line)

        return self._tried(who, work)

    def follow(self, who: str, first: float | None, last: float | None) -> Iterator[Update]:
        """Follow what is shown through slices from first to last."""
        yield from self._long(who, first, last, lambda case, a, b: self.answering.follow(case, a, b))

    def find_all(self, who: str, term: str, first: float | None, last: float | None) -> Iterator[Update]:
        """Ask for a term on all slices from first to last."""
        yield from self._long(who, first, last, lambda case, a, b: self.answering.find_all(case, term or "", a, b))

    def stop(self, who: str) -> None:
        """End what is being computed for a visitor; what was found stays."""
        case = self.desk.case(who)
        if case is not None:
            case.stopped.set()

    def undo(self, who: str) -> Update:
        """Take the last step back."""
        return self._tried(who, lambda case: Update(case, "" if case.undo() else "There is nothing to undo."))

    def clear(self, who: str) -> Update:
        """Take the active object from the slice on show."""
        return self._tried(who, lambda case: _after(case, case.clear))

    def add(self, who: str) -> Update:
        """Begin another object."""
        return self._tried(who, lambda case: _after(case, case.add))

    def activate(self, who: str, place: int) -> Update:
        """Let prompts belong to another object."""
        return self._tried(who, lambda case: _after(case, lambda: case.activate(int(place))))

    def rename(self, who: str, place: int, name: str) -> Update:
        """Call an object something else."""
        return self._tried(who, lambda case: _after(case, lambda: case.rename(int(place), str(name))))

    def remove(self, who: str, place: int) -> Update:
        """Delete an object."""
        return self._tried(who, lambda case: _after(case, lambda: case.remove(int(place))))

    def save(self, who: str, form: str) -> Update:
        """Write a file to download."""

        def work(case: Case) -> Update:
            file = save(case, form)
            return Update(case, f"{file.name} is ready.", whole=False, file=file)

        return self._tried(who, work)

    def _opened(self, case: Case) -> Update:
        if self.answering.words:
            case.score = "confidence"
        height, width = case.scan.size
        what = f"{width} × {height}" if len(case.scan) == 1 else f"{len(case.scan)} × {width} × {height}"
        spacing = case.spacing
        unit = "" if spacing is None else f", {' × '.join(f'{step:.3g}' for step in spacing)} mm"
        notes = [note.replace(f"{case.scan.name}: ", "") for note in case.notes]
        return Update(case, " ".join([f"Opened {case.name}: {what}{unit}.", *notes]))

    def _answered(self, case: Case, seconds: float) -> Update:
        found = case.slice in case.scene.current.answers
        line = f"Answered in {seconds:.2f} s." if found else f"Nothing was found there ({seconds:.2f} s)."
        return Update(case, line)

    def _long(
        self,
        who: str,
        first: float | None,
        last: float | None,
        begin: Callable[[Case, int, int], Iterator[int]],
    ) -> Iterator[Update]:
        """Tell how far something is, and draw at its end, or where it was stopped."""
        case = self.desk.case(who)
        if case is None:
            yield Update(None, EMPTY, error=True)
            return
        try:
            low, high = _limits(case, first, last)
            case.stopped.clear()
            started = told = time.perf_counter()
            done, total = 0, high - low + 1
            for done in begin(case, low, high):
                if time.perf_counter() - told > _TELL:
                    told = time.perf_counter()
                    left = (told - started) / done * (total - done)
                    line = f"{done} of {counted(total, 'slice')}, about {left:.0f} s to go"
                    yield Update(case, line, share=done / total, whole=False)
            seconds = time.perf_counter() - started
            words = "Stopped after" if done < total else "Done:"
            yield Update(
                case, f"{words} {counted(done, 'slice')} in {seconds:.1f} s ({seconds / max(1, done):.2f} s each)."
            )
        except Exception as error:
            yield _complaint(case, error)

    def _tried(self, who: str, work: Callable[[Case], Update], needs: bool = True) -> Update:
        """Do something with a visitor's image; what goes wrong is one line."""
        case = self.desk.case(who)
        try:
            if case is None:
                if needs:
                    raise UserError(EMPTY)
                return work(None)  # type: ignore[arg-type]  # it is not looked at
            if not needs:  # it is closed there, and so not held
                case.stopped.set()
                return work(case)
            with case.lock:
                if case.closed:
                    raise UserError("this image has made room for others: open it again")
                return work(case)
        except Exception as error:
            return _complaint(self.desk.case(who), error)


def _after(case: Case, work: Callable[[], None]) -> Update:
    work()
    return Update(case)


def _complaint(case: Case | None, error: Exception) -> Update:
    """One line for the visitor; faults of ours are told in full on the terminal."""
    if isinstance(error, UserError):
        return Update(case, str(error), error=True)
    traceback.print_exception(error)
    name = type(error).__name__
    return Update(case, f"that went wrong here ({name}); the terminal of `trainer demo` says more", error=True)


def _limits(case: Case, first: float | None, last: float | None) -> tuple[int, int]:
    low = 0 if first is None else int(first)
    high = len(case.scan) - 1 if last is None else int(last)
    if not 0 <= low <= high < len(case.scan):
        raise UserError(f"slices {low} to {high} are asked for, the image has 0 to {len(case.scan) - 1}")
    return low, high


def _numbers(given: Any, count: int) -> Any:
    """Numbers that a page has sent.

    Raises:
        UserError: They are none.
    """
    try:
        numbers = tuple(float(number) for number in given)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != count:
        raise UserError(f"{count} numbers are needed")
    return numbers
