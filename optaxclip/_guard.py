"""Wrappers that skip a bad step, as if its batch had not been seen."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.core import Tracer
from jax.experimental import checkify

from optaxclip import _sharding, _validate, norms, scopes
from optaxclip._layout import lay_out
from optaxclip._measure import measure
from optaxclip._numerics import widen
from optaxclip._selection import select, select_early
from optaxclip._transform import as_transform, transform
from optaxclip._types import Context, Threshold
from optaxclip.thresholds.combine import observed, reset_after
from optaxclip.thresholds.fixed import as_threshold

MOST = 2**31 - 1
"""The largest count that an int32 holds; counts stop here."""


class Watch(NamedTuple):
    """What `skip_spikes` watched in the last step.

    Attributes:
        size: float scalar, the gradient norm or the loss.
        limit: float scalar, its limit.
        rule: state of the threshold.
    """

    size: Array
    limit: Array
    rule: Any


class GuardState(NamedTuple):
    """State of `skip_nonfinite` and `skip_spikes`.

    Attributes:
        inner: state of the wrapped optimizer after the last step that was not skipped.
        steps: int32 scalar, updates so far, including skipped ones.
        skipped_steps: int32 scalar, number of skipped updates.
        consecutive: int32 scalar, number of updates skipped in a row up to now.
        watch: what `skip_spikes` watched; empty for `skip_nonfinite`.
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
    r"""Skips a step if an element of its gradient is NaN or infinite.

    .. math:: (u_t, S_t) = \mathrm{inner}(g_t, S_{t-1}) \text{ if } \|g_t\| < \infty
        \text{, else } (0, S_{t-1})

    The updates of a skipped step are zero, and the inner state keeps its bits: moments, step counts
    and schedules stand still, and no weight decays. The guard selects values, it never multiplies
    by zero. The selection fuses into the optimizer's pass over memory. If the optimizer clips by l2
    norms, the compiler can share that norm, so no extra read of the gradients is needed.

    A derivative through a run is the derivative of the run without its skipped steps. A value that
    multiplies NaN before the guard, such as the weight of a loss that is NaN, still has the
    derivative 0 * NaN.

    Wrap the whole chain. Also wrap `optax.MultiSteps`: then the guard skips one micro-batch. Inside
    MultiSteps it comes too late: after one NaN micro-batch the accumulated gradients stay NaN, and
    every later step is skipped. You can see this because `clip/skipped_steps` grows at every step.
    To skip a whole set of micro-batches, average their gradients yourself, and call the guarded
    optimizer once for each set with the mean.

    Args:
        inner: any optimizer or chain, or any object with `init` and `update`, such as
            `optax.MultiSteps`.
        max_consecutive: under `jax.experimental.checkify`, more skipped steps in a row than this
            raise an error. Without checkify they are counted and skipped.
        sharded_over: as for `clip`, so that all devices skip the same steps.

    Returns:
        A transform with state `GuardState`; `telemetry.metrics` has its counts.

    Raises:
        TypeError: `inner` is not a transform, or `max_consecutive` is not an integer.
        ValueError: `max_consecutive` is below 1.

    Example:
        >>> import jax.numpy as jnp, optax, optaxclip
        >>> clip = optaxclip.clip_by_global_norm(1.0)
        >>> optimizer = optaxclip.skip_nonfinite(optax.chain(clip, optax.sgd(0.5, momentum=0.9)))
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
    optimizer = as_transform("inner", inner)
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

    return transform(lambda params: _start(optimizer, params), update)


@_validate.checks_keywords
def skip_spikes(
    inner: optax.GradientTransformation,
    threshold: Any,
    *,
    watch: str = "norm",
    patience: int | None = 10,
    sharded_over: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Skips a step if its gradient norm or its loss exceeds a threshold.

    .. math:: (u_t, S_t) = \mathrm{inner}(g_t, S_{t-1}) \text{ if } s_t \le c_t
        \text{, else } (0, S_{t-1})

    :math:`s_t` is the norm :math:`\|g_t\|` or the loss; :math:`c_t` comes from any rule, for
    example `thresholds.zscore`. It also skips gradients that are not finite, like `skip_nonfinite`.
    Skipped steps have the same effect, and the guard has the same position in a chain.

    If a size exceeds its limit, the rule learns the limit instead, so one spike does not hide the
    next. If sizes exceed the limit for more than `patience` steps in a row, they are a new level:
    the guard takes that step, and the rule restarts from it. So a threshold that is too low slows a
    run down but never stops it. With `patience=None` it may stop the run: the guard skips every
    step above the limit.

    Args:
        inner: any optimizer or chain, or any object with `init` and `update`, such as
            `optax.MultiSteps`.
        threshold: a number, a schedule (of the steps that were not skipped), or a rule from
            `optaxclip.thresholds`.
        watch: `"norm"` for the l2 norm of all updates; `"loss"` for the loss, which you then pass
            to each update: `update(grads, state, params, value=loss)`, or `loss=`. Rules never
            learn from a loss that is zero or negative, so use a loss with a positive lower bound.
        patience: how many steps in a row may be skipped as spikes; None for any number. Steps that
            are not finite do not count, and are always skipped.
        sharded_over: as for `clip`, so that all devices skip the same steps. The loss must be the
            same on all devices.

    Returns:
        A transform with state `GuardState`; `telemetry.metrics` has its counts, the last size and
        its limit.

    Raises:
        TypeError: `inner` is not a transform, `threshold` is not a threshold, or `patience` is not
            an integer.
        ValueError: `watch` is another word, `threshold` is negative, `threshold` is relative to the
            parameters with `watch="loss"`, or `patience` is below 1; on `update`: the loss is
            missing or is not one number.

    Example:
        >>> import jax.numpy as jnp, optax, optaxclip
        >>> rule = optaxclip.thresholds.growth(2.0)
        >>> optimizer = optaxclip.skip_spikes(optax.sgd(0.5), rule, patience=2)
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
    optimizer = as_transform("inner", inner)
    _validate.option("watch", watch, ("norm", "loss"))
    rule = _learning_limits(as_threshold(threshold))
    if patience is not None:
        _validate.count("patience", patience)
        rule = reset_after(rule, min(patience, MOST - 1) + 1)
    rule = observed(rule)
    if watch == "loss":
        _validate.not_relative("threshold", rule, watch)

    def init(params: Any) -> Any:
        dtype = jax.eval_shape(lambda params: _norm(params, ()), params).dtype
        size, limit = jnp.zeros((2,), dtype)
        return _start(optimizer, params)._replace(watch=Watch(size, limit, rule.init(size[None])))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        _validate.state(state, GuardState)
        before, norm = state.watch, _norm(updates, sharded_over)
        size = (norm if watch == "norm" else _loss(extra_args)).astype(before.size.dtype)
        param_size = None
        if rule.uses_params:
            _validate.params_given(params)
            param_size = _norm(params, sharded_over)[None]
        # schedules see the steps that were not skipped
        context = Context(state.steps - state.skipped_steps, param_size)
        limit = rule.limit(size[None], before.rule, context)
        limit = jnp.broadcast_to(jnp.asarray(limit, size.dtype), (1,))[0]
        learned = rule.learn(size[None], jnp.minimum(size, limit)[None], before.rule, context)
        accepted = size <= limit
        if patience is not None:
            _, streak = learned  # sizes over the limit in a row; back at 0 after the patience
            accepted |= streak[0] == 0
        ok = jnp.isfinite(norm) & jnp.isfinite(size) & accepted
        updates, state = _unless_skipped(ok, optimizer, updates, state, params, extra_args)
        return updates, state._replace(watch=Watch(size, limit, learned))

    return transform(init, update)


def _learning_limits(rule: Threshold) -> Threshold:
    """Lets the rule learn the limit instead of a size that exceeds it."""

    def learn(sizes: Array, clipped_sizes: Array, state: Any, context: Context) -> Any:
        return rule.learn(clipped_sizes, clipped_sizes, state, context)

    return rule._replace(learn=learn)


def _start(optimizer: optax.GradientTransformation, params: Any) -> Any:
    # three arrays, not one used three times: JAX cannot donate a buffer twice
    steps, skipped_steps, consecutive = (jnp.zeros((), jnp.int32) for _ in range(3))
    return GuardState(optimizer.init(params), steps, skipped_steps, consecutive)


def _norm(tree: Any, sharded_over: Any) -> Array:
    layout = lay_out(scopes.tree(), tree)
    names = layout.names_of_axes(sharded_over)
    # the decision to skip a step has no derivative
    gradients = [jax.lax.stop_gradient(g) for g in layout.gradients]
    (norm,) = measure(norms.l2(), gradients, groups=layout.groups, sharded_over=names)
    return jnp.sum(norm)  # 0 for a tree without floats, which has no group


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
    """Takes a step of the optimizer if ok, else returns zero updates; counts both."""

    def step(inputs: Any, before: Any) -> tuple[Any, Any]:
        updates, params, extra_args = inputs
        return optimizer.update(updates, before, params, **extra_args)

    # outside of jit there is no program to reorder, and `update` may read concrete values
    selected = select_early if isinstance(ok, Tracer) else select
    updates, inner = selected(step, ok, (updates, params, extra_args), state.inner)
    one_more = optax.safe_increment  # stops at the largest int32
    skipped_steps = jnp.where(ok, state.skipped_steps, one_more(state.skipped_steps))
    consecutive = jnp.where(ok, 0, one_more(state.consecutive))
    steps = jnp.asarray(one_more(state.steps))
    return updates, GuardState(inner, steps, skipped_steps, consecutive, state.watch)
