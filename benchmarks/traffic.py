"""What a scheduled program moves to and from main memory, kernel by kernel, and how many messages
it sends.

Bytes are counted so: each operand that a kernel reads from main memory once, and each result that
it writes once. Buffers that the compiler keeps on chip are free, and an asynchronous copy onto the
chip counts as one read.
"""

import math
import re
from collections.abc import Iterator

WIDTHS = {
    "f64": 8,
    "s64": 8,
    "u64": 8,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "s8": 1,
    "u8": 1,
    "pred": 1,
}
NO_KERNEL = {
    "parameter",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "constant",
    "after-all",
    "copy-done",
    "slice-done",
    "async-done",
    "all-reduce-done",
    "all-gather-done",
    "collective-permute-done",
    "opt-barrier",
}
COLLECTIVE = re.compile(
    r" (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def messages(program: str) -> int:
    """How many collective operations there are, each counted once, those of branches and loops as
    well.
    """
    return len(COLLECTIVE.findall(program))


def traffic(program: str) -> Iterator[int]:
    """Bytes to and from main memory of each kernel in the program's entry computation."""
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
    """Size of the arrays in `text` that live in main memory; `S(1)` and the like are on chip."""
    off_chip = [array for array in _arrays(text) if not re.search(r"S\([1-9]\)", array)]
    parsed = [array.split("{")[0].rstrip("]").split("[") for array in off_chip]
    return sum(
        WIDTHS.get(dtype, 0) * math.prod(int(n) for n in shape.split(",") if n)
        for dtype, shape in parsed
    )
