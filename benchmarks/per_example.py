"""Measures what per-example clipping costs, compared with a plain batch gradient.

Memory, flops and bytes are from the compiled program; time is wall time. The compiler counts the
body of a loop only once, so programs with a loop have no flops and bytes.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from jax import Array

from benchmarks import peers
from benchmarks.report import Row
from benchmarks.timing import spread, timed
from optaxclip import per_example

BATCH, MICROBATCH = 256, 32


class MLP(nn.Module):
    """A multilayer perceptron, 784-1024-1024-10."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Logits `[10]` of an image `[784]`."""
        for _ in range(2):
            x = nn.relu(nn.Dense(1024)(x))
        return nn.Dense(10)(x)


class LSTM(nn.Module):
    """An LSTM for 100 symbols, with an embedding and a state of 128."""

    @nn.compact
    def __call__(self, text: Array) -> Array:
        """Logits `[time, 100]` of a text `[time]`."""
        layer: Any = nn.RNN(nn.OptimizedLSTMCell(128))
        return nn.Dense(100)(layer(nn.Embed(100, 128)(text)))


class CNN(nn.Module):
    """Two convolutions with strides, and a hidden layer of 128."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Logits `[10]` of an image `[28, 28, 1]`."""
        for channels in (16, 32):
            x = nn.relu(nn.Conv(channels, (3, 3), 2)(x))
        return nn.Dense(10)(nn.relu(nn.Dense(128)(x.ravel())))


class Transformer(nn.Module):
    """One block of width 128 with four heads, on 1000 symbols."""

    @nn.compact
    def __call__(self, text: Array) -> Array:
        """Logits `[time, 1000]` of a text `[time]`."""
        x = nn.Embed(1000, 128)(text)
        x += nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x), mask=nn.make_causal_mask(text))
        x += nn.Dense(128)(nn.gelu(nn.Dense(512)(nn.LayerNorm()(x))))
        return nn.Dense(1000)(nn.LayerNorm()(x))


def image_batch(*shape: int) -> tuple[Array, Array]:
    """Returns random images and labels."""
    key = jax.random.key(0)
    return jax.random.normal(key, (BATCH, *shape)), jax.random.randint(key, (BATCH,), 0, 10)


def text_batch(length: int, symbols: int) -> tuple[Array, Array]:
    """Returns random texts, and for each symbol the next one."""
    text = jax.random.randint(jax.random.key(0), (BATCH, length + 1), 0, symbols)
    return text[:, :-1], text[:, 1:]


MODELS = {
    "MLP": (MLP(), lambda: image_batch(784)),
    "LSTM": (LSTM(), lambda: text_batch(64, 100)),
    "CNN": (CNN(), lambda: image_batch(28, 28, 1)),
    "transformer": (Transformer(), lambda: text_batch(64, 1000)),
}


def rows_of(model: Any) -> dict[str, Callable[..., Any]]:
    """Returns the functions to measure; each takes `(params, x, y)` and computes gradients."""

    def loss(params: Any, x: Array, y: Array) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()

    def mean(params: Any, x: Array, y: Array) -> Array:
        return jax.vmap(loss, (None, 0, 0))(params, x, y).mean()

    def stored(params: Any, x: Array, y: Array) -> Any:
        gradients = jax.vmap(jax.grad(loss), (None, 0, 0))(params, x, y)
        return optax.per_example_global_norm_clip(jax.tree.leaves(gradients), 1.0)

    in_parts = f", microbatch {MICROBATCH}"
    rows = {
        "plain": jax.value_and_grad(mean),
        "clipped_grad": per_example.clipped_grad(loss, 1.0),
        f"clipped_grad{in_parts}": per_example.clipped_grad(loss, 1.0, microbatch=MICROBATCH),
        "optax": stored,
    }
    if peers.installed("jax_privacy"):
        clipping = importlib.import_module("jax_privacy.clipping")
        for name, size in ("", None), (in_parts, MICROBATCH):
            options = {"batch_argnums": (1, 2), "keep_batch_dim": False, "microbatch_size": size}
            clipped = clipping.clipped_grad(loss, l2_clip_norm=1.0, **options)
            rows[f"jax_privacy{name}"] = clipped
    return rows


def measure(rounds: int, quick: bool) -> Iterator[Row]:
    """Yields rows of a table for each model; quick: only for the LSTM, the fastest."""
    for title in ["LSTM"] if quick else MODELS:
        model, make_batch = MODELS[title]
        batch = make_batch()
        params: Any = model.init(jax.random.key(0), batch[0][0])
        compiled: dict[str, Any] = {
            name: jax.jit(row).lower(params, *batch).compile()
            for name, row in rows_of(model).items()
        }
        steps = {name: functools.partial(row, params, *batch) for name, row in compiled.items()}
        times = timed(steps, rounds)
        costs = {name: counted(row) for name, row in compiled.items()}
        table = f"Over a plain gradient, {title}, batches of {BATCH}"
        for name in compiled:
            for figure, value in costs[name].items():
                if np.isfinite(ratio := value / costs["plain"][figure]):
                    yield Row(table, name, figure, ratio)
            yield Row(table, name, "time", *spread(times[name] / times["plain"]))


def counted(compiled: Any) -> dict[str, float]:
    """Returns temporary memory, flops and bytes; flops and bytes are NaN if there is a loop."""
    cost, loop = compiled.cost_analysis(), " while(" in compiled.as_text()
    flops, moved = np.array([cost["flops"], cost["bytes accessed"]]) * (np.nan if loop else 1)
    return {
        "temporary memory": compiled.memory_analysis().temp_size_in_bytes,
        "flops": flops,
        "bytes": moved,
    }
