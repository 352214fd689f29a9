"""States of threshold rules in the state of a clip.

For whole leaves there is one block of sizes and so one state. For scopes finer than a leaf each
leaf has one, and they stand together as one state whose arrays are trees like the parameters: what
`optax.tree.map_params` calls parameter-shaped.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaxclip import _validate
from optaxclip._layout import Layout
from optaxclip._types import Scope, Threshold
from optaxclip.thresholds.combine import observed, side_by_side

Rules = Threshold | dict[Any, Threshold]


def _placeholder_type() -> type:
    """The type of what Optax gives to `init` in place of parameters, to learn where a state has
    trees like them.
    """
    found: list[type] = []

    def init(params: Any) -> Any:
        found.append(type(params))
        return ()

    optax.tree_utils.tree_map_params(init, lambda x: x, ())
    return found[0]


_PLACEHOLDER = _placeholder_type()


def is_placeholder(params: Any) -> bool:
    """Whether these are no parameters, but Optax asks where a state has trees like them."""
    return isinstance(params, _PLACEHOLDER)


def rules_of(threshold: Rules, layout: Layout) -> list[Threshold]:
    """The rule of each block of sizes."""
    if isinstance(threshold, Threshold):
        return [observed(threshold)] * layout.blocks
    rules = [observed(threshold[name]) for name in layout.names]
    return [side_by_side(rules, _order(layout.names))] if layout.axes is None else rules


def placeholder_state(threshold: Rules, scope: Scope, params: Any) -> Any:
    """The state with the placeholder where it has trees like the parameters."""
    rules = (
        [threshold]
        if isinstance(threshold, Threshold)
        else [threshold[name] for name in sorted(threshold, key=str)]
    )
    states = [rule.init(jnp.zeros((1,))) for rule in rules]
    if scope.axes is not None and _structure(threshold):
        return jax.tree.map(lambda _: params, states[0])
    return states[0] if isinstance(threshold, Threshold) else tuple(states)


def joined(threshold: Rules, layout: Layout, states: list[Any], like: Any = None) -> Any:
    """One state from the states of the blocks; its trees are `like` those of an earlier one, boxes
    included.
    """
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


def separate(threshold: Rules, layout: Layout, state: Any) -> list[Any]:
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


def _structure(threshold: Rules) -> Any:
    """The structure of the state of one block; None if leaves have rules whose states differ in it."""
    one = jax.ShapeDtypeStruct((1,), jnp.float32)
    rules = [threshold] if isinstance(threshold, Threshold) else threshold.values()
    found = {jax.tree.structure(jax.eval_shape(rule.init, one)) for rule in rules}
    return found.pop() if len(found) == 1 else None


def _order(names: list[Any]) -> list[int]:
    """Positions by name, so that a state does not depend on the order of groups in a tree."""
    return sorted(range(len(names)), key=lambda i: str(names[i]))
