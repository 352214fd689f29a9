"""Finds states in anything that holds them, and gives each clip a name."""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip import _validate
from optaxclip._guard import GuardState
from optaxclip._types import ClipState, Reading

Labels = tuple[str, ...]
"""The keys of the dicts of states that a state stands in, outer dicts first."""


def states_of(tree: Any, kind: type) -> list[tuple[Labels, Any]]:
    """Returns the nodes of a type, with plain arrays in place of Flax's variables.

    Raises:
        TypeError: `tree` is an optimizer instead of its state.
    """
    _validate.not_a_transform("opt_state", tree)
    return [
        (labels, jax.tree.map(jnp.asarray, node, is_leaf=_wraps_an_array))
        for labels, node in _nodes(tree, kind, (), set())
    ]


def clips_of(opt_state: Any) -> list[tuple[Labels, ClipState]]:
    """Returns the state of every clip and monitor that records."""
    states = states_of(opt_state, ClipState)
    return [(labels, state) for labels, state in states if isinstance(state.reading, Reading)]


def guards_of(opt_state: Any) -> list[GuardState]:
    """Returns the state of every guard, outer guards first."""
    outer = [guard for _, guard in states_of(opt_state, GuardState)]
    return [guard for one in outer for guard in (one, *guards_of(one.inner))]


def without_common(labels: list[Labels]) -> list[Labels]:
    """Returns the labels without those outer ones that all of them share."""
    shared = 0
    while (
        all(len(one) > shared for one in labels) and len({one[: shared + 1] for one in labels}) == 1
    ):
        shared += 1
    return [one[shared:] for one in labels]


def distinct(names: list[str]) -> list[str]:
    """Returns the names, with a number behind each that is not the only one."""
    count = Counter(names)
    taken = {name for name in names if count[name] == 1}
    for k, name in enumerate(names):
        if count[name] > 1:
            numbered = (f"{name}_{number}" for number in itertools.count())
            names[k] = next(other for other in numbered if other not in taken)
            taken.add(names[k])
    return names


def _nodes(tree: Any, kind: type, labels: Labels, seen: set[int]) -> Iterator[tuple[Labels, Any]]:
    """Yields the nodes of a type, in order.

    It also searches the attributes of objects that JAX treats as leaves, such as `nnx.Optimizer`.
    """

    def is_leaf(node: Any) -> bool:
        return isinstance(node, kind) or _is_labelled(node)

    for node in jax.tree.leaves(tree, is_leaf=is_leaf):
        is_object = isinstance(getattr(node, "__dict__", None), dict) and not hasattr(node, "dtype")
        if isinstance(node, kind):
            yield labels, node
        elif _is_labelled(node):
            for key in sorted(node, key=str):
                yield from _nodes(node[key], kind, (*labels, str(key)), seen)
        elif is_object and id(node) not in seen:
            seen.add(id(node))
            yield from _nodes(vars(node), kind, labels, seen)


def _is_labelled(node: Any) -> bool:
    """Returns whether it is a dict of states, as `optax.partition` and `named_chain` have.

    States are tuples; a dict of parameters or of a trainer holds other things as well.
    """
    return (
        isinstance(node, Mapping)
        and bool(node)
        and all(isinstance(value, tuple) for value in node.values())
    )


def _wraps_an_array(node: Any) -> bool:
    return hasattr(node, "__jax_array__")
