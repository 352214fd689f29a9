"""Every transform is exported for three kinds of machines at once, and what comes back does the
same.
"""

import chex
import jax
import pytest
from jax import export
from transforms import CASES, KEEPERS, SCALERS

from optaxclip import skip_nonfinite, skip_spikes, thresholds

PLATFORMS = ("cpu", "cuda", "tpu")
TRANSFORMS = {
    f"{case.name}-{i}": case.make(1.0) for i, case in enumerate(CASES + SCALERS + KEEPERS)
}
GUARDS = {
    "skip_nonfinite": skip_nonfinite(TRANSFORMS["clip-0"]),
    "skip_spikes": skip_spikes(TRANSFORMS["clip-0"], thresholds.zscore(4.0)),
}
SHAPES = {"matrix": (4, 6), "stack": (2, 3, 3, 2), "vector": (5,), "scalar": ()}


def normal_tree(seed):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {
        name: jax.random.normal(key, SHAPES[name]) for name, key in zip(SHAPES, keys, strict=True)
    }


@pytest.mark.parametrize("name", TRANSFORMS | GUARDS)
def test_a_step_exports_for_every_platform_and_comes_back(name):
    transform = (TRANSFORMS | GUARDS)[name]
    params, grads = normal_tree(0), normal_tree(1)
    state, treedef = jax.tree.flatten(transform.init(params))

    def step(grads, state, params):  # with the state as a list, because files know no classes
        updates, state = transform.update(grads, jax.tree.unflatten(treedef, state), params)
        return updates, jax.tree.leaves(state)

    written = export.export(jax.jit(step), platforms=PLATFORMS)(grads, state, params).serialize()
    read = export.deserialize(written)
    assert read.platforms == PLATFORMS
    chex.assert_trees_all_close(
        read.call(grads, state, params), jax.jit(step)(grads, state, params), rtol=1e-6
    )
