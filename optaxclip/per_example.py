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

from optaxclip import _examples, _factored, _sharding, _validate, norms, responses, scopes
from optaxclip._layout import lay_out
from optaxclip._numerics import widen
from optaxclip._types import ClipState, Context, Norm, Response, Scope
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
    """

    init: Callable[[int], Any]
    limit: Callable[[Any, Context], Array]
    learn: Callable[[Array, Array, Array, Any, Context], Any]


class ExampleStats(NamedTuple):
    """Measurements of the examples of one batch.

    Attributes:
        losses: `[batch]`.
        aux: the second result of the loss function, `[batch, ...]`; None without `has_aux`.
        sizes: `[batch, groups]`, before clipping; for scopes finer than a leaf, the largest size in
            each leaf.
        limits: `[groups]`, the limits of the sizes.
        clipped: bool `[batch, groups]`, whether the group was over its limit.
        counted: bool `[batch]`, False if the example is masked or its gradient is not finite.
        dropped: int32 scalar, number of examples that are not masked but not finite.
        state: pass it to the next call; its `reading` has means over the examples.
    """

    losses: Array
    aux: Any
    sizes: Array
    limits: Array
    clipped: Array
    counted: Array
    dropped: Array
    state: ClipState


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
    )


@_validate.checks_keywords
def aggregate(
    threshold: Any,
    *,
    scope: Scope = scopes.tree(),
    norm: Norm = norms.l2(),
    response: Response = responses.rescale,
    reduce: str = "mean",
    sharded_over: Any = (),
) -> optax.GradientTransformationExtraArgs:
    r"""Clips each gradient along the first axis, and returns their mean or sum.

    .. math:: \frac1n \sum_{i=1}^n g_i \min(1, c / \|g_i\|)

    An example with a gradient that is not finite counts as zero, also in the mean. The sum is
    computed in float32 or wider, and returned in the dtype of the updates.

    Args:
        threshold: how large an example's gradient may be: a number, a schedule, a dict from group
            name to these, or a `BatchThreshold`.
        scope: which numbers share one size.
        norm: which norm.
        response: what to do with a group whose size exceeds its limit.
        reduce: `"mean"` over the examples that are not masked, or `"sum"`.
        sharded_over: mapped axes (of `jax.shard_map`, `jax.pmap`) over which the batch is sharded;
            the result covers the whole batch. Every device must have whole examples. Not needed
            under `jit`.

    Returns:
        A transform. `init` takes the parameters; `update(updates, state, params, mask=None)` takes
        their gradients `[batch, ...]`. Where `mask` `[batch]` is False, there is no example. The
        state is a `ClipState`; sizes and shares in its `reading` are means over the examples.

    Raises:
        TypeError: an argument has the wrong type, such as a rule that learns from one size at a
            time.
        ValueError: an argument is out of range; on `update`: leaves differ in the length of their
            first axis.

    Example:
        >>> import jax.numpy as jnp
        >>> from optaxclip import per_example
        >>> clip = per_example.aggregate(1.0, reduce="sum")
        >>> gradients = jnp.array([[0.0, 4.0], [0.0, 0.5], [jnp.nan, 0.0]])
        >>> clip.update(gradients, clip.init(jnp.zeros(2)))[0]
        Array([0. , 1.5], dtype=float32)
    """
    parts = _parts(threshold, scope, norm, response, reduce, sharded_over)

    @_sharding.compiled_on_mesh
    def compute(updates: Any, state: Any, params: Any, mask: Any) -> tuple[Any, Any]:
        mesh = _sharding.explicit_mesh(updates)
        updates, mask = _examples.aligned(mesh, updates, mask)
        state = parts.init(jax.tree.map(_examples.like_one, updates)) if state is None else state
        is_float = _examples.is_float
        floats = jax.tree.map(lambda x: x if is_float(x) else optax.MaskedNode(), updates)
        clipped, reading, finite = parts.clip_each(floats, state, params)
        counted = mask & finite

        def total(x: Any, clipped: Any) -> Any:
            out = _sharding.on_mesh(mesh, *_sharding.spec_on(mesh, x)[1:])
            if is_float(x):
                return _sharding.automatic(mesh, _factored.weighted_sum, out, clipped, counted)
            return _sharding.automatic(mesh, lambda x: x[0], out, x)

        totals = jax.tree.map(total, updates, clipped)
        return parts.reduced(totals, updates, mask), parts.next(state, reading, mask, counted, mesh)

    def update(
        updates: Any, state: Any, params: Any = None, *, mask: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        del extra_args
        size = _validate.batch("updates", updates)
        _sharding.all_bound("sharded_over", parts.axes)
        mask = _examples.mask_of(mask, size)
        if size:
            return compute(updates, state, params, mask)
        state = parts.init(jax.tree.map(_examples.like_one, updates)) if state is None else state
        padded = jax.tree.map(_examples.at_least_one, updates)
        result, after = compute(padded, state, params, _examples.nobody())
        return result, after._replace(threshold=state.threshold)  # an empty batch teaches nothing

    return optax.GradientTransformationExtraArgs(parts.init, update)


class ClippedGrad:
    """The result of `clipped_grad`: a function `(params, *batch)` with `init` and `plan`."""

    def __init__(
        self, loss: Callable[..., Any], parts: _examples.Parts, microbatch: int | None
    ) -> None:
        self._loss, self._parts, self._microbatch = loss, parts, microbatch
        self._computed = functools.cache(
            lambda count: _sharding.compiled_on_mesh(functools.partial(self._compute, count=count))
        )

    def init(self, params: Any) -> ClipState:
        """Returns the state before the first step."""
        return self._parts.init(params)

    def __call__(
        self, params: Any, *batch: Any, mask: Any = None, state: Any = None
    ) -> tuple[tuple[Array, ExampleStats], Any]:
        """Returns `((loss, seen), gradients)`.

        `loss` and `gradients` are means, or sums with `reduce="sum"`; `seen` is an `ExampleStats`.
        In both, an example with a gradient that is not finite counts as zero.

        Args:
            params: the parameters of the loss. Leaves that are not floats, such as counters and
                keys, get a float0 gradient, as from `jax.grad` with `allow_int=True`. A key in
                `params` is the same for every example. For different dropout in each example, put
                `jax.random.split(key, batch)` in the batch.
            *batch: trees of arrays `[batch, ...]`.
            mask: bool `[batch]`, False where there is no example; the values there do not matter.
            state: from `init`, or `seen.state` of the last step; not needed if the threshold is a
                number or a dict of numbers.

        Raises:
            ValueError: arrays differ in the length of their first axis, `microbatch` does not
                divide it, or `sharded_over` names an axis that is not mapped here.
        """
        size = _validate.batch("batch", batch)
        _sharding.all_bound("sharded_over", self._parts.axes)
        mask, count = _examples.mask_of(mask, size), 1
        if size:
            if self._microbatch is not None:
                count = _validate.divided("microbatch", self._microbatch, size)
            return self._computed(count)(params, batch, mask, state)
        # an empty batch: compute with one masked example, and cut it off the results
        state = self._parts.init(params) if state is None else state
        padded = jax.tree.map(_examples.at_least_one, batch)
        (loss, seen), gradients = self._computed(1)(params, padded, _examples.nobody(), state)
        each = (seen.losses, seen.aux, seen.sizes, seen.clipped, seen.counted)
        losses, aux, sizes, clipped, counted = jax.tree.map(lambda x: x[:0], each)
        after = seen.state._replace(threshold=state.threshold)
        seen = ExampleStats(losses, aux, sizes, seen.limits, clipped, counted, seen.dropped, after)
        return (loss, seen), gradients

    def _compute(
        self, params: Any, batch: Any, mask: Any, state: Any, *, count: int
    ) -> tuple[tuple[Array, ExampleStats], Any]:
        """Computes the results for a batch that is not empty, in `count` microbatches."""
        parts, mesh = self._parts, _sharding.explicit_mesh((params, batch))
        batch, mask = _examples.aligned(mesh, batch, mask)
        state = parts.init(params) if state is None else state
        varied = _sharding.varying_as(batch, params)
        floats = [x for x in jax.tree.leaves(params) if _examples.is_float(x)]
        shardings = [_sharding.on_mesh(mesh, *_sharding.spec_on(mesh, x)) for x in floats]

        def some(totals: list[Array], microbatch: Any) -> tuple[Any, Any]:
            mask, examples = microbatch
            (losses, aux), gradients = parts.gradients(self._loss, mesh, varied, examples)
            clipped = parts.clip_factored(gradients, state, params, mesh, mask)
            leaves, reading, finite, factors = clipped
            counted = mask & finite
            weights = [jnp.where(counted, factor, 0) for factor in factors]
            sums = [
                _sharding.automatic(mesh, _factored.weighted_sum, sharding, leaf, weight)
                for sharding, leaf, weight in zip(shardings, leaves, weights, strict=True)
            ]
            return list(map(jnp.add, totals, sums)), (losses, aux, reading, counted)

        zeros = [jnp.zeros(jnp.shape(x), widen(x).dtype) for x in floats]
        totals = _sharding.varying_as(batch, _sharding.resharded(zeros, shardings))
        if count == 1:
            totals, results = some(totals, (mask, batch))
        else:
            parted = _examples.parted(mesh, (mask, batch), count)
            totals, results = jax.lax.scan(some, totals, parted)
            results = _examples.joined(mesh, results)
        losses, aux, reading, counted = results
        seen = ExampleStats(losses, aux, **parts.measured(mesh, state, mask, reading, counted))
        loss = parts.reduced(jnp.sum(jnp.where(counted, losses, 0)), losses, mask)
        gradients = parts.reduced(totals, floats, mask)
        return (loss, seen), _examples.tree_of(params, gradients, _examples.no_gradient)

    def plan(self, params: Any, *batch: Any) -> dict[str, str]:
        """Returns how the gradient of each leaf is held: `path -> "factors"` or `"stored"`.

        A stored leaf has an array of gradients for each example.

        Example:
            >>> import jax.numpy as jnp
            >>> from optaxclip import per_example
            >>> def loss(params, x):
            ...     return jnp.sum(jnp.tanh(x @ params["w"] + params["b"]))
            >>> clipped = per_example.clipped_grad(loss, 1.0)
            >>> clipped.plan({"w": jnp.ones((9, 8)), "b": jnp.ones(8)}, jnp.ones((4, 9)))
            {'b': 'stored', 'w': 'factors'}
        """

        def first(batch: Any) -> Any:
            return jax.tree.map(lambda x: _examples.at_least_one(x)[0], batch)

        def leaves(params: Any, example: Any) -> Any:
            return self._parts.gradient(self._loss, params, *example)[1]

        shapes = jax.eval_shape(leaves, params, jax.eval_shape(first, batch))
        pairs = zip(lay_out(scopes.leaf(), params).paths, shapes, strict=True)
        return {path: "factors" if isinstance(x, tuple) else "stored" for path, x in pairs}


@_validate.checks_keywords
def clipped_grad(
    loss_fn: Callable[..., Any],
    threshold: Any,
    *,
    scope: Scope = scopes.tree(),
    norm: Norm = norms.l2(),
    response: Response = responses.rescale,
    reduce: str = "mean",
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
            name to these, or a `BatchThreshold`.
        scope: which numbers share one size.
        norm: which norm.
        response: what to do with a group whose size exceeds its limit.
        reduce: `"mean"` over the examples that are not masked, or `"sum"`.
        microbatch: how many examples to process at once, in a loop; None for all.
        has_aux: whether `loss_fn` returns `(loss, aux)`.
        keep_batch_axis: whether `loss_fn` takes a batch; it is then called with batches of one.
        sharded_over: mapped axes (of `jax.shard_map`, `jax.pmap`) over which the batch is sharded.
            Results then cover the whole batch; only arrays with a batch axis stay local. Every
            device must have whole parameters. Not needed under `jit`.

    Returns:
        A function `(params, *batch, mask=None, state=None) -> ((loss, seen), gradients)`, with the
        methods `init` and `plan`; see `ClippedGrad` and `ExampleStats`.

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

    parts = _parts(threshold, scope, norm, response, reduce, sharded_over)
    return ClippedGrad(loss, parts, microbatch)


def _parts(
    threshold: Any, scope: Scope, norm: Norm, response: Response, reduce: str, sharded_over: Any
) -> _examples.Parts:
    rule = threshold if isinstance(threshold, BatchThreshold) else None
    fixed, axes = as_thresholds(0.0 if rule else threshold), _sharding.names_of(sharded_over) or ()
    return _examples.Parts(rule, fixed, scope, norm, response, reduce, axes)
