"""The cliff: one step of gradient descent that undoes all steps before it, and how a clip holds.

A network of one unit, `h <- sigmoid(w h + b)`, runs for 50 steps from 1/2; its loss is
`(h - 0.7)^2`. Over the plane of `(w, b)` the loss has two gentle slopes and a wall between them,
where the norm of the gradient exceeds 1e13 (Pascanu et al. 2013, figure 6). Both paths start at
(6, -2.5) with SGD, learning rate 0.5, and meet the wall:

    clip    longest step   ends at (w, b)    loss      of 400 starts, arrive
    none        77.8        39.4,  67.3     0.090              341
    0.2          0.1         3.9,  -1.9     0.00015            400

To arrive is to reach a loss under 0.001 within 2000 steps. It takes 10 seconds.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.style as mpl_style
import numpy as np
import optax
from jax import Array
from matplotlib.figure import Figure
from report import command_line, save

import optaxclip

TARGET, ARRIVED = 0.7, 1e-3
W, B = (3.2, 6.6), (-3.4, -1.4)  # what the picture shows
COLORS = {"none": "#D55E00", "clip": "#0072B2"}
DARK = {"none": "#FF9E57", "clip": "#6CB8FF"}


class Path(NamedTuple):
    """Steps of gradient descent: points `[steps + 1, 2]`, losses `[steps + 1]`, step lengths."""

    points: Array
    losses: Array
    lengths: Array


def loss(point: Array) -> Array:
    """The squared error of the unit after 50 steps; `point` is `(w, b)`."""
    w, b = point
    h = jax.lax.fori_loop(0, 50, lambda _, h: jax.nn.sigmoid(w * h + b), 0.5)
    return (h - TARGET) ** 2


def descend(clip: optax.GradientTransformation, start: Array, rate: float, steps: int) -> Path:
    """Follows the gradient from `start`."""
    optimizer = optax.chain(clip, optax.sgd(rate))

    def step(run: Any, _: None) -> Any:
        point, state = run
        updates, state = optimizer.update(jax.grad(loss)(point), state, point)
        return (point + updates, state), (point, updates)

    (end, _), (points, updates) = jax.lax.scan(step, (start, optimizer.init(start)), length=steps)
    points = jnp.concatenate([points, end[None]])
    return Path(points, jax.vmap(loss)(points), jnp.linalg.norm(updates, axis=-1))


def arrivals(clip: optax.GradientTransformation, rate: float, steps: int) -> Array:
    """Returns which of 20 x 20 starts, spread over the picture, reach the bottom."""
    grid = jnp.stack(jnp.meshgrid(jnp.linspace(*W, 20), jnp.linspace(*B, 20)), -1).reshape(-1, 2)
    return jax.vmap(lambda start: descend(clip, start, rate, steps).losses.min() < ARRIVED)(grid)


def surface(n: int = 241) -> tuple[Array, Array, Array]:
    """Returns the loss on a grid over the picture, `[n, n]` each: w, b, loss."""
    w, b = jnp.meshgrid(jnp.linspace(*W, n), jnp.linspace(*B, n))
    return w, b, jax.jit(jax.vmap(jax.vmap(loss)))(jnp.stack([w, b], -1))


def draw(paths: dict[str, Path], limit: float, dark: bool) -> Figure:
    """Draws the surface, and the two paths from above."""
    style = {"font.size": 13, "axes3d.grid": False}
    with mpl_style.context((mpl_style.library["dark_background"] | style) if dark else style):
        figure = Figure((7, 8.4), layout="constrained")
        panels: Any = figure.subplot_mosaic(
            [["surface"], ["paths"]], per_subplot_kw={"surface": {"projection": "3d"}}
        )
        top, below = panels.values()
        w, b, height = surface()
        top.plot_surface(w, b, height, cmap="viridis", rcount=241, ccount=241, linewidth=0)
        top.view_init(elev=30, azim=-118)
        top.set(
            xlabel="w",
            ylabel="b",
            zlabel="loss",
            zticks=[0, 0.2, 0.4],
            xticks=[4, 5, 6],
            yticks=[-3, -2],
        )
        levels = np.linspace(0, 0.5, 21)
        below.contourf(w, b, height, levels, cmap="viridis", alpha=0.55)
        for name, path in paths.items():
            draw_path(below, path, name, limit, (DARK if dark else COLORS)[name])
        below.set(xlabel="w", ylabel="b", xlim=W, ylim=B)
        mark = {"color": "white" if dark else "black", "markersize": 14, "label": "start"}
        below.plot(*paths["clip"].points[0], "*", linestyle="none", **mark)
        below.legend(loc="lower left")
    return figure


def draw_path(panel: Any, path: Path, name: str, limit: float, color: str) -> None:
    """Draws a path from above, and where a step leaves the picture."""
    label = f"clipped to norm {limit:g}" if name == "clip" else "no clipping"
    points = np.asarray(path.points)
    panel.plot(*points.T, "o-", color=color, markersize=3, linewidth=1.5, label=label)
    longest = int(path.lengths.argmax())
    if path.lengths[longest] > 1:
        ahead = points[longest + 1] - points[longest]
        at = points[longest] + ahead * (B[1] - 0.12 - points[longest][1]) / ahead[1]
        panel.annotate(
            f"one step of length {path.lengths[longest]:.0f}",
            at,
            (-12, 0),
            color=color,
            ha="right",
            va="center",
            textcoords="offset points",
        )


def main() -> None:
    """Descends twice from one start, and from many."""
    parser = command_line("A wall in the loss.", "results/cliff", epochs=False)
    parser.set_defaults(steps=400)
    parser.add_argument("--start", type=float, nargs=2, default=[6.0, -2.5], help="w and b")
    parser.add_argument("--rate", type=float, default=0.5, help="learning rate of SGD")
    parser.add_argument("--limit", type=float, default=0.2, help="largest norm of the gradient")
    options = parser.parse_args()
    clips = {"none": optax.identity(), "clip": optaxclip.clip_by_global_norm(options.limit)}
    paths, rows = {}, {}
    print(f"{'clip':6}{'longest step':>14}{'ends at (w, b)':>18}{'loss':>10}{'arrive':>12}")
    for name, clip in clips.items():
        path = paths[name] = descend(clip, jnp.array(options.start), options.rate, options.steps)
        arrive = arrivals(clip, options.rate, 5 * options.steps)
        end, last, longest = path.points[-1], path.losses[-1], path.lengths.max()
        rows[name] = {"longest": longest, "end": end, "loss": last, "arrive": arrive.sum()}
        where, count = f"{end[0]:.1f}, {end[1]:.1f}", f"{arrive.sum()} of {arrive.size}"
        print(f"{name:6}{longest:14.3g}{where:>18}{last:10.2g}{count:>12}")
    figures = {"light": draw(paths, options.limit, False), "dark": draw(paths, options.limit, True)}
    save(options.out, {"options": vars(options), "rows": rows}, **figures)


if __name__ == "__main__":
    main()
