"""Makes the versions of a caption that training shows. All are known beforehand, so that each is encoded once."""

import hashlib
from collections.abc import Sequence

import numpy as np


def tag_versions(
    caption: str, count: int, *, seed: int, shuffle: bool = False, keep: int = 0, dropout: float = 0.0
) -> tuple[str, ...]:
    """`count` versions of a caption of tags separated by commas. They depend on the arguments alone.

    shuffle: puts all tags but the first `keep` in random order. dropout: probability that a tag is left out, except the
    first `keep` tags; at least one tag always remains. Without either, the caption itself is the only version.
    """
    if not (shuffle or dropout):
        return (caption,)
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    digest = hashlib.sha256(caption.encode()).digest()
    words = [int.from_bytes(digest[i : i + 4]) for i in range(0, 32, 4)]

    def version(number: int) -> str:
        bits = np.random.Philox(np.random.SeedSequence([seed, number, *words])).random_raw(2 * len(tags))
        order, fate = bits[: len(tags)].copy(), bits[len(tags) :] / 2.0**64
        stays = [i < keep or fate[i] >= dropout for i in range(len(tags))]
        if tags and not any(stays):
            stays[int(np.argmax(fate))] = True
        rest = sorted(range(keep, len(tags)), key=lambda i: int(order[i])) if shuffle else range(keep, len(tags))
        return ", ".join(tags[i] for i in (*range(min(keep, len(tags))), *rest) if stays[i])

    return tuple(version(number) for number in range(count))


def with_words(caption: str, words: Sequence[str]) -> str:
    """The caption with new words in front, unless it has one of them. Case is ignored, as by the tokenizer."""
    present = any(word.lower() in caption.lower() for word in words)
    return caption if present else " ".join([*words, caption]).strip()


def from_templates(templates: Sequence[str], words: Sequence[str]) -> tuple[str, ...]:
    """The templates, with the words in place of each `{}`."""
    return tuple(template.replace("{}", " ".join(words)) for template in templates)
