"""Training beside a plain loop of PyTorch, with diffusers, transformers and peft: gradients, and fifty steps.

The fifty steps are a whole run of ours, from a folder of pictures to its export. The loop begins with the weights of
the same files, and in each step it is given the captions, latents, noise and time steps that our step takes. The runs
also have the settings `clip_skip`, `prediction_type`, `zero_terminal_snr`, `on_nan` and `export_dtype`. SDXL and the
distillation to a model of few steps take twenty steps.
"""

import functools
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import micro
import numpy as np
import oracle
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from schedules import CONFIGS

from sdjax import lora
from sdjax.data.dataset import Dataset, make_batch
from sdjax.data.order import choose
from sdjax.formats.lora_file import save_lora
from sdjax.formats.parameter_names import to_state_dict
from sdjax.formats.weights_file import read_tensors
from sdjax.train import checkpoint, loop, stages
from sdjax.train.encoding import encode
from sdjax.train.results import NOTHING
from sdjax.train.step import diffusion_loss, draw

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

LORA = {"train": ["lora"], "lora_rank": 4, "lora_alpha": 2.0, "lora_targets": "attention"}
WORDS = {
    "train": ["textual_inversion"],
    "placeholder_tokens": ["<plana>", "<sky>"],
    "vectors_per_token": [2, 1],
    "init_tokens": ["red circle", "green"],
    "template": ["a photo of {}", "{} on white"],
}


class Given(NamedTuple):
    """What one step is given. All but the captions are torch tensors, images with the channels first."""

    captions: list[str]
    latents: Any
    noise: Any
    perturbation: Any
    timesteps: Any
    sizes: Any
    """SDXL's numbers, [B, 6]."""
    guidance: Any
    """The teacher's, in consistency distillation, [B]."""


def given(run: stages.Run, dataset: Dataset) -> Iterator[Given]:
    """Yields what each step of a run of one stage takes."""
    (plan,), (bucket,) = run.stages, dataset.buckets
    order, key = plan.order(dataset.repeats, run.config.seed), plan.keys(run.config.seed)[1]
    drawn = jax.jit(functools.partial(draw, plan.recipe))
    for number in range(plan.stage.steps):
        batch, chosen = loop.make_batch(dataset, order, number), choose(order, number)
        shown = zip(chosen.example, chosen.version, chosen.drop, strict=True)
        captions = ["" if drop else bucket.records[i].captions[version] for i, version, drop in shown]
        draws = drawn({name: batch[name] for name in ("moments", "index")}, jax.random.fold_in(key, number))
        images = map(oracle.channels_first, (draws.latents, draws.noise, draws.perturbation))
        sizes = oracle.tensor(batch["sizes"]) if "sizes" in batch else None
        yield Given(captions, *images, oracle.tensor(draws.timesteps).long(), sizes, oracle.tensor(draws.guidance))


class Theirs:
    """The models of a folder in PyTorch with what a stage trains, and the loop that trains it."""

    def __init__(self, folder: Path, stage: dict[str, Any], settings: dict[str, Any]) -> None:
        from diffusers import DDPMScheduler, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        self.stage, self.is_sdxl = stage, (folder / "text_encoder_2").exists()
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet")
        self.texts = {"text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder")}
        if self.is_sdxl:
            second = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2")
            self.texts["text_encoder_2"] = second
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")  # the second is the same in these models
        self.schedule = DDPMScheduler.from_pretrained(
            folder / "scheduler",
            prediction_type=settings.get("prediction_type", "epsilon"),
            rescale_betas_zero_snr=settings.get("zero_terminal_snr", False),
        )
        self.clip_skip = settings.get("clip_skip", 2 if self.is_sdxl else 1)
        self.tokens = {}
        models = {"unet": self.unet, **self.texts}
        for model in models.values():
            model.requires_grad_(False)
        if stage["train"] == ["textual_inversion"]:
            self.trained = self.texts
            self._add_words(*map(stage.get, ("placeholder_tokens", "vectors_per_token", "init_tokens")))
            return
        self.adapted = stage.get("lora_parts", ["unet"]) if "lora" in stage["train"] else []
        self.trained = {part: model for part, model in models.items() if part in (*self.adapted, *stage["train"])}
        for part, model in self.trained.items():
            self._add_adapter(part, model) if part in self.adapted else model.requires_grad_(True)

    def _add_adapter(self, part: str, model: Any) -> None:
        import torch
        from peft import LoraConfig

        torch.manual_seed(0)
        attention = (
            ["to_q", "to_k", "to_v", "to_out.0"] if part == "unet" else ["q_proj", "k_proj", "v_proj", "out_proj"]
        )
        rank, alpha = self.stage["lora_rank"], self.stage["lora_alpha"]
        model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=attention))

    def _add_words(self, words: list[str], counts: list[int], inits: list[str]) -> None:
        """Adds each word as the tokens `<w>`, `<w>_1`, ..., whose vectors begin as those of its init words."""
        import torch

        (text,) = self.texts.values()
        self.known, ids = len(text.get_input_embeddings().weight), []
        for word, count, init in zip(words, counts, inits, strict=True):
            self.tokens[word] = [word, *(f"{word}_{i}" for i in range(1, count))]
            self.tokenizer.add_tokens(self.tokens[word])
            ids += self.tokenizer(init, add_special_tokens=False).input_ids
        text.resize_token_embeddings(self.known + len(ids), mean_resizing=False)
        self.table = text.get_input_embeddings().weight.requires_grad_(True)
        with torch.no_grad():
            self.table[self.known :] = self.table[ids]

    @property
    def parameters(self) -> list[Any]:
        """What the optimizer moves."""
        return [p for model in self.trained.values() for p in model.parameters() if p.requires_grad]

    def conditions(self, captions: list[str]) -> tuple[Any, Any]:
        """Returns the context and the last text model's pooled vector."""
        import torch

        for word, tokens in self.tokens.items():
            captions = [caption.replace(word, " ".join(tokens)) for caption in captions]
        length = self.tokenizer.model_max_length
        how = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        ids = self.tokenizer(captions, **how).input_ids
        outputs = [text(ids, output_hidden_states=True) for text in self.texts.values()]
        contexts = [output.hidden_states[-self.clip_skip] for output in outputs]
        if self.is_sdxl:
            return torch.cat(contexts, dim=-1), outputs[-1].text_embeds
        return self.texts["text_encoder"].final_layer_norm(contexts[0]), None

    def loss(self, given: Given) -> Any:
        import torch
        from diffusers.training_utils import compute_snr

        if self.stage.get("consistency_steps"):
            return self.consistency_loss(given)
        captions, latents, noise, perturbation, timesteps, sizes, _ = given
        perturbed = noise + self.stage.get("input_perturbation", 0.0) * perturbation
        noisy = self.schedule.add_noise(latents, perturbed, timesteps)
        context, pooled = self.conditions(captions)
        added = {"text_embeds": pooled, "time_ids": sizes} if self.is_sdxl else None
        predicted = self.unet(noisy, timesteps, context, added_cond_kwargs=added).sample
        velocity = self.schedule.config.prediction_type == "v_prediction"
        target = self.schedule.get_velocity(latents, noise, timesteps) if velocity else noise
        error = torch.nn.functional.mse_loss(predicted, target, reduction="none").mean(dim=(1, 2, 3))
        if gamma := self.stage.get("min_snr_gamma"):
            snr = compute_snr(self.schedule, timesteps)
            error = error * torch.clamp(snr, max=gamma) / (snr + 1 if velocity else snr)
        return error.mean()

    def consistency_loss(self, given: Given) -> Any:
        """LCM's loss of a model that predicts noise, with diffusers' step of DDIM and the numbers of its sampler."""
        import torch
        from diffusers import DDIMScheduler, LCMScheduler

        solver = DDIMScheduler.from_config(self.schedule.config, clip_sample=False, set_alpha_to_one=False)
        solver.set_timesteps(self.stage["consistency_steps"])
        scalings = LCMScheduler.from_config(self.schedule.config).get_scalings_for_boundary_condition_discrete
        skip = self.schedule.config.num_train_timesteps // self.stage["consistency_steps"]
        start = torch.div(given.timesteps, skip, rounding_mode="floor") * skip + skip - 1
        end = (start - skip).clamp(min=0)
        context, pooled = self.conditions(given.captions)
        nothing, _ = self.conditions([""] * len(given.captions))

        def unet(x, timesteps, context, pooled):
            added = {"text_embeds": pooled, "time_ids": given.sizes} if self.is_sdxl else None
            return self.unet(x, timesteps, context, added_cond_kwargs=added).sample

        def result(x, timesteps):
            output = unet(x, timesteps, context, pooled)
            alpha = self.schedule.alphas_cumprod[timesteps].sqrt()[:, None, None, None]
            sigma = (1 - alpha**2).sqrt()
            denoised = (x - sigma * output) / alpha
            factors = [torch.stack(both)[:, None, None, None] for both in zip(*map(scalings, timesteps), strict=True)]
            return factors[0] * x + factors[1] * denoised

        x = self.schedule.add_noise(given.latents, given.noise, start)
        with torch.no_grad():
            self.unet.disable_adapters()
            # SDXL takes zeros for an empty caption, as its config says.
            zeros = (torch.zeros_like(nothing), torch.zeros_like(pooled)) if self.is_sdxl else (nothing, pooled)
            conditional, unconditional = unet(x, start, context, pooled), unet(x, start, *zeros)
            self.unet.enable_adapters()
            guided = unconditional + given.guidance[:, None, None, None] * (conditional - unconditional)
            each = [solver.step(*one, eta=0.0).prev_sample for one in zip(guided, start.tolist(), x, strict=True)]
            target = result(torch.stack(each), end)
        c, difference = self.stage["huber_c"], result(x, start) - target
        return 2 * c * (torch.sqrt(difference**2 + c**2) - c).mean()

    def train(self, steps: Iterable[Given]) -> list[dict[str, float | None]]:
        """Trains, and returns the loss, the learning rate and the norm of the gradient of each step."""
        import torch
        from diffusers.optimization import get_scheduler

        matrices, vectors = ([p for p in self.parameters if (p.ndim > 1) == several] for several in (True, False))
        groups = [
            {"params": matrices, "weight_decay": self.stage["weight_decay"]},
            {"params": vectors, "weight_decay": 0.0},  # as in sdjax
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.stage["learning_rate"])
        rates = get_scheduler(
            self.stage["schedule"],
            optimizer,
            num_warmup_steps=self.stage["warmup_steps"],
            num_training_steps=self.stage["steps"],
        )
        frozen = self.table[: self.known].detach().clone() if self.tokens else None
        lines = []
        for given in steps:
            loss = self.loss(given)
            if not torch.isfinite(loss):
                lines.append({"loss": None, "learning_rate": rates.get_last_lr()[0], "grad_norm": None})
                continue
            loss.backward()
            if self.tokens:
                self.table.grad[: self.known] = 0
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.stage["clip_norm"])
            lines.append({"loss": loss.item(), "learning_rate": rates.get_last_lr()[0], "grad_norm": norm.item()})
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
            if self.tokens:
                with torch.no_grad():
                    self.table[: self.known] = frozen
        return lines

    def tensors(self) -> dict[str, np.ndarray]:
        """Returns what is trained, named as by `by_name` and `read`. The scale of adapters is in B, as in our files."""
        from peft.utils import get_peft_model_state_dict

        if self.tokens:
            return {"words": self.table[self.known :].detach().numpy().copy()}
        tensors = {}
        for part, model in self.trained.items():
            state = get_peft_model_state_dict(model) if part in self.adapted else model.state_dict()
            for name, value in state.items():
                scale = self.stage["lora_alpha"] / self.stage["lora_rank"] if "lora_B" in name else 1.0
                value = value.numpy() * np.float32(scale)
                tensors[f"{part}.{name.replace('text_model.', '')}"] = value
        return tensors

    def save_adapters(self, folder: Path) -> str:
        """Writes the adapters as diffusers does, with peft's configuration, and returns the path."""
        from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
        from peft.utils import get_peft_model_state_dict

        pipeline = StableDiffusionXLPipeline if self.is_sdxl else StableDiffusionPipeline
        states, settings = {}, {}
        for part in self.adapted:
            model = self.trained[part]
            states[f"{part}_lora_layers"] = get_peft_model_state_dict(model)
            settings[f"{part}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
        pipeline.save_lora_weights(folder, **states, **settings)
        return str(folder / "pytorch_lora_weights.safetensors")


def by_name(trees: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns the weights of parts as diffusers names them, without `text_model`, which transformers 5 leaves out."""
    return {
        f"{part}.{name}": value
        for part, params in trees.items()
        for name, value in to_state_dict(jax.tree.map(np.asarray, params)).items()
    }


def read(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a file that we wrote, as `by_name` names them."""
    return {name.replace("text_model.", ""): value for name, value in read_tensors(path).tensors.items()}


UNET = micro.UNET | {
    "block_out_channels": [16],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["UpBlock2D"],
}


@pytest.fixture(scope="module")
def model_of(micro_models, tmp_path_factory):
    """`model_of(sdxl=False)` -> the folder of a model with a U-Net of diffusers and the scheduler of SD1, for noise.

    velocity: the model predicts v.
    """
    from diffusers import UNet2DConditionModel

    @functools.cache
    def make(*, sdxl, velocity=False):
        folder = shutil.copytree(
            micro_models(**({"sdxl": True} if sdxl else {})), tmp_path_factory.mktemp("model") / "model"
        )
        config = UNET | (micro.XL if sdxl else {})
        shutil.rmtree(folder / "unet")
        oracle.randomised(UNet2DConditionModel(**config)).save_pretrained(folder / "unet")
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(CONFIGS["sd2v" if velocity else "sd1"]))
        return folder

    return make


@pytest.fixture(scope="module")
def config_of(model_of, micro_images, tmp_path_factory):
    """`config_of(output, stage, sdxl=False, velocity=False, **settings)` -> a run of one stage."""
    cache = tmp_path_factory.mktemp("cache")

    def make(output, stage, *, sdxl=False, velocity=False, **settings):
        data = {"path": str(micro_images), "resolution": 16, "batch_size": 4, "cache": str(cache)}
        data |= {} if sdxl else {"caption_dropout": 0.1}
        settings = {"validation": {}, "checkpoint": {"every": 0}, **settings}
        model = model_of(sdxl=sdxl, velocity=velocity)
        return micro.settings(model, micro_images, output, data=data, stages=[stage], **settings)

    return make


# ----------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("kind", ["weights", "adapters"])
def test_gradients_of_sdxl_are_those_of_pytorch(config_of, model_of, tmp_path, kind):
    """Of the U-Net and of both text models: each tensor within 1e-3, the loss within 1e-5."""
    import torch

    parts = ["unet", "text_encoder", "text_encoder_2"]
    stage = {"train": parts} if kind == "weights" else {**LORA, "lora_parts": parts}
    theirs = Theirs(model_of(sdxl=True), stage, {})
    if kind == "adapters":
        with torch.no_grad():  # peft begins with 0 in B, and so with a gradient of 0 in A
            for parameter in theirs.parameters:
                parameter.add_(0.1 * torch.randn(parameter.shape))
        stage["lora_init"] = theirs.save_adapters(tmp_path)
    run = stages.plan_run(config_of(tmp_path / "run", stage, sdxl=True))
    (plan,) = run.stages
    dataset, _ = encode(run, plan, NOTHING)
    state, frozen = stages.prepare(run, plan, NOTHING)
    batch = make_batch(dataset, plan.order(dataset.repeats, 0), 0)
    gradient_of = jax.jit(jax.value_and_grad(functools.partial(diffusion_loss, plan.recipe)))
    value, gradients = gradient_of(state.trainable, frozen, batch, jax.random.fold_in(plan.keys(0)[1], 0))
    if kind == "adapters":
        trees = {part: lora.join(gradients[part], frozen["scales"][part]) for part in parts}
        save_lora(tmp_path / "gradients.safetensors", trees, run.outline.shapes, style="peft")
        ours = read(tmp_path / "gradients.safetensors")
    else:
        ours = by_name(gradients)

    loss = theirs.loss(next(given(run, dataset)))
    loss.backward()
    with torch.no_grad():
        for parameter in theirs.parameters:
            parameter.copy_(0 if parameter.grad is None else parameter.grad)
    expected = theirs.tensors()
    assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    assert ours.keys() == expected.keys()
    sizes = {name: np.linalg.norm(tensor) for name, tensor in expected.items()}
    least = 1e-4 * max(sizes.values())  # a gradient below is rounding of the others
    differences = {name: np.linalg.norm(ours[name] - expected[name]) / max(sizes[name], least) for name in expected}
    worst = max(differences, key=differences.get)
    print(f"{len(expected)} tensors, worst {differences[worst]:.1e}: {worst}")
    assert differences[worst] <= 1e-3, worst
    assert np.mean([size > least for size in sizes.values()]) > 0.5


# --------------------------------------------------------------------------------------------------------- fifty steps

COMMON = {"steps": 50, "schedule": "cosine", "warmup_steps": 5, "weight_decay": 0.1}
VELOCITY = {"prediction_type": "v_prediction", "zero_terminal_snr": True}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {**LORA, "learning_rate": 1e-3, "clip_norm": 0.03},
    "words": {**WORDS, "learning_rate": 5e-3, "clip_norm": 0.02},
    "whole": {"train": ["unet"], "learning_rate": 1e-3, "clip_norm": 1.0},
}
TWENTY = {"steps": 20, "warmup_steps": 2}
DISTILLED = {
    **TWENTY, "consistency_steps": 50, "consistency_guidance": [1.5, 4.0],
    "loss": "huber", "huber_c": 0.05, "huber_schedule": "constant", "clip_norm": 0.007,
}  # fmt: skip
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora noise": ({}, {"clip_skip": 2}),
    "lora v": ({"lora_parts": ["unet", "text_encoder"], "min_snr_gamma": 5.0}, VELOCITY),
    "words noise": ({"min_snr_gamma": 5.0}, {"clip_skip": 2}),
    "words v": ({}, {**VELOCITY, "on_nan": "skip"}),
    "whole noise": ({"input_perturbation": 0.1}, {"export_dtype": "float16", "prediction_type": "epsilon"}),
    "whole v": ({"train": ["unet", "text_encoder"]}, {**VELOCITY, "export_dtype": "bfloat16"}),
    "lora sdxl": (TWENTY, {}),
    "lora distilled sdxl": (DISTILLED, {}),
}
"""What is trained and predicted -> settings of the stage and of the run. prediction_type: other than the model's."""
NOT_FINITE = 20
"""The step of a run with on_nan = "skip" in which the latents are NaN."""


@pytest.mark.parametrize("case", CASES)
def test_fifty_steps_are_those_of_pytorch(config_of, model_of, tmp_path, monkeypatch, case):
    """Losses, learning rates and norms of the gradients within 1e-4, what training changed within 1e-3."""
    stage, settings = CASES[case]
    stage, sdxl = {**COMMON, **KINDS[case.split()[0]], **stage}, "sdxl" in case
    velocity = settings.get("prediction_type") == "epsilon"
    theirs = Theirs(model_of(sdxl=sdxl, velocity=velocity), stage, settings)
    begun = theirs.tensors()
    if stage["train"] == ["lora"]:
        stage["lora_init"] = theirs.save_adapters(tmp_path)
    if "on_nan" in settings:
        monkeypatch.setattr(loop, "make_batch", make_batch_with_a_fault)
    config = config_of(tmp_path / "run", stage, sdxl=sdxl, velocity=velocity, **settings)
    seen = []

    def encode_and_see(run, plan, earlier):
        seen.append((run, encode(run, plan, earlier)))
        return seen[-1][1]

    monkeypatch.setattr(loop, "encode", encode_and_see)
    assert loop.train(config) == 0
    ((run, (dataset, _)),) = seen
    expected, lines = theirs.train(given(run, dataset)), micro.metric_lines(tmp_path / "run")
    assert [line["loss"] for line in lines].count(None) == ("on_nan" in settings)
    worst = {}
    for name in ("loss", "learning_rate", "grad_norm"):
        pairs = [(ours[name], other[name]) for ours, other in zip(lines, expected, strict=True)]
        assert all((ours is None) == (other is None) for ours, other in pairs), name
        worst[name] = max(abs(ours - other) / (abs(other) or 1) for ours, other in pairs if other is not None)
    norms = [line["grad_norm"] for line in expected if line["grad_norm"] is not None]
    print(f"{case}: {worst}, loss {lines[0]['loss']:.3f} to {lines[-1]['loss']:.3f}")
    assert min(norms) < stage["clip_norm"] < max(norms)

    ours, wanted = results(run, stage["train"]), theirs.tensors()
    assert ours.keys() == wanted.keys()
    joined = lambda tensors: np.concatenate([tensors[name].ravel() for name in wanted])
    difference = oracle.error(joined(ours), joined(wanted))
    of_change = np.linalg.norm(joined(ours) - joined(wanted)) / np.linalg.norm(joined(wanted) - joined(begun))
    print(f"weights within {difference:.1e}, {of_change:.1e} of what training changed")
    assert max(worst.values()) <= 1e-4
    assert difference <= 1e-3 and of_change <= 1e-3
    check_export(tmp_path / "run" / "export" / "style", run, settings, ours)


def make_batch_with_a_fault(dataset, order, number):
    batch = make_batch(dataset, order, number)
    return batch | {"moments": np.full_like(batch["moments"], np.nan)} if number == NOT_FINITE else batch


def results(run: stages.Run, train: list[str]) -> dict[str, np.ndarray]:
    """Returns what a finished run has trained, with the names of diffusers' files."""
    folder = Path(run.config.output)
    if train == ["lora"]:
        return read(folder / "export" / "style" / "pytorch_lora_weights.safetensors")
    if train == ["textual_inversion"]:
        files = [load_file(folder / "export" / "style" / f"{word}.safetensors") for word in ("plana", "sky")]
        return {"words": np.concatenate([next(iter(file.values())) for file in files])}
    expected = {"earlier": NOTHING, "state": run.stages[0].state}
    return by_name(checkpoint.restore(folder / "checkpoints", lambda _: expected).state["state"].trainable)


def check_export(folder: Path, run: stages.Run, settings: dict[str, Any], trained: dict[str, np.ndarray]) -> None:
    """Asserts that the export says what the model predicts, from which layer, and has the number type asked for."""
    velocity = settings.get("prediction_type") == "v_prediction"
    clip_skip = settings.get("clip_skip", 2 if run.outline.is_sdxl else 1)
    if (folder / "model").exists():
        schedule = json.loads((folder / "model" / "scheduler" / "scheduler_config.json").read_text())
        assert schedule.get("prediction_type", "epsilon") == settings.get("prediction_type", "epsilon")
        assert schedule.get("rescale_betas_zero_snr", False) == velocity
        dtype = jax.numpy.dtype(settings["export_dtype"])
        for part in run.config.stages[0].train:
            (path,) = (folder / "model" / part).glob("*.safetensors")
            for name, tensor in read(path).items():
                assert tensor.dtype == dtype
                np.testing.assert_array_equal(tensor, trained[f"{part}.{name}"].astype(dtype), err_msg=name)
        return
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            metadata = file.metadata()
        if path.name != "pytorch_lora_weights.safetensors":
            assert metadata["modelspec.prediction_type"] == ("v" if velocity else "epsilon")
            assert metadata["modelspec.encoder_layer"] == str(clip_skip)
