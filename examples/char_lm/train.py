"""Training that can be killed at any time: started again, it goes on bit for bit as if nothing had
been.

All that a step draws at random is a function of the seed and the number of the step, so weights,
the state of the optimizer (clips included) and that number are the whole state of a run.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax import Array
from ml_collections import FrozenConfigDict
from model import init, loss, sample
from optimizer import make_optimizer
from tensorboardX import SummaryWriter
from text import TEXT, batch, validation
from tqdm import tqdm

from optaxclip import telemetry

FREE = ("steps", "every", "characters", "temperature")  # settings that no step depends on


class State(NamedTuple):
    """A run after so many steps."""

    params: Any
    opt_state: Any
    step: Array


def keys(seed: Any) -> Array:
    """Of weights, batches, corruption, sampled text."""
    return jax.random.split(jax.random.key(seed), 4)


def start(config: Any, seed: Any) -> State:
    """A run that has not begun."""
    weights, _, corruption, _ = keys(seed)
    params = init(config, weights)
    return State(params, make_optimizer(config, corruption).init(params), jnp.zeros((), jnp.int32))


@partial(jax.jit, static_argnums=(0, 1))
def advance(config: Any, steps: int, seed: Any, state: State) -> tuple[State, Array]:
    """So many steps in one program; returns the training loss of each as well."""
    _, batches, corruption, _ = keys(seed)
    optimizer = make_optimizer(config, corruption)

    def step(state: State, _: None) -> tuple[State, Array]:
        tokens = batch(jax.random.fold_in(batches, state.step), config.batch, config.length)
        value, grads = jax.value_and_grad(loss)(state.params, config, tokens)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return State(optax.apply_updates(state.params, updates), opt_state, state.step + 1), value

    return jax.lax.scan(step, state, length=steps)


@partial(jax.jit, static_argnums=0)
def validate(config: Any, params: Any) -> Array:
    """Nats per character of the validation text."""
    return loss(params, config, validation())


def keep_settings(settings: dict[str, Any], folder: Path) -> None:
    """Writes the settings to `config.json`, and compares them with what is there already.

    Raises:
        ValueError: the folder has a run with other settings, or with the text of another version of
            Python.
    """
    settings = settings | {"text": len(TEXT)}
    file = folder / "config.json"
    before = json.loads(file.read_text()) if file.exists() else settings
    if before != settings:
        differ = ", ".join(name for name in settings if settings[name] != before.get(name))
        raise ValueError(
            f"{folder} has a run with another {differ}; use the same, or another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=2))


def log(writer: SummaryWriter, state: State, **losses: float) -> None:
    """Writes the losses, and what the clips did last, for TensorBoard, which has no use for
    infinite limits and NaN.
    """
    numbers = losses | telemetry.metrics(state.opt_state, state.params)
    for name, value in numbers.items():
        if np.isfinite(value):
            writer.add_scalar(name, float(value), int(state.step))


def train(config: Any, workdir: str) -> State:
    """Trains, or goes on with the run that is in the folder; returns its last state, after some
    text that it wrote.
    """
    folder, seed = Path(workdir).resolve(), config.seed
    settings = FrozenConfigDict(
        {name: value for name, value in config.to_dict().items() if name not in FREE}
    )
    keep_settings(settings.to_dict(), folder)
    state = start(settings, seed)
    with ocp.CheckpointManager(
        folder / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2)
    ) as checkpoints:
        if (last := checkpoints.latest_step()) is not None:
            state = checkpoints.restore(last, args=ocp.args.StandardRestore(state))
        done = int(state.step)
        with (
            SummaryWriter(str(folder), purge_step=done + 1) as writer,
            tqdm(total=config.steps, initial=done) as bar,
        ):
            while (done := int(state.step)) < config.steps:
                state, losses = advance(
                    settings, min(config.every, config.steps - done), seed, state
                )
                numbers = {
                    "loss": float(losses.mean()),
                    "validation_loss": float(validate(settings, state.params)),
                }
                log(writer, state, **numbers)
                checkpoints.save(int(state.step), args=ocp.args.StandardSave(state))
                bar.set_postfix(numbers)
                bar.update(len(losses))
    print(sample(settings, state.params, keys(seed)[3], config.characters, config.temperature))
    return state
