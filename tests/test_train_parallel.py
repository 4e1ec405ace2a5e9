"""A pure step gives the same numbers under jit, under pmap and on one device, and sums only its gradients."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdjax.errors import ConfigError
from sdjax.runtime.hlo import Text
from sdjax.train.parallel import parallelize

IN, OUT, BATCH = 16, 8, 8
OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def train_step(state, frozen, batch, key, *, reduce):
    """Least squares for an adapter of rank 2 on a frozen matrix, with noise that depends on the example."""
    noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), (IN,)))(batch["index"])

    def loss_of(adapter):
        x = batch["x"] + 0.1 * noise
        y = x @ frozen["kernel"] + frozen["bias"] + (x @ adapter["down"]) @ adapter["up"]
        return jnp.mean((y - batch["y"]) ** 2)

    loss, gradients = reduce(jax.value_and_grad(loss_of)(state["adapter"]))
    updates, optimizer = OPTIMIZER.update(gradients, state["optimizer"])
    new = {
        "adapter": optax.apply_updates(state["adapter"], updates),
        "optimizer": optimizer,
        "key": jax.random.fold_in(state["key"], 1),
    }
    return new, {"loss": loss}


def problem():
    random = np.random.default_rng(0)
    draw = lambda *shape: random.normal(size=shape).astype(np.float32)
    adapter = {"down": draw(IN, 2), "up": draw(2, OUT)}
    state = {"adapter": adapter, "optimizer": OPTIMIZER.init(adapter), "key": jax.random.key(5)}
    batches = [
        {"x": draw(BATCH, IN), "y": draw(BATCH, OUT), "index": np.arange(BATCH, dtype=np.int32)} for _ in range(5)
    ]
    return state, {"kernel": draw(IN, OUT), "bias": draw(OUT)}, batches


def train(**settings):
    state, frozen, batches = problem()
    parallel = parallelize(train_step, batch_size=BATCH, **settings)
    state, frozen = parallel.place_state(state), parallel.place_frozen(frozen)
    losses = []
    for n, batch in enumerate(batches):
        key = jax.random.fold_in(jax.random.key(1), n)
        state, metrics = parallel.step(state, frozen, parallel.place_batch(batch), key)
        losses.append(float(metrics["loss"]))
    return parallel.fetch(state), losses


@functools.cache
def alone():
    return train(data=1)


@pytest.mark.parametrize(
    "settings",
    [
        {"data": 8},
        {"data": -1},
        {"data": 4},
        {"data": 4, "fsdp": 2},
        {"data": 1, "fsdp": -1},
        {"data": 2, "fsdp": 2, "tensor": -1},
        {"mode": "pmap"},
        {"mode": "pmap", "data": 2},
    ],
    ids=str,
)
def test_every_partition_trains_the_same(settings):
    state, losses = train(**settings)
    expected_state, expected_losses = alone()
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    for name in ("down", "up"):
        np.testing.assert_allclose(state["adapter"][name], expected_state["adapter"][name], rtol=1e-5, atol=1e-6)
        assert isinstance(state["adapter"][name], np.ndarray)
    assert jax.random.key_data(state["key"]).tolist() == jax.random.key_data(expected_state["key"]).tolist()


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_only_the_adapter_is_reduced(mode):
    state, frozen, batches = problem()
    parallel = parallelize(train_step, batch_size=BATCH, mode=mode)
    adapter_bytes = sum(leaf.nbytes for leaf in state["adapter"].values())
    arguments = parallel.place_state(state), parallel.place_frozen(frozen), parallel.place_batch(batches[0])
    program = parallel.step.lower(*arguments, jax.random.key(0)).compile().as_text()
    assert adapter_bytes <= sum(Text(program).between_devices().values()) <= adapter_bytes + 16  # and a few scalars


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_the_step_compiles_once(mode, caplog):
    state, frozen, batches = problem()
    parallel = parallelize(train_step, batch_size=BATCH, mode=mode)
    state, frozen = parallel.place_state(state), parallel.place_frozen(frozen)
    key = jax.random.key(0)
    with jax.log_compiles(True):
        for batch in batches[:3]:
            state, _ = parallel.step(state, frozen, parallel.place_batch(batch), key)
    assert sum("Compiling" in record.message for record in caplog.records) == 1


def test_every_form_of_reduction_is_counted():
    program = """
    ENTRY %m (x: f32[2]) -> f32[] {
      %a = f32[16,2]{1,0} all-reduce(%x), channel_id=1
      ROOT %b = (f32[3]{0}, bf16[4,5]{1,0}) all-reduce-start(f32[3]{0} %x, bf16[4,5]{1,0} %y), channel_id=2
      %c = f32[] all-reduce(%l)
      %d = f32[16,2]{1,0} add(%all-reduce.1, %y)
    """
    assert sum(Text(program).between_devices().values()) == 16 * 2 * 4 + 3 * 4 + 4 * 5 * 2 + 4


def test_weights_and_state_are_split_over_fsdp_and_stay_so():
    state, frozen, batches = problem()
    parallel = parallelize(train_step, batch_size=BATCH, data=2, fsdp=4)
    placed = parallel.place_frozen({**frozen, "odd": np.zeros((3, 5), np.float32)})
    shapes = {name: leaf.addressable_shards[0].data.shape for name, leaf in placed.items()}
    assert shapes == {"kernel": (IN // 4, OUT), "bias": (OUT // 4,), "odd": (3, 5)}
    state = parallel.place_state(state)
    for batch in batches[:2]:
        adapters = [state["adapter"], state["optimizer"][0].trace]
        assert [a["down"].addressable_shards[0].data.shape for a in adapters] == [(IN // 4, 2)] * 2
        state, _ = parallel.step(state, parallel.place_frozen(frozen), parallel.place_batch(batch), jax.random.key(0))


@pytest.mark.parametrize("settings", [{}, {"data": 1}, {"mode": "pmap"}], ids=str)
def test_the_state_is_donated_and_nothing_else(settings):
    state, frozen, batches = problem()
    state, frozen = jax.tree.map(jnp.asarray, (state, frozen))
    parallel = parallelize(train_step, batch_size=BATCH, **settings)
    placed = parallel.place_state(state)
    parallel.step(placed, parallel.place_frozen(frozen), parallel.place_batch(batches[0]), jax.random.key(0))
    assert placed["adapter"]["down"].is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((state, frozen)))


def test_frozen_weights_already_in_place_are_not_copied():
    parallel = parallelize(train_step, batch_size=BATCH, data=1)
    kernel = jnp.ones((IN, OUT), jnp.float32)
    placed = parallel.place_frozen({"kernel": kernel})["kernel"]
    assert placed.unsafe_buffer_pointer() == kernel.unsafe_buffer_pointer()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 12}, r"12 images cannot be split over 8 devices.*multiple of 8.*\[1, 2, 3, 4, 6\]"),
        ({"batch_size": 8, "data": 16}, "wants 16 x 1 x 1 devices, but there are 8"),
        ({"batch_size": 8, "tensor": 16}, "wants 1 x 1 x 16 devices, but there are 8"),
        ({"batch_size": 8, "tensor": 3}, "3 does not divide the 8 devices, so no axis can be -1"),
        ({"batch_size": 3, "data": 4, "tensor": 2}, r"3 images cannot be split over 4 groups of devices.*\[1, 3\]"),
        ({"batch_size": 8, "mode": "pmap", "data": 2, "fsdp": 2}, "pmap"),
    ],
)
def test_impossible_partitions_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        parallelize(train_step, **settings)


@pytest.mark.parametrize(
    ("asked", "flags", "seen"), [(2, "", 2), (1, "", 1), (2, "--xla_force_host_platform_device_count=3", 3)]
)
def test_the_cpu_is_divided_as_asked(asked, flags, seen):
    program = f"from sdjax.runtime import devices; devices.divide_cpu({asked}); print(devices.jax.device_count())"
    environment = {**os.environ, "XLA_FLAGS": flags}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == str(seen), run.stderr
