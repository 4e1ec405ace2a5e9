"""Inpainting: beside diffusers, pixels that are kept exactly, fills, seams, crops, and errors."""

import functools
import sys

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import NEGATIVES, PROMPTS, compilations, pair, parity, pixels_of, settings_of, start, with_scheduler
from PIL import Image, ImageDraw

from sdjax.draw import inpainting
from sdjax.draw.inpainting import make_frame
from sdjax.draw.settings import complete, declarations
from sdjax.errors import ConfigError
from sdjax.settings import choices

quickly = {"steps": 3, "progress": False}


@pytest.fixture(scope="module")
def nine(tmp_path_factory):
    """(diffusers' pipeline, ours) of the same inpainting model."""
    return pair("sd1", tmp_path_factory.mktemp("nine"), in_channels=9)


def rectangle(size, box, value=255):
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=value)
    return mask


def photo(width, height, seed=0):
    """Smooth colours with some noise."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (3, 4, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    return Image.fromarray(
        np.clip(np.asarray(small, int) + rng.integers(-4, 5, (height, width, 3)), 0, 255).astype("u1")
    )


def assert_kept(drawn, image, mask):
    """Where the mask is 0 every pixel is that of the image; elsewhere at least one is not."""
    kept = np.asarray(mask) == 0
    np.testing.assert_array_equal(np.asarray(drawn)[kept], np.asarray(image)[kept])
    assert np.abs(np.asarray(drawn, int) - np.asarray(image))[~kept].max() > 0


# Beside diffusers.


@parity
@pytest.mark.parametrize(
    ("kind", "channels", "sampler", "strength"),
    [
        *(
            ("sd1", channels, sampler, strength)
            for channels in (4, 9)
            for sampler in ("ddim", "euler", "dpmpp_2m")
            for strength in (1.0, 0.6)
        ),
        ("sdxl", 9, "euler", 1.0),
    ],
)
def test_latents_match_diffusers(models, nine, final_latents, monkeypatch, tmp_path, kind, channels, sampler, strength):
    """Our encoder returns the mean of the posterior, so theirs must too; both start from the same noise."""
    import diffusers

    if channels == 4:
        theirs, ours = models(kind)
    else:
        theirs, ours = nine if kind == "sd1" else pair("sdxl", tmp_path, in_channels=9)
    base = with_scheduler(theirs, sampler, monkeypatch)
    name = "StableDiffusionXLInpaintPipeline" if kind == "sdxl" else "StableDiffusionInpaintPipeline"
    pipeline = getattr(diffusers, name)(**base.components, **settings_of(base))
    module = sys.modules[type(pipeline).__module__]
    noise = start()
    monkeypatch.setattr(module, "retrieve_latents", lambda encoded, **_: encoded.latent_dist.mode())
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: oracle.channels_first(noise))
    images = [photo(32, 32, i) for i in range(2)]
    masks = [rectangle((32, 32), box) for box in ((8, 4, 24, 32), (0, 16, 12, 28))]
    pipeline.set_progress_bar_config(disable=True)
    how = {"height": 32, "width": 32, "strength": strength, "num_inference_steps": 8, "guidance_scale": 5.0}
    final = pipeline(
        prompt=PROMPTS, negative_prompt=NEGATIVES, image=images, mask_image=masks, output_type="latent", **how
    ).images  # fmt: skip
    ours.inpaint(
        PROMPTS, images, masks, strength=strength, negative_prompt=NEGATIVES, steps=8, guidance=5.0, sampler=sampler,
        latents=noise, progress=False,
    )  # fmt: skip
    final = oracle.channels_last(final)
    assert np.isfinite(final).all()
    assert np.abs(final_latents() - final).max() <= 1e-3 * max(1.0, np.abs(final).max())


def test_a_model_of_nine_channels_draws_without_a_mask_too(nine):
    """Then the whole picture counts as masked."""
    _, ours = nine
    drawn = ours.text2image("a red heart", height=32, width=32, **quickly)
    white = Image.new("L", (32, 32), 255)
    same = ours.inpaint("a red heart", photo(32, 32), white, mask_blur=0, **quickly)
    assert np.abs(pixels_of(drawn) - pixels_of(same)).max() <= 1
    assert ours.img2img("a red heart", photo(32, 32), **quickly)[0].size == (32, 32)


# What is kept.


@st.composite
def problems(draw):
    """Draws (image, mask of soft and hard strokes, settings, a seed)."""
    width, height = draw(st.integers(9, 90)), draw(st.integers(9, 90))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mask = Image.new("L", (width, height))
    pen = ImageDraw.Draw(mask)
    for _ in range(draw(st.integers(1, 4))):
        points = rng.integers(0, [width, height], (2, 2))
        pen.line([tuple(map(int, point)) for point in points], int(rng.integers(1, 256)), int(rng.integers(1, 30)))
    masking = complete(
        {
            "mask_grow": draw(st.integers(0, 3)),
            "mask_blur": draw(st.integers(0, 8)),
            "only_masked": draw(st.booleans()),
            "padding": draw(st.integers(0, 40)),
        }
    )
    return photo(width, height, int(rng.integers(1000))), mask, masking, int(rng.integers(2**32))


@settings(max_examples=200, deadline=None)
@given(problems())
def test_pixels_outside_any_mask_are_those_of_the_image(problem):
    image, mask, masking, seed = problem
    frame = make_frame(image, mask, masking, size=None, native=32, multiple=8)
    pixels, drawn_mask = frame.canvas()
    assert pixels.shape[:2] == drawn_mask.shape == frame.drawn
    assert not any(side % 8 for side in frame.drawn)
    painted = np.random.default_rng(seed).uniform(size=pixels.shape).astype(np.float32)
    pasted = frame.paste(painted)
    assert pasted.size == image.size
    kept = frame.mask == 0
    np.testing.assert_array_equal(np.asarray(pasted)[kept], np.asarray(image)[kept])
    assert (np.asarray(mask)[kept] == 0).all()
    if masking["mask_grow"] == 0:
        assert (kept == (np.asarray(mask) == 0)).all()


@pytest.mark.parametrize("size", [(64, 64), (61, 50), (9, 13)])
@pytest.mark.parametrize("how", [{}, {"only_masked": True}, {"strength": 0.6, "fill": "blurred"}, {"mask_blur": 0}])
def test_a_drawing_keeps_the_rest_of_the_image(tiny, size, how):
    image = photo(*size)
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).ellipse((size[0] // 3, size[1] // 3, size[0] - 2, size[1] - 2), fill=255)
    (drawn,) = tiny.inpaint("a red heart", image, mask, **(quickly | how))
    assert drawn.size == size
    assert_kept(drawn, image, mask)


def test_height_and_width_resize_image_and_mask_first(tiny):
    image, mask = photo(100, 80), rectangle((50, 40), (10, 10, 30, 30))
    (drawn,) = tiny.inpaint("a red heart", image, mask, height=40, width=48, **quickly)
    assert drawn.size == (48, 40)
    resized = image.resize((48, 40), Image.Resampling.LANCZOS)
    assert_kept(drawn, resized, mask.resize((48, 40), Image.Resampling.BILINEAR))


def test_transparency_is_the_mask_where_none_is_given(tiny):
    image = photo(64, 64).convert("RGBA")
    hole = rectangle((64, 64), (10, 20, 50, 60))
    image.putalpha(hole.point(lambda value: 255 - value))
    (drawn,) = tiny.inpaint("a red heart", image, **quickly)
    assert drawn.mode == "RGB"
    assert_kept(drawn, image.convert("RGB"), hole)
    (same,) = tiny.inpaint("a red heart", image, hole, **quickly)
    np.testing.assert_array_equal(np.asarray(drawn), np.asarray(same))


def test_outpainting_keeps_the_picture_in_its_place(tiny):
    image = photo(40, 48)
    wider, mask = inpainting.outpainted(image, rectangle((40, 48), (0, 0, 5, 5)), left=8, right=16, bottom=3)
    assert wider.size == mask.size == (64, 51)
    (drawn,) = tiny.inpaint("a red heart", wider, mask, **quickly)
    assert drawn.size == (64, 51)
    inner = np.s_[5:48, 13:48]
    np.testing.assert_array_equal(np.asarray(drawn)[inner], np.asarray(image)[5:, 5:])
    assert np.asarray(mask)[0, 8] == 255 and np.asarray(mask)[20, 20] == 0 and np.asarray(mask)[50].all()
    with pytest.raises(ConfigError, match="outpaint = 0, 0, 0, 0"):
        inpainting.outpainted(image)


def test_only_masked_draws_the_region_larger(tiny):
    """The crop holds the mask and its padding, has the aspect of the drawing, and lies inside the picture."""
    image, mask = photo(200, 120), rectangle((200, 120), (150, 10, 170, 20))
    frame = make_frame(image, mask, complete({"only_masked": True, "padding": 10}), size=None, native=64, multiple=8)
    assert frame.drawn == (64, 64)
    left, top, right, bottom = frame.box
    assert right - left == bottom - top == 40
    assert left <= 140 and right >= 180 and top == 0 and bottom == 40
    (drawn,) = tiny.inpaint("a red heart", image, mask, only_masked=True, padding=10, **quickly)
    assert_kept(drawn, image, mask)
    two = [image, photo(90, 70)]
    masks = [mask, rectangle((90, 70), (0, 0, 30, 30))]
    drawn = tiny.inpaint(["a red heart", "taco"], two, masks, only_masked=True, **quickly)
    for each in zip(drawn, two, masks, strict=True):
        assert_kept(*each)


# What is painted.


def test_fills_differ_below_full_strength_and_not_at_it(tiny):
    image, mask = photo(64, 64), rectangle((64, 64), (16, 16, 56, 56))
    draw = functools.partial(tiny.inpaint, "a red heart", image, mask, **quickly)
    fills = choices(declarations()["fill"][0])
    partly = [pixels_of(draw(fill=fill, strength=0.7)) for fill in fills]
    for i, one in enumerate(partly):
        assert all(np.abs(one - other).max() > 5 for other in partly[:i])
    whole = [pixels_of(draw(fill=fill)) for fill in fills]
    assert all((one == whole[0]).all() for one in whole)


def test_grey_is_painted_for_its_share_of_the_steps(tiny, final_latents):
    """The last share of them: a grey mask gives img2img of that strength, a white one text2image; black stays."""
    image, how = photo(64, 64), {"steps": 4, "sampler": "ddim", "guidance": 3.0, "progress": False}
    for value, strength in ((63, 0.25), (127, 0.5), (191, 0.75), (255, 1.0)):
        tiny.inpaint("a red heart", image, Image.new("L", (64, 64), value), **how)
        latents = final_latents()
        if strength < 1:
            tiny.img2img("a red heart", image, strength=strength, **how)
        else:
            tiny.text2image("a red heart", **how)
        np.testing.assert_allclose(latents, final_latents(), atol=1e-4, err_msg=str(value))
    tiny.inpaint("a red heart", image, rectangle((64, 64), (0, 0, 64, 32), 127), **how)
    true = np.asarray(tiny.encode_image([image]))
    np.testing.assert_allclose(final_latents()[:, 8:], true[:, 8:], atol=1e-5)
    assert np.abs(final_latents() - true)[:, :8].mean() > 0.1


def test_the_ramp_lies_inside_the_mask_and_reaches_one():
    mask = np.zeros((40, 60), np.float32)
    mask[10:30, 10:40] = 1
    mask[35, 5:50] = 1  # one pixel thin
    ramp = inpainting.soft_edge(mask, 4)
    assert (ramp[mask == 0] == 0).all()
    assert (ramp[mask > 0] > 0).all()
    np.testing.assert_allclose(ramp[10:16, 25], [0.2, 0.4, 0.6, 0.8, 1, 1], rtol=1e-6)
    assert (ramp[35, 8:47] == 1).all()
    np.testing.assert_array_equal(inpainting.soft_edge(np.ones((8, 8), np.float32), 4), 1)  # no edge at the border
    np.testing.assert_array_equal(inpainting.soft_edge(mask, 0), mask)


def test_spread_carries_known_values_on():
    y, x = np.mgrid[:32, :48].astype(np.float32)
    values = np.stack([x, y, 0 * x + 7], axis=-1)
    known = np.ones((32, 48), bool)
    known[8:24, 16:32] = False
    filled = inpainting.spread(values, known)
    assert np.abs(filled - values)[~known].mean() < 3
    np.testing.assert_allclose(filled[..., 2], 7, rtol=1e-5)


def test_a_cell_has_the_largest_value_of_its_pixels():
    masks = np.zeros((1, 4, 6), np.float32)
    masks[0, 1, 2], masks[0, 3, 5], masks[0, 2, 4] = 0.5, 0.25, 1
    np.testing.assert_array_equal(inpainting.cells(masks, 2)[0, ..., 0], [[0, 0.5, 0], [0, 0, 1]])


def seam(picture, mask):
    """The mean step between two neighbouring pixels of which one is painted."""
    inside = np.asarray(mask) > 0
    steps = []
    for axis in (0, 1):
        crossing = np.diff(inside.astype(int), axis=axis) != 0
        step = lambda values, axis=axis: np.abs(np.diff(np.asarray(values, float), axis=axis)).mean(axis=-1)
        steps.append(step(picture)[crossing])
    return float(np.concatenate(steps).mean())


def test_the_seam_is_softer_than_a_plain_pastes():
    """The painted picture is the image but for the shift in colour that autoencoders cause."""
    plain, soft = [], []
    for i in range(8):
        image = photo(96, 80, i)
        mask = Image.new("L", image.size)
        ImageDraw.Draw(mask).ellipse((20, 15, 70, 65), fill=255)
        rng = np.random.default_rng(i)
        painted = np.clip(np.asarray(image, np.float32) / 255 + rng.normal(0, 0.06, 3), 0, 1).astype(np.float32)
        for seams, blur in ((plain, 0), (soft, complete({})["mask_blur"])):
            frame = make_frame(image, mask, complete({"mask_blur": blur}), size=None, native=64, multiple=8)
            seams.append(seam(frame.paste(painted), mask))
    plain, soft = map(np.mean, (plain, soft))
    print(f"step at the seam: plain {plain:.1f}, soft edge {soft:.1f}")
    assert soft < 0.6 * plain


def test_nothing_is_compiled_for_another_mask_or_setting(tiny):
    image, mask = photo(64, 64), rectangle((64, 64), (16, 16, 56, 56))
    draw = functools.partial(tiny.inpaint, progress=False)
    draw("a red heart", image, mask, steps=2)
    draw("a red heart", image, mask, steps=2, strength=0.5, fill="noise")
    for i, change in enumerate(
        (
            {"seed": 9},
            {"strength": 0.8},
            {"strength": 0.8, "fill": "noise"},
            {"strength": 0.8, "fill": "blurred"},
            {"mask_grow": 3, "mask_blur": 9},
            {"only_masked": True},
            {"sampler": "euler_a"},
            {"steps": 5},
        )
    ):
        other = rectangle((64, 64), (i, 2 * i, 40, 50 + i), 255 - i)
        assert compilations(lambda c=change, m=other: draw("taco", image, m, **({"steps": 4} | c))) == 0, change


@pytest.mark.parametrize(
    ("mask", "how", "message"),
    [
        (Image.new("L", (64, 64)), {}, "the mask is black all over"),
        (None, {}, "no mask is given, and the image has no transparent part"),
        ("mask.png", {}, "the mask is a str: give a PIL image"),
        (Image.new("F", (64, 64), 1), {}, "the mask has mode F"),
        ([Image.new("L", (64, 64), 255)] * 2, {}, "2 masks for 1 images"),
        (Image.new("L", (64, 64), 255), {"fill": "magic"}, "fill = 'magic': expected one of original, noise"),
        (Image.new("L", (64, 64), 255), {"mask_blur": -1}, "mask_blur = -1: expected at least 0 and at most 1024"),
        (Image.new("L", (64, 64), 255), {"strength": 0}, "strength = 0.0: expected above 0"),
        (
            Image.new("L", (64, 64), 255),
            {"height": 60},
            "height = 60: expected at least 8 and at most 16384, a multiple of 8",
        ),
    ],
)
def test_what_cannot_be_painted_is_refused(tiny, mask, how, message):
    with pytest.raises(ConfigError, match=message):
        tiny.inpaint("a red heart", photo(64, 64), mask, **how)


def test_images_of_several_sizes_are_refused(tiny):
    images, mask = [photo(64, 64), photo(40, 64)], rectangle((64, 64), (0, 0, 20, 20))
    with pytest.raises(ConfigError, match="images of several sizes"):
        tiny.inpaint("a red heart", images, mask, num_images=2)
