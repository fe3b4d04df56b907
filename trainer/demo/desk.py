"""The images of all visitors, by browser tab: so many at most, the oldest make room."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from data_shards.errors import UserError
from trainer.demo.case import Case
from trainer.demo.limits import Limits
from trainer.demo.uploads import Upload, plain, take_in


class Desk:
    """Opens images for visitors and keeps them while they are here; close it at the end.

    Args:
        limits: What a visitor may bring.
        most: Visitors whose images are kept.
        intensity: What models are shown; see `open_scan`.
        fill: See `open_scan`.
    """

    def __init__(self, limits: Limits, most: int = 8, intensity: str | None = None, fill: float | None = None) -> None:
        self.limits, self.most, self.intensity, self.fill = limits, most, intensity, fill
        self._cases: OrderedDict[str, Case] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._cases)

    def open(self, who: str, files: Sequence[Path]) -> Case:
        """Open what a visitor uploaded, in place of what they had.

        Args:
            who: The visitor's tab.
            files: What was uploaded.

        Raises:
            UserError: It cannot be opened; what they had stays.
        """
        folder = Path(tempfile.mkdtemp(prefix="sam-trainer-demo-"))
        try:
            upload = take_in(files, folder, self.limits)
            return self._keep(who, self._case(upload, folder))
        except UserError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise UserError(plain(error, folder)) from None
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def open_example(self, who: str, path: Path) -> Case:
        """Open an image of ours for a visitor."""
        return self._keep(who, self._case(Upload(path, path.name), None))

    def case(self, who: str) -> Case | None:
        """A visitor's image, if they have one."""
        with self._lock:
            if who in self._cases:
                self._cases.move_to_end(who)
            return self._cases.get(who)

    def leave(self, who: str) -> None:
        """Forget a visitor and their files."""
        with self._lock:
            case = self._cases.pop(who, None)
        if case is not None:
            case.close()

    def close(self) -> None:
        """Forget all."""
        for who in list(self._cases):
            self.leave(who)

    def _case(self, upload: Upload, folder: Path | None) -> Case:
        return Case(
            upload, folder, self.intensity, self.fill, lambda count: self.limits.check_voxels(count, upload.name)
        )

    def _keep(self, who: str, case: Case) -> Case:
        with self._lock:
            gone = [self._cases.pop(who)] if who in self._cases else []
            self._cases[who] = case
            while len(self._cases) > self.most:
                gone.append(self._cases.popitem(last=False)[1])
        for one in gone:
            one.close()
        return case
