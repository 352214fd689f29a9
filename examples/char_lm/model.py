"""A character language model: an LSTM that predicts the next character, its loss, and sampling."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from text import VOCABULARY, decode, encode

Carry = tuple[Array, Array]


class CharLSTM(nnx.Module):
    """Three layers: `embedding`, `lstm`, `output`."""

    def __init__(self, config: Any, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(len(VOCABULARY), config.embed, rngs=rngs)
        self.lstm = nnx.OptimizedLSTMCell(config.embed, config.units, rngs=rngs)
        self.output = nnx.Linear(config.units, len(VOCABULARY), rngs=rngs)

    def blank(self, count: int) -> Carry:
        """Returns the first state of the LSTM, two arrays `[count, units]`."""
        zeros = jnp.zeros((count, self.output.in_features))
        return zeros, zeros

    def __call__(self, tokens: Array, carry: Carry) -> tuple[Carry, Array]:
        """Reads tokens `[count, length]`.

        Returns the new state, and logits `[count, length, vocabulary]`.
        """
        carry, hidden = jax.lax.scan(self.lstm, carry, self.embedding(tokens.T))
        return carry, self.output(hidden).swapaxes(0, 1)


def init(config: Any, key: Array) -> nnx.State:
    """Returns the weights of a new model."""
    return nnx.split(CharLSTM(config, nnx.Rngs(key)))[1]


def model_of(config: Any, params: nnx.State) -> CharLSTM:
    """Returns the model with these weights."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: CharLSTM(config, nnx.Rngs(0))))
    return nnx.merge(graphdef, params)


def loss(params: nnx.State, config: Any, tokens: Array) -> Array:
    """Returns nats per character for sequences `[count, length + 1]`, each from a blank state."""
    model = model_of(config, params)
    _, logits = model(tokens[:, :-1], model.blank(len(tokens)))
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def sample(config: Any, params: nnx.State, key: Array, length: int, temperature: float) -> str:
    """Samples text after a line feed.

    A temperature below 1 makes likely characters even more likely; above 1 less so.
    """
    model = model_of(config, params)

    def write(state: tuple[Array, Carry], key: Array) -> tuple[tuple[Array, Carry], Array]:
        token, carry = state
        carry, logits = model(token[:, None], carry)
        token = jax.random.categorical(key, logits[:, 0] / temperature).astype(token.dtype)
        return (token, carry), token[0]

    _, tokens = jax.lax.scan(write, (encode("\n"), model.blank(1)), jax.random.split(key, length))
    return decode(tokens)
