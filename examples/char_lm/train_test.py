"""The example does what it says: it learns, clips, survives, and goes on where it was."""
# ruff: noqa: D103  # a test's name says what holds

import importlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import model
import numpy as np
import optax
import pytest
import sweep
import text
import train
from configs.default import get_config
from ml_collections import FrozenConfigDict
from optimizer import CLIPS, clip_layers, corrupt, layer, make_clip, make_optimizer

from optaxclip import norms, scopes, telemetry

# its names are made on import
event_pb2: Any = importlib.import_module("tensorboardX.proto.event_pb2")
LIMITS = {"lstm": 1e-3, "output": 1e-2}
TINY = {"embed": 4, "units": 8, "batch": 4, "length": 8, "steps": 6, "every": 3, "characters": 20}


def tiny(**settings) -> Any:
    config = get_config()
    config.update(TINY | settings)
    return config


def advanced(steps, **settings):
    config = FrozenConfigDict(tiny(**settings))
    return train.advance(config, steps, 0, train.start(config, 0))


def assert_same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_loss_falls():
    _, losses = advanced(150, units=32, optimizer="adam", learning_rate=0.03, clip="autoclip")
    assert losses[0] == pytest.approx(np.log(len(text.VOCABULARY)), abs=0.3)
    assert losses[-20:].mean() < losses[0] - 1.2


def test_every_step_of_every_seed_has_a_batch_of_its_own():
    config = FrozenConfigDict(tiny(learning_rate=0.0))
    losses = [train.advance(config, 3, seed, train.start(config, 0))[1] for seed in (0, 1)]
    assert len(np.unique(losses)) == 6


CONFIG = FrozenConfigDict(tiny())
START = model.init(CONFIG, jax.random.key(0))
LOSS = jax.jit(
    jax.value_and_grad(
        lambda params: model.loss(params, CONFIG, text.batch(jax.random.key(1), 4, 8))
    )
)


@pytest.mark.parametrize("clip", CLIPS)
def test_every_clip_trains_and_says_what_it_did(clip):
    optimizer = make_optimizer(tiny(clip=clip, learning_rate=3.0), jax.random.key(0))
    update, params, state, losses = jax.jit(optimizer.update), START, optimizer.init(START), []
    for _ in range(5):
        value, grads = LOSS(params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(value))
    metrics = telemetry.metrics(state, params)
    assert sorted(losses, reverse=True) == losses and losses[-1] < losses[0] - 1e-3
    assert metrics["clip/steps"] == 5 and metrics["clip/nonfinite_steps"] == 0
    assert metrics["clip/size_before"] > 0


@pytest.mark.parametrize(
    ("option", "names"),
    [("clip", "none, value, norm, global_norm, layers, agc"), ("optimizer", "sgd, adam")],
)
def test_an_unknown_name_is_told_the_known_ones(option, names):
    with pytest.raises(ValueError, match=rf"config.{option} is 'nothing'; choose one of {names}"):
        make_optimizer(tiny(**{option: "nothing"}), jax.random.key(0))


GRADIENTS: Any = LOSS(START)[1]


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree)))


def applied(transform: Any, grads: Any) -> Any:
    return jax.jit(lambda grads: transform.update(grads, transform.init(grads), grads))(grads)


def test_a_threshold_is_the_limit():
    clipped, state = applied(make_clip(tiny(clip="global_norm", threshold=1e-3)), GRADIENTS)
    assert telemetry.metrics(state)["clip/limit"] == np.float32(1e-3)
    assert norm(clipped) == pytest.approx(1e-3, rel=1e-5)


def test_no_layer_is_above_its_limit():
    limits = np.array([*LIMITS.values()], np.float32)
    monitor = telemetry.monitor(scope=scopes.group(layer), norm=norms.linf())
    clipped, state = applied(
        optax.chain(make_clip(tiny(clip="layers", layers=LIMITS)), monitor), GRADIENTS
    )
    before, after = telemetry.readings(state)
    assert telemetry.group_names(before) == ["lstm", "output"]
    assert telemetry.group_names(after) == ["embedding", "lstm", "output"]
    assert np.all(before.size_before > limits)
    np.testing.assert_array_equal(after.size_before[1:], limits)
    assert_same(clipped["embedding"], GRADIENTS["embedding"])


def test_layers_are_cut_by_value():
    clipped, _ = applied(clip_layers(LIMITS), GRADIENTS)
    for name, limit in LIMITS.items():
        assert_same(
            clipped[name], jax.tree.map(lambda g, c=limit: jnp.clip(g, -c, c), GRADIENTS[name])
        )


def test_graves_limits_are_the_default():
    assert dict(tiny().layers) == {"lstm": 10, "output": 100}


def test_clipping_rescues_a_rate_that_is_too_high():
    wild, tame = (
        advanced(60, units=32, learning_rate=30.0, clip=clip)[1][-20:].mean()
        for clip in ("none", "global_norm")
    )
    assert tame < 4.5
    assert not wild < 2 * tame  # NaN is not, either


def corruption(key, steps=300):
    transform: Any = corrupt(0.2, key)
    _, factors = jax.lax.scan(
        lambda state, g: transform.update(g, state)[::-1],
        transform.init(jnp.ones(())),
        jnp.ones(steps),
    )
    return np.asarray(factors)


def test_corruption_is_a_share_of_all_steps_that_the_key_tells():
    factors = corruption(jax.random.key(0))
    assert set(factors) == {1, 100} and 0.1 < np.mean(factors == 100) < 0.3
    assert_same(factors, corruption(jax.random.key(0)))
    assert not np.array_equal(factors, corruption(jax.random.key(1)))


def test_corruption_is_in_front_of_the_clip():
    _, state = applied(make_optimizer(tiny(corrupt=1.0), jax.random.key(0)), GRADIENTS)
    seen = telemetry.metrics(state)["clip/size_before"]
    assert seen == pytest.approx(100 * norm(GRADIENTS), rel=1e-5)


def test_a_gradient_that_is_not_finite_is_skipped_if_asked_for():
    bad = jax.tree.map(lambda g: g * jnp.nan, GRADIENTS)
    updates, state = applied(
        make_optimizer(tiny(skip_nonfinite=True, corrupt=0.5), jax.random.key(0)), bad
    )
    assert not any(np.any(update) for update in jax.tree.leaves(updates))
    assert telemetry.metrics(state)["clip/skipped_steps"] == 1
    updates, _ = applied(make_optimizer(tiny(), jax.random.key(0)), bad)
    assert all(np.all(np.isnan(update)) for update in jax.tree.leaves(updates))


SETTINGS = {
    "optimizer": "adam",
    "learning_rate": 0.01,
    "clip": "autoclip",
    "corrupt": 0.5,
    "skip_nonfinite": True,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return train.train(tiny(**SETTINGS, every=6), str(folder)), folder


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("halves")
    first = train.train(tiny(**SETTINGS, steps=3), str(folder))
    return first, train.train(tiny(**SETTINGS), str(folder)), folder


def test_a_run_in_two_parts_is_bit_for_bit_the_whole(whole, halves):
    first, second, _ = halves
    assert first.step == 3 and norm(first.params) != norm(second.params)
    assert_same(second, whole[0])


def test_a_run_that_is_killed_goes_on_bit_for_bit(whole, tmp_path, monkeypatch):
    validate, calls = train.validate, []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return validate(*arguments)

    monkeypatch.setattr(train, "validate", killed)
    with pytest.raises(KeyboardInterrupt):
        train.train(tiny(**SETTINGS), str(tmp_path))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
    assert_same(train.train(tiny(**SETTINGS), str(tmp_path)), whole[0])
    assert len(calls) == 3  # it did not start over


def test_a_finished_run_is_left_as_it_is(whole):
    assert_same(train.train(tiny(**SETTINGS), str(whole[1])), whole[0])


def test_a_folder_has_one_run(whole):
    with pytest.raises(
        ValueError,
        match="has a run with another learning_rate, seed; use the same, or another folder",
    ):
        train.train(tiny(**SETTINGS | {"learning_rate": 1.0, "seed": 1}), str(whole[1]))


def events(folder):
    """Reads TensorBoard's records: length, checksum of the length, event, checksum of the event."""
    for file in folder.glob("events*"):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack_from("<Q", data)
            yield event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_tensorboard_gets_losses_and_telemetry(halves):
    _, state, folder = halves
    logged = {
        (value.tag, event.step): value.simple_value
        for event in events(folder)
        for value in event.summary.value
    }
    metrics = telemetry.metrics(state.opt_state, state.params)
    assert {tag for tag, _ in logged} == {"loss", "validation_loss", *metrics}
    assert {step for _, step in logged} == {3, 6}
    assert all(logged[name, 6] == pytest.approx(float(value)) for name, value in metrics.items())
    assert logged["validation_loss", 6] == pytest.approx(
        float(train.validate(FrozenConfigDict(tiny()), state.params))
    )


def test_text_is_split_in_training_and_validation():
    trained = text.decode(text.TRAIN)
    assert text.TEXT == trained + text.decode(text.VALIDATION)
    assert len(trained) == pytest.approx(0.9 * len(text.TEXT), abs=1)
    assert all(text.decode(tokens) in trained for tokens in text.batch(jax.random.key(0), 5, 48))
    assert text.decode(text.validation().ravel()) in text.TEXT[len(trained) :]


def test_batches_reach_both_ends_of_the_text(monkeypatch):
    monkeypatch.setattr(text, "TRAIN", jnp.arange(6))
    assert {tuple(map(int, row)) for row in text.batch(jax.random.key(0), 50, 3)} == {
        (0, 1, 2, 3),
        (1, 2, 3, 4),
        (2, 3, 4, 5),
    }


def test_reading_in_two_parts_is_reading_at_once():
    config = tiny()
    reader = model.model_of(config, model.init(config, jax.random.key(0)))
    tokens = text.batch(jax.random.key(1), 2, 9)
    _, at_once = reader(tokens, reader.blank(2))
    carry, first = reader(tokens[:, :4], reader.blank(2))
    _, rest = reader(tokens[:, 4:], carry)
    np.testing.assert_allclose(jnp.concatenate([first, rest], 1), at_once, rtol=1e-5)


def test_sampled_text_has_the_temperature():
    config = tiny()
    params = model.init(config, jax.random.key(0))
    cold, also_cold, warm = (
        model.sample(config, params, jax.random.key(i), 30, t)
        for i, t in enumerate((1e-6, 1e-6, 1.0))
    )
    assert len(warm) == 30 and set(warm) <= set(text.VOCABULARY)
    assert cold == also_cold != warm


def test_sweep_makes_a_table_of_losses(monkeypatch):
    monkeypatch.setattr(sweep, "CLIPS", {"none": {}, "AGC": {}})
    cell = sweep.measure(FrozenConfigDict(tiny(clip="agc", corrupt=1.0)), 2, jnp.arange(2))
    assert np.all(np.array(cell["loss"]) > 0) and cell["clipped_share"] == [1, 1]
    lines = sweep.table(
        {"SGD": {"none": {"loss": [None, 1.234]}, "AGC": {"loss": [56.78, 2.0]}}}
    ).splitlines()
    assert lines == [
        "| optimizer | none | AGC |",
        "| --- | --- | --- |",
        "| SGD | NaN, 1.23 | 56.8, 2.00 |",
    ]


def test_every_cell_of_the_sweep_has_settings_that_there_are():
    for settings in (row | clip for row in sweep.ROWS.values() for clip in sweep.CLIPS.values()):
        assert set(settings) <= set(get_config())
        make_optimizer(tiny(**settings), jax.random.key(0))


def run(name, *arguments, code=0):
    command = [sys.executable, Path(__file__).with_name(name), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": "error"}
    )
    assert done.returncode == code, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "options"), [("main.py", ["workdir", "config"]), ("sweep.py", ["seeds", "row"])]
)
def test_help_names_every_option(name, options):
    stdout = run(name, "--help", code=1)  # absl's
    assert all(f"--{option}:" in stdout for option in ["seed", "steps", "out", *options])


def test_main_overrides_settings_and_prints_text(tmp_path):
    flags = [f"--config.{name}={value}" for name, value in TINY.items()]
    stdout = run(
        "main.py",
        *flags,
        "--config.clip=layers",
        "--config.layers.lstm=2",
        "--seed=7",
        "--steps=2",
        f"--out={tmp_path}",
    )
    assert len(stdout) == 21 and set(stdout) <= set(text.VOCABULARY)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (
        saved["seed"] == 7
        and saved["clip"] == "layers"
        and saved["layers"] == {"lstm": 2, "output": 100}
    )
    assert (tmp_path / "checkpoints" / "2").is_dir()
