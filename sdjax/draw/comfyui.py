"""The settings of a picture from the graph that ComfyUI writes into its PNG file.

The text "prompt" holds the nodes as they ran, {number: {"class_type", "inputs"}}, and "workflow" the same as ComfyUI's
page shows it. An input is a value, or a link [number of a node, output]. The graph is followed from a saved picture to
the sampler, and from there to its prompts, its size and its LoRAs.
"""

from collections.abc import Iterator, Mapping
from pathlib import PurePath, PureWindowsPath
from typing import Any, NamedTuple

from sdjax.errors import DataError
from sdjax.runtime import strict_json

_SAMPLERS = {
    **{"euler_ancestral": "euler_a", "dpm_2": "dpm2", "dpm_2_ancestral": "dpm2_a", "uni_pc": "unipc"},
    **{"dpmpp_2s_ancestral": "dpmpp_2s_a", "uni_pc_bh2": "unipc"},
}
"""Name of a sampler in ComfyUI -> in sdjax, where they differ."""
_SPACINGS = {"normal": "linspace", "ddim_uniform": "leading"}
_WIDGETS = {
    "KSampler": ("seed", "", "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "KSamplerAdvanced": ("", "noise_seed", "", "steps", "cfg", "sampler_name", "scheduler"),
    "CLIPTextEncode": ("text",),
    "EmptyLatentImage": ("width", "height", "batch_size"),
    "LoraLoader": ("lora_name", "strength_model", "strength_clip"),
    "LoraLoaderModelOnly": ("lora_name", "strength_model"),
    "CheckpointLoaderSimple": ("ckpt_name",),
    "CLIPSetLastLayer": ("stop_at_clip_layer",),
}
"""Kind of a node -> the inputs that "workflow" lists as widgets_values, in this order; empty: no input."""
_KINDS = ("KSampler", "KSamplerAdvanced")
_MOST_NODES, _LONGEST = 5000, 4_000_000
"""Nodes and characters of a graph that is read. Those of people have a hundredth of it."""
_KNOWN = ("Empty", "Primitive", "VAE", "LoadImage", *_WIDGETS)
"""Beginnings of the names of nodes that are read, or that say nothing of the settings."""


class Node(NamedTuple):
    """A node of the graph. inputs: name -> value, or (number of a node, output) for a link."""

    kind: str
    inputs: dict[str, Any]


Graph = dict[str, Node]


def settings_of(info: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns the raw values of settings by name, and the kinds of nodes and the values that have no such setting.

    info: the texts of a PNG file. Raises DataError for a graph that cannot be read, or that has no sampler.
    """
    graph = _graph(info)
    sampler, others = _sampler(graph)
    inputs = sampler.inputs
    settings: dict[str, Any] = {
        "steps": _value(graph, inputs, "steps"),
        "guidance": _value(graph, inputs, "cfg"),
        "seed": _value(graph, inputs, "noise_seed" if "noise_seed" in inputs else "seed"),
        "strength": _value(graph, inputs, "denoise"),
    }
    name = str(_value(graph, inputs, "sampler_name") or "").removesuffix("_gpu")
    settings["sampler"] = _SAMPLERS.get(name, name) or None
    spacing = _value(graph, inputs, "scheduler")
    settings["spacing"] = _SPACINGS.get(spacing, spacing) if isinstance(spacing, str) else None
    positive, negative = (_text(graph, inputs.get(role)) for role in ("positive", "negative"))
    loras, used = [], []
    for node in _upstream(graph, inputs.get("model"), ("model",)):
        used.append(node)
        if node.kind in ("LoraLoader", "LoraLoaderModelOnly"):
            loras.append(_tag(graph, node))
    settings["prompt"] = " ".join([positive, *reversed([tag for tag in loras if tag])]).strip()
    settings["negative_prompt"] = negative
    for node in _upstream(graph, inputs.get("latent_image")):
        used.append(node)
        if node.kind.startswith("Empty"):
            settings["width"], settings["height"] = (_value(graph, node.inputs, side) for side in ("width", "height"))
            break
    for node in _upstream(graph, inputs.get("positive")):
        used.append(node)
        if node.kind == "CLIPSetLastLayer" and isinstance(layer := node.inputs.get("stop_at_clip_layer"), int):
            settings["clip_skip"] = -layer
    left_out = [node.kind for node in used if not node.kind.startswith(_KNOWN)]
    left_out += [f"a second {node.kind}" for node in others]
    return {name: value for name, value in settings.items() if value is not None}, list(dict.fromkeys(left_out))


def _graph(info: Mapping[str, Any]) -> Graph:
    """The graph of a picture. Raises DataError."""
    for name, read in (("prompt", _of_prompt), ("workflow", _of_workflow)):
        text = info.get(name)
        if not isinstance(text, str) or not text.strip():
            continue
        if len(text) > _LONGEST:
            raise DataError(
                f"the text {name!r} of this picture has {len(text)} characters: at most {_LONGEST} are read"
            )
        try:
            graph = read(strict_json.parse(text))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            raise DataError(f"the text {name!r} of this picture is not a graph of ComfyUI") from None
        if len(graph) > _MOST_NODES:
            raise DataError(f"the graph of this picture has {len(graph)} nodes: at most {_MOST_NODES} are read")
        return graph
    raise DataError("this picture holds no graph of ComfyUI")


def _of_prompt(value: dict[str, Any]) -> Graph:
    nodes = {number: node for number, node in value.items() if isinstance(node, dict) and "class_type" in node}
    return {
        number: Node(
            str(node["class_type"]), {name: _link(given) for name, given in dict(node.get("inputs", {})).items()}
        )
        for number, node in nodes.items()
    }


def _link(given: Any) -> Any:
    return (str(given[0]), given[1]) if isinstance(given, list) and len(given) == 2 else given


def _of_workflow(value: dict[str, Any]) -> Graph:
    sources = {link[0]: (str(link[1]), link[2]) for link in value["links"]}
    graph = {}
    for node in value["nodes"]:
        widgets = node.get("widgets_values") or []
        inputs = dict(zip(_WIDGETS.get(node["type"], ()), widgets, strict=False)) if isinstance(widgets, list) else {}
        linked = {each["name"]: sources[each["link"]] for each in node.get("inputs") or () if each.get("link")}
        graph[str(node["id"])] = Node(str(node["type"]), {**inputs, **linked})
    return graph


def _sampler(graph: Graph) -> tuple[Node, list[Node]]:
    """The sampler that begins the saved picture, and those that go on from it. Raises DataError without one."""
    saved = [node for node in graph.values() if node.kind in ("SaveImage", "PreviewImage")]
    made = [node for each in saved for link in each.inputs.values() for node in _upstream(graph, link)]
    for nodes in (made, list(graph.values())):
        found = [node for node in nodes if node.kind in _KINDS]
        if found:
            earlier = _upstream(graph, found[0].inputs.get("latent_image"))
            first = [found[0], *(node for node in earlier if node.kind in _KINDS)][-1]
            return first, [node for node in found if node is not first]
    raise DataError("the graph of ComfyUI in this picture has no KSampler, which is where its settings are")


def _upstream(graph: Graph, link: Any, names: tuple[str, ...] = ()) -> Iterator[Node]:
    """Yields the nodes that a link comes from, the nearest first, each once. names: inputs to follow; empty: all."""
    seen, waiting = set(), [link]
    for link in waiting:  # which grows
        if not isinstance(link, tuple) or link[0] in seen or link[0] not in graph:
            continue
        seen.add(link[0])
        node = graph[link[0]]
        yield node
        waiting += [given for name, given in node.inputs.items() if not names or name in names]


def _value(graph: Graph, inputs: Mapping[str, Any], name: str) -> Any:
    """The value of an input. If it is linked: the only value of the node that the link leads to."""
    seen, value = set(), inputs.get(name)
    while isinstance(value, tuple) and value[0] in graph and value[0] not in seen:
        seen.add(value[0])
        given = graph[value[0]].inputs
        value = given.get(name, next(iter(given.values()), None) if len(given) == 1 else None)
    return value if isinstance(value, (str, int, float)) and not isinstance(value, bool) else None


def _text(graph: Graph, link: Any) -> str:
    """The text of the nearest prompt that a link comes from."""
    for node in _upstream(graph, link):
        if node.kind.startswith("CLIPTextEncode"):
            texts = [_value(graph, node.inputs, name) for name in ("text", "text_g", "text_l")]
            return next((text for text in texts if isinstance(text, str)), "")
    return ""


def _tag(graph: Graph, node: Node) -> str:
    """The LoRA of a node as a tag of a prompt, `<lora:NAME:TEXT WEIGHT:U-NET WEIGHT>`, or nothing."""
    name = _value(graph, node.inputs, "lora_name")
    unet = _value(graph, node.inputs, "strength_model")
    text = 0.0 if node.kind == "LoraLoaderModelOnly" else _value(graph, node.inputs, "strength_clip")
    if not isinstance(name, str) or not all(isinstance(weight, (int, float)) for weight in (unet, text)):
        return ""
    stem = PurePath(PureWindowsPath(name).name).stem
    plain = stem and not any(mark in stem for mark in "<>:\n")
    return f"<lora:{stem}:{unet:g}>" if plain and unet == text else f"<lora:{stem}:{text:g}:{unet:g}>" if plain else ""
