"""The rules by which other programs read LoRA and word files, against the names that our exports have at full size.

Each rule is a fact about a program, read in its source and written here in our words:

- kohya's scripts (`networks/lora.py`, `create_network_from_weights`) adapt the linear layers and convolutions inside
  modules of a few classes, name them by their path with underscores, and drop other keys without a word.
- A1111 (`extensions-builtin/Lora/networks.py`) turns diffusers' names into LDM's by arithmetic.
- ComfyUI (`comfy/lora.py`, `comfy/sd1_clip.py`) makes a table of all names that it knows.
- LyCORIS looks for every module of the model under kohya's name.

The models have the published shapes and no weights.
"""

import functools
import itertools
import re

import numpy as np
import pytest
from test_full_size import TEXTS, UNETS

from sdjax import lora
from sdjax.formats.embedding_file import bundle, save_embedding
from sdjax.formats.ldm_names import ldm_name, ldm_prefixes, unet_structure
from sdjax.formats.lora_file import save_lora
from sdjax.formats.parameter_names import module_name
from sdjax.formats.safetensors_file import read_safetensors
from sdjax.models import clip, unet
from sdjax.trees import Path, layers, nest

TEXT_MODELS = {
    "sd15": {"text_encoder": "sd15 and sdxl"},
    "sd21": {"text_encoder": "sd21"},
    "sdxl": {"text_encoder": "sd15 and sdxl", "text_encoder_2": "sdxl 2"},
}
FAMILIES = pytest.mark.parametrize("family", TEXT_MODELS)


@functools.cache
def shapes(family):
    """Part -> tree of the shapes of the published model."""
    texts = {part: clip.TextConfig.from_dict(TEXTS[name]) for part, name in TEXT_MODELS[family].items()}
    return {
        "unet": unet.abstract_params(unet.UNetConfig.from_dict(UNETS[family])),
        **{part: clip.abstract_params(config) for part, config in texts.items()},
    }


_written: dict = {}


def written(family, preset, style, folder):
    """The tensors of an export of rank 1 that adapts these layers, and the path of each adapted layer, by module."""
    if (family, preset, style) not in _written:
        expected = shapes(family)
        flat: dict[Path, np.ndarray] = {}
        for part, tree in expected.items():
            for path, kernel in lora.targets(tree, preset).items():
                flat[(part, *path, "down")] = np.ones((*kernel.shape[:-1], 1), np.float16)
                flat[(part, *path, "up")] = np.ones((1, kernel.shape[-1]), np.float16)
                flat[(part, *path, "scale")] = np.array(1, np.float32)
        save_lora(folder / "a.safetensors", nest(flat), expected, style=style, dtype=np.float16)
        tensors = {name: tensor.shape for name, tensor in read_safetensors(folder / "a.safetensors").tensors.items()}
        _written[family, preset, style] = tensors, {path[:-1] for path in flat}
    return _written[family, preset, style]


def modules(tensors):
    """The names of the layers in a file of kohya's naming."""
    return {name.partition(".")[0] for name in tensors}


# kohya's scripts. Class of a module that they adapt the inside of -> its names in diffusers' U-Net and in kohya's own
# U-Net for SDXL, which has LDM's names. Only the first without `conv_dim`.

KOHYA = {
    "Transformer2DModel": (r"attentions_\d+", r"(input|middle|output)_block(s_\d+)?_1_(?=proj|transformer)"),
    "ResnetBlock2D": (r"resnets_\d+", r"(in_layers|out_layers|emb_layers|skip_connection)"),
    "Downsample2D": (r"downsamplers_0", r"_op$"),
    "Upsample2D": (r"upsamplers_0", r"_\d_conv$"),
}


def kohya_names(family, *, conv):
    """The layers that kohya's scripts adapt, by their names. `conv`: with `conv_dim`, or when reading a file."""
    expected = shapes(family)
    prefixes = ldm_prefixes(unet_structure(UNETS[family]))
    classes = list(KOHYA.values()) if conv else list(KOHYA.values())[:1]
    names = set()
    for path, _ in layers(expected["unet"], "kernel"):
        ours = module_name(path)
        name = (ldm_name(ours, prefixes) if family == "sdxl" else ours).replace(".", "_")
        if any(re.search(pattern[family == "sdxl"], name) for pattern in classes):
            names.add(f"lora_unet_{name}")
    for part, prefix in zip(TEXT_MODELS[family], ("te1", "te2") if family == "sdxl" else ("te",), strict=True):
        for path, _ in layers(expected[part], "kernel"):
            if path[-2] in ("self_attn", "mlp"):  # inside CLIPAttention and CLIPMLP
                names.add(f"lora_{prefix}_text_model_" + module_name(path).replace(".", "_"))
    return names


@FAMILIES
def test_presets_named_for_kohya_are_its_sets(family, tmp_path):
    for preset, conv in (("transformer", False), ("locon", True)):
        tensors, _ = written(family, preset, "kohya", tmp_path)
        assert modules(tensors) == kohya_names(family, conv=conv)


@FAMILIES
def test_kohyas_scripts_drop_the_layers_outside_the_blocks(family, tmp_path):
    """Which is why no preset of kohya's name has them."""
    tensors, _ = written(family, "all", "kohya", tmp_path)
    dropped = modules(tensors) - kohya_names(family, conv=True)
    outside = {
        "sdxl": {"input_blocks_0_0", "out_2", "time_embed_0", "time_embed_2", "label_emb_0_0", "label_emb_0_2"},
    }.get(family, {"conv_in", "conv_out", "time_embedding_linear_1", "time_embedding_linear_2"})
    assert dropped == {f"lora_unet_{name}" for name in outside}


@FAMILIES
@pytest.mark.parametrize("preset", ["transformer", "locon", "all"])
def test_every_layer_has_the_three_tensors_that_kohyas_reader_takes(family, preset, tmp_path):
    """It takes the rank from the first axis of `lora_down`, and puts the factors into modules of the layer's class."""
    tensors, paths = written(family, preset, "kohya", tmp_path)
    assert len(modules(tensors)) == len(paths) == len(tensors) / 3
    for module in modules(tensors):
        down, up, alpha = (tensors[f"{module}.{name}"] for name in ("lora_down.weight", "lora_up.weight", "alpha"))
        assert down[0] == 1 and up[1] == 1 and alpha == ()
        assert len(down) == len(up) == (4 if len(down) == 4 else 2) and up[2:] == ((1, 1) if len(up) == 4 else ())


# A1111.


def a1111_name(module, *, sd2):
    """The name that A1111 looks for among the modules of its LDM model, for a name in kohya's file."""
    rules = [
        (r"lora_unet_conv_in", lambda m: "diffusion_model_input_blocks_0_0"),
        (r"lora_unet_conv_out", lambda m: "diffusion_model_out_2"),
        (r"lora_unet_time_embedding_linear_(\d)", lambda m: f"diffusion_model_time_embed_{2 * int(m[1]) - 2}"),
        (
            r"lora_unet_down_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)",
            lambda m: f"diffusion_model_input_blocks_{1 + 3 * int(m[1]) + int(m[3])}_{inside(m[2], m[4])}",
        ),
        (
            r"lora_unet_mid_block_attentions_(\d+)_(.+)",
            lambda m: f"diffusion_model_middle_block_{inside('attentions', m[2])}",
        ),
        (
            r"lora_unet_mid_block_resnets_(\d+)_(.+)",
            lambda m: f"diffusion_model_middle_block_{2 * int(m[1])}_{inside('resnets', m[2])[2:]}",
        ),
        (
            r"lora_unet_up_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)",
            lambda m: f"diffusion_model_output_blocks_{3 * int(m[1]) + int(m[3])}_{inside(m[2], m[4])}",
        ),
        (
            r"lora_unet_down_blocks_(\d+)_downsamplers_0_conv",
            lambda m: f"diffusion_model_input_blocks_{3 + 3 * int(m[1])}_0_op",
        ),
        (
            r"lora_unet_up_blocks_(\d+)_upsamplers_0_conv",
            lambda m: f"diffusion_model_output_blocks_{2 + 3 * int(m[1])}_{2 if int(m[1]) > 0 else 1}_conv",
        ),
        (
            r"lora_te_text_model_encoder_layers_(\d+)_(.+)",
            lambda m: openclip("", m) if sd2 else f"transformer_text_model_encoder_layers_{m[1]}_{m[2]}",
        ),
        (r"lora_te2_text_model_encoder_layers_(\d+)_(.+)", lambda m: openclip("1_", m)),
        (r"lora_te1_text_model_(.+)", lambda m: f"0_transformer_text_model_{m[1]}"),
        (r"lora_unet_(.+)", lambda m: f"diffusion_model_{m[1]}"),
    ]
    return next(rule(match) for pattern, rule in rules if (match := re.fullmatch(pattern, module)))


def inside(kind, rest):
    renamed = {"conv1": "in_layers_2", "conv2": "out_layers_3", "time_emb_proj": "emb_layers_1"}
    renamed["conv_shortcut"] = "skip_connection"
    return f"1_{rest}" if kind == "attentions" else f"0_{renamed[rest]}"


def openclip(prefix, match):
    name = match[2].replace("self_attn", "attn").replace("mlp_fc1", "mlp_c_fc").replace("mlp_fc2", "mlp_c_proj")
    name = re.sub(r"_[qkv]_proj$", "", name)  # A1111 then finds the attention that holds all three
    return f"{prefix}model_transformer_resblocks_{match[1]}_{name}"


def ldm_modules(family):
    """The linear layers and convolutions of the LDM model, counted along its blocks as its code builds them."""
    config = {**unet_config_of_sd1(), **UNETS[family]}
    levels = len(config["block_out_channels"])
    depths = config.get("transformer_layers_per_block", [1] * levels)
    attends = [kind.startswith("CrossAttn") for kind in config["down_block_types"]]
    names = {"input_blocks_0_0", "out_2", "time_embed_0", "time_embed_2"}
    names |= {"label_emb_0_0", "label_emb_0_2"} if family == "sdxl" else set()
    resnet = ("in_layers_2", "emb_layers_1", "out_layers_3")
    attention = [f"{attn}_{way}" for attn in ("attn1", "attn2") for way in ("to_q", "to_k", "to_v", "to_out_0")]
    attention += ["ff_net_0_proj", "ff_net_2"]

    def block(place, attends, depth, grows):
        names.update(f"{place}_0_{name}" for name in resnet)
        names.update([f"{place}_0_skip_connection"] if grows else [])
        if attends:
            transformer(f"{place}_1", depth)

    def transformer(place, depth):
        names.update((f"{place}_proj_in", f"{place}_proj_out"))
        names.update(f"{place}_transformer_blocks_{i}_{name}" for i in range(depth) for name in attention)

    count = itertools.count(1)
    for level in range(levels):
        for i in range(2):
            block(f"input_blocks_{next(count)}", attends[level], depths[level], i == 0 and level in (1, 2))
        if level < levels - 1:
            names.add(f"input_blocks_{next(count)}_0_op")
    for i in (0, 2):
        names.update(f"middle_block_{i}_{name}" for name in resnet)
    transformer("middle_block_1", depths[-1])
    count = itertools.count()
    for level in reversed(range(levels)):
        for i in range(3):
            place = f"output_blocks_{next(count)}"
            block(place, attends[level], depths[level], True)
            if i == 2 and level > 0:
                names.add(f"{place}_{2 if attends[level] else 1}_conv")
    return {f"diffusion_model_{name}" for name in names}


def unet_config_of_sd1():
    return {
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    }


def text_modules(family):
    """The layers of the text models in A1111: those of transformers, or of OpenCLIP for SD2 and SDXL's second."""
    inside = [f"self_attn_{name}_proj" for name in ("q", "k", "v", "out")] + ["mlp_fc1", "mlp_fc2"]
    theirs = ["attn", "attn_out_proj", "mlp_c_fc", "mlp_c_proj"]
    first = {f"transformer_text_model_encoder_layers_{i}_{name}" for i in range(12) for name in inside}
    second = lambda prefix, count: {
        f"{prefix}model_transformer_resblocks_{i}_{name}" for i in range(count) for name in theirs
    }
    if family == "sdxl":
        return {f"0_{name}" for name in first} | second("1_", 32)
    return second("", 23) if family == "sd21" else first


@FAMILIES
def test_a1111_finds_every_layer(family, tmp_path):
    tensors, _ = written(family, "all", "kohya", tmp_path)
    found = {module: a1111_name(module, sd2=family == "sd21") for module in modules(tensors)}
    assert set(found.values()) == ldm_modules(family) | text_modules(family)
    # The layer that it finds is ours: also by the names of single files, which other tests compare value for value.
    prefixes = ldm_prefixes(shapes(family)["unet"])
    for path, _ in layers(shapes(family)["unet"], "kernel"):
        ours, ldm = module_name(path), ldm_name(module_name(path), prefixes)
        name = f"lora_unet_{(ldm if family == 'sdxl' else ours).replace('.', '_')}"
        assert found[name] == f"diffusion_model_{ldm.replace('.', '_')}"


# ComfyUI.


def comfyui_names(family, prefixes):
    """Every name that ComfyUI's table has for a layer that is in our models -> (part, path of the layer)."""
    names = {}
    expected = shapes(family)
    for path, _ in layers(expected["unet"], "kernel"):
        ours = module_name(path)
        for name in (ours, ldm_name(ours, prefixes)):
            names[f"lora_unet_{name.replace('.', '_')}"] = ("unet", *path)
        processor = ours.replace(".to_", ".processor.to_").removesuffix(".0" if ".to_out" in ours else "//")
        names |= {f"{prefix}{processor}": ("unet", *path) for prefix in ("", "unet.")}
    for part, kohya in (("text_encoder", "te1"), ("text_encoder_2", "te2")):
        for path, _ in layers(expected.get(part, {}), "kernel"):
            if path[-2] not in ("self_attn", "mlp"):
                continue
            ours = f"text_model.{module_name(path)}"
            names[f"{part}.{ours}"] = names[f"lora_{kohya}_{ours.replace('.', '_')}"] = (part, *path)
            if part == "text_encoder":
                names[f"lora_te_{ours.replace('.', '_')}"] = (part, *path)
    return names


@FAMILIES
def test_comfyui_finds_every_layer_of_kohyas_naming(family, tmp_path):
    names = comfyui_names(family, ldm_prefixes(unet_structure(UNETS[family])))
    tensors, paths = written(family, "all", "kohya", tmp_path)
    assert {names[module] for module in modules(tensors)} == paths


@FAMILIES
def test_comfyui_finds_no_attention_of_the_unet_in_pefts_naming(family, tmp_path):
    """It expects diffusers' names before 0.22, `attn1.processor.to_q`. `save_lora`, the card and the guide say so."""
    names = comfyui_names(family, ldm_prefixes(unet_structure(UNETS[family])))
    tensors, paths = written(family, "transformer", "peft", tmp_path)
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in tensors)
    found = {names[module] for module in {name[:-14] for name in tensors} if module in names}
    missed = paths - found
    assert missed == {path for path in paths if path[0] == "unet" and path[-2] in ("attn1", "attn2")}
    assert family != "sd15" or (len(missed), len(found)) == (128, 64 + 72)


# LyCORIS.


@FAMILIES
@pytest.mark.parametrize("preset", ["locon", "all"])
def test_lycoris_finds_every_layer(family, preset, tmp_path):
    """It looks for each module of diffusers' or kohya's U-Net and of the text models, whatever its class."""
    prefixes = ldm_prefixes(shapes(family)["unet"])
    known = set()
    for path, _ in layers(shapes(family)["unet"], "kernel"):
        ours = module_name(path)
        known.add(f"lora_unet_{(ldm_name(ours, prefixes) if family == 'sdxl' else ours).replace('.', '_')}")
    for part, prefix in zip(TEXT_MODELS[family], ("te1", "te2") if family == "sdxl" else ("te",), strict=True):
        paths = (path for path, _ in layers(shapes(family)[part], "kernel"))
        known |= {f"lora_{prefix}_text_model_{module_name(path).replace('.', '_')}" for path in paths}
    assert modules(written(family, preset, "kohya", tmp_path)[0]) <= known


# Words.


def comfyui_embed(tensors, key):
    """The vectors that ComfyUI takes for a text model, whose key is clip_l, clip_g or clip_h, from a file."""
    if key in tensors:
        return tensors[key]
    for end in (".string_to_param.*", f".{key}"):
        bundled = [tensor for name, tensor in tensors.items() if name.startswith("bundle_emb.") and name.endswith(end)]
        if bundled:
            return np.concatenate(bundled)  # all words of a bundle as one
    return next(iter(tensors.values()))


def a1111_embed(tensors):
    """The vectors of a word that A1111 reads, by text model."""
    if "clip_l" in tensors and "clip_g" in tensors:
        return tensors
    assert len(tensors) == 1
    return {"": next(iter(tensors.values()))}


ROWS = {
    "sd15": {"text_encoder": np.ones((2, 768), np.float32)},
    "sdxl": {"text_encoder": np.ones((2, 768), np.float32), "text_encoder_2": np.full((2, 1280), 2, np.float32)},
}


@pytest.mark.parametrize("family", ROWS)
def test_words_are_found(family, tmp_path):
    rows = ROWS[family]
    save_embedding(tmp_path / "a.safetensors", "<a>", rows)
    tensors = read_safetensors(tmp_path / "a.safetensors").tensors
    bundled = bundle({"<a>": rows})
    parts = a1111_embed(tensors)
    for key, vectors in zip(("clip_l", "clip_g"), rows.values(), strict=False):
        np.testing.assert_array_equal(comfyui_embed(tensors, key), vectors)
        np.testing.assert_array_equal(comfyui_embed(bundled, key), vectors)
        np.testing.assert_array_equal(parts[key if len(rows) > 1 else ""], vectors)
    # In a bundle A1111 takes `bundle_emb.WORD.REST`; REST is `string_to_param.*`, or the name of a text model.
    for name in bundled:
        _, word, rest = name.split(".", 2)
        assert word == "<a>" and rest in ("string_to_param.*", "clip_l", "clip_g")


def test_comfyui_joins_all_words_of_a_bundle():
    """So a file for ComfyUI bundles one word; several words are better kept in their own files."""
    both = bundle({"a": ROWS["sd15"], "b": ROWS["sd15"]})
    assert comfyui_embed(both, "clip_l").shape == (4, 768)
