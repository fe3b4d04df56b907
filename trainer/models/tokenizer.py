"""Text into tokens, as SAM3 reads it: CLIP's byte pairs (Radford et al. 2021), cut off or padded to one length.

Shapes: K texts.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import html
import importlib.util
import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data_shards.errors import UserError
from trainer.models.weights import source_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTEXT = 32
"""Tokens of a text in SAM3, first and last included."""
_START, _END = "<|startoftext|>", "<|endoftext|>"
_MERGES = 49_152 - 256 - 2
"""Merges that CLIP takes from its file, which has more."""
_GZIP = "bpe_simple_vocab_16e6.txt.gz"
_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"), (_GZIP,))
"""What a folder may hold: as transformers writes it today, as it did before, as OpenAI and Meta ship it."""
_WANTED = "tokenizer.json, vocab.json with merges.txt, or " + _GZIP
_PLAIN = (
    *(0x132, 0x133, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB05), 0xFB06),
    *(0x3000, *range(0xFF01, 0xFFF0)),
)
_CLEANED: dict[int, str | None] = {
    **dict.fromkeys((0x2BC, *range(0x2018, 0x201C)), "'"),
    **dict.fromkeys(range(0x201C, 0x2020), '"'),
    **{code: unicodedata.normalize("NFKC", chr(code)) for code in _PLAIN},
    **dict.fromkeys((*range(9), 0xB, *range(0xE, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD))),
}
"""What ftfy does to a text before SAM3 sees it: straight quotes, ligatures and wide letters in full, no controls."""


class TextTokenizer:
    """Texts as tokens: a start, the byte pairs of the text in lower case, an end, and zeros.

    Equal to the tokenizer of SAM3's own code but for text that was decoded wrongly (``Ã©`` for ``é``) or holds terminal
    escapes, which that code mends by ftfy, and for the names of its special tokens, which are plain text here.

    Padding is 0, as in SAM3's own code; transformers pads with the end token. That makes no difference: the text
    encoder is causal, so that no token sees the padding behind it, and whatever reads the encoded text leaves out what
    `mask` does not name.

    Args:
        pieces: Turns a cleaned text into byte pairs; from `make_tokenizer`.
        context: Tokens of a text, first and last included.

    Raises:
        UserError: `context` leaves no room for a text.
    """

    def __init__(self, pieces: Tokenizer, context: int = CONTEXT) -> None:
        if context < 3:
            raise UserError(f"context {context}: a text takes 3 tokens or more: its start, one of it, and its end")
        pieces.encode_special_tokens = True  # their names in a text are text
        self._pieces, self.context = pieces, context
        numbers = pieces.get_vocab()
        self._start, self._end = numbers[_START], numbers[_END]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._pieces.encode_special_tokens = True  # which tokenizers forgets in a copy

    @property
    def vocabulary(self) -> int:
        """Number of different tokens, which is what the text encoder needs rows for (49,408 for CLIP's)."""
        return int(self._pieces.get_vocab_size())

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Turn texts into tokens.

        Args:
            texts: K texts.

        Returns:
            Tokens (K, context) int64, 0 where a text has ended, and a mask (K, context) bool, True where it has not.
            What is too long is cut off before its last place, which the end takes.

        Raises:
            UserError: A text is empty.
        """
        tokens = torch.zeros(len(texts), self.context, dtype=torch.int64)
        mask = torch.zeros(len(texts), self.context, dtype=torch.bool)
        for row, text in enumerate(texts):
            found = self.encode(text)
            tokens[row, : len(found)] = torch.tensor(found)
            mask[row, : len(found)] = True
        return tokens, mask

    def encode(self, text: str) -> list[int]:
        """Return the tokens of one text, 3 to `context` of them.

        Raises:
            UserError: The text is empty.
        """
        # text by text: in a batch, tokenizers starts threads, and then warns of every worker that is forked later
        found = self._pieces.encode(_cleaned(text), add_special_tokens=False).ids
        if not found:
            raise UserError(f"text prompt {text!r} is empty: name what is to be segmented")
        return [self._start, *found[: self.context - 2], self._end]

    def standalone(self) -> Tokenizer:
        """The same as one of `tokenizers`, whose file its users in any language read: it cleans, cuts off and pads.

        HTML entities (``&amp;``) are left as they are, and of an empty text start and end remain.
        """
        from tokenizers import Regex, Tokenizer, normalizers, processors

        made = Tokenizer.from_str(self._pieces.to_str())
        codes: dict[str, list[int]] = {}
        for code, plain in _CLEANED.items():
            codes.setdefault(plain or "", []).append(code)
        cleaned = [
            normalizers.Replace(Regex("[" + "".join(f"\\x{{{code:X}}}" for code in group) + "]"), plain)
            for plain, group in codes.items()
        ]
        made.normalizer = normalizers.Sequence([*cleaned, normalizers.NFC(), normalizers.Lowercase()])
        made.post_processor = processors.TemplateProcessing(
            single=f"{_START} $A {_END}", special_tokens=[(_START, self._start), (_END, self._end)]
        )
        made.enable_truncation(self.context)
        made.enable_padding(length=self.context, pad_id=0, pad_token=made.id_to_token(0))
        return made


def make_tokenizer(tokenizer: str | None = None, weights: str | None = None, context: int = CONTEXT) -> TextTokenizer:
    """Make the tokenizer of a SAM3.

    Args:
        tokenizer: A folder with ``tokenizer.json``, ``vocab.json`` and ``merges.txt``, or
            ``bpe_simple_vocab_16e6.txt.gz``; one of these files; or a hub name whose files are cached. None looks
            beside the weights, and then into the package ``open-clip-torch``, of which only the file is read.
        weights: Source of the weights, as `read_weights` takes it.
        context: Tokens of a text, first and last included.

    Raises:
        UserError: There is none, or it is damaged.
    """
    tokenizer, weights = source_of(tokenizer), source_of(weights)
    if tokenizer is not None:
        found = _files_of(tokenizer)
        if not found:
            raise UserError(f"tokenizer {tokenizer}: there is no {_WANTED}: give the folder of one, or null")
        return TextTokenizer(_read(found), context)
    beside = _files_of(weights) if weights is not None else ()
    found = beside or packaged_merges()
    if not found:
        raise UserError(
            "no tokenizer, neither beside the weights nor in a package: pip install open-clip-torch, or give tokenizer "
            f"a folder with {_WANTED}"
        )
    return TextTokenizer(_read(found), context)


def _cleaned(text: str) -> str:
    """What SAM3's own code does to a text first; the order matters."""
    plain = html.unescape(html.unescape(text)).translate(_CLEANED)
    return " ".join(unicodedata.normalize("NFC", plain).split()).lower()


def _files_of(source: str) -> tuple[Path, ...]:
    """The files of the tokenizer in a folder, beside or in a file, or in the hub's cache; none if there are none."""
    path = Path(source).expanduser()
    if path.is_file():
        if path.name in (_GZIP, "tokenizer.json") or path.suffix == ".gz":
            return (path,)
        path = path.parent
    if path.is_dir():
        groups = [tuple(path / name for name in names) for names in _FILES]
    else:
        groups = [tuple(filter(None, (_cached(source, name) for name in names))) for names in _FILES]
        groups = [found for found, names in zip(groups, _FILES, strict=True) if len(found) == len(names)]
    return next((group for group in groups if all(file.is_file() for file in group)), ())


def _cached(source: str, name: str) -> Path | None:
    """A file of a repository of the hub (``owner/repository`` or ``owner/repository:file``) that was fetched before."""
    repository = source.partition(":")[0]
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        return None
    from huggingface_hub import try_to_load_from_cache

    with contextlib.suppress(ValueError):  # not a name that the hub allows
        found = try_to_load_from_cache(repository, name)
        return Path(found) if isinstance(found, str) else None
    return None


def packaged_merges() -> tuple[Path, ...]:
    """The file that open-clip-torch ships; its code is not needed and does not run."""
    spec = importlib.util.find_spec("open_clip")
    folders = [] if spec is None else spec.submodule_search_locations or []
    return tuple(path for folder in folders if (path := Path(folder) / _GZIP).is_file())[:1]


@functools.cache
def _read(files: tuple[Path, ...]) -> Tokenizer:
    """Build the tokenizer of some files; once for a process, as a model is made several times."""
    from transformers import CLIPTokenizer

    try:
        vocabulary, merges = _content(files)
        missing = [token for token in (_START, _END) if token not in vocabulary]
        if missing:
            raise ValueError(f"no {missing[0]}")
        pieces: Tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges).backend_tokenizer
    except Exception as error:  # whatever damaged bytes make gzip, json and tokenizers raise
        why = " ".join(str(error).split())[:120]
        raise UserError(f"tokenizer {files[0]}: is not CLIP's or is damaged ({why}): fetch it again") from error
    return pieces


def _content(files: tuple[Path, ...]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the number of each piece, and the merges in order."""
    if len(files) == 2:
        lines = files[1].read_text(encoding="utf-8").splitlines()
        return json.loads(files[0].read_text(encoding="utf-8")), _pairs(lines[lines[0].startswith("#version") :])
    if files[0].name.endswith(".json"):
        model: dict[str, Any] = json.loads(files[0].read_text(encoding="utf-8"))["model"]
        return dict(model["vocab"]), _pairs(model["merges"])
    from tokenizers.pre_tokenizers import ByteLevel

    _, *lines = gzip.decompress(files[0].read_bytes()).decode("utf-8").splitlines()
    merges = _pairs(lines[:_MERGES])
    if len(merges) < _MERGES:
        raise ValueError(f"{len(merges)} merges")
    letters = sorted(ByteLevel.alphabet())  # in the order of CLIP's: printable bytes first, as themselves
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), _START, _END]
    return {piece: number for number, piece in enumerate(pieces)}, merges


def _pairs(merges: Sequence[str | Sequence[str]]) -> list[tuple[str, str]]:
    """Merges as pairs, which files write in two ways; empty lines are left out."""
    found = [merge.split() if isinstance(merge, str) else merge for merge in merges]
    return [(first, second) for first, second in filter(None, found)]
