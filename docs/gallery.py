"""Draws the plots of the documentation, and writes its gallery of methods; `scripts/docs` runs it.

The texts of the gallery are the docstrings of the methods. Every method clips the same gradients of
one matrix: noise around a slowly falling norm, single spikes, two zero steps, and a level that
rises for good. The plots show the method's reading. The cost of a step is in
`measured/methods.json`; `python -m docs.gallery --measure` writes that file, and needs a compiler
for TPU, as in the environment of `scripts/bench`.
"""

import argparse
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

import optaxclip
from benchmarks.ahead_of_time import cost
from benchmarks.trees import gpt2
from optaxclip import plots, responses, telemetry

DOCS = Path(__file__).parent
STEPS, SHAPE, SPIKES, RISE = 400, (16, 8), {120: 30.0, 180: 5.0, 181: 5.0}, 260


class Entry(NamedTuple):
    """A method in the gallery.

    Attributes:
        call: the call as users write it, without the name of the library.
        scale: the factor by which the gradients are multiplied.
        chain: chains the clip with Adam; None if the cost is not measured.
    """

    call: str
    scale: float = 1.0
    chain: Callable[..., optax.GradientTransformation] | None = optax.chain

    @property
    def name(self) -> str:
        """The name of the function."""
        return self.call.partition("(")[0]

    def clip(self) -> optax.GradientTransformation:
        """Makes the clip."""
        return eval(self.call, dict(vars(optaxclip)))


ENTRIES = {
    "Limits that are given": [
        Entry("clip_by_value(1.0)"),
        Entry("clip_by_norm(4.0)"),
        Entry("clip_by_global_norm(4.0)"),
        Entry("clip_by_block_rms(0.4)"),
        Entry("adaptive_grad_clip(0.4)"),
        Entry("clip_by_trust_ratio(0.4)", chain=None),
    ],
    "Limits that are learned": [
        Entry("autoclip(0.5)"),
        Entry("quantile_clip(0.9)"),
        Entry("zclip()"),
        Entry("adagc()"),
        Entry("history_clip()"),
        Entry("log_norm_clip()"),
        Entry("growth_clip()"),
        Entry("spam_clip(50.0)"),
        Entry("gradient_stabilizer()"),
    ],
    "Other things than gradients, or otherwise": [
        Entry("clippy()", scale=0.01, chain=lambda clip, adam: optax.chain(adam, clip)),
        Entry("scale_by_stable_adam()", chain=lambda clip, _: clip),
        Entry("spectral_clip(1.0)", chain=None),
        Entry("error_feedback(clip_by_global_norm(4.0))"),
    ],
}
ADAM = optax.adam(1e-3)
COSTS = DOCS / "measured" / "methods.json"
ROLE, BLOCK = re.compile(r":math:`([^`]*)`"), re.compile(r"\.\. math:: (.*(?:\n +.*)*)")
INTRODUCTION = """# Methods gallery

Every method clips the same 400 gradients: noise around a falling norm, spikes at steps 120, 180 and
181, two zero steps at 60, and a level five times as high from step 260 on. The plots show the size
of the method's largest group; dots are steps with something clipped. The cost is the memory traffic
of a step with Adam on TPU v5e, from the compiled program, for GPT-2 and in units of its parameters:
{adam:.2f} for bare Adam, {optax:.2f} with Optax's `clip_by_global_norm`
([benchmarks](performance.md)). The state is given for GPT-2's 148 leaves, with the four numbers of
each group's reading."""


def stream() -> np.ndarray:
    """Returns gradients `[steps, *shape]`, the same every time."""
    random = np.random.default_rng(0)
    step = np.arange(STEPS)
    falling, noise = 2 * (1 + 2 * np.exp(-step / 40)), np.exp(0.2 * random.normal(size=STEPS))
    norms = falling * noise * np.where(step >= RISE, 5, 1)
    for spike, factor in SPIKES.items():
        norms[spike] *= factor
    norms[[60, 61]] = 0
    directions = random.normal(size=(STEPS, *SHAPE))
    return (norms / np.linalg.norm(directions, axis=(1, 2)))[:, None, None] * directions


def history(entry: Entry) -> Any:
    """Returns the results of `telemetry.metrics` at each step of the stream."""
    clip, params = entry.clip(), jnp.array(np.random.default_rng(1).normal(size=SHAPE))

    def step(state: Any, gradient: jax.Array) -> tuple[Any, Any]:
        _, state = clip.update(gradient, state, params)
        return state, telemetry.metrics(state)

    gradients = jnp.array(entry.scale * stream(), jnp.float32)
    return jax.device_get(jax.jit(lambda: jax.lax.scan(step, clip.init(params), gradients)[1])())


def picture(entry: Entry) -> Figure:
    """Draws size, limit and size after clipping at each step."""
    figure = Figure((5.6, 2.4), layout="constrained")
    axes = plots.sizes(history(entry), ax=figure.subplots())
    axes.set(title="", ylabel="size")
    return figure


def page() -> str:
    """Writes the page of all methods, from their docstrings and the measured costs."""
    costs = json.loads(COSTS.read_text())
    text = [INTRODUCTION.format(adam=costs["adam"], optax=costs["optax"])]
    for heading, entries in ENTRIES.items():
        text.append(f"\n## {heading}")
        for entry in entries:
            before, references = parts(inspect.getdoc(getattr(optaxclip, entry.name)) or "")
            spectral = "Cost: a singular value decomposition of each matrix"
            cost_of = f"Cost {costs[entry.name]:.2f}" if entry.chain else spectral
            plot = f"![Size, limit and size after clipping](gallery/{entry.name}.svg)"
            text += [
                f"\n### `{entry.name}`\n\n{before}\n\n{plot}\n",
                f"*`{entry.call}`. {cost_of}, state {remembered(entry)}.*\n",
                f"{references or 'The classic.'} API: {{func}}`optaxclip.{entry.name}`.",
            ]
    return "\n".join(text) + "\n"


def parts(doc: str) -> tuple[str, str]:
    """Returns the text of a docstring before its arguments, and its references, as Markdown."""
    before, rest = doc.split("\nArgs:\n")
    before = BLOCK.sub(lambda block: f"$$\n{block[1]}\n$$", before)
    references = re.search(r"\nReferences:\n((?: {4}.*(?:\n|$))+)", rest)
    lines = inspect.cleandoc(references[1]).replace("\n", " ") if references else ""
    return ROLE.sub(r"$\1$", before).strip(), lines


def remembered(entry: Entry) -> str:
    """Says how large the state is for GPT-2."""
    params = gpt2()
    count = sum(x.size for x in jax.tree.leaves(jax.eval_shape(entry.clip().init, params)))
    share = count / sum(x.size for x in jax.tree.leaves(params))
    return f"{share:.1f} times the parameters" if share > 0.05 else f"{count} numbers"


def direction() -> Figure:
    """Draws a gradient with two elements, clipped as a whole and by element."""
    figure = Figure((5.6, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    angle = np.linspace(-0.3, np.pi / 2, 100)
    circle, square = (2 * np.cos(angle), 2 * np.sin(angle)), ([2, 2, -0.4], [-0.6, 2, 2])
    draw_arrows(left, optaxclip.clip_by_global_norm(2.0), circle)
    draw_arrows(right, optaxclip.clip_by_value(2.0), square)
    left.set(title="scope tree, limit 2", ylabel="second number")
    right.set(title="scope element, limit 2")
    return figure


def draw_arrows(axes: Any, clip: optax.GradientTransformation, border: Any) -> None:
    """Draws a gradient before and after the clip, and the border of the allowed gradients."""
    gradient = jnp.array([3.0, 1.2])
    clipped = clip.update(gradient, clip.init(gradient))[0]
    axes.plot(*border, color="black", linestyle=(0, (4, 2)), linewidth=1)
    for arrow, line in (gradient, "size_before"), (clipped, "size_after"):
        label, color = plots.LINES[line]["label"], plots.LINES[line]["color"]
        look = {"color": color, "width": 2, "headwidth": 9}
        axes.annotate("", arrow, (0, 0), arrowprops=look)
        axes.annotate(label, arrow, (4, -16), textcoords="offset points", color=color)
    axes.set(xlim=(-0.4, 3.8), ylim=(-0.6, 2.6), aspect="equal", xlabel="first number")


def response_curves() -> Figure:
    """Draws the size after clipping against the size before, at limit 1."""
    figure = Figure((5.6, 2.8), layout="constrained")
    axes, size = figure.subplots(), jnp.linspace(0.005, 3, 600)
    names = ("rescale", "smooth", "drop", "normalize", "band", "automatic", "psac")
    colors = ("#E69F00", "#56B4E9", "#D55E00", "#009E73", "#0072B2", "#CC79A7", "#555555")
    for name, color in zip(names, colors, strict=True):
        after = getattr(responses, name)(size, size, jnp.ones_like(size))
        axes.plot(size, after, label=name, color=color, linewidth=3 if name == "rescale" else 1.3)
    axes.set(xlabel="size before, in limits", ylabel="size after, in limits")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def save(figure: Figure, path: Path) -> None:
    """Saves a figure as SVG; equal figures have equal bytes."""
    path.parent.mkdir(exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None})


def measure() -> dict[str, float]:
    """Returns the cost of a step with each method on TPU v5e, in units of GPT-2's parameters."""
    optimizers = {"adam": ADAM, "optax": optax.chain(optax.clip_by_global_norm(1.0), ADAM)}
    for entry in sum(ENTRIES.values(), []):
        if entry.chain:
            optimizers[entry.name] = entry.chain(entry.clip(), ADAM)
    return {
        name: round(cost(optimizer, gpt2(), "v5e").units, 3)
        for name, optimizer in tqdm(optimizers.items())
    }


def main() -> None:
    """Writes the page and all plots."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="only write what a step costs")
    if parser.parse_args().measure:
        COSTS.write_text(json.dumps(measure(), indent=2) + "\n")
        return
    for entry in sum(ENTRIES.values(), []):
        save(picture(entry), DOCS / "gallery" / f"{entry.name}.svg")
    save(direction(), DOCS / "pictures" / "direction.svg")
    save(response_curves(), DOCS / "pictures" / "responses.svg")
    (DOCS / "gallery.md").write_text(page())


if __name__ == "__main__":
    main()
