r"""What is done to what is larger: `rescale clamp smooth drop normalize band power automatic psac`.

A response is a function `(gradient, size, limit) -> gradient` on one leaf, where size and
limit are scalars or broadcast against it, in float32 or wider. All but `clamp` keep the
direction of the gradient, so one line says it all: the size after clipping.

Laws, for each response here: a zero gradient stays zero; `limit = inf` changes nothing;
what is not changed comes back bit for bit; derivatives are finite. `rescale clamp smooth
drop` never enlarge.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from optaxclip import _validate
from optaxclip._lowering import traced_once
from optaxclip._naming import shown
from optaxclip._numerics import factors, multiply

__all__ = [
    "rescale",
    "clamp",
    "smooth",
    "drop",
    "normalize",
    "band",
    "power",
    "automatic",
    "psac",
    "from_target",
]


def __dir__() -> list[str]:
    return __all__


class FromTarget:
    """A response that keeps the direction of the gradient, and so is known by the size after it.

    Attributes:
        target: `(size, limit, **options) -> size after clipping`; zeros stay zeros.
    """

    def __init__(self, target: Callable[..., Array]):
        size, limit, *options = inspect.signature(target).parameters.values()
        parameters = [size.replace(name="gradient"), size, limit, *options]
        self.__signature__ = inspect.Signature(parameters, return_annotation=Array)
        self.__name__, self.__doc__ = target.__name__, target.__doc__
        self._target = target

    def __call__(self, gradient: Array, size: Array, limit: Array, **options: Any) -> Array:
        """The gradient, shrunk or enlarged."""
        return multiply(gradient, *factors(size, self.target(size, limit, **options)))

    def target(self, size: Array, limit: Array, **options: Any) -> Array:
        """The size after clipping."""
        return jnp.where(size > 0, self._target(size, limit, **options), size)

    def __repr__(self) -> str:
        return f"responses.{self.__name__}"


def from_target(target: Callable[..., Array]) -> FromTarget:
    """Makes a response that scales a gradient to the size `target(size, limit)`.

    Zeros stay zeros. The engine asks such a response for its `target`: then it does the scalar work
    for all groups at once, and what remains for each leaf is to multiply.

    Args:
        target: `(size, limit) -> size after clipping`, of arrays of sizes.

    Example:
        >>> import jax.numpy as jnp
        >>> from optaxclip import responses
        >>> mean = lambda size, limit: jnp.minimum(size, (size + limit) / 2)
        >>> softer = responses.from_target(mean)
        >>> softer(jnp.array([3.0, 4.0]), jnp.array(5.0), jnp.array(1.0))
        Array([1.8000001, 2.4      ], dtype=float32)
    """
    return FromTarget(target)


@from_target
def rescale(size: Array, limit: Array) -> Array:
    r"""Shrinks to the limit, :math:`g \min(1, c / s)`: the classic response.

    Example:
        >>> import jax.numpy as jnp
        >>> from optaxclip import responses
        >>> responses.rescale(jnp.array([3.0, 4.0]), jnp.array(5.0), jnp.array(1.0))
        Array([0.6, 0.8], dtype=float32)
    """
    return jnp.minimum(size, limit)


@traced_once()
def clamp(gradient: Array, size: Array, limit: Array) -> Array:
    r"""Cuts each element at the limit, :math:`\mathrm{sign}(g) \min(|g|, c)`, if the size is above.

    With element scope this is clipping by value. With larger scopes it bounds the `linf` norm. It
    does not bound other norms, so `clip` refuses it with them.
    """
    if jnp.iscomplexobj(gradient):
        magnitude = jnp.abs(gradient)
        cut = rescale(gradient, magnitude, jnp.asarray(limit, magnitude.dtype))
        return jnp.where(size > limit, cut, gradient)
    return jnp.where(size > limit, jnp.clip(gradient, -limit, limit), gradient)


@from_target
def smooth(size: Array, limit: Array) -> Array:
    r"""Approaches the limit and never reaches it, :math:`g / \sqrt{1 + (s / c)^2}`.

    Every gradient is changed a little; one at its limit shrinks to 0.71 of it.
    """
    smaller, larger = jnp.minimum(size, limit), jnp.maximum(size, limit)
    # a ratio of at most 1: no overflow
    return smaller / jnp.sqrt(1 + (smaller / jnp.where(larger > 0, larger, 1)) ** 2)


@from_target
def drop(size: Array, limit: Array) -> Array:
    """Drops what is above the limit: zeros instead of a smaller gradient."""
    return jnp.where(size > limit, 0, size)


@from_target
def normalize(size: Array, limit: Array) -> Array:
    r"""Sets the size to the limit, from above and from below, :math:`g\, c / s`."""
    return jnp.where(limit < jnp.inf, limit, size)


@from_target
def band(size: Array, limit: Array, *, low: float = 0.5) -> Array:
    r"""Keeps the size within a band, :math:`g\, \mathrm{clip}(s, \ell c, c) / s`.

    The lower end is a share `low` of the limit.
    """
    return jnp.where(limit < jnp.inf, jnp.clip(size, low * limit, limit), size)


def power(e: ArrayLike) -> FromTarget:
    r"""Makes the response that shrinks what is above the limit by a power, :math:`g\, (c / s)^e`.

    What is within the limit keeps its bits. `power(1)` is `rescale`. An `e` below 1 leaves a size
    between its limit and what it was; an `e` above 1 makes it smaller than the limit, the more the
    larger it was.

    Args:
        e: the exponent, at least 0.

    Raises:
        TypeError: `e` is not a number.
        ValueError: `e` is negative or NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> from optaxclip import responses
        >>> for e in 0.5, 1.0, 2.0:
        ...     print(responses.power(e)(jnp.array([16.0]), jnp.array(16.0), jnp.array(1.0)))
        [4.]
        [1.]
        [0.0625]
    """
    _validate.number("e", e)

    def target(size: Array, limit: Array) -> Array:
        over = (size > limit) & (limit > 0)
        s, c = jnp.where(over, size, 1), jnp.where(over, limit, 1)
        # s (c / s)^e, or c (c / s)^(e - 1); by roots, because c / s itself may be flushed to 0
        less = jnp.asarray(e) < 1
        root = (jnp.sqrt(c) / jnp.sqrt(s)) ** jnp.where(less, e, e - 1)
        shrunk = jnp.where(less, s, c) * root * root
        gone = jnp.where(jnp.asarray(e) > 0, 0, size)
        return jnp.where(over, jnp.minimum(shrunk, size), jnp.where(size > limit, gone, size))

    response = from_target(target)
    response.__name__, response.__doc__ = f"power({shown(e)})", power.__doc__
    return response


@from_target
def automatic(size: Array, limit: Array, *, gamma: float = 0.01) -> Array:
    r"""AUTO-S: gives all gradients almost the same size, :math:`g\, c / (s + \gamma)`.

    So the limit is only a scale. Small gradients are enlarged, up to :math:`c / \gamma` times, and
    gradients below the limit change too.

    References:
        Bu et al., [Automatic clipping](https://arxiv.org/abs/2206.07136), 2022.
    """
    return _scaled(size / (size + gamma), size, limit)


@from_target
def psac(size: Array, limit: Array, *, r: float = 0.1) -> Array:
    r"""PSAC: enlarges small gradients less than `automatic`, :math:`g\, c / (s + r / (s + r))`.

    References:
        Xia et al., [Differentially private learning with per-sample adaptive
        clipping](https://arxiv.org/abs/2212.00328), 2022.
    """
    return _scaled(size / (size + r / (size + r)), size, limit)


def _scaled(share: Array, size: Array, limit: Array) -> Array:
    """A share of the limit; the size where there is no limit."""
    finite = limit < jnp.inf
    return jnp.where(finite, share * jnp.where(finite, limit, 0), size)
