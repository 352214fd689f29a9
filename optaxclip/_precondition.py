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
    """Clips the updates of `inner` by the sizes of `measured(gradients, new state of inner)`.

    `inner` sees only the floats; all other leaves are passed through.
    """

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
        steps, inner_state = inner.update(gradients, state.inner, weights)
        # Adam's mean takes the dtype of the gradients; a state must keep the dtypes that it has.
        inner_state = jax.tree.map(cast_like, inner_state, state.inner)
        steps = layout.rebuild(layout.of(steps))
        clipped, clip_state = clip.update(
            steps, state.clip, params, measured=measured(gradients, inner_state)
        )
        parts = zip(layout.of(clipped), layout.gradients, strict=True)
        out = [cast_like(like if x is None else x, like) for x, like in parts]
        return layout.rebuild(out), PreconditionedState(inner_state, clip_state)

    return transform(init, update)
