"""Real text that needs no download: the documentation topics of Python's standard library.

About 465 000 characters, of which the last tenth is for validation. Every version of Python has
a slightly different text, so results of different versions are close, but not the same.
"""

from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

TEXT = "\n".join(topics[topic] for topic in sorted(topics))
VOCABULARY = "".join(sorted(set(TEXT)))
STREAMS = 64


def encode(text: str) -> Array:
    """Returns indices in the vocabulary, int32 `[characters]`."""
    return jnp.array([VOCABULARY.index(character) for character in text], jnp.int32)


def decode(tokens: Array) -> str:
    """Returns the text of tokens."""
    return "".join(VOCABULARY[token] for token in np.asarray(tokens))


TRAIN, VALIDATION = jnp.split(encode(TEXT), [len(TEXT) * 9 // 10])


def batch(key: Array, count: int, length: int) -> Array:
    """Draws random pieces of the training text, tokens `[count, length + 1]`.

    The first `length` tokens of a piece are the inputs, the last `length` tokens the targets.
    """
    starts = jax.random.randint(key, (count, 1), 0, len(TRAIN) - length)
    return TRAIN[starts + jnp.arange(length + 1)]


def validation() -> Array:
    """Returns the validation text as 64 long streams `[64, characters]`, without a remainder."""
    return VALIDATION[: len(VALIDATION) // STREAMS * STREAMS].reshape(STREAMS, -1)
