"""The programs that a call to draw compiles, from shapes alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.data.images import Size
from sdjax.draw import sampling
from sdjax.draw.conditioning import Condition
from sdjax.draw.loop import Given, compiled_sampler_step
from sdjax.errors import ConfigError
from sdjax.model import Outline, compiled_decode
from sdjax.models.layers import variables
from sdjax.runtime.compiled import Program
from sdjax.settings import Count, read_value
from sdjax.text.encoding import compiled_encode_ids


def drawing_with(source: str, dtype: str, platform: str, *, side: int | None, count: int, steps: int) -> list[Program]:
    """Returns the programs that draw square pictures with a model, which needs no weights.

    source, dtype, platform: see `Outline.load`. side: in pixels; None: the model's.
    """
    read_value(Count, count, "--count")
    outline = Outline.load(source, dtype, platform=platform, weights=False)
    side = side or outline.native_size
    if side < 8 or side % outline.size_multiple:
        raise ConfigError(f"--size {side}: expected a multiple of {outline.size_multiple}")
    return drawing(outline, Size(side, side), count=count, steps=steps)


def drawing(
    outline: Outline,
    size: Size,
    *,
    count: int,
    steps: int,
    sampler: str = "dpmpp_2m",
    guided: bool = True,
    clip_skip: int | None = None,
    chunks: int = 1,
) -> list[Program]:
    """Returns the programs that draw `count` pictures at once.

    size: of the pictures in pixels. steps, sampler: as in `draw.settings`. guided: whether there is a negative prompt.
    chunks: of the longest prompt.
    """
    table = sampling.tabulate(outline.schedule, sampler, steps)
    params = {part: outline.abstract_params(part) for part in outline.shapes}
    texts = count * (2 if guided else 1)
    array: Any = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    cells = tuple(side // outline.vae.config.factor for side in size)
    channels = outline.vae.config.latent_channels
    latents = array(count, *cells, channels)
    context, pooled = outline.abstract_context(texts, chunks, clip_skip)
    added = jax.eval_shape(lambda pooled: outline.added_conditions(pooled, *size), pooled)
    ids = outline.abstract_ids(texts, chunks)

    def sampler_step(place):
        state = sampling.State(latents, array(sampling.HISTORY, *latents.shape))
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count))
        conditions, number = (Condition(context, added),), array(dtype=np.int32)
        given = Given(channels=array(count, *cells, 1 + channels)) if outline.is_inpainting else Given()
        tables = (keys, conditions, array(count, 1), array(), array(), given)
        arrays = place(variables(params["unet"]), state, number, table, *tables)
        return compiled_sampler_step(outline).lower(outline.unet, outline.schedule.prediction_type, *arrays)

    def decode(place):
        return compiled_decode.lower(outline.vae, *place(params["vae"], array(1, *cells, channels)))

    def encode_text(place):
        texts = {name: variables(params[name]) for name in outline.text_models}
        models = tuple(outline.text_models.items())
        return compiled_encode_ids.lower(models, outline.hidden_state(clip_skip), *place(texts, ids))

    return [
        Program("encode text", encode_text, runs=1),
        Program("sampler step", sampler_step, runs=int(table.length)),
        Program("decode", decode, runs=count),
    ]
