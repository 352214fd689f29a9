"""Clipping inside the backward pass: limits a cotangent before it is summed with others."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jax import Array
from jax.typing import ArrayLike

from optaxclip import _validate, norms, responses, scopes
from optaxclip._clip import clip
from optaxclip._layout import lay_out
from optaxclip._probe import Probe, seen
from optaxclip._types import Norm, Response, Scope, Threshold


@_validate.checks_keywords
def clip_cotangent(
    x: Any,
    threshold: Any,
    *,
    norm: Norm = norms.l2(),
    scope: Scope = scopes.tree(),
    response: Response = responses.rescale,
    sharded_over: Any = None,
    probe: Probe | None = None,
) -> Any:
    r"""Returns `x` unchanged; the backward pass clips the derivative with respect to it.

    .. math:: y = x, \qquad \partial L / \partial x := \mathrm{clip}(\partial L / \partial y)

    The clip is one step of `optaxclip.clip` with these four parts. As there, a size that is not
    finite makes its group NaN. It bounds the cotangent that is passed further back. It does not
    bound parameter gradients: in a recurrent network those are sums over time of cotangents that
    were each clipped. If the loss is a mean over a batch, each example's cotangent is smaller by
    the batch size; scale the threshold accordingly.

    | one size for | pass |
    |---|---|
    | all of `x` | nothing more |
    | each element, as Graves does | `scope=scopes.element(), response=responses.clamp` |
    | each leaf of each example (batch axis first) | `scope=scopes.leaf(batch_axes=0)` |
    | each example, all leaves together | `jax.vmap(lambda x: clip_cotangent(x, threshold))(x)` |

    In `jax.shard_map`, a value that varies over devices is treated as sharded over them, as in
    `clip`. If the devices hold different examples instead, pass `sharded_over=()`.

    Under `jax.vmap`, each example's cotangent is measured separately. If `x` is not batched, its
    cotangent is summed over the batch before it is clipped. Second derivatives differentiate the
    clipped backward pass, with respect to the threshold too; `jax.hessian` works. Forward mode
    alone (`jax.jvp`) raises an error in JAX.

    Args:
        x: any pytree; leaves that are not floats pass through.
        threshold: how large a size may be: a number, traced or not; a rule that remembers nothing,
            such as `thresholds.ranked`; or a dict from group name to these. Schedules and rules
            that learn are refused, because a backward pass has neither steps nor memory.
        norm: which norm.
        scope: which numbers share one size.
        response: what to do with a group whose size exceeds its limit.
        sharded_over: as for `clip`.
        probe: from `telemetry.probe()`; the derivative with respect to it is what this clip
            measured and did.

    Raises:
        TypeError: an argument has the wrong type, such as a schedule, or the norm is relative to
            parameters.
        ValueError: a threshold is negative, NaN or more than one number, or the keys of a dict are
            not the groups of `x`.

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
    numbers, with_rules = _parted(threshold)
    if probe is not None:
        _validate.part("probe", probe, Probe, "telemetry.probe()")

    def clipper(numbers: Any) -> optax.GradientTransformationExtraArgs:
        parts: dict[str, Any] = {"norm": norm, "response": response, "sharded_over": sharded_over}
        return clip(with_rules(numbers), scope, **parts, record=probe is not None)

    clipper(numbers)  # raises its errors here instead of in the backward pass
    _validate.absolute("norm", norm)
    if isinstance(threshold, Mapping):
        _validate.names(threshold, lay_out(scope, x).names)
    return _identity(clipper, x, jax.tree.map(lambda limit: 1.0 * limit, numbers), probe)


def _parted(threshold: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The numbers of a threshold, which may be traced, and what puts them among its rules again."""
    if isinstance(threshold, Mapping):
        rules = {name: rule for name, rule in threshold.items() if isinstance(rule, Threshold)}
        numbers = {name: limit for name, limit in threshold.items() if name not in rules}
    else:
        rules = {"": threshold} if isinstance(threshold, Threshold) else {}
        numbers = None if rules else threshold
    _validate.no_functions("threshold", numbers)
    for rule in rules.values():
        _validate.in_backward_pass("threshold", rule)
    if isinstance(threshold, Mapping):
        return numbers, lambda numbers: {**numbers, **rules}
    return numbers, lambda numbers: rules.get("", numbers)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _identity(clipper: Callable[..., Any], x: Any, threshold: Any, probe: Probe | None) -> Any:
    return x


def _forward(
    clipper: Callable[..., Any], x: Any, threshold: Any, probe: Probe | None
) -> tuple[Any, tuple[Any, Probe | None]]:
    return x, (threshold, probe)


def _backward(
    clipper: Callable[..., Any], kept: tuple[Any, Probe | None], cotangent: Any
) -> tuple[Any, None, Probe | None]:
    threshold, probe = kept
    clipped, state = clipper(threshold).update(cotangent, None)
    # the value does not depend on the threshold, so the derivative with respect to it is zero
    return clipped, None, probe and seen(state.reading, probe)


# The threshold is an argument of the backward pass, not a constant: so it may be traced, and second
# derivatives with respect to it exist.
_identity.defvjp(_forward, _backward)


def clip_activation_grad(
    activation: Callable[[Array], Array], limit: ArrayLike
) -> Callable[[Array], Array]:
    r"""Wraps an activation function so that the gradient of its input is clipped by value.

    .. math:: y = f(z), \qquad
        \partial L / \partial z := \mathrm{clip}(f'(z)\, \partial L / \partial y, -c, c)

    In Flax's LSTM, `gate_fn=clip_activation_grad(nn.sigmoid, 10.0)` and the same for
    `activation_fn` clip at the inputs of the four gates at every time step. Graves (2013) does so
    with 10 for handwriting and 1 for text. Flax also applies `activation_fn` to the new cell state
    for the output, so the gradient through the output is clipped too. The gradient from the next
    cell state is not.

    Args:
        activation: :math:`f`, a function of one array.
        limit: :math:`c`, a number.

    Returns:
        A function that compares equal if it was made of equal arguments. Flax compares modules, and
        recompiles for one that differs.

    Raises:
        TypeError: `activation` is not a function, or `limit` is not a number.
        ValueError: `limit` is negative, NaN or more than one number.

    Example:
        >>> import jax, jax.numpy as jnp, optaxclip
        >>> relu = optaxclip.clip_activation_grad(jax.nn.relu, 5.0)
        >>> jax.grad(lambda z: jnp.sum(8 * relu(z)))(jnp.array([-1.0, 1.0]))
        Array([0., 5.], dtype=float32)
    """
    _validate.function("activation", activation, "jax.nn.tanh")
    _validate.number("limit", limit)
    return _Clipped(activation, limit)


class _Clipped:
    """The result of `clip_activation_grad`: a class, because two closures never compare equal."""

    def __init__(self, activation: Callable[[Array], Array], limit: ArrayLike) -> None:
        functools.update_wrapper(self, activation, updated=())
        self.parts = activation, limit

    def __call__(self, z: Array) -> Array:
        activation, limit = self.parts
        z = clip_cotangent(z, limit, scope=scopes.element(), response=responses.clamp)
        return activation(z)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Clipped) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(self.parts)
