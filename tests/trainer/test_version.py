"""Which code a result was made with, asked without a trace."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from trainer import version


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that this code seems to lie in, with a file that is the same though its time is another."""
    (tmp_path / "file.py").write_text("pass\n")
    told(tmp_path, "init", "--quiet")
    told(tmp_path, "add", ".")
    told(
        tmp_path,
        "-c",
        "user.name=n",
        "-c",
        "user.email=e@example.org",
        "-c",
        "commit.gpgsign=false",
        "commit",
        "--quiet",
        "-m",
        "one",
    )
    os.utime(tmp_path / "file.py", (10**9, 10**9))
    monkeypatch.setattr(version, "__file__", str(tmp_path / "version.py"))
    return tmp_path


def told(folder: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True).stdout.strip()


def test_commit_and_changes(repository: Path) -> None:
    commit = told(repository, "rev-parse", "HEAD")
    assert version.git() == {"git_commit": commit, "git_dirty": False}
    (repository / "file.py").write_text("fail\n")
    assert version.git() == {"git_commit": commit, "git_dirty": True}


def test_asking_writes_nothing_that_a_killed_run_could_leave_half_done(repository: Path) -> None:
    """Git's own way takes index.lock and writes the index anew; killed in that, it leaves a lock on every commit."""
    index = repository / ".git/index"
    before = index.stat()
    assert version.git()["git_dirty"] is False
    assert (index.stat().st_ino, index.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    told(repository, "status")
    assert index.stat().st_ino != before.st_ino


def test_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version, "__file__", str(tmp_path / "version.py"))
    assert version.git() == {"git_commit": None, "git_dirty": None}
