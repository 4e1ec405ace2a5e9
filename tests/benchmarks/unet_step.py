"""Times one U-Net step of ours (random weights and inputs) and prints one JSON line; with --peer, PyTorch's beside it.

    python tests/benchmarks/unet_step.py --size sd15 --latent 64 --batch 1 --mode lora --runs 3 --peer peer_torch.py

mode: infer | lora | ti | full, as in the peer: U-Net only, eps loss, AdamW; ti back-propagates to the context.
Run it on an otherwise idle machine and compare only figures of one sitting: with --peer the two take turns, step by
step, so that a host that is busy elsewhere slows both alike. Times in seconds, memory in GB (peak of the whole process,
compiling included).
"""

import argparse
import functools
import json
import resource
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import optax

from sdjax import host_memory, lora
from sdjax.models.layers import Compute
from sdjax.models.unet import UNet, UNetConfig, abstract_params
from sdjax.train.parallel import memory_first

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
    """Weights of the spread a fresh model has, leaf by leaf so that no second copy exists."""
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
    """The jitted step of the asked mode, and the state it carries."""
    config = UNetConfig.from_dict(CONFIGS[args.size])
    unet = UNet(config, Compute(dtype=jnp.dtype(jnp.bfloat16 if args.bf16 else jnp.float32)))
    key = jax.random.key(0)
    params = random_params(abstract_params(config), key)
    shape = (args.batch, args.latent, args.latent, config.in_channels)
    latents, noise = (jax.random.normal(jax.random.fold_in(key, i), shape) for i in (1, 2))
    timesteps = jax.random.randint(key, (args.batch,), 0, 1000).astype(jnp.float32)
    context = jax.random.normal(key, (args.batch, 77, config.cross_attention_dim[0]))
    if args.mode == "infer":
        step = jax.jit(lambda state, params: unet.apply({"params": params}, latents, timesteps, context))
        return step, None, params

    scales = None
    if args.mode == "lora":
        trained, scales = lora.split(lora.init(key, params, rank=args.rank))
    elif args.mode == "ti":
        trained = context
    else:
        trained, params = params, None
    optimizer = optax.adamw(1e-4)

    def loss(trained, params):
        variables = {"params": trained if args.mode == "full" else params}
        if args.mode == "lora":
            variables["lora"] = lora.join(trained, scales)
        out = unet.apply(variables, latents, timesteps, trained if args.mode == "ti" else context)
        return jnp.mean(jnp.square(out.astype(jnp.float32) - noise))

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=memory_first(jax.default_backend()))
    def step(state, params):
        trained, moments = state
        gradient = jax.grad(loss)(trained, params)
        updates, moments = optimizer.update(gradient, moments, trained)
        return optax.apply_updates(trained, updates), moments

    return step, (trained, optimizer.init(trained)), params


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


def in_turns(scripts, flags, steps):
    """The JSON line of each script, all of which time every step by two calls of time.perf_counter."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = [subprocess.Popen([sys.executable, "-c", TURN, script, *flags], **pipes) for script in scripts]
    for _ in range(steps):
        for child in children:
            child.stdin.write("go\n")
            child.stdin.flush()
            child.stdout.readline()
    return [json.loads(child.stdout.read().splitlines()[-1]) for child in children]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="sd15", choices=CONFIGS)
    parser.add_argument("--latent", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--mode", default="lora", choices=["infer", "lora", "ti", "full"])
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--cache", help="folder of a persistent compilation cache")
    parser.add_argument("--peer", help="the peer's script: both run in turn, and the ratios are printed")
    args = parser.parse_args()
    if args.peer:
        flags = [f"--{n}={v}" for n, v in vars(args).items() if n not in ("peer", "bf16", "cache") and v is not None]
        theirs, ours = in_turns([args.peer, __file__], [*flags, *(["--bf16"] if args.bf16 else [])], args.runs + 1)
        for line in (theirs, ours):
            print(json.dumps(line))
        ratios = {f"speed, {n}": theirs[f"{n}_s"] / ours[f"{n}_s"] for n in ("median", "min")}
        print(json.dumps(dict(ratios=ratios | {"memory": ours["peak_gb"] / theirs["peak_gb"]})))
        return
    if args.cache:
        jax.config.update("jax_compilation_cache_dir", args.cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

    host_memory.keep()  # as the commands do
    step, state, params = build(args)
    start = time.monotonic()  # perf_counter is for the steps alone, as of `in_turns`
    lowered = step.lower(state, params)
    lower_s = time.monotonic() - start
    compiled = lowered.compile()
    compile_s = time.monotonic() - start
    times = []
    for _ in range(args.runs + 1):
        start = time.perf_counter()
        out = jax.block_until_ready(compiled(state, params))
        state = state if args.mode == "infer" else out
        times.append(time.perf_counter() - start)
    times = sorted(times[1:])
    figures = dict(median_s=times[len(times) // 2], min_s=times[0], compile_s=compile_s, lower_s=lower_s)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    line = dict(vars(args), peer="sdjax", jax=jax.__version__, **figures, peak_gb=peak)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
