"""Prompts to token ids: CLIP's tokenizer, and prompts longer than the model's window in chunks.

A prompt is a text, or sections of weighted spans (see `prompt_syntax.emphasis`), each of which begins a new window.
"""

import dataclasses
import functools
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sdjax.errors import ConfigError, DataError
from sdjax.text.syntax import Sections, Span

COMMA_BACKTRACK = 20  # tokens that may follow a comma into the next window, as in A1111


class _Piece(NamedTuple):
    """Ids that must not be divided, and their weight: a token, or all vectors of a new word."""

    ids: tuple[int, ...]
    weight: float


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer and the window its text model reads, begin and end token included."""

    vocabulary: Any  # transformers' CLIPTokenizer
    window: int
    begin: int
    end: int
    pad: int
    placeholders: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    """New words -> the ids of their vectors, counted from the size of the text model's table on."""

    @classmethod
    def from_folder(cls, folder: str | os.PathLike, *, window: int) -> "Tokenizer":
        """Reads a tokenizer folder; DataError when it holds no usable vocabulary.

        window: the text model's number of positions (77 for Stable Diffusion); files often leave it out.
        """
        # Otherwise transformers tells every user to install PyTorch, which its tokenizers do not need.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import CLIPTokenizer

        if not Path(folder).is_dir():  # or transformers would look for it on the hub
            raise DataError(f"{folder}: no such tokenizer folder")
        try:
            tokenizer = CLIPTokenizer.from_pretrained(os.fspath(folder), model_max_length=window)
        except Exception as error:  # its parser, written in Rust, raises nothing narrower for a damaged file
            raise DataError(f"{folder}: not a readable CLIP tokenizer ({type(error).__name__}: {error})") from error
        ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        if len(tokenizer) < 3 or None in ids[:2]:
            raise DataError(f"{folder}: no CLIP vocabulary with begin and end tokens ({len(tokenizer)} tokens found)")
        begin, end, pad = ids
        return cls(tokenizer, window, begin, end, end if pad is None else pad, _added_words(tokenizer))

    def with_placeholders(self, words: Mapping[str, int], *, first: int) -> "Tokenizer":
        """Knows new words too; each stands for so many vectors.

        first: rows of the text model's table; the new vectors are numbered from there. Raises ConfigError for a word
        that the vocabulary or an earlier call already has, and for one with white space.
        """
        vocabulary = self.vocabulary.get_vocab()
        ids = dict(self.placeholders)
        for word, vectors in words.items():
            if word.split() != [word] or vectors < 1:
                raise ConfigError(f"placeholder token {word!r} of {vectors} vectors: must be a word without spaces")
            if {word, word.lower(), f"{word.lower()}</w>"} & vocabulary.keys():
                raise ConfigError(f"placeholder token {word!r} is a word of the vocabulary already: choose another")
            # `<w>_1` names the second vector of `<w>` in a tokenizer's files.
            own = word.lower()
            alike = (other for other in ids if other.lower() in (own, _stem(own)) or _stem(other.lower()) == own)
            if known := next(alike, None):
                raise ConfigError(f"placeholder token {word!r} clashes with the new word {known!r}: choose another")
            start = 1 + max([first - 1, *(number for own in ids.values() for number in own)])
            ids[word] = tuple(range(start, start + vectors))
        return dataclasses.replace(self, placeholders=ids)

    @property
    def new_words(self) -> dict[str, int]:
        """Words whose vectors lie beside the table -> how many, in the order of their rows."""
        vocabulary = self.vocabulary.get_vocab()
        return {word: len(ids) for word, ids in self.placeholders.items() if word not in vocabulary}

    def save(self, source: str | os.PathLike, folder: str | os.PathLike) -> int:
        """Writes the tokenizer folder `source`, which this was read from, with the new words in it.

        Each vector becomes an added token, `<w>`, `<w>_1`, ..., as diffusers reads them; returns the first one's id.
        """
        from transformers import CLIPTokenizer

        shutil.copytree(source, folder)
        # A fresh one: added tokens cannot be taken back, and this one is shared with other bundles.
        tokenizer = CLIPTokenizer.from_pretrained(os.fspath(source), model_max_length=self.window)
        first = len(tokenizer)
        for word, vectors in self.new_words.items():
            tokenizer.add_tokens([_added_token(word, name) for name in _names(word, vectors)])
        if len(tokenizer) - first != sum(self.new_words.values()):
            raise DataError(f"{source}: the tokenizer does not take the words {', '.join(self.new_words)}")
        tokenizer.save_pretrained(os.fspath(folder))
        if (Path(source) / "vocab.json").exists():  # the form of transformers before 5, beside which this is read
            added = {name: number for name, number in tokenizer.get_added_vocab().items() if number >= first}
            path = Path(folder) / "added_tokens.json"
            earlier = json.loads(path.read_text("utf-8")) if path.exists() else {}
            path.write_text(json.dumps(earlier | added, ensure_ascii=False, indent=2) + "\n", "utf-8")
        return first

    def words(self, prompt: str) -> list[int]:
        """The prompt's ids without begin and end, however long."""
        return [number for piece in self._pieces(prompt) for number in piece]

    def chunks(self, prompt: str | Sections) -> int:
        """Windows the prompt takes: 1 up to window - 2 tokens."""
        return len(self._packed(prompt))

    def _pieces(self, prompt: str) -> list[tuple[int, ...]]:
        """The prompt's ids in pieces that must not be divided: a token each, or all vectors of a new word."""
        plain = lambda text: [
            (number,)
            for number in self.vocabulary(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        ]
        if not self.placeholders:
            return plain(prompt)
        by_name = {word.lower(): ids for word, ids in self.placeholders.items()}
        # A word that begins or ends with a letter is not found inside a longer one; the longest of several counts.
        bounded = lambda word: (
            (r"(?<!\w)" if word[0].isalnum() else "") + re.escape(word) + (r"(?!\w)" if word[-1].isalnum() else "")
        )
        pattern = "|".join(bounded(word) for word in sorted(by_name, key=len, reverse=True))
        found = re.split(f"({pattern})", prompt, flags=re.IGNORECASE)
        pieces = []
        for part in found:
            pieces += [by_name[part.lower()]] if part.lower() in by_name else plain(part) if part.strip() else []
        return pieces

    def _packed(self, prompt: str | Sections) -> list[list[_Piece]]:
        """The pieces in each window."""
        sections = [[Span(prompt, 1.0)]] if isinstance(prompt, str) else prompt
        windows: list[list[_Piece]] = []
        for section in sections:
            windows += self._windows(_Piece(ids, weight) for text, weight in section for ids in self._pieces(text))
        # A BREAK at the very end begins no window of its own.
        return windows if windows[-1] or len(windows) == 1 else windows[:-1]

    def _windows(self, pieces: Iterable[_Piece]) -> list[list[_Piece]]:
        """The windows of one section.

        What follows the last comma of a full window goes to the next one with it, unless it is longer than
        COMMA_BACKTRACK. As in A1111, a comma that begins a window because it did not fit into the last is none of
        these, nor does a new word's vectors not fitting make anything go with them.
        """
        room = self.window - 2
        windows: list[list[_Piece]] = [[]]
        filled, comma = 0, None  # tokens in the last window; those up to its last comma, and the pieces
        for piece in pieces:
            if len(piece.ids) > room:
                raise ConfigError(f"a word of {len(piece.ids)} vectors does not fit into a window of {room} tokens")
            is_comma = piece.ids == (self._comma,)
            if filled == room and comma and not is_comma and filled - comma[0] < COMMA_BACKTRACK:
                windows[-1], follow = windows[-1][: comma[1]], windows[-1][comma[1] :]
                windows.append(follow)
                filled, comma = filled - comma[0], None
            if filled + len(piece.ids) > room:
                windows.append([])
                filled, comma, is_comma = 0, None, False
            windows[-1].append(piece)
            filled += len(piece.ids)
            if is_comma:
                comma = filled, len(windows[-1])
        return windows

    @functools.cached_property
    def _comma(self) -> int | None:
        return self.vocabulary.get_vocab().get(",</w>")

    def encode(
        self, prompts: Sequence[str | Sections], *, chunks: int | None = None
    ) -> Int[np.ndarray, "B chunks window"]:
        """Ids of every prompt, in as many windows as the longest takes (or `chunks`, cutting what is over).

        Each window holds a begin token, up to window - 2 tokens, an end token, and padding. Nothing is cut unless
        `chunks` asks for it.
        """
        return self.encode_weighted(prompts, chunks=chunks)[0]

    def encode_weighted(
        self, prompts: Sequence[str | Sections], *, chunks: int | None = None
    ) -> tuple[Int[np.ndarray, "B chunks window"], Float[np.ndarray, "B chunks window"]]:
        """Ids as of `encode`, and each token's weight: 1 for all that is not a prompt's own."""
        packed = [self._packed(prompt) for prompt in prompts]
        count = chunks or max([1, *map(len, packed)])
        out = np.full((len(packed), count, self.window), self.pad, np.int32)
        weights = np.ones(out.shape, np.float32)
        for b, windows in enumerate(packed):
            out[b, :, :2] = self.begin, self.end
            for n, pieces in enumerate(windows[:count]):
                ids = [number for piece in pieces for number in piece.ids]
                out[b, n, : len(ids) + 2] = [self.begin, *ids, self.end]
                weights[b, n, 1 : len(ids) + 1] = [piece.weight for piece in pieces for _ in piece.ids]
        return out, weights


def _stem(name: str) -> str:
    return re.sub(r"_\d+$", "", name)


def _names(word: str, vectors: int) -> list[str]:
    """What a tokenizer's files call each of a word's vectors."""
    return [word, *(f"{word}_{i}" for i in range(1, vectors))]


def _added_token(word: str, name: str) -> Any:
    from transformers import AddedToken

    alone = word[0].isalnum() and word[-1].isalnum()  # not found inside a longer word
    # Looked for before the text is made lower case where it has capitals: otherwise diffusers, which looks the word up
    # as it comes out, misses all vectors but the first.
    return AddedToken(name, single_word=alone, normalized=word == word.lower())


def _added_words(tokenizer: Any) -> dict[str, tuple[int, ...]]:
    """The words of Textual Inversion that a tokenizer's files hold, each with the ids of all its vectors."""
    special = set(tokenizer.all_special_ids)
    added = {name: number for name, number in tokenizer.get_added_vocab().items() if number not in special}
    words = {}
    for name in added:
        if _stem(name) == name or _stem(name) not in added:
            vectors = next(i for i in itertools.count(1) if f"{name}_{i}" not in added)
            words[name] = tuple(added[own] for own in _names(name, vectors))
    return words
