"""Selects between a new step and the state before it.

`select` is the plain form. `select_early` computes the same in an order that is cheap on CPU.
"""

import itertools
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from optaxclip import _jax, _programs

Step = Callable[[Any, Any], tuple[Any, Any]]
"""`(inputs, state) -> (updates, new state)`."""


def select(step: Step, ok: Array, inputs: Any, state: Any) -> tuple[Any, Any]:
    """Returns the updates and the state of `step(inputs, state)` if ok, else zeros and `state`."""
    # `step` may close over what is differentiated, such as a learning rate: its slope is an input
    updates, after = step(*_harmless(ok, (_finite_unless(ok, inputs), state)))
    news, treedef = jax.tree.flatten(after)
    kept = [_or_old(ok, old)(new) for new, old in zip(news, _olds(after, state), strict=True)]
    return jax.tree.map(_or_zeros(ok), updates), jax.tree.unflatten(treedef, kept)


def select_early(step: Step, ok: Array, inputs: Any, state: Any) -> tuple[Any, Any]:
    """Computes `select(step, ok, inputs, state)` in an order that compiles without copies.

    Each new array of the state is selected where it is computed, and later operations use the
    selected array: Adam's updates are computed from the moments that are kept. Selecting at the end
    instead would keep the old, new and selected moments alive at once. XLA on CPU then copies them,
    and the step takes almost five times as long as without a guard instead of a third longer. A
    step with side effects is not reordered. The derivative is the derivative of `select`.
    """
    # only tracers become inputs of the program, so `step` can still read concrete values
    arrays, with_arrays = _separate((inputs, state), _is_traced)
    restore: list[Callable[[Sequence[Any]], Any]] = []

    def arrays_of_step(arrays: list[Any]) -> tuple[list[Any], list[Any]]:
        updates, after = step(*with_arrays(arrays))
        news, with_news = _separate(updates, _is_array)
        afters, with_afters = _separate(after, _is_array)
        restore[:] = with_news, with_afters
        return news, afters

    program, (news, afters) = jax.make_jaxpr(arrays_of_step, return_shape=True)(arrays)
    with_news, with_afters = restore
    after = with_afters(afters)
    pairs = zip(jax.tree.leaves(after), _olds(after, state), strict=True)
    olds = [old for new, old in pairs if _is_shape(new)]

    def choices(ok: Array, olds: list[Any]) -> list[Callable[[Any], Any]]:
        return [*(_or_zeros(ok) for _ in news), *(_or_old(ok, old) for old in olds)]

    def plainly(ok: Array, constants: list[Any], arrays: list[Any], olds: list[Any]) -> list[Any]:
        constants, arrays = _harmless(ok, (constants, arrays))
        outs = _jax.jaxpr_as_fun(_jax.ClosedJaxpr(program.jaxpr, constants))(*arrays)
        return [choose(out) for choose, out in zip(choices(ok, olds), outs, strict=True)]

    @jax.custom_jvp
    def early(ok: Array, constants: list[Any], arrays: list[Any], olds: list[Any]) -> list[Any]:
        try:
            return _programs.run(program.jaxpr, constants, arrays, choices(ok, olds))
        except Exception:
            # `step` itself has run above, so this version of JAX has changed something that the
            # walk through the program reads; the plain form does not need it
            return plainly(ok, constants, arrays, olds)

    early.defjvp(lambda primals, tangents: jax.jvp(plainly, primals, tangents))
    # reordering could repeat or skip a print or a callback
    run = plainly if _programs.has_side_effects(program.jaxpr) else early
    outs = run(ok, program.consts, arrays, olds)
    return with_news(outs[: len(news)]), with_afters(outs[len(news) :])


def _olds(after: Any, before: Any) -> list[Any]:
    """Returns for each leaf of a new state the old leaf of the same path.

    An array that the old state did not have counts as zeros: `optax.monitor` adds arrays.
    """
    # by path, not by position: the new state may have more leaves
    known = dict(jax.tree_util.tree_leaves_with_path(before))

    def old(path: Any, new: Any) -> Any:
        if not (_is_array(new) or _is_shape(new)):
            return known.get(path, new)
        there = _is_array(known.get(path)) and jnp.shape(known[path]) == jnp.shape(new)
        return known[path] if there else jnp.zeros_like(new)

    return [old(path, new) for path, new in jax.tree_util.tree_leaves_with_path(after)]


def _or_zeros(ok: Array) -> Callable[[Any], Any]:
    # a selection, because a product of NaN with zero is NaN
    return lambda new: jnp.where(ok, new, jnp.zeros_like(new)) if _is_array(new) else new


def _or_old(ok: Array, old: Any) -> Callable[[Any], Any]:
    def choose(new: Any) -> Any:
        if not _is_array(old):  # a word or a function: outside of jit `ok` is known
            return new if isinstance(ok, Tracer) or ok else old
        # the cast comes after the selection, so that a skipped step keeps the bits of the old state
        kept, dtype = jnp.where(ok, new, old), jnp.result_type(old)
        return kept if kept.dtype == dtype else kept.astype(dtype)

    return choose


def _harmless(ok: Array, inputs: Any) -> Any:
    """Returns the inputs, with no derivative through a skipped step, which may compute 0 * NaN."""
    floats, with_floats = _separate(inputs, _is_float)
    return with_floats(_no_derivative_unless(ok, floats))


def _finite_unless(ok: Array, inputs: Any) -> Any:
    """Returns the inputs; those of a skipped step with 0 in place of NaN and infinity."""
    floats, with_floats = _separate(inputs, _is_float)
    return with_floats([jnp.where(ok | jnp.isfinite(x), x, jnp.zeros_like(x)) for x in floats])


@jax.custom_jvp
def _no_derivative_unless(ok: Array, floats: list[Array]) -> list[Array]:
    return floats


@_no_derivative_unless.defjvp
def _(
    primals: tuple[Array, list[Array]], tangents: tuple[Any, list[Array]]
) -> tuple[list[Array], list[Array]]:
    (ok, floats), (_, directions) = primals, tangents
    return floats, [jnp.where(ok, dx, jnp.zeros_like(dx)) for dx in directions]


def _separate(
    tree: Any, belongs: Callable[[Any], bool]
) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """Returns the leaves that belong, and a function that rebuilds the tree with others instead."""
    leaves, treedef = jax.tree.flatten(tree)
    which = [belongs(leaf) for leaf in leaves]
    parts = list(itertools.compress(leaves, which))
    # a tracer must not outlive its trace, so `rebuild` keeps only the other leaves
    rest = [None if w else x for x, w in zip(leaves, which, strict=True)]

    def rebuild(parts: Sequence[Any]) -> Any:
        in_order = iter(parts)
        leaves = [next(in_order) if w else x for x, w in zip(rest, which, strict=True)]
        return jax.tree.unflatten(treedef, leaves)

    return parts, rebuild


def _is_traced(x: Any) -> bool:
    return isinstance(x, Tracer)


def _is_array(x: Any) -> bool:
    """Returns whether a compiled program can take it: no function, word or float0."""
    is_numeric = isinstance(x, Array | np.ndarray | np.generic | numbers.Number)
    return is_numeric and jnp.result_type(x) != jax.dtypes.float0


def _is_shape(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)


def _is_float(x: Any) -> bool:
    return _is_array(x) and jnp.issubdtype(jnp.result_type(x), jnp.inexact)
