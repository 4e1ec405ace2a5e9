"""What A1111's prompts make of a picture: against PyTorch's text models, and against drawing step by step by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pictures
import pytest
from PIL import Image

import sdjax
from sdjax import diffusion
from sdjax.draw import sampling
from sdjax.draw.conditioning import groups
from sdjax.draw.request import text2image_request
from sdjax.errors import ConfigError
from sdjax.models import unet
from sdjax.text.encoding import emphasised
from sdjax.text.syntax import emphasis

WINDOW = 16


# The context.

LONG = "a " * 10
WINDOWS = {  # a prompt -> the weighted texts in each of its windows
    "a (red heart:1.5), [taco]": [[("a ", 1), ("red heart", 1.5), (", ", 1), ("taco", 1 / 1.1)]],
    "plain words, BREAK ((joker))": [[("plain words,", 1)], [("joker", 1.21)]],
    f"{LONG}, (red heart:1.3) hot dog {LONG}": [
        [(f"{LONG},", 1)],
        [("red heart", 1.3), (f"hot dog {LONG}", 1)],
    ],
    f"{LONG}, a (<w>:0.5)": [[(f"{LONG}, a", 1)], [("<w>", 0.5)]],
    "<w> (cat:-1)": [[("<w>", 1), ("cat", -1)]],
}


def by_pytorch(tokenizer, model, windows, *, hidden, restore_mean):
    """A1111's rule: each window by itself times its weights, then back to the mean it had."""
    import torch

    contexts = []
    for spans in windows:
        ids, weights = [tokenizer.bos_token_id], [1.0]
        for text, weight in spans:
            own = [2263, 2264, 2265] if text == "<w>" else tokenizer(text, add_special_tokens=False)["input_ids"]
            ids, weights = [*ids, *own], [*weights, *[weight] * len(own)]
        ids.append(tokenizer.eos_token_id)
        assert len(ids) <= WINDOW
        ids += [tokenizer.pad_token_id] * (WINDOW - len(ids))
        weights = torch.tensor([*weights, *[1.0] * (WINDOW - len(weights))])
        with torch.no_grad():
            out = model(torch.tensor([ids]), output_hidden_states=True)
        z = out.hidden_states[-2] if hidden else out.last_hidden_state
        weighted = z * weights[None, :, None]
        contexts.append(weighted * (z.mean() / weighted.mean()) if restore_mean else weighted)
    return torch.cat(contexts, dim=1).numpy()


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sd1", "sd2v", "sdxl"])
def test_long_and_weighted_prompts_have_the_context_pytorch_gives(tmp_path, kind):
    import torch

    theirs, sd = pictures.pair(kind, tmp_path / kind)
    names = list(sd.model.outline.text_models)
    rng = np.random.default_rng(0)
    rows = {
        name: rng.normal(size=(3, model.config.hidden_size)).astype(np.float32)
        for name, model in sd.model.outline.text_models.items()
    }
    sd = sd.with_embedding({"<w>": rows})
    for name in names:
        model = getattr(theirs, name)
        if model.config.eos_token_id == 2:  # means the largest id, which is a new word's below
            model.config.eos_token_id = 1
        model.resize_token_embeddings(2266)
        with torch.no_grad():
            model.get_input_embeddings().weight[2263:] = torch.from_numpy(rows[name])
    plain = sd.model.encode_prompts(["plain words,"])
    for prompt, windows in WINDOWS.items():
        for restore_mean in (True, False):
            wanted = [
                by_pytorch(
                    getattr(theirs, name.replace("text_encoder", "tokenizer")),
                    getattr(theirs, name),
                    windows,
                    hidden=kind == "sdxl",
                    restore_mean=restore_mean,
                )
                for name in names
            ]
            context, pooled = sd.model.encode_prompts([emphasis(prompt)], restore_mean=restore_mean)
            assert oracle.error(context, np.concatenate(wanted, axis=-1)) <= 1e-4, prompt
            if prompt.startswith("plain"):
                np.testing.assert_allclose(pooled, plain[1], atol=1e-5)  # of the first window, unweighted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_of_one_change_nothing(dtype):
    context = jax.random.normal(jax.random.key(0), (3, 5, 7), jnp.float32).astype(dtype)
    weights = jnp.ones((3, 5), jnp.float32).at[1, 2].set(1.5)
    found = jax.jit(emphasised)(context, weights, np.bool_(True))
    assert found.dtype == context.dtype
    np.testing.assert_array_equal(found[::2], context[::2])
    mean = lambda values: np.asarray(values, np.float32).mean()
    assert mean(found[1]) == pytest.approx(mean(context[1]), rel=1e-2)
    assert np.abs(np.asarray(found[1] - context[1], np.float32)).max() > 0.1


# Pictures.


@pytest.fixture(scope="module")
def tiny():
    return sdjax.load("tiny")


STEPS = 4
quickly = {"steps": STEPS, "progress": False, "sampler": "ddim"}


def by_hand(sd, texts, *, sampler="ddim", guidance=7.5, strength=1.0, image=None):
    """A picture from `texts(i)` -> (negative, [(prompt, weight), ...]) of evaluation i."""
    plan = sampling.tabulate(sd.model.outline.schedule, sampler, STEPS, strength=strength)
    keys = jax.random.key(0)[None]
    noise = jax.random.normal(keys[0], (1, 16, 16, 4), jnp.float32)
    state = sampling.initial(plan, noise)
    if image is not None:
        state = sampling.initial_from_image(plan, sd.encode_image([image]), noise)
    for i in range(int(plan.length)):
        negative, prompts = texts(i)

        def denoise(x, level, negative=negative, prompts=prompts):
            out = uncond = sd.predict(x, level.timestep, sd.model.encode_prompts([emphasis(negative)])[0])
            for prompt, weight in prompts:
                cond = sd.predict(x, level.timestep, sd.model.encode_prompts([emphasis(prompt)])[0])
                out = out + guidance * weight * (cond - uncond)
            return diffusion.to_denoised(out, x, level.alpha, level.sigma, sd.model.outline.schedule.prediction_type)

        state = sampling.step(denoise, state, i, plan, keys)
    return np.asarray(sd.decode_latents(state.latents)) * 255


def assert_same(picture, wanted):
    assert np.abs(pictures.pixels_of(picture) - wanted).max() <= 1.5
    assert wanted.std() > 5


@pytest.mark.parametrize(
    ("prompt", "negative", "texts"),
    [
        # Evaluations count from 0 and steps from 1: the first two are of step 1.
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
    """As in A1111: heun has two a step, and an image's begin at the first that runs."""
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


def test_plain_prompts_are_taken_as_they_are(tiny):
    draw = functools.partial(tiny.text2image, **quickly)
    same = lambda a, b: (pictures.pixels_of(a) == pictures.pixels_of(b)).all()
    assert same(draw("a red heart"), draw("a red heart", prompt_syntax="plain"))
    assert same(draw(r"a \(red\) heart"), draw("a (red) heart", prompt_syntax="plain"))
    assert not same(draw("a (red) heart"), draw("a (red) heart", prompt_syntax="plain"))
    assert not same(draw("a (red:1.5) heart"), draw("a (red:1.5) heart", emphasis="no_norm"))
    assert draw("a <lora:x:1>", prompt_syntax="plain")
    recorded = lambda **how: draw("(taco)", **how)[0].info["parameters"]
    assert "Emphasis: No norm, " in recorded(emphasis="no_norm") and "Emphasis" not in recorded()
    context = tiny.encode_text("a (red) heart")  # as for training
    np.testing.assert_array_equal(context, tiny.model.encode_prompts(["a (red) heart"])[0])


def test_no_new_program_for_another_prompt(tiny):
    """Neither weights nor steps nor turns nor the way of emphasis are part of a program, only lengths are."""
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


def test_what_cannot_be_drawn_is_said(tiny):
    with pytest.warns(UserWarning, match="LoRAs named in a prompt are left out here; add them yourself: one, two"):
        tiny.text2image("taco <lora:one:0.5><lora:two>", **(quickly | {"steps": 1}))
    with pytest.raises(ConfigError, match="prompt_syntax = 'comfy': expected one of a1111, plain"):
        tiny.text2image("taco", prompt_syntax="comfy")
    with pytest.raises(ConfigError, match="emphasis = 'strong': expected one of original, no_norm"):
        tiny.text2image("taco", emphasis="strong")
    config = dataclasses.replace(tiny.model.outline.unet.config, time_cond_proj_dim=8)
    distilled = dataclasses.replace(tiny.model.outline, unet=unet.UNet(config, tiny.model.outline.unet.compute))
    with pytest.raises(ConfigError, match="drawn without guidance, so AND cannot join prompts"):
        groups(distilled, text2image_request(distilled, "a AND b", "", {}))
