"""The engine: measure, limit, respond, record. Read this first.

updates --> MEASURE --> sizes --> LIMIT --> limits --> RESPOND --> updates
                          |        ^  | learns            ^
                          |        +--+                   |
                          +--------------+----------------+
                                         v
                                      RECORD --> ClipState.reading
"""

from collections.abc import Mapping
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.experimental import checkify

from optaxclip import _sharding, _validate, norms, responses, scopes
from optaxclip._layout import Layout, lay_out
from optaxclip._lowering import Blocks, traced_once, unstacked
from optaxclip._measure import measure
from optaxclip._numerics import cast_like, factors, harmless, multiply, widen
from optaxclip._record import Recorder
from optaxclip._rules import Rules, initial_state, is_placeholder, placeholder_state
from optaxclip._transform import transform
from optaxclip._types import ClipState, Norm, Response, Scope
from optaxclip.thresholds.fixed import as_thresholds

POLICIES = ("propagate", "zero", "raise")
CUTS = (responses.rescale, responses.clamp)


@_validate.checks_keywords
def clip(
    threshold: Any,
    scope: Scope | None = None,
    *,
    norm: Norm = norms.l2(),
    response: Response = responses.rescale,
    nonfinite: str = "propagate",
    sharded_over: Any = None,
    record: bool | Literal["full"] = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Limits how large the updates are: the one transform of which every method is a row.

    For each group of numbers :math:`g` that the scope puts together, with size
    :math:`s = \|g\|` and limit :math:`c` from the threshold, the default response returns

    .. math:: g \min(1, c / s).

    What holds, whatever the four parts:

    | updates | result |
    |---|---|
    | size within the limit | the same bits (`smooth` and `normalize` act below it too) |
    | size above the limit | size at most `limit * (1 + d)`, d by dtype |
    | squares overflow or underflow | the same, by the true size |
    | size not finite | by `nonfinite`, and counted; no rule learns from it |
    | all zero | zero; no rule learns from it |
    | None, `MaskedNode`, integers, booleans, float0, keys | passed through, not measured |
    | limit infinite | not clipped |
    | traced limit negative or NaN | counts as 0: a zero update, never ascent |

    The excess d is the rounding of the result: 1e-6 in float32 and wider, 2e-3 in float16, 8e-3 in
    bfloat16, 0.07 in float8_e4m3, 0.13 in float8_e5m2, 0.25 in float4. All are measured in float32
    or wider, and given back in the dtype that they had.

    Structure, shapes and dtypes of the updates are kept. The state has the same
    structure, shapes and dtypes from `init` on.

    Args:
        threshold: how large a size may be: a number, a scalar array (traced, too), a schedule, a
            rule from `optaxclip.thresholds`, or a dict from group name to any of these. A tree that
            the updates start with, `{"encoder": 1.0, "head": {"w": 0.5, "b": 0.1}}`, gives each
            subtree a limit: with `tree` scope the leaves under a limit are one group, and with
            `leaf` and finer scopes each size under it has that limit.
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
            `check_vma=True`, where JAX tracks which leaves vary; scopes finer than a leaf need it.
            `jax.vmap` alone maps over whole trees, each clipped by itself. A single number is never
            split.
        record: whether the state has a `Reading` of what the clip measured and did. Where every
            element is a group, the reading says whether any element of a leaf was clipped; with
            `"full"` it has the exact share, for one more pass over the gradient.

    Returns:
        A transform with state `ClipState`, for any place in an Optax chain. `update` needs `params`
        only if the threshold or norm is relative to them, or if gradients are None where `init` saw
        arrays. With None for the state it does one step from a fresh one.

    Note:
        `update(..., measured=tree)` measures that tree in place of the updates, for methods whose
        size is of something else. `update(..., sizes=...)` takes sizes that were measured
        elsewhere, and does not read the updates for a norm: a number for `tree` scope, a dict by
        group name or an array `[groups]` in the order of `telemetry.group_names` for `group` and
        `leaf`, a tree of arrays that broadcast against the leaves for `unit` and `element`. A
        negative size counts as 0; all devices must be given the same.

        `optax.inject_hyperparams` takes functions for schedules. The rows of `optaxclip.methods`
        are made for it; for this function say `optax.inject_hyperparams(clip,
        static_args="response")`.

    Raises:
        TypeError: an argument is not what it should be, such as a threshold that is no number.
        ValueError: an argument is out of range, such as a threshold that is negative; or the
            response is `clamp` and the norm does not measure the largest element.

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
    threshold, scope = as_thresholds(threshold), cast(Scope, scope)
    _check_parts(scope, norm, response, nonfinite, record)
    bounds_elements = response is not responses.clamp or _is_largest_element(norm)
    _validate.bounds_elements(norm, bounds_elements or scope.axes is not None)
    if isinstance(threshold, dict):
        scope = scopes.divided(scope, threshold.keys())
    rules = threshold.values() if isinstance(threshold, dict) else [threshold]
    relative = norm.uses_params or any(rule.uses_params for rule in rules)
    cuts = response in CUTS  # the size after is the smaller of size and limit
    # Only a measurement tells what a response that changes the direction leaves.
    unknown = not cuts and not hasattr(response, "target")
    recorder = Recorder(record, cuts and nonfinite != "zero")
    plain = norm.magnitude is jnp.abs

    def init(params: Any) -> Any:
        step = jnp.zeros((), jnp.int32)
        if is_placeholder(params):
            return ClipState(step, placeholder_state(threshold, scope, params), recorder.unread())
        layout = lay_out(scope, params, weights=relative)
        _validate.bounds_elements(norm, bounds_elements or layout.is_of_elements)
        _check_names(threshold, layout)
        sizes = _no_sizes(norm, layout, sharded_over)
        learned = initial_state(threshold, layout, sizes)
        return ClipState(step, learned, recorder.first(layout, sizes))

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        measured: Any = None,
        sizes: Any = None,
        **extra: Any,
    ) -> tuple[Any, Any]:
        given = sizes
        if state is None:  # one step outside of any loop
            state = init(updates if params is None else params)
        layout = lay_out(scope, updates, params, weights=relative)
        _check(state, layout, threshold)

        def measured_sizes(leaves: list[Any]) -> Blocks:
            return sizes_of(norm, layout, leaves, params, sharded_over)

        rules = Rules(
            threshold, layout, state, extra, lambda: measured_sizes(layout.matching(params))
        )

        source = layout.gradients if measured is None else layout.matching(measured)
        sizes = measured_sizes(source) if given is None else _given(layout, given, measured)
        limits = rules.limits(sizes)
        clipped, clipped_sizes = _respond(response, nonfinite, layout.gradients, sizes, limits)
        if unknown and given is None and not layout.is_of_elements:
            clipped_sizes = measured_sizes(clipped)
        learned = rules.learn(sizes, clipped_sizes if cuts else _kept(sizes, clipped_sizes, limits))
        numbers = source if plain and given is None else None
        reading = recorder.next(state, layout, sizes, clipped_sizes, limits, numbers)

        if nonfinite == "raise":
            _check_finite(layout, sizes)
        step = jnp.asarray(optax.safe_increment(state.step))
        return layout.rebuild(clipped), ClipState(step, learned, reading)

    return transform(init, update)


def _check_parts(scope: Any, norm: Any, response: Any, nonfinite: Any, record: Any) -> None:
    """Refuses a part that is none, and other words than these."""
    _validate.part("scope", scope, Scope, "scopes.tree()")
    _validate.part("norm", norm, Norm, "norms.l2()")
    _validate.function("response", response, "responses.rescale", takes=3)
    _validate.option("nonfinite", nonfinite, POLICIES)
    _validate.option("record", record, (True, False, "full"))


def _is_largest_element(norm: Norm) -> bool:
    """Whether a size is the magnitude of the largest element, so that to cut elements bounds it."""
    return norm.join is norms.linf().join and not norm.uses_params


def sizes_of(
    norm: Norm, layout: Layout, leaves: list[Any], params: Any, sharded_over: Any
) -> Blocks:
    """MEASURE: how large each group of numbers is."""
    weights = layout.matching(params) if norm.uses_params else None
    names = layout.names_of_axes(sharded_over)
    if layout.axes is not None:
        return Blocks.of(measure(norm, leaves, weights, layout.axes, None, names), layout.gradients)
    sizes = measure(norm, leaves, weights, layout.parts, layout.groups, names)
    return Blocks.of(sizes, group_of=layout.group_of)


def _given(layout: Layout, sizes: Any, measured: Any) -> Blocks:
    """In place of MEASURE: sizes that were measured elsewhere, in float32 or wider."""
    _validate.one_source(measured)
    if layout.axes is None:
        _validate.given_sizes(sizes, layout.names)
        if isinstance(sizes, Mapping):
            sizes = [sizes[name] for name in layout.names]
        vector = jnp.broadcast_to(jnp.asarray(sizes), (len(layout.names),))
        return Blocks.of([jnp.maximum(widen(vector), 0)], group_of=layout.group_of)
    blocks = []
    nodes = zip(layout.paths, layout.gradients, layout.axes, layout.of(sizes), strict=True)
    for path, gradient, axes, size in nodes:
        shape = [1 if k in axes else n for k, n in enumerate(jnp.shape(gradient))]
        _validate.given_block(path, size, shape)
        blocks.append(jnp.maximum(jnp.broadcast_to(widen(size), shape), 0))
    return Blocks.of(blocks, layout.gradients)


def _respond(
    response: Response, nonfinite: str, gradients: list[Any], sizes: Blocks, limits: Blocks
) -> tuple[list[Array], Blocks]:
    """RESPOND: the gradients clipped, and their sizes after it.

    Gradients are multiplied in float32 or wider, and returned in the dtype that they had.
    """
    target, zero = getattr(response, "target", None), nonfinite == "zero"
    if target is None:
        return _respond_to_each(response, zero, gradients, sizes, limits)

    # The direction is kept: the scalar work for all groups at once, one multiplication a leaf.
    def change(size: Array, limit: Array) -> tuple[Array, ...]:
        return _change(zero, size, target(harmless(jnp.isfinite(size), size), limit))

    clipped_sizes, first, second = sizes.map(change, limits, outputs=3)
    pairs = first.per_leaf(second)
    return [_multiplied(zero, *pair) for pair in zip(gradients, pairs, strict=True)], clipped_sizes


def _respond_to_each(
    response: Response, zero: bool, gradients: list[Any], sizes: Blocks, limits: Blocks
) -> tuple[list[Array], Blocks]:
    """RESPOND, for a response that need not keep the direction: it sees one leaf at a time."""

    def respond(gradient: Array, size: Array, limit: Array) -> Array:
        finite = jnp.isfinite(size)
        clipped = response(harmless(finite, gradient), harmless(finite, size), limit)
        _validate.response(clipped, gradient.shape)
        return _if_finite(zero, size, clipped)

    each, limit_of_each = unstacked(sizes, limits)
    clipped_sizes = sizes.like(map(respond, each, each, limit_of_each))
    pairs = zip(gradients, sizes.per_leaf(limits), strict=True)
    return [cast_like(respond(widen(g), *pair), g) for g, pair in pairs], clipped_sizes


def _kept(sizes: Blocks, clipped_sizes: Blocks, limits: Blocks) -> Blocks:
    """The clipped sizes for a rule to learn from; the limit where the response dropped a group.

    A rule that learned 0 could never let anything through again.
    """

    def kept(size: Array, clipped: Array, limit: Array) -> Array:
        return jnp.where(clipped > 0, clipped, jnp.minimum(size, limit))

    return sizes.map(kept, clipped_sizes, limits)


@traced_once(static=0)
def _if_finite(zero: bool, size: Array, clipped: Array) -> Array:
    """The clipped numbers; where the size is not finite NaN, or 0 if `zero`."""
    return jnp.where(jnp.isfinite(size), clipped, 0 if zero else jnp.nan)


@traced_once(static=0)
def _change(zero: bool, size: Array, wanted: Array) -> tuple[Array, ...]:
    """The size after clipping, and the two factors to multiply the gradient by.

    Where the size is not finite, the size after is NaN, or 0 if `zero`.
    """
    finite = jnp.isfinite(size)
    clipped_size = jnp.where(finite, wanted, 0 if zero else jnp.nan)
    size = jnp.where(finite, size, 1) if zero else size
    return clipped_size, *factors(size, clipped_size)


@traced_once(static=0)
def _multiplied(zero: bool, gradient: Array, pair: tuple[Array, Array]) -> Array:
    """A leaf times both factors, in its dtype; with `zero`, 0 times infinity or NaN is 0."""
    wide = widen(gradient)
    wide = jnp.where(pair[1] == 0, 0, wide) if zero else wide
    return cast_like(multiply(wide, *pair), gradient)


def _no_sizes(norm: Norm, layout: Layout, sharded_over: Any) -> list[Array]:
    """Zeros in place of sizes; a block of one leaf is sharded as its leaf."""
    # A state may be made before axes are mapped.
    names = [_sharding.bound(axes) for axes in layout.names_of_axes(sharded_over)]

    def sizes_of(leaves: list[Any]) -> list[Array]:
        groups = None if layout.axes is not None else layout.groups
        return measure(norm, leaves, leaves, layout.parts, groups, names)

    shapes = jax.eval_shape(sizes_of, layout.gradients)
    if layout.axes is None:
        return [jnp.zeros(shape.shape, shape.dtype) for shape in shapes]
    return list(map(_sharding.zeros_beside, layout.gradients, shapes))


def _check(state: Any, layout: Layout, threshold: Any) -> None:
    """Refuses a state of something else, or of another tree."""
    _validate.state(state, ClipState)
    names = getattr(state.reading, "names", None)
    if names is not None:
        _validate.same_groups(layout.names, names.known)
    _check_names(threshold, layout)


def _check_names(threshold: Any, layout: Layout) -> None:
    """Refuses a dict of thresholds whose keys are not the groups of the tree."""
    if isinstance(threshold, dict):
        _validate.names(threshold, layout.keys)


def _check_finite(layout: Layout, sizes: Blocks) -> None:
    """An error through checkify that names the first group whose size is not finite."""
    by_name = sizes.each() if layout.axes is not None else list(sizes.stacks[0])
    for name, size in zip(layout.names, by_name, strict=True):
        message = f"the size of {name!r} is not finite; look at what made this gradient"
        checkify.check(jnp.isfinite(size).all(), message.replace("{", "{{").replace("}", "}}"))
