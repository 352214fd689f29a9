"""PureJaxRL: a whole actor-critic run as one `jax.jit(jax.vmap(train))(rngs)`, in which one seed
meets a NaN.
"""

import functools
import pickle
from typing import NamedTuple

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from programs import RULES, assert_row_names, assert_same_bits, layer, optimizer

import optaxclip
from optaxclip import scopes, telemetry

UPDATES, EPOCHS, MINIBATCHES, LENGTH, ENVS, SEEDS = 6, 2, 2, 8, 4, 3
BAD_UPDATE, BAD_SEED, BREAK = 1, 2, 3
LAYERS = ("actor/Dense_0", "actor/Dense_1", "critic/Dense_0")


class Transition(NamedTuple):
    obs: jax.Array
    action: jax.Array
    log_prob: jax.Array
    value: jax.Array
    reward: jax.Array


class Actor(nn.Module):
    @nn.compact
    def __call__(self, obs):
        return nn.Dense(2)(nn.tanh(nn.Dense(8)(obs)))


class Critic(nn.Module):
    @nn.compact
    def __call__(self, obs):
        return nn.Dense(1)(obs)[..., 0]


class ActorCritic(nn.Module):
    def setup(self):
        self.actor, self.critic = Actor(), Critic()

    def __call__(self, obs):
        return self.actor(obs), self.critic(obs)


def env_step(obs, action, key):
    """Right is good while the first number is positive."""
    reward = jnp.where(obs[0] > 0, action, 1 - action).astype(float)
    return 0.5 * obs + jax.random.normal(key, obs.shape), reward


def loss_fn(params, apply_fn, batch, advantages, targets):
    logits, value = apply_fn({"params": params}, batch.obs)
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.action[..., None], -1)[..., 0]
    ratio = jnp.exp(log_prob - batch.log_prob)
    gain = jnp.minimum(ratio * advantages, jnp.clip(ratio, 0.8, 1.2) * advantages).mean()
    return jnp.square(value - targets).mean() - gain


def start(rule, rng):
    network = ActorCritic()
    rng, key, reset = jax.random.split(rng, 3)
    params = network.init(key, jnp.zeros(4))["params"]
    state = TrainState.create(apply_fn=network.apply, params=params, tx=optimizer(rule))
    return state, jax.random.normal(reset, (ENVS, 4)), rng


def train(runner, updates, bad):
    """Updates numbered `updates`, of which `bad` has a NaN reward."""

    def one_update(runner, number):
        def env_steps(runner, _):
            state, obs, rng = runner
            rng, act, move = jax.random.split(rng, 3)
            logits, value = state.apply_fn({"params": state.params}, obs)
            action = jax.random.categorical(act, logits)
            log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), action[..., None], -1)[
                ..., 0
            ]
            new, reward = jax.vmap(env_step)(obs, action, jax.random.split(move, ENVS))
            reward = jnp.where(number == bad, jnp.nan, reward)
            return (state, new, rng), Transition(obs, action, log_prob, value, reward)

        def epoch(carry, _):
            state, rng = carry
            rng, key = jax.random.split(rng)
            batch = jax.tree.map(
                lambda x: x.reshape(LENGTH * ENVS, *x.shape[2:]), (rollout, rollout.reward)
            )
            order = jax.random.permutation(key, LENGTH * ENVS)
            shuffled = jax.tree.map(
                lambda x: x[order].reshape(MINIBATCHES, -1, *x.shape[1:]), batch
            )

            def minibatch(state, data):
                batch, targets = data
                loss, grads = jax.value_and_grad(loss_fn)(
                    state.params, state.apply_fn, batch, targets - batch.value, targets
                )
                state = state.apply_gradients(grads=grads)
                return state, {
                    "loss": loss,
                    "norm": optax.tree.norm(grads["critic"]),
                } | telemetry.metrics(state, state.params)

            state, metrics = jax.lax.scan(minibatch, state, shuffled)
            return (state, rng), metrics

        (state, obs, rng), rollout = jax.lax.scan(env_steps, runner, None, LENGTH)
        (state, rng), metrics = jax.lax.scan(epoch, (state, rng), None, EPOCHS)
        return (state, obs, rng), metrics

    return jax.lax.scan(one_update, runner, updates)


train_seeds = jax.jit(jax.vmap(train, in_axes=(0, None, 0)))


@functools.cache
def seeds(rule):
    rngs = jax.random.split(jax.random.PRNGKey(0), SEEDS)  # raw keys, which every format stores
    return jax.jit(jax.vmap(lambda rng: start(rule, rng)))(rngs)


@functools.cache
def whole(rule):
    """The run without a break."""
    return train_seeds(seeds(rule), jnp.arange(UPDATES), bad(BAD_SEED))


def bad(*seeds):
    return jnp.array([BAD_UPDATE if seed in seeds else -1 for seed in range(SEEDS)])


@pytest.mark.parametrize("rule", RULES)
def test_only_the_seed_with_a_nan_skips_its_steps(rule):
    (state, *_), metrics = whole(rule)
    rows = jax.tree.map(np.asarray, metrics)
    per_update = EPOCHS * MINIBATCHES
    assert rows["clip/steps"].shape == (SEEDS, UPDATES, EPOCHS, MINIBATCHES)
    skipped = rows["clip/skipped_steps"].reshape(SEEDS, UPDATES, per_update)
    for seed in range(SEEDS):
        assert skipped[seed, -1, -1] == (per_update if seed == BAD_SEED else 0)
    assert (skipped[BAD_SEED, BAD_UPDATE] == range(1, per_update + 1)).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    assert_row_names(rows, LAYERS)
    finite = np.isfinite(rows["norm"])
    assert (~finite).sum() == per_update and (~finite)[BAD_SEED, BAD_UPDATE].all()
    np.testing.assert_allclose(
        rows["clip/size_before/critic/Dense_0"][finite], rows["norm"][finite], rtol=1e-5
    )
    assert (rows["clip/clipped_steps"][:, -1, -1, -1] > 0).all()


def test_a_seed_in_the_batch_is_the_seed_alone():
    """The NaN of another seed changes no bit of this one."""
    (with_bad, *_), _ = whole("zclip")
    (without, *_), _ = train_seeds(seeds("zclip"), jnp.arange(UPDATES), bad())
    others = jax.tree.map(lambda x: x[:BAD_SEED], (with_bad, without))
    assert_same_bits(*others)


@pytest.mark.parametrize(("rule", "kind"), [("zclip", "msgpack"), ("adagc", "pickle")])
def test_all_seeds_restart_in_the_middle(rule, kind):
    runner, metrics = whole(rule)
    half, first = train_seeds(seeds(rule), jnp.arange(BREAK), bad(BAD_SEED))
    if kind == "msgpack":
        half = flax.serialization.from_bytes(seeds(rule), flax.serialization.to_bytes(half))
    else:
        # a TrainState itself holds functions, which do not pickle
        leaves, treedef = jax.tree.flatten(half)
        half = jax.tree.unflatten(treedef, pickle.loads(pickle.dumps(jax.device_get(leaves))))
    again, second = train_seeds(half, jnp.arange(BREAK, UPDATES), bad(BAD_SEED))
    assert_same_bits(again, runner)
    assert_same_bits(jax.tree.map(lambda *parts: np.concatenate(parts, 1), first, second), metrics)


def test_thresholds_are_swept_in_one_program():
    """One seed for each limit, as hyperparameters are searched."""
    grads = {
        "critic": {"Dense_0": {"kernel": jnp.array([3.0, 4.0])}},
        "actor": {"Dense_0": {"kernel": jnp.array([0.6, 0.8])}},
    }

    def after(limit):
        tx = optax.chain(optaxclip.clip(limit, scopes.group(layer)), optax.sgd(1.0))
        updates, state = tx.update(grads, tx.init(grads))
        return optax.tree.norm(updates["critic"]), telemetry.metrics(state, grads)

    limits = jnp.array([0.5, 2.0, 9.0])
    norms, row = jax.jit(jax.vmap(after))(limits)
    np.testing.assert_allclose(norms, [0.5, 2, 5], rtol=1e-6)
    assert_row_names(row, ("critic/Dense_0", "actor/Dense_0"))
    np.testing.assert_allclose(row["clip/limit/actor/Dense_0"], limits)
