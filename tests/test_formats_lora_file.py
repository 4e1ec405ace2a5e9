"""LoRA files: each spelling of the keys gives the same LoRA, a saved file reads back, and errors name each fault."""

import hashlib
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from sdjax.errors import ConfigError, DataError
from sdjax.formats.lora_file import load_lora, save_lora
from sdjax.formats.safetensors_file import read_safetensors, save_safetensors
from sdjax.trees import layers, nest

# The layers of a small model: (part, path) -> name of the module in diffusers, shape of the kernel.

ATTENTION = "down_blocks_0/attentions_0/transformer_blocks_0"
SD1 = {
    ("unet", "conv_in"): ("conv_in", (3, 3, 4, 8)),
    ("unet", "time_embedding/linear_1"): ("time_embedding.linear_1", (8, 16)),
    ("unet", "down_blocks_0/attentions_0/proj_in"): ("down_blocks.0.attentions.0.proj_in", (1, 1, 8, 8)),
    ("unet", f"{ATTENTION}/attn1/to_q"): ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", (8, 8)),
    ("unet", f"{ATTENTION}/attn1/to_out_0"): ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0", (8, 8)),
    ("unet", f"{ATTENTION}/attn2/to_k"): ("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", (6, 8)),
    ("unet", f"{ATTENTION}/ff/net_0/proj"): ("down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj", (8, 32)),
    ("unet", "down_blocks_0/resnets_0/conv1"): ("down_blocks.0.resnets.0.conv1", (3, 3, 8, 10)),
    ("text_encoder", "encoder/layers_0/self_attn/q_proj"): ("encoder.layers.0.self_attn.q_proj", (6, 6)),
    ("text_encoder", "encoder/layers_0/self_attn/out_proj"): ("encoder.layers.0.self_attn.out_proj", (6, 6)),
    ("text_encoder", "encoder/layers_0/mlp/fc1"): ("encoder.layers.0.mlp.fc1", (6, 24)),
}
SDXL_TEXT = {
    ("text_encoder_2", "encoder/layers_0/self_attn/q_proj"): ("encoder.layers.0.self_attn.q_proj", (7, 7)),
    ("text_encoder_2", "text_projection"): ("text_projection", (7, 7)),
}


def place(key):
    return (key[0], *key[1].split("/"))


def expected(table):
    return nest(
        {(*path, "kernel"): jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes_of(table).items()}
    )


def random_lora(shapes, *, ranks=(4,), dora=False, seed=0):
    """A LoRA tree for kernels of these shapes (by path), which takes the ranks in turn, with several alphas."""
    generator = np.random.default_rng(seed)
    flat = {}
    for i, (path, kernel) in enumerate(shapes.items()):
        rank = ranks[i % len(ranks)]
        flat[(*path, "down")] = generator.normal(size=(*kernel[:-1], rank)).astype(np.float32)
        flat[(*path, "up")] = generator.normal(size=(rank, kernel[-1])).astype(np.float32)
        flat[(*path, "scale")] = np.array((1 + i % 5) / rank, np.float32)
        if dora:
            flat[(*path, "magnitude")] = generator.uniform(0.5, 2, kernel[-1]).astype(np.float32)
    return nest(flat)


def shapes_of(table):
    return {place(key): shape for key, (_, shape) in table.items()}


def delta(layer):
    """The change of the kernel, in sdjax's layout."""
    return float(layer["scale"]) * np.asarray(layer["down"], np.float64) @ np.asarray(layer["up"], np.float64)


def torch_layout(kernel):
    return kernel.T if kernel.ndim == 2 else kernel.transpose(3, 2, 0, 1)


def assert_same(one, other, rtol=1e-6):
    one, other = dict(layers(one, "down")), dict(layers(other, "down"))
    assert one.keys() == other.keys()
    for path, layer in one.items():
        np.testing.assert_allclose(delta(layer), delta(other[path]), rtol=rtol, atol=1e-6, err_msg=str(path))
        assert layer.keys() == other[path].keys()
        if "magnitude" in layer:
            np.testing.assert_array_equal(layer["magnitude"], other[path]["magnitude"])


def raises(match, file, model):
    with pytest.raises(DataError, match=match) as caught:
        load_lora(file, model)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


# Saving and reading back.


@pytest.mark.parametrize("style", ["kohya", "peft"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("ranks", [(4,), (1, 3, 8)])
def test_round_trip(tmp_path, style, dora, ranks):
    lora = random_lora(shapes_of(SD1), ranks=ranks, dora=dora)
    save_lora(tmp_path / "a.safetensors", lora, expected(SD1), style=style)
    back = load_lora(tmp_path / "a.safetensors", expected(SD1))
    assert_same(lora, back)
    for _, layer in layers(back, "down"):
        assert all(array.dtype == np.float32 for array in layer.values())
        assert layer["scale"].shape == ()


def test_one_alpha_for_all_round_trips_to_the_bit(tmp_path):
    lora = random_lora(shapes_of(SD1), ranks=(1, 3, 8))
    for _, layer in layers(lora, "down"):
        layer["scale"][...] = np.float32(5) / layer["up"].shape[0]
    save_lora(tmp_path / "a.safetensors", lora, expected(SD1))
    jax.tree.map(np.testing.assert_array_equal, load_lora(tmp_path / "a.safetensors", expected(SD1)), lora)


def test_kohya_files_have_one_alpha(tmp_path):
    """In a file with several alphas diffusers ignores that of an attention layer."""
    save_lora(tmp_path / "a.safetensors", random_lora(shapes_of(SD1)), expected(SD1))
    alphas = [float(array) for name, array in load_file(tmp_path / "a.safetensors").items() if name.endswith("alpha")]
    assert len(alphas) == len(SD1)
    assert set(alphas) == {1.0}


@settings(max_examples=25, deadline=None)
@given(
    style=st.sampled_from(["kohya", "peft"]),
    seed=st.integers(0, 2**32 - 1),
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    keys=st.sets(st.sampled_from(sorted(SD1)), min_size=1),
)
def test_round_trip_of_any_part(tmp_path_factory, style, seed, ranks, keys):
    path = tmp_path_factory.getbasetemp() / "part.safetensors"
    lora = random_lora(shapes_of({key: SD1[key] for key in keys}), ranks=ranks, seed=seed)
    save_lora(path, lora, expected(SD1), style=style)
    assert_same(lora, load_lora(path, expected(SD1)))


@pytest.mark.parametrize("style", ["kohya", "peft"])
def test_half_precision_export(tmp_path, style):
    lora = random_lora(shapes_of(SD1))
    save_lora(tmp_path / "a.safetensors", lora, expected(SD1), style=style, dtype=ml_dtypes.bfloat16)
    stored = read_safetensors(tmp_path / "a.safetensors").tensors
    assert all(array.dtype == ml_dtypes.bfloat16 for name, array in stored.items() if not name.endswith("alpha"))
    back = load_lora(tmp_path / "a.safetensors", expected(SD1))
    for path, layer in layers(lora, "down"):
        np.testing.assert_allclose(delta(dict(layers(back, "down"))[path]), delta(layer), atol=0.3, rtol=0.05)


def test_a_scale_of_zero_stays_off(tmp_path):
    """In kohya's style an alpha of 0 means the rank, which would switch the adapter on."""
    lora = random_lora(shapes_of(SD1))
    for _, layer in layers(lora, "down"):
        layer["scale"][...] = 0
    for style in ("kohya", "peft"):
        save_lora(tmp_path / "a.safetensors", lora, expected(SD1), style=style)
        back = load_lora(tmp_path / "a.safetensors", expected(SD1))
        assert all((delta(layer) == 0).all() for _, layer in layers(back, "down"))


def test_saving_what_cannot_be_saved(tmp_path):
    path, lora = tmp_path / "a.safetensors", random_lora(shapes_of(SD1))
    with pytest.raises(ConfigError, match="'lycoris': choices are kohya, peft"):
        save_lora(path, lora, expected(SD1), style="lycoris")
    with pytest.raises(DataError, match="adapts layers that the model does not have: text_encoder/"):
        save_lora(path, lora, {"unet": expected(SD1)["unet"]})
    with pytest.raises(DataError, match="adapts no layer"):
        save_lora(path, {}, expected(SD1))
    broken = jax.tree.map(np.copy, lora)
    broken["unet"]["conv_in"]["up"][0, 0] = 1e6
    for style in ("kohya", "peft"):
        with pytest.raises(DataError, match=r"NaN or Inf in the LoRA \(as float16\): .*conv_in"):
            save_lora(path, broken, expected(SD1), style=style, dtype=np.float16)
    batched = jax.tree.map(lambda x: np.stack([x, x]), lora)
    with pytest.raises(DataError, match="choose one to save"):
        save_lora(path, batched, expected(SD1))
    assert not path.exists()


# Files in kohya's naming, made by an independent rule: the name of the module with underscores for dots.


def kohya_file(table, *, text_prefix="lora_te_text_model_", alpha=2.0, dtype=np.float32, flat_1x1=False):
    """Tensors with the names and shapes of kohya's scripts, and the change of each kernel in PyTorch's layout."""
    generator = np.random.default_rng(0)
    rank = 4
    tensors, deltas = {}, {}
    for (part, path), (module, shape) in table.items():
        name = ("lora_unet_" if part == "unet" else text_prefix) + module.replace(".", "_")
        out = shape[-1]
        if len(shape) == 4 and not (flat_1x1 and shape[:2] == (1, 1)):
            down = generator.normal(size=(rank, shape[2], *shape[:2])).astype(dtype)
            up = generator.normal(size=(out, rank, 1, 1)).astype(dtype)
            change = np.einsum("orxy,rihw->oihw", up.astype(np.float64), down.astype(np.float64))
        else:
            down = generator.normal(size=(rank, shape[-2])).astype(dtype)
            up = generator.normal(size=(out, rank)).astype(dtype)
            change = up.astype(np.float64) @ down.astype(np.float64)
            change = change[:, :, None, None] if len(shape) == 4 else change
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        scale = 1.0
        if alpha is not None:
            tensors[f"{name}.alpha"] = np.array(alpha, dtype)
            scale = (alpha or rank) / rank
        deltas[place((part, path))] = scale * change
    return tensors, deltas


def assert_deltas(lora, deltas, rtol=1e-6):
    changes = {path: torch_layout(delta(layer)) for path, layer in layers(lora, "down")}
    assert changes.keys() == deltas.keys()
    for path, change in deltas.items():
        np.testing.assert_allclose(changes[path], change, rtol=rtol, atol=1e-6, err_msg=str(path))


@pytest.mark.parametrize("text_prefix", ["lora_te_text_model_", "lora_te1_text_model_", "lora_te_"])
@pytest.mark.parametrize("alpha", [2.0, 0.0, None])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_reads_kohya(tmp_path, text_prefix, alpha, dtype):
    tensors, deltas = kohya_file(SD1, text_prefix=text_prefix, alpha=alpha, dtype=dtype)
    save_safetensors(tmp_path / "a.safetensors", tensors)
    assert_deltas(load_lora(tmp_path / "a.safetensors", expected(SD1)), deltas)


def test_flat_and_four_axis_projections_pass_for_each_other(tmp_path):
    """An adapter of 2 axes fits a convolution of 1 x 1, and an adapter of 4 axes fits a linear layer."""
    tensors, deltas = kohya_file(SD1, flat_1x1=True)
    save_safetensors(tmp_path / "a.safetensors", tensors)
    assert_deltas(load_lora(tmp_path / "a.safetensors", expected(SD1)), deltas)
    tensors, deltas = kohya_file(SD1)
    save_safetensors(tmp_path / "a.safetensors", tensors)
    key = ("unet", "down_blocks_0/attentions_0/proj_in")
    linear = SD1 | {key: (SD1[key][0], (8, 8))}
    deltas[place(key)] = deltas[place(key)][:, :, 0, 0]
    assert_deltas(load_lora(tmp_path / "a.safetensors", expected(linear)), deltas)


def test_writes_kohya_names_shapes_and_metadata(tmp_path):
    lora = random_lora(shapes_of(SD1))
    for _, layer in layers(lora, "down"):
        layer["scale"][...] = 0.5
    path = tmp_path / "a.safetensors"
    save_lora(path, lora, expected(SD1), metadata={"ss_output_name": "dog", "modelspec.title": "Dog"})
    tensors = load_file(path)
    theirs, _ = kohya_file(SD1)
    assert {name: array.shape for name, array in tensors.items()} == {n: a.shape for n, a in theirs.items()}
    assert all(array == 2.0 for name, array in tensors.items() if name.endswith("alpha"))
    metadata = read_safetensors(path).metadata
    assert metadata["ss_network_module"] == "networks.lora"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "2")
    assert metadata["ss_output_name"] == "dog"
    assert metadata["modelspec.title"] == "Dog"
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "4", "conv_alpha": "2"}
    # As in kohya's scripts: the hash of everything after the header.
    content = path.read_bytes()
    behind = content[8 + int.from_bytes(content[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(behind).hexdigest()
    assert len(metadata["sshs_legacy_hash"]) == 8
    assert "ss_base_model_version" not in metadata  # no published model has a text width of 6


@pytest.mark.parametrize(("width", "version"), [(768, "sd_v1"), (1024, "sd_v2"), (2048, "sdxl_base_v1-0")])
def test_the_base_model_is_recorded(tmp_path, width, version):
    key = ("unet", f"{ATTENTION}/attn2/to_k")
    table = {key: (SD1[key][0], (width, 8))}
    save_lora(tmp_path / "a.safetensors", random_lora(shapes_of(table), ranks=(1,)), expected(table))
    metadata = read_safetensors(tmp_path / "a.safetensors").metadata
    assert metadata["ss_base_model_version"] == version
    assert metadata["ss_v2"] == str(width == 1024)


def test_dora_in_kohyas_naming_warns_that_few_programs_read_it(tmp_path, caplog):
    save_lora(tmp_path / "a.safetensors", random_lora(shapes_of(SD1), dora=True), expected(SD1))
    assert "DoRA. A1111, ComfyUI, kohya's scripts and diffusers read it wrongly" in caplog.text
    caplog.clear()
    save_lora(tmp_path / "b.safetensors", random_lora(shapes_of(SD1), dora=True), expected(SD1), style="peft")
    save_lora(tmp_path / "c.safetensors", random_lora(shapes_of(SD1)), expected(SD1))
    assert not caplog.text


def test_dora_scale_shape(tmp_path):
    lora = random_lora(shapes_of(SD1), dora=True)
    save_lora(tmp_path / "a.safetensors", lora, expected(SD1))
    shapes = {name: array.shape for name, array in load_file(tmp_path / "a.safetensors").items() if "dora" in name}
    assert shapes["lora_unet_conv_in.dora_scale"] == (8, 1, 1, 1)
    assert shapes["lora_te_text_model_encoder_layers_0_mlp_fc1.dora_scale"] == (24, 1)


@pytest.mark.parametrize("shape", [(1, 9), (8, 8), (9, 1), (9,)])
def test_a_magnitude_of_another_size_is_refused(tmp_path, shape):
    key = ("unet", f"{ATTENTION}/attn1/to_q")
    tensors, _ = kohya_file({key: SD1[key]})
    module = next(iter(tensors)).split(".")[0]
    save_file(tensors | {f"{module}.dora_scale": np.ones(shape, np.float32)}, tmp_path / "a.safetensors")
    raises("DoRA magnitude", tmp_path / "a.safetensors", expected(SD1))


@pytest.mark.parametrize("key", [("unet", f"{ATTENTION}/attn1/to_q"), ("unet", "down_blocks_0/resnets_0/square")])
def test_a_magnitude_for_each_input_is_not_taken_for_the_outputs(tmp_path, key):
    """LyCORIS's shape tells them apart, also where there are as many inputs as outputs. PEFT has none for inputs."""
    table = {key: ("down_blocks.0.resnets.0.square" if "square" in key[1] else SD1[key][0],
                   (3, 3, 8, 8) if "square" in key[1] else (8, 8))}  # fmt: skip
    lora = random_lora(shapes_of(table), dora=True)
    for magnitude in (np.arange(1.0, 9.0, dtype=np.float32), np.arange(1.0, 9.0, dtype=np.float32)[:, None]):
        next(layers(lora, "down"))[1]["magnitude"] = magnitude
        lora = nest(
            {(*place(key), name): leaf for name, leaf in next(layers(lora, "down"))[1].items()}
            | {(*place(key), "magnitude"): magnitude}
        )
        save_lora(tmp_path / "a.safetensors", lora, expected(table))
        (stored,) = [array for name, array in load_file(tmp_path / "a.safetensors").items() if "dora" in name]
        ones = (1,) * (len(table[key][1]) - 1)
        assert stored.shape == ((8, *ones) if magnitude.ndim == 1 else (1, 8, *ones[1:]))
        assert_same(lora, load_lora(tmp_path / "a.safetensors", expected(table)))
    with pytest.raises(DataError, match="PEFT has no DoRA with a magnitude for each input"):
        save_lora(tmp_path / "b.safetensors", lora, expected(table), style="peft")


def test_bundled_embeddings_are_left_to_their_own_reader(tmp_path, caplog):
    tensors, deltas = kohya_file(SD1)
    save_file(tensors | {"bundle_emb.dog.string_to_param": np.ones((2, 6), np.float32)}, tmp_path / "a.safetensors")
    assert_deltas(load_lora(tmp_path / "a.safetensors", expected(SD1)), deltas)
    assert "also holds words: dog" in caplog.text


KINDS = {"OFT": ["oft_blocks", "alpha"], "BOFT": ["boft_blocks"], "IA3": ["weight", "on_input"]}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_network_are_named(tmp_path, kind):
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{module}.{part}": np.ones((2, 2), np.float32) for part in KINDS[kind]}, tmp_path / "a.safetensors")
    raises(f"a {kind} network", tmp_path / "a.safetensors", expected(SD1))


def test_faults_in_kohya_files(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors, _ = kohya_file(SD1)
    module = "lora_unet_conv_in"

    def check(match, changes=None, without=()):
        save_file({k: v for k, v in (tensors | (changes or {})).items() if k not in without}, path)
        raises(match, path, expected(SD1))

    check("conv_in has alpha, down but needs down and up", without=[f"{module}.lora_up.weight"])
    stray = {f"lora_unet_no_such_{i}.lora_down.weight": np.ones((1, 1), np.float32) for i in range(12)}
    check(r"12 keys of no layer of this model: .*, \.\.\. \(12 in all\)", stray)
    check("1 keys of no layer.*lora_unet_conv_in.magic", {f"{module}.magic": np.ones(1, np.float32)})
    check("down .* for a kernel", {f"{module}.lora_down.weight": np.ones((4, 5, 3, 3), np.float32)})
    check("up .* for a kernel", {f"{module}.lora_up.weight": np.ones((8, 3, 1, 1), np.float32)})
    check("up .* for a kernel", {f"{module}.lora_up.weight": np.ones((8, 4, 3, 3), np.float32)})
    check("for a kernel", {f"{module}.lora_down.weight": np.array(1, np.float32)})
    check("conv_in: holds NaN or Inf", {f"{module}.lora_up.weight": np.full((8, 4, 1, 1), np.nan, np.float32)})
    check("int8 where floating-point", {f"{module}.lora_up.weight": np.ones((8, 4, 1, 1), np.int8)})
    renamed = {key.replace("lora_te_", "lora_te1_"): value for key, value in tensors.items() if "fc1" in key}
    check("mean the same tensor of text_encoder/", renamed)
    empty = {f"{module}.lora_down.weight": (0, 4, 3, 3), f"{module}.lora_up.weight": (8, 0, 1, 1)}
    empty = {key: np.zeros(shape, np.float32) for key, shape in empty.items()}
    check("for a kernel", empty)
    check("conv_in: alpha has shape .* where one number", {f"{module}.alpha": np.ones(2, np.float32)})
    check("conv_in: alpha has shape .* where one number", {f"{module}.alpha": np.ones(0, np.float32)})
    check("a scale of inf", {f"{module}.alpha": np.array(np.inf, np.float32)})


def test_another_models_lora_is_recognised(tmp_path):
    """The error for an SDXL file and an SD1 model names both, instead of a list of keys."""
    key = ("unet", f"{ATTENTION}/attn2/to_k")
    small, large = ({key: (SD1[key][0], (width, 8))} for width in (768, 2048))
    for style in ("kohya", "peft"):
        save_lora(tmp_path / "a.safetensors", random_lora(shapes_of(large)), expected(large), style=style)
        raises(r"made for SDXL \(text width 2048\); the model is Stable Diffusion 1 \(text width 768\)",
               tmp_path / "a.safetensors", expected(small))  # fmt: skip


def test_other_files_are_refused(tmp_path):
    raises("holds neither pytorch_lora_weights.safetensors nor", tmp_path, expected(SD1))
    save_file({"unet:0:up": np.ones((2, 2), np.float32)}, tmp_path / "a.safetensors")
    raises("cloneofsimo", tmp_path / "a.safetensors", expected(SD1))
    save_file({}, tmp_path / "b.safetensors")
    raises("no tensors", tmp_path / "b.safetensors", expected(SD1))
    save_file({"conv_in.weight": np.ones((2, 2), np.float32)}, tmp_path / "c.safetensors")
    raises("1 keys of no layer", tmp_path / "c.safetensors", expected(SD1))


# The spellings of diffusers and PEFT.


def peft_file(table, spell, *, rank=4, seed=0, alpha=None):
    tensors, deltas = {}, {}
    generator = np.random.default_rng(seed)
    for (part, path), (module, shape) in table.items():
        wide = len(shape) == 4
        down = generator.normal(size=(rank, shape[2], *shape[:2]) if wide else (rank, shape[0])).astype(np.float32)
        up = generator.normal(size=(shape[-1], rank, 1, 1) if wide else (shape[-1], rank)).astype(np.float32)
        names = spell(part, module)
        tensors |= {names[0]: down, names[1]: up}
        if alpha:
            tensors[names[2]] = np.array(alpha, np.float32)
        change = np.einsum("orxy,rihw->oihw", up, down) if wide else up @ down
        deltas[place((part, path))] = change * ((alpha or rank) / rank)
    return tensors, deltas


LINEAR = {key: value for key, value in SD1.items() if key[0] == "text_encoder" or "attn" in key[1]}


def new_style(part, module, adapter="", prefix="text_model."):
    name = f"{part}.{prefix if part != 'unet' else ''}{module}"
    return f"{name}.lora_A{adapter}.weight", f"{name}.lora_B{adapter}.weight"


def example_scripts(part, module):
    if part == "unet":
        return tuple(f"unet.{module}.lora.{half}.weight" for half in ("down", "up"))
    return tuple(f"text_encoder.text_model.{module}.lora_linear_layer.{half}.weight" for half in ("down", "up"))


def processors(part, module):
    if part == "text_encoder" and "mlp" in module:
        return example_scripts(part, module)
    if part == "text_encoder":
        attention, projection = module.rsplit(".", 1)
        name = f"text_encoder.text_model.{attention}.to_{projection.removesuffix('_proj')}_lora"
    else:
        attention, projection = module.removesuffix(".0").rsplit(".", 1)
        name = f"unet.{attention}.processor.{projection}_lora"
    return f"{name}.down.weight", f"{name}.up.weight"


SPELLINGS = {
    "lora_A": (new_style, SD1),
    "lora_A.default": (lambda c, m: new_style(c, m, ".default"), SD1),
    "without text_model": (lambda c, m: new_style(c, m, prefix=""), SD1),
    "pure PEFT": (lambda c, m: tuple("base_model.model." + n.removeprefix("unet.") for n in new_style(c, m)),
                  {key: value for key, value in SD1.items() if key[0] == "unet"}),
    "example scripts": (example_scripts, SD1),
    "attention processors": (processors, {key: v for key, v in LINEAR.items() if "ff" not in key[1]}),
    "save_attn_procs": (lambda c, m: tuple(n.removeprefix("unet.") for n in processors(c, m)),
                        {key: v for key, v in LINEAR.items() if key[0] == "unet" and "ff" not in key[1]}),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_reads_peft_spellings(tmp_path, spelling):
    spell, table = SPELLINGS[spelling]
    assert len(table) >= 3
    tensors, deltas = peft_file(table, spell)
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    assert_deltas(load_lora(tmp_path, expected(SD1)), deltas, rtol=1e-5)


@pytest.mark.parametrize("suffix", [".alpha", ".lora.alpha"])
def test_peft_alpha_tensors(tmp_path, suffix):
    def spell(part, module):
        names = new_style(part, module)
        return *names, names[0].removesuffix(".lora_A.weight") + suffix

    tensors, deltas = peft_file(LINEAR, spell, alpha=2)
    save_file(tensors, tmp_path / "a.safetensors")
    assert_deltas(load_lora(tmp_path / "a.safetensors", expected(SD1)), deltas, rtol=1e-5)


def test_peft_metadata_gives_the_scale(tmp_path):
    key, other = ("unet", f"{ATTENTION}/attn1/to_q"), ("unet", f"{ATTENTION}/attn2/to_k")
    tensors, deltas = peft_file({key: SD1[key], other: SD1[other]}, new_style)
    path = tmp_path / "a.safetensors"

    def read(**settings_):
        metadata = json.dumps({f"unet.{name}": value for name, value in settings_.items()})
        save_file(tensors, path, {"lora_adapter_metadata": metadata})
        return load_lora(path, expected(SD1))

    assert_deltas(read(lora_alpha=8), {p: 2 * d for p, d in deltas.items()}, rtol=1e-5)
    assert_deltas(read(lora_alpha=8, use_rslora=True), {p: 4 * d for p, d in deltas.items()}, rtol=1e-5)
    pattern = {"attn2.to_k": 12}
    scaled = {place(key): deltas[place(key)], place(other): 3 * deltas[place(other)]}
    assert_deltas(read(lora_alpha=4, alpha_pattern=pattern), scaled, rtol=1e-5)
    assert_deltas(read(lora_alpha=4, alpha_pattern={"n2.to_k": 12}), deltas, rtol=1e-5)
    with pytest.raises(DataError, match="regular expression"):
        read(lora_alpha=4, alpha_pattern={r".*\.to_k": 12})
    with pytest.raises(DataError, match="an alpha of 'x'"):
        read(lora_alpha="x")
    save_file(tensors, path, {"lora_adapter_metadata": "{"})
    raises("lora_adapter_metadata is not JSON", path, expected(SD1))


def test_faults_in_peft_files(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors, _ = peft_file(LINEAR, new_style)
    first = next(iter(tensors))
    save_file({key: value for key, value in tensors.items() if key != first}, path)
    raises("needs down and up", path, expected(SD1))
    save_file(tensors | {"unet.nowhere.lora_A.weight": tensors[first]}, path)
    raises("1 keys of no layer of this model: unet.nowhere.lora_A.weight", path, expected(SD1))
    save_file(tensors | {first.replace("lora_A", "lora_A.default"): tensors[first]}, path)
    raises("mean the same tensor of ", path, expected(SD1))
    save_file(tensors, path)
    raises("keys of no layer", path, {"unet": expected(SD1)["unet"]})


def test_peft_files_never_mix_spellings(tmp_path):
    """diffusers decides by the first key which spelling the file has."""
    save_lora(tmp_path / "a.safetensors", random_lora(shapes_of(SD1)), expected(SD1), style="peft")
    stored = read_safetensors(tmp_path / "a.safetensors")
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in stored.tensors)
    assert stored.metadata == {"format": "pt"}
