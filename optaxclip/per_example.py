"""Per-example clipping for robust and private training: `aggregate clipped_grad quantile`.

It takes the parts of `optaxclip.clip`: any scope, norm and response, and limits that are numbers or
schedules. A `BatchThreshold`, such as `quantile`, learns from the sizes of a whole batch.

Two responses are meant for per-example clipping. `responses.automatic` needs no tuned limit (AUTO-S
of Bu et al.; without its constant it is `responses.normalize`, AUTO-V). `responses.psac` weighs
small gradients less. The default, `rescale`, is the clip of Abadi et al.

Note:
    This bounds one example's contribution to the sum. Differential privacy additionally requires
    noise, a sampling scheme and an accountant, which this library does not provide. Floating-point
    arithmetic can leak information that the analysis with real numbers does not account for.

References:
    Abadi et al., [Deep learning with differential privacy](https://arxiv.org/abs/1607.00133), 2016.
    Bu, Wang, Zha and Karypis, [Automatic clipping: differentially private deep learning made easier
    and stronger](https://arxiv.org/abs/2206.07136), 2022. Xia et al., [Differentially private
    learning with per-sample adaptive clipping](https://arxiv.org/abs/2212.00328), 2022.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from optaxclip import _batches, _examples, _sharding, _validate, norms, responses, scopes
from optaxclip._clipped_grad import ClippedGrad, ExampleStats
from optaxclip._types import Context, Norm, Response, Scope
from optaxclip.thresholds.fixed import as_thresholds

__all__ = ["BatchThreshold", "ExampleStats", "quantile", "aggregate"]
__all__ += ["ClippedGrad", "clipped_grad"]


def __dir__() -> list[str]:
    return __all__


class BatchThreshold(NamedTuple):
    """A threshold that learns the limit of each group from all sizes of a batch.

    Attributes:
        init: `number of groups -> state`.
        limit: `(state, context) -> limits`, `[groups]` or a scalar.
        learn: `(sizes, counted, limits, state, context) -> state`. `sizes` is `[batch, groups]`;
            `counted` is `[batch]`, False for examples that are masked or not finite.
        expected: the number of examples that `learn` divides by; None if it counts them.
    """

    init: Callable[[int], Any]
    limit: Callable[[Any, Context], Array]
    learn: Callable[[Array, Array, Array, Any, Context], Any]
    expected: Any = None


def quantile(
    q: Any = 0.5,
    *,
    rate: Any = 0.2,
    initial: Any = 1.0,
    noise: Any = 0.0,
    seed: int | Array = 0,
    expected: Any = None,
) -> BatchThreshold:
    r"""Moves the limit until a share of the examples is within it.

    .. math:: c \leftarrow c\, e^{-\eta (\bar b - q)}, \qquad \bar b = \frac12 + \frac1n \left(
        \sum_i (1[s_i \le c] - \frac12) + \mathcal N(0, \sigma^2) \right)

    :math:`\bar b` is the share of examples with a size of at most :math:`c`, from a count with
    noise. :math:`n` is the number of examples. In private training that number is not public, so
    pass the `expected` number.

    Args:
        q: the share, 0.5 in the paper.
        rate: :math:`\eta`, 0.2 in the paper.
        initial: the first limit, 1 or 0.1 in the paper.
        noise: :math:`\sigma`, standard deviation of the noise of each group's count; n / 20 in the
            paper.
        seed: seed of the noise, an integer or a key.
        expected: :math:`n`, the mean number of examples in a batch; None to count the examples of
            each batch.

    Raises:
        TypeError: an argument is not a number, or `seed` is neither an integer nor a key.
        ValueError: an argument is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from optaxclip import per_example
        >>> clip = per_example.aggregate(per_example.quantile(0.5, initial=10.0))
        >>> state = clip.init(jnp.zeros(2))
        >>> _, state = clip.update(jnp.array([[3.0, 4.0], [0.0, 2.0]]), state)  # both within 10
        >>> state.threshold
        Array([9.048374], dtype=float32)

    References:
        Andrew, Thakkar, McMahan and Ramaswamy, [Differentially private learning with adaptive
        clipping](https://arxiv.org/abs/1905.03871), 2019.
    """
    _validate.number("q", q, high=1.0, exclusive=True)
    _validate.number("rate", rate, exclusive=True)
    _validate.number("initial", initial, exclusive=True)
    _validate.number("noise", noise)
    if not isinstance(seed, Array):
        _validate.count("seed", seed, low=0)
    if expected is not None:
        _validate.number("expected", expected, exclusive=True)

    def learn(sizes: Array, counted: Array, limits: Array, state: Array, context: Context) -> Array:
        count = jnp.sum(counted) if expected is None else expected
        within = jnp.where(counted[:, None], (sizes <= limits) - 0.5, 0).sum(0)
        key = seed if isinstance(seed, Array) else jax.random.key(seed)
        noisy = jax.random.normal(jax.random.fold_in(key, context.step), within.shape)
        within += noise * noisy
        share = 0.5 + within / jnp.maximum(count, 1)
        return jnp.where(count > 0, state * jnp.exp(-rate * (share - q)), state)

    return BatchThreshold(
        lambda groups: jnp.full((groups,), initial, jnp.float32),
        lambda state, context: state,
        learn,
        expected,
    )


@_validate.checks_keywords
def aggregate(
    threshold: Any,
    *,
    scope: Scope = scopes.tree(),
    norm: Norm = norms.l2(),
    response: Response = responses.rescale,
    reduce: str = "mean",
    iterate: int = 1,
    sharded_over: Any = (),
) -> optax.GradientTransformationExtraArgs:
    r"""Clips each gradient along the first axis, and returns their mean or sum.

    .. math:: v + \frac{\sum_i w_i\, \mathrm{clip}(g_i - v)}{\sum_i w_i}, \qquad
        \mathrm{clip}(g) = g \min(1, c / \|g\|)

    The weights :math:`w_i` are 1 and the center :math:`v` is 0, if `update` is not given others. An
    example with a gradient that is not finite counts as zero, also in the mean. The sum is
    computed in float32 or wider, and returned in the dtype of the updates.

    Args:
        threshold: how large an example's gradient may be: a number, a schedule, a dict from group
            name to these, a tree of limits as for `clip`, or a `BatchThreshold`.
        scope: which numbers share one size.
        norm: which norm.
        response: what to do with a group whose size exceeds its limit.
        reduce: `"mean"` over the examples that are not masked, `"sum"`, or `"kept"`: the mean over
            the examples that are finite and that the response did not drop, group by group.
        iterate: how often to clip, each time around the last result; 1 to 5 for robust means.
        sharded_over: mapped axes (of `jax.shard_map`, `jax.pmap`) over which the batch is sharded;
            the result covers the whole batch. Every device must have whole examples. Not needed
            under `jit`.

    Returns:
        A transform. `init` takes the parameters; `update(updates, state, params, mask=None,
        weights=None, center=None)` takes their gradients `[batch, ...]`. Where `mask` `[batch]` is
        False, there is no example. `weights` `[batch]` are multiplied after the clip. `center` is a
        tree like the result. The state is a `ClipState`; sizes and shares in its `reading` are
        means over the examples.

    Raises:
        TypeError: an argument has the wrong type, such as a rule that learns from one size at a
            time.
        ValueError: an argument is out of range, `reduce="kept"` is given for a scope finer than a
            leaf, or `reduce="sum"` for a center; on `update`: leaves differ in the length of their
            first axis, a weight is negative, or `center` is another tree.

    Example:
        >>> import jax.numpy as jnp
        >>> from optaxclip import per_example
        >>> clip = per_example.aggregate(1.0, reduce="sum")
        >>> gradients = jnp.array([[0.0, 4.0], [0.0, 0.5], [jnp.nan, 0.0]])
        >>> clip.update(gradients, clip.init(jnp.zeros(2)))[0]
        Array([0. , 1.5], dtype=float32)
        >>> clients = jnp.array([[0.0, 4.0], [0.0, 0.5]])
        >>> per_example.aggregate(1.0).update(clients, None, weights=jnp.array([1, 3]))[0]
        Array([0.   , 0.625], dtype=float32)

    References:
        Karimireddy, He and Jaggi, [Learning from history for Byzantine robust
        optimization](https://arxiv.org/abs/2012.10333), 2021, for `center` and `iterate`. McMahan
        et al., [Communication-efficient learning of deep networks from decentralized
        data](https://arxiv.org/abs/1602.05629), 2017, for `weights`.
    """
    parts = _parts(threshold, scope, norm, response, reduce, iterate, sharded_over)

    @_sharding.compiled_on_mesh
    def compute(updates: Any, state: Any, params: Any, present: Any, center: Any) -> Any:
        mesh = _sharding.explicit_mesh(updates)
        updates, present = _batches.aligned(mesh, updates, present)
        one_pass = functools.partial(_examples.aggregated, parts, updates, state, params, present)
        return parts.repeated(functools.partial(one_pass, mesh), center)

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        mask: Any = None,
        weights: Any = None,
        center: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        del extra_args
        size = _validate.batch("updates", updates)
        _sharding.all_bound("sharded_over", parts.axes)
        like = jax.tree.map(_batches.like_one, updates)
        if center is not None:
            _validate.center(center, like)
        state = parts.init(like) if state is None else state
        present = _batches.present(mask, weights, size)
        if size:
            after, result = compute(updates, state, params, present, center)
            return result, after
        padded = jax.tree.map(_batches.at_least_one, updates)
        after, result = compute(padded, state, params, _batches.nobody(), center)
        return result, after._replace(threshold=state.threshold)  # an empty batch teaches nothing

    return optax.GradientTransformationExtraArgs(parts.init, update)


@_validate.checks_keywords
def clipped_grad(
    loss_fn: Callable[..., Any],
    threshold: Any,
    *,
    scope: Scope = scopes.tree(),
    norm: Norm = norms.l2(),
    response: Response = responses.rescale,
    reduce: str = "mean",
    iterate: int = 1,
    microbatch: int | None = None,
    has_aux: bool = False,
    keep_batch_axis: bool = False,
    sharded_over: Any = (),
) -> ClippedGrad:
    r"""Like `jax.value_and_grad`, with each example's gradient clipped before the sum.

    .. math:: \frac1n \sum_{i=1}^n \nabla \ell_i \min(1, c / \|\nabla \ell_i\|)

    Some layers need no gradient per example ("ghost norms"). Where a layer's activations and output
    cotangents are smaller than its gradient, only those are stored. Their products give the norm,
    and the sum over the batch. This needs the `l2` norm, a scope of whole leaves, and a response
    that keeps the direction. It works for dense layers, convolutions, embeddings and recurrent
    cells, in loops over time or stacked layers, with weights that are used once or shared, in any
    library, and in one backward pass. All other gradients, such as the gradients of biases, are
    stored for each example. `plan` shows which.

    Such norms are sums of squares in float32, for norms from 1e-18 to 1e18. A larger one counts as
    not finite, a smaller one as zero. If a weight is used more than once and the parts of its
    gradient almost cancel, the norm is exact up to the rounding of those parts. Sums use JAX's
    default precision of matrix products, as gradients do.

    Args:
        loss_fn: `(params, *example) -> loss` of one example, a scalar.
        threshold: how large an example's gradient may be: a number, a schedule, a dict from group
            name to these, a tree of limits as for `clip`, or a `BatchThreshold`.
        scope: which numbers share one size.
        norm: which norm.
        response: what to do with a group whose size exceeds its limit.
        reduce: `"mean"` over the examples that are not masked, `"sum"`, or `"kept"`: the mean over
            the examples that are finite and that the response did not drop, group by group.
        iterate: how often to clip, each time around the last result; 1 to 5 for robust means.
        microbatch: how many examples to process at once, in a loop; None for all.
        has_aux: whether `loss_fn` returns `(loss, aux)`.
        keep_batch_axis: whether `loss_fn` takes a batch; it is then called with batches of one.
        sharded_over: mapped axes (of `jax.shard_map`, `jax.pmap`) over which the batch is sharded.
            Results then cover the whole batch; only arrays with a batch axis stay local. Every
            device must have whole parameters. Not needed under `jit`.

    Returns:
        A function `(params, *batch, mask=None, state=None) -> ((loss, seen), gradients)`, with the
        methods `init`, `plan` and `sensitivity`; see `ClippedGrad` and `ExampleStats`.

    Raises:
        TypeError: an argument has the wrong type, such as a rule that learns from one size at a
            time.
        ValueError: an argument is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from optaxclip import per_example
        >>> def loss(w, x, y):
        ...     return (x @ w - y) ** 2 / 2
        >>> x, y = jnp.array([[0.0, 4.0], [0.5, 0.0]]), jnp.array([2.0, 1.0])
        >>> (mean, seen), gradient = per_example.clipped_grad(loss, 1.0)(jnp.zeros(2), x, y)
        >>> print(mean, seen.sizes.ravel(), gradient)
        1.25 [8.  0.5] [-0.25 -0.5 ]

    References:
        Goodfellow, [Efficient per-example gradient computations](https://arxiv.org/abs/1510.01799),
        2015. Lee and Kifer, [Scaling up differentially private deep learning with fast per-example
        gradient clipping](https://arxiv.org/abs/2009.03106), 2020. Bu, Mao and Xu, [Scalable and
        efficient training of large convolutional neural networks with differential
        privacy](https://arxiv.org/abs/2205.10683), 2022. Bu, Wang, Zha and Karypis, [Differentially
        private optimization on large model at small cost](https://arxiv.org/abs/2210.00038), 2022.
    """
    _validate.function("loss_fn", loss_fn, "lambda params, x, y: ...")
    if microbatch is not None:
        _validate.count("microbatch", microbatch)

    def loss(params: Any, *example: Any) -> tuple[Array, Any]:
        if keep_batch_axis:
            example = jax.tree.map(lambda x: x[None], example)
        result = loss_fn(params, *example)
        return result if has_aux else (result, None)

    parts = _parts(threshold, scope, norm, response, reduce, iterate, sharded_over)
    return ClippedGrad(loss, parts, microbatch)


def _parts(
    threshold: Any,
    scope: Scope,
    norm: Norm,
    response: Response,
    reduce: str,
    iterate: int,
    sharded_over: Any,
) -> _examples.Parts:
    rule = threshold if isinstance(threshold, BatchThreshold) else None
    fixed, axes = as_thresholds(0.0 if rule else threshold), _sharding.names_of(sharded_over) or ()
    return _examples.Parts(rule, fixed, scope, norm, response, reduce, iterate, axes)
