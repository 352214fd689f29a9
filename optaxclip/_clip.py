"""The engine: measure, limit, respond, record. Read this first.

updates --> MEASURE --> sizes --> LIMIT --> limits --> RESPOND --> updates
                          |        ^  | learns            ^
                          |        +--+                   |
                          +--------------+----------------+
                                         v
                                      RECORD --> ClipState.reading
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.experimental import checkify

from optaxclip import _sharding, _validate, norms, responses
from optaxclip._layout import Layout, lay_out
from optaxclip._numerics import harmless
from optaxclip._packing import Packing, packing_of
from optaxclip._record import nothing_read, record_step, unread
from optaxclip._states import is_placeholder, joined, placeholder_state, rules_of, separate
from optaxclip._types import ClipState, Context, Norm, Reading, Response, Scope, Threshold
from optaxclip.thresholds.fixed import as_thresholds

POLICIES = ("propagate", "zero", "raise")
# a single number becomes the smaller of itself and its limit
CUTS = (
    responses.rescale,
    responses.clamp,
)


@_validate.checks_keywords
def clip(
    threshold: Any,
    scope: Scope | None = None,
    *,
    norm: Norm = norms.l2(),
    response: Response = responses.rescale,
    nonfinite: str = "propagate",
    sharded_over: Any = None,
    record: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Limits how large the updates are: the one transform of which every method is a row.

    For each group of numbers :math:`g` that the scope puts together, with size
    :math:`s = \|g\|` and limit :math:`c` from the threshold, the default response returns

    .. math:: g \min(1, c / s).

    What holds, whatever the four parts:

    | updates | result |
    |---|---|
    | size within the limit | the same bits (but for `smooth` and `normalize`, which act below it too) |
    | size above the limit | size at most `limit * (1 + d)`, d by dtype |
    | squares overflow or underflow | the same, by the true size |
    | size not finite | by `nonfinite`, and counted; no rule learns from it |
    | all zero | zero; no rule learns from it |
    | None, `MaskedNode`, integers, booleans, float0, keys | passed through, not measured |
    | limit infinite | not clipped |
    | traced limit negative or NaN | counts as 0: a zero update, never ascent |

    The excess d is the rounding of the result: 1e-6 in float32 and wider, 2e-3 in float16, 8e-3 in
    bfloat16, 0.07 in float8_e4m3, 0.13 in float8_e5m2, 0.25 in float4. All are measured in float32
    or wider, and given back in their own dtype.

    Structure, shapes and dtypes of the updates are kept. The state has the same
    structure, shapes and dtypes from `init` on.

    Args:
        threshold: how large a size may be: a number, a scalar array (traced, too), a schedule, a
            rule from `optaxclip.thresholds`, or a dict from group name to any of these.
        scope: which numbers share one size; it has no default, because `optax.clip(1.0)` cuts
            values.
        norm: how large they are.
        response: what happens to what is larger.
        nonfinite: what happens to a group whose size is infinite or NaN. `"propagate"`: all of it
            becomes NaN. `"zero"`: all of it becomes zero. `"raise"`: an error through
            `jax.experimental.checkify`, which names the group.
        sharded_over: mapped axes (`jax.shard_map`, `jax.pmap`, `jax.vmap`) along which what shares
            a size is split: a name, a tuple of names, `()` for none, or a tree of these that the
            updates start with. Not needed under `jit`, nor in `jax.shard_map` with its default
            `check_vma=True`, where the types of the leaves tell, but for scopes finer than a leaf.
            `jax.vmap` alone maps over whole trees, each clipped by itself. A single number is never
            split.
        record: whether the state has a `Reading` of what was measured and done.

    Returns:
        A transform with state `ClipState`, for any place in an Optax chain. `update` needs `params`
        only if the threshold or norm is relative to them, or if gradients are None where `init` saw
        arrays. With None for the state it does one step from a fresh one.

    Note:
        `update(..., measured=tree)` measures that tree in place of the updates, for methods whose
        size is of something else.

        `optax.inject_hyperparams` takes functions for schedules. The rows of `optaxclip.methods`
        are made for it; for this function say `optax.inject_hyperparams(clip,
        static_args="response")`.

    Raises:
        TypeError: an argument is not what it should be, such as a threshold that is no number.
        ValueError: an argument is out of range, such as a threshold that is negative.

    Example:
        >>> import jax.numpy as jnp, optax, optaxclip
        >>> optimizer = optax.chain(optaxclip.clip(3.0, optaxclip.scopes.tree()), optax.sgd(0.5))
        >>> params = {"w": jnp.zeros(2), "b": jnp.zeros(1)}
        >>> state = optimizer.init(params)
        >>> grads = {"w": jnp.array([2.0, 4.0]), "b": jnp.array([4.0])}
        >>> updates, state = optimizer.update(grads, state)
        >>> updates["w"]
        Array([-0.5, -1. ], dtype=float32)
        >>> state[0].reading.size_before, state[0].reading.size_after
        (Array([6.], dtype=float32), Array([3.], dtype=float32))
    """
    _validate.scope_given(scope)
    threshold = as_thresholds(threshold)
    _validate.part("scope", scope, Scope, "scopes.tree()")
    scope = cast(Scope, scope)
    _validate.part("norm", norm, Norm, "norms.l2()")
    _validate.function("response", response, "responses.rescale", takes=3)
    _validate.option("nonfinite", nonfinite, POLICIES)
    _validate.option("record", record, (True, False))

    every = threshold.values() if isinstance(threshold, dict) else [threshold]
    relative = norm.uses_params or any(rule.uses_params for rule in every)

    def measure_of(layout: Layout) -> Callable[..., list[Array]]:
        return functools.partial(norms.measure, norm, axes=layout.axes, groups=layout.groups)

    def init(params: Any) -> Any:
        step = jnp.zeros((), jnp.int32)
        if is_placeholder(params):
            return ClipState(
                step,
                placeholder_state(threshold, scope, params),
                unread() if record else optax.EmptyState(),
            )
        layout = lay_out(scope, params, weights=relative)
        if isinstance(threshold, dict):
            _validate.names(threshold, layout.names)
        # A state may be made before axes are mapped.
        names = [_sharding.bound(own) for own in layout.names_of_axes(sharded_over)]
        measure = functools.partial(measure_of(layout), axis_names=names)
        shapes = jax.eval_shape(lambda leaves: measure(leaves, params=leaves), layout.gradients)
        sizes = [jnp.zeros(shape.shape, shape.dtype) for shape in shapes]
        if layout.axes is not None:  # sizes of parts of leaves are where the leaves are
            sizes = list(map(_sharding.zeros_beside, layout.gradients, shapes))
        states = [
            rule.init(size) for rule, size in zip(rules_of(threshold, layout), sizes, strict=True)
        ]
        if layout.axes is not None:
            states = [
                _sharding.placed(state, size) for state, size in zip(states, sizes, strict=True)
            ]
        reading = nothing_read(layout, sizes) if record else optax.EmptyState()
        return ClipState(step, joined(threshold, layout, states), reading)

    def update(
        updates: Any, state: Any, params: Any = None, *, measured: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        del extra_args
        if state is None:  # one step outside of any loop
            state = init(updates if params is None else params)
        _validate.state(state, ClipState)
        layout = lay_out(scope, updates, params, weights=relative)
        if isinstance(state.reading, Reading):
            _validate.same_groups(layout.names, state.reading.names.known)
        if isinstance(threshold, dict):
            _validate.names(threshold, layout.names)
        rules, states = rules_of(threshold, layout), separate(threshold, layout, state.threshold)
        weights = layout.matching(params) if norm.uses_params else None
        names = layout.names_of_axes(sharded_over)
        measure = functools.partial(measure_of(layout), params=weights, axis_names=names)

        source = layout.gradients if measured is None else layout.matching(measured)
        blocks = measure(source)
        packing = packing_of(blocks, layout.gradients if layout.axes else ())
        sizes = packing.pack(blocks)
        context = Context(state.step, blocks=() if isinstance(threshold, dict) else tuple(sizes))
        learned = states
        if context.blocks and not jax.tree.leaves(
            learned
        ):  # a rule without memory that all share is one function of a size
            contexts = _contexts(
                rules, context, lambda: packing.pack(measure(layout.matching(params)))
            )
            limits = list(map(_limit, rules, sizes, states, contexts))
        else:
            (blocks,) = packing.unpack(sizes)  # by kernels that equal blocks share
            states = list(map(_sharding.beside, states, blocks))
            contexts = _contexts(rules, context, lambda: measure(layout.matching(params)))
            limits = packing.pack(list(map(_limit, rules, blocks, states, contexts)))
        # of these each has a limit of its own
        several = 1 if layout.axes is None else packing.several
        limits[:several] = map(_sharding.mapped_as, sizes[:several], limits[:several])
        clipped, clipped_sizes = _respond(response, nonfinite, layout, packing, sizes, limits)
        if jax.tree.leaves(learned):
            kept = (
                clipped_sizes
                if response in CUTS
                else list(map(_not_dropped, sizes, clipped_sizes, limits))
            )
            (after,) = packing.unpack(kept)
            learned = list(
                map(lambda rule, *seen: rule.learn(*seen), rules, blocks, after, states, contexts)
            )
        # Of numbers that are cut one by one, the largest tells all that is recorded but the share.
        alone = (
            layout.is_of_elements
            and norm.magnitude is jnp.abs
            and response in CUTS
            and nonfinite != "zero"
        )
        numbers = source if alone else None
        reading = optax.EmptyState()
        if record:
            before = (
                state.reading
                if isinstance(state.reading, Reading)
                else nothing_read(layout, blocks)
            )
            reading = record_step(before, layout, packing, sizes, clipped_sizes, limits, numbers)
        if nonfinite == "raise":
            _check_finite(layout, blocks)
        after = _sharding.split_as(
            state.threshold, joined(threshold, layout, learned, state.threshold)
        )
        return layout.rebuild(clipped), ClipState(
            jnp.asarray(optax.safe_increment(state.step)), after, reading
        )

    return optax.GradientTransformationExtraArgs(init, _sharding.in_their_mesh(update))


def _contexts(
    rules: list[Threshold], context: Context, measure_params: Callable[[], list[Array]]
) -> list[Context]:
    """What each block's rule may know; the parameters are measured only if some rule asks for it."""
    if not any(rule.uses_params for rule in rules):
        return [context] * len(rules)
    return [context._replace(param_sizes=param_sizes) for param_sizes in measure_params()]


def _limit(rule: Threshold, sizes: Array, state: Any, context: Context) -> Array:
    """LIMIT: what the sizes may be. A limit that is negative or NaN counts as 0, never as ascent."""
    return _never_ascent(jnp.asarray(rule.limit(sizes, state, context), sizes.dtype))


def _not_dropped(size: Array, clipped_size: Array, limit: Array) -> Array:
    """The clipped size as a rule learns it: of what a response drops the limit, since after 0 it
    might allow nothing more.
    """
    return jnp.where(clipped_size > 0, clipped_size, jnp.minimum(size, limit))


def _respond(
    response: Response,
    nonfinite: str,
    layout: Layout,
    packing: Packing,
    sizes: list[Array],
    limits: list[Array],
) -> tuple[list[Array], list[Array]]:
    """RESPOND: the gradients clipped, in float32 or wider and returned in their own dtype; and the
    sizes clipped.
    """
    target = getattr(response, "target", None)
    if target is None:

        def respond(gradient: Array, size: Array, limit: Array) -> Array:
            finite = jnp.isfinite(size)
            clipped = response(harmless(finite, gradient), harmless(finite, size), limit)
            _validate.response(clipped, gradient.shape)
            return _if_finite(nonfinite == "zero", size, clipped)

        # it need not be one function of single numbers
        sizes, limits = packing.unpack(sizes, limits)
        clipped_sizes = packing.pack(list(map(respond, sizes, sizes, limits)))
        wide = map(norms.widen, layout.gradients)
        clipped = map(respond, wide, *zip(*layout.per_leaf(sizes, limits), strict=True))
        return [
            norms.cast_like(x, gradient)
            for x, gradient in zip(clipped, layout.gradients, strict=True)
        ], clipped_sizes

    # The direction is kept: factors for all groups at once, then each leaf is multiplied.
    zero = nonfinite == "zero"
    known = [harmless(jnp.isfinite(size), size) for size in sizes]
    changes = [
        _change(zero, size, target(own, limit))
        for size, own, limit in zip(sizes, known, limits, strict=True)
    ]
    clipped_sizes, *factors = ([change[k] for change in changes] for k in range(3))
    multiplied = functools.partial(_multiplied, zero)
    return list(
        map(multiplied, layout.gradients, layout.per_leaf(*packing.unpack(*factors)))
    ), clipped_sizes


# Compiled, so that blocks and leaves that are equal are traced once.


@jax.jit
def _never_ascent(limits: Array) -> Array:
    return jnp.where(limits >= 0, limits, 0)


@functools.partial(jax.jit, static_argnums=0)
def _if_finite(zero: bool, size: Array, clipped: Array) -> Array:
    """What is clipped, NaN or `zero` where the size is not finite."""
    return jnp.where(jnp.isfinite(size), clipped, 0 if zero else jnp.nan)


@functools.partial(jax.jit, static_argnums=0)
def _change(zero: bool, size: Array, wanted: Array) -> tuple[Array, ...]:
    """The size that there will be, NaN or `zero` where the size is not finite, and two factors that
    make it so.
    """
    finite = jnp.isfinite(size)
    clipped_size = jnp.where(finite, wanted, 0 if zero else jnp.nan)
    size = jnp.where(finite, size, 1) if zero else size
    return clipped_size, *responses.factors(size, clipped_size)


@functools.partial(jax.jit, static_argnums=0)
def _multiplied(zero: bool, gradient: Array, factors: Any) -> Array:
    """A leaf times both factors, in its own dtype; where the second is 0 it may be `zero` even from
    infinity and NaN.
    """
    wide = norms.widen(gradient)
    wide = jnp.where(factors[1] == 0, 0, wide) if zero else wide
    return norms.cast_like(responses.multiply(wide, *factors), gradient)


def _check_finite(layout: Layout, sizes: list[Array]) -> None:
    """An error through checkify that names the first group whose size is not finite."""
    by_name = sizes if layout.axes is not None else [sizes[0][i] for i in range(len(layout.names))]
    for name, size in zip(layout.names, by_name, strict=True):
        checkify.check(
            jnp.isfinite(size).all(),
            f"the size of {name!r} is not finite; look at what made this gradient".replace(
                "{", "{{"
            ).replace("}", "}}"),
        )
