"""A few of the faults of each kind, quickly; ``make faults`` injects all of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # as the processes that run the commands have it

from cases import Case
from harness import Lane, lane
from plan import all_cases
from run import FAILED, Result, page

CASES = all_cases()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lane]:
    with lane(tmp_path_factory.mktemp("faults")) as made:
        yield made


@pytest.mark.parametrize("case", [case for case in CASES if case.quick], ids=lambda case: f"{case.kind}, {case.where}")
def test_a_fault_ends_as_it_should(case: Case, place: Lane) -> None:
    assert case.strike(place)


def test_there_are_a_hundred_and_each_is_another() -> None:
    assert len(CASES) >= 100
    places = [(case.kind, case.where) for case in CASES]
    assert len(set(places)) == len(places)
    assert [(case.kind, case.where) for case in all_cases()] == places, "the same ones each time"


def test_the_table_counts_what_failed() -> None:
    results = [
        Result(CASES[0], "killed; went on and ended as undisturbed", 1.0),
        Result(CASES[0], "stopped: a line; went on and ended as undisturbed", 1.0),
        Result(CASES[0], f"{FAILED}: it hangs |", 1.0),
    ]
    text = page(results, 60.0)
    assert "| all | 1 | 1 | 1 | 3 |" in text
    assert r"it hangs \| | 1 |" in text
