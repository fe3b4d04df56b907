"""Text becomes the tokens that SAM3's own code makes of it."""

from __future__ import annotations

import copy
import gzip
import importlib.util
import json
import os
import pickle
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from data_shards.errors import UserError
from data_shards.vocabulary import vocabulary
from trainer.models import tokenizer as module
from trainer.models.tokenizer import TextTokenizer, make_tokenizer

START, END, LIVER, CUT = 49406, 49407, 12639, 32

WRITTEN = (
    "Crohn’s disease", "“dark” T2*-weighted lesion", "ﬁbroma, ﬄuid, ﬆ", "ＣＴ　ｌｉｖｅｒ", "GTV-1 (node #2), 5 µm",
    "1234567890 3.14 m²", "don't they're we've I'll I'd 'S it's", "  LIVER\n\tleft\u00a0kidney  ", "ΟΔΟΣ σΣ", "肝臓",
    "café cafe\u0301 naïve Ångström", "İstanbul ẞ", "печень", "a" * 500, "liver " * 60, "x" * 30 + " y", "a_b",
    "&amp; &lt;b&gt; &#39; &amp;amp;", "!!! ... ?!", "❤️ heart", "\ufeffliver\u200b", "½ Ⅳ ①", "`tick´", "e\x0bf \x07",
    "\u2028x", "ĳ ǆ", "<|endoftext|> of the liver",
)  # fmt: skip


@pytest.fixture(scope="module")
def merges() -> Path:
    """The file that open-clip-torch ships."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("no byte pairs: open-clip-torch is not installed")
    return Path(next(iter(spec.submodule_search_locations))) / "bpe_simple_vocab_16e6.txt.gz"


@pytest.fixture(scope="module")
def tokenizer(merges: Path) -> TextTokenizer:
    return make_tokenizer(str(merges))


@pytest.fixture(scope="module")
def official(merges: Path) -> Callable[..., Tensor]:
    """The tokenizer of PyPI `sam3`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pytest.importorskip("sam3.model.tokenizer_ve")
    reference: Callable[..., Tensor] = found.SimpleTokenizer(str(merges))
    return reference


def names() -> list[str]:
    return [name for term, others in vocabulary().synonyms.items() for name in (term, *others)]


def test_a_term_by_hand(tokenizer: TextTokenizer) -> None:
    tokens, mask = tokenizer(["liver", "A  LIVER"])
    assert tokens.dtype == torch.int64 and mask.dtype == torch.bool and tokens.shape == mask.shape == (2, 32)
    assert tokens[0].tolist() == [START, LIVER, END, *[0] * 29]
    assert tokens[1].tolist() == [START, 320, LIVER, END, *[0] * 28]
    assert mask.sum(1).tolist() == [3, 4] and mask[0, :3].all()
    assert tokenizer.vocabulary == 49408


def test_every_term_of_the_vocabulary_is_as_in_sam3(tokenizer: TextTokenizer, official: Callable[..., Tensor]) -> None:
    texts = names()
    assert len(texts) > 900
    for changed in (texts, [text.upper() for text in texts], [f"axial CT of the {text}, T1-w." for text in texts]):
        expected = official(changed, context_length=32)
        tokens, mask = tokenizer(changed)
        assert torch.equal(tokens, expected) and torch.equal(mask, expected != 0)


@pytest.mark.parametrize("context", [32, 77, 5])
def test_whatever_is_written_is_as_in_sam3(
    tokenizer: TextTokenizer, official: Callable[..., Tensor], context: int, merges: Path
) -> None:
    tokens, _ = make_tokenizer(str(merges), context=context)(WRITTEN)
    assert torch.equal(tokens, official(list(WRITTEN), context_length=context))
    assert (tokens == END).sum(1).eq(1).all()


def test_random_letters_are_as_in_sam3(tokenizer: TextTokenizer, official: Callable[..., Tensor]) -> None:
    """All that does not happen to look, to ftfy, like text that was decoded wrongly."""
    ftfy = pytest.importorskip("ftfy")
    drawn = random.Random(0)
    codes = (*range(32, 127), *range(160, 0x130), *range(0x14A, 0x1C4), *range(0x370, 0x530), *range(0x2010, 0x2060))
    letters = [chr(code) for code in (*codes, *range(0x300, 0x345))]
    texts = ["a" + "".join(drawn.choices(letters, k=drawn.randrange(1, 25))) for _ in range(500)]
    texts = [text for text in texts if ftfy.fix_encoding(text) == text]
    assert len(texts) > 450
    assert torch.equal(tokenizer(texts)[0], official(texts, context_length=32))


def test_too_long_a_text_keeps_its_end(tokenizer: TextTokenizer) -> None:
    tokens, mask = tokenizer(["liver " * 30, "liver " * 31])
    assert tokens.tolist() == [[START, *[LIVER] * 30, END]] * 2 and mask.all()


@pytest.mark.parametrize("text", ["", "  \n", "\ufeff", "&nbsp;"])
def test_an_empty_text_is_refused(tokenizer: TextTokenizer, text: str) -> None:
    with pytest.raises(UserError, match="is empty: name what is to be segmented"):
        tokenizer(["liver", text])


# --- padding


def test_padding_is_never_seen(tokenizer: TextTokenizer) -> None:
    """Zeros as in SAM3, end tokens as in transformers, mask or none: what is encoded of the text is the same."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    config = CLIPTextConfig(vocab_size=49408, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
                            num_attention_heads=2, max_position_embeddings=32, projection_dim=8)  # fmt: skip
    model = CLIPTextModelWithProjection(config).eval()
    nn.init.normal_(model.get_input_embeddings().weight)
    tokens, mask = tokenizer(["liver", "left kidney tumour", "liver " * 40])
    padded = tokens.where(mask, END)
    assert not torch.equal(tokens, padded)
    with torch.no_grad():
        ours = model(tokens, attention_mask=mask).last_hidden_state
        for ids, given in ((padded, mask), (padded, mask.long()), (tokens, None), (padded, None)):
            other = model(ids, attention_mask=given).last_hidden_state
            torch.testing.assert_close(ours[mask], other[mask], rtol=0, atol=1e-6)
        assert not torch.allclose(ours[~mask], model(padded).last_hidden_state[~mask])  # of padding it is another


# --- where it comes from


def saved(folder: Path, merges: Path, old: bool) -> Path:
    """Write the files of transformers, as it did before or does now."""
    vocab, pairs = module._content((merges,))
    folder.mkdir()
    if old:
        (folder / "vocab.json").write_text(json.dumps(vocab))
        lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs), ""]
        (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    else:
        module._read((merges,)).save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("old", [True, False])
def test_folders_of_transformers(tokenizer: TextTokenizer, merges: Path, tmp_path: Path, old: bool) -> None:
    folder = saved(tmp_path / "sam3", merges, old)
    texts = [*names()[::7], *WRITTEN]
    expected = tokenizer(texts)[0]
    (folder / "model.safetensors").touch()
    for source in (
        {"tokenizer": str(folder)},
        {"weights": str(folder)},
        {"weights": str(folder / "model.safetensors")},
    ):
        assert torch.equal(make_tokenizer(**source)(texts)[0], expected)


def test_merges_as_text_or_as_pairs(tokenizer: TextTokenizer, merges: Path, tmp_path: Path) -> None:
    vocab, pairs = module._content((merges,))
    for name, written in (("a", [" ".join(pair) for pair in pairs]), ("b", [list(pair) for pair in pairs])):
        path = tmp_path / name / "tokenizer.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"model": {"vocab": vocab, "merges": written}}))
        assert make_tokenizer(str(path)).encode("hepatic vein") == tokenizer.encode("hepatic vein")


def tiny(folder: Path, letters: str) -> Path:
    """A tokenizer of a few letters, known again by their number."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab, "merges": []}}))
    return folder


def test_what_is_looked_at_first(merges: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is named, what lies beside the weights or in the hub's cache, what a package ships."""
    from huggingface_hub import constants

    named, beside = str(tiny(tmp_path / "named", "a")), tiny(tmp_path / "beside", "ab")
    (beside / "sam3.pt").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hub = tmp_path / "hub" / "models--facebook--sam3"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("0" * 40)
    tiny(hub / "snapshots" / ("0" * 40), "abc")
    (tmp_path / "bare").mkdir()
    for tokenizer, weights, size in (
        (named, str(beside), 4), (None, str(beside), 6), (None, str(beside / "sam3.pt"), 6), (None, "facebook/sam3", 8),
        (None, "facebook/sam3:sam3.pt", 8), ("facebook/sam3", None, 8), ("null", "null", 49408), (None, None, 49408),
        (None, "facebook/other", 49408), (None, str(tmp_path / "bare"), 49408), (None, "a--b/..", 49408),
    ):  # fmt: skip
        assert make_tokenizer(tokenizer, weights).vocabulary == size, (tokenizer, weights)


def test_what_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merges: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer facebook/unheard: there is no tokenizer\.json, vocab\.json with"):
        make_tokenizer("facebook/unheard")
    with pytest.raises(UserError, match=r"there is no tokenizer\.json"):
        make_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="context 2: a text takes 3 tokens or more"):
        make_tokenizer(str(merges), context=2)
    data = merges.read_bytes()
    for number, (name, content, part) in enumerate(
        (
            ("tokenizer.json", b"{}", "'model'"),
            ("tokenizer.json", b"\xff{", "decode"),
            ("tokenizer.json", b'{"model": {"vocab": {"a": 0}, "merges": []}}', r"no <\|startoftext\|>"),
            (
                "tokenizer.json",
                b'{"model": {"vocab": {"<|startoftext|>": 0, "<|endoftext|>": 1}, "merges": ["a b"]}}',
                "a",
            ),
            ("bpe_simple_vocab_16e6.txt.gz", data[: len(data) // 2], "end-of-stream"),
            ("bpe_simple_vocab_16e6.txt.gz", b"no gzip", "gzip"),
            ("bpe_simple_vocab_16e6.txt.gz", gzip.compress(b"version\ni n\n"), "1 merges"),
        )
    ):
        path = tmp_path / str(number) / name
        path.parent.mkdir()
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"is not CLIP's or is damaged \(.*{part}.*\): fetch it again"):
            make_tokenizer(str(path))
    monkeypatch.setattr(module, "packaged_merges", lambda: ())
    with pytest.raises(
        UserError, match="no tokenizer, neither beside the weights nor in a package: pip install open-clip-torch"
    ):
        make_tokenizer()


# --- as a part of a model


def test_it_goes_with_a_model_and_is_no_weight(tokenizer: TextTokenizer) -> None:
    model = nn.Linear(1, 1)
    model.tokenizer = tokenizer
    assert set(model.state_dict()) == {"weight", "bias"}
    text = "<|endoftext|> of the left kidney"
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.tokenizer.encode(text) == tokenizer.encode(text) and other.tokenizer.context == CUT


def test_the_package_does_not_run_and_a_fork_warns_of_nothing(merges: Path) -> None:
    """Tokenizers warns of every process that is forked once it has used threads, such as a loader's workers."""
    assert module.packaged_merges() == (merges,)
    code = """if True:
        import os, sys
        from trainer.models.tokenizer import make_tokenizer
        make_tokenizer()(["liver", "spleen"] * 20)
        assert "open_clip" not in sys.modules
        child = os.fork()
        make_tokenizer()(["liver"] * 20)
        if child:
            os.waitpid(child, 0)
    """
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    said = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment)
    assert said.returncode == 0 and "tokenizers" not in said.stderr
