"""Counts the memory traffic of a compiled program by kernel, and its collective operations.

A kernel reads each operand in main memory once, and writes each result once. Buffers that the
compiler keeps on chip are free. An asynchronous copy onto the chip counts as one read.
"""

import math
import re
from collections.abc import Iterator

BYTES_OF = {
    8: "f64 s64 u64",
    4: "f32 s32 u32",
    2: "bf16 f16 s16 u16",
    1: "s8 u8 pred",
}
WIDTHS = {dtype: width for width, dtypes in BYTES_OF.items() for dtype in dtypes.split()}
NO_KERNEL = set(
    "parameter tuple get-tuple-element bitcast constant after-all opt-barrier copy-done slice-done "
    "async-done all-reduce-done all-gather-done collective-permute-done".split()
)
COLLECTIVE = re.compile(
    r" (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def messages(program: str) -> int:
    """Returns the number of collective operations; each counts once, also in branches and loops."""
    return len(COLLECTIVE.findall(program))


def traffic(program: str) -> Iterator[int]:
    """Yields the bytes that each kernel of the entry computation moves to and from main memory."""
    entry = program[program.index("\nENTRY ") :]
    results: dict[str, str] = {}
    for line in entry.splitlines():
        match = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$", line)
        if not match:
            continue
        name, result, operation, rest = match.groups()
        results[name] = result
        if operation in NO_KERNEL:
            continue
        operands = set(re.findall(r"%([\w.\-]+)", rest.split("), ")[0])) & results.keys()
        if operation == "copy-start":
            yield sum(map(_bytes, _arrays(result)[:2]))
        elif operation == "slice-start":
            part = _arrays(result)[1]
            yield _bytes(re.sub(r"S\(\d+\)", "", part)) + _bytes(part)
        else:
            yield _bytes(result) + sum(_bytes(results[operand]) for operand in operands)


def _arrays(text: str) -> list[str]:
    return re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", text)


def _bytes(text: str) -> int:
    """Returns the bytes of the arrays in `text` in main memory; `S(1)`, `S(2)`, ... are on chip."""
    off_chip = [array for array in _arrays(text) if not re.search(r"S\([1-9]\)", array)]
    parsed = [array.split("{")[0].rstrip("]").split("[") for array in off_chip]
    return sum(
        WIDTHS.get(dtype, 0) * math.prod(int(n) for n in shape.split(",") if n)
        for dtype, shape in parsed
    )
