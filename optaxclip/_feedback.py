"""Error feedback: remembers the part that a clip cuts off."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from optaxclip import _validate, scopes
from optaxclip._layout import lay_out
from optaxclip._numerics import cast_like, wide, widen
from optaxclip._rules import is_placeholder
from optaxclip._transform import transform

MODES = ("residual", "estimate")


class ErrorFeedbackState(NamedTuple):
    """State of `error_feedback`.

    Attributes:
        memory: a tree like the parameters, in float32 or wider: the residual, or the estimate of
            the gradient. It has a zero for each leaf without floats.
        clip: state of the wrapped clip.
    """

    memory: Any
    clip: Any


def error_feedback(
    clip: optax.GradientTransformation,
    *,
    mode: Literal["residual", "estimate"] = "residual",
    decay: ArrayLike = 1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the part that a clip cuts off to later gradients, so clipping delays but does not bias.

    With `mode="residual"` (U-Clip) the residual :math:`d` is added to the next gradient:

    .. math:: u_t = \mathrm{clip}(g_t + d_t), \qquad d_{t+1} = \beta (g_t + d_t - u_t)

    Law, for :math:`\beta = 1`: the sum of all updates plus :math:`d` is the sum of all gradients.

    With `mode="estimate"` (Clip21) the clip limits the distance to an estimate :math:`h` of the
    gradient:

    .. math:: u_t = h_{t+1} = h_t + \mathrm{clip}(g_t - h_t)

    Law: the update reaches a constant gradient after about :math:`\|g\| / c` steps.

    Put it first in a chain. The state is one buffer as large as the parameters. Where a sum is not
    finite, the buffer keeps its old value. Known failure of `"residual"`: while gradients exceed
    the limit on average, the buffer grows without bound; a `decay` below 1 bounds it.

    Args:
        clip: any clip, or a chain of clips.
        mode: `"residual"` or `"estimate"`.
        decay: :math:`\beta`, the share of the residual to keep, from 0 (the clip alone) to 1.

    Raises:
        TypeError: `clip` is not a transform, or `decay` is not a number.
        ValueError: `mode` is another word, `decay` is not between 0 and 1, or `decay` is given with
            `mode="estimate"`.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> for mode in "residual", "estimate":
        ...     clip = optaxclip.error_feedback(optaxclip.clip_by_value(1.0), mode=mode)
        ...     state = clip.init(jnp.zeros(1))
        ...     for gradient in 2.5, 0.0, 0.0, 0.0:
        ...         updates, state = clip.update(jnp.array([gradient]), state)
        ...         print(updates, end=" ")
        [1.] [1.] [0.5] [0.] [1.] [0.] [0.] [0.]

    References:
        Elesedy and Hutter, [U-Clip: on-average unbiased stochastic gradient
        clipping](https://arxiv.org/abs/2302.02971), 2023; Khirirat et al., [Clip21: error feedback
        for gradient clipping](https://arxiv.org/abs/2305.18929), 2023.
    """
    _validate.part("clip", clip, optax.GradientTransformation, "optaxclip.clip_by_value(1.0)")
    _validate.option("mode", mode, MODES)
    _validate.number("decay", decay, high=1.0)
    _validate.only_with("decay", decay, 1.0, 'mode="residual"', mode == "residual")
    inner = optax.with_extra_args_support(clip)
    sign = 1 if mode == "residual" else -1  # the clip sees g + d, or g - h

    def init(params: Any) -> ErrorFeedbackState:
        if is_placeholder(params):
            return ErrorFeedbackState(params, inner.init(params))
        layout = lay_out(scopes.leaf(), params)
        zeros = layout.filled(jnp.zeros_like(g, wide(g)) for g in layout.gradients)
        return ErrorFeedbackState(zeros, inner.init(params))

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ErrorFeedbackState]:
        if state is None:  # one step outside of any loop
            state = init(updates if params is None else params)
        _validate.state(state, ErrorFeedbackState)
        layout = lay_out(scopes.leaf(), updates, params)
        _validate.state_tree(layout.treedef, state.memory)
        memory = layout.of(state.memory)
        sums = [widen(g) + sign * m for g, m in zip(layout.gradients, memory, strict=True)]
        seen = layout.rebuild(map(_seen, layout.gradients, memory, sums))
        clipped, clip_state = inner.update(seen, state.clip, params, **extra_args)

        def remembered(kept: Array | None, total: Array, before: Array) -> Array:
            step = jnp.zeros_like(total) if kept is None else widen(kept)
            after = decay * (total - step) if mode == "residual" else before + step
            return jnp.where(jnp.isfinite(after), after.astype(before.dtype), before)

        new = list(map(remembered, layout.of(clipped), sums, memory))
        if mode == "estimate":
            clipped = layout.rebuild(map(_estimate, layout.of(clipped), new, layout.gradients))
        return clipped, ErrorFeedbackState(layout.replaced(state.memory, new), clip_state)

    return transform(init, update)


def _seen(gradient: Any, memory: Array, total: Array) -> Array:
    """Returns the input of the clip, in the gradient's dtype."""
    # where the memory is 0 take the gradient itself: -0. + 0. has other bits than -0.
    wide = jnp.where(memory == 0, widen(gradient), _within(total, gradient))
    return cast_like(wide, gradient)


def _estimate(step: Array | None, after: Array, gradient: Any) -> Array:
    """Returns the estimate in the gradient's dtype; NaN where the clip returned NaN or infinity."""
    after = cast_like(_within(after, gradient), gradient)
    if step is None:
        return after
    return jnp.where(jnp.isfinite(step), after, jnp.asarray(jnp.nan, after.dtype))


def _within(total: Array, like: Any) -> Array:
    """Clips a finite sum to the range of the dtype of `like`.

    A gradient plus its residual can leave the range of float16.
    """
    if jnp.iscomplexobj(total):
        return total
    most = float(jnp.finfo(jnp.result_type(like)).max)
    return jnp.where(jnp.isfinite(total), jnp.clip(total, -most, most), total)
