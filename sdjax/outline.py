"""What a model is without its weights: its Flax modules and parameter shapes, its tokenizers, its noise schedule.

Settings and prompts are checked against an outline before any weight is read. An outline never changes: methods such as
`with_embedding` return a new one.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sdjax import diffusion, lora, quantization
from sdjax.errors import ConfigError, DataError, SdjaxError
from sdjax.formats.diffusers_folder import ModelFolder, read_folder
from sdjax.formats.embedding_file import load_embedding
from sdjax.formats.parameter_names import load_params, view_params
from sdjax.formats.single_file import read_single_file
from sdjax.formats.vae_file import with_vae
from sdjax.formats.weights_file import SUFFIXES
from sdjax.models import clip, unet
from sdjax.models.layers import Compute, variables
from sdjax.models.vae import AutoencoderKL, VAEConfig
from sdjax.models.vae import abstract_params as vae_shapes
from sdjax.runtime.chips import check_dtype
from sdjax.runtime.devices import in_host_memory
from sdjax.settings import BaseDtype, Dtype, Guidance, Range, read_value
from sdjax.text import textual_inversion
from sdjax.text.encoding import TEXT_ENCODERS, HiddenState, encode_ids
from sdjax.text.syntax import Sections
from sdjax.text.tokenizer import Tokenizer

Switch = Annotated[float, Range(0, 1, above=True)]

_EMBEDDED = Path(__file__).parent / "tiny"


class Options(TypedDict, total=False):
    """Options of how a model is found and computed.

    variant: the variant of the weight files, such as "fp16".
    vae: another autoencoder in place of the model's: a folder, a file or a hub id; see `formats.vae_file.with_vae`.
    platform: "cpu", "gpu" or "tpu", to trace for another platform than JAX's default.
    tokenizer: the folder of a tokenizer, or of a model that has one, for a model in a single file, which holds none.
    By default the tokenizer of Stable Diffusion, from the hub or its cache.
    prediction_type: "epsilon" or "v_prediction", if the model's setting is wrong. A single file of Stable Diffusion 2
    does not say which of them it is.
    base_dtype: "int8" to keep the weights of the U-Net in eight bits, see `sdjax.quantization`.
    """

    variant: str | None
    vae: str | os.PathLike | None
    platform: str | None
    tokenizer: str | os.PathLike | None
    prediction_type: str
    base_dtype: str


class Refiner(NamedTuple):
    """A second model that takes over for the last steps of each picture."""

    outline: "Outline"
    switch: float
    """The share of the noise schedule that the first model draws, in (0, 1)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Outline:
    """A model without its weights: modules, parameter shapes, tokenizers, noise schedule.

    shapes: part -> tree of `jax.ShapeDtypeStruct`. The parts are `unet`, `vae`, `text_encoder` and, for SDXL,
    `text_encoder_2`. folder: the configs and files of the model. name: the source it was loaded from. refiner: see
    `with_refiner`. loras: LoRA trees with their weights, which are merged in this order into the weights of a part when
    they are loaded. base_dtype: see `Options`.
    """

    unet: unet.UNet
    vae: AutoencoderKL
    text_models: dict[str, clip.TextModel]
    shapes: dict[str, Any]
    tokenizers: dict[str, Tokenizer]
    schedule: diffusion.NoiseSchedule
    folder: ModelFolder
    name: str
    refiner: Refiner | None = None
    loras: tuple[tuple[Mapping[str, Any], float], ...] = ()
    base_dtype: str = ""

    @classmethod
    def load(
        cls,
        source: str | os.PathLike,
        dtype: str = "float32",
        *,
        variant: str | None = None,
        vae: str | os.PathLike | None = None,
        platform: str | None = None,
        tokenizer: str | os.PathLike | None = None,
        prediction_type: str = "",
        base_dtype: str = "",
        weights: bool = True,
    ) -> "Outline":
        """Loads a model without its weights, none of which is read.

        source: "tiny" (embedded), a diffusers folder, a .safetensors or .ckpt file of a whole model, or a hub id.
        dtype: the number type of the weights and the computation: float32, bfloat16 or float16. With float16 the VAE
        stays in float32, whose range it needs, and so does SDXL's with bfloat16, unless its config says that it can do
        without (`force_upcast` false). weights: whether the files of the weights must be there; if not, a model of the
        hub is known from a few small files. The other arguments are described in `Options`.
        Raises ConfigError for a wrong argument or a number type that the GPU lacks, DataError for files that are
        missing, damaged or of another kind.
        """
        read_value(Dtype, str(dtype), "dtype")
        read_value(BaseDtype, base_dtype, "base_dtype")
        check_dtype(str(dtype), platform)
        folder = _find(source, variant, tokenizer, prediction_type, weights)
        if vae is not None:
            folder = with_vae(folder, vae, variant=variant, weights=weights)
        with _building(source):
            schedule = diffusion.NoiseSchedule.from_config(folder.scheduler)
        if prediction_type:
            schedule = diffusion.altered(schedule, prediction_type=prediction_type)
            folder = dataclasses.replace(folder, scheduler=dict(schedule.config))
        computed_in = lambda part: jnp.dtype("float32" if part == "vae" and _upcasts(folder, dtype) else dtype)
        compute = {part: Compute(dtype=computed_in(part), platform=platform) for part in folder.configs}
        with _building(source):
            _check_sizes(folder.configs)
            unet_config = unet.UNetConfig.from_dict(folder.configs["unet"])
            vae_config = VAEConfig.from_dict(folder.configs["vae"])
            texts = {
                name: clip.TextConfig.from_dict(folder.configs[name])
                for name in TEXT_ENCODERS
                if name in folder.configs
            }
            shapes = {
                "unet": unet.abstract_params(unet_config),
                "vae": vae_shapes(vae_config),
                **{name: clip.abstract_params(config) for name, config in texts.items()},
            }
        return cls(
            unet=unet.UNet(unet_config, compute["unet"]),
            vae=AutoencoderKL(vae_config, compute["vae"]),
            text_models={name: clip.TextModel(config, compute[name]) for name, config in texts.items()},
            shapes=shapes,
            tokenizers={
                place: Tokenizer.from_folder(folder.tokenizers[place], window=texts[name].max_position_embeddings)
                for name, place in TEXT_ENCODERS.items()
                if name in texts
            },
            schedule=schedule,
            folder=folder,
            name=str(source),
            base_dtype=base_dtype,
        )

    def load_weights(self, part: str, *, dtype: Any = None) -> dict[str, Any]:
        """Loads the parameters of one part, such as `unet`.

        dtype: by default the number type of the computation, and int8 for what `base_dtype` names.
        """
        reduced = dtype is None and self._is_reduced(part)
        with in_host_memory() if reduced else contextlib.nullcontext():
            params = load_params(
                self.folder.tensors(part),
                self.shapes[part],
                dtype=dtype or self.dtype(part),
                what=f"{self.name}: {part}",
            )
            for adapters, weight in self.loras:
                params = lora.merge(params, adapters[part], weight) if part in adapters else params
        return self.stored(part, params) if reduced else params

    def stored(self, part: str, params: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters of one part as weights that are not trained are kept: in int8 if `base_dtype` says so.

        They are rounded in the memory of the host. So the device never holds them in a wider type.
        """
        if not self._is_reduced(part):
            return dict(params)
        with in_host_memory():
            kept = quantization.quantized(jax.device_get(params))
        return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), kept)

    def _is_reduced(self, part: str) -> bool:
        return self.base_dtype == "int8" and part == "unet"

    def view_weights(self, part: str) -> dict[str, Any]:
        """The parameters of one part, in their dtypes, which are read from the disk when they are written.

        `Model.save` writes them one at a time, so a model that is only converted takes no memory of its size.
        """
        return view_params(self.folder.tensors(part), self.shapes[part], what=f"{self.name}: {part}")

    @property
    def is_sdxl(self) -> bool:
        """Whether the U-Net takes SDXL's added conditions."""
        return self.unet.config.addition_embed_type == "text_time"

    @property
    def takes_score(self) -> bool:
        """Whether an aesthetic score stands in place of the target size among SDXL's conditions, as in its refiner."""
        return bool(self.folder.model_index.get("requires_aesthetics_score"))

    @property
    def is_inpainting(self) -> bool:
        """Whether the U-Net takes a mask and masked latents beside the latents.

        Raises ConfigError for a U-Net of any other number of input channels.
        """
        channels, latent = self.unet.config.in_channels, self.vae.config.latent_channels
        if channels not in (latent, 2 * latent + 1):
            expected = f"{latent} or, for inpainting, {2 * latent + 1}"
            raise ConfigError(f"{self.name}: the U-Net has {channels} input channels; expected {expected}")
        return channels != latent

    @property
    def zeros_empty_prompts(self) -> bool:
        """Whether the encoding of an empty negative prompt is replaced by zeros, as in the training of SDXL."""
        return bool(self.folder.model_index.get("force_zeros_for_empty_prompt"))

    @property
    def guidance(self) -> float:
        """The guidance scale that pictures are drawn with by default: the model's own, or 7.5.

        A model names its own in `model_index.json`, where diffusers ignores it.
        """
        named = self.folder.model_index.get("_guidance_scale", 7.5)
        return read_value(Guidance, named, f"{self.name}: _guidance_scale")

    @property
    def native_size(self) -> int:
        """The side of the pictures that the model was trained on, in pixels."""
        return self.unet.config.sample_size * self.vae.config.factor

    @property
    def size_multiple(self) -> int:
        """The number of pixels that both sides of a picture must be a multiple of."""
        return max(8, self.vae.config.factor)

    @property
    def text_widths(self) -> dict[str, int]:
        """Text model -> width D of its token embeddings."""
        return {name: model.config.hidden_size for name, model in self.text_models.items()}

    def module(self, part: str) -> Any:
        """The Flax module of a part."""
        return {"unet": self.unet, "vae": self.vae, **self.text_models}[part]

    def dtype(self, part: str) -> jnp.dtype:
        """The number type that a part is computed in, and its weights are loaded in."""
        return self.module(part).compute.dtype

    def tokenize(self, prompts: Sequence[str], *, chunks: int | None = None) -> dict[str, Int[np.ndarray, "B n T"]]:
        """Token ids of each prompt for each text model, in the same number of chunks for all."""
        count = chunks or self.chunks(prompts)
        return {name: self.tokenizers[TEXT_ENCODERS[name]].encode(prompts, chunks=count) for name in self.text_models}

    def chunks(self, prompts: Sequence[str | Sections]) -> int:
        """The number of chunks of the longest prompt, in the text model that needs most."""
        return max(tokenizer.chunks(prompt) for tokenizer in self.tokenizers.values() for prompt in prompts)

    def hidden_state(self, clip_skip: int | None = None) -> HiddenState:
        """The hidden state of the text models that is the context. Raises ConfigError for a clip_skip out of range."""
        layers = min(model.config.num_hidden_layers for model in self.text_models.values())
        if clip_skip is not None and not 1 <= clip_skip <= layers:
            raise ConfigError(f"clip_skip = {clip_skip}: must lie in 1 (last layer)..{layers}")
        return HiddenState(clip_skip or (2 if self.is_sdxl else 1), final_norm=not self.is_sdxl)

    def abstract_context(self, count: int, chunks: int, clip_skip: int | None = None) -> tuple[Any, Any]:
        """The shapes of what `Model.encode_prompts` returns for `count` prompts."""
        encode = functools.partial(encode_ids, self.text_models, hidden=self.hidden_state(clip_skip))
        params = {name: variables(self.abstract_params(name)) for name in self.text_models}
        return jax.eval_shape(lambda params, ids: encode(params, ids), params, self.abstract_ids(count, chunks))

    def abstract_ids(self, count: int, chunks: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of what `tokenize` returns for `count` prompts."""
        windows = {name: model.config.max_position_embeddings for name, model in self.text_models.items()}
        return {name: jax.ShapeDtypeStruct((count, chunks, window), jnp.int32) for name, window in windows.items()}

    def abstract_params(self, part: str) -> Any:
        """The shapes of the parameters of a part in the number types that they are loaded in."""
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, self.dtype(part)), self.shapes[part])
        return jax.eval_shape(quantization.quantized, shapes) if self._is_reduced(part) else shapes

    def added_conditions(
        self,
        pooled: Float[Array, "B P"],
        sizes: Float[Array | np.ndarray, "B 6"],
        negative: Bool[np.ndarray, " B"] | None = None,
    ) -> dict[str, Array] | None:
        """SDXL's added conditions; None for other models.

        sizes: see `data.images.size_conditions`. negative: which texts are negative prompts; the refiner takes them
        for pictures of a low aesthetic score.
        """
        if not self.is_sdxl:
            return None
        if self.takes_score:
            score = np.where(np.zeros(len(pooled), bool) if negative is None else negative, 2.5, 6.0)  # as in diffusers
            sizes = jnp.concatenate([sizes[:, :4], score[:, None]], axis=1)
        return {"text_embeds": pooled, "time_ids": jnp.asarray(sizes, jnp.float32)}

    def with_refiner(self, refiner: "Outline", switch: float = 0.8) -> "Outline":
        """Returns the outline with a second model for the last steps of each picture; see `Model.with_refiner`."""
        read_value(Switch, switch, "refiner switch")
        family = lambda outline: ("SDXL" if outline.is_sdxl else "SD") + " for inpainting" * outline.is_inpainting
        if family(self) != family(refiner):
            raise ConfigError(f"{refiner.name} ({family(refiner)}) cannot refine {self.name} ({family(self)})")
        ours, theirs = (
            (config.latent_channels, config.factor, config.scaling_factor)
            for config in (self.vae.config, refiner.vae.config)
        )
        if ours != theirs:
            names = "latent channels, pixels a latent, scaling_factor"
            raise ConfigError(f"{refiner.name} cannot refine {self.name}: its {names} are {theirs}, not {ours}")
        return dataclasses.replace(self, refiner=Refiner(refiner, switch))

    def with_words(self, words: Mapping[str, int]) -> "Outline":
        """Returns the outline with new words in its tokenizers. words: word -> number of vectors.

        Raises ConfigError for a word that the tokenizers know already.
        """
        tokenizers = dict(self.tokenizers)
        for name, model in self.text_models.items():
            tokenizer = tokenizers[TEXT_ENCODERS[name]]
            tokenizers[TEXT_ENCODERS[name]] = tokenizer.with_placeholders(words, first=model.config.vocab_size)
        return dataclasses.replace(self, tokenizers=tokenizers)

    def with_embedding(self, words: Mapping[str, Mapping[str, np.ndarray]]) -> "Outline":
        """Returns the outline with the words that `load_words` returned in its tokenizers."""
        return self.with_words(textual_inversion.vector_counts(words))

    def load_words(
        self, source: str | os.PathLike | Mapping[str, Mapping[str, np.ndarray]], token: str | None = None
    ) -> dict[str, dict[str, np.ndarray]]:
        """Reads the words of a Textual Inversion that fit this model: word -> text model -> vectors [n, D].

        See `Model.with_embedding` for the arguments and errors.
        """
        widths = self.text_widths
        words = dict(source) if isinstance(source, Mapping) else load_embedding(source, widths)
        if token is not None:
            if len(words) != 1:
                where = "the mapping" if isinstance(source, Mapping) else source
                raise ConfigError(f"token = {token!r} names one word; {where} holds {', '.join(words)}")
            words = dict(zip([token], words.values(), strict=True))
        for word, rows in words.items():
            shapes = {name: np.shape(vectors) for name, vectors in rows.items()}
            if shapes.keys() != widths.keys() or any(len(shape) != 2 for shape in shapes.values()):
                raise DataError(
                    f"the word {word!r} has vectors for {', '.join(rows)}; {self.name} has {', '.join(widths)}"
                )
            if any(shape[1] != widths[name] for name, shape in shapes.items()):
                raise DataError(f"the word {word!r} has vectors {shapes}; the widths of {self.name} are {widths}")
        return {word: dict(rows) for word, rows in words.items()}


def _find(
    source: str | os.PathLike,
    variant: str | None,
    tokenizer: str | os.PathLike | None,
    prediction_type: str,
    weights: bool,
) -> ModelFolder:
    path = _EMBEDDED if source == "tiny" else Path(source)
    if path.suffix.lower() in SUFFIXES and not path.is_dir():
        return read_single_file(path, tokenizer=tokenizer, prediction_type=prediction_type)
    if tokenizer is not None:
        raise ConfigError(f"tokenizer = {str(tokenizer)!r} is for models of a single file; {source} has its own")
    return read_folder(path if source == "tiny" else source, variant=variant, weights=weights)


@contextlib.contextmanager
def _building(source: str | os.PathLike) -> Iterator[None]:
    """Raises DataError for configs of a model's files that no module can be made from."""
    try:
        yield
    except (SdjaxError, MemoryError):
        raise
    except Exception as error:  # the modules take their configs on trust
        reason = next(iter(str(error).splitlines()), "")[:100]
        raise DataError(f"{source}: its configs make no model ({type(error).__name__}: {reason})") from error


def _upcasts(folder: ModelFolder, dtype: str) -> bool:
    """Whether the VAE is computed in float32 in place of `dtype`. SDXL's overflows float16 and is noisy in bfloat16."""
    sdxl = folder.configs["unet"].get("addition_embed_type") == "text_time"
    return (dtype == "float16" or sdxl) and folder.configs["vae"].get("force_upcast") is not False


def _check_sizes(configs: Mapping[str, Any]) -> None:
    """Raises DataError for numbers in configs that would take endless time or memory to follow."""

    for part, config in configs.items():
        for key, value in config.items():
            least, most = (0, 1000) if "layers" in key else (-10_000_000, 10_000_000)
            values = value if isinstance(value, list) else [value]
            if len(values) > 1000 or any(type(number) is int and not least <= number <= most for number in values):
                raise DataError(f"{part}: {key} = {str(value)[:40]} in its config.json is out of range")
