"""Turns prompts into token ids with CLIP's tokenizer; a prompt longer than the text model's window becomes chunks.

A prompt is a text, or sections of weighted spans (see `text.syntax.emphasis`). Each section begins a new chunk.
"""

import dataclasses
import functools
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sdjax.errors import ConfigError, DataError
from sdjax.text.syntax import Sections, Span

COMMA_BACKTRACK = 20
"""The text after the last comma of a full chunk moves to the next chunk if it has fewer tokens than this (as A1111)."""


class _Unit(NamedTuple):
    """Ids that must stay in one chunk, with their weight: one token, or all vectors of a new word."""

    ids: tuple[int, ...]
    weight: float


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A CLIP tokenizer for a text model with a window of a given length."""

    vocabulary: Any  # transformers' CLIPTokenizer
    window: int
    """Number of tokens that the text model reads, begin and end token included."""
    begin: int
    end: int
    pad: int
    placeholders: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    """New words -> the ids of their vectors, which follow the ids of the text model's table."""

    @classmethod
    def from_folder(cls, folder: str | os.PathLike, *, window: int) -> "Tokenizer":
        """Reads a tokenizer folder. Raises DataError if the folder holds no usable vocabulary.

        window: the text model's number of positions (77 for Stable Diffusion), which tokenizer files often leave out.
        """
        # Stops transformers from advising every user to install PyTorch, which tokenizers do not need.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import CLIPTokenizer

        if not Path(folder).is_dir():  # transformers would look for a missing folder on the hub
            raise DataError(f"{folder}: no such tokenizer folder")
        try:
            tokenizer = CLIPTokenizer.from_pretrained(os.fspath(folder), model_max_length=window)
        except Exception as error:  # the parser is written in Rust and raises plain Exception for a damaged file
            raise DataError(f"{folder}: not a readable CLIP tokenizer ({type(error).__name__}: {error})") from error
        ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        if len(tokenizer) < 3 or None in ids[:2]:
            raise DataError(f"{folder}: no CLIP vocabulary with begin and end tokens ({len(tokenizer)} tokens found)")
        begin, end, pad = ids
        return cls(tokenizer, window, begin, end, end if pad is None else pad, _added_words(tokenizer))

    def with_placeholders(self, words: Mapping[str, int], *, first: int) -> "Tokenizer":
        """Returns this tokenizer with new words added.

        words: new word -> its number of vectors. first: the smallest id that a new vector may have, which is the
        number of rows of the text model's table. Raises ConfigError for a word with white space, a word without
        vectors, and a word that the vocabulary or an earlier call already has.
        """
        vocabulary = self.vocabulary.get_vocab()
        ids = dict(self.placeholders)
        for word, vectors in words.items():
            if word.split() != [word] or vectors < 1:
                raise ConfigError(
                    f"placeholder token {word!r} of {vectors} vectors: must be one word without spaces and have vectors"
                )
            if {word, word.lower(), f"{word.lower()}</w>"} & vocabulary.keys():
                raise ConfigError(f"placeholder token {word!r} is a word of the vocabulary already: choose another")
            # In a tokenizer's files, `<w>_1` is the name of the second vector of `<w>`.
            lower = word.lower()
            alike = (other for other in ids if other.lower() in (lower, _stem(lower)) or _stem(other.lower()) == lower)
            if known := next(alike, None):
                raise ConfigError(f"placeholder token {word!r} clashes with the new word {known!r}: choose another")
            start = 1 + max([first - 1, *itertools.chain.from_iterable(ids.values())])
            ids[word] = tuple(range(start, start + vectors))
        return dataclasses.replace(self, placeholders=ids)

    @property
    def new_words(self) -> dict[str, int]:
        """The words that the vocabulary does not have -> their numbers of vectors, in the order of their rows."""
        vocabulary = self.vocabulary.get_vocab()
        return {word: len(ids) for word, ids in self.placeholders.items() if word not in vocabulary}

    def save(self, source: str | os.PathLike, folder: str | os.PathLike) -> int:
        """Writes a copy of the tokenizer folder `source` with the new words; returns the id of their first vector.

        source: the folder that this tokenizer was read from. Each vector of a word becomes an added token `<w>`,
        `<w>_1`, ..., as diffusers expects. Raises DataError if the tokenizer does not accept the words.
        """
        from transformers import CLIPTokenizer

        shutil.copytree(source, folder)
        # Read again, because other tokenizers share `self.vocabulary` and an added token cannot be removed.
        tokenizer = CLIPTokenizer.from_pretrained(os.fspath(source), model_max_length=self.window)
        first = len(tokenizer)
        for word, vectors in self.new_words.items():
            tokenizer.add_tokens([_added_token(word, name) for name in _names(word, vectors)])
        if len(tokenizer) - first != sum(self.new_words.values()):
            raise DataError(f"{source}: the tokenizer does not take the words {', '.join(self.new_words)}")
        tokenizer.save_pretrained(os.fspath(folder))
        if (Path(source) / "vocab.json").exists():  # the form of transformers before 5, which reads added_tokens.json
            added = {name: number for name, number in tokenizer.get_added_vocab().items() if number >= first}
            path = Path(folder) / "added_tokens.json"
            earlier = json.loads(path.read_text("utf-8")) if path.exists() else {}
            path.write_text(json.dumps(earlier | added, ensure_ascii=False, indent=2) + "\n", "utf-8")
        return first

    def words(self, prompt: str) -> list[int]:
        """The ids of a prompt of any length, without begin and end token."""
        return list(itertools.chain.from_iterable(self._undivided(prompt)))

    def chunks(self, prompt: str | Sections) -> int:
        """The number of chunks of a prompt: 1 for up to window - 2 tokens."""
        # No token reaches over a space, and to look up the words of a million captions is far faster.
        plain = prompt if isinstance(prompt, str) and not self.placeholders else None
        if plain is not None and sum(map(self._tokens_in, plain.split(" "))) <= self.window - 2:
            return 1
        return len(self._packed(prompt))

    @functools.cached_property
    def _tokens_in(self) -> Callable[[str], int]:
        return functools.lru_cache(maxsize=1 << 16)(lambda word: len(self.words(word)))

    def _undivided(self, prompt: str) -> list[tuple[int, ...]]:
        """The ids of a prompt, those of one token or of all vectors of one new word together."""
        plain = lambda text: [
            (number,)
            for number in self.vocabulary(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        ]
        if not self.placeholders:
            return plain(prompt)
        by_name = {word.lower(): ids for word, ids in self.placeholders.items()}
        # A word that begins or ends with a letter is not found inside a longer word. Longer words are tried first.
        bounded = lambda word: (
            (r"(?<!\w)" if word[0].isalnum() else "") + re.escape(word) + (r"(?!\w)" if word[-1].isalnum() else "")
        )
        pattern = "|".join(bounded(word) for word in sorted(by_name, key=len, reverse=True))
        ids = []
        for text in re.split(f"({pattern})", prompt, flags=re.IGNORECASE):
            ids += [by_name[text.lower()]] if text.lower() in by_name else plain(text) if text.strip() else []
        return ids

    def _packed(self, prompt: str | Sections) -> list[list[_Unit]]:
        """The units of each chunk of a prompt."""
        sections = [[Span(prompt, 1.0)]] if isinstance(prompt, str) else prompt
        chunks: list[list[_Unit]] = []
        for section in sections:
            chunks += self._chunks_of(_Unit(ids, weight) for text, weight in section for ids in self._undivided(text))
        # A BREAK at the very end begins no chunk.
        return chunks if chunks[-1] or len(chunks) == 1 else chunks[:-1]

    def _chunks_of(self, units: Iterable[_Unit]) -> list[list[_Unit]]:
        """Divides one section into chunks.

        When a chunk is full, the text after its last comma moves to the next chunk together with the unit that no
        longer fits, unless that text has COMMA_BACKTRACK tokens or more. As in A1111, a comma that does not fit moves
        nothing and does not count as a comma of the chunk that it begins. A chunk that is not full keeps its text when
        a new word does not fit into it.
        """
        room = self.window - 2
        chunks: list[list[_Unit]] = [[]]
        filled, comma = 0, None  # tokens in the last chunk; its tokens and its units up to its last comma
        for unit in units:
            if len(unit.ids) > room:
                raise ConfigError(f"a word of {len(unit.ids)} vectors does not fit into a chunk of {room} tokens")
            is_comma = unit.ids == (self._comma,)
            if filled == room and comma and not is_comma and filled - comma[0] < COMMA_BACKTRACK:
                chunks[-1], moved = chunks[-1][: comma[1]], chunks[-1][comma[1] :]
                chunks.append(moved)
                filled, comma = filled - comma[0], None
            if filled + len(unit.ids) > room:
                chunks.append([])
                filled, comma, is_comma = 0, None, False
            chunks[-1].append(unit)
            filled += len(unit.ids)
            if is_comma:
                comma = filled, len(chunks[-1])
        return chunks

    @functools.cached_property
    def _comma(self) -> int | None:
        return self.vocabulary.get_vocab().get(",</w>")

    def encode(
        self, prompts: Sequence[str | Sections], *, chunks: int | None = None
    ) -> Int[np.ndarray, "B chunks window"]:
        """The token ids of prompts, in as many chunks as the longest prompt takes.

        Each chunk holds a begin token, up to window - 2 tokens, an end token, and padding.
        chunks: the number of chunks instead, to which longer prompts are cut; without it, no prompt is cut.
        """
        return self.encode_weighted(prompts, chunks=chunks)[0]

    def encode_weighted(
        self, prompts: Sequence[str | Sections], *, chunks: int | None = None
    ) -> tuple[Int[np.ndarray, "B chunks window"], Float[np.ndarray, "B chunks window"]]:
        """The ids that `encode` returns, and the weight of each: 1 for begin, end and padding tokens."""
        packed = [self._packed(prompt) for prompt in prompts]
        count = chunks or max([1, *map(len, packed)])
        ids = np.full((len(packed), count, self.window), self.pad, np.int32)
        weights = np.ones(ids.shape, np.float32)
        for b, prompt_chunks in enumerate(packed):
            ids[b, :, :2] = self.begin, self.end
            for n, units in enumerate(prompt_chunks[:count]):
                text = [number for unit in units for number in unit.ids]
                ids[b, n, : len(text) + 2] = [self.begin, *text, self.end]
                weights[b, n, 1 : len(text) + 1] = [unit.weight for unit in units for _ in unit.ids]
        return ids, weights


def _stem(name: str) -> str:
    return re.sub(r"_\d+$", "", name)


def _names(word: str, vectors: int) -> list[str]:
    """The names of a word's vectors in a tokenizer's files."""
    return [word, *(f"{word}_{i}" for i in range(1, vectors))]


def _added_token(word: str, name: str) -> Any:
    from transformers import AddedToken

    alone = word[0].isalnum() and word[-1].isalnum()  # not found inside a longer word
    # A name with capitals is matched before the text is made lower case. Otherwise diffusers, which looks up the
    # matched text, misses all vectors but the first.
    return AddedToken(name, single_word=alone, normalized=word == word.lower())


def _added_words(tokenizer: Any) -> dict[str, tuple[int, ...]]:
    """The words of Textual Inversion in a tokenizer's files -> the ids of their vectors."""
    special = set(tokenizer.all_special_ids)
    added = {name: number for name, number in tokenizer.get_added_vocab().items() if number not in special}
    words = {}
    for name in added:
        if _stem(name) == name or _stem(name) not in added:
            vectors = next(i for i in itertools.count(1) if f"{name}_{i}" not in added)
            words[name] = tuple(added[vector] for vector in _names(name, vectors))
    return words
