"""Reads what clipping did from an optimizer state.

Every `clip` keeps a `Reading` of its last step, and counts of all steps, in its state. `metrics`
finds them at any depth of the state and returns a dict of arrays, which any logger can write. It
works under `jit`, `scan` and `vmap`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optaxclip import _validate
from optaxclip._guard import GuardState
from optaxclip._layout import by_path
from optaxclip._monitor import MonitorState
from optaxclip._monitor import monitor as monitor
from optaxclip._monitor import spikes as spikes
from optaxclip._probe import Probe as Probe
from optaxclip._probe import probe as probe
from optaxclip._probe import probed as probed
from optaxclip._record import summary
from optaxclip._states import Labels, clips_of, distinct, guards_of, without_common
from optaxclip._types import ClipState, Reading
from optaxclip._watch import Watch
from optaxclip.thresholds.ranks import BINS, FIRST, History, Sketch, middle

__all__ = [
    "readings",
    "group_names",
    "metrics",
    "monitor",
    "spikes",
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
    return [state.reading for _, state in clips_of(opt_state)]


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
    | `clip/recent_share` | share of recent steps with something clipped: a moving average over \
about 100 steps |
    | `clip/skipped` | 1 if a guard skipped this step, else 0; if there are guards |
    | `clip/skipped_steps` | steps that guards skipped |
    | `clip/watched` | norm or loss that `skip_spikes` watched; with `watch="both"` \
`clip/watched/norm` and `clip/watched/loss` |
    | `clip/watched_limit` | its limit, with the same endings |

    The keys are always the same. Before the first step all values are NaN, except `clip/largest`
    (-1) and the counts (0).

    The values change only when the clip runs. Inside `optax.MultiSteps` they repeat for each
    micro-batch until the next step; inside a guard they repeat for each skipped step. `clip/steps`
    counts the steps of the clip.

    If a state holds more than one clip, their keys begin with `clip_0`, `clip_1` and so on, in the
    order of the chain. Where they differ by their labels in `optax.partition`, `optax.named_chain`
    or any other dict of states, the label stands in place of the number: `clip_body`. The keys of a
    `monitor` or `spikes` begin with `monitor` in place of `clip`, so adding one renames nothing.

    A state that is vmapped over seeds gives arrays over seeds. Without a clip that records, the
    dict is empty.

    Args:
        opt_state: as for `readings`.
        params: if given, and if there is more than one group, the dict also has the numbers of
            every group by name: `clip/size_before/encoder/kernel`.
        prefix: the beginning of every key in place of `clip`; keys of monitors then begin with
            `monitor` and this prefix.

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
        clip/recent_share        1
        clip/size_before/b       0.5
        clip/size_after/b        0.5
        clip/limit/b             1
        clip/clipped_share/b     0
        clip/size_before/w       5
        clip/size_after/w        1
        clip/limit/w             1
        clip/clipped_share/w     1
    """
    clips = clips_of(opt_state)
    numbers: dict[str, Array] = {}
    for name, (_, state) in zip(_names(prefix, clips), clips, strict=True):
        for key, value in _of_all_groups(state.step, state.reading).items():
            numbers[f"{name}/{key}"] = value
        groups = group_names(state.reading)
        if params is not None and len(groups) > 1:
            for k, group in enumerate(groups):
                for key in ("size_before", "size_after", "limit", "clipped_share"):
                    value = getattr(state.reading, key)[..., k]
                    numbers[f"{name}/{key}/{group}"] = _once_seen(state.step, value)
    return numbers | _of_guards(prefix, guards_of(opt_state))


def _names(prefix: str, clips: list[tuple[Labels, ClipState]]) -> list[str]:
    """Returns how the keys of each clip begin."""
    names: dict[int, str] = {}
    of_monitors = "monitor" if prefix == "clip" else f"monitor_{prefix}"
    for head, is_monitor in (prefix, False), (of_monitors, True):
        chosen = {
            k: labels
            for k, (labels, state) in enumerate(clips)
            if isinstance(state, MonitorState) == is_monitor
        }
        joined = ["_".join([head, *labels]) for labels in without_common(list(chosen.values()))]
        names |= dict(zip(chosen, distinct(joined), strict=True))
    return [names[k] for k in range(len(clips))]


def _of_guards(prefix: str, guards: list[GuardState]) -> dict[str, Array]:
    if not guards:
        return {}
    # an inner guard that waits behind a skipped step has old numbers, but the outer one is new
    skipped = jnp.stack([guard.consecutive > 0 for guard in guards]).any(0)
    total = jnp.stack([guard.skipped_steps for guard in guards]).sum(0)
    numbers = {f"{prefix}/skipped": skipped.astype(jnp.int32), f"{prefix}/skipped_steps": total}
    watches = [(guard.steps, guard.watch) for guard in guards if isinstance(guard.watch, Watch)]
    for i, (steps, watch) in enumerate(watches):
        number = "" if len(watches) == 1 else f"_{i}"
        for key, watched in ("watched", watch.size), ("watched_limit", watch.limit):
            by_name = watched if isinstance(watched, dict) else {"": watched}
            for name, value in by_name.items():
                path = f"{prefix}/{key}{number}/{name}".rstrip("/")
                numbers[path] = _once_seen(steps, value)
    return numbers


def _once_seen(steps: Array, value: Array, otherwise: float = jnp.nan) -> Array:
    """Returns the value of the last step; `otherwise` before the first step."""
    return jnp.where(steps > 0, value, jnp.asarray(otherwise, jnp.result_type(value)))


def _of_all_groups(step: Array, reading: Reading) -> dict[str, Array]:
    last = summary(reading)
    largest = last.pop("largest")
    return {key: _once_seen(step, value) for key, value in last.items()} | {
        "largest": _once_seen(step, largest, -1),
        "steps": step,
        "clipped_steps": reading.clipped_steps,
        "nonfinite_steps": reading.nonfinite_steps,
        "recent_share": _once_seen(step, reading.recent_share),
    }


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


def _histories(opt_state: Any) -> list[tuple[str, History]]:
    """Returns the memory of each group of every monitor, with its name, in NumPy."""
    histories = []
    for _, state in clips_of(opt_state):
        if not isinstance(state.threshold, History):
            continue
        reading = state.reading
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
