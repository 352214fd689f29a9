"""Guards around an optimizer: a step that would spoil it is left out, as if its batch had never
been.
"""

import inspect
import itertools
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.core import Tracer
from jax.experimental import checkify

from optaxclip import _jax, _programs, _sharding, _validate, norms, scopes
from optaxclip._layout import lay_out
from optaxclip._measure import measure
from optaxclip._numerics import widen
from optaxclip._types import Context, Threshold
from optaxclip.thresholds.combine import observed, reset_after
from optaxclip.thresholds.fixed import as_threshold

MOST = 2**31 - 1
"""More steps than this are not counted."""


class Watch(NamedTuple):
    """What `skip_spikes` looked at.

    Attributes:
        size: float scalar, the gradient norm or the loss of the last step.
        limit: float scalar, what it was allowed to be.
        rule: state of the threshold.
    """

    size: Array
    limit: Array
    rule: Any


class GuardState(NamedTuple):
    """State of `skip_nonfinite` and `skip_spikes`.

    Attributes:
        inner: state of the optimizer inside, as it was after the last step that was not skipped.
        steps: int32 scalar, updates so far, skipped ones included.
        skipped_steps: int32 scalar, how many of them were skipped.
        consecutive: int32 scalar, how many of the last ones in a row.
        watch: what `skip_spikes` looked at; empty for `skip_nonfinite`.
    """

    inner: Any
    steps: Array
    skipped_steps: Array
    consecutive: Array
    watch: Watch | optax.EmptyState = optax.EmptyState()


@_validate.checks_keywords
def skip_nonfinite(
    inner: optax.GradientTransformation,
    *,
    max_consecutive: int | None = None,
    sharded_over: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Leaves a step out if an element of its gradient is NaN or infinite.

    .. math:: (u_t, S_t) = \mathrm{inner}(g_t, S_{t-1}) \text{ if } \|g_t\| < \infty \text{, else } (0, S_{t-1})

    The updates of a skipped step are zero, and the state inside is bit for bit what it was:
    moments, step counts and schedules stand still, and no weight decays. It is a selection, never a
    product with zero, and it fuses into the optimizer's own pass; where a clip by l2 norms is
    inside, its norm is the one that is looked at.

    A derivative through a run is that of the run without its skipped steps. What multiplies NaN
    before it gets here, as the weight of a loss that is NaN, has a derivative of 0 * NaN all the
    same.

    Belongs around the whole chain, and around `optax.MultiSteps`, where it leaves out one
    micro-batch. Inside MultiSteps it comes too late: after one NaN micro-batch the accumulated
    gradients stay NaN, and every later step is skipped. The signal is a `clip/skipped_steps` that
    grows at every step. To leave out a whole set of micro-batches, average their gradients
    yourself, and call the guarded optimizer once for each set, with the mean.

    Args:
        inner: any optimizer or chain, or anything with `init` and `update`, such as
            `optax.MultiSteps`.
        max_consecutive: more skipped steps than this in a row are an error, under
            `jax.experimental.checkify`. Elsewhere they are counted, and skipped all the same.
        sharded_over: as for `clip`, so that all devices skip the same steps.

    Returns:
        A transform with state `GuardState`; `telemetry.metrics` has its counts.

    Raises:
        TypeError: `inner` is not a transform, or `max_consecutive` not an integer.
        ValueError: `max_consecutive` is below 1.

    Example:
        >>> import jax.numpy as jnp, optax, optaxclip
        >>> optimizer = optaxclip.skip_nonfinite(optax.chain(optaxclip.clip_by_global_norm(1.0), optax.sgd(0.5, momentum=0.9)))
        >>> state = optimizer.init(jnp.zeros(2))
        >>> for bad in 1.0, jnp.nan, 1.0:
        ...     updates, state = optimizer.update(jnp.array([0.0, bad]), state)
        ...     print(updates)
        [-0.  -0.5]
        [0. 0.]
        [-0.   -0.95]
        >>> state.skipped_steps
        Array(1, dtype=int32)
    """
    optimizer = _optimizer(inner)
    if max_consecutive is not None:
        _validate.count("max_consecutive", max_consecutive)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        _validate.state(state, GuardState)
        ok = jnp.isfinite(_norm(updates, sharded_over))
        updates, state = _unless_skipped(ok, optimizer, updates, state, params, extra_args)
        if max_consecutive is not None:
            advice = "look at what makes the gradients, such as the learning rate"
            within = state.consecutive <= min(max_consecutive, MOST)
            checkify.debug_check(
                within, "{n} steps in a row were not finite; " + advice, n=state.consecutive
            )
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: _start(optimizer, params), update)


@_validate.checks_keywords
def skip_spikes(
    inner: optax.GradientTransformation,
    threshold: Any,
    *,
    watch: str = "norm",
    patience: int | None = 10,
    sharded_over: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Leaves a step out if its gradient norm, or its loss, is over a threshold; and if its
    gradient is not finite.

    .. math:: (u_t, S_t) = \mathrm{inner}(g_t, S_{t-1}) \text{ if } s_t \le c_t \text{, else } (0, S_{t-1})

    with :math:`s_t` the norm :math:`\|g_t\|` or the loss, and :math:`c_t` from any rule,
    `thresholds.zscore` for one. What a skipped step does, and where the guard belongs, is as for
    `skip_nonfinite`, which this includes.

    Of a size over the limit the rule learns the limit, so one spike does not hide the next. What is
    over the limit for longer than `patience` is no spike but a new level: that step is done, and
    the rule starts afresh from it. So a guard whose threshold is too low slows a run down, but
    never stops it. With `patience=None` it may stop it: no step over the limit is ever done.

    Args:
        inner: any optimizer or chain, or anything with `init` and `update`, such as
            `optax.MultiSteps`.
        threshold: a number, a schedule (of the steps that were not skipped), or a rule from
            `optaxclip.thresholds`.
        watch: `"norm"`, the l2 norm of all updates that the guard gets; or `"loss"`, which is then
            an argument of each update: `update(grads, state, params, value=loss)`, or `loss=`.
            Rules never learn from a loss that is zero or negative: give the guard one that has a
            positive lower bound.
        patience: how many steps in a row may be skipped as spikes; None for any number. Those that
            are not finite are not counted, and never done.
        sharded_over: as for `clip`, so that all devices skip the same steps. A loss has to be the
            same on all of them.

    Returns:
        A transform with state `GuardState`; `telemetry.metrics` has its counts, the last size and
        its limit.

    Raises:
        TypeError: `inner` is not a transform, `threshold` is none, or `patience` not an integer.
        ValueError: `watch` is another word, `threshold` is a negative number, or one relative to
            the parameters for the loss, or `patience` is below 1; in `update`, the loss is missing
            or is not one number.

    Example:
        >>> import jax.numpy as jnp, optax, optaxclip
        >>> optimizer = optaxclip.skip_spikes(optax.sgd(0.5), optaxclip.thresholds.growth(2.0), patience=2)
        >>> state = optimizer.init(jnp.zeros(1))
        >>> for size in 1.0, 9.0, 1.0, 9.0, 9.0, 9.0, 9.0:
        ...     updates, state = optimizer.update(jnp.array([size]), state)
        ...     print(updates)
        [-0.5]
        [0.]
        [-0.5]
        [0.]
        [0.]
        [-4.5]
        [-4.5]
    """
    optimizer = _optimizer(inner)
    _validate.option("watch", watch, ("norm", "loss"))
    rule = _learning_limits(as_threshold(threshold))
    if patience is not None:
        _validate.count("patience", patience)
        rule = reset_after(rule, min(patience, MOST - 1) + 1)
    rule = observed(rule)
    if watch == "loss":
        _validate.not_relative("threshold", rule, watch)

    def init(params: Any) -> Any:
        size, limit = jnp.zeros(
            (2,), jax.eval_shape(lambda params: _norm(params, ()), params).dtype
        )
        return _start(optimizer, params)._replace(watch=Watch(size, limit, rule.init(size[None])))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        _validate.state(state, GuardState)
        before, norm = state.watch, _norm(updates, sharded_over)
        size = (norm if watch == "norm" else _loss(extra_args)).astype(before.size.dtype)
        if rule.uses_params:
            _validate.params_given(params)
        context = Context(
            state.steps - state.skipped_steps,
            _norm(params, sharded_over)[None] if rule.uses_params else None,
        )
        limit = jnp.broadcast_to(
            jnp.asarray(rule.limit(size[None], before.rule, context), size.dtype), (1,)
        )[0]
        learned = rule.learn(size[None], jnp.minimum(size, limit)[None], before.rule, context)
        done = size <= limit
        if patience is not None:
            _, streak = learned  # of sizes over the limit; over again when it is zero
            done |= streak[0] == 0
        ok = jnp.isfinite(norm) & jnp.isfinite(size) & done
        updates, state = _unless_skipped(ok, optimizer, updates, state, params, extra_args)
        return updates, state._replace(watch=Watch(size, limit, learned))

    return optax.GradientTransformationExtraArgs(init, update)


def _learning_limits(rule: Threshold) -> Threshold:
    """The rule, but what it learns of a size over the limit is the limit, so one spike does not
    hide the next.
    """

    def learn(sizes: Array, clipped_sizes: Array, state: Any, context: Context) -> Any:
        return rule.learn(clipped_sizes, clipped_sizes, state, context)

    return rule._replace(learn=learn)


def _optimizer(inner: Any) -> optax.GradientTransformationExtraArgs:
    """Anything with `init` and `update`, as a transform; its `update` gets those extra arguments
    that it takes.
    """
    _validate.transform("inner", inner)
    if isinstance(inner, optax.GradientTransformation):
        return optax.with_extra_args_support(inner)
    takes = inspect.signature(inner.update).parameters
    every = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        return inner.update(
            updates, state, params, **{k: v for k, v in extra_args.items() if every or k in takes}
        )

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _start(optimizer: optax.GradientTransformation, params: Any) -> Any:
    # no array twice: a state may be donated
    steps, skipped_steps, consecutive = (jnp.zeros((), jnp.int32) for _ in range(3))
    return GuardState(optimizer.init(params), steps, skipped_steps, consecutive)


def _norm(tree: Any, sharded_over: Any) -> Array:
    layout = lay_out(scopes.tree(), tree)
    names = layout.names_of_axes(sharded_over)
    # which steps are skipped has no derivative
    gradients = [jax.lax.stop_gradient(g) for g in layout.gradients]
    (norm,) = measure(norms.l2(), gradients, groups=layout.groups, sharded_over=names)
    return jnp.sum(norm)  # of no group, if nothing can be measured


def _loss(extra_args: dict[str, Any]) -> Array:
    loss = extra_args.get("loss", extra_args.get("value"))
    _validate.loss(loss)
    _validate.same_on_all("value", _sharding.varying(loss))
    return jax.lax.stop_gradient(widen(jnp.asarray(loss)))


def _unless_skipped(
    ok: Array,
    optimizer: optax.GradientTransformationExtraArgs,
    updates: Any,
    state: Any,
    params: Any,
    extra_args: dict[str, Any],
) -> tuple[Any, Any]:
    """A step of the optimizer, and the state after it with its counts; or, if it is not ok, a step
    that has never been.
    """

    def step(inputs: Any, before: Any) -> tuple[Any, Any]:
        updates, params, extra_args = inputs
        return optimizer.update(updates, before, params, **extra_args)

    # Outside of jit nothing is compiled, and `update` may look at the numbers.
    select = _select_early if isinstance(ok, Tracer) else _select
    updates, inner = select(step, ok, (updates, params, extra_args), state.inner)
    steps, skipped_steps, consecutive = map(
        optax.safe_increment, (state.steps, state.skipped_steps, state.consecutive)
    )
    skipped_steps, consecutive = (
        jnp.where(ok, state.skipped_steps, skipped_steps),
        jnp.where(ok, 0, consecutive),
    )
    return updates, GuardState(inner, jnp.asarray(steps), skipped_steps, consecutive, state.watch)


def _select(
    step: Callable[[Any, Any], tuple[Any, Any]], ok: Array, inputs: Any, state: Any
) -> tuple[Any, Any]:
    """The updates and the state of `step(inputs, state)` if it is ok, else zeros and the state
    before.
    """
    updates, after = step(*_harmless(ok, (inputs, state)))
    kept = [
        _or_old(ok, old)(new)
        for new, old in zip(jax.tree.leaves(after), _olds(after, state), strict=True)
    ]
    return jax.tree.map(_or_zeros(ok), updates), jax.tree.unflatten(jax.tree.structure(after), kept)


def _select_early(
    step: Callable[[Any, Any], tuple[Any, Any]], ok: Array, inputs: Any, state: Any
) -> tuple[Any, Any]:
    """`_select(step, ok, inputs, state)`, in an order that compiles without copies.

    Each new array of the state is selected where it is computed, and what follows is computed from
    the selected one: Adam's updates come from the moments that are kept. If they came from others,
    the compiler would need the old moments, the new and the kept ones at once, and on CPU it makes
    copies for that: the step is then four times slower than without a guard, and not a third. A
    step with side effects is not reordered, and the derivative is that of `_select`.
    """
    # `update` may look at the numbers that are known
    arrays, with_arrays = _separate((inputs, state), _is_traced)
    restore: list[Callable[[Sequence[Any]], Any]] = []

    def arrays_of_step(arrays: list[Any]) -> tuple[list[Any], list[Any]]:
        updates, after = step(*with_arrays(arrays))
        (news, with_news), (afters, with_afters) = (
            _separate(updates, _is_array),
            _separate(after, _is_array),
        )
        restore[:] = with_news, with_afters
        return news, afters

    program, (news, afters) = jax.make_jaxpr(arrays_of_step, return_shape=True)(arrays)
    with_news, with_afters = restore
    after = with_afters(afters)
    olds = [
        old
        for new, old in zip(jax.tree.leaves(after), _olds(after, state), strict=True)
        if _is_shape(new)
    ]

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
        except Exception:  # `update` has run above, so a version of JAX moved what the walk looks at; the other way needs none of it
            return plainly(ok, constants, arrays, olds)

    early.defjvp(lambda primals, tangents: jax.jvp(plainly, primals, tangents))
    select = plainly if _programs.has_side_effects(program.jaxpr) else early
    outs = select(ok, program.consts, arrays, olds)
    return with_news(outs[: len(news)]), with_afters(outs[len(news) :])


def _olds(after: Any, before: Any) -> list[Any]:
    """For each leaf of a state the leaf before, by path; zeros for an array that was not there, as
    in `optax.monitor`.
    """
    known = dict(jax.tree_util.tree_leaves_with_path(before))

    def old(path: Any, new: Any) -> Any:
        if not (_is_array(new) or _is_shape(new)):
            return known.get(path, new)
        there = _is_array(known.get(path)) and jnp.shape(known[path]) == jnp.shape(new)
        return known[path] if there else jnp.zeros_like(new)

    return [old(path, new) for path, new in jax.tree_util.tree_leaves_with_path(after)]


def _or_zeros(ok: Array) -> Callable[[Any], Any]:
    return lambda new: jnp.where(ok, new, jnp.zeros_like(new)) if _is_array(new) else new


def _or_old(ok: Array, old: Any) -> Callable[[Any], Any]:
    def choose(new: Any) -> Any:
        if not _is_array(old):
            return new if isinstance(ok, Tracer) or ok else old
        kept, dtype = jnp.where(ok, new, old), jnp.result_type(old)
        return kept if kept.dtype == dtype else kept.astype(dtype)

    return choose


def _harmless(ok: Array, inputs: Any) -> Any:
    """The inputs; but no derivative goes through a skipped step, which may compute 0 * NaN."""
    floats, with_floats = _separate(inputs, _is_float)
    return with_floats(_no_derivative_unless(ok, floats))


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
    """The leaves that belong, and a function that makes the tree again, from these or from others
    in their places.
    """
    leaves, treedef = jax.tree.flatten(tree)
    which = [belongs(leaf) for leaf in leaves]

    def rebuild(parts: Sequence[Any]) -> Any:
        parts_in_order = iter(parts)
        return jax.tree.unflatten(
            treedef, [next(parts_in_order) if w else x for x, w in zip(leaves, which, strict=True)]
        )

    parts = list(itertools.compress(leaves, which))
    # what is traced must not outlive its trace
    leaves = [None if w else x for x, w in zip(leaves, which, strict=True)]
    return parts, rebuild


def _is_traced(x: Any) -> bool:
    return isinstance(x, Tracer)


def _is_array(x: Any) -> bool:
    """Whether a compiled program can have it: no function, no word, and no gradient of an integer."""
    return (
        isinstance(x, Array | np.ndarray | np.generic | numbers.Number)
        and jnp.result_type(x) != jax.dtypes.float0
    )


def _is_shape(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)


def _is_float(x: Any) -> bool:
    return _is_array(x) and jnp.issubdtype(jnp.result_type(x), jnp.inexact)
