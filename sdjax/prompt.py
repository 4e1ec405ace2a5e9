"""Prompts to token ids: CLIP's tokenizer, and prompts longer than the model's window in chunks."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from sdjax.errors import DataError


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer and the window its text model reads, begin and end token included."""

    vocabulary: Any  # transformers' CLIPTokenizer
    window: int
    begin: int
    end: int
    pad: int

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

    def words(self, prompt: str) -> list[int]:
        """The prompt's ids without begin and end, however long."""
        return self.vocabulary(prompt, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]

    def chunks(self, prompt: str) -> int:
        """Windows the prompt takes: 1 up to window - 2 tokens."""
        return max(1, -(-len(self.words(prompt)) // (self.window - 2)))

    def encode(self, prompts: Sequence[str], *, chunks: int | None = None) -> Int[np.ndarray, "B chunks window"]:
        """Ids of every prompt, in as many windows as the longest takes (or `chunks`, cutting what is over).

        Each window holds a begin token, up to window - 2 tokens, an end token, and padding. Nothing is cut unless
        `chunks` asks for it.
        """
        room = self.window - 2
        words = [self.words(prompt) for prompt in prompts]
        count = chunks or max([1, *(-(-len(ids) // room) for ids in words)])
        out = np.full((len(words), count, self.window), self.pad, np.int32)
        for row, ids in zip(out, words, strict=True):
            for i, chunk in enumerate(row):
                part = ids[i * room : (i + 1) * room]
                chunk[: len(part) + 2] = [self.begin, *part, self.end]
        return out
