"""What of a safetensors file's metadata is still true of the file that a conversion makes of it."""

import re
from collections.abc import Mapping

_OF_THE_FILE = re.compile(
    r"format|sdjax\.configs|lora_adapter_metadata|sshs_.*|modelspec\.(hash_sha256|sai_model_spec|implementation)"
    r"|ss_network_(module|dim|alpha|args)"
)
"""Entries that describe the tensors of the file: its writer records them anew."""


def carried(metadata: Mapping[str, str]) -> dict[str, str]:
    """The entries that say where the weights come from: training, title, author, licence and all that is unknown."""
    return {key: value for key, value in metadata.items() if not _OF_THE_FILE.fullmatch(key)}
