"""The conditions of the U-Net at each evaluation, from the prompts of a request.

A picture has several texts: the negative prompt, if the picture is guided, and one text for each prompt that AND joins.
The texts may change from step to step, and they may have different lengths. Pictures whose texts have equal lengths are
drawn together as a group, so the picture of a prompt never depends on the prompts beside it.
"""

import functools
import itertools
import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sdjax.draw.request import Request
from sdjax.draw.samplers import SAMPLERS
from sdjax.errors import ConfigError
from sdjax.model import Model
from sdjax.models.layers import timestep_embedding
from sdjax.outline import Outline
from sdjax.runtime.devices import split_examples
from sdjax.text import syntax
from sdjax.text.encoding import zeroed
from sdjax.text.syntax import Sections


class Condition(NamedTuple):
    """The inputs of the U-Net beside latents and timestep, for a batch of N examples."""

    context: Float[Array, "N T D"]
    added: dict[str, Array] | None


class Texts(NamedTuple):
    """The texts of one picture."""

    by_step: tuple[tuple[str, ...], ...]
    """The wording of each text at each step; only one where it never changes."""
    chunks: tuple[int, ...]
    """The number of chunks each text takes."""
    guided: bool
    """Whether the first text is the negative prompt."""
    weights: tuple[float, ...]
    """The weight of each text except the negative prompt."""


class Group(NamedTuple):
    """Pictures of a request that are drawn together."""

    rows: list[int]
    """The numbers of the pictures in the request."""
    texts: list[Texts]
    """The texts of each picture."""

    @property
    def weights(self) -> Float[np.ndarray, "B k"]:
        """The weight of the guidance of each prompt that AND joins."""
        return np.asarray([texts.weights for texts in self.texts], np.float32)


def groups(outline: Outline, request: Request) -> list[Group]:
    """Groups the pictures of a request by the lengths of their texts.

    Raises ConfigError for prompts that the model cannot draw.
    """

    @functools.cache
    def read(prompt: str, negative: str) -> Texts:
        return _read(outline, request, prompt, negative)

    by_lengths: dict[tuple, Group] = {}
    for row, pair in enumerate(zip(request.prompts, request.negatives, strict=True)):
        texts = read(*pair)
        group = by_lengths.setdefault((texts.chunks, texts.guided), Group([], []))
        group.rows.append(row)
        group.texts.append(texts)
    return list(by_lengths.values())


def refined(outline: Outline, request: Request, group: Group) -> Group:
    """Returns a group with its texts as the refiner reads them, whose tokenizers may differ. outline: the refiner's."""
    texts = [_read(outline, request, request.prompts[row], request.negatives[row]) for row in group.rows]
    chunks = tuple(map(max, zip(*(own.chunks for own in texts), strict=True)))
    return Group(group.rows, [own._replace(chunks=chunks) for own in texts])


def _read(outline: Outline, request: Request, prompt: str, negative: str) -> Texts:
    takes_guidance = bool(outline.unet.config.time_cond_proj_dim)  # as an input, so one evaluation is enough
    if request.settings["prompt_syntax"] == "plain":
        parts = [syntax.Span(prompt, 1.0)]
        at_each_step = lambda text: (text,)
    else:
        text, tags = syntax.without_loras(prompt)
        if tags:
            names = ", ".join(tag.name for tag in tags)
            warnings.warn(f"LoRAs named in a prompt are left out here; add them yourself: {names}", stacklevel=2)
        parts = syntax.subprompts(text)
        at_each_step = lambda text: tuple(syntax.at_each_step(text, *_steps(request)))
    if takes_guidance and len(parts) > 1:
        raise ConfigError(f"{outline.name} is drawn without guidance, so AND cannot join prompts: {prompt!r}")
    guided = not takes_guidance and (request.guidance != 1.0 or len(parts) > 1)
    texts = [*([negative] if guided else []), *(text for text, _ in parts)]
    by_step = tuple(at_each_step(text) for text in texts)
    chunks = tuple(outline.chunks([_weighted(request, text) for text in set(steps)]) for steps in by_step)
    return Texts(by_step, chunks, guided, tuple(weight for _, weight in parts))


def _steps(request: Request) -> tuple[int, int]:
    """The number of steps that a prompt counts in this pass, and the number of the pass before.

    As in A1111, the steps of a prompt are evaluations of the U-Net, of which some samplers have two a step. A prompt
    counts all steps of the schedule when it redraws an image, but only the steps that run in a second pass.
    """
    evaluations = SAMPLERS[request.settings["sampler"]].evaluations
    steps = request.settings["steps"]
    steps = int(steps * request.strength) if request.earlier_steps else steps
    return steps * evaluations, request.earlier_steps * evaluations


def _weighted(request: Request, text: str) -> str | Sections:
    """The text in the form that tokenizers take."""
    return text if request.settings["prompt_syntax"] == "plain" else syntax.emphasis(text)


def conditions(model: Model, request: Request, group: Group, evaluations: Iterable[int]) -> list[tuple[Condition, ...]]:
    """The conditions of these evaluations: one for all texts, or one for each text if the texts differ in length.

    Each distinct text is encoded once. As in A1111, evaluations count from 0 and steps from 1, so the first two
    evaluations belong to step 1, and an image's evaluations begin at 0 however small the strength is.
    """
    encoded: dict[tuple, tuple[Condition, ...]] = {}
    by_evaluation = []
    for i in evaluations:
        now = tuple(tuple(steps[min(max(i, 1), len(steps)) - 1] for steps in texts.by_step) for texts in group.texts)
        if now not in encoded:
            encoded[now] = split_examples(model.mesh, _conditions(model, request, group, now))
        by_evaluation.append(encoded[now])
    return by_evaluation


def _conditions(model: Model, request: Request, group: Group, texts: Sequence[Sequence[str]]) -> tuple[Condition, ...]:
    """The conditions of one evaluation. texts: the texts of each picture."""
    chunks, guided = group.texts[0].chunks, group.texts[0].guided
    slots = list(zip(*texts, strict=True))  # the same text of all pictures
    negatives = [guided and j == 0 for j in range(len(slots))]
    if len(set(chunks)) > 1:
        return tuple(
            _condition(model, request, group.rows, slot, count, [negative] * len(slot))
            for slot, count, negative in zip(slots, chunks, negatives, strict=True)
        )
    flat = list(itertools.chain(*slots))
    return (_condition(model, request, group.rows, flat, chunks[0], np.repeat(negatives, len(group.rows))),)


def _condition(
    model: Model,
    request: Request,
    rows: Sequence[int],
    texts: Sequence[str],
    chunks: int,
    negative: Sequence[bool] | np.ndarray,
) -> Condition:
    """The condition of several texts for each picture. negative: for each text, whether it is a negative prompt."""
    outline, settings = model.outline, request.settings
    context, pooled = model.encode_prompts(
        [_weighted(request, text) for text in texts],
        clip_skip=settings["clip_skip"],
        chunks=chunks,
        pictures=[row for row in [*rows] * (len(texts) // len(rows)) for _ in range(chunks)],
        restore_mean=settings["emphasis"] == "original",
    )
    if any(negative) and outline.zeros_empty_prompts:
        empty = np.array([bool(is_negative) and not text for is_negative, text in zip(negative, texts, strict=True)])
        context, pooled = zeroed(context, empty), zeroed(pooled, empty)
    sizes = np.broadcast_to(request.size_conditions, (len(texts), 6))
    added = outline.added_conditions(pooled, sizes, np.asarray(negative)) or {}
    if width := outline.unet.config.time_cond_proj_dim:
        scale = jnp.full((len(texts),), (request.guidance - 1) * 1000, jnp.float32)
        added["timestep_cond"] = timestep_embedding(scale, width, flip_sin_to_cos=False, freq_shift=1)
    if (factors := settings["freeu"]) is not None:
        added["freeu"] = jnp.tile(jnp.asarray(factors, jnp.float32), (len(texts), 1))
    return Condition(context, added or None)
