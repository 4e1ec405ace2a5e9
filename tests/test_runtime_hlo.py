"""What is read from the text of a compiled program."""

import jax
import jax.numpy as jnp
import pytest

from sdjax.runtime.hlo import Text


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("%a = f32[4,8]{1,0} all-reduce(%x), to_apply=%add", {"all-reduce": 128}),
        ("%a = (f32[4]{0}, bf16[2]{0}) all-reduce(%x, %y), to_apply=%add", {"all-reduce": 20}),
        ("%a = (f32[4]{0}, bf16[2]{0}) all-reduce-start(%x, %y), to_apply=%add", {"all-reduce": 20}),
        ("%a = (f32[2]{0}, f32[8]{0}) all-gather-start(%x), dimensions={0}", {"all-gather": 32}),
        (
            "%a = ((f32[2]{0}, s8[1]{0}), (f32[8]{0}, s8[4]{0})) all-gather-start(%x, %y), dimensions={0}",
            {"all-gather": 36},
        ),
        (
            "%a = (bf16[6]{0}, bf16[6]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}",
            {"collective-permute": 12},
        ),
        ("%a = f32[8]{0} all-gather-done(%b)", {}),
    ],
)
def test_what_an_operation_sends_is_counted_once(line, expected):
    """An operation that starts a transfer gives its operands beside its results."""
    assert Text(f"%add () -> f32[] {{\n}}\nENTRY %m () -> f32[] {{\n  {line}\n}}\n").between_devices() == expected


def test_an_operation_in_pieces_is_counted_once():
    """A TPU's compiler writes it in each fusion that does a piece of it; the numbers of other kinds are their own."""
    line = "%a = bf16[8]{{0}} all-{}(%x), channel_id={}, dimensions={{0}}"
    lines = [line.format(*found) for found in (("gather", 7), ("gather", 7), ("gather", 8), ("reduce", 7))]
    body = "\n".join(f"  {line}" for line in lines)
    found = Text(f"%add () -> f32[] {{\n}}\nENTRY %m () -> f32[] {{\n{body}\n}}\n").between_devices()
    assert found == {"all-gather": 32, "all-reduce": 16}


LOOP = """HloModule m

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %c = f32[] add(%a, %b)
}

%products (x: f32[8,8]) -> f32[8,8] {
  ROOT %y = f32[8,8]{1,0} convolution(%x, %x), dim_labels=bf_io->bf
}

%body (x: f32[8,8]) -> f32[8,8] {
  %y = f32[8,8]{1,0} fusion(%x), kind=kOutput, calls=%products, backend_config={"estimated_cycles":"100"}
  %k = f32[8,8]{1,0} custom-call(%y), custom_call_target="tpu_custom_call"
  ROOT %z = f32[8,8]{1,0} all-reduce(%k), to_apply=%add
}

%condition (x: f32[8,8]) -> pred[] {
  %n = s32[]{:T(128)} constant(3)
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %w = (s32[], f32[8,8]{1,0}) while(%t), condition=%condition, body=%body
  %z = f32[8,8]{1,0} get-tuple-element(%w), index=1
  ROOT %y = f32[8,8]{1,0} fusion(%z), kind=kLoop, calls=%products, backend_config={"estimated_cycles":"7"}
}
"""


def test_a_loop_counts_as_often_as_it_runs():
    """As a TPU's compiler writes it: the number of turns is the bound of the condition."""
    text = Text(LOOP)
    assert (text.estimated_cycles(), text.kernels()) == (307, 3)
    assert text.between_devices() == {"all-reduce": 3 * 256}
    assert text.products_repeated() == 4 / 2
    assert abs(text.results_repeated() - (3 * 3 + 1) / (3 + 1)) < 0.01  # compared beside the one byte of the condition
    known = LOOP.replace("constant(3)", "parameter(1)").replace(
        "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}'
    )
    assert Text(known).estimated_cycles() == 507
    assert Text(LOOP.replace("constant(3)", "parameter(1)")).estimated_cycles() == 107


@pytest.mark.parametrize("turns", [2, 7])
def test_the_loops_of_this_machines_compiler(turns):
    def once(x):
        return jnp.tanh(x @ x)

    def often(x):
        return jax.lax.scan(lambda x, _: (once(x), None), x, length=turns)[0] @ x

    text = Text(jax.jit(often).lower(jnp.ones((64, 64))).compile().as_text())
    assert text.products_repeated() == (turns + 1) / 2
    assert text.estimated_cycles() is None and text.between_devices() == {}
