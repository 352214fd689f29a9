"""Guards around an optimizer: a step that would spoil it is left out, as if its batch had never been."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.experimental import checkify

from optaxclip import _sharding, _validate, norms, scopes
from optaxclip._jax import Literal, bind
from optaxclip._layout import lay_out
from optaxclip._types import Context, Threshold
from optaxclip.thresholds.combine import observed, patient
from optaxclip.thresholds.fixed import as_threshold


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
        watch: what `skip_spikes` looked at; None for `skip_nonfinite`.
    """

    inner: Any
    steps: Array
    skipped_steps: Array
    consecutive: Array
    watch: Watch | None = None


@_validate.checks_keywords
def skip_nonfinite(
    inner: optax.GradientTransformation, *, max_consecutive: int | None = None, sharded_over: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""Leaves a step out if an element of its gradient is NaN or infinite.

    .. math:: (u_t, S_t) = \mathrm{inner}(g_t, S_{t-1}) \text{ if } \|g_t\| < \infty \text{, else } (0, S_{t-1})

    The updates of a skipped step are zero, and the state inside is bit for bit what it was: moments, step counts
    and schedules stand still, and no weight decays. It is a selection, never a product with zero, and it fuses
    into the optimizer's own pass; where a clip by l2 norms is inside, its norm is the one that is looked at.

    Belongs around the whole chain, and around `optax.MultiSteps`, where it leaves out one micro-batch. Inside of that it
    comes too late: what MultiSteps accumulates stays NaN once it is, so every later step is skipped.

    Args:
        inner: any optimizer or chain.
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
            within = state.consecutive <= max_consecutive
            checkify.debug_check(within, "{n} steps in a row were not finite; " + advice, n=state.consecutive)
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: _start(optimizer, params), update)


@_validate.checks_keywords
def skip_spikes(
    inner: optax.GradientTransformation,
    threshold: Any,
    *,
    watch: str = "norm",
    patience: int = 10,
    sharded_over: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Leaves a step out if its gradient norm, or its loss, is over a threshold; and if its gradient is not finite.

    .. math:: (u_t, S_t) = \mathrm{inner}(g_t, S_{t-1}) \text{ if } s_t \le c_t \text{, else } (0, S_{t-1})

    with :math:`s_t` the norm :math:`\|g_t\|` or the loss, and :math:`c_t` from any rule, `thresholds.zscore` for one. What
    a skipped step does, and where the guard belongs, is as for `skip_nonfinite`, which this includes.

    Of a size over the limit the rule learns the limit, so one spike does not hide the next. What is over the limit for longer
    than `patience` is no spike but a new level: that step is done, and the rule starts afresh from it. So a guard whose
    threshold is too low slows a run down, but never stops it.

    Args:
        inner: any optimizer or chain.
        threshold: a number, a schedule (of the steps that were not skipped), or a rule from `optaxclip.thresholds`.
        watch: `"norm"`, the l2 norm of all updates that the guard gets; or `"loss"`, which is then an argument of each
            update: `update(grads, state, params, value=loss)`, or `loss=`. Rules never learn from a loss
            that is zero or negative: give the guard one that has a positive lower bound.
        patience: how many steps in a row may be skipped as spikes. Those that are not finite are not counted, and never done.
        sharded_over: as for `clip`, so that all devices skip the same steps. A loss has to be the same on all of them.

    Returns:
        A transform with state `GuardState`; `telemetry.metrics` has its counts, the last size and its limit.

    Raises:
        TypeError: `inner` is not a transform, `threshold` is none, or `patience` not an integer.
        ValueError: `watch` is another word, `threshold` is a negative number, or one relative to the parameters for the loss,
            or `patience` is below 1; in `update`, the loss is missing or is not one number.

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
    _validate.count("patience", patience)
    rule = observed(patient(_learning_limits(as_threshold(threshold)), patience + 1))
    if watch == "loss":
        _validate.not_relative("threshold", rule, watch)

    def init(params: Any) -> Any:
        size, limit = jnp.zeros((2,), jax.eval_shape(lambda params: _norm(params, ()), params).dtype)
        return _start(optimizer, params)._replace(watch=Watch(size, limit, rule.init(size[None])))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        _validate.state(state, GuardState)
        before, norm = state.watch, _norm(updates, sharded_over)
        size = (norm if watch == "norm" else _loss(extra_args)).astype(before.size.dtype)
        if rule.uses_params:
            _validate.params_given(params)
        context = Context(state.steps - state.skipped_steps, _norm(params, sharded_over)[None] if rule.uses_params else None)
        limit = jnp.broadcast_to(jnp.asarray(rule.limit(size[None], before.rule, context), size.dtype), (1,))[0]
        learned = rule.learn(size[None], jnp.minimum(size, limit)[None], before.rule, context)
        _, streak = learned  # of sizes over the limit; over again when it is zero
        ok = jnp.isfinite(norm) & jnp.isfinite(size) & ((size <= limit) | (streak[0] == 0))
        updates, state = _unless_skipped(ok, optimizer, updates, state, params, extra_args)
        return updates, state._replace(watch=Watch(size, limit, learned))

    return optax.GradientTransformationExtraArgs(init, update)


def _learning_limits(rule: Threshold) -> Threshold:
    """The rule, but what it learns of a size over the limit is the limit, so one spike does not hide the next."""

    def learn(sizes: Array, clipped_sizes: Array, state: Any, context: Context) -> Any:
        return rule.learn(clipped_sizes, clipped_sizes, state, context)

    return rule._replace(learn=learn)


def _optimizer(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    _validate.part("inner", inner, optax.GradientTransformation, "optax.adam(1e-3)")
    return optax.with_extra_args_support(inner)


def _start(optimizer: optax.GradientTransformation, params: Any) -> Any:
    steps, skipped_steps, consecutive = (jnp.zeros((), jnp.int32) for _ in range(3))  # no array twice: a state may be donated
    return GuardState(optimizer.init(params), steps, skipped_steps, consecutive)


def _norm(tree: Any, sharded_over: Any) -> Array:
    layout = lay_out(scopes.tree(), tree)
    names = layout.names_of_axes(sharded_over)
    (norm,) = norms.measure(norms.l2(), layout.gradients, groups=layout.groups, axis_names=names)
    return jnp.sum(norm)  # of no group, if nothing can be measured


def _loss(extra_args: dict[str, Any]) -> Array:
    loss = extra_args.get("loss", extra_args.get("value"))
    _validate.loss(loss)
    _validate.same_on_all("value", _sharding.varying(loss))
    return norms.widen(jnp.asarray(loss))


def _unless_skipped(
    ok: Array,
    optimizer: optax.GradientTransformationExtraArgs,
    updates: Any,
    state: Any,
    params: Any,
    extra_args: dict[str, Any],
) -> tuple[Any, Any]:
    """A step of the optimizer, and the state after it with its counts; or, if it is not ok, a step that has never been."""

    def keep(new: Array, old: Array) -> Array:
        return jnp.where(ok, new, old).astype(jnp.result_type(old))

    new, kept = _keeping(lambda g, s: optimizer.update(g, s, params, **extra_args), keep, updates, state.inner)
    new = jax.tree.map(lambda x: keep(x, jnp.zeros_like(x)), new)
    steps = jnp.asarray(optax.safe_increment(state.steps))
    consecutive = jnp.where(ok, 0, state.consecutive + 1)
    return new, GuardState(kept, steps, state.skipped_steps + ~ok, consecutive)


def _keeping(update: Callable[..., Any], keep: Callable[[Array, Array], Array], updates: Any, state: Any) -> tuple[Any, Any]:
    """`update(updates, state)`, with `keep(new, old)` of each array in the state; where they agree, exactly that.

    Each choice is made where the new array is, before anything else is computed from it: Adam's updates come from the moments
    that are kept. If they came from others, the compiler would need the old moments, the new and the kept ones at once, and
    on CPU it makes copies for that: the step is then four times slower than without a guard, and not a third.
    """
    arrays, treedef = jax.tree.flatten((updates, state))
    traced, shape = jax.make_jaxpr(lambda *arrays: update(*jax.tree.unflatten(treedef, arrays)), return_shape=True)(*arrays)
    program, old = traced.jaxpr, jax.tree.leaves(state)
    news = program.outvars[len(program.outvars) - len(old) :]
    values: dict[Any, Any] = dict(zip([*program.invars, *program.constvars], [*arrays, *traced.consts], strict=True))
    computed = {v for equation in program.eqns for v in equation.outvars}
    olds = {v: x for v, x in zip(news, old, strict=True) if not isinstance(v, Literal) and v in computed}

    def read(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else values[v]

    for equation in program.eqns:
        for v, x in zip(equation.outvars, bind(equation, list(map(read, equation.invars))), strict=True):
            values[v] = keep(x, olds[v]) if v in olds else x
    outs = list(map(read, program.outvars[: len(program.outvars) - len(old)]))
    kept = [read(v) if olds.get(v) is x else keep(read(v), x) for v, x in zip(news, old, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(shape), [*outs, *kept])
