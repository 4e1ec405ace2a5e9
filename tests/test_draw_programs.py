"""The programs of drawing as they are planned. `test_draw_devices` and `test_tpu` compile them for their devices."""

import dataclasses

from sdjax.data.images import Size
from sdjax.draw.programs import drawing
from sdjax.models import unet
from sdjax.outline import Outline


def test_a_model_that_takes_guidance_as_an_input_has_no_negative_prompts(micro_models):
    outline = Outline.load(micro_models(), weights=False)
    config = dataclasses.replace(outline.unet.config, time_cond_proj_dim=6)
    shapes = {**outline.shapes, "unet": unet.abstract_params(config)}
    distilled = dataclasses.replace(outline, unet=unet.UNet(config, outline.unet.compute), shapes=shapes)
    inputs = {}
    for name, each in (("plain", outline), ("distilled", distilled)):
        lowered = drawing(each, Size(16, 16), count=3, steps=2)[1].lower(lambda *arrays: arrays)
        inputs[name] = lowered.as_text()
    width = outline.unet.config.cross_attention_dim[0]
    assert f"tensor<6x16x{width}xf32>" in inputs["plain"] and "tensor<3x6xf32>" not in inputs["plain"]
    assert f"tensor<3x16x{width}xf32>" in inputs["distilled"] and "tensor<3x6xf32>" in inputs["distilled"]
