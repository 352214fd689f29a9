"""Norms of derivatives by steps back: against products of Jacobians, and the table's claims."""

import types

import backward_norms
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import temporal_order
from flax import nnx
from run_example import as_script, help_of

OPTIONS = types.SimpleNamespace(length=20, seeds=2, seed=1, steps=300)


def test_the_norms_are_those_of_products_of_jacobians():
    model = temporal_order.Reader(nnx.SimpleCell, nnx.Rngs(0))
    x, y = temporal_order.sequences(np.random.default_rng(0), (4,), 12)
    probes = backward_norms.probes_of(12)

    def loss(probes):
        logits = backward_norms.logits_of(model, jnp.asarray(x), jnp.inf, probes)
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(y)).mean()

    measured = jax.grad(loss)(probes).size_before

    cell = model.rnn.cell
    inputs, recurrent, bias, out, shift = (
        np.asarray(w[...], np.float64)
        for w in (
            cell.dense_i.kernel,
            cell.dense_h.kernel,
            cell.dense_i.bias,
            model.out.kernel,
            model.out.bias,
        )
    )
    states = [np.zeros((4, 32))]
    for symbol in x.T:
        states.append(np.tanh(inputs[symbol] + states[-1] @ recurrent + bias))
    logits = states[-1] @ out + shift
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    derivative = (shares - np.eye(4)[y]) / 4 @ out.T
    for k in reversed(range(12)):  # one Jacobian of the recurrence after the other
        derivative = (derivative * (1 - states[k + 1] ** 2)) @ recurrent.T
        np.testing.assert_allclose(measured[k], np.linalg.norm(derivative), rtol=1e-4)


@pytest.mark.parametrize("seed", [1, 2])
def test_an_rnn_explodes_without_a_clip_and_a_clip_at_each_step_bounds_it(seed):
    options = types.SimpleNamespace(**{**vars(OPTIONS), "seed": seed})
    free = backward_norms.train("rnn", "none", options)
    bound = backward_norms.train("rnn", "cotangent", options)

    def largest(norms):
        return np.median((norms[..., 1:] / norms[..., :1]).max((0, 2)))

    assert np.median(free[0, :, -1] / free[0, :, 0]) < 0.2
    assert largest(free) > 2 * largest(bound) and largest(free) > 15


def test_the_script_prints_its_table(tmp_path):
    arguments = ["--steps", 100, "--seeds", 2, "--length", 12, "--out", tmp_path]
    lines = as_script("backward_norms", *arguments).splitlines()
    assert [line.split()[0] for line in lines[1:7]] == ["rnn"] * 3 + ["lstm"] * 3
    assert (tmp_path / "norms.png").exists() and (tmp_path / "results.json").exists()


def test_options(capsys):
    text = help_of(backward_norms, capsys)
    assert "--length" in text and "--steps" in text and "--seed" in text
