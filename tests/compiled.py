"""What a compiled program does, read from its text."""

import math
import re

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}


def reduced_bytes(program: str) -> int:
    """Returns the bytes that one run of a program sums over devices. program: the result of `compiled.as_text()`."""
    total = 0
    for line in program.splitlines():
        result = re.search(r"= (.*?) (all-reduce|all-reduce-start|reduce-scatter)\(", line)
        if result:
            for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", result[1]):
                total += BYTES[kind] * math.prod(int(n) for n in shape.split(",") if n)
    return total
