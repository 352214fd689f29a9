"""Exploding and vanishing gradients, seen: the norm of the derivative by how far back it flowed.

Through `k` steps of a recurrent network the derivative is a product of `k` Jacobians. Here it is
measured where it flows, by `clip_cotangent` with a probe on the state of every step. The task is
that of `temporal_order.py` at length 20, with plain SGD, 8 runs. The norm after 19 steps back, as a
multiple of the norm after none: at the start, its largest in 800 training steps, and at the end.

    cell  clip             start   largest       end
    rnn   none             0.061       290      0.91
    rnn   global norm      0.061        33       9.3
    rnn   cotangent        0.052        12       5.2
    lstm  none            0.0016       5.3   0.00051
    lstm  global norm     0.0016        10       2.0
    lstm  cotangent       0.0016         3     0.011

Derivatives of an untrained network vanish. Training makes an RNN's explode, and a clip limits how
far: of the whole gradient little, of the derivative at each step a lot. In the LSTM they go on
vanishing without a clip, at this learning rate; with a clip of the whole gradient they come to
flow through all steps, and the network learns. It takes 90 seconds.
"""

from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from matplotlib.figure import Figure
from report import command_line, save
from temporal_order import BATCH, Reader, sequences
from tqdm import tqdm

import optaxclip
from optaxclip import telemetry

CELLS = {"rnn": (nnx.SimpleCell, 0.3), "lstm": (nnx.OptimizedLSTMCell, 3.0)}
# what the optimizer clips, and what the backward pass clips at each step
CLIPS = {"none": (jnp.inf, jnp.inf), "global norm": (0.25, jnp.inf), "cotangent": (jnp.inf, 0.1)}
CHUNK = 100


def logits_of(reader: Reader, x: Array, limit: float, probes: Any) -> Array:
    """Reads symbols `[batch, length]`; the derivative by the state of each step is clipped."""
    cell: Any = reader.rnn.cell
    symbols = jax.nn.one_hot(x, 6)
    graphdef, weights = nnx.split(cell)

    def step(state: Any, inputs: Any) -> tuple[Any, None]:
        symbol, probe = inputs
        state = optaxclip.clip_cotangent(state, limit, probe=probe)
        return nnx.merge(graphdef, weights)(state, symbol)[0], None

    start = cell.initialize_carry(symbols[:, 0].shape, nnx.Rngs(0))
    state, _ = jax.lax.scan(step, start, (symbols.swapaxes(0, 1), probes))
    return reader.out(state[-1] if isinstance(state, tuple) else state)


def probes_of(length: int) -> Any:
    """A probe for each step."""
    return jax.tree.map(lambda zero: jnp.zeros(length), telemetry.probe())


def train(name: str, clip: str, options: Any) -> np.ndarray:
    """Trains all seeds; returns norms `[training steps, seeds, steps back]`."""
    make_cell, rate = CELLS[name]
    limit, cotangent_limit = CLIPS[clip]
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Reader(make_cell, nnx.Rngs(0))))
    optimizer = optax.chain(optaxclip.clip_by_global_norm(limit), optax.sgd(rate))

    def loss(params: Any, probes: Any, x: Array, y: Array) -> Array:
        logits = logits_of(nnx.merge(graphdef, params), x, cotangent_limit, probes)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(run: Any, batch: tuple[Array, Array]) -> tuple[Any, Array]:
        params, state = run
        grads, seen = jax.grad(loss, argnums=(0, 1))(params, probes_of(options.length), *batch)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), seen.size_before[::-1]

    def start(key: Array) -> Any:
        params = nnx.split(Reader(make_cell, nnx.Rngs(key)))[1]
        return params, optimizer.init(params)

    runs = jax.vmap(start)(jax.random.split(jax.random.key(options.seed), options.seeds))
    advance = jax.jit(lambda runs, data: jax.lax.scan(jax.vmap(step), runs, data))
    rng, norms = np.random.default_rng(options.seed), []
    for _ in tqdm(range(0, options.steps, CHUNK), f"{name}, {clip}", leave=False):
        data = sequences(rng, (CHUNK, options.seeds, BATCH), options.length)
        runs, norm = advance(runs, data)
        norms.append(np.asarray(norm))
    return np.concatenate(norms)


def draw(norms: dict[tuple[str, str], np.ndarray]) -> Figure:
    """Draws the median norm by steps back: a panel for each cell and clip, a line for each time."""
    names, clips = ([*dict.fromkeys(keys)] for keys in zip(*norms, strict=True))
    figure = Figure((4 * len(clips), 3.4 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), len(clips), sharey=True, squeeze=False)
    for (name, clip), panel in zip(norms, panels.flat, strict=True):
        times = np.unique(np.linspace(0, len(norms[name, clip]) - 1, 5).astype(int))
        for shade, time in zip(np.linspace(0.15, 0.9, len(times)), times, strict=True):
            median = np.median(norms[name, clip][time], axis=0)
            color = (1 - shade, 0.35, shade)
            panel.semilogy(median, color=color, linewidth=2, label=f"training step {time}")
        top = np.median(norms[name, clip].max(0), axis=0)
        panel.semilogy(top, ":", color="black", linewidth=2, label="largest in training")
        panel.set(title=f"{name.upper()}, {clip}", xlabel="steps back", ylim=(1e-6, 30))
    for panel in panels[:, 0]:
        panel.set_ylabel("norm of the derivative")
    panels[0, 0].legend(fontsize="small", ncols=2)
    return figure


def main() -> None:
    """Trains every cell with every clip."""
    parser = command_line("Derivatives by steps back.", "results/backward_norms", epochs=False)
    parser.set_defaults(seeds=8, steps=800)
    parser.add_argument("--length", type=int, default=20, help="of the sequences, 10 or more")
    options = parser.parse_args()
    print(f"{'cell':6}{'clip':14}{'start':>10}{'largest':>10}{'end':>10}")
    norms, rows = {}, {}
    for name, clip in product(CELLS, CLIPS):
        norm = norms[name, clip] = train(name, clip, options)
        ratio = norm[:, :, 1:] / np.where(norm[:, :, :1] > 0, norm[:, :, :1], np.nan)
        largest = np.nanmax(ratio, axis=(0, 2))
        numbers = {"start": ratio[0, :, -1], "largest": largest, "end": ratio[-1, :, -1]}
        row = rows[f"{name}, {clip}"] = {key: np.median(x) for key, x in numbers.items()}
        print(f"{name:6}{clip:14}" + "".join(f"{x:10.2g}" for x in row.values()))
    save(options.out, {"options": vars(options), "rows": rows}, norms=draw(norms))


if __name__ == "__main__":
    main()
