"""What a linter finds, and the one table of its checks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from data_shards.errors import counted

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""From the worst on. An error makes training or scores wrong, a warning probably does, a note is good to know."""

MOST_KEPT = 100_000
"""Findings of one check that are kept whole; what comes after is only counted, so that memory has an end."""


class Place(NamedTuple):
    """Another sample that a finding is about."""

    split: str
    key: str
    number: int


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        code: The check that found it.
        severity: How bad it is.
        message: What is wrong and what to do, on one line.
        split: The split; empty for the whole corpus.
        key: The sample; empty if it is about more than one.
        term: The term, if it is about one.
        value: What was measured, if it is a number.
        number: The sample's number in its split, or −1.
        target: The number of the target in the sample, or −1.
        other: The sample that this one is compared with.
    """

    code: str
    severity: Severity
    message: str
    split: str = ""
    key: str = ""
    term: str = ""
    value: float | None = None
    number: int = -1
    target: int = -1
    other: Place | None = None


class Problem(NamedTuple):
    """What a check of one sample says; which sample it is, the caller knows."""

    message: str
    target: int = -1
    value: float | None = None
    term: str = ""


@dataclass(frozen=True)
class Check:
    """One kind of finding.

    Attributes:
        code: Its stable name.
        severity: How bad what it finds is.
        about: What it finds, in one sentence.
        scope: What it looks at: every ``"sample"``, the whole ``"corpus"``, or what happens while ``"reading"``.
        find: The function that looks: from a `Sample` to its problems, or from a `Corpus` to its findings.
    """

    code: str
    severity: Severity
    about: str
    scope: Literal["sample", "corpus", "reading"]
    find: Callable[[Any], Iterable[Any]] | None = None

    def finding(self, message: str, **where: Any) -> Finding:
        """Return a finding of this check."""
        return Finding(self.code, self.severity, message, **where)


CHECKS: dict[str, Check] = {}
"""Every check by its code, in the order in which they are shown."""


def sample_check(code: str, severity: Severity, about: str) -> Callable[[Callable], Callable]:
    """Register a function from a `Sample` to its `Problem`s; it runs in the workers."""
    return _register(code, severity, about, "sample")


def corpus_check(code: str, severity: Severity, about: str) -> Callable[[Callable], Callable]:
    """Register a function from a `Corpus` to its `Problem`s with the row they are about: see `survey`."""
    return _register(code, severity, about, "corpus")


def _reading_check(code: str, severity: Severity, about: str) -> Check:
    CHECKS[code] = Check(code, severity, about, "reading")
    return CHECKS[code]


def _register(
    code: str, severity: Severity, about: str, scope: Literal["sample", "corpus"]
) -> Callable[[Callable], Callable]:
    def register(find: Callable) -> Callable:
        assert code not in CHECKS, code
        CHECKS[code] = Check(code, severity, about, scope, find)
        return find

    return register


UNREADABLE = _reading_check("unreadable-sample", "error", "A sample is damaged or cannot be read.")
MISSING = _reading_check("missing-shard", "error", "A shard that the index lists is not there.")
DAMAGED = _reading_check("damaged-shard", "error", "A shard has another size than the index records.")
NO_INDEX = _reading_check("unreadable-index", "error", "A split has no index, or a damaged one.")
OLD_INDEX = _reading_check("old-index", "note", "An index is of an old version: volumes and spacings are not known.")


@dataclass(frozen=True)
class SplitFacts:
    """What was linted of a split.

    Attributes:
        samples: Samples in its index.
        linted: Those that could be read, of those to be looked at.
        index_sha256: SHA-256 of its index; empty where there is none to read.
    """

    samples: int
    linted: int
    index_sha256: str


@dataclass
class Report:
    """All that was found.

    Attributes:
        folder: What was linted, as the user wrote it.
        splits: What was linted of each split.
        findings: The findings, worst first; of each check the first `MOST_KEPT`.
        counts: How many there are, by (code, split).
        ignored: Codes of the checks that were not run.
        remarks: What was not looked at, one sentence each.
        seconds: Time taken.
    """

    folder: str
    splits: dict[str, SplitFacts] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    ignored: tuple[str, ...] = ()
    remarks: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, finding: Finding) -> None:
        """Count a finding, and keep it unless there are very many of its kind."""
        if finding.code in self.ignored:
            return
        self.counts[finding.code, finding.split] += 1
        if sum(self.counts[finding.code, split] for split in {"", finding.split, *self.splits}) <= MOST_KEPT:
            self.findings.append(finding)

    def sort(self) -> None:
        """Order the findings: the worst first, then by check, split and sample."""
        codes = {code: number for number, code in enumerate(CHECKS)}
        splits = {name: number for number, name in enumerate(["", *self.splits])}
        self.findings.sort(
            key=lambda item: (
                SEVERITIES.index(item.severity),
                codes[item.code],
                splits[item.split],
                item.number,
                item.target,
                item.message,
            )
        )

    def total(self, severity: Severity) -> int:
        """Return the number of findings of a severity."""
        return sum(count for (code, _), count in self.counts.items() if CHECKS[code].severity == severity)

    @property
    def worst(self) -> Severity | None:
        """The worst severity found, if any."""
        return next((severity for severity in SEVERITIES if self.total(severity)), None)

    @property
    def samples(self) -> int:
        """Samples in the corpus."""
        return sum(split.samples for split in self.splits.values())

    @property
    def linted(self) -> int:
        """Samples that were read and looked at."""
        return sum(split.linted for split in self.splits.values())

    def found(self) -> list[tuple[Check, dict[str, int]]]:
        """Return each check that found something with its count by split, the worst first."""
        result = []
        for check in sorted(CHECKS.values(), key=lambda check: SEVERITIES.index(check.severity)):
            counts = {split: self.counts[check.code, split] for split in ["", *self.splits]}
            if any(counts.values()):
                result.append((check, {split: count for split, count in counts.items() if count}))
        return result

    def exit_code(self, fail_on: str) -> int:
        """Return the exit code of a command.

        Args:
            fail_on: ``"error"``: 2 if there is an error, else 0. ``"warning"``: 2 if there is an error, 1 if warnings
                are the worst, else 0. ``"never"``: 0.
        """
        if fail_on == "never" or self.worst in (None, "note"):
            return 0
        if self.worst == "error":
            return 2
        return 1 if fail_on == "warning" else 0

    def summary(self) -> str:
        """Return the result in one sentence."""
        counts = {severity: self.total(severity) for severity in SEVERITIES}
        parts = [counted(count, severity) for severity, count in counts.items() if count]
        listed = " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]])) or "nothing"
        looked = ("" if self.linted == self.samples else f"{self.linted:,} of ") + counted(self.samples, "sample")
        verdict = {
            "error": "Mend the errors before you train",
            "warning": "Look at the warnings before you train",
            "note": "Nothing here speaks against training",
            None: "Nothing here speaks against training",
        }[self.worst]
        return f"{verdict}: {listed} found in {looked} of {counted(len(self.splits), 'split')}."
