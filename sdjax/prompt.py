"""Prompts to token ids: CLIP's tokenizer, and prompts longer than the model's window in chunks."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from sdjax.errors import ConfigError, DataError


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
        return cls(tokenizer, window, begin, end, end if pad is None else pad)

    def with_placeholders(self, words: Mapping[str, int], *, first: int) -> "Tokenizer":
        """Knows new words too; each stands for so many vectors.

        first: rows of the text model's table; the new vectors are numbered from there. Raises ConfigError for a word
        that the vocabulary or an earlier call already has.
        """
        vocabulary = self.vocabulary.get_vocab()
        ids = dict(self.placeholders)
        for word, vectors in words.items():
            if word in ids or {word, word.lower(), f"{word.lower()}</w>"} & vocabulary.keys():
                raise ConfigError(f"placeholder token {word!r} is a word of the vocabulary already: choose another")
            start = first + sum(len(own) for own in ids.values())
            ids[word] = tuple(range(start, start + vectors))
        return dataclasses.replace(self, placeholders=ids)

    def words(self, prompt: str) -> list[int]:
        """The prompt's ids without begin and end, however long."""
        return [number for piece in self._pieces(prompt) for number in piece]

    def chunks(self, prompt: str) -> int:
        """Windows the prompt takes: 1 up to window - 2 tokens."""
        return len(self._packed(prompt))

    def _pieces(self, prompt: str) -> list[list[int]]:
        """The prompt's ids in pieces that must not be divided: a token each, or all vectors of a new word."""
        plain = lambda text: [
            [number]
            for number in self.vocabulary(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        ]
        if not self.placeholders:
            return plain(prompt)
        by_name = {word.lower(): list(ids) for word, ids in self.placeholders.items()}
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

    def _packed(self, prompt: str) -> list[list[int]]:
        """The ids of each window."""
        room = self.window - 2
        windows: list[list[int]] = [[]]
        for piece in self._pieces(prompt):
            if len(piece) > room:
                raise ConfigError(f"a word of {len(piece)} vectors does not fit into a window of {room} tokens")
            if len(windows[-1]) + len(piece) > room:
                windows.append([])
            windows[-1] += piece
        return windows

    def encode(self, prompts: Sequence[str], *, chunks: int | None = None) -> Int[np.ndarray, "B chunks window"]:
        """Ids of every prompt, in as many windows as the longest takes (or `chunks`, cutting what is over).

        Each window holds a begin token, up to window - 2 tokens, an end token, and padding. Nothing is cut unless
        `chunks` asks for it.
        """
        packed = [self._packed(prompt) for prompt in prompts]
        count = chunks or max([1, *map(len, packed)])
        out = np.full((len(packed), count, self.window), self.pad, np.int32)
        for row, windows in zip(out, packed, strict=True):
            row[:, :2] = self.begin, self.end
            for chunk, ids in zip(row, windows, strict=False):
                chunk[: len(ids) + 2] = [self.begin, *ids, self.end]
        return out
