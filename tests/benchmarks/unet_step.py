"""Times a step of the U-Net with random weights and inputs, and prints a JSON line.

    python tests/benchmarks/unet_step.py --size sd15 --latent 64 --batch 1 --mode lora --runs 3 --peer peer_torch.py

mode: infer only computes the output. lora, ti and full are training steps of the U-Net alone, with the loss on the
noise and AdamW: lora trains an adapter, ti trains the context, full trains all weights.
peer: a script that times the same step in PyTorch, takes the same flags and prints such a line. The two take turns,
step by step, so that other work on the machine slows both alike.
Times are in seconds. Memory is in GB, the peak of the whole process, including compilation. Use an otherwise idle
machine, and compare only figures that were measured together.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sdjax import lora
from sdjax.models.layers import Compute
from sdjax.models.unet import UNet, UNetConfig, abstract_params
from sdjax.runtime import host_memory
from sdjax.runtime.compiler_options import is_large
from sdjax.runtime.devices import divide_cpu
from sdjax.train.config import Stage
from sdjax.train.optimizers import make_optimizer
from sdjax.train.parallel import parallelize

CONFIGS = {
    "sd15": dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
    "tiny": dict(
        sample_size=16,
        cross_attention_dim=128,
        attention_head_dim=4,
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    ),
}


def random_params(abstract, key):
    """Returns weights with the spread of a fresh model. They are made leaf by leaf, to save memory."""
    leaves, treedef = jax.tree.flatten_with_path(abstract)
    filled = []
    for i, (path, leaf) in enumerate(leaves):
        name = path[-1].key
        if name == "scale":
            filled.append(jnp.ones(leaf.shape, leaf.dtype))
        elif name == "bias":
            filled.append(jnp.zeros(leaf.shape, leaf.dtype))
        else:
            fan_in = max(1, leaf.size // leaf.shape[-1])
            draw = jax.random.normal(jax.random.fold_in(key, i), leaf.shape, leaf.dtype)
            filled.append(draw / jnp.sqrt(jnp.float32(fan_in)))
    return treedef.unflatten(filled)


def build(args):
    """Returns `step(state, params, batch, key) -> (state, metrics)` for the mode, and its placed arguments."""
    config = UNetConfig.from_dict(CONFIGS[args.size])
    unet = UNet(config, Compute(dtype=jnp.dtype(jnp.bfloat16 if args.bf16 else jnp.float32)))
    key = jax.random.key(0)
    params = random_params(abstract_params(config), key)
    shape = (args.batch, args.latent, args.latent, config.in_channels)
    context = jax.random.normal(key, (args.batch, 77, config.cross_attention_dim[0]))
    batch = {
        "latents": jax.random.normal(jax.random.fold_in(key, 1), shape),
        "noise": jax.random.normal(jax.random.fold_in(key, 2), shape),
        "timesteps": jax.random.randint(key, (args.batch,), 0, 1000).astype(jnp.float32),
        "context": context,
    }
    scales = None
    if args.mode == "lora":
        trained, scales = lora.split(lora.init(key, params, rank=args.rank))
    elif args.mode == "ti":
        trained = {"context": context[:1]}
    elif args.mode == "full":
        trained, params = params, {}
    else:
        trained = {}
    # The optimizer of `sdjax.train`, without clipping.
    stage = Stage(name="step", train=("unet",), steps=1000, learning_rate=1e-4, schedule="constant", clip_norm=0.0)
    optimizer = make_optimizer(stage, {"unet": "weights"})

    def predict(trained, params, batch):
        variables = {"params": trained if args.mode == "full" else params}
        if args.mode == "lora":
            variables["lora"] = lora.join(trained, scales)
        context = (
            jnp.broadcast_to(trained["context"], batch["context"].shape) if args.mode == "ti" else batch["context"]
        )
        return unet.apply(variables, batch["latents"], batch["timesteps"], context)

    def loss(trained, params, batch):
        return jnp.mean(jnp.square(predict(trained["unet"], params, batch).astype(jnp.float32) - batch["noise"]))

    def infer(state, params, batch, key, *, reduce):
        return state, predict(state, params, batch)

    def train(state, params, batch, key, *, reduce):
        trained, moments = state
        value, gradient = reduce(jax.value_and_grad(loss)(trained, params, batch))
        updates, moments = optimizer.update(gradient, moments, trained)
        return (optax.apply_updates(trained, updates), moments), value

    step = infer if args.mode == "infer" else train
    options = dict(large=is_large(abstract_params(config)), save_memory=args.mode != "full")  # as in `sdjax.train`
    parallel = parallelize(step, batch_size=args.batch, **options)
    state = trained if args.mode == "infer" else ({"unet": trained}, optimizer.init({"unet": trained}))
    batch = {name: np.asarray(leaf) for name, leaf in batch.items()}
    return parallel.step, parallel.place_state(state), parallel.place_frozen(params), parallel.place_batch(batch), key


TURN = """
import importlib.util, sys, time
from types import SimpleNamespace

def perf_counter(calls=iter(range(1 << 30))):
    before = next(calls) % 2 == 0
    if before:
        sys.stdin.readline()
    else:
        print(flush=True)
    return time.perf_counter()

sys.argv = sys.argv[1:]
spec = importlib.util.spec_from_file_location("script", sys.argv[0])
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
script.time = SimpleNamespace(perf_counter=perf_counter, monotonic=time.monotonic)
script.main()
"""


def in_turns(commands, steps):
    """Runs scripts with their flags, one step of each in turn, and returns the JSON line of each.

    A script must call time.perf_counter twice for each step, before and after it, and nowhere else.
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = [subprocess.Popen([sys.executable, "-c", TURN, *command], **pipes) for command in commands]
    for _ in range(steps):
        for child in children:
            child.stdin.write("go\n")
            child.stdin.flush()
            child.stdout.readline()
    return [json.loads(child.stdout.read().splitlines()[-1]) for child in children]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="sd15", choices=CONFIGS)
    parser.add_argument("--latent", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--mode", default="lora", choices=["infer", "lora", "ti", "full"])
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--devices", type=int, default=1, help="see parallel.cpu_devices; not for the peer")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--cache", help="folder of a persistent compilation cache")
    parser.add_argument("--peer", help="script to compare with; prints both lines and their ratios")
    args = parser.parse_args()
    if args.peer:
        given = {n: v for n, v in vars(args).items() if n not in ("peer", "bf16", "cache", "devices") and v is not None}
        flags = [f"--{name}={value}" for name, value in given.items()] + ["--bf16"] * args.bf16
        more = [f"--devices={args.devices}", *([f"--cache={args.cache}"] if args.cache else [])]
        theirs, ours = in_turns([[args.peer, *flags], [__file__, *flags, *more]], args.runs + 1)
        for line in (theirs, ours):
            print(json.dumps(line))
        ratios = {f"speed, {n}": theirs[f"{n}_s"] / ours[f"{n}_s"] for n in ("median", "min")}
        print(json.dumps(dict(ratios=ratios | {"memory": ours["peak_gb"] / theirs["peak_gb"]})))
        return
    if args.cache:
        jax.config.update("jax_compilation_cache_dir", args.cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

    divide_cpu(args.devices)
    host_memory.keep()  # as the commands do
    step, state, *arguments = build(args)
    start = time.monotonic()  # perf_counter is for the steps alone, see `in_turns`
    lowered = step.lower(state, *arguments)
    lower_s = time.monotonic() - start
    compiled = lowered.compile()
    compile_s = time.monotonic() - start
    times = []
    for _ in range(args.runs + 1):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, *arguments))
        times.append(time.perf_counter() - start)
    times = sorted(times[1:])
    figures = dict(median_s=times[len(times) // 2], min_s=times[0], compile_s=compile_s, lower_s=lower_s)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    line = dict(vars(args), peer="sdjax", jax=jax.__version__, **figures, peak_gb=peak)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
