"""Reads JSON that anybody may have written. Whatever is wrong with it is a ValueError, whose message has one line."""

import json
from collections.abc import Callable
from typing import Any


def parse(text: str | bytes, *, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Returns the value of a JSON text. pairs: makes an object from its names and values, as `object_pairs_hook`.

    Raises ValueError for a text that is not JSON or not UTF-8, is nested too deeply, or holds a number of thousands of
    digits or half of a character (a lone surrogate), which no file and no tokenizer can hold.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        value = json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at character {error.pos}") from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        if "integer string conversion" not in str(error):
            raise
        raise ValueError("a number has too many digits") from None
    if _has_surrogates(text):
        raise ValueError("holds half of a character (a lone surrogate)")
    return value


def _has_surrogates(text: str) -> bool:
    r"""Whether the text of JSON holds a lone surrogate, plainly or as an escape such as `\ud83d`."""
    if "\\ud" not in text and "\\uD" not in text:
        return not is_text(text)
    return not is_text(json.dumps(json.loads(text), ensure_ascii=False))


def is_text(text: str) -> bool:
    """Whether the text can be written in UTF-8. A text with half of a character (a lone surrogate) cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
