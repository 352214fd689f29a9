"""Every line of the tables in docs/recipes.md against the method's equations in NumPy.

A check is keyed by the name of its row. A row without a check fails, and so does a check without a
row. The longer recipes of the page check themselves.
"""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import optaxclip

PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
ROWS = dict(re.findall(r"^\| ([^|`]+) \| `([^`]+)` \|", PAGE, re.MULTILINE))
ADAM = optax.adam(0.1)
NAMES = {**vars(optaxclip), "optax": optax, "jnp": jnp, "functools": functools, "adam": ADAM}
STEPS = 120
CHECKS = {}

rng = np.random.default_rng(0)
PARAMS = {
    "body/w": rng.normal(size=(3, 2)),
    "head/w": rng.normal(size=(2, 2)),
    "muon/b": 20 * rng.normal(size=(3,)),
}
# noise with spikes, the same at every run
LEVELS = np.exp(0.3 * rng.normal(size=STEPS)) * np.where(np.arange(STEPS) % 9 == 8, 30, 1)
LEVELS[100] *= 1000
GRADS = {name: rng.normal(size=(STEPS, *x.shape)) * 1.0 for name, x in PARAMS.items()}
GRADS = {
    name: np.float64(np.float32(g * LEVELS.reshape(-1, *[1] * (g.ndim - 1))))
    for name, g in GRADS.items()
}
PARAMS = {name: np.float64(np.float32(x)) for name, x in PARAMS.items()}


def nested(flat):
    return {name.split("/")[0]: {name.split("/")[1]: jnp.float32(x)} for name, x in flat.items()}


def run(transform, **levels):
    """The updates `[steps, ...]` of all leaves, by their paths."""
    params = nested(PARAMS)

    def step(state, grads):
        updates, state = transform.update(grads, state, params)
        return state, updates

    updates = jax.jit(lambda g: jax.lax.scan(step, transform.init(params), g)[1])(nested(GRADS))
    flat = jax.tree_util.tree_flatten_with_path(updates)[0]
    return {jax.tree_util.keystr(k, simple=True, separator="/"): np.asarray(x) for k, x in flat}


def row(name):
    """The check of the row of this name: its updates, from a step's gradients, on NumPy."""

    def register(method):
        assert name not in CHECKS
        CHECKS[name] = method
        return method

    return register


def norm(x):
    return float(np.linalg.norm(np.ravel(x)))


def each_leaf(function):
    """A method that treats each leaf by itself: `function(gradients of all steps, weights)`."""
    return lambda grads, params: {k: function(g, params[k]) for k, g in grads.items()}


def trust(u, w, ratio, high=np.inf, clips=False):
    factor = ratio * min(norm(w), high) / norm(u)
    return u * (min(1, factor) if clips else factor)


def momentum(updates, rate=1.0, decay=0.9):
    trace, out = 0.0, []
    for u in updates:
        trace = decay * trace + u
        out.append(-rate * trace)
    return np.array(out)


def adam_steps(grads, b1=0.9, b2=0.999, eps=1e-8):
    m = v = 0.0
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        yield m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)


def average(updates, decay=0.9):
    m = 0.0
    for u in updates:
        m = decay * m + (1 - decay) * u
        yield m


def by_sizes(rule, name_of=lambda path: "all", response=reference.rescale, size_of=norm):
    """A method whose limits `[steps]` follow from the sizes `[steps]` of a group."""

    def method(grads, params):
        out = {}
        for group in {name_of(name) for name in grads}:
            names = [name for name in grads if name_of(name) == group]
            sizes = [
                size_of(np.concatenate([grads[k][t].ravel() for k in names])) for t in range(STEPS)
            ]
            limits = rule(np.array(sizes))
            respond = np.vectorize(response, otypes=[float], excluded=(1, 2))
            for k in names:
                out[k] = np.stack([respond(grads[k][t], sizes[t], limits[t]) for t in range(STEPS)])
        return out

    return method


def fixed(limit):
    return lambda sizes: np.full(STEPS, limit)


def of_tree(function):
    """A method of the whole tree: `function(steps [steps, numbers]) -> [steps, numbers]`."""

    def method(grads, params):
        flat = np.concatenate([g.reshape(STEPS, -1) for g in grads.values()], 1)
        out, start, parts = np.array(function(flat)), 0, {}
        for name, g in grads.items():
            count = g[0].size
            parts[name] = out[:, start : start + count].reshape(g.shape)
            start += count
        return parts

    return method


@row("LARS")
@each_leaf
def lars(grads, w):
    return momentum([trust(g + 1e-4 * w, w, 1e-3) for g in grads])


@row("LARC")
@each_leaf
def larc(grads, w):
    return momentum([g * min(0.02 * norm(w) / norm(g) / 0.1, 1) for g in grads], 0.1)


@row("LAMB")
@each_leaf
def lamb(grads, w):
    steps = adam_steps(grads, eps=1e-6)
    return np.array([-1e-3 * trust(u + 0.01 * w, w, 1.0, high=10.0) for u in steps])


@row("LAMBC")
@each_leaf
def lambc(grads, w):
    steps = adam_steps(grads, eps=1e-6)
    return np.array([-1e-3 * trust(u + 0.01 * w, w, 1.0, clips=True) for u in steps])


@row("AGC by leaf")
@each_leaf
def agc_by_leaf(grads, w):
    return np.array([g / max(1, norm(g) / (0.3 * max(1e-3, norm(w)))) for g in grads])


@row("AGC by layer")
@each_leaf
def agc_by_layer(grads, w):
    return np.array([g * min(1, 0.01 * max(norm(w), 1e-3) / norm(g)) for g in grads])  # no kernels


CHECKS["TRELLIS"] = by_sizes(
    lambda sizes: np.minimum(reference.lagged_quantile(sizes, 0.95, 1000), 1.0)
)
CHECKS["QC-SGD"] = by_sizes(  # a constant until the window is full
    lambda sizes: np.where(np.arange(STEPS) < 100, 1.0, reference.lagged_quantile(sizes, 0.9, 100))
)
CHECKS["OLMo ratio"] = by_sizes(
    lambda sizes: reference.relative_ema(sizes, 2.0, 0.95), name_of=lambda path: path
)
CHECKS["running median"] = by_sizes(
    lambda sizes: [3 * np.median(sizes[max(0, t - 99) : t + 1]) for t in range(STEPS)]
)
CHECKS["mean and deviations"] = by_sizes(
    functools.partial(reference.zclip, z=3.0, option="percentile")
)


@row("AdamWClip")
@each_leaf
def adamw_clip(grads, w):
    columns = [reference.spam_clip(np.abs(c), factor=9.0) for c in grads.reshape(STEPS, -1).T]
    limits = np.array(columns).T.reshape(grads.shape)
    return np.sign(grads) * np.minimum(np.abs(grads), limits)


def effective_band(sizes):
    """AGGC: hi S, where S averages the norms after the band; S starts with the first norm."""
    average, limits = sizes[0], []
    for t, size in enumerate(sizes):
        limits.append(1.2 * average if t else np.inf)
        after = min(max(size, 0.5 * limits[-1]), limits[-1]) if t else size
        average = 0.9 * average + 0.1 * after
    return limits


CHECKS["AGGC"] = by_sizes(
    effective_band, name_of=lambda path: path.split("/")[-1], response=reference.band
)


@row("spectral quantile")
@each_leaf
def spectral_quantile(grads, w):
    matrices = grads if grads.ndim > 2 else grads[:, None]
    u, s, vh = np.linalg.svd(matrices, full_matrices=False)
    limits = np.array([np.quantile(s[max(0, t - 99) : t + 1, 0], 0.85) for t in range(STEPS)])
    return ((u * np.minimum(s, limits[:, None])[:, None]) @ vh).reshape(grads.shape)


@row("PPO")
def ppo(grads, params):
    clipped = by_sizes(fixed(0.5))(grads, params)
    return {k: -3e-4 * np.array(list(adam_steps(g, eps=1e-5))) for k, g in clipped.items()}


@row("GRPO")
def grpo(grads, params):
    clipped, out = (
        by_sizes(fixed(0.1))(grads, params),
        {k: np.zeros_like(g) for k, g in grads.items()},
    )
    kept = kept_steps(grads, 10.0)
    assert 0 < kept.sum() < STEPS
    for k, g in clipped.items():
        out[k][kept] = -1e-6 * np.array(list(adam_steps(g[kept])))
    return out


def sizes_of(grads):
    return np.array(
        [norm(np.concatenate([g[t].ravel() for g in grads.values()])) for t in range(STEPS)]
    )


def kept_steps(grads, limits):
    return sizes_of(grads) <= limits


@row("Bi2Clip")
@each_leaf
def bi2clip(grads, w):
    return np.sign(grads) * np.clip(np.abs(grads), 0.1, 1.0)


@row("normalized SGD")
@of_tree
def normalized_sgd(grads):
    return [-0.1 * m / norm(m) for m in average(grads)]


@row("clipped and normalized")
@of_tree
def clipped_and_normalized(grads):
    return [-0.1 * m / norm(m) for m in average([g * min(1, 1 / norm(g)) for g in grads])]


@row("ADOPT's clip")
@each_leaf
def adopt(grads, w):
    limits = (np.arange(STEPS) ** 0.25).reshape(-1, *[1] * (grads.ndim - 1))
    return np.clip(grads, -limits, limits)


@row("update capping")
@each_leaf
def update_capping(grads, w):
    return np.array([-1e-3 * u / max(1, reference.rms([u])) for u in adam_steps(grads)])


@row("U-Clip")
@each_leaf
def u_clip(grads, w):
    cut, out = 0.0, []
    for g in grads:
        out.append(np.clip(g + cut, -1, 1))
        cut = g + cut - out[-1]
    return np.array(out)


@row("Clip21")
@of_tree
def clip21(grads):
    h, out = 0.0, []
    for g in grads:
        h = h + (g - h) * min(1, 1 / norm(g - h))
        out.append(h)
    return out


@row("one norm, three limits")
def three_limits(grads, params):
    limits, sizes = {"body": 1.0, "head": 0.5, "muon": np.inf}, sizes_of(grads)
    return {
        k: np.stack([g[t] * min(1, limits[k.split("/")[0]] / sizes[t]) for t in range(STEPS)])
        for k, g in grads.items()
    }


@row("WGAN")
@each_leaf
def wgan(grads, w):
    square, out = 0.0, []
    for g in grads:
        square = 0.9 * square + 0.1 * g**2
        out.append(np.clip(w - 5e-5 * g / np.sqrt(square + 1e-8), -0.01, 0.01) - w)
    return np.array(out)


@row("max-norm")
@each_leaf
def max_norm(grads, w):
    after = w - 0.1 * grads
    norms = np.sqrt((after**2).sum(1, keepdims=True))  # of each output unit, and of the bias
    return after * np.minimum(1, 2.0 / norms) - w


def skipped(limits_of):
    """Adam without the steps that are over the limit; the rule sees the limit instead."""

    def method(grads, params):
        seen, limits = [], []
        for size in sizes_of(grads):
            limits.append(limits_of(np.array([*seen, size]))[-1])
            seen.append(min(size, limits[-1]))
        kept = kept_steps(grads, np.array(limits))
        assert 0 < kept.sum() < STEPS
        out = {k: np.zeros_like(g) for k, g in grads.items()}
        for k, g in grads.items():
            out[k][kept] = -0.1 * np.array(list(adam_steps(g[kept])))
        return out

    return method


def raw_ema(sizes, factor=20.0, decay=0.99):
    """AXLearn's rule from the first norm on: a multiple of the average of norms."""
    average, limits = sizes[0], [np.inf]
    for size in sizes[1:]:
        limits.append(factor * average)
        average = decay * average + (1 - decay) * size
    return limits


CHECKS["Megatron"] = skipped(lambda sizes: np.full(len(sizes), 100.0))
CHECKS["OLMo-core, MaxText"] = skipped(
    functools.partial(reference.history_clip, deviations=6.0, window=128, warmup=64)
)
CHECKS["AXLearn"] = skipped(raw_ema)
CHECKS["Lingvo"] = skipped(functools.partial(reference.log_norm_clip, deviations=4.0, decay=0.995))


def test_every_row_has_a_check():
    assert set(ROWS) == set(CHECKS) and len(ROWS) >= 27


@pytest.mark.parametrize("name", ROWS)
def test_a_line_does_what_its_method_says(name):
    updates = run(eval(ROWS[name], dict(NAMES)))
    expected = CHECKS[name](GRADS, PARAMS)
    for path, value in expected.items():
        np.testing.assert_allclose(updates[path], value, rtol=2e-4, atol=1e-7, err_msg=path)
