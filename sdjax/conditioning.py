"""From a request's prompts to what the U-Net is conditioned on at each evaluation.

A picture has several texts: the negative prompt's, where it is guided, and one of each prompt that AND joins. They may
change from step to step, and may be of different lengths; pictures whose texts are as long are drawn together, so that
none depends on how long its neighbours' prompts are.
"""

import functools
import itertools
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sdjax import prompt_syntax
from sdjax.errors import ConfigError
from sdjax.models.layers import timestep_embedding
from sdjax.prompt_syntax import Sections
from sdjax.request import Request

if TYPE_CHECKING:
    from sdjax.pipeline import StableDiffusion


class Condition(NamedTuple):
    """What the U-Net is told of a batch of examples beside their latents."""

    context: Float[Array, "N T D"]
    added: dict[str, Array] | None


class Texts(NamedTuple):
    """What one picture is drawn from: each of its texts at every step, and how many windows it takes."""

    by_step: tuple[tuple[str, ...], ...]
    windows: tuple[int, ...]
    guided: bool  # the first text is the negative prompt's
    weights: tuple[float, ...]  # of the others


class Group(NamedTuple):
    """Pictures of a request that are drawn together."""

    rows: list[int]
    texts: list[Texts]

    @property
    def weights(self) -> Float[np.ndarray, "B k"]:
        """What the guidance of each prompt that AND joins is multiplied by."""
        return np.asarray([own.weights for own in self.texts], np.float32)


def groups(sd: "StableDiffusion", request: Request) -> list[Group]:
    """The pictures of a request by how long their texts are. Raises ConfigError for prompts that cannot be drawn."""

    @functools.cache
    def read(prompt: str, negative: str) -> Texts:
        return _read(sd, request, prompt, negative)

    found: dict[tuple, Group] = {}
    for row, pair in enumerate(zip(request.prompts, request.negatives, strict=True)):
        texts = read(*pair)
        group = found.setdefault((texts.windows, texts.guided), Group([], []))
        group.rows.append(row)
        group.texts.append(texts)
    return list(found.values())


def _read(sd: "StableDiffusion", request: Request, prompt: str, negative: str) -> Texts:
    fixed = bool(sd.unet.config.time_cond_proj_dim)  # takes the guidance as an input
    if request.prompt_syntax == "plain":
        parts = [prompt_syntax.Span(prompt, 1.0)]
        at_each_step = lambda text: (text,)
    else:
        text, tags = prompt_syntax.without_loras(prompt)
        if tags:
            names = ", ".join(tag.name for tag in tags)
            warnings.warn(f"LoRAs named in a prompt are left out here; add them yourself: {names}", stacklevel=2)
        parts = prompt_syntax.subprompts(text)
        at_each_step = lambda text: tuple(prompt_syntax.at_each_step(text, *_steps(request)))
    if fixed and len(parts) > 1:
        raise ConfigError(f"{sd.name} is drawn without guidance, so AND cannot join prompts: {prompt!r}")
    guided = not fixed and (request.guidance != 1.0 or len(parts) > 1)
    texts = [*([negative] if guided else []), *(text for text, _ in parts)]
    by_step = tuple(at_each_step(text) for text in texts)
    windows = tuple(sd.windows([_tokenized(request, text) for text in set(own)]) for own in by_step)
    return Texts(by_step, windows, guided, tuple(weight for _, weight in parts))


def _steps(request: Request) -> tuple[int, int]:
    """The steps that prompts count, and those of the pass before: evaluations, as in A1111, where heun has two a step.

    An image's are those of the whole run, as in A1111; a second pass's those it runs, which there are all.
    """
    evaluations = 2 if request.sampler == "heun" else 1
    steps = int(request.steps * request.strength) if request.earlier_steps else request.steps
    return steps * evaluations, request.earlier_steps * evaluations


def _tokenized(request: Request, text: str) -> str | Sections:
    """The text as tokenizers take it."""
    return text if request.prompt_syntax == "plain" else prompt_syntax.emphasis(text)


def conditions(sd: "StableDiffusion", request: Request, group: Group, evaluations: int) -> list[tuple[Condition, ...]]:
    """The conditions of each evaluation, one for all examples, or one for each text where these differ in length.

    Each distinct text is encoded once. As in A1111, evaluations count from 0 and steps from 1, so the first two
    evaluations are of step 1, and an image's evaluations begin at 0 however small the strength.
    """
    made: dict[tuple, tuple[Condition, ...]] = {}
    found = []
    for i in range(evaluations):
        now = tuple(tuple(own[min(max(i, 1), len(own)) - 1] for own in texts.by_step) for texts in group.texts)
        if now not in made:
            made[now] = _conditions(sd, request, group, now)
        found.append(made[now])
    return found


def _conditions(
    sd: "StableDiffusion", request: Request, group: Group, texts: Sequence[Sequence[str]]
) -> tuple[Condition, ...]:
    """texts: by picture, then as in `Texts.by_step`."""
    windows, guided = group.texts[0].windows, group.texts[0].guided
    slots = list(zip(*texts, strict=True))
    negatives = [guided and j == 0 for j in range(len(slots))]
    if len(set(windows)) > 1:
        return tuple(
            _condition(sd, request, group.rows, slot, count, [negative] * len(slot))
            for slot, count, negative in zip(slots, windows, negatives, strict=True)
        )
    flat = list(itertools.chain(*slots))
    return (_condition(sd, request, group.rows, flat, windows[0], np.repeat(negatives, len(group.rows))),)


def _condition(
    sd: "StableDiffusion",
    request: Request,
    rows: Sequence[int],
    texts: Sequence[str],
    windows: int,
    negative: Sequence[bool] | np.ndarray,
) -> Condition:
    """negative: which of the texts are negative prompts'."""
    drawn = [row for row in [*rows] * (len(texts) // len(rows)) for _ in range(windows)]
    context, pooled = sd.encode_prompts(
        [_tokenized(request, text) for text in texts],
        clip_skip=request.clip_skip,
        chunks=windows,
        pictures=drawn,
        restore_mean=request.emphasis == "original",
    )
    if any(negative) and sd.folder.model_index.get("force_zeros_for_empty_prompt"):
        # SDXL was trained with zeros, not an encoded empty text, where the prompt was dropped.
        empty = jnp.asarray([bool(own) and not text for own, text in zip(negative, texts, strict=True)])
        context = jnp.where(empty[:, None, None], jnp.zeros((), context.dtype), context)
        pooled = jnp.where(empty[:, None], jnp.zeros((), pooled.dtype), pooled)
    added = sd.added_conditions(pooled, request.height, request.width) or {}
    if width := sd.unet.config.time_cond_proj_dim:
        scale = jnp.full((len(texts),), (request.guidance - 1) * 1000, jnp.float32)
        added["timestep_cond"] = timestep_embedding(scale, width, flip_sin_to_cos=False, freq_shift=1)
    return Condition(context, added or None)
