"""The machinery of `per_example`: one clip mapped over examples, masks, batches on meshes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from optaxclip import _factored, _sharding, _validate, norms
from optaxclip._clip import clip
from optaxclip._layout import lay_out
from optaxclip._record import recent_share
from optaxclip._types import ClipState, Context, Norm, Reading, Response, Scope

REDUCTIONS = ("mean", "sum")


class Parts:
    """The four parts of a clip, applied to gradients with a batch axis in front.

    Args:
        rule: a `BatchThreshold`, or None.
        threshold: the thresholds without memory; not used if there is a rule.
        scope: as for `clip`.
        norm: as for `clip`.
        response: as for `clip`.
        reduce: `"mean"` or `"sum"`.
        axes: mapped axes over which the batch is sharded.
    """

    def __init__(
        self,
        rule: Any,
        threshold: Any,
        scope: Scope,
        norm: Norm,
        response: Response,
        reduce: str,
        axes: tuple[Any, ...],
    ) -> None:
        _validate.option("reduce", reduce, REDUCTIONS)
        self.rule, self.threshold = rule, threshold
        for one in threshold.values() if isinstance(threshold, dict) else [threshold]:
            _validate.without_memory("threshold", one)
        self.scope, self.norm, self.response, self.reduce = scope, norm, response, reduce
        self.axes = axes
        self.engine(None, ())  # raises its errors here, not in the first step
        # Factors give the norm of each leaf. The norm of a group is the norm of these norms, and a
        # response that keeps the direction scales each leaf as it scales the leaf's norm.
        relative = norm.uses_params or getattr(threshold, "uses_params", False)
        direction = hasattr(getattr(response, "func", response), "target")
        self.by_factors = norm == norms.l2() and scope.axes is None and direction and not relative

    def gradient(self, loss: Callable[..., Any], params: Any, *example: Any) -> Any:
        """Returns the loss of one example with its aux, and the gradients of the float leaves."""
        floats = [x for x in jax.tree.leaves(params) if is_float(x)]

        def loss_of(floats: list[Any], *example: Any) -> Any:
            return loss(tree_of(params, floats, lambda x: x), *example)

        if self.by_factors:
            return _factored.factored_grad(loss_of, floats, *example)
        return jax.value_and_grad(loss_of, has_aux=True)(floats, *example)

    def gradients(self, loss: Callable[..., Any], mesh: Any, params: Any, examples: Any) -> Any:
        """Maps `gradient` over the examples."""

        def compute(params: Any, *examples: Any) -> Any:
            return jax.vmap(lambda *example: self.gradient(loss, params, *example))(*examples)

        try:
            return compute(params, *examples)
        except Exception:
            # JAX cannot map every operation over an explicit mesh axis: the gradient of a
            # convolution, for example
            if mesh is None:
                raise
        out = _sharding.on_mesh(mesh, _sharding.batch_axes(examples))
        return _sharding.automatic(mesh, compute, out, params, *examples)

    def engine(self, limits: Array | None, names: Any) -> optax.GradientTransformationExtraArgs:
        """Returns the clip of one example."""
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
        """Returns the state before the first step."""
        start: Any = clip(0.0, scope=self.scope, norm=self.norm, sharded_over=()).init(params)
        groups = len(start.reading.names.known)
        return start._replace(threshold=self.rule.init(groups) if self.rule else ())

    def clip_each(self, gradients: Any, state: Any, params: Any) -> tuple[Any, Reading, Array]:
        """Clips the gradient of each example.

        Returns gradients, readings, and whether all of a gradient is finite, each `[batch, ...]`.
        """
        if self.scope.axes is not None:
            # the reading of a leaf with many groups is reduced over all devices, which here hold
            # different examples
            _validate.not_mapped("scope", _sharding.manual_axes())
        engine = self.engine(self._limits(state), state.reading.names.known)

        def one(gradient: Any) -> tuple[Any, Reading, Array]:
            start: Any = engine.init(gradient)
            after: Any
            clipped, after = engine.update(gradient, start._replace(step=state.step), params)
            layout = lay_out(self.scope, gradient)
            finite = [after.reading.size_before, *filter(is_float, layout.others)]
            return clipped, after.reading, jnp.array([jnp.isfinite(x).all() for x in finite]).all()

        return jax.vmap(one)(gradients)

    def clip_factored(
        self, leaves: list[Any], state: Any, params: Any, mesh: Any, part: Array
    ) -> tuple[list[Any], Reading, Array, list[Array]]:
        """Clips gradients whose leaves may be factors.

        Returns leaves to sum up, readings, what is finite, and for each leaf the factor `[batch]`
        by which it must be multiplied. `part` is an array `[batch]` with the sharding of the batch.
        """
        if not self.by_factors:
            tree = tree_of(params, leaves, masked)
            clipped, reading, finite = self.clip_each(tree, state, params)
            ones = [jnp.ones_like(part, jnp.float32)] * len(leaves)
            return jax.tree.leaves(clipped), reading, finite, ones
        out = _sharding.on_mesh(mesh, *_sharding.spec_on(mesh, part))
        squares = jax.vmap(_factored.squares)
        sizes = [jnp.sqrt(_sharding.automatic(mesh, squares, out, leaf)) for leaf in leaves]
        clipped, reading, finite = self.clip_each(tree_of(params, sizes, masked), state, None)
        pairs = zip(sizes, jax.tree.leaves(clipped), strict=True)
        factors = [new / jnp.where(old > 0, old, 1) for old, new in pairs]
        return leaves, reading, finite, factors

    def reduced(self, total: Any, like: Any, mask: Array) -> Any:
        """Returns the sum or the mean over all devices, in the dtypes of `like`."""
        total, divisor = self.over_all(total), 1
        if self.reduce == "mean":
            divisor = jnp.maximum(self.over_all(jnp.sum(mask)), 1)

        def divided(x: Any, one: Any) -> Any:
            return (x / divisor).astype(jnp.result_type(one)) if is_float(x) else x

        return jax.tree.map(divided, total, like)

    def measured(
        self, mesh: Any, state: Any, mask: Array, reading: Reading, counted: Array
    ) -> dict[str, Any]:
        """Returns the measurements of a batch, by the names of `ExampleStats`."""
        # all examples have the same limits
        first = _sharding.automatic(mesh, lambda x: x[:1], _sharding.on_mesh(mesh), reading.limit)
        return {
            "sizes": reading.size_before,
            "limits": _sharding.gathered(first, self.axes)[0],
            "clipped": reading.clipped_share > 0,
            "counted": counted,
            "dropped": self.over_all(jnp.sum(mask & ~counted, dtype=jnp.int32)),
            "state": self.next(state, reading, mask, counted, mesh),
        }

    def next(
        self, state: Any, reading: Reading, mask: Array, counted: Array, mesh: Any
    ) -> ClipState:
        """Returns the state after a batch."""
        seen = _sharding.resharded((reading.measured, mask, counted), _sharding.on_mesh(mesh))
        measured, mask, counted = (_sharding.gathered(x, self.axes) for x in seen)
        sizes = reading._replace(measured=measured).size_before
        rule_state, limits = state.threshold, self._limits(state)
        if self.rule and limits is not None:
            context = Context(state.step)
            learned = self.rule.learn(sizes, counted, limits, rule_state, context)
            # the state keeps its dtypes, whatever the rule computes in
            rule_state = jax.tree.map(
                lambda new, old: jnp.asarray(new, jnp.result_type(old)), learned, rule_state
            )
        weights = counted / jnp.maximum(jnp.sum(counted), 1)
        means = jnp.tensordot(weights, jnp.where(counted[:, None, None], measured, 0), 1)
        events = jnp.array([(means[3] > 0).any(), (mask & ~counted).any()], jnp.int32)
        before = state.reading
        reading = before._replace(
            measured=means.astype(before.measured.dtype),
            counted=before.counted + events,
            recent_share=recent_share(before.recent_share, state.step, events[0]),
        )
        return ClipState(jnp.asarray(optax.safe_increment(state.step)), rule_state, reading)

    def over_all(self, tree: Any) -> Any:
        """Sums over the devices that share the batch."""
        return jax.lax.psum(tree, self.axes) if self.axes else tree

    def _limits(self, state: Any) -> Array | None:
        """Returns the rule's limit of each group; None without a rule."""
        if not self.rule:
            return None
        limits = self.rule.limit(state.threshold, Context(state.step))
        return jnp.broadcast_to(limits, (len(state.reading.names.known),))


def mask_of(mask: Any, size: int) -> Any:
    """Returns the mask `[batch]`, all True if there is none."""
    if mask is not None:
        _validate.mask("mask", mask, size)
    return np.ones(size, bool) if mask is None else mask


def nobody() -> Any:
    """Returns the mask of a batch of one example that does not count."""
    return np.zeros(1, bool)


def at_least_one(x: Any) -> Any:
    """Returns the array; for an empty batch, a batch of one example of zeros."""
    if x.shape[0]:
        return x
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = jax.random.key_data(x)
        zeros = jnp.zeros((1, *data.shape[1:]), data.dtype)
        return jax.random.wrap_key_data(zeros, impl=jax.random.key_impl(x))
    return np.zeros((1, *x.shape[1:]), x.dtype)


def like_one(x: Any) -> Any:
    """Returns zeros of the shape and dtype of one example's gradient."""
    return jnp.zeros(x.shape[1:], x.dtype) if is_float(x) else x


def aligned(mesh: Any, batch: Any, mask: Any) -> tuple[Any, Array]:
    """Returns the arrays and the mask, all with the same sharding along the batch axis."""
    axes = _sharding.batch_axes(batch)

    def align(x: Any) -> Any:
        spec = _sharding.spec_on(mesh, x)
        if spec[0] == axes:
            return x
        return _sharding.resharded(x, _sharding.on_mesh(mesh, axes, *spec[1:]))

    batch = jax.tree.map(align, batch)
    return batch, _sharding.varying_as(batch, align(jnp.asarray(mask)))


def parted(mesh: Any, tree: Any, count: int) -> Any:
    """Reshapes `[batch, ...]` to `[count, rest, ...]`.

    Every microbatch takes rows from all over the batch. So if the batch is sharded over devices,
    each device has a share of every microbatch.
    """

    def part(x: Any) -> Any:
        return jnp.moveaxis(x.reshape(len(x) // count, count, *x.shape[1:]), 1, 0)

    def change(x: Any) -> Any:
        axes, *rest = _sharding.spec_on(mesh, x)
        even = mesh is not None and len(x) // count % _sharding.parts_of(mesh, axes) == 0
        out = _sharding.on_mesh(mesh, None, axes if even else None, *rest)
        return _sharding.automatic(mesh, part, out, x)

    return jax.tree.map(change, tree)


def joined(mesh: Any, tree: Any) -> Any:
    """Reshapes `[count, rest, ...]` to `[batch, ...]`."""

    def join(x: Any) -> Any:
        return jnp.moveaxis(x, 0, 1).reshape(math.prod(x.shape[:2]), *x.shape[2:])

    def change(x: Any) -> Any:
        out = _sharding.on_mesh(mesh, *_sharding.spec_on(mesh, x)[1:])
        return _sharding.automatic(mesh, join, out, x)

    return jax.tree.map(change, tree)


def tree_of(params: Any, floats: Sequence[Any], other: Callable[[Any], Any]) -> Any:
    """Replaces the floats of `params` by `floats`, and every other leaf by `other(leaf)`."""
    remaining = iter(floats)
    return jax.tree.map(lambda x: next(remaining) if is_float(x) else other(x), params)


def masked(x: Any) -> Any:
    """Returns a leaf that no clip measures."""
    return optax.MaskedNode()


def no_gradient(x: Any) -> Any:
    """Returns the gradient of a leaf without floats, like `jax.grad` with `allow_int=True`."""
    return np.zeros(jnp.shape(x), jax.dtypes.float0)


def is_float(x: Any) -> bool:
    """Returns whether a leaf holds floats or complex numbers."""
    return jnp.issubdtype(x.dtype if hasattr(x, "dtype") else jnp.result_type(x), jnp.inexact)
