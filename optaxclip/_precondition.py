"""A clip after a part of an optimizer: it measures one tree and clips another."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from optaxclip import _validate, scopes
from optaxclip._layout import lay_out
from optaxclip._numerics import cast_like
from optaxclip._rules import is_placeholder
from optaxclip._transform import transform


class PreconditionedState(NamedTuple):
    """State of the part of an optimizer, and of the clip after it."""

    inner: Any
    clip: Any


def clip_after(
    inner: optax.GradientTransformation,
    clip: optax.GradientTransformationExtraArgs,
    *,
    measured: Callable[[Any, Any], Any],
) -> optax.GradientTransformationExtraArgs:
    r"""Clips the updates of a transform by the size of another tree, which its state helps to make.

    .. math:: u = \mathrm{inner}(g), \qquad u\, c / s(m) \text{ if } s(m) > c, \qquad
        m = \mathrm{measured}(g, \mathrm{state})

    For methods that divide by a second moment, or that look at gradients and preconditioned steps
    together: StableAdamW is a row made of it, ACClip and K-FAC's KL clip are recipes. `inner` sees
    only the floats; all other leaves are passed through.

    Args:
        inner: what makes the updates, such as `optax.scale_by_adam()`.
        clip: the clip of these updates; any transform of this package that takes `measured=`.
        measured: `(gradients, new state of inner) -> tree` to measure in place of the updates. It
            has the structure of the gradients, in which a leaf that is not a float is a zero.

    Returns:
        A transform with state `(inner, clip)`, in place of `inner` in a chain.

    Raises:
        TypeError: `inner` or `clip` is not a transform, or `measured` is not a function of two
            arguments.

    Example:
        >>> import jax, jax.numpy as jnp, optax, optaxclip
        >>> adam = optax.scale_by_adam()
        >>> gradient = lambda gradients, state: gradients
        >>> clip = optaxclip.clip_by_global_norm(5.0)
        >>> step = optaxclip.clip_after(adam, clip, measured=gradient)
        >>> grads = jnp.array([6.0, 8.0])
        >>> updates, state = step.update(grads, step.init(grads))
        >>> print(updates.round(3), state.clip.reading.size_before)
        [0.5 0.5] [10.]
    """
    _validate.transform("inner", inner)
    _validate.transform("clip", clip)
    _validate.function("measured", measured, "lambda gradients, state: gradients", takes=2)

    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> PreconditionedState:
        floats = params if is_placeholder(params) else lay_out(scopes.leaf(), params).floats()
        return PreconditionedState(inner.init(floats), clip.init(params))

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, PreconditionedState]:
        _validate.state(state, PreconditionedState)
        layout = lay_out(scopes.leaf(), updates, params)
        weights = None
        if params is not None:
            weights = layout._replace(gradients=layout.matching(params)).floats()
        gradients = layout.floats()
        steps, inner_state = inner.update(gradients, state.inner, weights, **extra_args)
        # Adam's mean takes the dtype of the gradients; a state must keep the dtypes that it has.
        inner_state = jax.tree.map(cast_like, inner_state, state.inner)
        steps = layout.rebuild(layout.of(steps))
        size_of = measured(gradients, inner_state)
        clipped, clip_state = clip.update(steps, state.clip, params, measured=size_of, **extra_args)
        parts = zip(layout.of(clipped), layout.gradients, strict=True)
        out = [cast_like(like if x is None else x, like) for x, like in parts]
        return layout.rebuild(out), PreconditionedState(inner_state, clip_state)

    return transform(init, update)
