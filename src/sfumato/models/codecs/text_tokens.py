"""Texts as tokens: bytes, a public list of pieces, or a tokenizer from the disk; each ends with a token of its own.

Decoding never fails: whatever a model drew becomes a text, what is no character becomes U+FFFD.
Shapes: R records, L tokens at most, V of them to choose from.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from sfumato.errors import PrivacyRefused, UsageError
from sfumato.models.settings import Bytes, TextTokens, Tokenizer, Words
from sfumato.records import Modality, Record

END = 256  # where bytes are tokens
END_WORD = "<end>"


class TokenTexts(ABC):
    """Texts <-> (R, L) tokens. ``vocabulary`` counts the end token too."""

    modality: ClassVar[Modality] = "text"
    kind: ClassVar[Literal["tokens"]] = "tokens"
    settings: TextTokens
    vocabulary: int
    end: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.settings.longest,)

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        return ((0, self.vocabulary),) * self.settings.longest

    def coordinates(self) -> Tensor | None:
        return None

    def places(self) -> Tensor | None:
        return None

    @abstractmethod
    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Of each text, without an end."""

    @abstractmethod
    def text(self, tokens: Sequence[int]) -> str:
        """Of tokens without an end."""

    @abstractmethod
    def exported(self, more: Sequence[str]) -> str:
        """tokenizer.json of the same tokens, with ``more`` special ones after them: what ``transformers`` reads."""

    def encode(self, records: Sequence[Record]) -> tuple[Tensor, Tensor]:
        table = np.full((len(records), self.settings.longest), self.vocabulary, np.int64)
        rows = [row for row, record in enumerate(records) if record.text is not None]
        for row, found in zip(rows, self.tokens([records[row].text or "" for row in rows]), strict=True):
            ended = [*found, self.end][: self.settings.longest]
            table[row, : len(ended)] = ended
        present = torch.zeros(len(records), dtype=torch.bool)
        present[rows] = True
        return torch.from_numpy(table), present

    def blank(self, rows: int) -> Tensor:
        return torch.full((rows, self.settings.longest), self.vocabulary)

    def decode(self, encoded: Tensor) -> Sequence[str]:
        """What is after the first end, and padding, is no text."""
        texts = []
        for row in encoded.tolist():
            until = row[: row.index(self.end)] if self.end in row else row
            texts.append(self.text([token for token in until if 0 <= token < self.vocabulary]))
        return texts


class ByteTexts(TokenTexts):
    """0 .. 255 are bytes of UTF-8, 256 ends."""

    def __init__(self, settings: Bytes) -> None:
        self.settings, self.vocabulary, self.end = settings, END + 1, END

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(_utf8(text)) for text in texts]

    def text(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")

    def exported(self, more: Sequence[str]) -> str:
        return _longest_first([], more)


class WordTexts(TokenTexts):
    """0 .. 255 are bytes, 256 ends, then come the pieces of the list: at each place the longest that fits."""

    def __init__(self, settings: Words) -> None:
        self.settings, self.end = settings, END
        self.pieces = [word.encode() for word in settings.words]
        self.vocabulary = END + 1 + len(self.pieces)

    @cached_property
    def _cut(self) -> re.Pattern[bytes]:
        longest_first = sorted(self.pieces, key=len, reverse=True)
        return re.compile(b"|".join([*map(re.escape, longest_first), b"."]), re.DOTALL)

    @cached_property
    def _number(self) -> dict[bytes, int]:
        return {piece: END + 1 + i for i, piece in enumerate(self.pieces)}

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        number = self._number
        return [[number[p] if p in number else p[0] for p in self._cut.findall(_utf8(text))] for text in texts]

    def text(self, tokens: Sequence[int]) -> str:
        parts = [bytes([token]) if token < END else self.pieces[token - END - 1] for token in tokens if token != END]
        return b"".join(parts).decode("utf-8", errors="replace")

    def exported(self, more: Sequence[str]) -> str:
        return _longest_first(self.pieces, more)


class LoadedTexts(TokenTexts):
    """The tokens of a tokenizer.json as they are, and one more that ends."""

    def __init__(self, settings: Tokenizer) -> None:
        from tokenizers import Tokenizer as Loaded

        path = Path(settings.path)
        path = path / "tokenizer.json" if path.is_dir() else path
        try:
            content = path.read_bytes()
            self.loaded: Any = Loaded.from_buffer(content)
        except Exception as error:  # tokenizers raises Exception itself
            raise UsageError(
                f"model.text.path = {settings.path} · must be a tokenizer.json, or a folder with one ({error})",
                next="Save it with save_pretrained, and give that folder.",
            ) from None
        self.content, self.sha256 = content, hashlib.sha256(content).hexdigest()
        if settings.sha256 not in (None, self.sha256):
            raise UsageError(
                f"model.text.sha256 = {settings.sha256} · {path} has {self.sha256}",
                next="Give the tokenizer that the model was made with.",
            )
        self.loaded.no_padding()
        self.loaded.no_truncation()
        self.settings = settings
        self.end = 1 + max(self.loaded.get_vocab(with_added_tokens=True).values(), default=-1)
        self.vocabulary = self.end + 1

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in self.loaded.encode_batch(list(texts), add_special_tokens=False)]

    def text(self, tokens: Sequence[int]) -> str:
        return self.loaded.decode(list(tokens), skip_special_tokens=True)

    def exported(self, more: Sequence[str]) -> str:
        described = json.loads(self.loaded.to_str())
        described["added_tokens"] += [_special(self.end + i, word) for i, word in enumerate((END_WORD, *more))]
        return json.dumps(described, ensure_ascii=False)


def build(settings: TextTokens) -> TokenTexts:
    match settings:
        case Bytes():
            return ByteTexts(settings)
        case Words():
            return WordTexts(settings)
        case Tokenizer():
            return LoadedTexts(settings)


def fit(texts: Sequence[str], *, vocabulary: int, public: bool) -> str:
    """A byte-level BPE tokenizer fitted to texts, as tokenizer.json for ``Tokenizer``. Args: vocabulary: 257 or more.

    Raises PrivacyRefused unless the texts are declared public: the vocabulary is a function of them that no noise covers,
    and it leaves with the model. A word that one person alone used may stand in it.
    Source: Sennrich, Haddow & Birch 2016, arXiv:1508.07909, algorithm 1, on bytes.
    """
    if not public:
        raise PrivacyRefused(
            "public = False · a vocabulary fitted to private texts shows what stands in them, and no budget covers that",
            next="Fit it to public texts and say public=True, or use bytes, or write a list of words.",
            code="private_vocabulary",
        )
    if vocabulary < END + 1:
        raise UsageError(f"vocabulary = {vocabulary} · every byte must be in it", next="Give 257 or more.")
    from tokenizers import Tokenizer as Loaded
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = Loaded(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(texts, trainer)
    return made.to_str()


def _utf8(text: str) -> bytes:
    return text.encode(
        "utf-8", errors="replace"
    )  # half a surrogate pair, which no encoding takes, becomes a question mark


def _longest_first(pieces: Sequence[bytes], more: Sequence[str]) -> str:
    """tokenizer.json: bytes, <end>, pieces, more; the longest piece first is what WordPiece without a prefix does."""
    from tokenizers import Tokenizer as Loaded
    from tokenizers import decoders, models, pre_tokenizers

    letters = _letters()
    names = [letters[byte] for byte in range(256)] + [END_WORD]
    names += ["".join(letters[byte] for byte in piece) for piece in pieces] + list(more)
    model = models.WordPiece(
        {name: i for i, name in enumerate(names)},
        unk_token=END_WORD,
        continuing_subword_prefix="",
        max_input_chars_per_word=1_000_000,
    )
    made = Loaded(model)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    made.add_special_tokens([END_WORD, *more])
    return made.to_str()


def _letters() -> list[str]:
    """The letter that stands for each byte in byte-level tokenizers: printable ones for themselves (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _special(number: int, word: str) -> dict[str, Any]:
    return {
        "id": number, "content": word, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
        "special": True,
    }  # fmt: skip
