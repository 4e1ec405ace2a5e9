"""StableDiffusion: an immutable bundle of models, weights and settings, and what one draws with it."""

import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from PIL import Image

from sdjax import diffusion, drawing, lora
from sdjax.errors import ConfigError, DataError
from sdjax.formats.diffusers_folder import ModelFolder, save_folder
from sdjax.formats.embedding_file import load_embedding
from sdjax.formats.lora_file import load_lora
from sdjax.formats.single_file import save_single_file
from sdjax.models import clip, unet, vae
from sdjax.prompt import Tokenizer
from sdjax.prompt_syntax import Sections
from sdjax.request import HiresSettings, InpaintSettings, Settings, for_img2img, for_inpaint, for_text2image
from sdjax.text_encoding import TEXT_ENCODERS, HiddenState, collections, encode_ids, with_rows
from sdjax.tiling import Tiling, tiled


@dataclasses.dataclass(frozen=True, eq=False)
class StableDiffusion:
    """A model ready to draw. Methods return new bundles and leave this one as it is.

    params: one parameter tree a part: `unet`, `vae`, `text_encoder` and, for SDXL, `text_encoder_2`.
    name: what it was loaded from; folder: where its configs and tokenizers lie, for saving it again.
    """

    unet: unet.UNet
    vae: vae.AutoencoderKL
    text_models: dict[str, clip.TextModel]
    params: dict[str, Any]
    tokenizers: dict[str, Tokenizer]
    schedule: diffusion.NoiseSchedule
    folder: ModelFolder
    name: str
    placeholders: dict[str, Float[Array, "K D"]] = dataclasses.field(default_factory=dict)
    """Text model -> vectors of the words its tokenizer has learned, beside the table."""
    adapters: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Model -> LoRA tree with a leading axis, one adapter for each picture of a call (see `with_loras`)."""

    tiling: Tiling | None = None
    """How the autoencoder computes large pictures; None: as a whole."""

    # ------------------------------------------------------------------------------------------------ drawing

    def text2image(
        self, prompt: str | Sequence[str], negative_prompt: str | Sequence[str] = "", **settings: Unpack[HiresSettings]
    ) -> list[Image.Image]:
        """Draws `num_images` pictures of each prompt, 20 steps of dpmpp_2m at guidance 7.5 unless set otherwise.

        settings: see `request.Settings`; height and width are by default the model's own, or those of `latents`.
        With hires_scale above 1 the picture is drawn small, enlarged and drawn again, as `request.Hires` says.
        Each picture carries its settings in `info["parameters"]`.
        Raises ConfigError for a setting out of range, before anything is computed.
        """
        return drawing.text2image(self, for_text2image(self, prompt, negative_prompt, settings))

    def img2img(
        self,
        prompt: str | Sequence[str],
        image: Image.Image | Sequence[Image.Image],
        *,
        strength: float = 0.75,
        negative_prompt: str | Sequence[str] = "",
        **settings: Unpack[Settings],
    ) -> list[Image.Image]:
        """Redraws an image (or one an image to draw): noised to `strength` of the way, then drawn from there.

        strength: in (0, 1]; steps * strength steps run (Meng et al. 2022, SDEdit). settings: as of `text2image`; height
        and width are by default the image's, down to multiples of 8; the image is resized to them.
        """
        return drawing.img2img(self, *for_img2img(self, prompt, negative_prompt, image, settings, strength=strength))

    def inpaint(
        self,
        prompt: str | Sequence[str],
        image: Image.Image | Sequence[Image.Image],
        mask: Image.Image | Sequence[Image.Image] | None = None,
        *,
        strength: float = 1.0,
        negative_prompt: str | Sequence[str] = "",
        **settings: Unpack[InpaintSettings],
    ) -> list[Image.Image]:
        """Paints an image anew where its mask is white; models of 4 and of 9 channels alike.

        mask: of any size, stretched over the image; shades of grey paint for as much of the steps. None: what is
        transparent in the image is painted. strength: as of `img2img`; 1 starts from noise alone. settings: as of
        `text2image`, and those of `inpainting.Inpainting`. Pictures keep the image's size, and its pixels where the
        mask is 0; with height and width the image is resized to them first (or, with only_masked, drawn at them).
        Several images need one size or only_masked. Raises ConfigError for a mask that leaves nothing to paint.
        """
        given = for_inpaint(self, prompt, negative_prompt, image, mask, settings, strength=strength)
        return drawing.inpaint(self, *given)

    # ------------------------------------------------------------------------------------------------ the parts

    @property
    def is_sdxl(self) -> bool:
        """Whether the U-Net wants SDXL's added conditions."""
        return self.unet.config.addition_embed_type == "text_time"

    def encode_text(self, prompts: str | Sequence[str], clip_skip: int | None = None) -> Float[Array, "B T D"]:
        """Context of each prompt; prompts longer than the window give T = chunks * window."""
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
        """Context and pooled vector of each prompt. chunks: exactly so many windows; default what the longest takes.

        A text is taken as it is; see `prompt_syntax.emphasis` for weighted ones.
        pictures: for each window, the picture of a call whose adapter it gets; None: no adapters.
        restore_mean: of weighted windows, as of `text_encoding.emphasised`.
        """
        variables = {name: self.variables(name, pictures) for name in self.text_models}
        count = chunks or self.windows(prompts)
        encoded = {
            name: self.tokenizers[TEXT_ENCODERS[name]].encode_weighted(prompts, chunks=count)
            for name in self.text_models
        }
        ids, weights = ({name: own[part] for name, own in encoded.items()} for part in (0, 1))
        hidden = self.hidden_state(clip_skip)
        return encode_ids(self.text_models, variables, ids, hidden, weights, restore_mean=restore_mean)

    def variables(self, part: str, pictures: Sequence[int] | None = None) -> dict[str, Any]:
        """The Flax collections one of the models computes with.

        pictures: for each example of its batch, the picture of a call whose adapter it gets; None: no adapters.
        """
        adapter = self.adapters.get(part) if pictures is not None else None
        if adapter is not None:
            adapter = jax.tree.map(lambda leaf: leaf[np.array(pictures)], adapter)
        return collections(self.params[part], rows=self.placeholders.get(part), lora=adapter)

    def tokenize(self, prompts: Sequence[str], *, chunks: int | None = None) -> dict[str, Int[np.ndarray, "B n T"]]:
        """Token ids for each text model, in equally many windows."""
        tokenizers = {name: self.tokenizers[TEXT_ENCODERS[name]] for name in self.text_models}
        count = chunks or self.windows(prompts)
        return {name: tokenizer.encode(prompts, chunks=count) for name, tokenizer in tokenizers.items()}

    def windows(self, prompts: Sequence[str | Sections]) -> int:
        """Windows the longest of the prompts takes in any text model."""
        return max(tokenizer.chunks(prompt) for tokenizer in self.tokenizers.values() for prompt in prompts)

    def hidden_state(self, clip_skip: int | None = None) -> HiddenState:
        """Which state of the text models is the context; ConfigError for a clip_skip they have not."""
        layers = min(model.config.num_hidden_layers for model in self.text_models.values())
        if clip_skip is not None and not 1 <= clip_skip <= layers:
            raise ConfigError(f"clip_skip = {clip_skip}: must lie in 1 (last layer)..{layers}")
        return HiddenState(clip_skip or (2 if self.is_sdxl else 1), final_norm=not self.is_sdxl)

    def added_conditions(self, pooled: Float[Array, "B P"], height: int, width: int) -> dict[str, Array] | None:
        """SDXL's pooled text and sizes in pixels (original, crop, target) for pictures of one size; else None."""
        if not self.is_sdxl:
            return None
        sizes = jnp.asarray([height, width, 0, 0, height, width], jnp.float32)
        return {"text_embeds": pooled, "time_ids": jnp.broadcast_to(sizes, (pooled.shape[0], 6))}

    def encode_image(
        self, images: Sequence[Image.Image] | Float[Array | np.ndarray, "B H W 3"]
    ) -> Float[Array, "B h w 4"]:
        """Scaled mean of the posterior. images: pictures of one size, or values in [0, 1]."""
        if not isinstance(images, (Array, np.ndarray)):
            images = np.stack([drawing.pixels(image, *image.size) for image in images])
        pixels = jnp.asarray(images, jnp.float32)
        encode = functools.partial(_encode_image, self.vae, self.params["vae"])
        means = [self._in_tiles(encode, pixels[i : i + 1], encode=True) for i in range(len(pixels))]
        return vae.scale_latents(self.vae.config, jnp.concatenate(means))

    def decode_latents(self, latents: Float[Array | np.ndarray, "B h w 4"]) -> Float[Array, "B H W 3"]:
        """Pictures with values in [0, 1]; one at a time, so that memory does not grow with the batch."""
        unscaled = vae.unscale_latents(self.vae.config, jnp.asarray(latents, jnp.float32))
        decode = functools.partial(_decode_latents, self.vae, self.params["vae"])
        return jnp.concatenate(
            [self._in_tiles(decode, unscaled[i : i + 1], encode=False) for i in range(len(unscaled))]
        )

    def _in_tiles(self, compute: Callable[[Any], Array], values: Array, *, encode: bool) -> Array:
        if self.tiling is None:
            return compute(values)
        config = self.vae.config
        channels = config.latent_channels if encode else config.out_channels
        whole = tiled(compute, np.asarray(values), self.tiling, factor=config.factor, encode=encode, channels=channels)
        return jnp.asarray(whole)

    def predict(
        self, latents: Float[Array, "B h w C"], timesteps: Array, context: Float[Array, "B T D"], **added: Array
    ) -> Float[Array, "B h w 4"]:
        """The U-Net's raw output: noise or velocity, as the model was trained. added: `text_embeds`, `time_ids`."""
        timesteps = jnp.broadcast_to(jnp.asarray(timesteps, jnp.float32), (latents.shape[0],))
        return _predict(self.unet, self.params["unet"], latents, timesteps, context, added or None)

    # ------------------------------------------------------------------------------------------------ changing it

    def with_tiled_vae(self, tile: int = 512, overlap: int = 64) -> "StableDiffusion":
        """A bundle whose autoencoder works in overlapping tiles: little memory for large pictures. Lengths: pixels."""
        return dataclasses.replace(self, tiling=Tiling(tile, overlap))

    def with_lora(self, path: str | os.PathLike | Mapping[str, Any], weight: float = 1.0) -> "StableDiffusion":
        """A bundle with a LoRA merged in. path: a file (kohya or PEFT keys), or an adapter tree by part.

        Exact: the kernels become `W + weight * scale * down up`; nothing is compiled anew.
        Raises DataError when the file does not fit the model.
        """
        adapters = path if isinstance(path, Mapping) else load_lora(path, self.params)
        params = dict(self.params)
        for part, tree in adapters.items():
            params[part] = lora.merge(params[part], tree, weight)
        return dataclasses.replace(self, params=params)

    def with_loras(
        self, paths: Sequence[str | os.PathLike | Mapping[str, Any] | None], weights: Sequence[float] | None = None
    ) -> "StableDiffusion":
        """A bundle whose calls draw `len(paths)` pictures at once, picture i with LoRA i (None: without one).

        paths: as of `with_lora`. The adapters stay beside the weights, which all pictures share. Merge what they have
        in common with `with_lora` first. Raises ConfigError for DoRA, which cannot be laid side by side.
        """
        loras = [path if isinstance(path, Mapping) else load_lora(path, self.params) if path else {} for path in paths]
        weights = [1.0] * len(loras) if weights is None else list(weights)
        if len(weights) != len(loras) or not loras:
            raise ConfigError(f"{len(loras)} LoRAs with {len(weights)} weights: give one weight each, or none")
        parts = dict.fromkeys(part for tree in loras for part in tree)
        weighted = lambda tree, weight: lora.add([(tree, weight)]) if tree else {}
        adapters = {
            part: lora.stack([weighted(tree.get(part), w) for tree, w in zip(loras, weights, strict=True)])
            for part in parts
        }
        return dataclasses.replace(self, adapters=adapters)

    def with_embedding(
        self, path: str | os.PathLike | Mapping[str, Mapping[str, np.ndarray]], token: str | None = None
    ) -> "StableDiffusion":
        """A bundle that knows the words of a Textual Inversion too. Several calls add up.

        path: a file of any program, or word -> text model -> vectors [n, D] (SDXL's words have them for both of its
        text models). token: the word to use in prompts, for a file of one; default the file's own.
        Raises ConfigError for a word that the model knows already, DataError for vectors that do not fit it.
        """
        widths = {name: model.config.hidden_size for name, model in self.text_models.items()}
        words = path if isinstance(path, Mapping) else load_embedding(path, widths)
        if token is not None:
            if len(words) != 1:
                raise ConfigError(f"token = {token!r} names one word; {path} holds {', '.join(words)}")
            words = dict(zip([token], words.values(), strict=True))
        for word, rows in words.items():
            shapes = {name: np.shape(own) for name, own in rows.items()}
            if shapes.keys() != widths.keys() or any(len(shape) != 2 for shape in shapes.values()):
                raise DataError(
                    f"the word {word!r} has vectors for {', '.join(rows)}; {self.name} has {', '.join(widths)}"
                )
            if any(shape[1] != widths[name] for name, shape in shapes.items()):
                raise DataError(f"the word {word!r} has vectors {shapes}; the widths of {self.name} are {widths}")
        tokenizers, placeholders = dict(self.tokenizers), dict(self.placeholders)
        for name, model in self.text_models.items():
            counts = {word: len(rows[name]) for word, rows in words.items()}
            tokenizer = tokenizers[TEXT_ENCODERS[name]]
            tokenizers[TEXT_ENCODERS[name]] = tokenizer.with_placeholders(counts, first=model.config.vocab_size)
            earlier = [placeholders[name]] if name in placeholders else []
            own = [jnp.asarray(rows[name], jnp.float32) for rows in words.values()]
            placeholders[name] = jnp.concatenate([*earlier, *own])
        return dataclasses.replace(self, tokenizers=tokenizers, placeholders=placeholders)

    def save(self, folder: str | os.PathLike, *, dtype: str | None = None) -> None:
        """Writes the model in diffusers' layout, new words in its tokenizers and tables.

        folder: a path that ends in .safetensors gives one file by CompVis' names instead, as A1111 and ComfyUI keep
        models; it holds no tokenizer, so ConfigError for new words. dtype: of the weights written; default as they are.
        """
        if Path(folder).suffix.lower() in (".safetensors", ".sft"):
            if words := [word for tokenizer in self.tokenizers.values() for word in tokenizer.placeholders]:
                raise ConfigError(
                    f"{folder}: a single file cannot hold the new words {', '.join(dict.fromkeys(words))}"
                )
            save_single_file(
                folder,
                configs=self.folder.configs,
                params=self.params,
                scheduler=self.folder.scheduler,
                dtype=dtype and jnp.dtype(dtype),
            )
            return
        configs, params, tokenizers = dict(self.folder.configs), dict(self.params), dict(self.folder.tokenizers)
        with tempfile.TemporaryDirectory() as temporary:
            for name, rows in self.placeholders.items():
                source = tokenizers[TEXT_ENCODERS[name]]
                tokenizers[TEXT_ENCODERS[name]] = Path(temporary) / TEXT_ENCODERS[name]
                tokenizer = self.tokenizers[TEXT_ENCODERS[name]]
                first = tokenizer.save(source, tokenizers[TEXT_ENCODERS[name]])
                params[name] = with_rows(params[name], rows, first, what=f"{self.name}: {name}")
                size = params[name]["embeddings"]["token_embedding"]["embedding"].shape[0]
                # An eos_token_id of 2 means the largest id, which is now a new word's.
                configs[name] = {**configs[name], "vocab_size": size, "eos_token_id": tokenizer.end}
            save_folder(
                folder,
                configs=configs,
                params=params,
                tokenizers=tokenizers,
                scheduler=self.folder.scheduler,
                model_index=self.folder.model_index,
                dtype=dtype and jnp.dtype(dtype),
            )


@functools.partial(jax.jit, static_argnums=0)
def _predict(model, params, latents, timesteps, context, added):
    return model.apply({"params": params}, latents, timesteps, context, added)


@functools.partial(jax.jit, static_argnums=0)
def _encode_image(model, params, pixels):
    return vae.posterior_mean(model.apply({"params": params}, 2 * pixels - 1, method="encode"))


@functools.partial(jax.jit, static_argnums=0)
def _decode_latents(model, params, latents):
    return jnp.clip(model.apply({"params": params}, latents, method="decode") / 2 + 0.5, 0.0, 1.0)
