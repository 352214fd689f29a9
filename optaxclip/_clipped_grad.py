"""What `per_example.clipped_grad` returns: a function, and its measurements of a batch."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from optaxclip import _batches, _factored, _sharding, _validate, scopes
from optaxclip._batches import Present
from optaxclip._examples import Parts
from optaxclip._layout import lay_out
from optaxclip._numerics import widen
from optaxclip._sensitivity import sensitivity
from optaxclip._types import ClipState


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


class ClippedGrad:
    """The result of `clipped_grad`: a function `(params, *batch)` with methods."""

    def __init__(self, loss: Callable[..., Any], parts: Parts, microbatch: int | None) -> None:
        self._loss, self._parts, self._microbatch = loss, parts, microbatch
        self._computed = functools.cache(
            lambda count: _sharding.compiled_on_mesh(functools.partial(self._compute, count=count))
        )

    def init(self, params: Any) -> ClipState:
        """Returns the state before the first step."""
        return self._parts.init(params)

    def __call__(
        self,
        params: Any,
        *batch: Any,
        mask: Any = None,
        weights: Any = None,
        center: Any = None,
        state: Any = None,
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
            weights: `[batch]`, not negative, how much each example counts: a gradient is clipped
                first and multiplied after, and a mean is divided by the sum of the weights.
            center: a tree like the gradients, around which they are clipped: the result is the
                center plus the mean of the clipped differences to it. Differences have no factors,
                so gradients are stored.
            state: from `init`, or `seen.state` of the last step; not needed if the threshold is a
                number or a dict of numbers.

        Raises:
            TypeError: `weights` are not numbers.
            ValueError: arrays differ in the length of their first axis, `microbatch` does not
                divide it, `sharded_over` names an axis that is not mapped here, a weight is
                negative, `center` is another tree, or is given with `reduce="sum"`.
        """
        size = _validate.batch("batch", batch)
        _sharding.all_bound("sharded_over", self._parts.axes)
        present, count = _batches.present(mask, weights, size), 1
        if center is not None:
            _validate.center(center, params)
        if size:
            if self._microbatch is not None:
                count = _validate.divided("microbatch", self._microbatch, size)
            return self._computed(count)(params, batch, present, state, center)
        # an empty batch: compute with one masked example, and cut it off the results
        state = self._parts.init(params) if state is None else state
        padded = jax.tree.map(_batches.at_least_one, batch)
        result = self._computed(1)(params, padded, _batches.nobody(), state, center)
        (loss, seen), gradients = result
        each = (seen.losses, seen.aux, seen.sizes, seen.clipped, seen.counted)
        losses, aux, sizes, clipped, counted = jax.tree.map(lambda x: x[:0], each)
        after = seen.state._replace(threshold=state.threshold)
        seen = ExampleStats(losses, aux, sizes, seen.limits, clipped, counted, seen.dropped, after)
        return (loss, seen), gradients

    def _compute(
        self, params: Any, batch: Any, present: Present, state: Any, center: Any, *, count: int
    ) -> tuple[tuple[Array, ExampleStats], Any]:
        """Computes the results for a batch that is not empty, in `count` microbatches."""
        mesh = _sharding.explicit_mesh((params, batch))
        batch, present = _batches.aligned(mesh, batch, present)
        state = self._parts.init(params) if state is None else state

        def one_pass(center: Any) -> tuple[Any, Any]:
            return self._pass(params, batch, present, state, center, mesh, count)

        return self._parts.repeated(one_pass, center)

    def _pass(
        self,
        params: Any,
        batch: Any,
        present: Present,
        state: Any,
        center: Any,
        mesh: Any,
        count: int,
    ) -> tuple[tuple[Array, ExampleStats], Any]:
        """Computes the results around one center."""
        parts = self._parts.around(center)
        floats = _batches.floats_of(params, params)
        middle = center if center is None else _batches.floats_of(center, params)
        sums, results = self._sums(parts, params, batch, present, state, middle, mesh, count)
        losses, aux, reading, counted = results
        measured = parts.measured(mesh, state, present.mask, reading, counted)
        like, totals = (_batches.tree_of(params, x, _batches.masked) for x in (floats, sums))
        of_loss, of_leaves = parts.divisors(like, present, reading, counted)
        weighed = jnp.where(counted, losses * present.weighed(counted), 0)
        loss = parts.reduced(jnp.sum(weighed), losses, of_loss)
        middles = middle and _batches.tree_of(params, middle, _batches.masked)
        gradients = jax.tree.leaves(parts.reduced(totals, like, of_leaves, middles))
        gradients = _batches.tree_of(params, gradients, _batches.no_gradient)
        return (loss, ExampleStats(losses, aux, **measured)), gradients

    def _sums(
        self,
        parts: Parts,
        params: Any,
        batch: Any,
        present: Present,
        state: Any,
        center: list[Any] | None,
        mesh: Any,
        count: int,
    ) -> tuple[list[Array], Any]:
        """Returns the sums of clipped gradients, and what is known of each example."""
        varied = _sharding.varying_as(batch, params)
        floats = _batches.floats_of(params, params)
        shardings = [_sharding.on_mesh(mesh, *_sharding.spec_on(mesh, x)) for x in floats]

        def some(totals: list[Array], microbatch: Any) -> tuple[Any, Any]:
            present, examples = microbatch
            (losses, aux), gradients = parts.gradients(self._loss, mesh, varied, examples)
            gradients = parts.shifted(gradients, center, mesh)
            clipped = parts.clip_factored(gradients, state, params, mesh, present.mask)
            leaves, reading, finite, factors = clipped
            counted = present.mask & finite
            weights = [present.weighed(counted, factor) for factor in factors]
            sums = [
                _sharding.automatic(mesh, _factored.weighted_sum, sharding, leaf, weight)
                for sharding, leaf, weight in zip(shardings, leaves, weights, strict=True)
            ]
            return list(map(jnp.add, totals, sums)), (losses, aux, reading, counted)

        zeros = [jnp.zeros(jnp.shape(x), widen(x).dtype) for x in floats]
        totals = _sharding.varying_as(batch, _sharding.resharded(zeros, shardings))
        if count == 1:
            return some(totals, (present, batch))
        parted = _batches.parted(mesh, (present, batch), count)
        totals, results = jax.lax.scan(some, totals, parted)
        return totals, _batches.joined(mesh, results)

    def sensitivity(self, neighbors: str, *, params: Any = None, state: Any = None) -> Array:
        r"""Returns the l2 norm by which one example changes the sum: the scale of private noise.

        .. math:: \Delta = \sqrt{\textstyle \sum_g C_g^2}, \qquad
            \Delta_{\text{replace}} = 2 \Delta

        This holds to the rounding of float32, for an example of weight 1; multiply it by the
        largest weight. It is known for sums, the `l2` norm, and every response except `clamp` and
        a response that you wrote.

        Args:
            neighbors: `"add_or_remove"` if neighboring data sets differ by one example that is
                there or not, `"replace"` if one example is another one.
            params: needed where the number of groups depends on them: by leaf, unit or element, in
                stacks, and for `scopes.group` with one limit for all.
            state: for limits that change, the state that this step gets; the first step without it.

        Raises:
            ValueError: `neighbors` is another word, or the sensitivity is not known.

        Example:
            >>> from optaxclip import per_example
            >>> loss = lambda params, x: (params["w"] @ x + params["b"]) ** 2
            >>> clipped = per_example.clipped_grad(loss, {"w": 3.0, "b": 4.0}, reduce="sum")
            >>> print(clipped.sensitivity("add_or_remove"), clipped.sensitivity("replace"))
            5.0 10.0

        References:
            Dwork and Roth, [The algorithmic foundations of differential
            privacy](https://doi.org/10.1561/0400000042), 2014.
        """
        return sensitivity(self._parts, neighbors, params, state)

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
            return jax.tree.map(lambda x: _batches.at_least_one(x)[0], batch)

        def leaves(params: Any, example: Any) -> Any:
            return self._parts.gradient(self._loss, params, *example)[1]

        shapes = jax.eval_shape(leaves, params, jax.eval_shape(first, batch))
        pairs = zip(lay_out(scopes.leaf(), params).paths, shapes, strict=True)
        return {path: "factors" if isinstance(x, tuple) else "stored" for path, x in pairs}
