"""A model with its weights.

A `Model` never changes: methods such as `with_lora` return a new one.

    model = Model.load("tiny")
    outline = Outline.load("tiny")  # or in two steps: configs and tokenizers first,
    model = Model.of(outline)  # then the weights
"""

import dataclasses
import functools
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float
from PIL import Image

from sdjax import lora, quantization
from sdjax.data.images import Size, pixels
from sdjax.errors import ConfigError
from sdjax.formats.diffusers_folder import save_folder
from sdjax.formats.lora_file import load_lora
from sdjax.formats.single_file import save_single_file
from sdjax.models import unet
from sdjax.models.layers import variables
from sdjax.models.tiling import Tiling, tiled
from sdjax.models.vae import posterior_mean, scale_latents, unscale_latents
from sdjax.outline import Options, Outline
from sdjax.runtime.devices import at_once, check_count, copies, mesh_of, split_examples, within
from sdjax.text import textual_inversion
from sdjax.text.encoding import TEXT_ENCODERS, encode_ids
from sdjax.text.syntax import Sections

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model with its weights.

    params: part -> parameter tree.
    placeholders: text model -> vectors [K, D] of the new words in its tokenizer.
    adapters: part -> LoRA tree beside the weights: with a leading axis, one adapter for each picture of a call (see
    `with_loras`); without, one for all (see `with_lora`).
    tiling: how the autoencoder divides large pictures; None computes them whole.
    mesh: the devices that pictures are drawn on, see `on_devices`; None: one.
    refiner: the second model that takes over for the last steps, see `with_refiner`.
    """

    outline: Outline
    params: dict[str, Any]
    placeholders: dict[str, Float[Array, "K D"]] = dataclasses.field(default_factory=dict)
    adapters: dict[str, Any] = dataclasses.field(default_factory=dict)
    tiling: Tiling | None = None
    mesh: Mesh | None = None
    refiner: "Model | None" = None

    @classmethod
    def load(cls, source: str | os.PathLike, dtype: str = "float32", **how: Unpack[Options]) -> "Model":
        """Loads a model with its weights; see `Outline.load`."""
        return cls.of(Outline.load(source, dtype, **how))

    @classmethod
    def of(cls, outline: Outline, *, dtype: Any = None) -> "Model":
        """Loads the weights of an outline, and those of its refiner but the autoencoder.

        dtype: see `Outline.load_weights`.
        """
        params = {part: outline.load_weights(part, dtype=dtype) for part in outline.shapes}
        return cls(outline, params, refiner=outline.refiner and _refining(outline.refiner.outline))

    # ------------------------------------------------------------------------------------------------ computing

    def variables(self, part: str, pictures: Sequence[int] | None = None) -> dict[str, Any]:
        """The Flax variables of a part.

        pictures: for each example of the batch, the number of the picture whose adapter it uses. None: none of those.
        """
        adapter = self.adapters.get(part)
        if adapter is not None and lora.stacked(adapter):
            chosen = None if pictures is None else np.array(pictures)
            adapter = None if chosen is None else jax.tree.map(lambda leaf: leaf[chosen], adapter)
        return variables(self.params[part], rows=self.placeholders.get(part), lora=adapter)

    def encode_text(self, prompts: str | Sequence[str], clip_skip: int | None = None) -> Float[Array, "B T D"]:
        """The context of each prompt. A prompt longer than the window of the text model gives T = chunks * window."""
        return self.encode_prompts([prompts] if isinstance(prompts, str) else list(prompts), clip_skip=clip_skip)[0]

    def encode_prompts(
        self,
        prompts: Sequence[str | Sections],
        *,
        clip_skip: int | None = None,
        chunks: int | None = None,
        pictures: Sequence[int] | None = None,
        restore_mean: bool = True,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B P"]]:
        """The context and the pooled vector of each prompt.

        prompts: plain texts, or the weighted sections that `text.syntax.emphasis` returns.
        chunks: how many chunks to use; by default as many as the longest prompt takes.
        pictures: for each chunk, the number of the picture whose adapter it uses. None: no adapters.
        restore_mean: see `text.encoding.emphasised`.
        """
        outline = self.outline
        count = chunks or outline.chunks(prompts)
        encoded = {
            name: outline.tokenizers[TEXT_ENCODERS[name]].encode_weighted(prompts, chunks=count)
            for name in outline.text_models
        }
        return encode_ids(
            outline.text_models,
            {name: self.variables(name, pictures) for name in outline.text_models},
            {name: ids for name, (ids, _) in encoded.items()},
            outline.hidden_state(clip_skip),
            {name: weights for name, (_, weights) in encoded.items()},
            restore_mean=restore_mean,
        )

    def encode_image(
        self, images: Sequence[Image.Image] | Float[Array | np.ndarray, "B H W 3"]
    ) -> Float[Array, "B h w 4"]:
        """The scaled mean of the posterior. images: pictures of one size, or values in [0, 1]."""
        if not isinstance(images, (Array, np.ndarray)):
            images = np.stack([pixels(image, Size(image.height, image.width)) for image in images])
        values = jnp.asarray(images, jnp.float32)
        encode = functools.partial(compiled_encode, self.outline.vae, self.params["vae"])
        return scale_latents(self.outline.vae.config, self._in_parts(encode, values, encode=True))

    def decode_latents(self, latents: Float[Array | np.ndarray, "B h w 4"]) -> Float[Array, "B H W 3"]:
        """Pictures with values in [0, 1]. Each device decodes one at a time: memory does not grow with the batch."""
        unscaled = unscale_latents(self.outline.vae.config, jnp.asarray(latents, jnp.float32))
        decode = functools.partial(compiled_decode, self.outline.vae, self.params["vae"])
        return self._in_parts(decode, unscaled, encode=False)

    def _in_parts(self, compute: Callable[[Any], Array], values: Array, *, encode: bool) -> Array:
        """Computes one example at a time on each device; in tiles, one tile of one example."""
        size = 1 if self.tiling else at_once(self.mesh, len(values))
        parts = (values[i : i + size] for i in range(0, len(values), size))
        with within(self.mesh):
            if self.tiling:
                return jnp.concatenate([self._in_tiles(compute, part, self.tiling, encode=encode) for part in parts])
            try:
                split = (split_examples(self.mesh, part) for part in parts)
                return jnp.concatenate([jax.block_until_ready(compute(part)) for part in split])
            except jax.errors.JaxRuntimeError as error:  # out of memory, or too large for a library of XLA
                cells = 512 // (1 if encode else self.outline.vae.config.factor)
                if max(values.shape[1:3]) <= cells:
                    raise
                cause = next(iter(str(error).splitlines()), "")[:100]
        log.warning("the autoencoder fails on a whole picture (%s): it works in tiles (--tiled-vae)", cause)
        return self.with_tiled_vae()._in_parts(compute, values, encode=encode)

    def _in_tiles(self, compute: Callable[[Any], Array], values: Array, tiling: Tiling, *, encode: bool) -> Array:
        config = self.outline.vae.config
        channels = config.latent_channels if encode else config.out_channels
        whole = tiled(compute, np.asarray(values), tiling, factor=config.factor, encode=encode, channels=channels)
        return jnp.asarray(whole)

    def predict(
        self, latents: Float[Array, "B h w C"], timesteps: Array, context: Float[Array, "B T D"], **added: Array
    ) -> Float[Array, "B h w 4"]:
        """The raw output of the U-Net: noise or velocity, as the model was trained.

        added: SDXL's conditions `text_embeds` and `time_ids`.
        """
        timesteps = jnp.broadcast_to(jnp.asarray(timesteps, jnp.float32), (latents.shape[0],))
        return _predict(self.outline.unet, self.variables("unet"), latents, timesteps, context, added or None)

    # ------------------------------------------------------------------------------------------------ changing

    def on_devices(self, count: int | None = None) -> "Model":
        """Returns the model with a copy of its weights on each of the first `count` devices, which share the pictures.

        count: by default all of JAX's. A call that draws a multiple of `count` pictures is split evenly; of any other
        call every device draws all pictures. Raises ConfigError if there are fewer devices.
        """
        count = jax.device_count() if count is None else count
        check_count(count)
        mesh = mesh_of(jax.devices()[:count])
        params, placeholders, adapters = copies(mesh, (self.params, self.placeholders, self.adapters))
        return dataclasses.replace(
            self,
            params=params,
            placeholders=placeholders,
            adapters=adapters,
            mesh=mesh,
            refiner=self.refiner and self.refiner.on_devices(count),
        )

    def with_refiner(self, source: str | os.PathLike, switch: float = 0.8, **how: Unpack[Options]) -> "Model":
        """Returns the model with a second model for the last steps of each picture (Podell et al. 2023, section 2.5).

        source, how: see `Outline.load`; of SDXL's refiner or another model of the same family and latents.
        switch: the share of the noise schedule that this model draws, in (0, 1), which diffusers calls denoising_end.
        LoRAs and new words of this model stay its own. Raises ConfigError for a model that does not fit.
        """
        dtype, platform = str(self.outline.dtype("unet")), self.outline.unet.compute.platform
        refiner = Outline.load(source, dtype, **{"platform": platform, **how})
        outline = self.outline.with_refiner(refiner, switch)
        return dataclasses.replace(self, outline=outline, refiner=_refining(refiner))

    def with_tiled_vae(self, tile: int = 512, overlap: int = 64) -> "Model":
        """Returns the model with an autoencoder that works in overlapping tiles, to save memory on large pictures.

        tile, overlap: in pixels.
        """
        return dataclasses.replace(self, tiling=Tiling(tile, overlap))

    def with_lora(self, path: str | os.PathLike | Mapping[str, Any], weight: float = 1.0) -> "Model":
        """Returns the model with a LoRA merged into its weights: `W + weight * scale * down up`.

        path: a file (kohya or PEFT keys), or part -> adapter tree. Weights in int8 would lose the change, so a LoRA of
        theirs stays beside them, as the sum of all that were given. Raises DataError for a file that does not fit, and
        ConfigError for several that have no sum (see `lora.add`).
        """
        given = path if isinstance(path, Mapping) else load_lora(path, self.params)
        params, adapters = dict(self.params), dict(self.adapters)
        for part, tree in given.items():
            if quantization.is_quantized(params[part]):
                adapters[part] = self._sum_beside(part, tree, weight)
            else:
                params[part] = lora.merge(params[part], tree, weight)
        return dataclasses.replace(self, params=params, adapters=adapters)

    def _sum_beside(self, part: str, tree: Mapping[str, Any], weight: float) -> dict[str, Any]:
        earlier = self.adapters.get(part, {})
        if lora.stacked(earlier):
            raise ConfigError("with_lora comes before with_loras where the weights are in int8")
        return lora.add([(earlier, 1.0), (tree, weight)])

    def with_loras(
        self, paths: Sequence[str | os.PathLike | Mapping[str, Any] | None], weights: Sequence[float] | None = None
    ) -> "Model":
        """Returns the model that draws `len(paths)` pictures a call, picture i with LoRA i (None: without a LoRA).

        paths: see `with_lora`. The adapters stay beside the weights, which all pictures share. A LoRA that all pictures
        have in common is better merged first, with `with_lora`. Raises ConfigError for DoRA, which cannot be stacked.
        """
        loras = [path if isinstance(path, Mapping) else load_lora(path, self.params) if path else {} for path in paths]
        weights = [1.0] * len(loras) if weights is None else list(weights)
        if len(weights) != len(loras) or not loras:
            raise ConfigError(f"{len(loras)} LoRAs with {len(weights)} weights: give one weight each, or none")
        parts = dict.fromkeys(part for tree in loras for part in tree)
        # Those of an earlier call are replaced; one that all pictures share stays.
        common = {part: tree for part, tree in self.adapters.items() if not lora.stacked(tree)}
        bare = dataclasses.replace(self, adapters=common)
        adapters = {
            part: lora.stack(
                [bare._sum_beside(part, tree.get(part, {}), w) for tree, w in zip(loras, weights, strict=True)]
            )
            for part in dict.fromkeys([*common, *parts])
        }
        return dataclasses.replace(self, adapters=adapters)

    def with_embedding(
        self, path: str | os.PathLike | Mapping[str, Mapping[str, np.ndarray]], token: str | None = None
    ) -> "Model":
        """Returns the model with the words of a Textual Inversion, beside those of earlier calls.

        path: a file of any program, or word -> text model -> vectors [n, D]. A word for SDXL has vectors for both text
        models. token: the word to use in prompts, for a file that holds one word; by default the word in the file.
        Raises ConfigError for a word that the model knows already, DataError for vectors that do not fit the model.
        """
        words = self.outline.load_words(path, token)
        placeholders = dict(self.placeholders)
        for name in self.outline.text_models:
            earlier = [placeholders[name]] if name in placeholders else []
            placeholders[name] = jnp.concatenate(
                [*earlier, *(jnp.asarray(rows[name], jnp.float32) for rows in words.values())]
            )
        return dataclasses.replace(self, outline=self.outline.with_embedding(words), placeholders=placeholders)

    def for_inpainting(self) -> "Model":
        """Returns a standard model with a U-Net that also takes the mask and the masked latents, for training.

        The weights of the new input channels are 0, so they change no output at first. The training of Stable
        Diffusion's inpainting models began in the same way.
        """
        outline = self.outline
        channels = 2 * outline.vae.config.latent_channels + 1
        first = self.params["unet"]["conv_in"]
        more = [(0, channels - outline.unet.config.in_channels) if axis == 2 else (0, 0) for axis in range(4)]
        params = {
            **self.params["unet"],
            "conv_in": {**first, "kernel": jnp.pad(jnp.asarray(np.asarray(first["kernel"])), more)},
        }
        config = {**outline.folder.configs["unet"], "in_channels": channels}
        folder = dataclasses.replace(
            outline.folder,
            configs={**outline.folder.configs, "unet": config},
            model_index={key: value for key, value in outline.folder.model_index.items() if key != "_class_name"},
        )
        wider = dataclasses.replace(
            outline,
            unet=outline.unet.clone(config=unet.UNetConfig.from_dict(config)),
            shapes={**outline.shapes, "unet": unet.abstract_params(unet.UNetConfig.from_dict(config))},
            folder=folder,
        )
        return dataclasses.replace(self, outline=wider, params={**self.params, "unet": params})

    # ------------------------------------------------------------------------------------------------ saving

    def save(
        self, folder: str | os.PathLike, *, dtype: str | None = None, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Writes the model in the layout of diffusers, with new words in its tokenizers and embedding tables.

        folder: a path that ends in .safetensors gives a single file with CompVis' parameter names instead, the form
        that A1111 and ComfyUI read. A single file holds no tokenizer, so a model with new words raises ConfigError.
        dtype: the number type of the written weights; by default that of the model. metadata: entries for the header of
        the single file, or of the U-Net's file in the folder. Raises ConfigError for weights in int8.
        """
        outline, source = self.outline, self.outline.folder
        if quantization.is_quantized(self.params["unet"]):
            raise ConfigError(f"{folder}: weights in int8 are rounded: load the model without base_dtype to save it")
        if Path(folder).suffix.lower() in (".safetensors", ".sft"):
            if words := [word for tokenizer in outline.tokenizers.values() for word in tokenizer.placeholders]:
                raise ConfigError(
                    f"{folder}: a single file cannot hold the new words {', '.join(dict.fromkeys(words))}"
                )
            save_single_file(
                folder,
                configs=source.configs,
                params=self.params,
                scheduler=source.scheduler,
                dtype=dtype and jnp.dtype(dtype),
                metadata=metadata,
            )
            return
        configs, params, tokenizers = dict(source.configs), dict(self.params), dict(source.tokenizers)
        with tempfile.TemporaryDirectory() as temporary:
            for name, rows in self.placeholders.items():
                place = TEXT_ENCODERS[name]
                tokenizer, plain = outline.tokenizers[place], tokenizers[place]
                tokenizers[place] = Path(temporary) / place
                first = tokenizer.save(plain, tokenizers[place])
                params[name] = textual_inversion.with_rows(params[name], rows, first, what=f"{outline.name}: {name}")
                size = params[name]["embeddings"]["token_embedding"]["embedding"].shape[0]
                # An eos_token_id of 2 means the largest id, which now belongs to a new word.
                configs[name] = {**configs[name], "vocab_size": size, "eos_token_id": tokenizer.end}
            save_folder(
                folder,
                configs=configs,
                params=params,
                tokenizers=tokenizers,
                scheduler=source.scheduler,
                model_index=source.model_index,
                dtype=dtype and jnp.dtype(dtype),
                metadata=metadata,
            )


def _refining(outline: Outline) -> Model:
    """Loads a refiner, which needs no autoencoder."""
    return Model(outline, {part: outline.load_weights(part) for part in outline.shapes if part != "vae"})


@functools.partial(jax.jit, static_argnums=0)
def _predict(model, variables, latents, timesteps, context, added):
    return model.apply(variables, latents, timesteps, context, added)


@functools.partial(jax.jit, static_argnums=0)
def compiled_encode(model, params, pixels):
    """The mean of the posterior of images with values in [0, 1], unscaled."""
    return posterior_mean(model.apply({"params": params}, 2 * pixels - 1, method="encode"))


@functools.partial(jax.jit, static_argnums=0)
def compiled_decode(model, params, latents):
    """The images of unscaled latents, with values in [0, 1]."""
    return jnp.clip(model.apply({"params": params}, latents, method="decode") / 2 + 0.5, 0.0, 1.0)
