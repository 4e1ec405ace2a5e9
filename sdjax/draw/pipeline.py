"""`StableDiffusion`: a loaded model and its methods to draw, to change it and to save it."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from sdjax.draw import loop
from sdjax.draw.request import img2img_request, inpaint_request, text2image_request
from sdjax.draw.settings import InpaintSettings, Settings, TextToImageSettings
from sdjax.model import Model
from sdjax.outline import Options


def load(source: str | os.PathLike, dtype: str = "float32", **how: Unpack[Options]) -> "StableDiffusion":
    """Loads a model: "tiny" (embedded), a diffusers folder, a .safetensors or .ckpt file of a whole model, or a hub id.

    See `outline.Outline.load` for the arguments and errors.
    """
    return StableDiffusion(Model.load(source, dtype, **how))


@dataclasses.dataclass(frozen=True, eq=False)
class StableDiffusion:
    """A model ready to draw. It never changes: methods such as `with_lora` return a new one that shares the weights.

    model: the `Model` with its parameter trees; its modules, tokenizers and schedule are in `model.outline`.
    """

    model: Model

    @property
    def params(self) -> dict[str, Any]:
        """Part -> parameter tree: `unet`, `vae`, `text_encoder` and, for SDXL, `text_encoder_2`."""
        return self.model.params

    # ------------------------------------------------------------------------------------------------ drawing

    def text2image(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        **settings: Unpack[TextToImageSettings],
    ) -> list[Image.Image]:
        """Draws `num_images` pictures of each prompt.

        settings: see `draw.settings`. By default 20 steps of dpmpp_2m, at the model's guidance (7.5 for most), at
        the size that it was trained at or that of `latents`. With hires_scale above 1 the picture is drawn small,
        enlarged and drawn again.
        Each picture carries its settings in `info["parameters"]`.
        Raises ConfigError for a setting out of range, before anything is computed.
        """
        return loop.text2image(self.model, text2image_request(self.model.outline, prompt, negative_prompt, settings))

    def img2img(
        self,
        prompt: str | Sequence[str],
        image: Image.Image | Sequence[Image.Image],
        *,
        strength: float = 0.75,
        negative_prompt: str | Sequence[str] = "",
        **settings: Unpack[Settings],
    ) -> list[Image.Image]:
        """Redraws an image, or one image for each picture (Meng et al. 2022, SDEdit).

        strength: in (0, 1]. The image is noised to this share of the schedule, and the last steps * strength steps run.
        settings: see `text2image`. By default height and width are those of the image, rounded down to multiples of 8.
        With another height or width the image is resized.
        """
        request = img2img_request(self.model.outline, prompt, negative_prompt, image, settings, strength=strength)
        return loop.img2img(self.model, *request)

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
        """Paints an image anew where its mask is white, with a model of 4 or of 9 input channels.

        mask: of any size, stretched over the image. Grey of value v is painted in the last share v of the steps.
        Without a mask the transparent part of the image is painted.
        strength: see `img2img`; 1 starts from noise alone.
        settings: see `text2image` and `draw.settings.Masking`. A picture has the size of its image, and the pixels of
        its image where the mask is 0. With height and width the image is resized first or, with only_masked, the
        masked region is drawn at that size. Several images must have one size unless only_masked is set.
        Raises ConfigError for a mask that leaves nothing to paint.
        """
        request = inpaint_request(self.model.outline, prompt, negative_prompt, image, mask, settings, strength=strength)
        return loop.inpaint(self.model, *request)

    # ------------------------------------------------------------------------------------------------ computing

    def encode_text(self, prompts: str | Sequence[str], clip_skip: int | None = None) -> Float[Array, "B T D"]:
        """The context of each prompt. A prompt longer than the window of the text model gives T = chunks * window."""
        return self.model.encode_text(prompts, clip_skip)

    def encode_image(
        self, images: Sequence[Image.Image] | Float[Array | np.ndarray, "B H W 3"]
    ) -> Float[Array, "B h w 4"]:
        """The scaled mean of the posterior. images: pictures of one size, or values in [0, 1]."""
        return self.model.encode_image(images)

    def decode_latents(self, latents: Float[Array | np.ndarray, "B h w 4"]) -> Float[Array, "B H W 3"]:
        """Pictures with values in [0, 1]."""
        return self.model.decode_latents(latents)

    def predict(
        self, latents: Float[Array, "B h w C"], timesteps: Array, context: Float[Array, "B T D"], **added: Array
    ) -> Float[Array, "B h w 4"]:
        """The raw output of the U-Net: noise or velocity, as the model was trained.

        added: SDXL's conditions `text_embeds` and `time_ids`.
        """
        return self.model.predict(latents, timesteps, context, **added)

    # ------------------------------------------------------------------------------------------------ changing

    def on_devices(self, count: int | None = None) -> "StableDiffusion":
        """Returns the model with a copy of its weights on several devices, which share the pictures of a call.

        See `Model.on_devices`.
        """
        return StableDiffusion(self.model.on_devices(count))

    def with_refiner(self, source: str | os.PathLike, switch: float = 0.8, **how: Unpack[Options]) -> "StableDiffusion":
        """Returns the model with a second model for the last steps of each picture; see `Model.with_refiner`."""
        return StableDiffusion(self.model.with_refiner(source, switch, **how))

    def with_tiled_vae(self, tile: int = 512, overlap: int = 64) -> "StableDiffusion":
        """Returns the model with an autoencoder that works in overlapping tiles; see `Model.with_tiled_vae`."""
        return StableDiffusion(self.model.with_tiled_vae(tile, overlap))

    def with_lora(self, path: str | os.PathLike | Mapping[str, Any], weight: float = 1.0) -> "StableDiffusion":
        """Returns the model with a LoRA merged into its weights; see `Model.with_lora`."""
        return StableDiffusion(self.model.with_lora(path, weight))

    def with_loras(
        self, paths: Sequence[str | os.PathLike | Mapping[str, Any] | None], weights: Sequence[float] | None = None
    ) -> "StableDiffusion":
        """Returns the model that draws `len(paths)` pictures a call, picture i with LoRA i; see `Model.with_loras`."""
        return StableDiffusion(self.model.with_loras(paths, weights))

    def with_embedding(
        self, path: str | os.PathLike | Mapping[str, Mapping[str, np.ndarray]], token: str | None = None
    ) -> "StableDiffusion":
        """Returns the model with the words of a Textual Inversion; see `Model.with_embedding`."""
        return StableDiffusion(self.model.with_embedding(path, token))

    def save(self, folder: str | os.PathLike, *, dtype: str | None = None) -> None:
        """Writes the model as a diffusers folder, or as a single file if the path ends in .safetensors.

        See `Model.save`.
        """
        self.model.save(folder, dtype=dtype)
