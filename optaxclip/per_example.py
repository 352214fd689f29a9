"""Clipping each example of a batch by itself: `aggregate clipped_grad quantile`, for robust and for
private training.

The parts are those of `optaxclip.clip`: any scope, norm and response, and limits that are numbers
or schedules. What learns from a whole batch of sizes is a `BatchThreshold`, such as `quantile`.

Two responses are meant for this. With `responses.automatic` no limit is to be found (AUTO-S of Bu
et al.; without its constant it is `responses.normalize`, AUTO-V), and `responses.psac` weighs small
gradients less. The default, `rescale`, is that of Abadi et al.

Note:
    This bounds what one example can do to a sum. Privacy takes noise, a way of sampling and an
    accountant besides, which other libraries have; and floating point numbers leak what real
    numbers would not.

References:
    Abadi et al., [Deep learning with differential privacy](https://arxiv.org/abs/1607.00133), 2016.
    Bu, Wang, Zha and Karypis, [Automatic clipping: differentially private deep learning made easier
    and stronger](https://arxiv.org/abs/2206.07136), 2022. Xia et al., [Differentially private
    learning with per-sample adaptive clipping](https://arxiv.org/abs/2212.00328), 2022.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from optaxclip import _factored, _sharding, _validate, norms, responses, scopes
from optaxclip._clip import clip
from optaxclip._layout import lay_out
from optaxclip._numerics import widen
from optaxclip._types import ClipState, Context, Norm, Reading, Response, Scope
from optaxclip.thresholds.fixed import as_thresholds

REDUCTIONS = ("mean", "sum")


class BatchThreshold(NamedTuple):
    """A limit for each group that learns from the sizes of all examples of a batch.

    Attributes:
        init: `groups -> state`, for so many groups.
        limit: `(state, context) -> limits`, `[groups]` or a scalar.
        learn: `(sizes, counted, limits, state, context) -> state`, with sizes `[batch, groups]`,
            and `counted` `[batch]` False for examples that are masked or not finite.
    """

    init: Callable[[int], Any]
    limit: Callable[[Any, Context], Array]
    learn: Callable[[Array, Array, Array, Any, Context], Any]


class ExampleStats(NamedTuple):
    """What was seen of the examples of one batch.

    Attributes:
        losses: `[batch]`.
        aux: what the loss function returned besides, with the axis of the examples in front; None
            without `has_aux`.
        sizes: `[batch, groups]`, before clipping; with scopes finer than a leaf the largest in each
            leaf.
        limits: `[groups]`, what the sizes were allowed to be.
        clipped: bool `[batch, groups]`, whether something was over its limit.
        counted: bool `[batch]`, False where the example was masked, or its gradient was not finite.
        dropped: int32 scalar, examples that were not masked, and whose gradients were not finite.
        state: for the next call; its `reading` has means over the examples.
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
    r"""Moves the limit until a share of the examples is within it, :math:`c \leftarrow c\, e^{-\eta
    (\bar b - q)}`.

    :math:`\bar b` is the share of examples whose size is at most :math:`c`, from a count with
    noise: :math:`\bar b = \frac12 + \frac1n (\sum_i (1[s_i \le c] - \frac12) + \mathcal N(0,
    \sigma^2))`.

    Here n is how many examples there are; but in private training that is not public, and has to be
    the `expected` number.

    Args:
        q: the share, 0.5 in the paper.
        rate: :math:`\eta`, 0.2 in the paper.
        initial: the first limit, 1 or 0.1 in the paper.
        noise: :math:`\sigma`, standard deviation of what is added to each group's count; in the
            paper n / 20.
        seed: for the noise, an integer or a key.
        expected: how many examples there are in the mean batch; without it, those of each batch are
            counted.

    Raises:
        TypeError: an argument is not a number, or `seed` neither an integer nor a key.
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
        key = jax.random.fold_in(
            seed if isinstance(seed, Array) else jax.random.key(seed), context.step
        )
        within += noise * jax.random.normal(key, within.shape)
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
    r"""Clips each of the gradients that lie along the first axis, and takes their mean or sum.

    .. math:: \frac1n \sum_{i=1}^n g_i \min(1, c / \|g_i\|)

    An example whose gradient is not finite anywhere counts as zero, in the mean, too. The sum is
    taken in float32 or wider, and then has the dtype of the updates.

    Args:
        threshold: how large an example's gradient may be: a number, a schedule, a dict from group
            name to these, or a `BatchThreshold`.
        scope: which numbers share one size.
        norm: how large they are.
        response: what happens to what is larger.
        reduce: `"mean"` over the examples that are not masked, or `"sum"`.
        sharded_over: mapped axes (of `jax.shard_map`, `jax.pmap`) along which the batch is split:
            the result is that of all of it. Every device must have whole examples. Not needed under
            `jit`.

    Returns:
        A transform whose `init` takes the parameters, and `update(updates, state, params,
        mask=None)` gradients `[batch, ...]` of them; where `mask` `[batch]` is False, there is no
        example. The state is a `ClipState`, in whose `reading` sizes and shares are means over the
        examples.

    Raises:
        TypeError: an argument is not what it should be, such as a rule that learns from one size at
            a time.
        ValueError: an argument is out of range; leaves of the updates differ in the length of their
            first axis.

    Example:
        >>> import jax.numpy as jnp
        >>> from optaxclip import per_example
        >>> clip = per_example.aggregate(1.0, reduce="sum")
        >>> clip.update(jnp.array([[0.0, 4.0], [0.0, 0.5], [jnp.nan, 0.0]]), clip.init(jnp.zeros(2)))[0]
        Array([0. , 1.5], dtype=float32)
    """
    parts = _Parts(threshold, scope, norm, response, reduce, sharded_over)

    @_sharding.compiled_on_mesh
    def compute(updates: Any, state: Any, params: Any, mask: Any) -> tuple[Any, Any]:
        mesh = _sharding.explicit_mesh(updates)
        updates, mask = _aligned(mesh, updates, mask)
        state = parts.init(jax.tree.map(_like_one, updates)) if state is None else state
        floats = jax.tree.map(lambda x: x if _is_float(x) else optax.MaskedNode(), updates)
        clipped, reading, finite = parts.clip_each(floats, state, params)
        counted = mask & finite

        def total(x: Any, own: Any) -> Any:
            out = _sharding.on_mesh(mesh, *_sharding.spec_on(mesh, x)[1:])
            if _is_float(x):
                return _sharding.automatic(mesh, _factored.weighted_sum, out, own, counted)
            return _sharding.automatic(mesh, lambda x: x[0], out, x)

        totals = jax.tree.map(total, updates, clipped)
        return parts.reduced(totals, updates, mask), parts.next(state, reading, mask, counted, mesh)

    def update(
        updates: Any, state: Any, params: Any = None, *, mask: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        del extra_args
        _sharding.all_bound("sharded_over", parts.axes)
        size = _validate.batch("updates", updates)
        _sharding.all_bound("sharded_over", parts.axes)
        mask = _mask(mask, size)
        if size:
            return compute(updates, state, params, mask)
        state = parts.init(jax.tree.map(_like_one, updates)) if state is None else state
        result, after = compute(jax.tree.map(_example, updates), state, params, _nobody())
        return result, after._replace(threshold=state.threshold)

    return optax.GradientTransformationExtraArgs(parts.init, update)


class ClippedGrad:
    """What `clipped_grad` returns: a function, and what goes with it."""

    def __init__(self, loss: Callable[..., Any], parts: "_Parts", microbatch: int | None) -> None:
        self._loss, self._parts, self._microbatch = loss, parts, microbatch
        self._computed = functools.cache(
            lambda count: _sharding.compiled_on_mesh(functools.partial(self._compute, count=count))
        )

    def init(self, params: Any) -> ClipState:
        """The state before the first step."""
        return self._parts.init(params)

    def __call__(
        self, params: Any, *batch: Any, mask: Any = None, state: Any = None
    ) -> tuple[tuple[Array, ExampleStats], Any]:
        """Mean (or sum) of the losses, what was seen of each example, and mean (or sum) of the
        clipped gradients.

        In both, an example whose gradient is not finite anywhere counts as zero.

        Args:
            params: what the loss is differentiated by. Leaves that are not floats, such as counters
                and keys, get a float0 gradient, as from `jax.grad` with `allow_int=True`. A key in
                `params` is the same for every example: for dropout that differs, put
                `jax.random.split(key, batch)` in the batch.
            *batch: trees of arrays `[batch, ...]`.
            mask: bool `[batch]`, False where there is no example, whatever stands there instead.
            state: from `init`, or `seen.state` of the last step; not needed for a threshold that is
                only numbers.

        Raises:
            ValueError: arrays differ in the length of their first axis, `microbatch` does not
                divide it, or `sharded_over` names an axis that is not mapped here.
        """
        _sharding.all_bound("sharded_over", self._parts.axes)
        size = _validate.batch("batch", batch)
        _sharding.all_bound("sharded_over", self._parts.axes)
        mask = _mask(mask, size)
        if size:
            count = (
                1
                if self._microbatch is None
                else _validate.divided("microbatch", self._microbatch, size)
            )
            return self._computed(count)(params, batch, mask, state)
        state = self._parts.init(params) if state is None else state
        (loss, seen), gradients = self._computed(1)(
            params, jax.tree.map(_example, batch), _nobody(), state
        )
        each = (seen.losses, seen.aux, seen.sizes, seen.clipped, seen.counted)
        losses, aux, sizes, clipped, counted = jax.tree.map(lambda x: x[:0], each)
        after = seen.state._replace(threshold=state.threshold)
        seen = ExampleStats(losses, aux, sizes, seen.limits, clipped, counted, seen.dropped, after)
        return (loss, seen), gradients

    def _compute(
        self, params: Any, batch: Any, mask: Any, state: Any, *, count: int
    ) -> tuple[tuple[Array, ExampleStats], Any]:
        """The same for a batch that is not empty, in so many microbatches."""
        parts, mesh = self._parts, _sharding.explicit_mesh((params, batch))
        batch, mask = _aligned(mesh, batch, mask)
        state = parts.init(params) if state is None else state
        varied = _sharding.varying_as(batch, params)
        floats = [x for x in jax.tree.leaves(params) if _is_float(x)]
        splits = [_sharding.on_mesh(mesh, *_sharding.spec_on(mesh, x)) for x in floats]

        def some(totals: list[Array], part: Any) -> tuple[Any, Any]:
            own, examples = part
            (losses, aux), gradients = self._gradients(mesh, varied, examples)
            leaves, reading, finite, factors = parts.clip_factored(
                gradients, state, params, mesh, own
            )
            counted = own & finite
            weights = [jnp.where(counted, factor, 0) for factor in factors]
            sums = [
                _sharding.automatic(mesh, _factored.weighted_sum, split, leaf, weight)
                for split, leaf, weight in zip(splits, leaves, weights, strict=True)
            ]
            return list(map(jnp.add, totals, sums)), (losses, aux, reading, counted)

        zeros = [jnp.zeros(jnp.shape(x), widen(x).dtype) for x in floats]
        totals = _sharding.varying_as(batch, _sharding.resharded(zeros, splits))
        if count == 1:
            totals, seen = some(totals, (mask, batch))
        else:
            totals, seen = jax.lax.scan(some, totals, _parted(mesh, (mask, batch), count))
            seen = _joined(mesh, seen)
        losses, aux, reading, counted = seen
        dropped = parts.over_all(jnp.sum(mask & ~counted, dtype=jnp.int32))
        after = parts.next(state, reading, mask, counted, mesh)
        limits = _sharding.gathered(
            _sharding.automatic(mesh, lambda x: x[:1], _sharding.on_mesh(mesh), reading.limit),
            parts.axes,
        )[0]
        noted = ExampleStats(
            losses,
            aux,
            reading.size_before,
            limits,
            reading.clipped_share > 0,
            counted,
            dropped,
            after,
        )
        loss = parts.reduced(jnp.sum(jnp.where(counted, losses, 0)), losses, mask)
        return (loss, noted), _tree_of(params, parts.reduced(totals, floats, mask), _no_gradient)

    def plan(self, params: Any, *batch: Any) -> dict[str, str]:
        """By path of each leaf of `params`: `"factors"`, or `"stored"` if there is a gradient for
        each example.

        Example:
            >>> import jax.numpy as jnp
            >>> from optaxclip import per_example
            >>> def loss(params, x):
            ...     return jnp.sum(jnp.tanh(x @ params["w"] + params["b"]))
            >>> clipped = per_example.clipped_grad(loss, 1.0)
            >>> clipped.plan({"w": jnp.ones((9, 8)), "b": jnp.ones(8)}, jnp.ones((4, 9)))
            {'b': 'stored', 'w': 'factors'}
        """
        examples = jax.eval_shape(
            lambda batch: jax.tree.map(lambda x: x[0], jax.tree.map(_example, batch)), batch
        )
        found = jax.eval_shape(
            lambda params, example: self._gradient(params, *example)[1], params, examples
        )
        paths = lay_out(scopes.leaf(), params).paths
        return {
            path: "factors" if isinstance(x, tuple) else "stored"
            for path, x in zip(paths, found, strict=True)
        }

    def _gradients(self, mesh: Any, params: Any, examples: Any) -> Any:
        """What `_gradient` returns for each example."""

        def compute(params: Any, *examples: Any) -> Any:
            return jax.vmap(lambda *example: self._gradient(params, *example))(*examples)

        try:
            return compute(params, *examples)
        except Exception:  # JAX cannot map every operation over an explicit axis, such as the gradient of a convolution
            if mesh is None:
                raise
        return _sharding.automatic(
            mesh,
            compute,
            _sharding.on_mesh(mesh, _sharding.batch_axes(examples)),
            params,
            *examples,
        )

    def _gradient(self, params: Any, *example: Any) -> Any:
        """The loss and what is with it, and the gradients by the leaves that are floats."""
        floats = [x for x in jax.tree.leaves(params) if _is_float(x)]

        def loss(floats: list[Any], *example: Any) -> Any:
            return self._loss(_tree_of(params, floats, lambda x: x), *example)

        if self._parts.by_factors:
            return _factored.factored_grad(loss, floats, *example)
        return jax.value_and_grad(loss, has_aux=True)(floats, *example)


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
    r"""Like `jax.value_and_grad`, but the gradient of each example is clipped before they are added
    up.

    .. math:: \frac1n \sum_{i=1}^n \nabla \ell_i \min(1, c / \|\nabla \ell_i\|)

    With the `l2` norm, scopes of whole leaves, and responses that keep the direction, no gradient
    of an example is made where a layer's inputs and derivatives are fewer numbers than it: their
    products give its norm ("ghost norms"), and the sum over the batch. This holds for dense layers,
    convolutions, embeddings and recurrent cells, in loops over time or over stacked layers, used
    once or shared; for whatever they are written with, and in one backward pass. All other
    gradients, such as those of biases, are stored for each example; `plan` tells which.

    Norms by factors are sums of squares in float32, for norms from 1e-18 to 1e18: an example above
    counts as not finite, one below as zero. Where a weight is used more than once and the parts of
    its gradient almost cancel, the norm is exact to the rounding of those parts. Sums are made with
    JAX's default precision of matrix products, as gradients are.

    Args:
        loss_fn: `(params, *example) -> loss` of one example, a scalar.
        threshold: how large an example's gradient may be: a number, a schedule, a dict from group
            name to these, or a `BatchThreshold`.
        scope: which numbers share one size.
        norm: how large they are.
        response: what happens to what is larger.
        reduce: `"mean"` over the examples that are not masked, or `"sum"`.
        microbatch: how many examples are worked on at once, in a loop; None for all.
        has_aux: whether `loss_fn` returns `(loss, aux)`.
        keep_batch_axis: whether `loss_fn` takes a batch, and is to be given batches of one.
        sharded_over: mapped axes (of `jax.shard_map`, `jax.pmap`) along which the batch is split:
            what is returned is that of all of it, but for what there is for each example. Every
            device must have whole parameters. Not needed under `jit`.

    Returns:
        A function `(params, *batch, mask=None, state=None) -> ((loss, seen), gradients)`, with the
        methods `init` and `plan`; see `ClippedGrad` and `ExampleStats`.

    Raises:
        TypeError: an argument is not what it should be, such as a rule that learns from one size at
            a time.
        ValueError: an argument is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from optaxclip import per_example
        >>> def loss(w, x, y):
        ...     return (x @ w - y) ** 2 / 2
        >>> x, y = jnp.array([[0.0, 4.0], [0.5, 0.0]]), jnp.array([2.0, 1.0])
        >>> (mean, seen), gradient = per_example.clipped_grad(loss, 1.0)(jnp.zeros(2), x, y)
        >>> mean, seen.sizes.ravel(), gradient
        (Array(1.25, dtype=float32), Array([8. , 0.5], dtype=float32), Array([-0.25, -0.5 ], dtype=float32))

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
        found = loss_fn(params, *example)
        return found if has_aux else (found, None)

    return ClippedGrad(
        loss, _Parts(threshold, scope, norm, response, reduce, sharded_over), microbatch
    )


class _Parts:
    """The four parts of a clip, for gradients that have the examples in front."""

    def __init__(
        self,
        threshold: Any,
        scope: Scope,
        norm: Norm,
        response: Response,
        reduce: str,
        sharded_over: Any,
    ) -> None:
        _validate.option("reduce", reduce, REDUCTIONS)
        self.rule = threshold if isinstance(threshold, BatchThreshold) else None
        self.threshold = as_thresholds(0.0 if self.rule else threshold)
        for rule in (
            self.threshold.values() if isinstance(self.threshold, dict) else [self.threshold]
        ):
            _validate.without_memory("threshold", rule)
        self.scope, self.norm, self.response, self.reduce = scope, norm, response, reduce
        self.axes = _sharding.names_of(sharded_over) or ()
        self.engine(None, ())  # what it refuses is refused here
        # The norm of a tree is that of its leaves' norms, and what keeps the direction does to a
        # leaf what it does to its norm.
        relative = norm.uses_params or getattr(self.threshold, "uses_params", False)
        direction = hasattr(getattr(response, "func", response), "target")
        self.by_factors = norm == norms.l2() and scope.axes is None and direction and not relative

    def engine(self, limits: Array | None, names: Any) -> optax.GradientTransformationExtraArgs:
        """The clip of one example."""
        threshold = self.threshold if limits is None else dict(zip(names, limits, strict=True))
        return clip(
            threshold,
            scope=self.scope,
            norm=self.norm,
            response=self.response,
            nonfinite="zero",
            sharded_over=(),
        )

    def init(self, params: Any) -> Any:
        """The state before the first step."""
        start: Any = clip(0.0, scope=self.scope, norm=self.norm, sharded_over=()).init(params)
        return start._replace(
            threshold=self.rule.init(len(start.reading.names.known)) if self.rule else ()
        )

    def clip_each(self, gradients: Any, state: Any, params: Any) -> tuple[Any, Reading, Array]:
        """Gradients, readings, and whether all of a gradient is finite, each with the examples in
        front.
        """
        if (
            self.scope.axes is not None
        ):  # a reading of many groups in a leaf is that of all devices, here of other examples
            _validate.not_mapped("scope", _sharding.manual_axes())
        names = state.reading.names.known
        engine = self.engine(self._limits(state), names)

        def one(gradient: Any) -> tuple[Any, Reading, Array]:
            start: Any = engine.init(gradient)
            after: Any
            clipped, after = engine.update(gradient, start._replace(step=state.step), params)
            layout = lay_out(self.scope, gradient)
            finite = [after.reading.size_before, *filter(_is_float, layout.others)]
            return clipped, after.reading, jnp.array([jnp.isfinite(x).all() for x in finite]).all()

        return jax.vmap(one)(gradients)

    def clip_factored(
        self, leaves: list[Any], state: Any, params: Any, mesh: Any, own: Array
    ) -> tuple[list[Any], Reading, Array, list[Array]]:
        """Leaves to be summed, readings, what is finite, and the factor `[batch]` of each leaf;
        leaves may be in factors.

        `own` is an array `[batch]`, by which an explicit mesh splits what there is for each
        example.
        """
        if not self.by_factors:
            clipped, reading, finite = self.clip_each(
                _tree_of(params, leaves, _nothing), state, params
            )
            return (
                jax.tree.leaves(clipped),
                reading,
                finite,
                [jnp.ones_like(own, jnp.float32)] * len(leaves),
            )
        out = _sharding.on_mesh(mesh, *_sharding.spec_on(mesh, own))
        sizes = [
            jnp.sqrt(_sharding.automatic(mesh, jax.vmap(_factored.squares), out, leaf))
            for leaf in leaves
        ]
        clipped, reading, finite = self.clip_each(_tree_of(params, sizes, _nothing), state, None)
        factors = [
            new / jnp.where(old > 0, old, 1)
            for old, new in zip(sizes, jax.tree.leaves(clipped), strict=True)
        ]
        return leaves, reading, finite, factors

    def reduced(self, total: Any, like: Any, mask: Array) -> Any:
        """The sum or the mean over all devices, in the dtypes of `like`."""
        total, divisor = self.over_all(total), 1
        if self.reduce == "mean":
            divisor = jnp.maximum(self.over_all(jnp.sum(mask)), 1)
        return jax.tree.map(
            lambda x, one: (x / divisor).astype(jnp.result_type(one)) if _is_float(x) else x,
            total,
            like,
        )

    def next(
        self, state: Any, reading: Reading, mask: Array, counted: Array, mesh: Any
    ) -> ClipState:
        """The state after a batch."""
        seen = _sharding.resharded((reading.measured, mask, counted), _sharding.on_mesh(mesh))
        measured, mask, counted = (_sharding.gathered(x, self.axes) for x in seen)
        reading = reading._replace(measured=measured)
        rule_state, limits = state.threshold, self._limits(state)
        if self.rule and limits is not None:
            learned = self.rule.learn(
                reading.size_before, counted, limits, rule_state, Context(state.step)
            )
            rule_state = jax.tree.map(
                lambda new, old: jnp.asarray(new, jnp.result_type(old)), learned, rule_state
            )
        weights = counted / jnp.maximum(jnp.sum(counted), 1)
        means = jnp.tensordot(weights, jnp.where(counted[:, None, None], reading.measured, 0), 1)
        events = jnp.array([(means[3] > 0).any(), (mask & ~counted).any()], jnp.int32)
        reading = state.reading._replace(
            measured=means.astype(state.reading.measured.dtype),
            counted=state.reading.counted + events,
        )
        return ClipState(jnp.asarray(optax.safe_increment(state.step)), rule_state, reading)

    def over_all(self, tree: Any) -> Any:
        """Sums over the devices that have the batch between them."""
        return jax.lax.psum(tree, self.axes) if self.axes else tree

    def _limits(self, state: Any) -> Array | None:
        """What the rule allows each group; None without a rule."""
        if not self.rule:
            return None
        return jnp.broadcast_to(
            self.rule.limit(state.threshold, Context(state.step)), (len(state.reading.names.known),)
        )


def _mask(mask: Any, size: int) -> Any:
    if mask is not None:
        _validate.mask("mask", mask, size)
    return np.ones(size, bool) if mask is None else mask


def _nobody() -> Any:
    return np.zeros(1, bool)


def _example(x: Any) -> Any:
    """The array; if it is of no examples, one of zeros in its place."""
    if x.shape[0]:
        return x
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = jax.random.key_data(x)
        return jax.random.wrap_key_data(
            jnp.zeros((1, *data.shape[1:]), data.dtype), impl=jax.random.key_impl(x)
        )
    return np.zeros((1, *x.shape[1:]), x.dtype)


def _like_one(x: Any) -> Any:
    """What has the shape and dtype of one example's gradient."""
    return jnp.zeros(x.shape[1:], x.dtype) if _is_float(x) else x


def _aligned(mesh: Any, batch: Any, mask: Any) -> tuple[Any, Array]:
    """The arrays and the mask, all split along the examples as one of the arrays is."""
    axes = _sharding.batch_axes(batch)

    def align(x: Any) -> Any:
        spec = _sharding.spec_on(mesh, x)
        return (
            x
            if spec[0] == axes
            else _sharding.resharded(x, _sharding.on_mesh(mesh, axes, *spec[1:]))
        )

    batch = jax.tree.map(align, batch)
    return batch, _sharding.varying_as(batch, align(jnp.asarray(mask)))


def _parted(mesh: Any, tree: Any, count: int) -> Any:
    """`[batch, ...]` as `[count, rest, ...]`.

    Every microbatch has rows from all over the batch, so where that is split over devices, each has
    some.
    """

    def part(x: Any) -> Any:
        return jnp.moveaxis(x.reshape(len(x) // count, count, *x.shape[1:]), 1, 0)

    def change(x: Any) -> Any:
        axes, *rest = _sharding.spec_on(mesh, x)
        even = mesh is not None and len(x) // count % _sharding.parts_of(mesh, axes) == 0
        return _sharding.automatic(
            mesh, part, _sharding.on_mesh(mesh, None, axes if even else None, *rest), x
        )

    return jax.tree.map(change, tree)


def _joined(mesh: Any, tree: Any) -> Any:
    """`[count, rest, ...]` as `[batch, ...]`."""

    def join(x: Any) -> Any:
        return jnp.moveaxis(x, 0, 1).reshape(math.prod(x.shape[:2]), *x.shape[2:])

    def change(x: Any) -> Any:
        return _sharding.automatic(
            mesh, join, _sharding.on_mesh(mesh, *_sharding.spec_on(mesh, x)[1:]), x
        )

    return jax.tree.map(change, tree)


def _tree_of(params: Any, floats: Sequence[Any], other: Callable[[Any], Any]) -> Any:
    """The tree of the parameters with these in the place of its floats, and of its other leaves
    `other(leaf)`.
    """
    own = iter(floats)
    return jax.tree.map(lambda x: next(own) if _is_float(x) else other(x), params)


def _nothing(x: Any) -> Any:
    return optax.MaskedNode()


def _no_gradient(x: Any) -> Any:
    """The gradient by what is no float, as `jax.grad` with `allow_int=True` has it."""
    return np.zeros(jnp.shape(x), jax.dtypes.float0)


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype if hasattr(x, "dtype") else jnp.result_type(x), jnp.inexact)
