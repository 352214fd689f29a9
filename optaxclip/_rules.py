"""LIMIT: the rules of a threshold, one for each block of sizes, and their states.

Where leaves are measured whole, there is one block of sizes and so one state. For scopes finer than
a leaf each leaf has a block, and the state of a clip holds their states as one, whose arrays are
trees like the parameters: `optax.tree.map_params` calls this parameter-shaped.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from optaxclip import _sharding, _validate
from optaxclip._layout import Layout
from optaxclip._lowering import Blocks, traced_once
from optaxclip._types import ClipState, Context, Scope, Threshold
from optaxclip.thresholds.combine import observed, side_by_side

Thresholds = Threshold | dict[Any, Threshold]


def _placeholder_type() -> type:
    """The type of Optax's placeholder for parameters.

    `optax.tree.map_params` calls `init` with it, to learn where a state has trees like them.
    """
    seen: list[type] = []

    def init(params: Any) -> Any:
        seen.append(type(params))
        return ()

    optax.tree_utils.tree_map_params(init, lambda x: x, ())
    return seen[0]


_PLACEHOLDER = _placeholder_type()


def is_placeholder(params: Any) -> bool:
    """Whether these are no parameters, but Optax asks where a state has trees like them."""
    return isinstance(params, _PLACEHOLDER)


class Rules:
    """The rules of one step, one for each block of sizes, and their states."""

    def __init__(
        self,
        threshold: Thresholds,
        layout: Layout,
        state: ClipState,
        extra: dict[str, Any],
        measure_params: Callable[[], Blocks],
    ):
        self.threshold, self.layout, self.state = threshold, layout, state.threshold
        self.rules = rules_of(threshold, layout)
        self.states = separate(threshold, layout, state.threshold)
        asked = any(rule.uses_params for rule in self.rules)
        self.param_sizes = measure_params() if asked else [None] * len(self.rules)
        self.context = Context(state.step, extra=extra)

    def limits(self, sizes: Blocks) -> Blocks:
        """How large the sizes may be; a limit that is negative or NaN is 0, never ascent."""

        def limit(size: Array, rule: Threshold, state: Any, param_size: Any) -> Array:
            context = self._context(sizes, rule)._replace(param_sizes=param_size)
            return _never_ascent(jnp.asarray(rule.limit(size, state, context), size.dtype))

        return sizes.map(limit, self.rules, self._states(sizes), self.param_sizes)

    def learn(self, sizes: Blocks, clipped_sizes: Blocks) -> Any:
        """The state after this step."""
        if not self._learns:
            return self.state
        param_sizes = self.param_sizes
        if isinstance(param_sizes, Blocks):
            param_sizes = param_sizes.each()
        each = (self.rules, sizes.each(), clipped_sizes.each(), self._states(sizes), param_sizes)
        states = []
        for rule, size, clipped_size, state, param_size in zip(*each, strict=True):
            context = self._context(sizes, rule)._replace(param_sizes=param_size)
            states.append(rule.learn(size, clipped_size, state, context))
        after = joined(self.threshold, self.layout, states, self.state)
        return _sharding.split_as(self.state, after)

    @property
    def _learns(self) -> bool:
        return bool(jax.tree.leaves(self.state))

    def _context(self, sizes: Blocks, rule: Threshold) -> Context:
        if not isinstance(self.threshold, dict) or self.layout.axes is None:
            return self.context._replace(blocks=tuple(sizes.stacks))
        if not rule.joint:  # a rule of one group sees no other group
            return self.context
        blocks = zip(self.rules, sizes.each(), strict=True)
        return self.context._replace(blocks=tuple(size for rule, size in blocks if rule.joint))

    def _states(self, sizes: Blocks) -> list[Any]:
        """The states, on an explicit mesh sharded as the sizes are."""
        if not self._learns:
            return self.states
        return list(map(_sharding.beside, self.states, sizes.each()))


@traced_once()
def _never_ascent(limits: Array) -> Array:
    return jnp.where(limits >= 0, limits, 0)


def rules_of(threshold: Thresholds, layout: Layout) -> list[Threshold]:
    """The rule of each block of sizes."""
    if isinstance(threshold, Threshold):
        return [observed(threshold)] * layout.blocks
    rules = [observed(threshold[key]) for key in layout.keys]
    return [side_by_side(rules, _order(layout.names))] if layout.axes is None else rules


def initial_state(threshold: Thresholds, layout: Layout, sizes: list[Array]) -> Any:
    """The state before the first step, for sizes of this kind."""
    rules = rules_of(threshold, layout)
    states = [rule.init(size) for rule, size in zip(rules, sizes, strict=True)]
    if layout.axes is not None:
        states = [_sharding.placed(state, size) for state, size in zip(states, sizes, strict=True)]
    return joined(threshold, layout, states)


def placeholder_state(threshold: Thresholds, scope: Scope, params: Any) -> Any:
    """The state with the placeholder where it has trees like the parameters."""
    rules = (
        [threshold]
        if isinstance(threshold, Threshold)
        else [threshold[name] for name in sorted(threshold, key=str)]
    )
    states = [rule.init(jnp.zeros((1,))) for rule in rules]
    if scope.axes is not None and _structure(threshold):
        return jax.tree.map(lambda _: params, states[0])
    if isinstance(threshold, Threshold):
        return states[0]
    return tuple(states) if jax.tree.leaves(states) else ()


def joined(threshold: Thresholds, layout: Layout, states: list[Any], like: Any = None) -> Any:
    """One state from the states of the blocks, with the boxes of an earlier one."""
    if layout.axes is None:
        return states[0]
    structure = _structure(threshold)
    if not structure:
        return tuple(states[i] for i in _order(layout.names))
    rows = [structure.flatten_up_to(state) for state in states]
    columns = [[row[k] for row in rows] for k in range(structure.num_leaves)]
    if like is None:
        return structure.unflatten(map(layout.filled, columns))
    return structure.unflatten(map(layout.replaced, structure.flatten_up_to(like), columns))


def separate(threshold: Thresholds, layout: Layout, state: Any) -> list[Any]:
    """The state of each block."""
    if layout.axes is None:
        return [state]
    structure = _structure(threshold)
    if not structure:
        states: dict[int, Any] = dict(zip(_order(layout.names), state, strict=True))
        return [states[i] for i in range(len(states))]
    trees = structure.flatten_up_to(state)
    for tree in trees:
        _validate.state_tree(layout.treedef, tree)
    columns = [layout.of(tree) for tree in trees]
    return [structure.unflatten([column[k] for column in columns]) for k in range(layout.blocks)]


def _structure(threshold: Thresholds) -> Any:
    """The structure of the state of one block; None if the rules differ in it."""
    one = jax.ShapeDtypeStruct((1,), jnp.float32)
    rules = [threshold] if isinstance(threshold, Threshold) else threshold.values()
    structures = {jax.tree.structure(jax.eval_shape(rule.init, one)) for rule in rules}
    return structures.pop() if len(structures) == 1 else None


def _order(names: list[Any]) -> list[int]:
    """Positions by name, so that a state does not depend on the order of groups in a tree."""
    return sorted(range(len(names)), key=lambda i: str(names[i]))
