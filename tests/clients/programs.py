"""What the training programs in this folder share: batches with a NaN and a spike, an optimizer,
and what a run must show.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip
from optaxclip import scopes

STEPS, BAD, SPIKE, BREAK = 16, 6, 11, 9  # the checkpoint comes after the NaN and before the spike
RULES = {
    "zclip": functools.partial(optaxclip.zclip, warmup=4),
    "adagc": functools.partial(optaxclip.adagc, warmup=4, max_norm=1e3),
    "autoclip": functools.partial(optaxclip.autoclip, 0.9),
}


def batches():
    """Inputs `[steps, 32, 4]` and targets `[steps, 32, 1]`."""
    x = jax.random.normal(jax.random.key(0), (STEPS, 32, 4))
    y = jnp.sin(x.sum(-1, keepdims=True))
    return x.at[BAD, 3, 1].set(jnp.nan), y.at[SPIKE].multiply(1000.0)


def layer(path):
    """`layers/0` of `layers/0/kernel`."""
    return path.rpartition("/")[0]


@functools.cache  # so that runs with one rule are compiled once
def optimizer(rule):
    """A guard around a clip by layer and Adam."""
    return optaxclip.skip_nonfinite(
        optax.chain(RULES[rule](scope=scopes.group(layer)), optax.adam(0.01))
    )


def mse(prediction, y):
    return jnp.mean((prediction - y) ** 2)


def norms_by_hand(layers):
    """`norm/NAME` for each layer's gradients."""
    return {f"norm/{name}": optax.tree.norm(grads) for name, grads in layers.items()}


def assert_same_bits(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


def assert_row_names(row, names):
    """The clip's names in a row of metrics are exactly these."""
    for key in ("size_before", "size_after", "limit", "clipped_share"):
        start = f"clip/{key}/"
        assert {name.removeprefix(start) for name in row if name.startswith(start)} == set(names)


def assert_clipped_and_guarded(rows, names):
    """What must hold of the metrics of each step of a run on `batches`, with `norms_by_hand` beside
    them.
    """
    assert len(rows) == STEPS and len(names) > 1
    rows = [{name: float(value) for name, value in row.items()} for row in rows]
    assert [row["clip/skipped_steps"] for row in rows] == [0] * BAD + [1] * (STEPS - BAD)
    assert [row["clip/steps"] for row in rows] == [*range(1, BAD + 1), *range(BAD, STEPS)]
    assert [step for step, row in enumerate(rows) if not np.isfinite(row["loss"])] == [BAD]
    for step, row in enumerate(rows):
        assert_row_names(row, names)
        for name in names:
            before, after, limit = (
                row[f"clip/{key}/{name}"] for key in ("size_before", "size_after", "limit")
            )
            # a skipped step is not seen by the clip inside
            seen = rows[step - 1] if step == BAD else row
            np.testing.assert_allclose(before, seen[f"norm/{name}"], rtol=1e-6)
            np.testing.assert_allclose(after, min(before, limit), rtol=1e-6)
    for name in names:
        assert (
            rows[SPIKE][f"clip/size_after/{name}"] < 0.5 * rows[SPIKE][f"clip/size_before/{name}"]
        )
