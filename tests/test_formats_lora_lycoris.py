"""LyCORIS's adapters: each kind gives the change that its formula states, in NumPy and in PyTorch's layout."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from sdjax import lora
from sdjax.errors import ConfigError, DataError
from sdjax.formats.lora_file import load_lora, save_lora
from sdjax.trees import nest

BLOCK = "down_blocks_0/attentions_0/transformer_blocks_0"
LAYERS = {
    f"{BLOCK}/attn1/to_q": ("down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", (12, 8)),
    "down_blocks_0/resnets_0/conv1": ("down_blocks_0_resnets_0_conv1", (3, 3, 12, 8)),
    "down_blocks_0/attentions_0/proj_in": ("down_blocks_0_attentions_0_proj_in", (1, 1, 12, 8)),
}
"""Path of a layer -> its name in files, and the shape of its kernel."""
NORM = "down_blocks_0_resnets_0_norm1"
R = 2


def model(seed=0):
    """Random parameters of the layers."""
    random = np.random.default_rng(seed)
    flat = {}
    for path, (_, shape) in LAYERS.items():
        flat[("unet", *path.split("/"), "kernel")] = random.normal(size=shape).astype(np.float32)
        flat[("unet", *path.split("/"), "bias")] = random.normal(size=shape[-1]).astype(np.float32)
    norm = ("unet", "down_blocks_0", "resnets_0", "norm1")
    flat[(*norm, "scale")], flat[(*norm, "bias")] = random.normal(size=(2, 12)).astype(np.float32)
    return jax.tree.map(jnp.asarray, nest(flat))


def torch_kernel(params, path):
    """The kernel of a layer in PyTorch's layout, [out, in, ...]."""
    layer = params["unet"]
    for name in path.split("/"):
        layer = layer[name]
    kernel = np.asarray(layer["kernel"], np.float64)
    return kernel.T if kernel.ndim == 2 else kernel.transpose(3, 2, 0, 1)


def tensors_of(kind, shape, *, seed=1):
    """The tensors of one layer in a file, and its change of W [out, in, h, w] as a function of W."""
    random = np.random.default_rng(seed)
    draw = lambda *size: random.normal(size=size).astype(np.float32)
    inputs, outputs = shape[-2:]
    spatial = shape[:-2]
    size = int(np.prod(spatial, dtype=int))
    whole = (outputs, inputs, *spatial)
    alpha = {"alpha": np.array(1.0, np.float32)}
    scale = 1.0 / R
    if kind == "LoHa":
        t = {f"hada_w{i}_a": draw(outputs, R) for i in "12"} | {f"hada_w{i}_b": draw(R, inputs * size) for i in "12"}
        halves = [(t[f"hada_w{i}_a"].astype(float) @ t[f"hada_w{i}_b"]).reshape(whole) for i in "12"]
        return t | alpha, lambda w: scale * halves[0] * halves[1]
    if kind == "LoHa, Tucker":
        t = {f"hada_w{i}_a": draw(R, outputs) for i in "12"} | {f"hada_w{i}_b": draw(R, inputs) for i in "12"}
        t |= {f"hada_t{i}": draw(R, R, *spatial) for i in "12"}
        rebuilt = [
            np.einsum(
                "ij...,jr,ip->pr...", *(t[f"hada_{part}"].astype(float) for part in (f"t{i}", f"w{i}_b", f"w{i}_a"))
            )
            for i in "12"
        ]
        return t | alpha, lambda w: scale * rebuilt[0] * rebuilt[1]
    if kind == "LoKr":
        t = {"lokr_w1": draw(2, 3), "lokr_w2": draw(outputs // 2, inputs // 3, *spatial)}
        return t | alpha, lambda w: np.kron(t["lokr_w1"].reshape(2, 3, *(1 for _ in spatial)), t["lokr_w2"])
    if kind == "LoKr, factors":
        t = {"lokr_w1_a": draw(2, R), "lokr_w1_b": draw(R, 3)}
        t |= {"lokr_w2_a": draw(outputs // 2, R), "lokr_w2_b": draw(R, inputs // 3 * size)}
        w1 = (t["lokr_w1_a"].astype(float) @ t["lokr_w1_b"]).reshape(2, 3, *(1 for _ in spatial))
        w2 = (t["lokr_w2_a"].astype(float) @ t["lokr_w2_b"]).reshape(outputs // 2, inputs // 3, *spatial)
        return t | alpha, lambda w: scale * np.kron(w1, w2)
    if kind == "LoKr, Tucker":
        t = {"lokr_w1": draw(2, 3), "lokr_t2": draw(R, R, *spatial)}
        t |= {"lokr_w2_a": draw(R, outputs // 2), "lokr_w2_b": draw(R, inputs // 3)}
        w2 = np.einsum("ij...,ip,jr->pr...", *(t[f"lokr_{part}"].astype(float) for part in ("t2", "w2_a", "w2_b")))
        return t | alpha, lambda w: scale * np.kron(t["lokr_w1"].reshape(2, 3, *(1 for _ in spatial)), w2)
    if kind == "GLoRA":
        ones = (1,) * len(spatial)
        t = {"a1.weight": draw(inputs, R, *ones), "a2.weight": draw(R, inputs, *ones)}
        t |= {"b1.weight": draw(outputs, R, *ones), "b2.weight": draw(R, inputs, *spatial)}
        flat = {name: array.reshape(len(array), -1).astype(float) for name, array in t.items()}
        a, b = flat["a1.weight"] @ flat["a2.weight"], flat["b1.weight"] @ flat["b2.weight"]
        return t | alpha, lambda w: scale * (b.reshape(whole) + np.einsum("oi...,ij->oj...", w, a))
    if kind == "LoCon, Tucker":
        t = {"lora_down.weight": draw(R, inputs, 1, 1), "lora_up.weight": draw(outputs, R, 1, 1)}
        t |= {"lora_mid.weight": draw(R, R, *spatial)}
        up, down = (t[f"lora_{way}.weight"][:, :, 0, 0].astype(float) for way in ("up", "down"))
        return (
            t | alpha,
            lambda w: scale * np.einsum("mn...,im,nj->ij...", t["lora_mid.weight"].astype(float), up, down),
        )
    assert kind == "full"
    t = {"diff": draw(*whole)}
    return t, lambda w: t["diff"]


KINDS = ("LoHa", "LoKr", "LoKr, factors", "GLoRA", "full")
TUCKER = ("LoHa, Tucker", "LoKr, Tucker", "LoCon, Tucker")
CASES = [(kind, path) for kind in KINDS for path in LAYERS] + [
    (kind, "down_blocks_0/resnets_0/conv1") for kind in TUCKER
]


@pytest.mark.parametrize(
    ("kind", "path", "dora"),
    [
        (kind, path, dora)
        for kind, path in CASES
        for dora in (None, "outputs", "inputs")
        if dora is None or kind != "GLoRA"  # LyCORIS has none with DoRA
    ],
)
def test_a_merged_layer_is_the_formula(tmp_path, kind, path, dora):
    """Without DoRA: W + weight * change. With it: the norms of the outputs, or of the inputs, of W + change are set."""
    params, (name, shape) = model(), LAYERS[path]
    tensors, change = tensors_of(kind, shape)
    w = torch_kernel(params, path)
    expected = w + 0.7 * change(w)
    if dora:
        axis = 0 if dora == "outputs" else 1
        others = tuple(i for i in range(w.ndim) if i != axis)
        scale = np.random.default_rng(2).uniform(0.5, 2, [n if i == axis else 1 for i, n in enumerate(w.shape)])
        tensors["dora_scale"] = scale.astype(np.float32)
        changed = w + change(w)
        changed = scale * changed / np.sqrt((changed**2).sum(axis=others, keepdims=True))
        expected = w + 0.7 * (changed - w)
    tensors = {f"lora_unet_{name}.{key}": np.array(tensor, order="C") for key, tensor in tensors.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = load_lora(tmp_path / "a.safetensors", params)
    merged = {"unet": lora.merge(params["unet"], adapter["unet"], 0.7)}
    np.testing.assert_allclose(torch_kernel(merged, path), expected, rtol=1e-5, atol=1e-5)
    # Written and read again it is the same, in the shapes that LyCORIS has unless Tucker's factors were multiplied out.
    save_lora(tmp_path / "b.safetensors", adapter, params)
    again = load_lora(tmp_path / "b.safetensors", params)["unet"]
    if kind == "LoKr, Tucker":  # its scale is in the first factor
        again, adapter = lora.merge(params["unet"], again, 0.7), merged
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), again, adapter["unet"])
    stored = load_file(tmp_path / "b.safetensors")
    if kind in KINDS:
        assert {key: tensor.shape for key, tensor in stored.items()} == {key: t.shape for key, t in tensors.items()}
    algorithm = {"LoHa": "loha", "LoKr": "lokr", "GLoRA": "glora", "full": "full"}.get(kind.partition(",")[0])
    with safe_open(tmp_path / "b.safetensors", "np") as file:
        module, arguments = (file.metadata()[f"ss_network_{name}"] for name in ("module", "args"))
    assert module == ("lycoris.kohya" if algorithm or dora else "networks.lora")
    assert json.loads(arguments).get("algo") == (algorithm or ("lora" if dora else None))
    others = [other for other in LAYERS if other != path]
    assert all((torch_kernel(merged, other) == torch_kernel(params, other)).all() for other in others)


def test_biases_and_norms(tmp_path):
    params = model()
    name = LAYERS["down_blocks_0/resnets_0/conv1"][0]
    tensors = {
        f"lora_unet_{name}.diff_b": np.full(8, 2, np.float32),
        f"lora_unet_{NORM}.w_norm": np.full(12, 3, np.float32),
        f"lora_unet_{NORM}.b_norm": np.full(12, 4, np.float32),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = load_lora(tmp_path / "a.safetensors", params)["unet"]
    resnet, merged = (
        tree["down_blocks_0"]["resnets_0"] for tree in (params["unet"], lora.merge(params["unet"], adapter, 0.5))
    )
    np.testing.assert_allclose(merged["conv1"]["bias"], resnet["conv1"]["bias"] + 1)
    np.testing.assert_array_equal(merged["conv1"]["kernel"], resnet["conv1"]["kernel"])
    np.testing.assert_allclose(merged["norm1"]["scale"], resnet["norm1"]["scale"] + 1.5)
    np.testing.assert_allclose(merged["norm1"]["bias"], resnet["norm1"]["bias"] + 2)
    save_lora(tmp_path / "b.safetensors", {"unet": adapter}, params)
    assert load_file(tmp_path / "b.safetensors").keys() == tensors.keys()


def test_the_names_of_norms_in_sdxls_files(tmp_path):
    shapes = nest({
        ("unet", "down_blocks_0", "resnets_0", "norm2", "scale"): jax.ShapeDtypeStruct((4,), jnp.float32),
        ("unet", "down_blocks_0", "resnets_0", "norm2", "bias"): jax.ShapeDtypeStruct((4,), jnp.float32),
    })  # fmt: skip
    save_file({"lora_unet_input_blocks_1_0_out_layers_0.w_norm": np.ones(4, np.float32)}, tmp_path / "a.safetensors")
    (layer,) = [load_lora(tmp_path / "a.safetensors", shapes)["unet"]["down_blocks_0"]["resnets_0"]["norm2"]]
    np.testing.assert_array_equal(layer["diff"], np.ones(4))


def test_the_first_glora_had_its_factors_exchanged(tmp_path):
    params, path = model(), f"{BLOCK}/attn1/to_q"
    name, shape = LAYERS[path]
    tensors, _ = tensors_of("GLoRA", shape)
    swap = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1", "alpha": "alpha"}
    results = []
    for names in (dict(zip(swap, swap, strict=True)), swap):
        file = {
            f"lora_unet_{name}.{key.replace(key[:2], names[key[:2]], 1) if '.' in key else key}": tensor
            for key, tensor in tensors.items()
        }
        save_file(file, tmp_path / "a.safetensors")
        results.append(
            torch_kernel(
                {"unet": lora.merge(params["unet"], load_lora(tmp_path / "a.safetensors", params)["unet"])}, path
            )
        )
    np.testing.assert_array_equal(*results)


def test_other_kinds_do_what_they_can_and_refuse_the_rest(tmp_path):
    params, path = model(), f"{BLOCK}/attn1/to_q"
    name, shape = LAYERS[path]
    tensors, change = tensors_of("LoHa", shape)
    save_file({f"lora_unet_{name}.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "a.safetensors")
    adapter = load_lora(tmp_path / "a.safetensors", params)["unet"]
    half = torch_kernel({"unet": lora.merge(params["unet"], lora.add([(adapter, 0.5)]))}, path)
    w = torch_kernel(params, path)
    np.testing.assert_allclose(half, w + 0.5 * change(w), rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="a LoHa layer cannot be added to another adapter"):
        lora.add([(adapter, 1.0), (adapter, 1.0)])
    with pytest.raises(ConfigError, match="LoHa layers cannot be stacked"):
        lora.stack([adapter, adapter])
    with pytest.raises(DataError, match="PEFT's naming holds LoRA and DoRA alone"):
        save_lora(tmp_path / "b.safetensors", {"unet": adapter}, params, style="peft")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"hada_w1_a": None}, "needs hada_w1_a and hada_w1_b and hada_w2_a and hada_w2_b"),
        ({"hada_w2_b": np.ones((R, 5), np.float32)}, r"down \[2, 5\].* for a kernel \[12, 8\]"),
        ({"diff": np.ones((8, 12), np.float32)}, "tensors of several kinds of adapter"),
        ({"diff_b": np.ones(7, np.float32)}, r"diff_b \[7\] for a kernel"),
        ({"dora_scale": np.ones((7, 1), np.float32)}, "a DoRA magnitude .7.; expected 8 for the outputs"),
        ({"hada_w1_a": np.full((8, R), np.nan, np.float32)}, "NaN or Inf"),
    ],
)
def test_faults_are_named(tmp_path, changes, fault):
    name, shape = LAYERS[f"{BLOCK}/attn1/to_q"]
    tensors = {**tensors_of("LoHa", shape)[0], **changes}
    file = tmp_path / "a.safetensors"
    save_file({f"lora_unet_{name}.{key}": tensor for key, tensor in tensors.items() if tensor is not None}, file)
    with pytest.raises(DataError, match=fault) as caught:
        load_lora(file, model())
    assert str(caught.value).startswith(str(file))


@pytest.mark.parametrize("tensors", [
    {"lokr_w1": (2, 5), "lokr_w2": (4, 4)},
    {"lokr_w1": (2, 3), "lokr_w2_a": (4, 2)},
    {"lokr_w1": (2, 3), "lokr_w2_a": (4, 2), "lokr_w2_b": (3, 4)},
    {"lokr_w1": (6,), "lokr_w2": (4, 4)},
    {"diff": (8, 13)},
    {"hada_w1_a": (), "hada_w1_b": (2, 12), "hada_w2_a": (8, 2), "hada_w2_b": (2, 12)},
    {"w_norm": (8,)},
    {"a1.weight": (12, 2), "a2.weight": (2, 12), "b1.weight": (8, 2), "b2.weight": (2, 11)},
    {"lora_down.weight": (2, 12), "lora_up.weight": (8, 2), "lora_mid.weight": (3, 3, 1, 1)},
])  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(tmp_path, tensors):
    name, _ = LAYERS[f"{BLOCK}/attn1/to_q"]
    file = tmp_path / "a.safetensors"
    save_file({f"lora_unet_{name}.{key}": np.ones(shape, np.float32) for key, shape in tensors.items()}, file)
    with pytest.raises(DataError, match=str(file)):
        load_lora(file, model())
