from __future__ import annotations

import pickle
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_shards.datamodule import TripletDataModule
from data_shards.errors import UserError
from data_shards.splits import ByPatient, Explicit, External, LikeMedicalSAM3, LikeMedSAM, Slabs


@dataclass(frozen=True)
class Case:
    id: str
    patient: str
    split: str | None = None


def test_patients_are_drawn_exactly_and_whatever_the_order() -> None:
    patients = [f"p{number}" for number in range(200)]
    split = ByPatient(fractions={"train": 0.7, "validation": 0.1, "test": 0.2}, seed=1)
    drawn = split.draw(patients)
    counts = [list(drawn.values()).count(name) for name in split.fractions]
    assert counts == [140, 20, 40]
    shuffled = random.Random(0).sample(patients, len(patients)) + patients[:50]
    assert split.draw(shuffled) == drawn
    other = ByPatient(fractions=split.fractions, seed=2).draw(patients)
    assert sum(other[name] != drawn[name] for name in patients) > 30


def test_all_cases_of_a_patient_stay_together() -> None:
    cases = [Case(f"{number}", f"p{number % 10}") for number in range(40)]
    rules = ByPatient(fractions={"a": 0.5, "b": 0.5}).assign(cases)
    for number, rule in enumerate(rules):
        assert rule(0) == rule(99) == rules[number % 10](5)


def test_patients_that_do_not_reach_every_split() -> None:
    with pytest.raises(UserError, match=r"split 'test' gets none of the 2 patients at a fraction of 0\.1"):
        ByPatient(fractions={"train": 0.9, "test": 0.1}).draw(["a", "b"])
    with pytest.raises(UserError, match=r"add up to 1, got 0\.9"):
        ByPatient(fractions={"train": 0.5, "test": 0.4})
    with pytest.raises(UserError, match="'a/b' cannot name a split"):
        ByPatient(fractions={"a/b": 1.0})


def test_explicit() -> None:
    cases = [Case("1", "a", "test"), Case("2", "b", "train")]
    assert [rule(7) for rule in Explicit().assign(cases)] == ["test", "train"]
    assert Explicit().split_names(cases) == ["test", "train"]
    with pytest.raises(UserError, match="case '3' names no split"):
        Explicit().assign([*cases, Case("3", "c")])
    with pytest.raises(UserError, match="case '1' names split 'test' but the split is 'slabs'"):
        Slabs().assign(cases)


@pytest.mark.parametrize(("thickness", "guard", "names"), [(12, 2, 2), (5, 0, 3), (7, 6, 2), (4, 1, 2)])
def test_slabs_keep_their_guard(thickness: int, guard: int, names: int) -> None:
    split = Slabs(start=26, stop=137, thickness=thickness, guard=guard, names=["train", "test", "val"][:names])
    found = {index: split.of(index) for index in range(200)}
    assert all(found[index] is None for index in [*range(26), *range(137, 200)])
    used = {index: name for index, name in found.items() if name is not None}
    assert set(used.values()) == set(split.names)
    distance = min(abs(a - b) for a in used for b in used if used[a] != used[b])
    assert distance == guard + 1


def test_slabs_of_the_quickstart() -> None:
    split = Slabs(start=26, stop=137)
    train = [index for index in range(189) if split.of(index) == "train"]
    test = [index for index in range(189) if split.of(index) == "test"]
    assert (len(train), len(test)) == (50, 43)
    assert train[:11] == [*range(26, 36), 50] and test[:2] == [38, 39]


def test_bad_slabs() -> None:
    with pytest.raises(UserError, match=r"thickness \(2\) must be above guard \(2\)"):
        Slabs(thickness=2, guard=2)
    with pytest.raises(UserError, match="two different splits"):
        Slabs(names=["train"])
    with pytest.raises(UserError, match="below stop"):
        Slabs(start=5, stop=5)


def test_the_papers_splits() -> None:
    patients = [f"p{number}" for number in range(200)]
    drawn = list(LikeMedSAM(seed=1).draw(patients).values())
    assert [drawn.count(name) for name in ("train", "validation", "test")] == [160, 20, 20]
    drawn = list(LikeMedicalSAM3().draw(patients).values())
    assert [drawn.count(name) for name in ("train", "validation")] == [170, 30]
    assert LikeMedicalSAM3() == LikeMedicalSAM3(seed=42)
    same = ByPatient(fractions=LikeMedicalSAM3().fractions, seed=42)
    assert same.draw(patients) == LikeMedicalSAM3().draw(patients)


def test_an_external_set_is_never_trained_on(tmp_path: Path) -> None:
    cases = [Case("1", "a"), Case("2", "b")]
    assert [rule(3) for rule in External().assign(cases)] == ["external", "external"]
    with pytest.raises(UserError, match="starts with 'external'"):
        External(name="train")
    data = TripletDataModule(train=str(tmp_path / "external"), test=str(tmp_path / "external"))
    with pytest.raises(UserError, match=r"train: .* is an external set: it is for `test` only"):
        data.setup("fit")
    (tmp_path / "train").symlink_to(tmp_path / "external")
    with pytest.raises(UserError, match=r"train: .* is an external set: it is for `test` only"):
        TripletDataModule(train=str(tmp_path / "train")).setup("fit")
    with pytest.raises(UserError, match=r"val: .* is an external set"):  # nor may it choose a checkpoint
        TripletDataModule(val=str(tmp_path / "external_ward")).setup("validate")


def test_rules_name_their_splits_and_travel() -> None:
    cases = [Case("1", "a"), Case("2", "b")]
    for split in (ByPatient(fractions={"a": 0.5, "b": 0.5}), External(), Slabs(names=["x", "y"])):
        for rule in split.assign(cases):
            copy = pickle.loads(pickle.dumps(rule))
            found = {copy(index) for index in range(100)} - {None}
            assert found == set(rule.splits) and found <= set(split.split_names(cases))
