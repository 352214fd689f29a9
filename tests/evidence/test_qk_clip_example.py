"""examples/qk_clip.py: logits run away without the clip, and stay with it."""

import functools

import numpy as np
import pytest
import qk_clip
from run_example import help_of, in_process

STEPS = 500


@functools.cache
def run(seed, name):
    numbers = qk_clip.train(qk_clip.ROWS[name], seed, STEPS)
    return {key: np.asarray(values) for key, values in numbers.items()}


NONE, LIMITED = qk_clip.ROWS


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_logits_run_away_without_it_and_stay_with_it(seed):
    free, held = run(seed, NONE), run(seed, LIMITED)
    assert free["largest"].max() > 500 and free["largest"][-1] > 400
    # one step may add to what the clip left
    assert held["largest"].max() < 40 and np.median(held["largest"][-100:]) < 25
    assert (free["clipped"] == 0).all() and 0.5 < held["clipped"].mean() < 1


def test_the_tokens_can_be_looked_up():
    question, keys, values, answer = qk_clip.batch(qk_clip.jax.random.key(0))
    place = np.argmax(np.asarray(keys) == np.asarray(question)[:, None], 1)
    np.testing.assert_array_equal(np.asarray(values)[np.arange(len(place)), place], answer)
    assert ((np.asarray(keys) == np.asarray(question)[:, None]).sum(1) == 1).all()


def test_the_numbers_and_the_plot_are_saved(tmp_path):
    found = in_process(qk_clip, tmp_path, "--steps", 20, "--seed", 1)
    assert found["options"]["steps"] == 20 and set(found["rows"]) == set(qk_clip.ROWS)
    assert all(len(values) == 20 for row in found["rows"].values() for values in row.values())
    assert (tmp_path / "qk_clip.png").exists()


def test_help_says_what_it_is(capsys):
    assert "attention" in help_of(qk_clip, capsys)
