"""Which code a result was made with."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CODE = "code"
"""Key of a checkpoint under which `code` is."""
_PACKAGES = ("torch", "lightning", "transformers")


@functools.cache
def code() -> dict[str, Any]:
    """SHA-256 over the sources of `trainer` and `data_shards`, their commit, and the versions of what they stand on."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"sha256": _sources(), "commit": git()["git_commit"], "versions": found}


def code_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What changed from one `code` to another, in a few words each; empty for nothing.

    Args:
        then: What a checkpoint holds, which may be anything.
        now: That of this process.
    """
    said = []
    if then.get("sha256") != now["sha256"]:
        commits = [str(one["commit"])[:10] if one.get("commit") else "" for one in (then, now)]
        named = all(commits) and commits[0] != commits[1]
        said.append(f"commit {commits[0]} → {commits[1]}" if named else "the code")
    versions = then.get("versions")
    for package, version in now["versions"].items():
        before = versions.get(package) if isinstance(versions, Mapping) else None
        if before is not None and before != version:
            said.append(f"{package} {before} → {version}")
    return said


def git() -> dict[str, Any]:
    """The commit that this code is from, and whether files were changed since; None where it is not known."""

    def said(*arguments: str) -> str:
        # by itself it would write the index anew, and if it is killed in that, leave a lock that stops a user's commits
        command = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603

    try:
        return {"git_commit": said("rev-parse", "HEAD"), "git_dirty": bool(said("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):  # installed from a wheel
        return {"git_commit": None, "git_dirty": None}


def _sources() -> str:
    found = hashlib.sha256()
    for package in ("data_shards", "trainer"):
        spec = importlib.util.find_spec(package)
        for root in spec.submodule_search_locations or () if spec else ():
            for path in sorted(Path(root).rglob("*.py")):
                found.update(f"{package}/{path.relative_to(root).as_posix()}\0".encode())
                found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()
