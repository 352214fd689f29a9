"""Builds the optimizer of a config: optional gradient corruption, a clip by name, SGD or Adam."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

import optaxclip
from optaxclip import norms, responses, scopes

Transform = optax.GradientTransformationExtraArgs


def layer(path: str) -> str:
    """Returns the layer of a parameter: `"output/kernel" -> "output"`."""
    return path.split("/")[0]


def clip_layers(limits: dict[str, float]) -> Transform:
    """Clips by value, with a limit for each layer; layers without a limit are not clipped.

    The norm is linf with the response `clamp`, so the state records the largest element of each
    layer. The limits of Graves (2013), 10 for LSTM layers and 100 for the output, are meant for
    derivatives with respect to activations, in the backward pass. Here they limit the gradients of
    the weights.
    """
    scope = scopes.group(lambda path: layer(path) if layer(path) in limits else None)
    return optaxclip.clip(limits, scope=scope, norm=norms.linf(), response=responses.clamp)


# threshold -> transform; without a threshold, the default of the method
CLIPS: dict[str, Callable[..., Any]] = {
    "none": lambda threshold=None: optaxclip.clip_by_global_norm(float("inf")),  # only measures
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
    """Returns the entry of a table.

    Raises:
        ValueError: the table has no entry of this name.
    """
    if name not in table:
        raise ValueError(f"config.{option} is {name!r}; choose one of {', '.join(table)}")
    return table[name]


def make_clip(config: Any) -> Transform:
    """Returns the clip that the config names, with its threshold or its limits of layers."""
    threshold = dict(config.layers) if config.clip == "layers" else config.threshold
    clip = chosen("clip", config.clip, CLIPS)
    return clip() if threshold is None else clip(threshold)


def corrupt(share: float, key: Array) -> optax.GradientTransformation:
    """Multiplies a random share of all gradients by 100; key and step decide which ones."""

    def factor(step: Any) -> Array:
        return jnp.where(jax.random.bernoulli(jax.random.fold_in(key, step), share), 100.0, 1.0)

    return optax.scale_by_schedule(factor)


def make_optimizer(config: Any, key: Array) -> optax.GradientTransformation:
    """Chains corruption, clip and optimizer; a guard wraps the last two if the config says so."""
    descend = chosen("optimizer", config.optimizer, OPTIMIZERS)(config.learning_rate)
    optimizer = optax.chain(make_clip(config), descend)
    if config.skip_nonfinite:
        optimizer = optaxclip.skip_nonfinite(optimizer)
    return optax.chain(corrupt(config.corrupt, key), optimizer) if config.corrupt else optimizer
