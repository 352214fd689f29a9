"""Smoke test of an installation without extras; `scripts/test-package` runs it."""

import importlib.util
from importlib import metadata, resources

import jax
import jax.numpy as jnp
import optax

import optaxclip

assert "site-packages" in optaxclip.__file__, f"not the installed package: {optaxclip.__file__}"
for extra in "flax", "matplotlib":
    assert not importlib.util.find_spec(extra), f"the environment is not empty: it has {extra}"
assert resources.files(optaxclip).joinpath("py.typed").is_file()
required = [line for line in metadata.requires("optaxclip") or () if "extra" not in line]
assert {line.split(">")[0] for line in required} == {"jax", "optax"}

params = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}
gradients = {"w": jnp.full((4, 3), 1e25), "b": jnp.full(3, -1e25)}  # the squares overflow
clips = {
    "global": optaxclip.clip_by_global_norm(1.0),
    "leaf": optaxclip.adagc(),
    "unit": optaxclip.adaptive_grad_clip(),
}
for name, clip in clips.items():
    optimizer = optaxclip.skip_nonfinite(optax.chain(clip, optax.sgd(1.0)))
    updates, state = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    assert 0 < optax.tree.norm(updates) < 2, (name, updates)
    assert optaxclip.telemetry.metrics(state)["clip/clipped_steps"] == 1
try:
    optaxclip.plots.sizes([optaxclip.telemetry.metrics(state)])
except ImportError as error:
    assert "optaxclip[plots]" in str(error)
else:
    raise AssertionError("plots drew without matplotlib")
print(f"optaxclip {metadata.version('optaxclip')}: smoke test passed")
