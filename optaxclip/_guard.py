"""Wrappers that skip a bad step, as if its batch had not been seen."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

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
from optaxclip._types import Context, Scope
from optaxclip._watch import MOST, Watch, watcher


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
    where: Callable[[str], bool] | None = None,
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
        where: `path -> bool`. Leaves that it refuses, such as a frozen part, are not looked at:
            NaN there skips nothing, and reaches the optimizer.
        sharded_over: as for `clip`, so that all devices skip the same steps.

    Returns:
        A transform with state `GuardState`; `telemetry.metrics` has its counts.

    Raises:
        TypeError: `inner` is not a transform, `max_consecutive` is not an integer, or `where` is
            not a function of a path.
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
    optimizer, scope = as_transform("inner", inner), scopes.tree(where=where)
    if max_consecutive is not None:
        _validate.count("max_consecutive", max_consecutive)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        _validate.state(state, GuardState)
        ok = jnp.isfinite(_norm(scope, updates, sharded_over))
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
    watch: Literal["norm", "loss", "both"] = "norm",
    patience: int | None = 10,
    where: Callable[[str], bool] | None = None,
    sharded_over: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Skips a step if its gradient norm or its loss exceeds a threshold.

    .. math:: (u_t, S_t) = \mathrm{inner}(g_t, S_{t-1}) \text{ if } s_t \le c_t
        \text{, else } (0, S_{t-1})

    :math:`s_t` is the norm :math:`\|g_t\|` or the loss; :math:`c_t` comes from a rule, for example
    `thresholds.zscore`. With `watch="both"`, a spike of either skips the step. It also skips
    gradients that are not finite, like `skip_nonfinite`. Skipped steps have the same effect, and
    the guard has the same position in a chain.

    If a size exceeds its limit, the rule learns the limit instead, so one spike does not hide the
    next. If steps have spikes more than `patience` times in a row, they are a new level: the guard
    takes that step, and the rule of each size above its limit restarts from it. So a threshold that
    is too low slows a run down but never stops it. With `patience=None` it may stop the run: the
    guard skips every step above the limit.

    OLMo's rule, which skips a step if its loss or its norm is more than 6 standard deviations above
    the mean of the last 128, is `skip_spikes(inner, thresholds.window_zscore(6.0), watch="both",
    patience=None)`.

    Args:
        inner: any optimizer or chain, or any object with `init` and `update`, such as
            `optax.MultiSteps`.
        threshold: a number, a schedule (of the steps that were not skipped), or a rule from
            `optaxclip.thresholds`. With `watch="both"`, one for both or a dict
            `{"norm": ..., "loss": ...}`.
        watch: `"norm"` for the l2 norm of all updates; `"loss"` for the loss, which you then pass
            to each update: `update(grads, state, params, value=loss)`, or `loss=`; or `"both"`. A
            loss may be negative, so its threshold must be a number, a schedule, or a rule that
            takes either sign: `zscore`, `window_zscore`, `quantile`, and combinations of these.
        patience: how many steps in a row may be skipped as spikes; None for any number. Steps that
            are not finite do not count, and are always skipped.
        where: `path -> bool`. Leaves that it refuses, such as a frozen part, are not looked at: a
            spike or NaN there skips nothing, and reaches the optimizer.
        sharded_over: as for `clip`, so that all devices skip the same steps. The loss must be the
            same on all devices.

    Returns:
        A transform with state `GuardState`; `telemetry.metrics` has its counts, the last size and
        its limit.

    Raises:
        TypeError: `inner` is not a transform, `threshold` is not a threshold, `patience` is not an
            integer, or `where` is not a function of a path.
        ValueError: `watch` is another word, the limit of the norm is negative, a dict of thresholds
            has other keys, the threshold of the loss needs positive sizes or parameters, or
            `patience` is below 1; on `update`: the loss is missing or is not one number.

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
    optimizer, scope = as_transform("inner", inner), scopes.tree(where=where)
    watched = watcher(threshold, watch, patience)

    def init(params: Any) -> Any:
        dtype = jax.eval_shape(lambda params: _norm(scope, params, ()), params).dtype
        return _start(optimizer, params)._replace(watch=watched.first(dtype))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        _validate.state(state, GuardState)
        norm = _norm(scope, updates, sharded_over)
        sizes, param_size = {"norm": norm}, None
        if watch != "norm":
            sizes["loss"] = _loss(extra_args, watch)
        dtype = jax.tree.leaves(state.watch.size)[0].dtype
        sizes = {name: sizes[name].astype(dtype)[None] for name in watched.rules}
        if watched.uses_params:
            _validate.params_given(params)
            param_size = _norm(scope, params, sharded_over)[None]
        # schedules see the steps that were not skipped
        context = Context(state.steps - state.skipped_steps, param_size, extra=extra_args)
        finite = jnp.isfinite(norm)
        for size in sizes.values():
            finite &= jnp.isfinite(size[0])
        accepted, after = watched.next(state.watch, sizes, finite, context)
        ok = finite & accepted
        updates, state = _unless_skipped(ok, optimizer, updates, state, params, extra_args)
        return updates, state._replace(watch=after)

    return transform(init, update)


def _start(optimizer: optax.GradientTransformation, params: Any) -> Any:
    # three arrays, not one used three times: JAX cannot donate a buffer twice
    steps, skipped_steps, consecutive = (jnp.zeros((), jnp.int32) for _ in range(3))
    return GuardState(optimizer.init(params), steps, skipped_steps, consecutive)


def _norm(scope: Scope, tree: Any, sharded_over: Any) -> Array:
    layout = lay_out(scope, tree)
    names = layout.names_of_axes(sharded_over)
    # the decision to skip a step has no derivative
    gradients = [jax.lax.stop_gradient(g) for g in layout.gradients]
    (norm,) = measure(norms.l2(), gradients, groups=layout.groups, sharded_over=names)
    return jnp.sum(norm)  # 0 for a tree without floats, which has no group


def _loss(extra_args: dict[str, Any], watch: str) -> Array:
    loss = extra_args.get("loss", extra_args.get("value"))
    _validate.loss(loss, watch)
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
