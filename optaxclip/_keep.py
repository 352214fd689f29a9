"""Limits the weights after a step instead of the step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from optaxclip import _validate, scopes
from optaxclip._layout import lay_out
from optaxclip._numerics import cast_like, widen
from optaxclip._transform import as_transform, of_weights, transform


def keep_params(clip: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    r"""Clips the weights after the step instead of the step.

    .. math:: p' = p + u, \qquad u' = \mathrm{clip}(p') - p

    Put it last in a chain, after the learning rate, so that it sees the step that will be taken.
    Where the clip changes nothing, :math:`u' = u` bit for bit.

    | you want | write |
    |---|---|
    | each unit's weights within a norm (Keras `MaxNorm`, H2O `max_w2`) | `max_norm(2.0)` |
    | weights of at least 0 (Keras `NonNeg`) | `keep_params(clip_by_value(0.0, jnp.inf))` |
    | weights in a box (WGAN) | `keep_params(clip_by_value(0.01))` |
    | a Lipschitz constant of each layer | `keep_params(spectral_clip(1.0))` |
    | the norm of the step before (AdamH) | `relative_to_params(1.0, floor=0.0)` and `normalize` |

    The clip gets the weights :math:`p'` in the place of updates, and the old weights :math:`p` as
    parameters. So its reading tells the sizes of :math:`p'`, and `thresholds.relative_to_params` is
    relative to :math:`p`. With `clip_by_value(low, high)` zero need not be between the bounds.

    Post-condition: `optax.apply_updates(p, u')` is within the limit times `1 + d`, with d by the
    dtype of the parameters, as for `clip`. It needs updates of at least that precision. Weights
    that were far outside the limit can end up inside by a rounding of the old weights.

    Known failure: the optimizer does not know of the limit. Its momentum goes on to push outward
    after the weights have reached it, and delays the way back. Weights that are not finite follow
    the clip's `nonfinite`; `"zero"` would set all weights of a group to zero. Wrap the whole chain
    in `skip_nonfinite` instead.

    Args:
        clip: any clip, a chain of clips, or any object with `init` and `update`.

    Returns:
        A transform with the state of `clip`. `update` needs the parameters, and hands extra
        arguments on to the clip.

    Raises:
        TypeError: `clip` is not a transform.
        ValueError: on `update`: the parameters are missing.

    Example:
        >>> import jax.numpy as jnp, optax, optaxclip
        >>> keep = optaxclip.keep_params(optaxclip.clip_by_norm(5.0))
        >>> optimizer = optax.chain(optax.sgd(1.0), keep)
        >>> params = jnp.array([3.0, 3.0])
        >>> state = optimizer.init(params)
        >>> updates, state = optimizer.update(jnp.array([-3.0, -5.0]), state, params)
        >>> print(updates, optax.apply_updates(params, updates))
        [0. 1.] [3. 4.]
        >>> state[-1].reading.size_before
        Array([10.], dtype=float32)

    References:
        Srivastava et al., [Dropout](https://jmlr.org/papers/v15/srivastava14a.html), 2014, for
        max-norm; Arjovsky, Chintala and Bottou, [Wasserstein
        GAN](https://arxiv.org/abs/1701.07875), 2017, for the box.
    """
    inner = as_transform("clip", clip)

    def init(params: Any) -> Any:
        with of_weights():
            return inner.init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        _validate.params_given(params, "keep_params limits the weights after the step")
        layout = lay_out(scopes.leaf(), updates, params)
        before = layout.matching(params)
        after = list(map(_after, before, layout.gradients))
        with of_weights():
            clipped, state = inner.update(layout.rebuild(after), state, params, **extra_args)
        leaves = zip(before, after, layout.of(clipped), layout.gradients, strict=True)
        return layout.rebuild([_step(*leaf) for leaf in leaves]), state

    return transform(init, update)


def around(
    point: float, clip: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Clips the distance of each number from a point; what the clip leaves keeps its bits."""
    inner = optax.with_extra_args_support(clip)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        layout = lay_out(scopes.leaf(), updates, params)
        distances = [widen(x) - point for x in layout.gradients]
        clipped, state = inner.update(layout.rebuild(distances), state, params, **extra_args)
        leaves = zip(layout.gradients, distances, layout.of(clipped), strict=True)

        def moved(x: Any, distance: Array, kept: Any) -> Array:
            new = distance if kept is None else kept
            return jnp.where(new == distance, x, cast_like(new + point, x))

        return layout.rebuild([moved(*leaf) for leaf in leaves]), state

    return transform(inner.init, update)


def _after(param: Any, update: Any) -> Array:
    """Returns the parameter after the step, as `optax.apply_updates` makes it."""
    return cast_like(widen(param) + widen(update), param)


def _step(param: Any, after: Array, clipped: Any, update: Any) -> Array:
    """Returns the step from the parameter to its clipped value, in the dtype of the update.

    If the clip changed nothing, it is the update.
    """
    if clipped is None or not jnp.issubdtype(after.dtype, jnp.inexact):
        return jnp.asarray(update)
    step = cast_like(widen(clipped) - widen(param), update)
    if not jnp.iscomplexobj(after) and not jnp.iscomplexobj(step):
        step = _as_far(step, param, after, clipped)
    return jnp.where(clipped == after, jnp.asarray(update), step)


def _as_far(step: Array, param: Any, after: Array, clipped: Array) -> Array:
    """Returns the step, longer by one rounding where it ends short of the clipped value.

    A parameter of 3 has no neighbors in bfloat16 that are 0.01 - 3 away from it: the nearest step
    leaves 0.0156, above a limit of 0.01. The next one leaves 0.
    """
    landed = jax.lax.stop_gradient(widen(_after(param, step)) - widen(clipped))
    inward = jax.lax.stop_gradient(jnp.sign(widen(clipped) - widen(after)))
    most = jnp.asarray(jnp.finfo(step.dtype).max, step.dtype)  # not every dtype has infinity
    towards = jnp.where(inward > 0, most, -most)
    further = jax.lax.nextafter(jax.lax.stop_gradient(step), towards)
    short = (landed * inward < 0) & jnp.isfinite(further)
    return jnp.where(short, further, step)
