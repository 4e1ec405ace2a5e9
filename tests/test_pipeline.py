"""Whole pictures: against diffusers' pipelines of the same weights, and what drawing promises beyond them."""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from PIL import Image

import sdjax
from sdjax import lora
from sdjax.errors import ConfigError
from sdjax.formats.lora_file import save_lora

TINY = Path(sdjax.__file__).parent / "tiny"
STEPS = 6
PROMPTS = ["a red heart", "cyclone over the water, umbrella"]
NEGATIVES = ["grey", "a blurry hot dog"]
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "lms": "LMSDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "dpmpp_2m_sde": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
}
STOCHASTIC = ("euler_a", "dpmpp_2m_sde", "lcm")  # given the same noise at every step, these too must agree


def parity(test):
    """diffusers' schedulers hand torch tensors to `np.array`, which NumPy 2 warns about."""
    return pytest.mark.parity(pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")(test))


# Small models of each family, as diffusers makes and saves them.

SCHEDULER = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
    "clip_sample": False, "set_alpha_to_one": False,
}  # fmt: skip
KINDS = {
    "sd1": {"context": 24, "scheduler": {"skip_prk_steps": True}, "class": "PNDMScheduler"},
    "sd2v": {
        "context": 24,
        "unet": {"use_linear_projection": True, "attention_head_dim": [2, 4]},
        "text": {"hidden_act": "gelu", "pad_token_id": 2},
        "scheduler": {
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        },
        "class": "DDIMScheduler",
    },
    "sdxl": {
        "context": 24 + 32,
        "unet": {
            "use_linear_projection": True,
            "transformer_layers_per_block": [1, 2],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 20,
        },
        "scheduler": {"timestep_spacing": "leading", "interpolation_type": "linear"},
        "class": "EulerDiscreteScheduler",
    },
}


def build(kind):
    """A diffusers pipeline of random weights, on the small tokenizer of 16 positions that comes with the library."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    spec = KINDS[kind]
    unet = {
        "sample_size": 8,
        "block_out_channels": (16, 24),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
        "cross_attention_dim": spec["context"],
    } | spec.get("unet", {})
    vae = {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 4,
        "sample_size": 32,
    }
    text = {
        "vocab_size": 2263, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4,
        "num_attention_heads": 4, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1,
        "pad_token_id": 1,
    } | spec.get("text", {})  # fmt: skip
    parts = {
        "unet": oracle.randomised(diffusers.UNet2DConditionModel(**unet), 1),
        "vae": oracle.randomised(diffusers.AutoencoderKL(**vae), 2),
        "text_encoder": oracle.randomised(CLIPTextModel(CLIPTextConfig(**text)), 3),
        "tokenizer": CLIPTokenizer.from_pretrained(TINY / "tokenizer", model_max_length=16),
        # Published configs hold other classes' options too, which the other samplers then read.
        "scheduler": getattr(diffusers, spec["class"]).from_config(SCHEDULER | spec["scheduler"]),
    }
    if kind == "sd2v":
        parts["tokenizer"].pad_token = "!"  # SD2 and SDXL's second encoder pad with it, SD1 with the end token
    if kind != "sdxl":
        return diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    text |= {"hidden_size": 32, "hidden_act": "gelu", "projection_dim": 20}
    second = CLIPTokenizer.from_pretrained(TINY / "tokenizer", model_max_length=16)
    second.pad_token = "!"
    return diffusers.StableDiffusionXLPipeline(
        **parts,
        text_encoder_2=oracle.randomised(CLIPTextModelWithProjection(CLIPTextConfig(**text)), 4),
        tokenizer_2=second,
        add_watermarker=False,
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """kind -> (diffusers' pipeline, ours loaded from the folder diffusers saved); "tiny" is the embedded model."""

    @functools.cache
    def make(kind):
        import torch
        from diffusers import DiffusionPipeline

        folder = TINY
        if kind != "tiny":
            folder = tmp_path_factory.mktemp(kind)
            build(kind).save_pretrained(folder)
        # Read back by them too: in memory, their schedulers still know which options nobody had given.
        theirs = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        ours = sdjax.load("tiny" if kind == "tiny" else folder)
        theirs.set_progress_bar_config(disable=True)
        return theirs, ours

    return make


@pytest.fixture
def final_latents(monkeypatch):
    """The latents of our last picture, as they are when they reach the decoder."""
    seen = []
    decode = sdjax.StableDiffusion.decode_latents

    def spy(self, latents):
        seen.append(np.asarray(latents))
        return decode(self, latents)

    monkeypatch.setattr(sdjax.StableDiffusion, "decode_latents", spy)
    return lambda: seen[-1]


def with_scheduler(pipeline, sampler, monkeypatch, seed=0):
    """Sets the pipeline's scheduler; a stochastic one is given our noise."""
    import diffusers
    import torch

    extra = {}
    if sampler.startswith("dpmpp"):
        extra["algorithm_type"] = "dpmsolver++" if sampler == "dpmpp_2m" else "sde-dpmsolver++"
    scheduler = getattr(diffusers, SCHEDULERS[sampler]).from_config(pipeline.scheduler.config, **extra)
    draws = iter(range(1000))

    def randn_tensor(shape, **_):
        i = next(draws)
        key = lambda row: jax.random.fold_in(jax.random.key(seed + row), i)
        drawn = [jax.random.normal(key(row), (*shape[2:], shape[1]), jnp.float32) for row in range(shape[0])]
        return torch.from_numpy(np.moveaxis(np.asarray(drawn), -1, 1).copy())

    if sampler in STOCHASTIC:
        monkeypatch.setattr(sys.modules[type(scheduler).__module__], "randn_tensor", randn_tensor)
    # A pipeline of its own: the fixture's keeps its scheduler.
    return type(pipeline)(**(pipeline.components | {"scheduler": scheduler}), **_settings(pipeline))


def _settings(pipeline):
    names = ("requires_safety_checker", "force_zeros_for_empty_prompt")
    settings = {name: pipeline.config[name] for name in names if name in pipeline.config}
    return settings | ({"add_watermarker": False} if "force_zeros_for_empty_prompt" in settings else {})


def their_picture(pipeline, *prompts, latents, steps=STEPS, guidance=7.5, **how):
    """-> final latents and pixels, NHWC, of diffusers."""
    import torch

    if prompts:
        how["prompt"] = prompts[0]
    if len(prompts) > 1:
        how["negative_prompt"] = prompts[1]
    pipeline.set_progress_bar_config(disable=True)
    final = pipeline(
        latents=oracle.channels_first(latents),
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="latent",
        **how,
    ).images
    with torch.no_grad():
        decoded = pipeline.vae.decode(final / pipeline.vae.config.scaling_factor).sample
    pictures = pipeline.image_processor.postprocess(decoded, output_type="pil")
    return oracle.channels_last(final), pixels_of(pictures)


def pixels_of(pictures):
    return np.stack([np.asarray(picture, np.int32) for picture in pictures])


def start(batch=2, size=8):
    return np.random.default_rng(3).normal(size=(batch, size, size, 4)).astype(np.float32)


def assert_same(ours, theirs, final_latents):
    """Within 1e-3 of the latents' largest (at least 1), and two steps of 255."""
    latents, pixels = theirs
    assert np.isfinite(latents).all()
    error = np.abs(final_latents() - latents).max() / max(1.0, np.abs(latents).max())
    steps = np.abs(pixels_of(ours) - pixels).max()
    print(f"latents within {error:.1e}, pixels within {steps} / 255")
    assert error <= 1e-3
    assert steps <= 2
    assert pixels.std() > 5  # a picture, not a grey field on which anything agrees


NO_ZERO_SNR = ("pndm", "lms", "heun")  # in diffusers as here


@parity
@pytest.mark.parametrize(
    ("kind", "sampler"),
    [(kind, name) for kind in [*KINDS, "tiny"] for name in SCHEDULERS if kind != "sd2v" or name not in NO_ZERO_SNR],
)
def test_pictures_match_diffusers(models, final_latents, monkeypatch, kind, sampler):
    theirs, ours = models(kind)
    latents = start(size=ours.unet.config.sample_size)
    expected = their_picture(with_scheduler(theirs, sampler, monkeypatch), PROMPTS, NEGATIVES, latents=latents)
    drawn = ours.text2image(PROMPTS, NEGATIVES, latents=latents, steps=STEPS, sampler=sampler, progress=False)
    assert_same(drawn, expected, final_latents)


@parity
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_karras_spacing_matches_diffusers(models, final_latents, sampler):
    import diffusers

    theirs, ours = models("sd1")
    scheduler = getattr(diffusers, SCHEDULERS[sampler]).from_config(theirs.scheduler.config, use_karras_sigmas=True)
    pipeline = type(theirs)(**(theirs.components | {"scheduler": scheduler}), **_settings(theirs))
    expected = their_picture(pipeline, PROMPTS, NEGATIVES, latents=start())
    drawn = ours.text2image(
        PROMPTS, NEGATIVES, latents=start(), steps=STEPS, sampler=sampler, karras=True, progress=False
    )
    assert_same(drawn, expected, final_latents)


@parity
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_guidance_off_and_low(models, final_latents, monkeypatch, kind, guidance):
    theirs, ours = models(kind)
    pipeline = with_scheduler(theirs, "ddim", monkeypatch)
    expected = their_picture(pipeline, PROMPTS, NEGATIVES, latents=start(), guidance=guidance)
    drawn = ours.text2image(
        PROMPTS, NEGATIVES, latents=start(), steps=STEPS, sampler="ddim", guidance=guidance, progress=False
    )
    assert_same(drawn, expected, final_latents)


@parity
@pytest.mark.parametrize("kind", ["sd1", "sd2v", "sdxl"])
def test_guidance_rescale(models, final_latents, monkeypatch, kind):
    theirs, ours = models(kind)
    pipeline = with_scheduler(theirs, "ddim", monkeypatch)
    expected = their_picture(pipeline, PROMPTS, NEGATIVES, latents=start(), guidance_rescale=0.7)
    plain = their_picture(pipeline, PROMPTS, NEGATIVES, latents=start())
    assert oracle.error(plain[0], expected[0]) > 0.01
    drawn = ours.text2image(
        PROMPTS, NEGATIVES, latents=start(), steps=STEPS, sampler="ddim", guidance_rescale=0.7, progress=False
    )
    assert_same(drawn, expected, final_latents)


@parity
@pytest.mark.parametrize("clip_skip", [2, 3])
def test_clip_skip_is_one_more_than_diffusers_sd1(models, final_latents, monkeypatch, clip_skip):
    """Theirs skips in the prompt alone, ours (as A1111 and kohya) in the negative prompt too: theirs is given it."""
    import torch

    theirs, ours = models("sd1")
    pipeline = with_scheduler(theirs, "ddim", monkeypatch)
    # diffusers 0.42 asks for text_encoder.text_model, which transformers 5.6 took away.
    monkeypatch.setattr(type(pipeline.text_encoder), "text_model", property(lambda self: self), raising=False)
    with torch.no_grad():
        negative = pipeline.encode_prompt(NEGATIVES, "cpu", 1, False, clip_skip=clip_skip - 1)[0]
    expected = their_picture(
        pipeline, PROMPTS, latents=start(), clip_skip=clip_skip - 1, negative_prompt_embeds=negative
    )
    assert oracle.error(their_picture(pipeline, PROMPTS, NEGATIVES, latents=start())[0], expected[0]) > 0.01
    drawn = ours.text2image(
        PROMPTS, NEGATIVES, latents=start(), steps=STEPS, sampler="ddim", clip_skip=clip_skip, progress=False
    )
    assert_same(drawn, expected, final_latents)


@parity
@pytest.mark.parametrize("clip_skip", [2, 3])
def test_clip_skip_is_two_more_than_diffusers_sdxl(models, final_latents, monkeypatch, clip_skip):
    """There diffusers' 0 is the penultimate layer, our 2, which is also what None means."""
    import torch

    theirs, ours = models("sdxl")
    pipeline = with_scheduler(theirs, "ddim", monkeypatch)
    with torch.no_grad():
        negative, _, pooled, _ = pipeline.encode_prompt(
            NEGATIVES, device="cpu", do_classifier_free_guidance=False, clip_skip=clip_skip - 2
        )
    expected = their_picture(
        pipeline,
        PROMPTS,
        latents=start(),
        clip_skip=clip_skip - 2,
        negative_prompt_embeds=negative,
        negative_pooled_prompt_embeds=pooled,
    )
    drawn = ours.text2image(
        PROMPTS, NEGATIVES, latents=start(), steps=STEPS, sampler="ddim", clip_skip=clip_skip, progress=False
    )
    assert_same(drawn, expected, final_latents)
    if clip_skip == 2:
        default = ours.text2image(PROMPTS, NEGATIVES, latents=start(), steps=STEPS, sampler="ddim", progress=False)
        np.testing.assert_array_equal(pixels_of(default), pixels_of(drawn))


@parity
def test_an_empty_negative_prompt_is_zeros_for_sdxl_and_text_for_sd1(models, final_latents, monkeypatch):
    for kind in ("sd1", "sdxl"):
        theirs, ours = models(kind)
        expected = their_picture(with_scheduler(theirs, "ddim", monkeypatch), PROMPTS, latents=start())
        drawn = ours.text2image(PROMPTS, latents=start(), steps=STEPS, sampler="ddim", progress=False)
        assert_same(drawn, expected, final_latents)
    # In one batch with a written one, each picture has its own.
    mixed = ours.text2image(PROMPTS, ["", "grey"], latents=start(), steps=STEPS, sampler="ddim", progress=False)
    difference = np.abs(pixels_of(mixed) - pixels_of(drawn)).max(axis=(1, 2, 3))
    assert difference[0] <= 1
    assert difference[1] > 10


@parity
def test_other_sizes_reach_sdxls_conditions(models, final_latents, monkeypatch):
    theirs, ours = models("sdxl")
    latents = np.random.default_rng(0).normal(size=(1, 10, 6, 4)).astype(np.float32)
    pipeline = with_scheduler(theirs, "euler", monkeypatch)
    expected = their_picture(pipeline, PROMPTS[:1], NEGATIVES[:1], latents=latents, height=40, width=24)
    drawn = ours.text2image(
        PROMPTS[0], NEGATIVES[0], latents=latents, steps=STEPS, sampler="euler", height=40, width=24, progress=False
    )
    assert drawn[0].size == (24, 40)
    assert_same(drawn, expected, final_latents)


@parity
@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m", "pndm"])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_img2img_matches_diffusers(models, final_latents, monkeypatch, kind, sampler):
    """Ours starts from the posterior's mean; so must theirs, and from the same noise."""
    import diffusers

    theirs, ours = models(kind)
    name = "StableDiffusionXLImg2ImgPipeline" if kind == "sdxl" else "StableDiffusionImg2ImgPipeline"
    base = with_scheduler(theirs, sampler, monkeypatch)
    pipeline = getattr(diffusers, name)(**base.components, **_settings(base))
    module = sys.modules[type(pipeline).__module__]
    noise = start()
    monkeypatch.setattr(module, "retrieve_latents", lambda encoded, **_: encoded.latent_dist.mode())
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: oracle.channels_first(noise))
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32, 3), np.uint8)) for i in range(2)]
    pipeline.set_progress_bar_config(disable=True)
    final = pipeline(
        prompt=PROMPTS, negative_prompt=NEGATIVES, image=images, strength=0.6, num_inference_steps=10,
        guidance_scale=5.0, output_type="latent",
    ).images  # fmt: skip
    ours.img2img(
        PROMPTS, images, strength=0.6, negative_prompt=NEGATIVES, steps=10, guidance=5.0, sampler=sampler,
        latents=noise, progress=False,
    )  # fmt: skip
    final = oracle.channels_last(final)
    assert np.abs(final_latents() - final).max() <= 1e-3 * max(1.0, np.abs(final).max())


@parity
@pytest.mark.parametrize("kind", ["sd1", "sdxl", "tiny"])
def test_the_parts_match_diffusers(models, kind):
    import torch

    theirs, ours = models(kind)
    size = ours.unet.config.sample_size * ours.vae.config.factor
    images = np.random.default_rng(0).uniform(size=(2, size, size, 3)).astype(np.float32)
    with torch.no_grad():
        mean = theirs.vae.encode(2 * oracle.channels_first(images) - 1).latent_dist.mode()
        decoded = theirs.vae.decode(mean).sample
    scaled = mean * theirs.vae.config.scaling_factor
    assert oracle.error(ours.encode_image(images), oracle.channels_last(scaled)) <= 1e-4
    pictures = ours.decode_latents(oracle.channels_last(scaled))
    assert oracle.error(pictures, np.clip(oracle.channels_last(decoded) / 2 + 0.5, 0, 1)) <= 1e-4
    with torch.no_grad():
        encoded = theirs.encode_prompt(
            PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    context = ours.encode_text(PROMPTS)
    assert oracle.error(context, encoded[0]) <= 1e-4
    added = {}
    if kind == "sdxl":
        pooled = ours.encode_prompts(PROMPTS)[1]
        assert oracle.error(pooled, encoded[2]) <= 1e-4
        added = ours.added_conditions(pooled, 32, 48)
    latents = start(size=8)
    with torch.no_grad():
        out = theirs.unet(
            oracle.channels_first(latents), 501, encoded[0],
            added_cond_kwargs={name: oracle.tensor(value) for name, value in added.items()},
        ).sample  # fmt: skip
    assert oracle.error(ours.predict(latents, 501, context, **added), oracle.channels_last(out)) <= 1e-4


# Files.


@parity
@pytest.mark.parametrize("kind", ["sd1", "sd2v", "sdxl"])
def test_a_folder_we_save_draws_the_same_in_diffusers(models, final_latents, tmp_path, kind):
    from diffusers import DiffusionPipeline

    theirs, ours = models(kind)
    ours.save(tmp_path / "saved")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved", local_files_only=True)
    assert type(again) is type(theirs)
    assert dict(again.scheduler.config) == dict(theirs.scheduler.config)
    expected = their_picture(again, PROMPTS, NEGATIVES, latents=start())
    np.testing.assert_array_equal(
        expected[0], their_picture(theirs, PROMPTS, NEGATIVES, latents=start())[0]
    )  # the same bits on disk
    sampler = next(name for name, scheduler in SCHEDULERS.items() if scheduler == KINDS[kind]["class"])
    drawn = sdjax.load(tmp_path / "saved").text2image(
        PROMPTS, NEGATIVES, latents=start(), steps=STEPS, sampler=sampler, progress=False
    )
    assert_same(drawn, expected, final_latents)


def text_and_unet_lora(sd, seed=0, alpha=2.0):
    """A LoRA that visibly changes both."""

    def filled(part, which):
        start = lora.init(jax.random.key(seed), sd.params[part], rank=4, alpha=alpha, which=which)
        return lora.map_layers(
            lambda layer: (
                layer
                | {
                    "up": 0.3
                    * jax.random.normal(jax.random.key(seed + layer["up"].size), layer["up"].shape, jnp.float32)
                }
            ),
            start,
        )

    return {"unet": filled("unet", "transformer"), "text_encoder": filled("text_encoder", "attention+ff")}


@parity
@pytest.mark.parametrize("style", ["kohya", "peft"])
def test_a_lora_we_export_draws_the_same_in_diffusers(models, final_latents, monkeypatch, tmp_path, style):
    theirs, ours = models("sd1")
    save_lora(tmp_path / "pytorch_lora_weights.safetensors", text_and_unet_lora(ours), ours.params, style=style)
    pipeline = with_scheduler(theirs, "ddim", monkeypatch)
    base = their_picture(pipeline, PROMPTS, NEGATIVES, latents=start())
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors", adapter_name="it")
    try:
        for weight in (1.0, 0.6):
            pipeline.set_adapters(["it"], [weight])
            expected = their_picture(pipeline, PROMPTS, NEGATIVES, latents=start())
            assert oracle.error(expected[0], base[0]) > 0.01
            adapted = ours.with_lora(tmp_path / "pytorch_lora_weights.safetensors", weight)
            drawn = adapted.text2image(PROMPTS, NEGATIVES, latents=start(), steps=STEPS, sampler="ddim", progress=False)
            assert_same(drawn, expected, final_latents)
    finally:
        pipeline.unload_lora_weights()


# What holds without an oracle.


@pytest.fixture(scope="module")
def tiny():
    return sdjax.load("tiny")


quickly = {"steps": 3, "progress": False}


def test_the_same_seed_draws_the_same_picture_whatever_its_batch(tiny):
    """Image i of a call is seed + i, alone or among others, also where noise is drawn at every step."""
    for sampler in ("dpmpp_2m", "euler_a"):
        three = tiny.text2image("a red heart", seed=5, num_images=3, sampler=sampler, **quickly)
        assert len(three) == 3
        for i, picture in enumerate(three):
            alone = tiny.text2image("a red heart", seed=5 + i, sampler=sampler, **quickly)[0]
            assert np.abs(pixels_of([picture]) - pixels_of([alone])).max() <= 1
        assert np.abs(pixels_of(three[:1]) - pixels_of(three[1:2])).max() > 30


def test_a_picture_does_not_depend_on_its_neighbours_prompts(tiny):
    """Nor on how many windows the longest of them takes."""
    prompts = ["a red heart", "joker, " * 12, "taco"]
    negatives = ["", "grey", "hot dog " * 10]
    assert tiny.tokenizers["tokenizer"].chunks(prompts[1]) > 1
    together = tiny.text2image(prompts, negatives, seed=3, **quickly)
    for i in range(3):
        alone = tiny.text2image(prompts[i], negatives[i], seed=3 + i, **quickly)[0]
        assert np.abs(pixels_of(together[i : i + 1]) - pixels_of([alone])).max() <= 1


def test_prompts_and_images_are_paired_in_order(tiny):
    four = tiny.text2image(["a red heart", "taco"], num_images=2, seed=1, **quickly)
    for i, prompt in enumerate(["a red heart", "a red heart", "taco", "taco"]):
        text = four[i].info["parameters"]
        assert text.startswith(prompt)
        assert f"Seed: {1 + i}," in text
    start_images = tiny.text2image(["a red heart", "taco"], **quickly)
    two = tiny.img2img("joker", start_images, num_images=2, strength=0.4, **quickly)
    for i, image in enumerate(start_images):
        alone = tiny.img2img("joker", image, seed=i, strength=0.4, **quickly)[0]
        assert np.abs(pixels_of([two[i]]) - pixels_of([alone])).max() <= 1


COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **__: COMPILED.append(event) if event == "/jax/core/compile/backend_compile_duration" else None
)


def compilations(action):
    before = len(COMPILED)
    action()
    return len(COMPILED) - before


def test_one_program_a_shape(tiny, tmp_path):
    """New seed, guidance, strength, prompt, sampler, steps or LoRA: nothing is compiled."""
    draw = functools.partial(tiny.text2image, progress=False)
    jax.clear_caches()
    assert compilations(lambda: draw("a red heart", "grey", steps=2)) > 0
    changes = [
        {"seed": 123456},
        {"guidance": 2.5},
        {"guidance": 0.0},
        {"guidance_rescale": 0.5},
        {"negative_prompt": "grey and blurry"},
        {"negative_prompt": ""},
        {"steps": 7},
        {"height": tiny.unet.config.sample_size * tiny.vae.config.factor},
        {"latents": start(1, tiny.unet.config.sample_size)},
        {"karras": True},
        *({"sampler": sampler} for sampler in SCHEDULERS),
    ]
    for change in changes:
        assert compilations(lambda change=change: draw("cyclone", **({"steps": 3} | change))) == 0, change
    picture = draw("taco", steps=2)[0]
    redraw = functools.partial(tiny.img2img, "taco", picture, progress=False)
    redraw(strength=0.5, steps=4)
    for change in ({"strength": 0.8}, {"strength": 1.0}, {"steps": 6}, {"seed": 9}, {"sampler": "ddim"}):
        assert compilations(lambda change=change: redraw(**({"strength": 0.5, "steps": 4} | change))) == 0, change
    adapted = tiny.with_lora(text_and_unet_lora(tiny))
    assert compilations(lambda: adapted.text2image("taco", steps=2, progress=False)) == 0
    assert compilations(lambda: draw("taco", steps=2, height=32)) > 0  # the counter counts


def test_bundles_are_left_as_they_are(tiny):
    before = pixels_of(tiny.text2image("taco", **quickly))
    adapted = tiny.with_lora(text_and_unet_lora(tiny), 0.5)
    assert np.abs(pixels_of(adapted.text2image("taco", **quickly)) - before).max() > 10
    np.testing.assert_array_equal(pixels_of(tiny.text2image("taco", **quickly)), before)
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny.name = "other"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_draws_nearly_the_same(tiny, dtype):
    half = sdjax.load("tiny", dtype)
    expected, drawn = (pixels_of(sd.text2image("a red heart", **quickly)) for sd in (tiny, half))
    assert np.abs(expected - drawn).mean() < 6
    assert half.params["unet"]["conv_in"]["kernel"].dtype == dtype


def test_transparent_and_grey_images_are_read(tiny):
    """Transparency is white; grey is three equal channels."""
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    white, grey = Image.new("RGB", (64, 64), "white"), Image.new("L", (64, 64), 128)
    draw = functools.partial(tiny.img2img, "taco", strength=0.5, **quickly)
    np.testing.assert_array_equal(pixels_of(draw(clear)), pixels_of(draw(white)))
    np.testing.assert_array_equal(pixels_of(draw(grey)), pixels_of(draw(grey.convert("RGB"))))
    assert draw(Image.new("RGB", (70, 45)))[0].size == (64, 40)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"sampler": "magic"}, "sampler 'magic' is not one of ddim, pndm"),
        ({"steps": 0}, "steps 0 must lie between 1 and"),
        ({"height": 60}, "height = 60: must be a positive multiple of 8"),
        ({"width": -8}, "width = -8"),
        ({"guidance": -1.0}, "guidance = -1.0: must lie in 0..1000"),
        ({"guidance_rescale": 2.0}, "guidance_rescale = 2.0: must lie in 0..1"),
        ({"clip_skip": 9}, r"clip_skip = 9: must lie in 1 \(last layer\)..3"),
        ({"clip_skip": 0}, "clip_skip = 0"),
        ({"num_images": 0}, "at least one picture is needed"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"karras": True, "sampler": "ddim"}, "'ddim' has no Karras sigmas"),
        ({"latents": np.zeros((2, 16, 16, 4), np.float32)}, r"latents have shape \(2, 16, 16, 4\)"),
    ],
)
def test_bad_settings_are_named_before_anything_is_computed(tiny, how, message):
    with pytest.raises(ConfigError, match=message):
        tiny.text2image("taco", **({"progress": False} | how))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"strength": 0.0}, "strength 0.0 must lie above 0"),
        ({"strength": 1.5}, "strength 1.5"),
        ({"strength": 0.05, "steps": 10}, "leaves none to run"),
        ({"latents": np.zeros((1, 8, 8, 4), np.float32)}, "latents have shape"),
    ],
)
def test_bad_img2img_settings_are_named(tiny, how, message):
    with pytest.raises(ConfigError, match=message):
        tiny.img2img("taco", Image.new("RGB", (64, 64)), **({"progress": False} | how))
    with pytest.raises(ConfigError, match="2 images for 3 pictures"):
        tiny.img2img("taco", [Image.new("RGB", (64, 64))] * 2, num_images=3)


def test_an_unknown_dtype_is_named():
    with pytest.raises(ConfigError, match="dtype = 'int8': choices are float32, bfloat16, float16"):
        sdjax.load("tiny", "int8")


def test_each_picture_has_its_own_lora(tiny):
    """One batch with three adapters, of for other models, against one merged model after the other."""
    first, second = text_and_unet_lora(tiny), {"unet": text_and_unet_lora(tiny, seed=1)["unet"]}
    weights = [0.5, 1.0, 1.0]
    together = tiny.with_loras([first, second, None], weights)
    latents = jnp.asarray(np.random.default_rng(3).normal(size=(3, 16, 16, 4)), jnp.float32)
    prompts = ["red heart", "dog face", "cat"]
    draw = lambda sd, prompts, latents: sd.text2image(prompts, "grey", steps=2, latents=latents, progress=False)
    found = draw(together, prompts, latents)
    alone = [tiny.with_lora(first, 0.5), tiny.with_lora(second), tiny]
    for i, (sd, prompt) in enumerate(zip(alone, prompts, strict=True)):
        expected = draw(sd, prompt, latents[i : i + 1])[0]
        assert np.abs(np.asarray(found[i], int) - np.asarray(expected, int)).max() <= 1
    assert np.abs(np.asarray(draw(tiny, "dog face", latents[1:2])[0], int) - np.asarray(found[1], int)).max() > 20
    with pytest.raises(ConfigError, match="3 LoRAs for 2 pictures"):
        draw(together, prompts[:2], latents[:2])
