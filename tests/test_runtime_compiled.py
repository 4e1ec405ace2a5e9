"""What is read from the text of a compiled program."""

import pytest

from sdjax.runtime.compiled import between_devices


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
    assert between_devices(f"HloModule m\n  {line}\n") == expected
