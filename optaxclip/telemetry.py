"""Reads what clipping did from an optimizer state.

Every `clip` keeps a `Reading` of its last step, and counts of all steps, in its state. `metrics`
finds them at any depth of the state and returns a dict of arrays, which any logger can write. It
works under `jit`, `scan` and `vmap`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from optaxclip import _validate, norms, scopes
from optaxclip._clip import clip
from optaxclip._guard import GuardState, Watch
from optaxclip._layout import by_path
from optaxclip._probe import Probe as Probe
from optaxclip._probe import probe as probe
from optaxclip._probe import probed as probed
from optaxclip._types import ClipState, Norm, Reading, Scope
from optaxclip.thresholds.ranks import BINS, FIRST, History, Sketch, middle, remember

__all__ = [
    "readings",
    "group_names",
    "metrics",
    "monitor",
    "last_sizes",
    "Suggestion",
    "suggest",
    "Probe",
    "probe",
    "probed",
]


def __dir__() -> list[str]:
    return __all__


# multiples of the mean; the range is the recommendation of Pascanu et al. (2013)
FACTORS = (0.5, 1.0, 2.0, 5.0, 10.0)
QUANTILES = (0.5, 0.9, 0.95, 0.99)


def readings(opt_state: Any) -> list[Reading]:
    """Returns every `Reading` in an optimizer state, in the order of the chain.

    Args:
        opt_state: the state of any transform at any nesting (`optax.chain`, `masked`, `partition`,
            `MultiSteps`, `inject_hyperparams`, ...), or anything that holds such states: a Flax
            `TrainState` or `nnx.Optimizer`, a dataclass, a dict.

    Raises:
        TypeError: `opt_state` is an optimizer instead of its state.

    Example:
        >>> import jax.numpy as jnp, optax, optaxclip
        >>> optimizer = optax.chain(optaxclip.clip_by_global_norm(1.0), optax.adam(1e-3))
        >>> params = {"w": jnp.array([3.0, 4.0])}
        >>> _, opt_state = optimizer.update(params, optimizer.init(params))
        >>> [reading.size_before for reading in optaxclip.telemetry.readings(opt_state)]
        [Array([5.], dtype=float32)]
    """
    return [reading for _, reading in _clips(opt_state)]


def group_names(reading: Reading) -> list[str]:
    """Returns the groups of a reading: paths of leaves, names of groups, or `"tree"`."""
    return list(reading.names.known or ())


def metrics(opt_state: Any, params: Any = None, prefix: str = "clip") -> dict[str, Array]:
    """Returns the last step's measurements and counts over all steps, as a dict of arrays.

    | key | number |
    |---|---|
    | `clip/size_before` | largest size before clipping |
    | `clip/size_after`, `clip/limit` | of the same group |
    | `clip/scale` | smallest ratio of size after to size before |
    | `clip/clipped_share` | share of the group over its limit, mean over groups; of elements, 1 \
if any in the leaf was clipped, and the exact share with `record="full"` |
    | `clip/largest` | index of the largest group in `group_names(reading)` |
    | `clip/steps` | steps that the clip has seen |
    | `clip/clipped_steps` | steps with something clipped |
    | `clip/nonfinite_steps` | steps with a size that was not finite |
    | `clip/skipped_steps` | steps that guards skipped, if there are guards |
    | `clip/watched` | norm or loss that `skip_spikes` watched |
    | `clip/watched_limit` | its limit |

    The keys are always the same. Before the first step all values are NaN, except `clip/largest`
    (-1) and the counts (0).

    The values change only when the clip runs. Inside `optax.MultiSteps` they repeat for each
    micro-batch until the next step; inside a guard they repeat for each skipped step. `clip/steps`
    counts the steps of the clip.

    If a state holds more than one clip, their keys begin with `clip_0`, `clip_1` and so on, in the
    order of the chain. A state that is vmapped over seeds gives arrays over seeds. Without a clip
    that records, the dict is empty.

    Args:
        opt_state: as for `readings`.
        params: if given, and if there is more than one group, the dict also has the numbers of
            every group by name: `clip/size_before/encoder/kernel`.
        prefix: the beginning of every key.

    Raises:
        TypeError: `opt_state` is an optimizer instead of its state.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> clip = optaxclip.clip_by_norm(1.0)
        >>> grads = {"b": jnp.array([0.5]), "w": jnp.array([3.0, 4.0])}
        >>> _, state = clip.update(grads, clip.init(grads))
        >>> for name, value in optaxclip.telemetry.metrics(state, grads).items():
        ...     print(f"{name:24} {value:.3g}")
        clip/size_before         5
        clip/size_after          1
        clip/limit               1
        clip/scale               0.2
        clip/clipped_share       0.5
        clip/largest             1
        clip/steps               1
        clip/clipped_steps       1
        clip/nonfinite_steps     0
        clip/size_before/b       0.5
        clip/size_after/b        0.5
        clip/limit/b             1
        clip/clipped_share/b     0
        clip/size_before/w       5
        clip/size_after/w        1
        clip/limit/w             1
        clip/clipped_share/w     1
    """
    clips = _clips(opt_state)
    numbers: dict[str, Array] = {}
    for i, (state, reading) in enumerate(clips):
        name = prefix if len(clips) == 1 else f"{prefix}_{i}"
        for key, value in _of_all_groups(state.step, reading).items():
            numbers[f"{name}/{key}"] = value
        groups = group_names(reading)
        if params is not None and len(groups) > 1:
            for k, group in enumerate(groups):
                for key in ("size_before", "size_after", "limit", "clipped_share"):
                    value = getattr(reading, key)[..., k]
                    numbers[f"{name}/{key}/{group}"] = _once_seen(state.step, value)
    guards = _guards(opt_state)
    if guards:
        skipped = [guard.skipped_steps for guard in guards]
        numbers[f"{prefix}/skipped_steps"] = sum(skipped[1:], skipped[0])
    watches = [(guard.steps, guard.watch) for guard in guards if isinstance(guard.watch, Watch)]
    for i, (steps, watch) in enumerate(watches):
        number = "" if len(watches) == 1 else f"_{i}"
        numbers[f"{prefix}/watched{number}"] = _once_seen(steps, watch.size)
        numbers[f"{prefix}/watched_limit{number}"] = _once_seen(steps, watch.limit)
    return numbers


def _once_seen(steps: Array, value: Array, otherwise: float = jnp.nan) -> Array:
    """Returns the value of the last step; `otherwise` before the first step."""
    return jnp.where(steps > 0, value, jnp.asarray(otherwise, jnp.result_type(value)))


def _of_all_groups(step: Array, reading: Reading) -> dict[str, Array]:
    measured = reading.measured
    if not measured.shape[-1]:  # a tree without floats: as if it had one group of size 0
        measured = jnp.pad(measured, [(0, 0)] * (measured.ndim - 1) + [(0, 1)])
    before, after, limit, share = (measured[..., i, :] for i in range(4))
    largest = jnp.argmax(before, -1)  # the first NaN, if there is one

    def of_largest(values: Array) -> Array:
        return jnp.take_along_axis(values, largest[..., None], -1)[..., 0]

    last = {
        "size_before": of_largest(before),
        "size_after": of_largest(after),
        "limit": of_largest(limit),
        "scale": jnp.min(jnp.where(before == 0, 1, after / jnp.where(before == 0, 1, before)), -1),
        "clipped_share": jnp.mean(share, -1),
    }
    return {key: _once_seen(step, value) for key, value in last.items()} | {
        "largest": _once_seen(step, largest, -1),
        "steps": step,
        "clipped_steps": reading.clipped_steps,
        "nonfinite_steps": reading.nonfinite_steps,
    }


@_validate.checks_keywords
def monitor(
    *,
    scope: Scope = scopes.tree(),
    norm: Norm = norms.l2(),
    history: int = 100,
    sharded_over: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Measures updates and passes them on unchanged, NaN included.

    `readings` and `metrics` show what it measured. Its state also holds the last sizes, and a
    sketch of the distribution of all sizes; `suggest` proposes thresholds from the sketch. Sizes
    that are zero or not finite are not remembered.

    Args:
        scope: which numbers share a size.
        norm: which norm.
        history: how many of the last sizes to remember.
        sharded_over: as for `clip`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `history` is below 1.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> monitor = optaxclip.telemetry.monitor(history=3)
        >>> state = monitor.init(jnp.zeros(1))
        >>> for size in 1.0, 2.0, 3.0, 40.0:
        ...     _, state = monitor.update(jnp.array([size]), state)
        >>> optaxclip.telemetry.last_sizes(state)
        {'tree': array([40.,  3.,  2.], dtype=float32)}
    """
    inner = clip(remember(history), scope=scope, norm=norm, sharded_over=sharded_over)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        return updates, inner.update(updates, state, params, **extra_args)[1]

    return optax.GradientTransformationExtraArgs(inner.init, update)


def last_sizes(opt_state: Any) -> dict[str, np.ndarray]:
    """Returns the last sizes of each group of every `monitor`, newest first.

    The array of a group is `[history]`; for a scope finer than a leaf it is `[history, groups]` for
    each leaf.
    """
    by_name = {}
    for name, history in _histories(opt_state):
        last = history.last.reshape(len(history.last), -1)
        last = last[: np.count_nonzero(last, 0).max(initial=0)]
        by_name[name] = last[:, 0] if last.shape[1] == 1 else last
    return by_name


class Suggestion(NamedTuple):
    """A threshold to try.

    Attributes:
        group: the group it is for.
        candidate: how it was chosen, such as `"quantile 0.9"` or `"2 x mean"`.
        threshold: the number.
        clipped_share: the share of all sizes so far that it would have clipped.
    """

    group: str
    candidate: str
    threshold: float
    clipped_share: float


def suggest(opt_state: Any) -> list[Suggestion]:
    """Suggests thresholds, from the sizes that a `monitor` in the chain has measured.

    The candidates are quantiles of the sizes, and half to ten times their mean. The share that
    would have been clipped does not predict training quality: clipping changes the gradients that
    follow. Sizes are exact for the first 1024 steps and within 1 % after that. It needs concrete
    values, so it does not work under `jit`.

    Args:
        opt_state: as for `readings`, with a `monitor` that has seen updates.

    Returns:
        For each group of each monitor, one `Suggestion` per candidate, in ascending order. The
        units of a leaf are counted together.

    Example:
        >>> import jax, jax.numpy as jnp, optaxclip
        >>> monitor = optaxclip.telemetry.monitor()
        >>> state = monitor.init(jnp.zeros(1))
        >>> for size in jnp.append(jnp.linspace(0.5, 1.5, 99), 100.0):
        ...     _, state = monitor.update(size[None], state)
        >>> for line in optaxclip.telemetry.suggest(state):
        ...     print(f"{line.candidate:14} {line.threshold:6.2f} {line.clipped_share:4.0%}")
        0.5 x mean       1.00  51%
        quantile 0.5     1.01  50%
        quantile 0.9     1.41  10%
        quantile 0.95    1.46   5%
        1 x mean         1.99   1%
        quantile 0.99    2.49   1%
        2 x mean         3.98   1%
        5 x mean         9.95   1%
        10 x mean       19.90   1%

    References:
        Pascanu, Mikolov and Bengio, [On the difficulty of training recurrent neural
        networks](https://arxiv.org/abs/1211.5063), 2013, for the multiples of the mean.
    """
    lines = []
    for name, history in _histories(opt_state):
        sizes, counts = _distribution(history.sketch)
        if not counts.size:
            continue
        mean = np.average(sizes, weights=counts)
        candidates = {f"{factor:g} x mean": factor * mean for factor in FACTORS}
        candidates |= {f"quantile {q:g}": _quantile(sizes, counts, q) for q in QUANTILES}
        for candidate, threshold in sorted(candidates.items(), key=lambda item: item[1]):
            share = counts[sizes > threshold].sum() / counts.sum()
            lines.append(Suggestion(name, candidate, float(threshold), float(share)))
    return lines


def _states_of(tree: Any, kind: type) -> list[Any]:
    """Returns the nodes of a type in a tree, with plain arrays in place of Flax's variables."""
    _validate.not_a_transform("opt_state", tree)
    return [
        jax.tree.map(jnp.asarray, node, is_leaf=_wraps_an_array)
        for node in _nodes(tree, kind, set())
    ]


def _nodes(tree: Any, kind: type, seen: set[int]) -> Iterator[Any]:
    """Yields the nodes of a type, in order.

    It also searches the attributes of objects that JAX treats as leaves, such as `nnx.Optimizer`.
    """
    for node in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind)):
        is_object = isinstance(getattr(node, "__dict__", None), dict) and not hasattr(node, "dtype")
        if isinstance(node, kind):
            yield node
        elif is_object and id(node) not in seen:
            seen.add(id(node))
            yield from _nodes(vars(node), kind, seen)


def _clips(opt_state: Any) -> list[tuple[ClipState, Reading]]:
    """Returns the state of every clip that records, and its reading."""
    states = _states_of(opt_state, ClipState)
    return [(state, state.reading) for state in states if isinstance(state.reading, Reading)]


def _guards(opt_state: Any) -> list[GuardState]:
    """Returns the state of every guard, outer guards first."""
    nested = [(outer, *_guards(outer.inner)) for outer in _states_of(opt_state, GuardState)]
    return [guard for guards in nested for guard in guards]


def _wraps_an_array(node: Any) -> bool:
    return hasattr(node, "__jax_array__")


def _histories(opt_state: Any) -> list[tuple[str, History]]:
    """Returns the memory of each group of every monitor, with its name, in NumPy."""
    histories = []
    for state, reading in _clips(opt_state):
        if not isinstance(state.threshold, History):
            continue
        _validate.one_run("opt_state", state.step.shape)
        names, history = group_names(reading), jax.tree.map(np.asarray, state.threshold)
        origin = history.sketch.origin
        if isinstance(origin, np.ndarray) and origin.shape == (len(names),):  # `[groups]`
            for k, name in enumerate(names):
                of_group = jax.tree.map(lambda x, k=k: x[..., k : k + 1], history)
                histories.append((name, of_group))
        else:  # a tree like the parameters
            last, first, origin, counts = map(by_path, (history.last, *history.sketch))
            for name in names:
                sketch = Sketch(first[name], origin[name], counts[name])
                histories.append((name, History(last[name], sketch)))
    return histories


def _distribution(sketch: Sketch) -> tuple[np.ndarray, np.ndarray]:
    """Returns all sizes in a sketch, in ascending order, and how often each was seen."""
    first, counts = sketch.first.reshape(FIRST, -1), sketch.counts.reshape(BINS, -1)
    sizes, often = [], []
    for k, origin in enumerate(sketch.origin.ravel()):
        exact = counts[-1, k] <= FIRST
        middles = np.exp(middle(np.float64(origin), np.arange(BINS)))
        sizes.append(first[: counts[-1, k], k].astype(np.float64) if exact else middles)
        often.append(np.ones(counts[-1, k], int) if exact else np.diff(counts[:, k], prepend=0))
    order = np.argsort(np.concatenate(sizes))
    return np.concatenate(sizes)[order], np.concatenate(often)[order]


def _quantile(sizes: np.ndarray, counts: np.ndarray, q: float) -> float:
    """Like `numpy.quantile` of the sizes, each repeated as often as it was seen."""
    ranks = np.cumsum(counts) - 1
    rank = q * ranks[-1]
    lower, upper = (sizes[np.searchsorted(ranks, edge)] for edge in (np.floor(rank), np.ceil(rank)))
    return float(lower + (rank - np.floor(rank)) * (upper - lower))
