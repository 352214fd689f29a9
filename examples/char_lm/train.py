"""Training that resumes from its last checkpoint, bit for bit as if never interrupted.

Random draws depend only on the seed and the number of the step. So the state of a run is the
weights, the state of the optimizer (clips included) and that number.
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

FREE = ("steps", "every", "characters", "temperature")  # settings that do not affect any step


class State(NamedTuple):
    """The state of a run."""

    params: Any
    opt_state: Any
    step: Array


def keys(seed: Any) -> Array:
    """Returns the keys of weights, batches, corruption and sampled text."""
    return jax.random.split(jax.random.key(seed), 4)


def start(config: Any, seed: Any) -> State:
    """Returns the state of a run before its first step."""
    weights, _, corruption, _ = keys(seed)
    params = init(config, weights)
    return State(params, make_optimizer(config, corruption).init(params), jnp.zeros((), jnp.int32))


@partial(jax.jit, static_argnums=(0, 1))
def advance(config: Any, steps: int, seed: Any, state: State) -> tuple[State, Array]:
    """Takes `steps` steps in one program; returns the new state and the training losses."""
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
    """Returns nats per character of the validation text."""
    return loss(params, config, validation())


def keep_settings(settings: dict[str, Any], folder: Path) -> None:
    """Writes the settings to `config.json`; if the file exists, checks that they are the same.

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
    """Writes the losses and the metrics of the clips for TensorBoard.

    It leaves out infinite limits and NaN, which TensorBoard cannot draw.
    """
    numbers = losses | telemetry.metrics(state.opt_state, state.params)
    for name, value in numbers.items():
        if np.isfinite(value):
            writer.add_scalar(name, float(value), int(state.step))


def train(config: Any, workdir: str) -> State:
    """Trains, or resumes the run in the folder; prints sampled text and returns the last state."""
    folder, seed = Path(workdir).resolve(), config.seed
    kept = {name: value for name, value in config.to_dict().items() if name not in FREE}
    settings = FrozenConfigDict(kept)
    keep_settings(settings.to_dict(), folder)
    state, last_two = start(settings, seed), ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(folder / "checkpoints", options=last_two) as checkpoints:
        if (last := checkpoints.latest_step()) is not None:
            state = checkpoints.restore(last, args=ocp.args.StandardRestore(state))
        done = int(state.step)
        with (
            SummaryWriter(str(folder), purge_step=done + 1) as writer,
            tqdm(total=config.steps, initial=done) as bar,
        ):
            while (done := int(state.step)) < config.steps:
                count = min(config.every, config.steps - done)
                state, losses = advance(settings, count, seed, state)
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
