"""Reads the text of compiled programs, in XLA's language HLO."""

import math
import re
from collections.abc import Callable, Iterable

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}

_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(_COLLECTIVES)})(-start)?\(")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_PRODUCT = re.compile(r" (?:convolution|dot)\(|__cublas|__cudnn\$conv")
_RESULT = re.compile(r"= (\w+)\[([\d,]*)\]\S* (?!parameter|get-tuple-element|bitcast|constant)[\w-]+\(")
_USED = re.compile(r"\b(body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


class Text:
    """The text of a program: a list of computations, each of which stands before those that use it."""

    def __init__(self, text: str) -> None:
        heads = list(re.finditer(r"^\s*(ENTRY )?%?([\w.-]+) .*\{$", text, re.MULTILINE))
        ends = [head.start() for head in heads[1:]] + [len(text)]
        self._parts = {head[2]: text[head.end() : end] for head, end in zip(heads, ends, strict=True)}
        entries = {head[2] for head in heads if head[1]}
        self._once = {name: int(name in entries) for name in self._parts}
        """Computation -> how often it would run in one run of the program if each loop ran once."""
        self._runs = dict(self._once)
        """Computation -> how often it does run. Of a condition, every branch is counted."""
        self._fused: set[str] = set()
        for name in reversed(self._parts):
            for line in self._parts[name].splitlines():
                self._count_used(line, name)

    def _count_used(self, line: str, by: str) -> None:
        used = _USED.findall(line)
        if branches := _BRANCHES.search(line):
            used += [("branch", name) for name in re.findall(r"[\w.-]+", branches[1])]
        repeats = self._repeats(line, dict(used)) if " while(" in line else 1
        for how, name in used:
            self._once[name] += self._once[by]
            self._runs[name] += self._runs[by] * (repeats if how == "body" else 1)
            if how == "calls":
                self._fused.add(name)

    def _repeats(self, loop: str, used: dict[str, str]) -> int:
        """How often a loop runs; 1 if that is not known. The TPU's compiler leaves it to the bound in the condition."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop):
            return int(known[1])
        condition = self._parts[used["condition"]]
        bounds = re.findall(r"= s32\[\]\S* constant\((\d+)\)", condition) if "direction=LT" in condition else []
        return max(map(int, bounds), default=1)

    def _sum(self, count: Callable[[str], int]) -> int:
        """Returns the sum of `count` of the computations, each as often as it runs."""
        return sum(runs * count(self._parts[name]) for name, runs in self._runs.items() if runs)

    def estimated_cycles(self) -> float | None:
        """Returns the compiler's estimate, or None where it makes none."""
        cycles = self._sum(lambda part: sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', part))))
        return float(cycles) or None

    def kernels(self) -> int:
        """Returns how often a kernel written in Pallas runs on a TPU. The estimate leaves these out."""
        return self._sum(lambda part: part.count('custom_call_target="tpu_custom_call"'))

    def products_repeated(self) -> float:
        """Returns how many times as many products and convolutions run as if each loop ran once."""
        return self._repeated(lambda part: len(_PRODUCT.findall(part)), self._parts)

    def results_repeated(self) -> float:
        """Returns how many times as many bytes the operations make as if each loop ran once."""
        apart = [name for name in self._parts if name not in self._fused]
        return self._repeated(lambda part: sum(_size(*found) for found in _RESULT.findall(part)), apart)

    def between_devices(self) -> dict[str, int]:
        """Returns kind of collective operation -> bytes of its results.

        A TPU may do one operation in pieces, between the pieces of others. Each piece is written as the operation, with
        its channel, and counts once.
        """
        kinds: dict[str, int] = dict.fromkeys(_COLLECTIVES, 0)
        seen = set[tuple[str, str]]()
        for name, runs in self._runs.items():
            for line in self._parts[name].splitlines() if runs else ():
                if found := _COLLECTIVE.search(line):
                    result, kind, start = found.groups()
                    channel = _CHANNEL.search(line)
                    key = kind, channel[1] if channel else line
                    kinds[kind] += 0 if key in seen else runs * _collected(result, kind, start)
                    seen.add(key)
        return {kind: size for kind, size in kinds.items() if size}

    def _repeated(self, count: Callable[[str], int], names: Iterable[str]) -> float:
        counts = {name: count(self._parts[name]) for name in names}
        once = sum(self._once[name] * found for name, found in counts.items())
        return sum(self._runs[name] * found for name, found in counts.items()) / once if once else 1.0


def _collected(result: str, kind: str, start: str | None) -> int:
    """The bytes of the results of a collective operation."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", result)
    if start and kind in ("all-gather", "collective-permute"):  # gives its operands, its results, perhaps counters
        arrays = [array for array in arrays if array != ("u32", "")]
        arrays = arrays[len(arrays) // 2 :]
    return sum(_size(*array) for array in arrays)


def _size(dtype: str, shape: str) -> int:
    return _BYTES.get(dtype, 4) * math.prod(int(n) for n in shape.split(",") if n)
