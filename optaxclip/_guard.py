"""Guards around an optimizer: a step that would spoil it is left out, as if its batch had never been."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.experimental import checkify
from jax.extend.core import Literal

from optaxclip import _validate, norms, scopes


class GuardState(NamedTuple):
    """State of `skip_nonfinite`.

    Attributes:
        inner: state of the optimizer inside, as it was after the last step that was not skipped.
        steps: int32 scalar, updates so far, skipped ones included.
        skipped_steps: int32 scalar, how many of them were skipped.
        consecutive: int32 scalar, how many of the last ones in a row.
    """

    inner: Any
    steps: Array
    skipped_steps: Array
    consecutive: Array


def skip_nonfinite(
    inner: optax.GradientTransformation, *, max_consecutive: int | None = None
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

    Returns:
        A transform with state `GuardState`; `telemetry.metrics` has its counts.

    Raises:
        TypeError: `inner` is not a transform, or `max_consecutive` not an integer.
        ValueError: `max_consecutive` is below 1.

    Example:
        >>> import jax.numpy as jnp, optax, optaxclip
        >>> optimizer = optaxclip.skip_nonfinite(optax.chain(optaxclip.clip(1.0), optax.sgd(0.5, momentum=0.9)))
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
    _validate.part("inner", inner, optax.GradientTransformation, "optax.adam(1e-3)")
    if max_consecutive is not None:
        _validate.count("max_consecutive", max_consecutive)
    optimizer = optax.with_extra_args_support(inner)

    def init(params: Any) -> GuardState:
        return GuardState(optimizer.init(params), *(jnp.zeros((), jnp.int32) for _ in range(3)))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, GuardState]:
        layout = scopes.lay_out(scopes.tree(), updates)
        (norm,) = norms.measure(norms.l2(), layout.gradients, groups=layout.groups)
        ok = jnp.isfinite(norm).all()

        def keep(new: Array, old: Array) -> Array:
            return jnp.where(ok, new, old).astype(jnp.result_type(old))

        new, kept = _keeping(lambda g, s: optimizer.update(g, s, params, **extra_args), keep, updates, state.inner)
        new = jax.tree.map(lambda x: keep(x, jnp.zeros_like(x)), new)
        consecutive = jnp.where(ok, 0, state.consecutive + 1)
        if max_consecutive is not None:
            advice = "look at what makes the gradients, such as the learning rate"
            within = consecutive <= max_consecutive
            checkify.debug_check(within, "{n} steps in a row were not finite; " + advice, n=consecutive)
        steps = jnp.asarray(optax.safe_increment(state.steps))
        return new, GuardState(kept, steps, state.skipped_steps + ~ok, consecutive)

    return optax.GradientTransformationExtraArgs(init, update)


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
        parts = equation.primitive.get_bind_params(equation.params)
        functions, options = parts if isinstance(parts, tuple) else ((), parts)  # by the version of JAX
        with equation.ctx.manager:
            out = equation.primitive.bind(*functions, *map(read, equation.invars), **options)
        for v, x in zip(equation.outvars, out if equation.primitive.multiple_results else [out], strict=True):
            values[v] = keep(x, olds[v]) if v in olds else x
    outs = list(map(read, program.outvars[: len(program.outvars) - len(old)]))
    kept = [read(v) if olds.get(v) is x else keep(read(v), x) for v, x in zip(news, old, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(shape), [*outs, *kept])
