"""Texts that leave the machine: without its paths, hosts and users."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from trainer.run import opening

NOTE = """\
# The recipe of the run that these weights are from, as it was resolved. So that it names no machine, folders and
# addresses of data and files are cut to their last part, and what the loggers and the cluster were told is left out.
"""
_LEFT_OUT = ("logger", "cluster")
"""Keys that may name hosts, accounts and users."""
_SLASHES = ("monitor",)
"""Keys whose values have a slash and are no paths."""
_WEIGHTS = ("weights", "tokenizer", "tracker")
"""Keys that name a file, or a repository of the hub."""
_FILE_ENDINGS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
_LOCAL = r"""
    file:/+[^\s'",;)\]}]+                                    # an address of this machine
  | (?:[A-Za-z]:[\\/]|\\\\|/)[^\s'",;)\]}]+                # from the root, or of a server
  | ~[\w.-]*[\\/][^\s'",;)\]}]*                            # from a home
  | (?:\.\.?[\\/])+[^\s'",;)\]}]+                          # from here
"""
_ADDRESS = r"""
    [A-Za-z][\w+.-]*://[^\s'",;)\]}]+
  | pipe:[^'"\n]+                                          # a command
"""
_BEFORE = r"(?<![\w.~/\\:-])"
"""Where a word begins."""
_PATHS = re.compile(f"{_BEFORE}(?:{_LOCAL})", re.VERBOSE)
_ALL = re.compile(f"{_BEFORE}(?:{_ADDRESS}|{_LOCAL})", re.VERBOSE)


def without_paths(text: str, addresses: bool = False) -> str:
    """A text in which every path of a machine is cut to its last part.

    Args:
        text: The text.
        addresses: Whether addresses may stay, as in what data sets say of themselves.
    """
    return (_PATHS if addresses else _ALL).sub(lambda found: last_part(found.group()), text)


def last_part(path: str) -> str:
    """The last part of a path or an address, such as ``train``; what is behind a question mark does not count."""
    plain = re.split(r"[?#]", path.removeprefix("pipe:"))[0].rstrip("/\\")
    return re.split(r"[/\\\s]", plain)[-1].split("@")[-1] or "(folder)"


def _cut(node: Any, key: str = "") -> Any:
    if isinstance(node, Mapping):
        return {name: _cut(child, str(name)) for name, child in node.items() if name not in _LEFT_OUT}
    if isinstance(node, list | tuple):
        return [_cut(child, key) for child in node]
    if not isinstance(node, str) or key in _SLASHES:
        return node
    if key in _WEIGHTS and hub_name(node):
        return node
    return last_part(node) if "/" in node or _ALL.match(node) else node


def hub_name(source: str) -> str:
    """The repository that a source of weights names, such as ``facebook/sam3``; empty if it is a file or a folder."""
    found = re.fullmatch(r"(?P<repository>\w[\w-]*/[\w-][\w.-]*)(?P<file>:[\w./-]+)?", source)
    local = found is None or (not found["file"] and (source.endswith(_FILE_ENDINGS) or Path(source).exists()))
    return "" if found is None or local else found["repository"]


def travelling_recipe(text: str) -> str:
    """A run's recipe as it travels with an export.

    Args:
        text: The resolved recipe, below its opening comment.
    """
    content = _cut(yaml.safe_load(text))
    question, caveat = opening(text)
    said = [question, f"Caveat: {caveat}" if caveat else ""]
    comment = "".join(f"# {without_paths(line)}\n" for line in said if line)
    return NOTE + comment + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)
