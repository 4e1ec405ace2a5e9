"""The programs that a call to draw compiles, from shapes alone."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sdjax.data.images import Size
from sdjax.draw import sampling, upscaling
from sdjax.draw.conditioning import Condition
from sdjax.draw.loop import Given, compiled_sampler_step
from sdjax.errors import ConfigError
from sdjax.model import compiled_decode
from sdjax.models.layers import variables
from sdjax.outline import Outline
from sdjax.runtime.compiled import Program, on_mesh
from sdjax.runtime.devices import at_once, copies, mesh_of, split_examples
from sdjax.settings import Count, read_value
from sdjax.text.encoding import compiled_encode_ids


def drawing_with(
    source: str,
    dtype: str,
    devices: Sequence[Any],
    *,
    side: int | None,
    count: int,
    steps: int,
    base_dtype: str = "",
    upscale: str = "",
) -> list[Program]:
    """Returns the programs that draw square pictures with a model, which needs no weights.

    source, dtype, base_dtype: see `Outline.load`. devices: share the pictures. side: in pixels; None: the model's.
    upscale: file of an upscaler, or "tiny"; empty: none.
    """
    read_value(Count, count, "--count")
    outline = Outline.load(source, dtype, platform=devices[0].platform, base_dtype=base_dtype, weights=False)
    side = side or outline.native_size
    if side < 8 or side % outline.size_multiple:
        raise ConfigError(f"--size {side}: expected a multiple of {outline.size_multiple}")
    mesh = mesh_of(devices) if len(devices) > 1 else None
    size = Size(side, side)
    enlarging = [upscaling.load(upscale).program(size, count, devices[0].platform)] if upscale else []
    return [*drawing(outline, size, count=count, steps=steps, mesh=mesh), *enlarging]


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
    mesh: Mesh | None = None,
) -> list[Program]:
    """Returns the programs that draw `count` pictures at once.

    size: of the pictures in pixels. steps, sampler: as in `draw.settings`. guided: whether there is a negative prompt.
    chunks: of the longest prompt. mesh: see `Model.on_devices`; None: one device.
    """
    table = sampling.tabulate(outline.schedule, sampler, steps)
    params = {part: outline.abstract_params(part) for part in outline.shapes}
    distilled = outline.unet.config.time_cond_proj_dim  # takes the guidance as an input, and no negative prompt
    texts = count * (2 if guided and not distilled else 1)
    array: Any = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    cells = tuple(side // outline.vae.config.factor for side in size)
    channels = outline.vae.config.latent_channels
    latents = array(count, *cells, channels)
    context, pooled = outline.abstract_context(texts, chunks, clip_skip)
    added = jax.eval_shape(outline.added_conditions, pooled, array(texts, 6)) or {}
    if distilled:
        added["timestep_cond"] = array(texts, distilled)
    ids = outline.abstract_ids(texts, chunks)
    split = functools.partial(split_examples, mesh)
    decoded = at_once(mesh, count)

    def sampler_step(place):
        state = sampling.State(split(latents), split(array(sampling.HISTORY, *latents.shape), axis=1))
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count))
        conditions, number = split((Condition(context, added or None),)), array(dtype=np.int32)
        given = Given(channels=array(count, *cells, 1 + channels)) if outline.is_inpainting else Given()
        tables = (split(keys), conditions, split(array(count, 1)), array(), array(), split(given))
        arrays = place(variables(params["unet"]), state, number, table, *tables)
        return compiled_sampler_step(outline).lower(outline.unet, outline.schedule.prediction_type, *arrays)

    def decode(place):
        return compiled_decode.lower(outline.vae, *place(params["vae"], split(array(decoded, *cells, channels))))

    def encode_text(place):
        texts = {name: variables(params[name]) for name in outline.text_models}
        models = tuple(outline.text_models.items())
        return compiled_encode_ids.lower(models, outline.hidden_state(clip_skip), *place(texts, ids))

    programs = [
        Program("encode text", encode_text, runs=1),
        Program("sampler step", sampler_step, runs=int(table.length)),
        Program("decode", decode, runs=count // decoded),
    ]
    if mesh is None:
        return programs
    return [on_mesh(mesh, functools.partial(copies, mesh), program) for program in programs]
