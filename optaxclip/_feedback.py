"""Error feedback around a clip: what is cut off today is not lost."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from optaxclip import _validate, scopes
from optaxclip._layout import lay_out
from optaxclip._numerics import cast_like, wide, widen
from optaxclip._rules import is_placeholder

MODES = ("residual", "estimate")


class ErrorFeedbackState(NamedTuple):
    """State of `error_feedback`.

    Attributes:
        memory: a tree like the parameters, in float32 or wider: what was cut off so far, or the
            estimate of the gradient. It has a zero for each leaf that holds no floats.
        clip: state of the clip inside.
    """

    memory: Any
    clip: Any


def error_feedback(
    clip: optax.GradientTransformation,
    *,
    mode: Literal["residual", "estimate"] = "residual",
    decay: ArrayLike = 1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Gives back later what a clip cuts off now, so that clipping delays gradients and does not
    bias them.

    With `mode="residual"` (U-Clip) the cut-off part :math:`d` is added to the next gradient:

    .. math:: u_t = \mathrm{clip}(g_t + d_t), \qquad d_{t+1} = \beta (g_t + d_t - u_t)

    Law, for :math:`\beta = 1`: all updates so far and :math:`d` add up to all gradients so far.

    With `mode="estimate"` (Clip21) the clip acts on the distance to an estimate :math:`h` of the
    gradient:

    .. math:: u_t = h_{t+1} = h_t + \mathrm{clip}(g_t - h_t)

    Law: for a constant gradient the update reaches it, after about :math:`\|g\| / c` steps.

    The state is one buffer as large as the parameters. Put it first in a chain. Where a sum is not
    finite, the buffer keeps its old value. Known failure of `"residual"`: the buffer grows without
    bound while the gradients are larger than the limit on average; a `decay` below 1 bounds it.

    Args:
        clip: any clip, or chain of them.
        mode: `"residual"` or `"estimate"`.
        decay: :math:`\beta`, the share of the residual that is kept, from 0 (the clip alone) to 1.

    Raises:
        TypeError: `clip` is not a transform, or `decay` not a number.
        ValueError: `mode` is another word, `decay` is not between 0 and 1, or is given with
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
        nothing = layout.filled(
            jnp.zeros_like(gradient, wide(gradient)) for gradient in layout.gradients
        )
        return ErrorFeedbackState(nothing, inner.init(params))

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
        # The sum with a zero is not always the same bits.
        parts = zip(layout.gradients, memory, sums, strict=True)
        narrow = [
            cast_like(jnp.where(m == 0, widen(g), _within(total, g)), g) for g, m, total in parts
        ]
        clipped, clip_state = inner.update(layout.rebuild(narrow), state.clip, params, **extra_args)

        def remembered(kept: Array | None, total: Array, before: Array) -> Array:
            step = jnp.zeros_like(total) if kept is None else widen(kept)
            after = decay * (total - step) if mode == "residual" else before + step
            return jnp.where(jnp.isfinite(after), after.astype(before.dtype), before)

        new = list(map(remembered, layout.of(clipped), sums, memory))
        if mode == "estimate":
            kept = zip(layout.of(clipped), new, layout.gradients, strict=True)
            clipped = layout.rebuild(
                [_estimate(step, after, gradient) for step, after, gradient in kept]
            )
        return clipped, ErrorFeedbackState(layout.replaced(state.memory, new), clip_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _estimate(step: Array | None, after: Array, gradient: Any) -> Array:
    """The estimate in the gradient's dtype; NaN where the clip let something through that is not
    finite.
    """
    after = cast_like(_within(after, gradient), gradient)
    return (
        after
        if step is None
        else jnp.where(jnp.isfinite(step), after, jnp.asarray(jnp.nan, after.dtype))
    )


def _within(total: Array, like: Any) -> Array:
    """A finite sum, cut to what the dtype of `like` can hold; only float16 can hold less than a
    gradient and its rest.
    """
    most = float(jnp.finfo(jnp.result_type(like)).max)
    return (
        total
        if jnp.iscomplexobj(total)
        else jnp.where(jnp.isfinite(total), jnp.clip(total, -most, most), total)
    )
