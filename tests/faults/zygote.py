"""Runs ``trainer …`` in processes of its own without importing everything anew: it imports once, and forks.

Reads one JSON object a line: ``{"id": 1, "arguments": […], "environment": {…}, "output": FILE, "fault": {…} or null,
"folder": where it runs or null}``;
answers ``{"id": 1, "pid": …}`` at once, and ``{"id": 1, "code": …}`` at the end, where a signal's code is negative.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import os
import select
import signal
import sys
from typing import Any, NoReturn


def preload() -> None:
    """Import what a fit needs, so that no fork has to."""
    import trainer.lightning_cli
    import trainer.models
    import trainer.modules
    import trainer.tuning  # noqa: F401
    from trainer.quiet import quieten

    quieten()


def answer(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def become(order: dict[str, Any]) -> int:
    """Turn the fork into the command."""
    os.setsid()  # its workers die with it
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(output, number)
    os.close(0)
    faulthandler.register(signal.SIGUSR2)  # says where it is, if it hangs
    os.environ.update(order["environment"])
    if order["folder"]:
        os.chdir(order["folder"])
        sys.path.insert(0, "")  # as `python -m trainer.cli` has it
    sys.argv = ["trainer", *order["arguments"]]
    if order["fault"]:
        from inject import install

        install(order["fault"])
    from trainer.cli import main

    return main(order["arguments"])


def leave(code: int) -> NoReturn:
    """End as a program does, but for the modules: to take them apart takes longer than most commands."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve() -> None:
    """Fork for each order, until there are no more."""
    running: dict[int, int] = {}
    while True:
        if select.select([0], [], [], 0.02)[0]:
            line = sys.stdin.readline()
            if not line:
                return
            order = json.loads(line)
            child = os.fork()
            if child == 0:
                leave(become(order))
            running[child] = order["id"]
            answer(id=order["id"], pid=child)
        while running:
            child, status = os.waitpid(-1, os.WNOHANG)
            if child == 0:
                break
            if child in running:
                answer(id=running.pop(child), code=os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    preload()
    answer(ready=True)
    serve()
    leave(0)
