"""StableDiffusion: an immutable bundle of models, weights and settings, and what one draws with it."""

import dataclasses
import functools
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from PIL import Image

from sdjax import diffusion, lora, sampling
from sdjax.errors import ConfigError, DataError
from sdjax.formats.diffusers_folder import ModelFolder, read_folder, save_folder
from sdjax.formats.embedding_file import load_embedding
from sdjax.formats.lora_file import load_lora
from sdjax.formats.parameter_names import load_params
from sdjax.formats.png_parameters import parameters_text
from sdjax.formats.single_file import SUFFIXES, read_single_file, save_single_file
from sdjax.models import clip, unet, vae
from sdjax.models.layers import Compute, timestep_embedding
from sdjax.prompt import Tokenizer

DTYPES = ("float32", "bfloat16", "float16")
TEXT_ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


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

    # ------------------------------------------------------------------------------------------------ drawing

    def text2image(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        *,
        steps: int = 20,
        guidance: float = 7.5,
        guidance_rescale: float = 0.0,
        seed: int = 0,
        height: int | None = None,
        width: int | None = None,
        sampler: str = "dpmpp_2m",
        karras: bool = False,
        clip_skip: int | None = None,
        num_images: int = 1,
        latents: Float[Array, "B h w 4"] | None = None,
        progress: bool = True,
    ) -> list[Image.Image]:
        """Draws `num_images` pictures of each prompt; image i of the call uses seed + i, whatever the batch.

        steps: of the sampler. guidance: classifier-free guidance scale (Ho and Salimans 2022), 1 = off.
        guidance_rescale: phi of Lin et al. 2023, 3.4, in [0, 1]. height, width: pixels, multiples of 8; default the
        model's own. clip_skip: 1 = last layer of the text model, 2 = penultimate. latents: start from these, unit
        variance, instead of the seed's. Each picture carries its settings in `info["parameters"]`.
        Raises ConfigError for a setting out of range, before anything is computed.
        """
        native = self.unet.config.sample_size * self.vae.config.factor
        if latents is not None:
            height, width = (size * self.vae.config.factor for size in latents.shape[1:3])
        request = self._request(prompt, negative_prompt, num_images, seed, height or native, width or native)
        request = dataclasses.replace(
            request, steps=steps, guidance=guidance, guidance_rescale=guidance_rescale, sampler=sampler, karras=karras,
            clip_skip=clip_skip,
        )  # fmt: skip
        plan = self._plan(request)
        noise = self._noise(request, latents)
        return self._draw(request, plan, sampling.initial(plan, noise), progress)

    def img2img(
        self,
        prompt: str | Sequence[str],
        image: Image.Image | Sequence[Image.Image],
        *,
        strength: float = 0.75,
        negative_prompt: str | Sequence[str] = "",
        steps: int = 20,
        guidance: float = 7.5,
        guidance_rescale: float = 0.0,
        seed: int = 0,
        height: int | None = None,
        width: int | None = None,
        sampler: str = "dpmpp_2m",
        karras: bool = False,
        clip_skip: int | None = None,
        num_images: int = 1,
        latents: Float[Array, "B h w 4"] | None = None,
        progress: bool = True,
    ) -> list[Image.Image]:
        """Redraws an image (or one an image to draw): noised to `strength` of the way, then drawn from there.

        strength: in (0, 1]; steps * strength steps run (Meng et al. 2022, SDEdit). height, width: default the image's,
        down to multiples of 8; the image is resized to them. latents: the noise, unit variance. The rest as in
        `text2image`.
        """
        images = [image] if isinstance(image, Image.Image) else list(image)
        height = height or max(8, images[0].height // 8 * 8)
        width = width or max(8, images[0].width // 8 * 8)
        request = self._request(prompt, negative_prompt, num_images, seed, height, width)
        request = dataclasses.replace(
            request, steps=steps, guidance=guidance, guidance_rescale=guidance_rescale, sampler=sampler, karras=karras,
            clip_skip=clip_skip, strength=strength,
        )  # fmt: skip
        plan = self._plan(request)
        count = len(request.prompts)
        if len(images) not in (1, count):
            raise ConfigError(f"{len(images)} images for {count} pictures: give one, or one each")
        noise = self._noise(request, latents)
        pixels = np.stack([_pixels(picture, width, height) for picture in images])
        start = jnp.broadcast_to(self.encode_image(pixels), request.latent_shape(self))
        return self._draw(request, plan, sampling.initial_from_image(plan, start, noise), progress)

    def _request(self, prompt, negative_prompt, num_images, seed, height, width) -> "Request":
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        if not prompts or num_images < 1:
            raise ConfigError(f"{len(prompts)} prompts times num_images = {num_images}: at least one picture is needed")
        if len(negatives) != len(prompts):
            raise ConfigError(f"{len(negatives)} negative prompts for {len(prompts)} prompts: give one, or one each")
        multiple = max(8, self.vae.config.factor)
        for name, size in (("height", height), ("width", width)):
            if size < multiple or size % multiple:
                raise ConfigError(f"{name} = {size}: must be a positive multiple of {multiple}")
        if self.adapters and len(prompts) * num_images != self._adapted:
            raise ConfigError(f"{self._adapted} LoRAs for {len(prompts) * num_images} pictures: one each is needed")
        repeat = lambda texts: tuple(text for text in texts for _ in range(num_images))
        return Request(repeat(prompts), repeat(negatives), seed, height, width)

    @property
    def _adapted(self) -> int:
        """Pictures of a call for which there are adapters."""
        return len(jax.tree.leaves(self.adapters)[0])

    def _plan(self, request: "Request") -> sampling.Plan:
        if not 0.0 <= request.guidance_rescale <= 1.0:
            raise ConfigError(f"guidance_rescale = {request.guidance_rescale}: must lie in 0..1")
        if not 0.0 <= request.guidance <= 1000.0:
            raise ConfigError(f"guidance = {request.guidance}: must lie in 0..1000")
        self._check_clip_skip(request.clip_skip)
        return sampling.plan(
            self.schedule, request.sampler, request.steps, karras=request.karras, strength=request.strength
        )

    def _noise(self, request: "Request", latents: Float[Array, "B h w 4"] | None) -> Float[Array, "B h w 4"]:
        """The latents given, else the seeds' own."""
        noise = request.noise(self) if latents is None else jnp.asarray(latents, jnp.float32)
        if noise.shape != request.latent_shape(self):
            raise ConfigError(f"latents have shape {noise.shape}; this call needs {request.latent_shape(self)}")
        return noise

    def _draw(self, request: "Request", plan: sampling.Plan, state: sampling.State, progress: bool):
        # Prompts longer than the window give a longer context. Pictures whose contexts are equally long are drawn
        # together, so that none depends on how long its neighbours' prompts are.
        groups: dict[int, list[int]] = {}
        for row, texts in enumerate(zip(request.negatives, request.prompts, strict=True)):
            groups.setdefault(self._windows(texts if self._guided(request) else texts[1:]), []).append(row)
        latents = np.empty(state.latents.shape, np.float32)
        for windows, rows in groups.items():
            own = state
            if len(groups) > 1:
                own = sampling.State(state.latents[np.array(rows)], state.history[:, np.array(rows)])
            latents[rows] = self._denoise(request, rows, windows, plan, own, progress)
        pictures = []
        for i, pixels in enumerate(np.asarray(self.decode_latents(latents))):
            picture = Image.fromarray(np.round(pixels * 255).astype(np.uint8))
            picture.info["parameters"] = parameters_text(dataclasses.asdict(request), i, model=self.name)
            pictures.append(picture)
        return pictures

    def _denoise(
        self,
        request: "Request",
        rows: Sequence[int],
        windows: int,
        plan: sampling.Plan,
        state: sampling.State,
        progress,
    ) -> np.ndarray:
        """Final latents of the given rows of a request."""
        from tqdm.auto import tqdm

        context, added = self._condition(request, rows, windows)
        variables = self.variables("unet", [*rows] * (len(context) // len(rows)))
        keys = request.keys[np.array(rows)]
        guidance, rescale = jnp.float32(request.guidance), jnp.float32(request.guidance_rescale)
        for i in tqdm(range(int(plan.length)), desc=request.sampler, disable=not progress, leave=False):
            state = _sampler_step(
                self.unet, self.schedule.prediction_type, variables, state, np.int32(i), plan,
                keys, context, added, guidance, rescale,
            )  # fmt: skip
        return np.asarray(state.latents)

    def _guided(self, request: "Request") -> bool:
        """Whether an unconditional half is drawn beside; guidance 1 needs none, nor a model that takes it as input."""
        return request.guidance != 1.0 and not self.unet.config.time_cond_proj_dim

    def _condition(
        self, request: "Request", rows: Sequence[int], windows: int
    ) -> tuple[Array, dict[str, Array] | None]:
        """Context and added conditions of the given rows; the unconditional half comes first when guidance is on."""
        prompts, negatives = ([texts[row] for row in rows] for texts in (request.prompts, request.negatives))
        guided = self._guided(request)
        texts = [*negatives, *prompts] if guided else prompts
        pictures = [row for row in [*rows] * (2 if guided else 1) for _ in range(windows)]
        context, pooled = self._encode(texts, request.clip_skip, windows, pictures)
        if guided and self.folder.model_index.get("force_zeros_for_empty_prompt"):
            # SDXL was trained with zeros, not an encoded empty text, where the prompt was dropped.
            empty = jnp.asarray([not text for text in negatives] + [False] * len(prompts))
            context = jnp.where(empty[:, None, None], jnp.zeros((), context.dtype), context)
            pooled = jnp.where(empty[:, None], jnp.zeros((), pooled.dtype), pooled)
        added = self.added_conditions(pooled, request.height, request.width) or {}
        if width := self.unet.config.time_cond_proj_dim:
            scale = jnp.full((len(texts),), (request.guidance - 1) * 1000, jnp.float32)
            added["timestep_cond"] = timestep_embedding(scale, width, flip_sin_to_cos=False, freq_shift=1)
        return context, added or None

    # ------------------------------------------------------------------------------------------------ the parts

    @property
    def is_sdxl(self) -> bool:
        """Whether the U-Net wants SDXL's added conditions."""
        return self.unet.config.addition_embed_type == "text_time"

    def encode_text(self, prompts: str | Sequence[str], clip_skip: int | None = None) -> Float[Array, "B T D"]:
        """Context of each prompt; prompts longer than the window give T = chunks * window."""
        return self.encode_prompts([prompts] if isinstance(prompts, str) else list(prompts), clip_skip=clip_skip)[0]

    def encode_prompts(
        self, prompts: Sequence[str], *, clip_skip: int | None = None, chunks: int | None = None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B P"]]:
        """Context and pooled vector of each prompt. chunks: exactly so many windows; default what the longest takes."""
        return self._encode(prompts, clip_skip, chunks, None)

    def _encode(
        self, prompts: Sequence[str], clip_skip: int | None, chunks: int | None, pictures: Sequence[int] | None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B P"]]:
        """pictures: for each window, the picture of the call it is for; None: no adapters."""
        variables = {name: self.variables(name, pictures) for name in self.text_models}
        ids = self.tokenize(prompts, chunks=chunks)
        return encode_ids(self.text_models, variables, ids, self.hidden_state(clip_skip))

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
        count = chunks or self._windows(prompts)
        return {name: tokenizer.encode(prompts, chunks=count) for name, tokenizer in tokenizers.items()}

    def _windows(self, prompts: Sequence[str]) -> int:
        """Windows the longest of the prompts takes in any text model."""
        return max(tokenizer.chunks(prompt) for tokenizer in self.tokenizers.values() for prompt in prompts)

    def _check_clip_skip(self, clip_skip: int | None) -> None:
        layers = min(model.config.num_hidden_layers for model in self.text_models.values())
        if clip_skip is not None and not 1 <= clip_skip <= layers:
            raise ConfigError(f"clip_skip = {clip_skip}: must lie in 1 (last layer)..{layers}")

    def hidden_state(self, clip_skip: int | None = None) -> "HiddenState":
        """Which state of the text models is the context; ConfigError for a clip_skip they have not."""
        self._check_clip_skip(clip_skip)
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
            images = np.stack([_pixels(image, *image.size) for image in images])
        pixels = jnp.asarray(images, jnp.float32)
        means = [_encode_image(self.vae, self.params["vae"], pixels[i : i + 1]) for i in range(len(pixels))]
        return vae.scale_latents(self.vae.config, jnp.concatenate(means))

    def decode_latents(self, latents: Float[Array | np.ndarray, "B h w 4"]) -> Float[Array, "B H W 3"]:
        """Pictures with values in [0, 1]; one at a time, so that memory does not grow with the batch."""
        unscaled = vae.unscale_latents(self.vae.config, jnp.asarray(latents, jnp.float32))
        return jnp.concatenate(
            [_decode_latents(self.vae, self.params["vae"], unscaled[i : i + 1]) for i in range(len(unscaled))]
        )

    def predict(
        self, latents: Float[Array, "B h w C"], timesteps: Array, context: Float[Array, "B T D"], **added: Array
    ) -> Float[Array, "B h w 4"]:
        """The U-Net's raw output: noise or velocity, as the model was trained. added: `text_embeds`, `time_ids`."""
        timesteps = jnp.broadcast_to(jnp.asarray(timesteps, jnp.float32), (latents.shape[0],))
        return _predict(self.unet, self.params["unet"], latents, timesteps, context, added or None)

    # ------------------------------------------------------------------------------------------------ changing it

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
                params[name] = _with_rows(params[name], rows, first, what=f"{self.name}: {name}")
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


@dataclasses.dataclass(frozen=True)
class Request:
    """One call to draw: a prompt a picture, and the settings they share."""

    prompts: tuple[str, ...]
    negatives: tuple[str, ...]
    seed: int
    height: int
    width: int
    steps: int = 20
    guidance: float = 7.5
    guidance_rescale: float = 0.0
    sampler: str = "dpmpp_2m"
    karras: bool = False
    clip_skip: int | None = None
    strength: float = 1.0

    @property
    def keys(self) -> Array:
        """One key a picture, from its own seed alone."""
        return jnp.stack([jax.random.key(self.seed + i) for i in range(len(self.prompts))])

    def latent_shape(self, sd: StableDiffusion) -> tuple[int, int, int, int]:
        factor = sd.vae.config.factor
        return len(self.prompts), self.height // factor, self.width // factor, sd.vae.config.latent_channels

    def noise(self, sd: StableDiffusion) -> Float[Array, "B h w 4"]:
        """The unit noise each picture starts from."""
        return jax.vmap(lambda key: jax.random.normal(key, self.latent_shape(sd)[1:], jnp.float32))(self.keys)


@dataclasses.dataclass(frozen=True)
class HiddenState:
    """Which state of the text model is the context: counted from the end, with or without the final norm."""

    clip_skip: int
    final_norm: bool


def load(
    source: str | os.PathLike,
    dtype: str = "float32",
    *,
    variant: str | None = None,
    platform: str | None = None,
    tokenizer: str | os.PathLike | None = None,
    prediction_type: str = "",
) -> StableDiffusion:
    """Loads a model: "tiny" (embedded), a diffusers folder, a .safetensors or .ckpt file of a whole model, or a hub id.

    dtype: float32, bfloat16 or float16, of weights and computation (in float16 the VAE stays float32, which it needs).
    variant: of the weight files, such as "fp16". platform: "cpu", "gpu" or "tpu" to trace for another platform than
    JAX's default. tokenizer: for a file, which holds none: the folder of a tokenizer, or of a model that has one;
    default Stable Diffusion's own, from the hub or its cache. prediction_type: "epsilon" or "v_prediction" where the
    model's own setting is wrong; a file of Stable Diffusion 2 does not tell.
    Raises DataError for files that are missing, damaged or of another kind; nothing is half loaded.
    """
    sd = outline(
        source, dtype, variant=variant, platform=platform, tokenizer=tokenizer, prediction_type=prediction_type
    )
    return dataclasses.replace(sd, params={name: load_weights(sd, name) for name in sd.params})


def outline(
    source: str | os.PathLike,
    dtype: str = "float32",
    *,
    variant: str | None = None,
    platform: str | None = None,
    tokenizer: str | os.PathLike | None = None,
    prediction_type: str = "",
) -> StableDiffusion:
    """The model as `load` gives it, but with the shapes of its parameters in place of its weights: no weight is read.

    Its configs and tokenizers are complete, so that settings can be checked against it before anything slow begins.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype = {dtype!r}: choices are {', '.join(DTYPES)}")
    path = Path(__file__).parent / "tiny" if source == "tiny" else Path(source)
    if path.suffix.lower() in SUFFIXES and not path.is_dir():
        folder = read_single_file(path, tokenizer=tokenizer, prediction_type=prediction_type)
    elif tokenizer is not None:
        raise ConfigError(f"tokenizer = {str(tokenizer)!r} is for models of a single file; {source} has its own")
    else:
        folder = read_folder(path if source == "tiny" else source, variant=variant)
    schedule = diffusion.altered(diffusion.NoiseSchedule.from_config(folder.scheduler), prediction_type=prediction_type)
    if prediction_type:
        folder = dataclasses.replace(folder, scheduler=dict(schedule.config))
    configs: dict[str, Any] = {
        "unet": unet.UNetConfig.from_dict(folder.configs["unet"]),
        "vae": vae.VAEConfig.from_dict(folder.configs["vae"]),
    }
    for name in TEXT_ENCODERS:
        if name in folder.configs:
            configs[name] = clip.TextConfig.from_dict(folder.configs[name])
    tokenizers = {
        TEXT_ENCODERS[name]: Tokenizer.from_folder(
            folder.tokenizers[TEXT_ENCODERS[name]], window=config.max_position_embeddings
        )
        for name, config in configs.items()
        if name in TEXT_ENCODERS
    }
    own = {name: jnp.dtype(dtype) for name in configs}
    if dtype == "float16":
        own["vae"] = jnp.dtype("float32")
    abstract = {"unet": unet.abstract_params, "vae": vae.abstract_params}
    compute = {name: Compute(dtype=own[name], platform=platform) for name in configs}
    return StableDiffusion(
        unet=unet.UNet(configs["unet"], compute["unet"]),
        vae=vae.AutoencoderKL(configs["vae"], compute["vae"]),
        text_models={name: clip.TextModel(configs[name], compute[name]) for name in TEXT_ENCODERS if name in configs},
        params={name: abstract.get(name, clip.abstract_params)(config) for name, config in configs.items()},
        tokenizers=tokenizers,
        schedule=schedule,
        folder=folder,
        name=str(source),
    )


def load_weights(sd: StableDiffusion, part: str, *, dtype: Any = None) -> dict[str, Any]:
    """Reads the parameters of one part (`unet`, `vae`, ...) of a model, by default in the dtype it computes in."""
    module = {"unet": sd.unet, "vae": sd.vae, **sd.text_models}[part]
    tensors = sd.folder.tensors(part)
    return load_params(tensors, sd.params[part], dtype=dtype or module.compute.dtype, what=f"{sd.name}: {part}")


def collections(params: Any, *, lora: Any = None, rows: Any = None) -> dict[str, Any]:
    """A model's Flax collections: its weights, an adapter, and the vectors of new words, the latter where given."""
    variables = {"params": params}
    if lora is not None:
        variables["lora"] = lora
    if rows is not None:
        variables["placeholder"] = {"embeddings": {"token_embedding": {"rows": rows}}}
    return variables


def _with_rows(params: Mapping[str, Any], rows: Float[Array, "K D"], first: int, what: str) -> dict[str, Any]:
    """A text model's parameters with new words' rows in its table, from row `first` on (what lay there is unused)."""
    table = params["embeddings"]["token_embedding"]["embedding"]
    if first > len(table):
        raise DataError(f"{what}: a tokenizer of {first} words for a table of {len(table)} rows")
    parts = [table[:first], jnp.asarray(rows, table.dtype), table[first + len(rows) :]]
    table = {"embedding": jnp.concatenate(parts)}
    return {**params, "embeddings": {**params["embeddings"], "token_embedding": table}}


def encode_ids(
    text_models: Mapping[str, clip.TextModel],
    variables: Mapping[str, Any],
    ids: Mapping[str, Int[Array | np.ndarray, "B n T"]],
    hidden: HiddenState,
) -> tuple[Float[Array, "B n*T D"], Float[Array, "B P"]]:
    """Token ids by text model -> context (the models' widths side by side) and the last model's pooled vector.

    Pure, so that training differentiates through it. variables: by text model, as of `collections`.
    Windows are encoded one by one and laid end to end; the pooled vector is the first window's.
    """
    own = {name: variables[name] for name in text_models}
    return _encode_ids(tuple(text_models.items()), hidden, own, dict(ids))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode_ids(models, hidden, variables, ids):
    contexts, pooled = [], None
    for name, model in models:
        batch, windows, length = ids[name].shape
        flat = ids[name].reshape(batch * windows, length)
        context, pooled = model.apply(variables[name], flat, clip_skip=hidden.clip_skip, final_norm=hidden.final_norm)
        contexts.append(context.reshape(batch, windows * length, -1))
        pooled = pooled.reshape(batch, windows, -1)[:, 0]
    return jnp.concatenate(contexts, axis=-1), pooled


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _sampler_step(model, prediction_type, variables, state, i, plan, keys, context, added, guidance, rescale):
    """One evaluation of the denoiser and the sampler's move; the same program for every sampler, seed and setting."""
    denoise = functools.partial(
        guided_denoise, model, prediction_type, variables,
        context=context, added=added, guidance=guidance, rescale=rescale,
    )  # fmt: skip
    return sampling.step(denoise, state, i, plan, keys)


def guided_denoise(
    model: unet.UNet,
    prediction_type: str,
    variables: Mapping[str, Any],
    x: Float[Array, "B h w 4"],
    level: sampling.Level,
    *,
    context: Float[Array, "N T D"],
    added: Mapping[str, Array] | None,
    guidance: Float[Array, ""],
    rescale: Float[Array, ""],
) -> Float[Array, "B h w 4"]:
    """The U-Net as the samplers' `denoise`. N = 2B (unconditional half first) is guided, N = B is not.

    `out = uncond + guidance (cond - uncond)` (Ho and Salimans 2022, eq. 6), then Lin et al.'s rescale; variables: as of
    `collections`.
    """
    copies = context.shape[0] // x.shape[0]
    timesteps = jnp.full((context.shape[0],), level.timestep, jnp.float32)
    out = model.apply(variables, jnp.tile(x, (copies, 1, 1, 1)), timesteps, context, added)
    out = jnp.asarray(out, jnp.float32)
    if copies == 2:
        uncond, cond = jnp.split(out, 2)
        guided = uncond + guidance * (cond - uncond)
        out = diffusion.rescale_guidance(cond, guided, rescale)
    return diffusion.to_denoised(out, x, level.alpha, level.sigma, prediction_type)


@functools.partial(jax.jit, static_argnums=0)
def _predict(model, params, latents, timesteps, context, added):
    return model.apply({"params": params}, latents, timesteps, context, added)


@functools.partial(jax.jit, static_argnums=0)
def _encode_image(model, params, pixels):
    return vae.posterior_mean(model.apply({"params": params}, 2 * pixels - 1, method="encode"))


@functools.partial(jax.jit, static_argnums=0)
def _decode_latents(model, params, latents):
    return jnp.clip(model.apply({"params": params}, latents, method="decode") / 2 + 0.5, 0.0, 1.0)


def _pixels(image: Image.Image, width: int, height: int) -> Float[np.ndarray, "H W 3"]:
    """An image as values in [0, 1], resized where needed; transparency becomes white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(image, np.float32) / 255
