"""Whole pictures against diffusers' pipelines of the same weights."""

import functools
import sys

import numpy as np
import oracle
import pytest
from pictures import (
    KINDS,
    NEGATIVES,
    PROMPTS,
    SCHEDULERS,
    STEPS,
    assert_same,
    compilations,
    pair,
    parity,
    pixels_of,
    settings_of,
    start,
    text_and_unet_lora,
    their_picture,
    with_scheduler,
)
from PIL import Image

import sdjax
from sdjax.formats.lora_file import save_lora

NO_ZERO_SNR = ("pndm", "lms", "heun", "dpm2", "dpm2_a")  # in diffusers as here


@parity
@pytest.mark.parametrize(
    ("kind", "sampler"),
    [(kind, name) for kind in [*KINDS, "tiny"] for name in SCHEDULERS if kind != "sd2v" or name not in NO_ZERO_SNR],
)
def test_pictures_match_diffusers(models, final_latents, monkeypatch, kind, sampler):
    theirs, ours = models(kind)
    outline = ours.model.outline
    how = {"latents": start(size=outline.unet.config.sample_size), "guidance": outline.guidance}
    eta = {"eta": 0.3} if sampler == "tcd" else {}  # gamma; the pipelines set it to 0
    expected = their_picture(with_scheduler(theirs, sampler, monkeypatch), PROMPTS, NEGATIVES, **how, **eta)
    drawn = ours.text2image(PROMPTS, NEGATIVES, **how, steps=STEPS, sampler=sampler, progress=False)
    assert_same(drawn, expected, final_latents)


@parity
@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta", "trailing"])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_spacings_match_diffusers(models, final_latents, sampler, spacing):
    import diffusers

    theirs, ours = models("sd1")
    options = {"timestep_spacing": spacing} if spacing == "trailing" else {f"use_{spacing}_sigmas": True}
    scheduler = getattr(diffusers, SCHEDULERS[sampler]).from_config(theirs.scheduler.config, **options)
    pipeline = type(theirs)(**(theirs.components | {"scheduler": scheduler}), **settings_of(theirs))
    expected = their_picture(pipeline, PROMPTS, NEGATIVES, latents=start())
    how = {"karras": True} if spacing == "karras" else {"spacing": spacing}
    drawn = ours.text2image(PROMPTS, NEGATIVES, latents=start(), steps=STEPS, sampler=sampler, progress=False, **how)
    assert_same(drawn, expected, final_latents)


@parity
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_few_steps_without_guidance_as_turbo_and_lightning_are_drawn(models, final_latents, kind, steps):
    """Their pipelines are called with guidance_scale = 0, which is diffusers' way to say 1."""
    import diffusers

    theirs, ours = models(kind)
    scheduler = diffusers.EulerDiscreteScheduler.from_config(theirs.scheduler.config, timestep_spacing="trailing")
    pipeline = type(theirs)(**(theirs.components | {"scheduler": scheduler}), **settings_of(theirs))
    expected = their_picture(pipeline, PROMPTS, latents=start(), steps=steps, guidance=0.0)
    drawn = ours.text2image(
        PROMPTS, latents=start(), steps=steps, sampler="euler", spacing="trailing", guidance=1.0, progress=False
    )
    assert_same(drawn, expected, final_latents)


@parity
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_models_that_take_the_guidance_as_an_input(final_latents, monkeypatch, tmp_path, kind):
    """Latent consistency models: U-Nets with time_cond_proj_dim, which are evaluated without a negative prompt."""
    import diffusers

    theirs, ours = pair(kind, tmp_path, time_cond_proj_dim=12)
    draw = functools.partial(ours.text2image, PROMPTS, latents=start(), steps=4, sampler="lcm", progress=False)
    found = {}
    for guidance in (8.5, 1.0):
        pipeline = with_scheduler(theirs, "lcm", monkeypatch)
        if kind == "sd1":
            pipeline = diffusers.LatentConsistencyModelPipeline(**pipeline.components, requires_safety_checker=False)
        expected = their_picture(pipeline, PROMPTS, latents=start(), steps=4, guidance=guidance)
        assert_same(draw(guidance=guidance), expected, final_latents)
        found[guidance] = final_latents()
    assert oracle.error(found[8.5], found[1.0]) > 0.01
    assert compilations(lambda: draw(guidance=3.0, negative_prompt="grey")) == 0
    np.testing.assert_array_equal(pixels_of(draw(negative_prompt="grey")), pixels_of(draw()))


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
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_freeu(models, final_latents, monkeypatch, kind):
    theirs, ours = models(kind)
    pipeline = with_scheduler(theirs, "ddim", monkeypatch)
    plain = their_picture(pipeline, PROMPTS, NEGATIVES, latents=start())
    pipeline.enable_freeu(b1=1.3, b2=1.4, s1=0.9, s2=0.2)
    try:
        expected = their_picture(pipeline, PROMPTS, NEGATIVES, latents=start())
    finally:
        pipeline.disable_freeu()
    assert oracle.error(plain[0], expected[0]) > 0.01
    drawn = ours.text2image(
        PROMPTS, NEGATIVES, latents=start(), steps=STEPS, sampler="ddim", freeu=(1.3, 1.4, 0.9, 0.2), progress=False
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
@pytest.mark.parametrize(("kind", "offset"), [("sd1", 1), ("sdxl", 2)])
def test_clip_skip_is_that_of_diffusers_and_an_offset(models, final_latents, monkeypatch, kind, offset, clip_skip):
    """Theirs counts layers from the usual one: the last for SD1, the penultimate for SDXL. Ours counts from the last.

    Theirs skips layers in the prompt alone, ours (like A1111 and kohya) in the negative prompt too, so theirs is given
    an encoded negative prompt.
    """
    import torch

    theirs, ours = models(kind)
    pipeline = with_scheduler(theirs, "ddim", monkeypatch)
    if kind == "sd1":
        # diffusers 0.42 asks for text_encoder.text_model, which transformers 5.6 took away.
        monkeypatch.setattr(type(pipeline.text_encoder), "text_model", property(lambda self: self), raising=False)
    with torch.no_grad():
        encoded = pipeline.encode_prompt(
            NEGATIVES,
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            clip_skip=clip_skip - offset,
        )
    negative = {"negative_prompt_embeds": encoded[0]}
    negative |= {"negative_pooled_prompt_embeds": encoded[2]} if kind == "sdxl" else {}
    expected = their_picture(pipeline, PROMPTS, latents=start(), clip_skip=clip_skip - offset, **negative)
    draw = functools.partial(
        ours.text2image, PROMPTS, NEGATIVES, latents=start(), steps=STEPS, sampler="ddim", progress=False
    )
    drawn = draw(clip_skip=clip_skip)
    assert_same(drawn, expected, final_latents)
    if clip_skip == offset:
        np.testing.assert_array_equal(pixels_of(draw()), pixels_of(drawn))
    else:
        assert oracle.error(their_picture(pipeline, PROMPTS, NEGATIVES, latents=start())[0], expected[0]) > 0.01


@parity
def test_an_empty_negative_prompt_is_zeros_for_sdxl_and_text_for_sd1(models, final_latents, monkeypatch):
    for kind in ("sd1", "sdxl"):
        theirs, ours = models(kind)
        expected = their_picture(with_scheduler(theirs, "ddim", monkeypatch), PROMPTS, latents=start())
        drawn = ours.text2image(PROMPTS, latents=start(), steps=STEPS, sampler="ddim", progress=False)
        assert_same(drawn, expected, final_latents)
    # In a batch, each picture has its negative prompt, empty or not.
    mixed = ours.text2image(PROMPTS, ["", "grey"], latents=start(), steps=STEPS, sampler="ddim", progress=False)
    difference = np.abs(pixels_of(mixed) - pixels_of(drawn)).max(axis=(1, 2, 3))
    assert difference[0] <= 1
    assert difference[1] > 10


@parity
@pytest.mark.parametrize(
    "conditions",
    [{}, {"original_size": (50, 30), "crops_coords_top_left": (4, 2), "target_size": (80, 40)}],
    ids=["none", "all"],
)
def test_sizes_reach_the_conditions_of_sdxl(models, final_latents, monkeypatch, conditions):
    theirs, ours = models("sdxl")
    latents = np.random.default_rng(0).normal(size=(1, 10, 6, 4)).astype(np.float32)
    pipeline = with_scheduler(theirs, "euler", monkeypatch)
    expected = their_picture(pipeline, PROMPTS[:1], NEGATIVES[:1], latents=latents, height=40, width=24, **conditions)
    how = {"steps": STEPS, "sampler": "euler", "progress": False, **conditions}
    drawn = ours.text2image(PROMPTS[0], NEGATIVES[0], latents=latents, height=40, width=24, **how)
    assert drawn[0].size == (24, 40)
    assert_same(drawn, expected, final_latents)
    if conditions:
        plain = their_picture(pipeline, PROMPTS[:1], NEGATIVES[:1], latents=latents, height=40, width=24)
        assert oracle.error(plain[0], expected[0]) > 0.01
        assert 'Original size: "(50, 30)", Crop top left' in drawn[0].info["parameters"]


@pytest.fixture(scope="module")
def refiner(models, tmp_path_factory):
    """A random refiner for the "sdxl" model: diffusers' pipeline and its folder."""
    import diffusers

    base, _ = models("sdxl")
    config = {**base.unet.config, "cross_attention_dim": 32, "projection_class_embeddings_input_dim": 5 * 8 + 20}
    pipeline = diffusers.StableDiffusionXLImg2ImgPipeline(
        unet=oracle.randomised(diffusers.UNet2DConditionModel.from_config(config), 7),
        text_encoder=None,
        tokenizer=None,
        **{name: base.components[name] for name in ("vae", "text_encoder_2", "tokenizer_2", "scheduler")},
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    folder = tmp_path_factory.mktemp("refiner")
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, folder


@parity
@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m"])  # diffusers ends heun's last step by Euler's rule
def test_a_refiner_draws_the_last_steps(models, refiner, final_latents, monkeypatch, sampler):
    theirs, ours = models("sdxl")
    second, folder = refiner
    scheduled = with_scheduler(theirs, sampler, monkeypatch)
    second.scheduler = type(scheduled.scheduler).from_config(scheduled.scheduler.config)
    how = {"negative_prompt": NEGATIVES, "num_inference_steps": 8, "guidance_scale": 5.0, "output_type": "latent"}
    begun = scheduled(PROMPTS, latents=oracle.channels_first(start()), denoising_end=0.6, **how).images
    final = oracle.channels_last(second(PROMPTS, image=begun, denoising_start=0.6, **how).images)
    refined = ours.with_refiner(folder, 0.6)
    how = {"latents": start(), "steps": 8, "sampler": sampler, "guidance": 5.0, "progress": False}
    (picture, _) = refined.text2image(PROMPTS, NEGATIVES, **how)
    drawn = final_latents()
    assert np.abs(drawn - final).max() <= 1e-3 * max(1.0, np.abs(final).max())
    assert "Refiner switch at: 0.6" in picture.info["parameters"]
    ours.text2image(PROMPTS, NEGATIVES, **how)
    assert np.abs(final_latents() - drawn).max() > 0.01
    if sampler == "ddim":  # words of its own for the refiner, as docs/drawing.md writes them
        refined.text2image([f"[{prompt}:a green hat:3]" for prompt in PROMPTS], NEGATIVES, **how)
        how = {"negative_prompt": NEGATIVES, "num_inference_steps": 8, "guidance_scale": 5.0, "output_type": "latent"}
        other = second(["a green hat"] * len(PROMPTS), image=begun, denoising_start=0.6, **how).images
        other = oracle.channels_last(other)
        assert np.abs(final_latents() - other).max() <= 1e-3 * max(1.0, np.abs(other).max())
        assert np.abs(final - other).max() > 0.01


@parity
def test_a_refiner_alone_redraws_images_as_in_diffusers(refiner, final_latents, monkeypatch):
    import diffusers

    theirs, folder = refiner
    theirs.scheduler = diffusers.EulerDiscreteScheduler.from_config(theirs.scheduler.config)
    noise, module = start(), sys.modules[type(theirs).__module__]
    monkeypatch.setattr(module, "retrieve_latents", lambda encoded, **_: encoded.latent_dist.mode())
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: oracle.channels_first(noise))
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32, 3), np.uint8)) for i in range(2)]
    final = theirs(
        PROMPTS, image=images, negative_prompt=NEGATIVES, strength=0.5, num_inference_steps=8, guidance_scale=5.0,
        output_type="latent",
    ).images  # fmt: skip
    sdjax.load(folder).img2img(
        PROMPTS, images, strength=0.5, negative_prompt=NEGATIVES, steps=8, guidance=5.0, sampler="euler", latents=noise,
        progress=False,
    )  # fmt: skip
    final = oracle.channels_last(final)
    assert np.abs(final_latents() - final).max() <= 1e-3 * max(1.0, np.abs(final).max())


@parity
@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m", "pndm"])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_img2img_matches_diffusers(models, final_latents, monkeypatch, kind, sampler):
    """Ours starts from the mean of the posterior, so theirs must too; both start from the same noise."""
    import diffusers

    theirs, ours = models(kind)
    name = "StableDiffusionXLImg2ImgPipeline" if kind == "sdxl" else "StableDiffusionImg2ImgPipeline"
    base = with_scheduler(theirs, sampler, monkeypatch)
    pipeline = getattr(diffusers, name)(**base.components, **settings_of(base))
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
    size = ours.model.outline.native_size
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
        pooled = ours.model.encode_prompts(PROMPTS)[1]
        assert oracle.error(pooled, encoded[2]) <= 1e-4
        added = ours.model.outline.added_conditions(pooled, np.tile([32, 48, 0, 0, 32, 48], (len(PROMPTS), 1)))
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
