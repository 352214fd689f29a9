"""The machinery of `per_example`: one clip mapped over examples, sums and means over a batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from optaxclip import _factored, _sharding, _validate, norms, scopes
from optaxclip._batches import Present, floats_of, is_float, like_one, masked, tree_of
from optaxclip._clip import clip
from optaxclip._layout import lay_out
from optaxclip._numerics import widen
from optaxclip._record import recent_share
from optaxclip._types import ClipState, Context, Norm, Reading, Response, Scope
from optaxclip.thresholds.fixed import constant

REDUCTIONS = ("mean", "sum", "kept")


@dataclasses.dataclass(frozen=True)
class Parts:
    """The four parts of a clip, applied to gradients with a batch axis in front.

    Attributes:
        rule: a `BatchThreshold`, or None.
        threshold: the thresholds without memory; not used if there is a rule.
        scope: as for `clip`.
        norm: as for `clip`.
        response: as for `clip`.
        reduce: `"mean"`, `"sum"` or `"kept"`.
        iterate: how often to clip, each time around the last result.
        axes: mapped axes over which the batch is sharded.
        centered: whether gradients are clipped around a center, so that they have no factors.
    """

    rule: Any
    threshold: Any
    scope: Scope
    norm: Norm
    response: Response
    reduce: str
    iterate: int
    axes: tuple[Any, ...]
    centered: bool = False

    def __post_init__(self) -> None:
        _validate.option("reduce", self.reduce, REDUCTIONS)
        _validate.count("iterate", self.iterate)
        limits = self.threshold
        for one in limits.values() if isinstance(limits, dict) else [limits]:
            _validate.without_memory("threshold", one)
        self.engine(None, ())  # raises its errors here, not in the first step
        if isinstance(limits, dict):
            divided = scopes.divided(self.scope, limits.keys())
            object.__setattr__(self, "scope", divided)  # the state has the names of these groups
        _validate.reduction(self.reduce, self.centered or self.iterate > 1, self.scope.axes)

    @property
    def by_factors(self) -> bool:
        """Whether factors can take the place of gradients.

        Factors give the norm of each leaf. The norm of a group is the norm of these norms, and a
        response that keeps the direction scales each leaf as it scales the leaf's norm.
        """
        centered = self.centered or self.iterate > 1
        relative = self.norm.uses_params or getattr(self.threshold, "uses_params", False)
        direction = hasattr(getattr(self.response, "func", self.response), "target")
        whole = self.scope.axes is None and self.scope.batch is None
        return whole and self.norm == norms.l2() and direction and not relative and not centered

    def around(self, center: Any) -> "Parts":
        """Returns the parts for gradients around this center; None is no center."""
        return self if center is None else dataclasses.replace(self, centered=True)

    def repeated(self, one_pass: Callable[[Any], tuple[Any, Any]], center: Any) -> tuple[Any, Any]:
        """Calls `one_pass(center) -> (others, result)`, each time around the last result."""
        others, result = one_pass(center)
        for _ in range(self.iterate - 1):
            others, result = one_pass(result)
        return others, result

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
        threshold = self.threshold
        if limits is not None and self.scope.axes is None:
            threshold = constant(0.0)._replace(limit=lambda sizes, state, context: limits)
        elif limits is not None:
            threshold = dict(zip(names, limits, strict=True))
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

    def shifted(self, gradients: Any, center: Any, mesh: Any) -> Any:
        """Returns the gradients of examples as seen from a center."""

        def shift(x: Array, middle: Array) -> Array:
            out = _sharding.on_mesh(mesh, *_sharding.spec_on(mesh, x))
            return _sharding.automatic(mesh, lambda x, m: widen(x) - widen(m), out, x, middle)

        return gradients if center is None else jax.tree.map(shift, gradients, center)

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

    def reduced(self, total: Any, like: Any, divisors: Any, center: Any = None) -> Any:
        """Returns the sum or mean over all devices, around the center, in the dtypes of `like`.

        `divisors` is an array, or a tree of arrays that `total` starts with.
        """

        def divide(divisor: Array, totals: Any) -> Any:
            nonzero = jnp.where(divisor > 0, divisor, 1)
            return jax.tree.map(lambda x: x / nonzero if is_float(x) else x, totals)

        def finish(x: Any, one: Any, middle: Any = 0) -> Any:
            return (middle + x).astype(jnp.result_type(one)) if is_float(x) else x

        result = jax.tree.map(divide, divisors, self.over_all(total))
        centers = () if center is None else (center,)
        return jax.tree.map(finish, result, like, *centers)

    def divisors(
        self, tree: Any, present: Present, reading: Reading, counted: Array
    ) -> tuple[Array, Any]:
        """Returns what to divide the sum of losses by, and the sum of each leaf of the tree.

        With `"kept"`, a group is divided by the weights of the examples that the response kept.
        """
        if self.reduce == "sum":
            return jnp.ones(()), jnp.ones(())
        if self.reduce == "mean":
            total = self.over_all(present.total(present.mask))
            return total, total
        layout = lay_out(self.scope, tree)
        total = self.over_all(present.total(counted))
        dropped = (reading.clipped_share > 0) & (reading.size_after == 0)
        weights = present.weighed(counted)[:, None]
        kept = self.over_all(jnp.sum(jnp.where(dropped, 0, weights), 0))  # [groups]
        everywhere = jax.tree.map(lambda x: total, tree)
        return total, layout.replaced(everywhere, [kept[group] for group in layout.group_of])

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


def aggregated(
    parts: Parts, updates: Any, state: Any, params: Any, present: Present, mesh: Any, center: Any
) -> tuple[Any, Any]:
    """Clips the gradients of a batch around a center; returns the state, and the sum or mean."""
    parts = parts.around(center)
    floats = jax.tree.map(lambda x: x if is_float(x) else masked(x), updates)
    middles = center
    if center is not None:
        middles = tree_of(updates, floats_of(center, updates), masked)
    clipped, reading, finite = parts.clip_each(parts.shifted(floats, middles, mesh), state, params)
    counted = present.mask & finite
    weights = present.weighed(counted)

    def total(x: Any, clipped: Any) -> Any:
        out = _sharding.on_mesh(mesh, *_sharding.spec_on(mesh, x)[1:])
        if is_float(x):
            return _sharding.automatic(mesh, _factored.weighted_sum, out, clipped, weights)
        return _sharding.automatic(mesh, lambda x: x[0], out, x)

    totals = jax.tree.map(total, updates, clipped)
    _, divisors = parts.divisors(jax.tree.map(like_one, updates), present, reading, counted)
    result = parts.reduced(totals, updates, divisors, center)
    return parts.next(state, reading, present.mask, counted, mesh), result
