"""The optimizer of a config: corruption of gradients if asked for, a clip by name, SGD or Adam."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

import optaxclip
from optaxclip import norms, responses, scopes, telemetry

Transform = optax.GradientTransformationExtraArgs


def layer(path: str) -> str:
    """The layer of a parameter: `"output/kernel" -> "output"`."""
    return path.split("/")[0]


def clip_layers(limits: dict[str, float]) -> Transform:
    """Cuts each element of a layer's gradient at the limit of that layer, and leaves layers without
    one alone.

    Clipping by value, told as the `clamp` of the largest element: so the state records the largest
    element of each layer. The numbers of Graves (2013), 10 for LSTM layers and 100 for the output,
    are for other derivatives, those by activations, cut on their way back through the network; here
    they limit the gradient of the weights.
    """
    scope = scopes.group(lambda path: layer(path) if layer(path) in limits else None)
    return optaxclip.clip(limits, scope=scope, norm=norms.linf(), response=responses.clamp)


CLIPS: dict[
    str, Callable[..., Any]
] = {  # threshold -> transform; without a threshold, the method's default
    "none": lambda threshold=None: telemetry.monitor(),  # measures all the same
    "value": lambda threshold=0.01: optaxclip.clip_by_value(threshold),
    "norm": lambda threshold=0.25: optaxclip.clip_by_norm(threshold),
    "global_norm": lambda threshold=0.25: optaxclip.clip_by_global_norm(threshold),
    "layers": clip_layers,
    "agc": optaxclip.adaptive_grad_clip,
    "autoclip": optaxclip.autoclip,
    "quantile": optaxclip.quantile_clip,
    "zclip": optaxclip.zclip,
    "adagc": optaxclip.adagc,
    "history": optaxclip.history_clip,
    "log_norm": optaxclip.log_norm_clip,
    "growth": optaxclip.growth_clip,
    "spam": optaxclip.spam_clip,
}
OPTIMIZERS = {"sgd": optax.sgd, "adam": optax.adam}


def chosen(option: str, name: str, table: dict[str, Any]) -> Any:
    """The entry of a table.

    Raises:
        ValueError: it has none of this name.
    """
    if name not in table:
        raise ValueError(f"config.{option} is {name!r}; choose one of {', '.join(table)}")
    return table[name]


def make_clip(config: Any) -> Transform:
    """The clip that the config names, at its threshold, or at its limits of layers."""
    threshold = dict(config.layers) if config.clip == "layers" else config.threshold
    clip = chosen("clip", config.clip, CLIPS)
    return clip() if threshold is None else clip(threshold)


def corrupt(share: float, key: Array) -> optax.GradientTransformation:
    """Multiplies a random share of all gradients by 100; which ones, the key and the step tell."""

    def factor(step: Any) -> Array:
        return jnp.where(jax.random.bernoulli(jax.random.fold_in(key, step), share), 100.0, 1.0)

    return optax.scale_by_schedule(factor)


def make_optimizer(config: Any, key: Array) -> optax.GradientTransformation:
    """Corruption, then the clip and the optimizer, guarded together if the config says so."""
    descend = chosen("optimizer", config.optimizer, OPTIMIZERS)(config.learning_rate)
    optimizer = optax.chain(make_clip(config), descend)
    if config.skip_nonfinite:
        optimizer = optaxclip.skip_nonfinite(optimizer)
    return optax.chain(corrupt(config.corrupt, key), optimizer) if config.corrupt else optimizer
