"""In the place of a training, without its weight: ``python -m stand_in ROOT STEPS [save|no] [CODE]``.

It takes a step every 50 ms, ends by SIGTERM or SIGUSR1 after the running one with code 143, saved unless told not to,
and goes on where it was saved. Where there is a CODE, its second rank ends with that at step 3, and the first one has
not come to where it listens to signals.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path


def main(root: str, steps: str, save: str = "save", code: str = "") -> int:
    told: list[int] = []
    for number in () if code else (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: told.append(number))
    rank = int(os.environ["SLURM_PROCID"])
    saved = Path(root) / "checkpoints" / "step"
    step = int(saved.read_text()) if saved.exists() else 0
    if rank == 0:
        print(
            f"begins at {step} on {os.environ['SLURMD_NODENAME']}, MASTER_ADDR={os.environ['MASTER_ADDR']}", flush=True
        )
    while step < int(steps):
        step += 1
        time.sleep(0.05)
        if rank == 0:
            (Path(root) / "now").write_text(str(step))
        if code and rank == 1 and step == 3:
            return int(code)
        if told:
            if save == "save" and rank == 0:
                time.sleep(0.5)  # the other rank has ended by now
                saved.parent.mkdir(exist_ok=True)
                saved.write_text(str(step))
                print(f"stopped by {signal.Signals(told[0]).name} at {step}", flush=True)
            return 143
    if rank == 0:
        print("ends", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
