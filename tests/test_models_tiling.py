"""The autoencoder in tiles, beside the autoencoder on the whole picture."""

import numpy as np
import pytest

from sdjax.errors import ConfigError
from sdjax.models.tiling import Tiling, tiled


@pytest.mark.parametrize("side", [36, 20])
def test_tiles_of_a_pointwise_function_give_the_whole(side):
    """All tiles have one shape, whatever the size of the picture, so that there is one program for them."""
    values = np.random.default_rng(0).normal(size=(1, side, 52, 3)).astype(np.float32)
    shapes = set()

    def enlarge(tile):
        shapes.add(tile.shape)
        return np.repeat(np.repeat(2 * tile, 4, 1), 4, 2)

    enlarged = tiled(enlarge, values, Tiling(64, 16), factor=4, encode=False, channels=3)
    np.testing.assert_allclose(enlarged, np.repeat(np.repeat(2 * values, 4, 1), 4, 2), rtol=1e-5, atol=1e-6)
    assert shapes == {(1, 16, 16, 3)}
    back = tiled(lambda tile: tile[:, ::4, ::4] / 2, enlarged, Tiling(64, 16), factor=4, encode=True, channels=3)
    np.testing.assert_allclose(back, values, rtol=1e-5, atol=1e-6)


def test_tiles_are_nearly_the_whole_and_show_no_seam(tiny):
    """Each tile has other statistics in its norms, so tiles differ in colour; blending hides the difference."""
    image = tiny.text2image("cat face", guidance=3.0, height=128, width=128, steps=8, progress=False)[0]
    model, in_tiles = tiny.model, tiny.model.with_tiled_vae(tile=64, overlap=24)
    latents = np.asarray(model.encode_image([image]))
    error = np.abs(np.asarray(in_tiles.encode_image([image])) - latents)
    whole, blended = np.asarray(model.decode_latents(latents)), np.asarray(in_tiles.decode_latents(latents))
    halves = [np.asarray(model.decode_latents(latents[:, :, start : start + 16])) for start in (0, 16)]
    side_by_side = np.concatenate(halves, axis=2)

    def seam(decoded):
        """The largest step of the error from one column to the next, where tiles meet or overlap."""
        columns = (decoded - whole)[0].mean(axis=0) * 255
        return np.abs(np.diff(columns, axis=0))[32:96].max()

    print(f"latents within {error.mean():.3f} of {latents.std():.2f} (mean); a seam of {seam(blended):.1f} / 255")
    assert error.mean() < 0.12 * latents.std()
    assert np.abs(blended - whole).mean() * 255 < 4
    assert seam(blended) < seam(side_by_side) / 8


def test_in_the_margin_of_a_tile_its_neighbour_decides():
    """What a tile spoils along its edges is seen only where the picture ends."""

    def spoil(tile):
        spoiled = np.ones_like(tile)
        spoiled[:, 3:-3, 3:-3] = tile[:, 3:-3, 3:-3]
        return spoiled

    values = np.zeros((1, 40, 52, 3), np.float32)
    result = tiled(spoil, values, Tiling(20, 10, margin=3), factor=1, encode=False, channels=3)
    assert result[:, 3:-3, 3:-3].max() < 1e-4
    assert result[:, 0].min() == result[:, :, -1].min() == 1


@pytest.mark.parametrize("sizes", [(8, 0), (64, 33), (64, -1)])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ConfigError, match="overlap 0 to half of tile"):
        Tiling(*sizes)
