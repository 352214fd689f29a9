"""What a clip inside the backward pass saw, as the derivative with respect to a probe."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from optaxclip import _sharding
from optaxclip._record import summary
from optaxclip._types import Reading


class Probe(NamedTuple):
    """Four zeros to differentiate by: the derivative holds sums over all uses of a clip.

    A backward pass has no state that could remember. But it returns derivatives, and adds them up
    over the steps of a `scan`, the examples of a `vmap` and the devices of a `shard_map`.

    Attributes:
        size_before: largest size before clipping.
        size_after: size of the same group after clipping.
        clipped_share: share of the groups over their limit.
        uses: how often the backward pass went through the clip.
    """

    size_before: Array
    size_after: Array
    clipped_share: Array
    uses: Array


def probe() -> Probe:
    """Returns a probe for `clip_cotangent(..., probe=...)`.

    Its derivative is what the clip measured, summed over all uses; `probed` turns the sums into
    means. One probe may serve many clips, which are then counted together.

    Example:
        >>> import jax, jax.numpy as jnp, optaxclip
        >>> from optaxclip import telemetry
        >>> def loss(w, probe):
        ...     h = jnp.ones(2)
        ...     for _ in range(3):
        ...         h = optaxclip.clip_cotangent(w * h, 4.0, probe=probe)
        ...     return jnp.sum(h)
        >>> derivatives = jax.grad(loss, argnums=(0, 1))(2.0, telemetry.probe())
        >>> for key, number in telemetry.probed(derivatives[1]).items():
        ...     print(key, round(float(number), 2))
        probe/size_before 3.3
        probe/size_after 2.75
        probe/clipped_share 0.33
        probe/uses 3.0
    """
    return Probe(*[jnp.zeros((), jnp.float32)] * 4)


def probed(derivative: Probe, prefix: str = "probe") -> dict[str, Array]:
    """Returns what a clip saw, from the derivative of the loss with respect to its probe.

    The loss may be scaled, and derivatives averaged over batches or devices: the means stay right.

    Args:
        derivative: with respect to `telemetry.probe()`.
        prefix: what the keys begin with.

    Returns:
        `probe/size_before`, `probe/size_after` and `probe/clipped_share`, means over all uses, and
        `probe/uses`, their number. The means are NaN if the backward pass never used the clip.
    """
    uses = derivative.uses
    means = [
        jnp.where(uses > 0, number / jnp.where(uses > 0, uses, 1), jnp.nan)
        for number in derivative[:3]
    ]
    return {f"{prefix}/{key}": x for key, x in zip(Probe._fields, [*means, uses], strict=True)}


def seen(reading: Reading, probe: Probe) -> Probe:
    """What one use adds to the derivative with respect to the probe."""
    numbers = summary(reading)
    size = numbers["size_before"]
    # a constant would not be summed over examples and devices
    once = _sharding.mapped_as(size, jnp.ones((), size.dtype))
    one_use = Probe(size, numbers["size_after"], numbers["clipped_share"], once)
    return Probe(*map(_as_derivative, one_use, probe))


def _as_derivative(number: Array, like: Array) -> Array:
    """The number with the type of a derivative by `like`: summed over devices if that is whole."""
    number = _sharding.varying_as((number, like), number.astype(like.dtype))
    known = _sharding.varying(like) or ()
    return _sharding.total(
        number, tuple(a for a in _sharding.varying(number) or () if a not in known)
    )
