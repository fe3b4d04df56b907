"""A run's folder."""

from __future__ import annotations

import threading
from pathlib import Path

from trainer.run import Run


def test_ranks_that_start_at_once_do_not_take_each_others_probes(tmp_path: Path) -> None:
    failed, together = [], threading.Barrier(4)

    def rank() -> None:
        together.wait()
        try:
            for number in range(200):
                Run(tmp_path / f"run-{number}").create()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=rank) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert [list(folder.iterdir()) for folder in tmp_path.iterdir()] == [[]] * 200
