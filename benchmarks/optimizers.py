"""The optimizers to measure: Adam with each clip of this library, and with its peer in Optax."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import optax

import optaxclip
from optaxclip import thresholds

# Adam reads gradients, parameters and two moments, and writes all of them except the gradients
READS_AND_WRITES = 7


class Method(NamedTuple):
    """A way to clip.

    Attributes:
        reads: how many more arrays as large as the parameters it must read than Adam.
        optimizers: `library -> Adam with this clip`.
    """

    reads: int
    optimizers: dict[str, optax.GradientTransformation]

    @property
    def units(self) -> int:
        """The least that a step must read and write, in units of the parameters."""
        return READS_AND_WRITES + self.reads


ADAM = optax.adam(1e-3)
OURS = optax.chain(optaxclip.clip_by_global_norm(1.0), ADAM)
THEIRS = optax.chain(optax.clip_by_global_norm(1.0), ADAM)


def _clips(reads: int, ours: Any, theirs: Any = None) -> Method:
    clips = {"optaxclip": ours} | ({"Optax": theirs} if theirs else {})
    return Method(reads, {library: optax.chain(clip, ADAM) for library, clip in clips.items()})


METHODS = {
    "none": Method(0, {"Optax": ADAM}),
    "value": _clips(0, optaxclip.clip_by_value(0.01), optax.clip(0.01)),
    "value, record=False": _clips(0, optaxclip.clip_by_value(0.01, record=False)),
    "global norm": Method(1, {"optaxclip": OURS, "Optax": THEIRS}),
    "global norm, record=False": _clips(1, optaxclip.clip_by_global_norm(1.0, record=False)),
    "leaf norm": _clips(1, optaxclip.clip_by_norm(1.0)),
    "block RMS": _clips(1, optaxclip.clip_by_block_rms(0.01), optax.clip_by_block_rms(0.01)),
    "AGC, by unit": _clips(2, optaxclip.adaptive_grad_clip(0.01), optax.adaptive_grad_clip(0.01)),
    "autoclip": _clips(1, optaxclip.autoclip()),
    "zclip": _clips(1, optaxclip.zclip()),
    "adagc": _clips(1, optaxclip.adagc()),
    "global norm, skip NaN": Method(
        1, {"optaxclip": optaxclip.skip_nonfinite(OURS), "Optax": optax.apply_if_finite(THEIRS, 10)}
    ),
    "global norm, skip spikes": Method(
        1, {"optaxclip": optaxclip.skip_spikes(OURS, thresholds.zscore(4.0))}
    ),
}
# for trees on which all methods would take too long
FEW = ["none", "value", "global norm", "adagc", "global norm, skip NaN"]


def chosen(methods: Iterable[str]) -> dict[tuple[str, str], optax.GradientTransformation]:
    """Returns the optimizers of these methods by method and library."""
    return {
        (name, library): optimizer
        for name in methods
        for library, optimizer in METHODS[name].optimizers.items()
    }


def step(optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """Returns the function `(params, state, grads) -> (params, state)`."""

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def compiled_step(optimizer: optax.GradientTransformation) -> Any:
    """The same under `jax.jit`, with parameters and state donated."""
    return jax.jit(step(optimizer), donate_argnums=(0, 1))
