"""Adam with clipping in PyTorch and Keras; which peers are installed."""

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# the columns and rows that need an optional package
PACKAGES = {
    "torch": "torch",
    "Keras": "keras",
    "jax_privacy": "jax_privacy",
    "TPU": "libtpu",
    "H100": "jax_cuda12_plugin",
}

Steps = dict[str, Callable[[], Any]]


def installed(peer: str) -> bool:
    """Returns whether the package of a peer is installed."""
    return importlib.util.find_spec(PACKAGES[peer]) is not None


def torch_steps(params: Any, grads: Any, methods: list[str]) -> Steps:
    """Returns `method -> step` of PyTorch's fused Adam, for the methods that PyTorch has.

    Each step works on copies of the parameters and gradients.
    """
    torch = importlib.import_module("torch")
    clip = torch.nn.utils
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"

    def none(adam: Any, weights: Any) -> None:
        adam.step()

    def value(adam: Any, weights: Any) -> None:
        clip.clip_grad_value_(weights, 0.01, foreach=True)
        adam.step()

    def global_norm(adam: Any, weights: Any) -> None:
        clip.clip_grad_norm_(weights, 1.0, foreach=True)
        adam.step()

    def skip(adam: Any, weights: Any) -> None:
        if clip.clip_grad_norm_(weights, 1.0, foreach=True).isfinite():
            adam.step()

    def step_of(method: Callable[..., None]) -> Callable[[], Any]:
        leaves = jax.tree.leaves(params)
        weights = [torch.tensor(x, device=device, requires_grad=True) for x in leaves]
        for weight, gradient in zip(weights, jax.tree.leaves(grads), strict=True):
            weight.grad = torch.tensor(gradient, device=device)
        adam = torch.optim.Adam(weights, lr=1e-3, fused=True)

        def step() -> None:
            method(adam, weights)
            if device == "cuda":
                torch.cuda.synchronize()

        return step

    known = {"none": none, "value": value, "global norm": global_norm}
    known["global norm, skip NaN"] = skip
    return {method: step_of(known[method]) for method in methods if method in known}


def keras_steps(params: Any, grads: Any, methods: list[str]) -> Steps:
    """Returns `method -> step` of Keras's Adam on JAX, for the methods that Keras has.

    Each step is compiled, and works on copies of the parameters and gradients.
    """
    os.environ["KERAS_BACKEND"] = "jax"  # Keras reads this when it is imported
    keras = importlib.import_module("keras")
    gradients = list(map(jnp.array, jax.tree.leaves(grads)))

    def step_of(**clip: float) -> Callable[[], Any]:
        adam = keras.optimizers.Adam(1e-3, **clip)
        weights = [keras.Variable(x) for x in jax.tree.leaves(params)]
        adam.build(weights)
        held = [[jnp.array(v.value) for v in variables] for variables in (weights, adam.variables)]

        def apply(weights: Any, state: Any, gradients: Any) -> Any:
            return adam.stateless_apply(state, gradients, weights)

        compiled = jax.jit(apply, donate_argnums=(0, 1)).lower(*held, gradients).compile()

        def step() -> Any:
            held[:] = compiled(*held, gradients)
            return held

        return step

    known = {
        "none": {},
        "value": {"clipvalue": 0.01},
        "global norm": {"global_clipnorm": 1.0},
        "leaf norm": {"clipnorm": 1.0},
    }
    return {method: step_of(**known[method]) for method in methods if method in known}
