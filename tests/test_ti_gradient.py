"""The gradient that moves new words, through both text models and the U-Net, against PyTorch's."""

import jax
import jax.numpy as jnp
import micro
import numpy as np
import oracle
import pytest

from sdjax.train.results import NOTHING
from sdjax.train.stages import plan_run, prepare
from sdjax.train.step import Draws, distance, variables

pytestmark = pytest.mark.parity
WORDS = {"placeholder_tokens": ["<a>", "<b>"], "vectors_per_token": [2, 1], "init_tokens": ["red", "<rand-0.5>"]}
CAPTIONS = ["a <a> and a <b>", "<b> emoji", "red heart", "<a>"]


@pytest.mark.parametrize("sdxl", [False, True], ids=["sd", "sdxl"])
def test_gradient_of_the_rows_is_pytorchs(tmp_path, sdxl):
    folder, images = micro.make_model(tmp_path / "model", sdxl=sdxl), micro.make_images(tmp_path / "images")
    stage = {"train": ["textual_inversion"], "learning_rate": 1e-2, **WORDS}
    run = plan_run(micro.settings(folder, images, tmp_path / "run", stages=[stage]))
    plan, recipe = run.stages[0], run.stages[0].recipe
    state, frozen = prepare(run, plan, NOTHING)
    rng = np.random.default_rng(0)
    latents, noise = (rng.normal(size=(4, 8, 8, 4)).astype(np.float32) for _ in range(2))
    timesteps = np.array([10, 300, 600, 990])
    ids = recipe.outline.tokenize(CAPTIONS)
    batch = {**ids, "moments": np.zeros((4, 8, 8, 8), np.float32)}
    draws = Draws(latents, noise, jnp.asarray(timesteps), jnp.zeros(()), jnp.zeros(()))

    @jax.jit
    @jax.value_and_grad
    def loss(trainable):
        return jnp.mean(distance(recipe, variables(recipe, trainable, frozen), batch, draws))

    value, gradient = loss(state.trainable)
    their_value, theirs = pytorch(folder, recipe.outline, state.trainable, ids, latents, noise, timesteps)
    assert float(value) == pytest.approx(their_value, rel=1e-4)
    for name, rows in gradient["textual_inversion"].items():
        assert oracle.error(rows, theirs[name]) <= 1e-3, name


def pytorch(folder, model, trainable, ids, latents, noise, timesteps):
    """Loss and d loss / d rows by text model, as diffusers' training scripts compute them."""
    import torch
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    tables, hidden, pooled = {}, [], None
    for name in model.text_models:
        second = name == "text_encoder_2"
        text = (CLIPTextModelWithProjection if second else CLIPTextModel).from_pretrained(folder / name)
        size = text.config.vocab_size
        new = trainable["textual_inversion"][name]
        text.resize_token_embeddings(size + len(new), mean_resizing=False)
        table = text.get_input_embeddings().weight
        with torch.no_grad():
            table[size:] = oracle.tensor(new)
        output = text(oracle.tensor(ids[name][:, 0]).long(), output_hidden_states=True)
        hidden.append(output.hidden_states[-2] if model.is_sdxl else output.last_hidden_state)
        pooled, tables[name] = output.text_embeds if second else None, (table, size)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    latents, noise = (oracle.channels_first(array) for array in (latents, noise))
    timesteps = torch.from_numpy(timesteps)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    side = 8.0 * model.vae.config.factor
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[side, side, 0, 0, side, side]] * len(latents))}
    output = unet(noisy, timesteps, torch.cat(hidden, -1), added_cond_kwargs=added if model.is_sdxl else None).sample
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
    loss = (output - target).square().mean()
    loss.backward()
    return loss.item(), {name: table.grad[size:].numpy() for name, (table, size) in tables.items()}
