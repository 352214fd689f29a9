"""Clipping inside the backward pass: what flows back through a value is limited there, not when all
is summed up.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import Array
from jax.typing import ArrayLike

from optaxclip import _validate, norms, responses, scopes
from optaxclip._clip import clip
from optaxclip._layout import lay_out
from optaxclip._types import Norm, Response, Scope


@_validate.checks_keywords
def clip_cotangent(
    x: Any,
    threshold: Any,
    *,
    norm: Norm = norms.l2(),
    scope: Scope = scopes.tree(),
    response: Response = responses.rescale,
    sharded_over: Any = None,
) -> Any:
    r"""Returns `x` as it is; in the backward pass, clips the derivative with respect to it.

    .. math:: y = x, \qquad \partial L / \partial x := \mathrm{clip}(\partial L / \partial y)

    Here clip is one step of `optaxclip.clip` of these four parts, and what is not finite makes its
    group NaN, as there. It bounds what is computed from it further back, but no parameter's
    gradient: in a recurrent network that is a sum over time of what was clipped at each step. If
    the loss is a mean over a batch, each example's derivative is that much smaller.

    | one size for | say |
    |---|---|
    | all of `x` | no more |
    | every element, as Graves does | `scope=scopes.element(), response=responses.clamp` |
    | each leaf of each example of a batch in front | `scope=scopes.leaf(batch_axes=0)` |
    | each example, all its leaves together | `jax.vmap(lambda x: clip_cotangent(x, threshold))(x)` |

    In `jax.shard_map` what differs between devices counts as split over them, as in `clip`; where
    it is examples that do, say `sharded_over=()`.

    So a size under `jax.vmap` is that of one example; where `x` is the same for all, of what they
    sum up to. Second derivatives are those of the clipped backward pass, also by the threshold, and
    `jax.hessian` finds them; only forward mode by itself (`jax.jvp`) is an error from JAX.

    Args:
        x: any pytree; leaves that are no floats pass.
        threshold: how large a size may be: a number, traced or not, or a dict from group name to
            numbers. No schedule and no rule, because a backward pass has neither steps nor memory.
        norm: how large they are.
        scope: which numbers share one size.
        response: what happens to what is larger.
        sharded_over: as for `clip`.

    Raises:
        TypeError: an argument is not what it should be, such as a schedule, or a norm relative to
            parameters.
        ValueError: a threshold is negative, NaN or several numbers, or a dict does not name the
            groups of `x`.

    Example:
        >>> import jax, jax.numpy as jnp, optaxclip
        >>> def loss(x):
        ...     return jnp.sum(jnp.array([3.0, 4.0]) * optaxclip.clip_cotangent(x, 1.0))
        >>> jax.value_and_grad(loss)(jnp.ones(2))
        (Array(7., dtype=float32), Array([0.6, 0.8], dtype=float32))

    References:
        Graves, [Generating sequences with recurrent neural
        networks](https://arxiv.org/abs/1308.0850), 2013.
    """
    limits = dict(threshold) if isinstance(threshold, Mapping) else threshold
    _validate.no_functions("threshold", limits)
    clipper = functools.partial(
        clip, norm=norm, scope=scope, response=response, sharded_over=sharded_over, record=False
    )
    clipper(limits)  # what it refuses is refused here, and not in the backward pass
    _validate.absolute("norm", norm)
    if isinstance(limits, dict):
        _validate.names(limits, lay_out(scope, x).names)
    return _identity(clipper, x, jax.tree.map(lambda limit: 1.0 * limit, limits))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _identity(clipper: Callable[..., Any], x: Any, threshold: Any) -> Any:
    return x


def _backward(clipper: Callable[..., Any], threshold: Any, cotangent: Any) -> tuple[Any, None]:
    # the value does not depend on the threshold
    return clipper(threshold).update(cotangent, None)[0], None


# The threshold is kept for the backward pass as an argument, so that it may be traced, and has a
# derivative of its own.
_identity.defvjp(lambda clipper, x, threshold: (x, threshold), _backward)


def clip_activation_grad(
    activation: Callable[[Array], Array], limit: ArrayLike
) -> Callable[[Array], Array]:
    r"""The activation function :math:`f`, with the derivative by its input clipped to :math:`[-c,
    c]` at each element.

    .. math:: y = f(z), \qquad \partial L / \partial z := \mathrm{clip}(f'(z)\, \partial L / \partial y, -c, c)

    In Flax's LSTM, `gate_fn=clip_activation_grad(nn.sigmoid, 10.0)` and the same for
    `activation_fn` clip it at the inputs of the four gates at every time step, as Graves (2013)
    does with 10 for handwriting and 1 for text. Since `activation_fn` is also what the new cell
    state goes through on its way out, the derivative that comes back by this way is clipped, too;
    the one that comes back from the next cell state is not.

    Args:
        activation: :math:`f`, a function of one array.
        limit: :math:`c`, a number.

    Returns:
        A function that equals those made of equal arguments: Flax compares modules, and compiles
        anew for one that differs.

    Raises:
        TypeError: `activation` is not a function, or `limit` not a number.
        ValueError: `limit` is negative, NaN or several numbers.

    Example:
        >>> import jax, jax.numpy as jnp, optaxclip
        >>> jax.grad(lambda z: jnp.sum(8 * optaxclip.clip_activation_grad(jax.nn.relu, 5.0)(z)))(jnp.array([-1.0, 1.0]))
        Array([0., 5.], dtype=float32)
    """
    _validate.function("activation", activation, "jax.nn.tanh")
    _validate.number("limit", limit)
    return _Clipped(activation, limit)


class _Clipped:
    """What `clip_activation_grad` returns: no closure, because two closures are never equal."""

    def __init__(self, activation: Callable[[Array], Array], limit: ArrayLike) -> None:
        functools.update_wrapper(self, activation, updated=())
        self.parts = activation, limit

    def __call__(self, z: Array) -> Array:
        activation, limit = self.parts
        return activation(
            clip_cotangent(z, limit, scope=scopes.element(), response=responses.clamp)
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Clipped) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(self.parts)
