"""What a step is on a CPU, by the compiler: small leaves that are equal are measured, limited and
recorded together.
"""

import jax
import jax.numpy as jnp
import pytest

import optaxclip

CLIPS = {
    "global norm": (optaxclip.clip_by_global_norm(1.0), 1),
    "leaf norm": (
        optaxclip.clip_by_norm(1.0),
        2,
    ),  # and one that takes its own factors from those of all
    "by unit": (optaxclip.adaptive_grad_clip(0.1), 2),
    "value": (optaxclip.clip_by_value(0.1), 1),
}


def program(clip, leaves):
    grads = {str(k): jax.ShapeDtypeStruct((8, 4), jnp.float32) for k in range(leaves)}
    text = (
        jax.jit(clip.update)
        .lower(grads, jax.eval_shape(clip.init, grads), grads)
        .compile()
        .as_text()
    )
    return text[text.index("\nENTRY ") :].split("\n}")[0]


@pytest.mark.parametrize("name", CLIPS)
def test_a_leaf_more_is_no_more_kernels_than_it_takes_to_scale_it(name):
    clip, kernels = CLIPS[name]
    few, many = (program(clip, leaves).count(" fusion(") for leaves in (20, 60))
    assert many - few <= 40 * kernels + 4  # what is done to all is more steps if it is longer
