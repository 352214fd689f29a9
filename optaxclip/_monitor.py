"""Transforms that measure and change nothing: `monitor` and `spikes`."""

from typing import Any, Literal

import jax.numpy as jnp
import optax
from jax import Array

from optaxclip import _validate, norms, responses, scopes
from optaxclip._clip import clip, sizes_of
from optaxclip._layout import lay_out
from optaxclip._transform import transform
from optaxclip._types import ClipState, Norm, Response, Scope, Threshold
from optaxclip.thresholds.moments import window_zscore
from optaxclip.thresholds.ranks import remember

Of = Literal["updates", "params", "ratio"]
MEASURED = ("updates", "params", "ratio")


class MonitorState(ClipState):
    """A clip's state, of a type that `metrics` recognizes as a monitor's."""

    __slots__ = ()


@_validate.checks_keywords
def monitor(
    *,
    of: Of = "updates",
    scope: Scope = scopes.tree(),
    norm: Norm = norms.l2(),
    history: int = 100,
    sharded_over: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Measures updates, parameters or the ratio of both, and passes the updates on unchanged.

    With `of="ratio"` the size of a group is :math:`\|u\| / \|w\|`, how far the step moves its
    parameters. Put this monitor behind the learning rate, where :math:`u` is what is added to
    :math:`w`. A group whose parameters are all zero has the ratio 0.

    `readings` and `metrics` show what it measured; its keys begin with `monitor`. Its state also
    holds the last sizes, and a sketch of the distribution of all sizes; `suggest` proposes
    thresholds from the sketch. Sizes that are zero or not finite are not remembered.

    Args:
        of: what to measure. For `"params"` and `"ratio"`, `update` needs `params`.
        scope: which numbers share a size.
        norm: which norm. `norms.zeros()` is the share of numbers that are exactly zero.
        history: how many of the last sizes to remember.
        sharded_over: as for `clip`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `of` is another word, or `history` is below 1; on `update`: the parameters are
            missing.

    Example:
        >>> import jax.numpy as jnp, optax, optaxclip
        >>> monitor = optaxclip.telemetry.monitor(history=3)
        >>> state = monitor.init(jnp.zeros(1))
        >>> for size in 1.0, 2.0, 3.0, 40.0:
        ...     _, state = monitor.update(jnp.array([size]), state)
        >>> optaxclip.telemetry.last_sizes(state)
        {'tree': array([40.,  3.,  2.], dtype=float32)}
        >>> optimizer = optax.chain(optax.sgd(0.1), optaxclip.telemetry.monitor(of="ratio"))
        >>> params = jnp.array([3.0, 4.0])
        >>> _, state = optimizer.update(params / 2, optimizer.init(params), params)
        >>> print(optaxclip.telemetry.metrics(state)["monitor/size_before"])
        0.05
    """
    return _watching(of, remember(history), responses.rescale, scope, norm, sharded_over)


@_validate.checks_keywords
def spikes(
    deviations: float | Array = 6.0,
    *,
    window: int = 128,
    of: Of = "updates",
    scope: Scope = scopes.tree(),
    norm: Norm = norms.l2(),
    sharded_over: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Counts spikes, and passes the updates on unchanged.

    .. math:: \text{spike} \iff s > \mu + k \sigma

    :math:`\mu` and :math:`\sigma` are the mean and deviation of the last sizes before this one. In
    `metrics`, `monitor/clipped_steps` counts the steps with a spike, `monitor/recent_share` is the
    share of recent steps with one, and `monitor/limit` is :math:`\mu + k \sigma`. Nothing is cut:
    `monitor/size_after` is `monitor/size_before`. There are no spikes before half of the window is
    full.

    Args:
        deviations: :math:`k`, how many deviations above the mean a spike begins.
        window: how many of the last sizes to compare with.
        of: what to measure, as for `monitor`.
        scope: which numbers share a size.
        norm: which norm.
        sharded_over: as for `clip`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `deviations` is negative, `window` is below 1, or `of` is another word; on
            `update`: the parameters are missing.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> from optaxclip import telemetry
        >>> spikes = telemetry.spikes(6.0, window=4)
        >>> state = spikes.init(jnp.zeros(1))
        >>> for size in 1.0, 1.1, 0.9, 1.0, 5.0:
        ...     updates, state = spikes.update(jnp.array([size]), state)
        >>> print(updates, telemetry.metrics(state)["monitor/clipped_steps"])
        [5.] 1

    References:
        OLMo Team, [2 OLMo 2 Furious](https://arxiv.org/abs/2501.00656), 2025: the spike score.
    """
    _validate.count("window", window)
    rule = window_zscore(deviations, window=window, warmup=(window + 1) // 2)
    return _watching(of, rule, _unchanged, scope, norm, sharded_over)


def _watching(
    of: str, rule: Threshold, response: Response, scope: Scope, norm: Norm, sharded_over: Any
) -> optax.GradientTransformationExtraArgs:
    """A clip whose updates are thrown away."""
    _validate.option("of", of, MEASURED)
    inner = clip(rule, scope, norm=norm, response=response, sharded_over=sharded_over)

    def init(params: Any) -> Any:
        state: Any = inner.init(params)
        return MonitorState(*state)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        if of != "updates":
            _validate.params_given(params, f'of="{of}" needs the parameters')
            sizes = _ratios(scope, norm, updates, params, sharded_over) if of == "ratio" else None
            measured = params if of == "params" else None
            extra_args = {**extra_args, "measured": measured, "sizes": sizes}
        after: Any = inner.update(updates, state, params, **extra_args)[1]
        return updates, MonitorState(*after)

    return transform(init, update)


def _unchanged(gradient: Array, size: Array, limit: Array) -> Array:
    return gradient


def _ratios(scope: Scope, norm: Norm, updates: Any, params: Any, sharded_over: Any) -> Any:
    """Sizes of the updates divided by sizes of their parameters, in the form of `sizes=`."""
    layout = lay_out(scope, updates, params)
    above, below = (
        sizes_of(norm, layout, leaves, params, sharded_over)
        for leaves in (layout.gradients, layout.matching(params))
    )
    ratios = above.map(_ratio, below).each()
    return ratios[0] if layout.axes is None else layout.filled(ratios)


def _ratio(size: Array, param_size: Array) -> Array:
    """The quotient; 0 where the parameters are all zero, as before their first step."""
    return jnp.where(param_size == 0, 0, size / jnp.where(param_size == 0, 1, param_size))
