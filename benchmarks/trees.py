"""The parameter trees of the benchmarks, as shapes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def gpt2(layers: int = 12, width: int = 768, vocabulary: int = 50257) -> dict[str, Any]:
    """GPT-2: 124 million parameters in 148 leaves."""
    block = {
        **{f"ln{i}_{name}": (width,) for i in (1, 2) for name in ("scale", "bias")},
        "qkv": (width, 3 * width),
        "qkv_bias": (3 * width,),
        "out": (width, width),
        "out_bias": (width,),
        "up": (width, 4 * width),
        "up_bias": (4 * width,),
        "down": (4 * width, width),
        "down_bias": (width,),
    }
    shapes = {
        "wte": (vocabulary, width),
        "wpe": (1024, width),
        "ln_scale": (width,),
        "ln_bias": (width,),
    }
    return _structs({**shapes, **{f"block{i}": block for i in range(layers)}})


def llama(
    layers: int = 22,
    width: int = 2048,
    hidden: int = 5632,
    keys: int = 256,
    vocabulary: int = 32000,
) -> dict[str, Any]:
    """TinyLlama: 1.1 billion parameters in 201 leaves.

    `keys` is the width of keys and values, which is small because heads share them.
    """
    block = {
        "attention_norm": (width,),
        "q": (width, width),
        "k": (width, keys),
        "v": (width, keys),
        "o": (width, width),
        "mlp_norm": (width,),
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
    }
    shapes = {"embedding": (vocabulary, width), "norm": (width,), "head": (width, vocabulary)}
    return _structs({**shapes, **{f"block{i}": block for i in range(layers)}})


def resnet50() -> dict[str, Any]:
    """ResNet-50 with 1000 classes: 25.6 million parameters in 161 leaves."""

    def convolution(size: int, inputs: int, outputs: int) -> dict[str, Any]:
        return {"kernel": (size, size, inputs, outputs), "scale": (outputs,), "bias": (outputs,)}

    tree, inputs = {"stem": convolution(7, 3, 64)}, 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(blocks):
            layers = {
                "conv0": convolution(1, inputs, width),
                "conv1": convolution(3, width, width),
                "conv2": convolution(1, width, 4 * width),
            }
            if not block:
                layers["shortcut"] = convolution(1, inputs, 4 * width)
            tree[f"stage{stage}_{block}"] = layers
            inputs = 4 * width
    return _structs({**tree, "head": {"kernel": (inputs, 1000), "bias": (1000,)}})


def tiny(leaves: int = 2000) -> dict[str, Any]:
    """Many small leaves: matrices of 256 numbers, and their biases."""
    return _structs({f"layer{i}": {"kernel": (16, 16), "bias": (16,)} for i in range(leaves // 2)})


def described(name: str, tree: Any) -> str:
    """Returns the name, with the number of leaves and parameters of the tree."""
    leaves = jax.tree.leaves(tree)
    numbers = sum(math.prod(leaf.shape) for leaf in leaves)
    return f"{name} ({len(leaves)} leaves, {numbers / 1e6:.4g} M parameters)"


def noise(tree: Any, scale: float) -> Any:
    """Returns random NumPy arrays of these shapes."""
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: scale * random.standard_normal(x.shape, np.float32), tree)


def _structs(shapes: Any) -> Any:
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
