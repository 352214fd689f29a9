"""Error feedback around a clip: what is cut off today is added to the gradient of tomorrow."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from optaxclip import _validate, norms, scopes
from optaxclip._layout import lay_out
from optaxclip._states import is_placeholder


class CarryState(NamedTuple):
    """State of `carry`.

    Attributes:
        carried: a tree like the parameters, of what was cut off, in float32 or wider; a zero for what is no float.
        clip: state of the clip inside.
    """

    carried: Any
    clip: Any


def carry(clip: optax.GradientTransformation, *, decay: ArrayLike = 1.0) -> optax.GradientTransformationExtraArgs:
    r"""U-Clip: clips :math:`g_t + d_t` and carries over what that cuts off.

    .. math:: u_t = \mathrm{clip}(g_t + d_t), \qquad d_{t+1} = \beta (g_t + d_t - u_t)

    Law, for :math:`\beta = 1`: the updates so far and what is carried add up to the gradients so far, so that
    clipping only delays. Its state is one buffer as large as the parameters. Belongs first in a chain.
    Known failure: what is carried grows without bound while the gradients are larger than the limit on average; a
    `decay` below 1 bounds it. Where a sum is not finite, what was carried before stays.

    Args:
        clip: any clip, or chain of them.
        decay: :math:`\beta`, the share that is carried over, from 0 (the clip alone) to 1.

    Raises:
        TypeError: `clip` is not a transform, or `decay` not a number.
        ValueError: `decay` is not between 0 and 1.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> clip = optaxclip.carry(optaxclip.clip_by_value(1.0))
        >>> state = clip.init(jnp.zeros(1))
        >>> for gradient in 2.5, 0.0, 0.0, 0.0:
        ...     updates, state = clip.update(jnp.array([gradient]), state)
        ...     print(updates)
        [1.]
        [1.]
        [0.5]
        [0.]

    References:
        Elesedy and Hutter, [U-Clip: on-average unbiased stochastic gradient
        clipping](https://arxiv.org/abs/2302.02971), 2023.
    """
    _validate.part("clip", clip, optax.GradientTransformation, "optaxclip.clip_by_value(1.0)")
    _validate.number("decay", decay, high=1.0)
    inner = optax.with_extra_args_support(clip)

    def init(params: Any) -> CarryState:
        if is_placeholder(params):
            return CarryState(params, inner.init(params))
        layout = lay_out(scopes.leaf(), params)
        nothing = layout.filled(jnp.zeros_like(gradient, norms.wide(gradient)) for gradient in layout.gradients)
        return CarryState(nothing, inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, CarryState]:
        if state is None:  # one step outside of any loop
            state = init(updates if params is None else params)
        _validate.state(state, CarryState)
        layout = lay_out(scopes.leaf(), updates, params)
        _validate.state_tree(layout.treedef, state.carried)
        carried = layout.of(state.carried)
        sums = [norms.widen(g) + d for g, d in zip(layout.gradients, carried, strict=True)]
        # The sum with a zero is not always the same bits.
        parts = zip(layout.gradients, carried, sums, strict=True)
        narrow = [norms.cast_like(jnp.where(d == 0, norms.widen(g), _within(total, g)), g) for g, d, total in parts]
        clipped, clip_state = inner.update(layout.rebuild(narrow), state.clip, params, **extra_args)

        def cut_off(kept: Array | None, total: Array, before: Array) -> Array:
            left = total if kept is None else total - norms.widen(kept)
            return jnp.where(jnp.isfinite(left), (decay * left).astype(before.dtype), before)

        left = map(cut_off, layout.of(clipped), sums, carried)
        return clipped, CarryState(layout.replaced(state.carried, left), clip_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _within(total: Array, like: Any) -> Array:
    """A finite sum, cut to what the dtype of `like` can hold; only float16 can hold less than a gradient and its rest."""
    most = float(jnp.finfo(jnp.result_type(like)).max)
    return total if jnp.iscomplexobj(total) else jnp.where(jnp.isfinite(total), jnp.clip(total, -most, most), total)
