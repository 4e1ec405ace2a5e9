"""Prompts of A1111's syntax, beside drawing step by step with the texts of each step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pictures
import pytest
from PIL import Image

from sdjax import diffusion
from sdjax.draw import sampling
from sdjax.draw.conditioning import conditions, groups
from sdjax.draw.request import text2image_request
from sdjax.errors import ConfigError
from sdjax.models import unet
from sdjax.text.syntax import emphasis

STEPS = 4
quickly = {"steps": STEPS, "progress": False, "sampler": "ddim"}


def by_hand(sd, texts, *, sampler="ddim", guidance=3.0, strength=1.0, image=None):
    """Draws a picture. texts: the number of an evaluation -> (negative prompt, [(prompt, weight), ...])."""
    table = sampling.tabulate(sd.model.outline.schedule, sampler, STEPS, strength=strength)
    keys = jax.random.key(0)[None]
    noise = jax.random.normal(keys[0], (1, 16, 16, 4), jnp.float32)
    state = sampling.initial(table, noise)
    if image is not None:
        state = sampling.initial_from_image(table, sd.encode_image([image]), noise)
    for i in range(int(table.length)):
        negative, prompts = texts(i)

        def denoise(x, level, negative=negative, prompts=prompts):
            out = uncond = sd.predict(x, level.timestep, sd.model.encode_prompts([emphasis(negative)])[0])
            for prompt, weight in prompts:
                cond = sd.predict(x, level.timestep, sd.model.encode_prompts([emphasis(prompt)])[0])
                out = out + guidance * weight * (cond - uncond)
            return diffusion.to_denoised(out, x, level.alpha, level.sigma, sd.model.outline.schedule.prediction_type)

        state = sampling.step(denoise, state, i, table, keys)
    return np.asarray(sd.decode_latents(state.latents)) * 255


def assert_same(picture, wanted):
    assert np.abs(pictures.pixels_of(picture) - wanted).max() <= 1.5
    assert wanted.std() > 5


@pytest.mark.parametrize(
    ("prompt", "negative", "texts"),
    [
        # Evaluations count from 0 and steps from 1: the first two evaluations belong to step 1.
        ("[red heart:taco:2] x", "", lambda i: ("", [("red heart x" if i <= 2 else "taco x", 1)])),
        ("[red heart:taco:0.5]", "", lambda i: ("", [("red heart" if i <= 2 else "taco", 1)])),
        ("(taco:1.4)", "[cat|dog]", lambda i: (["cat", "cat", "dog", "cat"][i], [("(taco:1.4)", 1)])),
        ("taco", "grey, " * 9, lambda i: ("grey, " * 9, [("taco", 1)])),  # each of its own length
        ("joker, " * 9 + "[taco:1]", "", lambda i: ("", [("joker, " * 9 + "taco" * (i > 1), 1)])),
        ("heart AND taco :0.5 AND " + "dog " * 20, "", lambda i: ("", [("heart", 1), ("taco", 0.5), ("dog " * 20, 1)])),
        ("taco: 0.7", "", lambda i: ("", [("taco", 0.7)])),
    ],
)
def test_a_prompt_is_what_its_steps_are_by_hand(tiny, prompt, negative, texts):
    noise = jax.random.normal(jax.random.key(0), (1, 16, 16, 4), jnp.float32)
    drawn = tiny.text2image(prompt, negative, latents=noise, **quickly)
    assert_same(drawn, by_hand(tiny, texts))


def test_steps_count_evaluations_of_the_whole_run(tiny):
    """As in A1111, heun has two evaluations a step, and redrawing an image counts from the first step that runs."""
    change = lambda last: lambda i: ("", [("heart" if i <= last else "taco", 1)])
    drawn = tiny.text2image("[heart:taco:0.5]", **(quickly | {"sampler": "heun"}))
    assert_same(drawn, by_hand(tiny, change(4), sampler="heun"))
    image = Image.new("RGB", (64, 64), "orange")
    drawn = tiny.img2img("[heart:taco:1]", image, strength=0.75, **quickly)
    assert_same(drawn, by_hand(tiny, change(1), strength=0.75, image=image))


def test_pictures_of_a_call_have_their_own_texts(tiny):
    prompts = ["[heart:taco:1]", "joker", "taco AND heart", "[a|dog]" + " a" * 20]
    together = tiny.text2image(prompts, ["", "grey", "", "cat"], seed=3, **quickly)
    for i, prompt in enumerate(prompts):
        alone = tiny.text2image(prompt, ["", "grey", "", "cat"][i], seed=3 + i, **quickly)
        assert np.abs(pictures.pixels_of(together[i : i + 1]) - pictures.pixels_of(alone)).max() <= 1


def test_the_syntax_of_a_prompt_and_the_effect_of_its_weights_can_be_chosen(tiny):
    draw = functools.partial(tiny.text2image, **quickly)
    same = lambda a, b: (pictures.pixels_of(a) == pictures.pixels_of(b)).all()
    assert same(draw("a red heart"), draw("a red heart", prompt_syntax="plain"))
    assert same(draw(r"a \(red\) heart"), draw("a (red) heart", prompt_syntax="plain"))
    assert not same(draw("a (red) heart"), draw("a (red) heart", prompt_syntax="plain"))
    assert not same(draw("a (red:1.5) heart"), draw("a (red:1.5) heart", emphasis="no_norm"))
    assert draw("a <lora:x:1>", prompt_syntax="plain")
    recorded = lambda **how: draw("(taco)", **how)[0].info["parameters"]
    assert "Emphasis: No norm, " in recorded(emphasis="no_norm") and "Emphasis" not in recorded()
    context = tiny.encode_text("a (red) heart")  # plain, as in training
    np.testing.assert_array_equal(context, tiny.model.encode_prompts(["a (red) heart"])[0])


def test_no_new_program_for_another_prompt(tiny):
    """Only the lengths of the texts are part of a program: not their weights, the steps they change at or emphasis."""
    draw = functools.partial(tiny.text2image, progress=False, steps=3)
    draw("taco")
    changes = [
        {"prompt": "(taco:1.3) [heart]"},
        {"prompt": "[taco:heart:2]"},
        {"prompt": "[taco:heart:0.4]", "steps": 5},
        {"prompt": "[taco|heart|(dog)]", "negative_prompt": "[cat:2]", "steps": 6},
        {"prompt": "(taco:1.3) :0.8", "emphasis": "no_norm"},
        {"prompt": "(taco:1.3)", "prompt_syntax": "plain"},
    ]
    for change in changes:
        assert pictures.compilations(lambda change=change: draw(**change)) == 0, change
    draw("taco BREAK heart", "grey")
    assert pictures.compilations(lambda: draw("[(taco)|heart] BREAK [dog:cat:1]", "cat", steps=4)) == 0
    draw("taco AND heart")
    assert pictures.compilations(lambda: draw("cat:2 AND [dog:heart:1] :-1", steps=4)) == 0


def test_loras_in_a_prompt_are_warned_of_and_unknown_settings_refused(tiny):
    with pytest.warns(UserWarning, match="LoRAs named in a prompt are left out here; add them yourself: one, two"):
        tiny.text2image("taco <lora:one:0.5><lora:two>", **(quickly | {"steps": 1}))
    with pytest.raises(ConfigError, match="prompt_syntax = 'comfy': expected one of a1111, plain"):
        tiny.text2image("taco", prompt_syntax="comfy")
    with pytest.raises(ConfigError, match="emphasis = 'strong': expected one of original, no_norm"):
        tiny.text2image("taco", emphasis="strong")


@pytest.mark.parametrize(("guidance", "texts"), [(1.0, 1), (0.0, 2), (3.0, 2)])
def test_guidance_1_needs_no_negative_prompt(tiny, guidance, texts):
    request = text2image_request(tiny.model.outline, ["taco", "heart"], "grey", {"guidance": guidance})
    (group,) = groups(tiny.model.outline, request)
    ((condition,),) = conditions(tiny.model, request, group, range(1))
    assert len(condition.context) == 2 * texts


def test_a_model_that_takes_guidance_as_an_input_joins_no_prompts(outline):
    config = dataclasses.replace(outline.unet.config, time_cond_proj_dim=8)
    distilled = dataclasses.replace(outline, unet=unet.UNet(config, outline.unet.compute))
    with pytest.raises(ConfigError, match="drawn without guidance, so AND cannot join prompts"):
        groups(distilled, text2image_request(distilled, "a AND b", "", {}))
