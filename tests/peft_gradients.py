"""A random LoRA of peft on a diffusers U-Net, and the gradients of a loss: PyTorch's, and ours from the files of both.

PyTorch's part and ours need only share a folder, so each can have a process of its own.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import oracle
from adapters import gradients

from sdjax import lora
from sdjax.formats.lora_file import load_lora
from sdjax.trees import leaves


class Expected(NamedTuple):
    """PyTorch's loss, output, and gradient by the context. The gradients by the LoRA are in its folder."""

    loss: np.ndarray
    out: np.ndarray
    by_context: np.ndarray


def by_torch(model, folder: Path, inputs, wanted, **options) -> Expected:
    """Adds a random LoRA to the U-Net. Saves it in `folder / "lora"`, and its gradients in `folder / "gradients"`.

    The loss is mean((out - wanted)^2). options: of peft's LoraConfig.
    """
    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    options = {"r": 4, "lora_alpha": 4} | options
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(init_lora_weights=False, **options))
    model.eval()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def save(name):
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
        StableDiffusionPipeline.save_lora_weights(
            folder / name, unet_lora_layers=layers, unet_lora_adapter_metadata=options
        )

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1.3).add_(0.1)
    save("lora")

    latents, timesteps, context, added = inputs
    context = oracle.tensor(context).requires_grad_()
    out = model(
        oracle.channels_first(latents),
        oracle.tensor(timesteps),
        context,
        added_cond_kwargs={name: oracle.tensor(value) for name, value in (added or {}).items()},
    ).sample
    loss = torch.mean((out - oracle.channels_first(wanted)) ** 2)
    loss.backward()
    with torch.no_grad():
        for parameter in trained:
            parameter.copy_(parameter.grad)
    save("gradients")
    return Expected(loss.detach().numpy(), oracle.channels_last(out), context.grad.numpy())


def errors(read: oracle.Read, folder: Path, inputs, wanted, expected: Expected) -> dict[str, float]:
    """Returns the error of each part of `Expected`, and the worst of the gradients by an array of the LoRA."""
    adapter, theirs = (load_lora(folder / name, {"unet": read.params})["unet"] for name in ("lora", "gradients"))
    loss, out, by_adapter, by_context = gradients(read, adapter, inputs, wanted)
    found = {name: oracle.error(*pair) for name, pair in zip(
        Expected._fields, zip((loss, out, by_context), expected, strict=True), strict=True
    )}  # fmt: skip
    ours, theirs = dict(leaves(by_adapter)), dict(leaves(lora.split(theirs)[0]))
    assert ours.keys() == theirs.keys() and len(ours) >= 10
    largest = max(float(np.linalg.norm(leaf)) for leaf in theirs.values())
    # Relative to the gradient of this array, unless it is so small that it is rounding of the other gradients.
    found["by_adapter"] = max(
        float(np.linalg.norm(ours[path] - leaf)) / max(float(np.linalg.norm(leaf)), 1e-4 * largest)
        for path, leaf in theirs.items()
    )
    return found
