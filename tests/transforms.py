"""The table of public transforms, and what each is in NumPy. The contract runs over all of it."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import optax

import optaxclip

Group = list[tuple[int, Any]]  # (leaf, index into it) of the numbers that share a size


def whole_tree(leaves: list[np.ndarray]) -> Iterator[Group]:
    yield [(i, ...) for i in range(len(leaves))]


def each_leaf(leaves: list[np.ndarray]) -> Iterator[Group]:
    yield from ([(i, ...)] for i in range(len(leaves)))


def each_unit(leaves: list[np.ndarray]) -> Iterator[Group]:
    for i, leaf in enumerate(leaves):
        if sum(length != 1 for length in leaf.shape) <= 1:
            yield [(i, ...)]
        elif leaf.ndim < 4:
            yield from ([(i, (slice(None), *rest))] for rest in np.ndindex(*leaf.shape[1:]))
        else:
            yield from ([(i, (..., k))] for k in range(leaf.shape[-1]))


def each_element(leaves: list[np.ndarray]) -> Iterator[Group]:
    for i, leaf in enumerate(leaves):
        yield from ([(i, index)] for index in np.ndindex(*leaf.shape))


def l2(x: np.ndarray, params: Any = None) -> float:
    return float(np.sqrt(np.sum(np.abs(x) ** 2)))


def rms(x: np.ndarray, params: Any = None) -> float:
    return float(np.sqrt(np.mean(np.abs(x) ** 2)))


def unlimited(params: np.ndarray) -> float:
    return np.inf


class Case(NamedTuple):
    """One transform, with the limits scaled by `scale`, and the same in words of NumPy."""

    name: str
    make: Callable[..., optax.GradientTransformationExtraArgs]  # (scale, **options)
    groups: Callable[[list[np.ndarray]], Iterator[Group]]
    norm: Callable[..., float] = l2  # (numbers of a group, its parameters)
    # of a group with these parameters, at scale 1, at the first step
    limit: Callable[[np.ndarray], float] = lambda params: 1.0
    bounds: tuple[float, float] | None = None  # instead, for limits that differ by sign
    schedule: bool = True  # whether the scale may be a schedule
    remembers: bool = False  # whether a step depends on the steps before


CASES = [
    Case("clip", lambda s, **o: optaxclip.clip(s, optaxclip.scopes.tree(), **o), whole_tree, l2),
    Case(
        "clip",
        lambda s, **o: optaxclip.clip(
            s, scope=optaxclip.scopes.leaf(), norm=optaxclip.norms.l1(), **o
        ),
        each_leaf,
        lambda x, params=None: float(np.sum(np.abs(x))),
    ),
    Case("clip_by_value", lambda s, **o: optaxclip.clip_by_value(s, **o), each_element, l2),
    Case(
        "clip_by_value",
        lambda s, **o: optaxclip.clip_by_value(-2 * s, s, **o),
        each_element,
        l2,
        bounds=(-2.0, 1.0),
    ),
    Case("clip_by_norm", lambda s, **o: optaxclip.clip_by_norm(s, **o), each_leaf, l2),
    Case(
        "clip_by_global_norm", lambda s, **o: optaxclip.clip_by_global_norm(s, **o), whole_tree, l2
    ),
    Case(
        "clip_by_global_norm",
        lambda s, **o: optaxclip.clip_by_global_norm(s, norm=optaxclip.norms.lp(3), **o),
        whole_tree,
        lambda x, params=None: float(np.sum(np.abs(x) ** 3) ** (1 / 3)),
    ),
    Case("clip_by_block_rms", lambda s, **o: optaxclip.clip_by_block_rms(s, **o), each_leaf, rms),
    Case(
        "adaptive_grad_clip",
        lambda s, **o: optaxclip.adaptive_grad_clip(0.1 * s, **o),
        each_unit,
        l2,
        limit=lambda params: 0.1 * max(l2(params), 1e-3),
    ),
    Case(
        "clip_by_trust_ratio",
        lambda s, **o: optaxclip.clip_by_trust_ratio(s, **o),
        each_leaf,
        l2,
        limit=lambda params: l2(params) or np.inf,
    ),
    Case(
        "clip_after",
        lambda s, **o: optaxclip.clip_after(
            optax.identity(), optaxclip.clip_by_global_norm(s, **o), measured=lambda g, state: g
        ),
        whole_tree,
    ),
    Case("zclip", lambda s, **o: optaxclip.zclip(max_norm=s, **o), whole_tree, remembers=True),
    Case(
        "adagc",
        lambda s, **o: optaxclip.adagc(max_norm=s, scope=optaxclip.scopes.tree(), **o),
        whole_tree,
        remembers=True,
    ),
    Case(
        "clippy",
        lambda s, **o: optaxclip.clippy(0.1 * s, absolute=1e-7 * s, **o),
        each_leaf,
        lambda x, params: float(np.max(np.abs(x) / (0.1 * np.abs(params) + 1e-7), initial=0.0)),
        schedule=False,
    ),
    Case(
        "error_feedback",
        lambda s, **o: optaxclip.error_feedback(optaxclip.clip_by_value(s, **o)),
        each_element,
        remembers=True,
    ),
    *[
        Case(
            name,
            lambda s, name=name, **o: getattr(optaxclip, name)(**o),
            groups,
            l2,
            unlimited,
            None,
            False,
            True,
        )
        for name, groups in {
            "autoclip": whole_tree,
            "quantile_clip": whole_tree,
            "history_clip": whole_tree,
            "log_norm_clip": whole_tree,
            "growth_clip": each_leaf,
            "spam_clip": each_element,
        }.items()
    ],
]
# What does more than shrink: the parts of the contract that are not about limits hold for these as
# well.
SCALERS = [
    Case("gradient_stabilizer", lambda s, **o: optaxclip.gradient_stabilizer(**o), each_leaf),
    Case("scale_by_stable_adam", lambda s, **o: optaxclip.scale_by_stable_adam(s, **o), each_leaf),
    Case("spectral_clip", lambda s, **o: optaxclip.spectral_clip(s, **o), each_leaf),
    Case(
        "spectral_clip",
        lambda s, **o: optaxclip.spectral_clip(s, **{"scope": "value", **o}),
        each_leaf,
    ),
    Case(
        "spectral_clip",
        lambda s, **o: optaxclip.spectral_clip(
            s, response=optaxclip.responses.smooth, iterations=10, **o
        ),
        each_leaf,
    ),
]

# What limits the weights after a step: it has no limits of updates, and zeros need not stay zeros.
KEEPERS = [
    Case("max_norm", lambda s, **o: optaxclip.max_norm(s, **o), each_unit),
    Case(
        "keep_params",
        lambda s, **o: optaxclip.keep_params(optaxclip.spam_clip(**o)),
        each_element,
    ),
]


def expected(
    case: Case, updates: list[np.ndarray], params: list[np.ndarray], scale: float = 1.0
) -> list[np.ndarray]:
    """The clipped leaves, in float64, group by group."""
    wide = [
        np.asarray(leaf, np.result_type(leaf.dtype if leaf.dtype.kind == "c" else float, float))
        for leaf in updates
    ]
    if case.bounds is not None:
        return [np.clip(leaf, case.bounds[0] * scale, case.bounds[1] * scale) for leaf in wide]
    out = [leaf.copy() for leaf in wide]
    for group in case.groups(wide):
        size, limit = (
            group_size(case, group, wide, params),
            scale * case.limit(gather(group, params)),
        )
        for i, index in group:
            out[i][index] = wide[i][index] * (limit / size) if size > limit else wide[i][index]
    return out


def gather(group: Group, leaves: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(leaves[i][index])) for i, index in group]).astype(
        complex if any(leaves[i].dtype.kind == "c" for i, _ in group) else float
    )


def group_size(
    case: Case, group: Group, leaves: list[np.ndarray], params: list[np.ndarray]
) -> float:
    """The size of a group in float64, scaled so that nothing overflows."""
    numbers = gather(group, leaves)
    top = np.max(np.abs(numbers), initial=0.0)
    return (
        top * case.norm(numbers / top, gather(group, params))
        if 0 < top < np.inf
        else 0.0
        if top == 0
        else np.nan
    )
