"""What is done to runs, and how they have to end: as if nothing had happened, or with one line that says what did."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from harness import Ended, Lane, Variant, finish, lines, wait_for

SAME = "as undisturbed"
ONE = Variant("one rank")
TWO = Variant("DDP, 2 ranks", ranks=2)
SHARDED = Variant("FSDP2, 2 ranks", ranks=2, strategy={"class_path": "trainer.distributed.FSDP2"})
WORKERS = Variant("one rank, 2 workers", options=(("data.init_args.num_workers", 2),))
UNTOUCHED = Variant("DDP, 2 ranks, validated first", ranks=2, options=(("trainer.num_sanity_val_steps", -1),))
VARIANTS = (ONE, TWO, SHARDED)


@dataclass(frozen=True)
class Case:
    """One injected fault.

    Attributes:
        kind: What is injected.
        where: In which run, on which rank, at which moment.
        strike: Does it, and checks how it ends; the outcome in words.
        quick: Whether the test suite does it too.
    """

    kind: str
    where: str
    strike: Callable[[Lane], str]
    quick: bool = False


def told(line: str, lane: Lane) -> str:
    """A line without the folders of this machine."""
    return line.replace(str(lane.root), "run").replace(str(lane.home), "").replace(str(lane.home.resolve()), "")


def after(lane: Lane, variant: Variant, ended: Ended, how: str) -> str:
    """Go on with a run that was stopped; it ends as the undisturbed one."""
    on = lane.go_on(variant)
    refused = [told(line, lane) for line in on.lines if ".ckpt" in line and ": " in line and "going on" not in line]
    return f"{how}; went on and ended {SAME}" + "".join(f" ({line})" for line in refused[:1])


def survivors(ended: Ended, lane: Lane) -> str:
    """What the ranks say that were not killed: each one line, which names the loss."""
    ended.check_quiet()
    left = [code for code in ended.codes if code != -signal.SIGKILL]
    assert all(code in (0, 2) for code in left), (ended.codes, ended.lines)
    assert len(ended.errors) == left.count(2), "\n".join(ended.lines)
    assert all("lost another rank" in line for line in ended.errors), ended.errors
    return f"killed; the other says: {told(ended.errors[0].partition('; then')[0], lane)}" if ended.errors else "killed"


def strike_from_outside(
    variant: Variant,
    number: int,
    rank: int | None,
    moment: int,
    delay: float,
    how: str = "torchrun",
    twice: bool = False,
) -> Callable[[Lane], str]:
    """Send a signal to a rank, or to all with their workers, some time after the run has traced so many batches."""

    def strike(lane: Lane) -> str:
        lane.undisturbed(variant)
        lane.anew()
        processes = lane.start(variant, how=how)
        wait_for(processes[0], lane.root, moment)
        time.sleep(delay)
        for process in processes if rank is None else [processes[rank]]:
            process.signal(number, group=rank is None)
        if twice:
            time.sleep(0.05)
            processes[rank or 0].signal(number)
        ended = finish(processes)
        said = survivors(ended, lane) if number == signal.SIGKILL else stopped(ended, lane)
        return after(lane, variant, ended, f"{said} after {max(0, lines(lane.root) - 1)} batches")

    return strike


def stopped(ended: Ended, lane: Lane) -> str:
    """What SIGTERM makes of a run: each rank ends with 143, the first with one line; or the run was over before."""
    ended.check_quiet()
    if set(ended.codes) == {0}:
        return "over before"
    assert set(ended.codes) == {143}, (ended.codes, ended.lines)
    said = [line for line in ended.lines if line.startswith("stopped by SIGTERM at step")]
    assert len(said) == 1 and not ended.errors, ended.lines
    return said[0]


def strike_from_inside(variant: Variant, faults: dict[int, dict], how: str = "torchrun") -> Callable[[Lane], str]:
    """Let ranks do something to themselves."""

    def strike(lane: Lane) -> str:
        lane.undisturbed(variant)
        lane.anew()
        ended = lane.run(variant, faults, how=how)
        killed = any(fault["do"] == "kill" for fault in faults.values())
        if killed and -signal.SIGKILL not in ended.codes:
            raise AssertionError(f"it was not hit: {ended.codes} {ended.lines}")
        said = survivors(ended, lane) if killed else stopped(ended, lane)
        if lane.struck.exists():
            said = f"at '{lane.struck.read_text()}': {said}"
        return after(lane, variant, ended, said)

    return strike


def strike_launched(rank: int, number: int, moment: int) -> Callable[[Lane], str]:
    """Send a signal to the first process of a run that starts its ranks itself, or to the one that it started."""

    def strike(lane: Lane) -> str:
        lane.undisturbed(TWO)
        lane.anew()
        processes = lane.launch(TWO)
        wait_for(processes[0], lane.root, moment)
        processes[rank].signal(number)
        ended = finish(processes[:1])
        end = time.monotonic() + 30
        while Path(f"/proc/{processes[1].pid}").exists() and time.monotonic() < end:  # it may be a little later
            time.sleep(0.05)
        assert not Path(f"/proc/{processes[1].pid}").exists(), "the other rank is left behind"
        ended = Ended(ended.codes, [processes[0].said])
        ended.check_quiet()
        if number == signal.SIGTERM:
            said = stopped(ended, lane)
        else:
            assert ended.codes == [2 if rank else -signal.SIGKILL], (ended.codes, ended.lines)
            assert len(ended.errors) == 1 and "lost another rank" in ended.errors[0], ended.lines
            said = f"killed; the other says: {told(ended.errors[0].partition('; then')[0], lane)}"
        return after(lane, TWO, ended, said)

    return strike


def launched(rng: random.Random) -> Iterator[Case]:
    """The same where one process starts the others."""
    for number, kind in ((signal.SIGTERM, "SIGTERM"), (signal.SIGKILL, "kill -9 of a rank")):
        for rank in (0, 1):
            moment = rng.randint(3, 12)
            where = f"{TWO.name}, started by the first, rank {rank}, after batch {moment}"
            yield Case(kind, where, strike_launched(rank, number, moment))


def kills(rng: random.Random) -> Iterator[Case]:
    """Of a rank, of all ranks; at random moments, of the step and of the run."""
    for variant, count in ((ONE, 8), (TWO, 8), (SHARDED, 6), (WORKERS, 3)):
        for number in range(count):
            rank, moment, delay = rng.randrange(variant.ranks), rng.randint(1, 22), rng.random() * 0.3
            where = f"{variant.name}, rank {rank}, {delay:.2f} s after batch {moment}"
            strike = strike_from_outside(variant, signal.SIGKILL, rank, moment, delay)
            yield Case("kill -9 of a rank", where, strike, quick=number == 0 and variant is TWO)
    for variant in (TWO, TWO, SHARDED, SHARDED, WORKERS):
        moment, delay = rng.randint(1, 22), rng.random() * 0.3
        where = f"{variant.name}, {delay:.2f} s after batch {moment}"
        yield Case("kill -9 of all ranks", where, strike_from_outside(variant, signal.SIGKILL, None, moment, delay))


def terms(rng: random.Random) -> Iterator[Case]:
    """SIGTERM at each rank: at random moments, in validations, while a checkpoint is written, twice, to all."""
    kind = "SIGTERM"
    for variant, count in ((ONE, 4), (TWO, 3), (SHARDED, 2)):
        for rank in range(variant.ranks):
            for number in range(count):
                moment, delay = rng.randint(2, 20), rng.random() * 0.2
                where = f"{variant.name}, rank {rank}, {delay:.2f} s after batch {moment}"
                strike = strike_from_outside(variant, signal.SIGTERM, rank, moment, delay)
                yield Case(kind, where, strike, quick=number == 0 and rank == 1 and variant is TWO)
            at = {"at": "hook", "do": "term", "step": 6}
            for hook, nth in (("on_validation_start", 1), ("on_validation_batch_end", 2), ("on_train_epoch_end", 1)):
                faults = {rank: {**at, "hook": hook, "nth": nth}}
                yield Case(
                    kind, f"{variant.name}, rank {rank}, {hook} {nth} of step 6", strike_from_inside(variant, faults)
                )
    for variant in VARIANTS:
        for nth in (3, 9):
            faults = {0: {"at": "file", "path": "/checkpoints/", "nth": nth, "do": "term"}}
            where = f"{variant.name}, while a checkpoint is written (its folder's change {nth})"
            yield Case(kind, where, strike_from_inside(variant, faults))
    for rank, nth in ((0, 1), (1, 1), (1, 2)):
        fault = {"at": "hook", "hook": "on_validation_batch_end", "step": 0, "nth": nth, "sanity": True, "do": "term"}
        where = f"{UNTOUCHED.name}, rank {rank}, batch {nth} of that"
        yield Case(kind, where, strike_from_inside(UNTOUCHED, {rank: fault}))
    for variant, how in ((TWO, "srun"), (WORKERS, "torchrun")):
        for moment in (5, 13):
            strike = strike_from_outside(variant, signal.SIGTERM, None, moment, 0.0, how)
            yield Case(kind, f"{variant.name} ({how}), all processes, after batch {moment}", strike)
    strike = strike_from_outside(TWO, signal.SIGTERM, 1, 9, 0.0, "srun", twice=True)
    yield Case(kind, f"{TWO.name} (srun), rank 1, twice, after batch 9", strike)


def broken_writes(rng: random.Random) -> Iterator[Case]:
    """Kills while a checkpoint is written: before each change in its folder, and inside of its files."""
    kind = "kill -9 in a checkpoint's write"
    at = {"at": "file", "path": "/checkpoints/", "do": "kill"}
    for variant, changes, count in ((ONE, range(26, 48), 14), (SHARDED, range(32, 58), 9)):
        chosen = sorted(rng.sample(list(changes), count))
        for nth in chosen:
            faults = {0: {**at, "nth": nth}}
            where = f"{variant.name}, rank 0, before change {nth} of the folder"
            yield Case(kind, where, strike_from_inside(variant, faults), quick=nth == chosen[0] and variant is ONE)
    for variant in VARIANTS:
        for share in (0.1, 1.5, 2.9):
            size = int(share * (18_000_000 if variant is not SHARDED else 9_000_000))
            faults = {0: {"at": "write", "bytes": size, "do": "kill"}}
            yield Case(kind, f"{variant.name}, rank 0, after {size:,} bytes", strike_from_inside(variant, faults))
    faults = {1: {"at": "write", "bytes": 5_000_000, "do": "kill"}}
    yield Case(kind, f"{SHARDED.name}, rank 1, after 5,000,000 bytes", strike_from_inside(SHARDED, faults))
