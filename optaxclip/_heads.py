"""Scales the query and key weights of attention heads whose logits are too large."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from optaxclip import _validate, scopes
from optaxclip._layout import Layout, lay_out
from optaxclip._numerics import cast_like, widen
from optaxclip._rules import is_placeholder
from optaxclip._transform import transform
from optaxclip.responses import power

Parts = Callable[[str, Any], Any]
"""`(path, leaf) -> (layer, head axis, exponent)`, a list of these with slices, or None."""


class Part(NamedTuple):
    """A part of a leaf that produces the queries or the keys of one layer.

    Attributes:
        layer: the name of the layer, a key of `logits`.
        head_axis: the axis of the leaf that has an index for each head.
        exponent: the power of gamma to multiply by; `"query"` and `"key"` follow `alpha`.
        columns: the slice of the last axis that it is.
    """

    layer: str
    head_axis: int
    exponent: Any
    columns: slice = slice(None)


def on_heads(
    clip: optax.GradientTransformationExtraArgs, parts: Parts, alpha: Any
) -> optax.GradientTransformationExtraArgs:
    """Clips the logits of `update(..., logits={layer: [heads]})`; scales weights by what is left.

    The updates are weights. A head whose clipped logit is a share gamma of its logit has its
    weights multiplied by a power of gamma. The state is the clip's state,
    with one group for each layer.
    """

    def init(params: Any) -> Any:
        if is_placeholder(params):
            return clip.init(params)
        layout = lay_out(scopes.leaf(), params)
        heads = _heads(layout, _parts(parts, layout))
        return clip.init({layer: jnp.zeros(max(counts)) for layer, counts in heads.items()})

    def update(
        updates: Any, state: Any, params: Any = None, *, logits: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        layout = lay_out(scopes.leaf(), updates, params)
        of_leaves = _parts(parts, layout)
        heads = _heads(layout, of_leaves)
        _validate.logits(logits, heads)
        largest = {layer: _shared(logits[layer], min(counts)) for layer, counts in heads.items()}
        kept: Any = clip.update(largest, state, **extra_args)
        clipped, state = kept

        def scaled(leaf: Any, chosen: list[Part]) -> Array:
            new = widen(leaf)
            for part in chosen:
                sizes = largest[part.layer], clipped[part.layer]
                new = new.at[..., part.columns].set(
                    _scaled(new[..., part.columns], part, _exponent(part, alpha), *sizes)
                )
            return cast_like(new, leaf)

        leaves = zip(layout.gradients, of_leaves, strict=True)
        return layout.rebuild([scaled(*leaf) for leaf in leaves]), state

    return transform(init, update)


def _parts(parts: Parts, layout: Layout) -> list[list[Part]]:
    """Returns the parts of each leaf."""
    of_leaves = []
    for path, leaf in zip(layout.paths, layout.gradients, strict=True):
        given = parts(path, leaf)
        listed = [given] if _is_one(given) else given or []
        _validate.parts(path, jnp.shape(leaf), listed)
        of_leaves.append([Part(*part) for part in listed])
    return of_leaves


def _is_one(given: Any) -> bool:
    return isinstance(given, Sequence) and len(given) > 0 and isinstance(given[0], str)


def _heads(layout: Layout, of_leaves: list[list[Part]]) -> Mapping[str, list[int]]:
    """Returns for each layer the numbers of heads of its leaves."""
    heads: dict[str, list[int]] = {}
    for leaf, parts in zip(layout.gradients, of_leaves, strict=True):
        for part in parts:
            heads.setdefault(part.layer, []).append(jnp.shape(leaf)[part.head_axis])
    _validate.has_heads(heads, layout.paths)
    return heads


def _exponent(part: Part, alpha: Any) -> Any:
    by_name = {"query": alpha, "key": 1 - alpha}
    return by_name[part.exponent] if isinstance(part.exponent, str) else part.exponent


def _shared(logits: Any, fewest: int) -> Array:
    """Returns logits `[..., heads]`; query heads that share a key head get their largest."""
    logits = widen(jnp.asarray(logits))
    groups = logits.reshape(*logits.shape[:-1], fewest, -1)
    return jnp.broadcast_to(groups.max(-1, keepdims=True), groups.shape).reshape(logits.shape)


def _scaled(weights: Array, part: Part, exponent: Any, logits: Array, clipped: Array) -> Array:
    """Returns the weights times (clipped / logits)^exponent, by head.

    Logits that are not finite leave the weights as they are.
    """
    axis = part.head_axis % weights.ndim
    count = weights.shape[axis]
    # a stack of layers is in front, in the leaf as in the logits
    shape = [*logits.shape[:-1], *[1] * (weights.ndim - logits.ndim + 1)]
    shape[axis] = count
    known = jnp.isfinite(logits) & jnp.isfinite(clipped)
    each = [
        jnp.where(known, x, 0)[..., :: logits.shape[-1] // count].reshape(shape)
        for x in (logits, clipped)
    ]
    return power(exponent)(weights, *each)
