"""What is there for a compiler's sake, and only that.

Each name here equals one plain line, which is the first line of its docstring. The engine is right
with the plain lines alone (a test replaces this module by them); with these it is as cheap as
below. `python -m benchmarks lowering` takes each out and measures again.

| name | plain line | what it buys: figures with it -> without it |
|---|---|---|
| `quickest` | `sizes(norm, plan, leaves)` | CPU step: global norm 1.13 -> 5.03, AGC 1.66 -> 9.05 |
| | | H100, global norm: 98 -> 274 kernels |
| `shared_vector` | `vector` | H100, a norm for each leaf: 98 -> 355 kernels |
| `Blocks` | a list of arrays | v5e, AGC: 2020 -> 6368 kernels; CPU compile time 3.7 -> 51 s |
| `columns` | `[stack[:, k] for k in ...]` | CPU compile time, AGC: 3.7 -> 19 s |
| `largest` | `jnp.max(jnp.abs(x))` | CPU step, by value: 1.80 -> 5.25 |
| `most` | `jnp.max(x, axes)` | on CPU, NaN: XLA loses it in a maximum of 4096 numbers or more |
| `share_of` | `jnp.mean(flags)` | CPU step, by value with the exact share: 1.80 -> 3.40 |
| `traced_once` | the function itself | tracing of equal leaves |

A CPU step is in times of bare Adam (2 layers of GPT-2); kernels and compile time are of GPT-2, by
the compilers. All of JAX 0.10.2.
"""

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from optaxclip import _jax, _sharding
from optaxclip._numerics import wide, widen
from optaxclip._types import Axes, Norm

LARGE = 2**14  # numbers in a leaf, from which on a second read of it costs time on a CPU


def traced_once(static: int | tuple[int, ...] = (), inline: bool = False) -> Callable[..., Any]:
    """`lambda function: function`.

    `jax.jit` remembers a trace, so equal leaves are traced once. With `inline` the operations join
    the program of the caller before XLA sees them: on TPU it makes fewer kernels of these.
    """
    return functools.partial(jax.jit, static_argnums=static, inline=inline)


# MEASURE

Sizes = Callable[[Norm, Any, list[Any]], list[Array]]  # of a norm, a `_measure.Plan`, leaves


def quickest(sizes: Sizes, norm: Norm, plan: Any, leaves: list[Array]) -> list[Array]:
    """`sizes(norm, plan, leaves)`.

    Squares of float32 numbers never overflow in float64, so there the textbook's formula
    (`norm.fast`) will do. A GPU waits for the memory, whatever it computes. A CPU takes twice as
    long for sums in float64, so it tries float32 first where leaves are large. A TPU has no
    float64. Sharded leaves keep one program for all platforms, because each sends the same sums.
    """
    fast, in_float64 = norm.fast, any(jnp.finfo(wide(leaf)).bits == 64 for leaf in leaves)
    if fast is None or any(plan.split) or in_float64:
        return sizes(norm, plan, leaves)
    large = any(jnp.size(leaf) > LARGE for leaf in leaves)

    def on_cpu(leaves: list[Array]) -> list[Array]:
        return _in_stacks(_in_float32 if large else _in_float64, sizes, fast, plan, leaves)

    def on_gpu(leaves: list[Array]) -> list[Array]:
        return _in_float64(sizes, fast, plan, leaves, fused=plan.groups is not None)

    plain = functools.partial(sizes, norm, plan)
    return jax.lax.platform_dependent(leaves, cpu=on_cpu, cuda=on_gpu, rocm=on_gpu, default=plain)


def _in_float64(
    sizes: Sizes, norm: Norm, plan: Any, leaves: list[Array], fused: bool = False
) -> list[Array]:
    """Sizes in float64; on a GPU the kernels of equal leaves are `fused`, by a factor of one."""
    with _jax.float64():
        one = shared_vector(jnp.ones(2))[0] if fused else None
        leaves = [_float64(leaf, one) for leaf in leaves]
        return [size.astype(jnp.float32) for size in sizes(norm, plan, leaves)]


@traced_once()
def _float64(leaf: ArrayLike, one: Array | None) -> Array:
    leaf = widen(leaf, jnp.float64)
    return leaf if one is None else leaf * one


def _in_float32(sizes: Sizes, norm: Norm, plan: Any, leaves: list[Array]) -> list[Array]:
    """Sizes in float32 where that is exact, and in float64 if it turns out that it was not."""
    in_float32 = sizes(norm, plan, leaves)

    # In this range no square that matters over- or underflows: elements below 2^-30 of a size do
    # not change it. A branch that is not taken costs nothing on a CPU.
    def is_exact(size: Array) -> Array:
        low, high = size.dtype.type(2.0**-30), jnp.finfo(size.dtype).max
        return (size == jax.lax.clamp(low, size, high)).all()

    exact = [is_exact(stack) for stack in _stacks(in_float32, group_by_type(in_float32))]
    in_float64 = functools.partial(_in_float64, sizes, norm, plan)
    return jax.lax.cond(jnp.array(exact).all(), lambda _: in_float32, in_float64, leaves)


def _in_stacks(
    way: Callable[..., list[Array]], sizes: Sizes, norm: Norm, plan: Any, leaves: list[Array]
) -> list[Array]:
    """Sizes, measured in stacks of equal leaves that are not large.

    XLA on CPU takes as long to compile an operation on a stack as on one leaf, and copying small
    leaves costs nothing there.
    """
    members = group_by_type(leaves, plan.axes)
    stacks = way(sizes, norm, plan.stacked(members, leaves), _stacks(leaves, members))
    if plan.groups is not None:
        return stacks
    rows = [row for stack in stacks for row in _rows(stack)]
    return [rows[k] for k in inverse_permutation(members)]


def _rows(stack: Array) -> list[Array]:
    """`list(stack)`, written so that XLA sees that the rows come from one stack."""
    shape = stack.shape[1:]
    flat = stack.ravel() if math.prod(shape) == 1 else stack
    return [row.reshape(shape) for row in jax.lax.split(flat, [1] * len(stack))]


# Stacks


def group_by_type(blocks: Sequence[Any], keys: Sequence[Hashable] | None = None) -> list[list[int]]:
    """Positions of blocks (trees of arrays) that have equal types and keys.

    A large block is a group by itself, as is one that an explicit mesh shards.
    """
    groups: dict[Hashable, list[int]] = {}
    for k, block in enumerate(blocks):
        arrays, structure = jax.tree.flatten(block)
        single = any(jnp.size(x) > LARGE or _sharding.is_explicit(x) for x in arrays)
        key = k if single else (keys and keys[k], structure, *map(jax.typeof, arrays))
        groups.setdefault(key, []).append(k)
    return list(groups.values())


def inverse_permutation(members: Sequence[Sequence[int]]) -> np.ndarray:
    """For each block its position among all members, one group after the other."""
    return np.argsort([k for group in members for k in group])


def _stacks(blocks: Sequence[Any], members: Sequence[Sequence[int]]) -> list[Any]:
    """The blocks of each group as one, with one more axis in front."""
    return [
        jax.tree.map(lambda *arrays: jnp.stack(arrays), *[blocks[k] for k in group])
        for group in members
    ]


@jax.jit
def columns(stack: Array) -> list[Array]:
    """`[stack[:, k] for k in range(stack.shape[1])]`.

    XLA on CPU compiles a kernel for each static slice. A gather by an array of positions lets all
    leaves of one shape share one compiled kernel. The positions must differ, or XLA turns the
    gather back into a slice: so if there is one row, each column is gathered with the next.
    """
    height, count, *shape = stack.shape

    def gathered(stack: Array) -> list[Array]:
        numbers = jax.lax.GatherDimensionNumbers(
            tuple(range(1, stack.ndim - 1)), collapsed_slice_dims=(0,), start_index_map=(0,)
        )
        gather = functools.partial(
            jax.lax.gather,
            dimension_numbers=numbers,
            slice_sizes=(1, *shape),
            mode="promise_in_bounds",
        )
        flat = stack.reshape(-1, *shape)
        if height == 1:
            return [gather(flat, np.array([[k], [(k + 1) % count]]))[:1] for k in range(count)]
        rows = np.arange(height)[:, None] * count
        return [gather(flat, rows + k) for k in range(count)]

    def sliced(stack: Array) -> list[Array]:
        parts = jax.lax.split(stack, [1] * count, axis=1)
        return [column.reshape(height, *shape) for column in parts]

    if count < 2:
        return sliced(stack)
    return jax.lax.platform_dependent(stack, cpu=gathered, default=sliced)


@traced_once(inline=True)
def shared_vector(vector: Array) -> Array:
    """`vector`, of two numbers or more.

    On GPUs, XLA fuses kernels of one shape that share an operand, however small. So if each leaf's
    kernel reads this vector, these kernels become one. A single number does not count, nor does
    anything that XLA can trace back to one, so there is a barrier.
    """
    barrier = jax.lax.optimization_barrier
    return jax.lax.platform_dependent(vector, cuda=barrier, rocm=barrier, default=lambda x: x)


# LIMIT, RESPOND, RECORD


class Blocks:
    """`list[Array]`: an array of sizes for each block, or other arrays of these shapes.

    A kernel launch costs the same for one number as for a thousand, and XLA compiles an operation
    on a stack as fast as on one block. So equal blocks are kept as one stack, and the scalar
    arithmetic of the engine runs once for each stack:

    * blocks of one number each are one vector, if the number is the same on all devices;
    * equal blocks of leaves that are not large are a stack, with one more axis in front;
    * any other block is alone. So is the vector of all groups, where leaves are measured whole.

    Attributes:
        stacks: the arrays.
        members: for each stack, the positions of its blocks.
        shapes: of the blocks.
        group_of: for each leaf its group, where leaves are measured whole, or an array of groups
            that broadcasts against it; None elsewhere.
    """

    def __init__(
        self,
        stacks: list[Array],
        members: list[list[int]],
        shapes: list[tuple[int, ...]],
        group_of: list[Any] | None,
    ):
        self.stacks, self.members, self.shapes, self.group_of = stacks, members, shapes, group_of
        self._each: list[Array] | None = None

    @classmethod
    def of(
        cls, sizes: list[Array], leaves: Sequence[Any] = (), group_of: list[Any] | None = None
    ) -> "Blocks":
        """The blocks of these sizes, of these leaves."""
        groups: dict[Hashable, list[int]] = {}
        # Equal leaves in a row, as in the stacks in which a CPU measures them.
        runs = group_by_type(leaves) if leaves else [range(len(sizes))]
        for k in [k for run in runs for k in run]:
            size = sizes[k]
            scalar = size.size == 1 and not _sharding.varying(size)
            small = leaves and size.size < jnp.size(leaves[k]) <= LARGE
            small = small and not _sharding.is_explicit(size)
            key = size.dtype if scalar else jax.typeof(size) if small else k
            groups.setdefault(key, []).append(k)
        members = sorted(groups.values(), key=lambda group: len(group) == 1)
        blocks = cls([], members, [size.shape for size in sizes], group_of)
        return blocks.like(sizes)

    def like(self, arrays: Iterable[Array]) -> "Blocks":
        """Other arrays in the same stacks; what broadcasts against a block is broadcast to it."""
        arrays = list(arrays)
        stacks = [self._stack([arrays[k] for k in group], group) for group in self.members]
        return self._of_stacks(stacks)

    def each(self) -> list[Array]:
        """The arrays, one for each block."""
        if self._each is None:
            (self._each,) = unstacked(self)
        return self._each

    def map(self, function: Callable[..., Any], *others: Any, outputs: int = 0) -> Any:
        """`[function(*arguments) for arguments in zip(self, *others)]`.

        Args:
            function: elementwise, so that it may be applied to stacks. It returns an array that
                broadcasts against the block.
            others: Blocks, or lists of one argument for each block.
            outputs: how many such arrays it returns in a tuple, if it does.

        Returns:
            Blocks, or a tuple of Blocks.
        """
        if all(isinstance(other, Blocks) or _is_uniform(other) for other in others):
            arguments = [
                other.stacks if isinstance(other, Blocks) else other[:1] * len(self.stacks)
                for other in others
            ]
            return self._collected(
                list(map(function, self.stacks, *arguments)), self._of_stacks, outputs
            )
        arguments = [other.each() if isinstance(other, Blocks) else other for other in others]
        return self._collected(list(map(function, self.each(), *arguments)), self.like, outputs)

    def per_leaf(self, *others: "Blocks") -> list[tuple[Array, ...]]:
        """For each leaf, what broadcasts against it from each of these Blocks."""
        if self.group_of is None:
            return list(zip(*unstacked(self, *others), strict=True))
        vectors = [blocks.stacks[0] for blocks in (self, *others)]
        if len(vectors[0]) == 1:
            whole = tuple(shared_vector(jnp.concatenate(vectors)))
            return [whole] * len(self.group_of)
        stack = jnp.stack(vectors)
        rows = columns(stack) if any(isinstance(group, int) for group in self.group_of) else []
        return [
            tuple(rows[group]) if isinstance(group, int) else tuple(stack[:, group])
            for group in self.group_of
        ]

    def table(self, column: Callable[..., Array], *others: "Blocks") -> Array:
        """`jnp.stack([column(*block) for block in zip(self, *others)], axis=1)`.

        Where leaves are measured whole, there is a column for each group.
        """
        blocks = list(zip(self.stacks, *[other.stacks for other in others], strict=True))
        count = sum(map(self._has_many, range(len(blocks))))
        tables = [jax.vmap(column, out_axes=1)(*block) for block in blocks[:count]]
        if blocks[count:]:
            return _with_single_columns(tables, column, blocks[count:], self._order())
        return _ordered(tables, self._order())

    def _order(self) -> np.ndarray:
        if self.group_of is not None:
            return np.arange(len(self.stacks[0]))
        return inverse_permutation(self.members)

    def _collected(
        self, results: list[Any], make: Callable[[list[Array]], "Blocks"], outputs: int
    ) -> Any:
        if outputs:
            columns = zip(*results, strict=True) if results else [()] * outputs
            return tuple(make(list(column)) for column in columns)
        blocks = make(results)
        for k, stack in enumerate(self.stacks):
            if self._has_many(k):
                blocks.stacks[k] = _sharding.mapped_as(stack, blocks.stacks[k])
        return blocks

    def _of_stacks(self, stacks: list[Array]) -> "Blocks":
        return Blocks(stacks, self.members, self.shapes, self.group_of)

    def _has_many(self, k: int) -> bool:
        """Whether the first axis of this stack runs over blocks, or over groups."""
        return len(self.members[k]) > 1 or self.group_of is not None

    def _stack(self, arrays: list[Array], group: list[int]) -> Array:
        if len(arrays) == 1:
            return arrays[0]
        shapes = [self.shapes[k] for k in group]
        arrays = [jnp.broadcast_to(x, shape) for x, shape in zip(arrays, shapes, strict=True)]
        if arrays[0].size == 1:
            return jnp.concatenate([x.reshape(1) for x in arrays])
        return jnp.stack(arrays)


def unstacked(*blocks_of: Blocks) -> list[list[Array]]:
    """`[blocks.each() for blocks in blocks_of]`, by kernels that they share."""
    first = blocks_of[0]
    arrays: list[list[Any]] = [[None] * len(first.shapes) for _ in blocks_of]
    for k, group in enumerate(first.members):
        stacks = [blocks.stacks[k] for blocks in blocks_of]
        rows = [stacks] if len(group) == 1 else columns(jnp.stack(stacks))
        for position, row in zip(group, rows, strict=True):
            for blocks, array in zip(arrays, row, strict=True):
                blocks[position] = (
                    array if len(group) == 1 else array.reshape(first.shapes[position])
                )
    return arrays


def for_each(function: Callable[..., Array], rows: list[tuple[Array, ...]]) -> list[Array]:
    """`[function(*row) for row in rows]`, of an elementwise function."""
    function = traced_once(inline=True)(function)
    columns = [list(column) for column in zip(*rows, strict=True)]
    if len(columns) == 1:
        return list(map(function, *columns))
    blocks = [Blocks.of(columns[0])]
    blocks += [blocks[0].like(column) for column in columns[1:]]
    return blocks[0].map(function, *blocks[1:]).each()


def largest(x: Array) -> Array:
    """`jnp.max(jnp.abs(x), initial=0)`.

    Written so that XLA on CPU vectorizes it, and does not store `abs(x)` for two readers.
    """
    top = jnp.max(jnp.abs(x) if jnp.iscomplexobj(x) else jnp.maximum(x, -x), initial=0)
    return _with_nan(top, x)


def most(x: Array, axes: Axes | None = None) -> Array:
    """`jnp.max(x, axes, keepdims=axes is not None, initial=0)`."""
    return _with_nan(jnp.max(x, axes, keepdims=axes is not None, initial=0), x, axes)


def _with_nan(top: Array, x: Array, axes: Axes | None = None) -> Array:
    """The largest of `x`, and NaN if a number is NaN.

    XLA on CPU (JAX 0.10.2 and 0.12.0) loses NaN in a maximum of 4096 numbers or more. A sum of
    squares is NaN only if a number is.
    """

    def on_cpu(top: Array, x: Array) -> Array:
        squares = jnp.sum(jax.lax.stop_gradient(jnp.abs(x) ** 2), axes, keepdims=axes is not None)
        return jnp.where(jnp.isnan(squares), jnp.nan, top).astype(top.dtype)

    return jax.lax.platform_dependent(top, x, cpu=on_cpu, default=lambda top, x: top)


def share_of(flags: Array) -> Array:
    """`jnp.mean(flags)`, and 0 of none.

    Through int8, because XLA on CPU adds converted booleans one at a time.
    """
    return flags.astype(jnp.int8).sum(dtype=jnp.float32) / max(flags.size, 1)


def _is_uniform(arguments: list[Any]) -> bool:
    """Whether this is one argument for all blocks, and no array of a single block among many."""
    first = arguments[0] if arguments else None
    empty = not jax.tree.leaves(first)
    return all(x is first or (empty and not jax.tree.leaves(x) and x == first) for x in arguments)


def _with_single_columns(
    tables: list[Array], column: Callable[..., Array], blocks: list[tuple[Array, ...]], order: Any
) -> Array:
    """The table, with a column for each of these blocks; on a CPU equal ones are stacked."""

    def one_by_one(tables: list[Array], blocks: list[Any]) -> Array:
        return _ordered(tables + [column(*block)[:, None] for block in blocks], order)

    def in_stacks(tables: list[Array], blocks: list[Any]) -> Array:
        members, start = group_by_type(blocks), len(order) - len(blocks)
        positions = np.append(np.arange(start), start + inverse_permutation(members))
        stacks = _stacks(blocks, members)
        columns = [jax.vmap(column, out_axes=1)(*stack) for stack in stacks]
        return _ordered(tables + columns, positions[order])

    return jax.lax.platform_dependent(tables, blocks, cpu=in_stacks, default=one_by_one)


def _ordered(tables: list[Array], order: np.ndarray) -> Array:
    """`[rows, blocks]` from these tables, in this order."""
    if not tables:
        return jnp.zeros((4, 0))
    table = jnp.concatenate(tables, axis=1)
    return table if (order == np.arange(len(order))).all() else table[:, order]
