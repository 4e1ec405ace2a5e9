"""The settings of a picture from its PNG text."""

import json

import pytest
from PIL import Image

from sdjax.draw.reuse import settings_of
from sdjax.draw.settings import complete_job, labelled
from sdjax.errors import DataError
from sdjax.formats.png_parameters import parameters_text, parsed_parameters, save_png

A1111 = """a cat, (red:1.2) <lora:x:1>
second line: yes
Negative prompt: ugly, bad
more
Steps: 25, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 12, Size: 512x768, Model hash: abc, \
Denoising strength: 0.4, Hires upscale: 2, Hires upscaler: Latent, ENSD: 31337, \
Lora hashes: "x: 12, y: 2", Version: v1.6"""


def picture(text: str) -> Image.Image:
    image = Image.new("RGB", (8, 8))
    image.info["parameters"] = text
    return image


def test_the_text_of_a1111_is_read():
    settings, left_out = settings_of(picture(A1111))
    assert settings == {
        **{"prompt": "a cat, (red:1.2) <lora:x:1>\nsecond line: yes", "negative_prompt": "ugly, bad\nmore"},
        **{"steps": 25, "sampler": "dpmpp_2m", "spacing": "karras", "guidance": 7.5, "seed": 12},
        **{"width": 512, "height": 768, "hires_scale": 2.0, "hires_strength": 0.4, "hires_upscaler": "latent"},
    }
    assert left_out == ["ENSD", "Lora hashes"]
    complete_job(settings)


def test_own_text_gives_the_settings_back(tmp_path):
    names = ["steps", "sampler", "spacing", "guidance", "clip_skip", "freeu", "fill", "only_masked", "mask_blur"]
    given = complete_job(
        {
            **{"steps": 7, "sampler": "euler_a", "spacing": None, "guidance": 3.5, "clip_skip": 2, "mask_blur": 5},
            **{"freeu": (1.1, 1.2, 0.9, 0.2), "fill": "noise", "only_masked": True},
        }
    )
    text = parameters_text("a, b: c", "no", {**labelled(given, names), "Denoising strength": 0.3, "Size": "64x32"})
    save_png(picture(text), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        settings, left_out = settings_of(image)
    assert left_out == [] and settings["prompt"] == "a, b: c" and settings["negative_prompt"] == "no"
    assert {name: settings[name] for name in names} == {name: given[name] for name in names}
    assert (settings["strength"], settings["width"], settings["height"]) == (0.3, 64, 32)


def test_values_that_sdjax_does_not_have_are_left_out():
    settings, left_out = settings_of(picture("x\nSteps: 0, Sampler: Magic, Size: large, CFG scale: 2"))
    assert settings == {"prompt": "x", "negative_prompt": "", "guidance": 2.0}
    assert left_out == ["Steps", "Sampler", "Size"]


@pytest.mark.parametrize("text", ["", "  ", None])
def test_a_picture_without_a_text_is_refused(text):
    with pytest.raises(DataError, match="holds no settings"):
        settings_of(picture(text))


def test_a_text_without_fields_is_a_prompt():
    assert parsed_parameters("a cat\nNegative prompt: dog") == ("a cat", "dog", {})


# ------------------------------------------------------------------------------------------------ ComfyUI


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def graph():
    """The default graph of ComfyUI with two LoRAs, and the numbers of its page."""
    sampler = {"seed": 42, "steps": 25, "cfg": 8, "sampler_name": "euler_ancestral", "denoise": 1}
    links = {"model": ["11", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}
    return {
        "3": node("KSampler", **sampler, scheduler="normal", **links),
        "4": node("CheckpointLoaderSimple", ckpt_name="v1-5-pruned-emaonly.ckpt"),
        "5": node("EmptyLatentImage", width=512, height=768, batch_size=1),
        "6": node("CLIPTextEncode", text="a glass bottle, (red:1.2)", clip=["12", 0]),
        "7": node("CLIPTextEncode", text="text, watermark", clip=["12", 0]),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": node("SaveImage", filename_prefix="ComfyUI", images=["8", 0]),
        "10": node(
            "LoraLoader", **{"lora_name": "a\\flat.safetensors", "strength_model": 0.8, "strength_clip": 0.8},
            model=["4", 0], clip=["4", 1],
        ),
        "11": node(
            "LoraLoader", **{"lora_name": "moon.safetensors", "strength_model": 1, "strength_clip": 0.5},
            model=["10", 0], clip=["10", 1],
        ),
        "12": node("CLIPSetLastLayer", stop_at_clip_layer=-2, clip=["11", 1]),
    }  # fmt: skip


SETTINGS = {
    **{"prompt": "a glass bottle, (red:1.2) <lora:flat:0.8> <lora:moon:0.5:1>", "negative_prompt": "text, watermark"},
    **{"steps": 25, "guidance": 8, "seed": 42, "sampler": "euler_a", "spacing": "linspace"},
    **{"strength": 1, "width": 512, "height": 768, "clip_skip": 2},
}


def comfyui(**texts) -> Image.Image:
    image = Image.new("RGB", (8, 8))
    image.info |= {name: text if isinstance(text, str) else json.dumps(text) for name, text in texts.items()}
    return image


def test_the_graph_of_comfyui_is_followed():
    settings, left_out = settings_of(comfyui(prompt=graph()))
    assert settings == SETTINGS and left_out == []
    complete_job(settings)


def test_the_workflow_of_comfyui_gives_the_same():
    nodes, links = [], []
    order = {
        **{"KSampler": ["seed", None, "steps", "cfg", "sampler_name", "scheduler", "denoise"]},
        **{"LoraLoader": ["lora_name", "strength_model", "strength_clip"]},
    }
    for number, each in graph().items():
        given = each["inputs"]
        linked = {name: value for name, value in given.items() if isinstance(value, list)}
        widgets = order.get(each["class_type"], [name for name in given if name not in linked])
        inputs = []
        for name, (source, output) in linked.items():
            links.append([len(links) + 1, int(source), output, int(number), len(inputs), "*"])
            inputs.append({"name": name, "type": "*", "link": len(links)})
        values = [given[name] if name else "randomize" for name in widgets]
        nodes.append({"id": int(number), "type": each["class_type"], "inputs": inputs, "widgets_values": values})
    settings, left_out = settings_of(comfyui(workflow={"nodes": nodes, "links": links, "version": 0.4}))
    assert settings == SETTINGS and left_out == []


def test_the_first_of_two_samplers_and_linked_values_are_read():
    changed = graph()
    changed["20"] = node("LatentUpscale", samples=["3", 0], width=1024, height=1536)
    changed["21"] = node("KSampler", **{**changed["3"]["inputs"], "denoise": 0.5, "latent_image": ["20", 0]})
    changed["8"]["inputs"]["samples"] = ["21", 0]
    changed["22"] = node("PrimitiveString", value="a red cat")
    changed["6"]["inputs"]["text"] = ["22", 0]
    changed["23"] = node("ControlNetApplyAdvanced", positive=["6", 0], negative=["7", 0], strength=1)
    changed["3"]["inputs"]["positive"] = ["23", 0]
    settings, left_out = settings_of(comfyui(prompt=changed))
    assert settings == {**SETTINGS, "prompt": SETTINGS["prompt"].replace("a glass bottle, (red:1.2)", "a red cat")}
    assert left_out == ["ControlNetApplyAdvanced", "a second KSampler"]


def test_values_of_comfyui_that_sdjax_does_not_have_are_left_out():
    changed = graph()
    changed["3"]["inputs"] |= {"sampler_name": "ipndm", "steps": 0, "cfg": [1, 2, 3], "seed": -1, "denoise": {}}
    changed["10"]["inputs"]["lora_name"] = "a>b<c.safetensors"
    settings, left_out = settings_of(comfyui(prompt=changed))
    assert left_out == ["steps", "seed", "sampler"]
    assert set(settings) == set(SETTINGS) - {"steps", "seed", "sampler", "guidance", "strength"}
    assert settings["prompt"] == "a glass bottle, (red:1.2) <lora:moon:0.5:1>"


def circle():
    sampler = node("KSampler", steps=["1", 0], positive=["2", 0], latent_image=["1", 0], model=["2", 0])
    return {"1": sampler, "2": node("CLIPTextEncode", text=["3", 0]), "3": node("X", text=["2", 0], model=["2", 0])}


def test_a_graph_that_goes_in_a_circle_ends():
    assert settings_of(comfyui(prompt=circle()))[0] == {"prompt": "", "negative_prompt": ""}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"prompt": "a cat"}, "'prompt' of this picture is not a graph"),
        ({"prompt": "[" * 100_000}, "'prompt' of this picture is not a graph"),
        ({"prompt": [1]}, "'prompt' of this picture is not a graph"),
        ({"prompt": {"1": {"class_type": "KSampler", "inputs": 3}}}, "'prompt' of this picture is not a graph"),
        ({"workflow": {"nodes": [{"id": 1}], "links": []}}, "'workflow' of this picture is not a graph"),
        ({"workflow": {"nodes": {}, "links": [1]}}, "'workflow' of this picture is not a graph"),
        ({"prompt": " " * 4_000_000 + "{}"}, "4000002 characters: at most 4000000"),
        ({"prompt": {}}, "no KSampler"),
        ({"prompt": {"1": node("SaveImage", images=["1", 0]), "2": 5}}, "no KSampler"),
        ({"prompt": {str(i): node("X") for i in range(5001)}}, "5001 nodes: at most 5000"),
    ],
)
def test_a_graph_that_cannot_be_read_is_one_error(texts, message):
    with pytest.raises(DataError, match=message) as error:
        settings_of(comfyui(**texts))
    assert "\n" not in str(error.value)
