"""Parts, states and messages print what a person would write."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip
from optaxclip import norms, responses, scopes, thresholds


def slower(step):
    return 1.0 / (1 + step)


def halved(size, limit):
    return jnp.minimum(size, limit) / 2


@pytest.mark.parametrize(
    "part, text",
    [
        (norms.l2(), "norms.l2()"),
        (norms.lp(3), "norms.lp(3)"),
        (scopes.unit(0), "scopes.unit(0)"),
        (scopes.leaf(batch_axes=(0, 1)), "scopes.leaf(batch_axes=(0, 1))"),
        (thresholds.ema(2.0, decay=0.9), "thresholds.ema(2.0, decay=0.9)"),
        (
            thresholds.at_most(thresholds.zscore(), 1.0),
            "thresholds.at_most(thresholds.zscore(), 1.0)",
        ),
        (thresholds.join([0.1, slower], [10]), "thresholds.join([0.1, slower], [10])"),
        (thresholds.quantile(np.float32(0.5), 3), "thresholds.quantile(0.5, 3)"),
        (thresholds.ema(jnp.float32(2.0)), "thresholds.ema(2.0)"),
        (responses.rescale, "responses.rescale"),
        (responses.from_target(halved), "responses.halved"),
        (optaxclip.Threshold(len, len, len), "Threshold()"),
    ],
    ids=str,
)
def test_parts_print_as_they_are_written(part, text):
    assert repr(part) == text and re.search(r"0x[0-9a-f]+", repr(part)) is None


def test_a_traced_argument_prints_too():
    texts = []
    jax.jit(lambda x: texts.append(repr(thresholds.ema(x))) or x)(2.0)
    assert texts == ["thresholds.ema(<traced float32>)"]


def test_a_state_prints_what_happened():
    clip = optaxclip.clip_by_norm(1.0)
    _, state = clip.update({"w": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}, None)
    assert repr(state) == (
        "ClipState(step=1, threshold=(), reading=Reading(size_before=[0.5, 5. ], "
        "size_after=[0.5, 1. ], limit=[1., 1.], clipped_share=[0., 1.], clipped_steps=1, "
        "nonfinite_steps=0, recent_share=1., names=['b', 'w']))"
    )


@pytest.mark.parametrize("make", [optaxclip.spam_clip, optaxclip.zclip, optaxclip.autoclip])
def test_a_state_prints_wherever_it_is(make):
    clip = make()
    params = {"w": jnp.ones((20, 3), jnp.bfloat16)}
    texts = []
    state = clip.init(params)
    shapes = jax.eval_shape(clip.init, params)
    step = jax.jit(lambda s: texts.append(repr(s)) or clip.update(params, s)[1], donate_argnums=0)
    after = step(state)
    kinds = optax.tree_utils.tree_map_params(clip, lambda _: "param", after)
    texts += [repr(x) for x in (state, shapes, after, kinds)]
    assert all(text.startswith("ClipState(step=") and len(text) < 1500 for text in texts), texts


def test_a_message_that_prints_a_rule_prints_its_name():
    with pytest.raises(TypeError, match=r"got thresholds\.ema\(2\.0\)"):
        optaxclip.clip(1.0, thresholds.ema(2.0))


def test_options_of_a_response_are_in_its_signature_and_partial_keeps_them():
    assert responses.band.__name__ == "band" and "low" in str(responses.band.__signature__)
    narrow = functools.partial(responses.band, low=0.9)
    np.testing.assert_allclose(narrow(jnp.array([0.5]), jnp.array(0.5), jnp.array(1.0)), [0.9])
