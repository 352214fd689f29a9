"""Draws the pictures of the documentation, and writes its page of methods out of their docstrings:
`scripts/docs` runs it.

Every method clips the same gradients of one matrix: noise around a slowly falling norm, single
spikes, two zero steps, and a level that rises for good. What is drawn is what its own reading says.
What a step costs is kept in `measured/methods.json`; `python -m docs.gallery --measure` writes that
where there is a compiler for TPU, as in the environment of `scripts/bench`.
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
    """One method as it is shown.

    Attributes:
        call: as it is written, but for the name of the library.
        scale: what the stream is multiplied by.
        chain: the optimizer that it makes with Adam; None: not measured.
    """

    call: str
    scale: float = 1.0
    chain: Callable[..., optax.GradientTransformation] | None = lambda clip, adam: optax.chain(
        clip, adam
    )

    @property
    def name(self) -> str:
        """Of the function."""
        return self.call.partition("(")[0]

    def clip(self) -> optax.GradientTransformation:
        """What the call returns."""
        return eval(self.call, dict(vars(optaxclip)))


ENTRIES = {
    "Limits that are given": [
        Entry("clip_by_value(1.0)"),
        Entry("clip_by_norm(4.0)"),
        Entry("clip_by_global_norm(4.0)"),
        Entry("clip_by_block_rms(0.4)"),
        Entry("adaptive_grad_clip(0.4)"),
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

The same 400 gradients through every method: noise around a norm that falls, spikes at steps 120, 180 and 181, two zero steps
at 60, and from step 260 on a level five times as high. Size is what a method measures, of its largest group. Dots are steps in
which something was clipped. The cost is what a step with Adam moves to and from memory on TPU v5e, by the compiler, for the
parameters of GPT-2 and in units of their size: {adam:.2f} for bare Adam, {optax:.2f} with Optax's `clip_by_global_norm`
([performance](performance.md)). The state is that for its 148 leaves, with the four numbers of each group's reading."""


def stream() -> np.ndarray:
    """Gradients `[steps, *shape]`, the same every time."""
    random = np.random.default_rng(0)
    step = np.arange(STEPS)
    norms = (
        2
        * (1 + 2 * np.exp(-step / 40))
        * np.exp(0.2 * random.normal(size=STEPS))
        * np.where(step >= RISE, 5, 1)
    )
    for spike, factor in SPIKES.items():
        norms[spike] *= factor
    norms[[60, 61]] = 0
    directions = random.normal(size=(STEPS, *SHAPE))
    return (norms / np.linalg.norm(directions, axis=(1, 2)))[:, None, None] * directions


def history(entry: Entry) -> Any:
    """What `telemetry.metrics` says of each step of the stream."""
    clip, params = entry.clip(), jnp.array(np.random.default_rng(1).normal(size=SHAPE))

    def step(state: Any, gradient: jax.Array) -> tuple[Any, Any]:
        _, state = clip.update(gradient, state, params)
        return state, telemetry.metrics(state)

    gradients = jnp.array(entry.scale * stream(), jnp.float32)
    return jax.device_get(jax.jit(lambda: jax.lax.scan(step, clip.init(params), gradients)[1])())


def picture(entry: Entry) -> Figure:
    """Size, limit and size after clipping, at each step."""
    figure = Figure((5.6, 2.4), layout="constrained")
    axes = plots.sizes(history(entry), ax=figure.subplots())
    axes.set(title="", ylabel="size")
    return figure


def page() -> str:
    """The page of all methods, from their docstrings; what a step costs is from the benchmarks."""
    costs = json.loads(COSTS.read_text())
    text = [INTRODUCTION.format(adam=costs["adam"], optax=costs["optax"])]
    for heading, entries in ENTRIES.items():
        text.append(f"\n## {heading}")
        for entry in entries:
            before, references = parts(inspect.getdoc(getattr(optaxclip, entry.name)) or "")
            cost_of = (
                f"Cost {costs[entry.name]:.2f}"
                if entry.chain
                else "Cost: a singular value decomposition of each matrix"
            )
            text += [
                f"\n### `{entry.name}`\n\n{before}\n\n![Size, limit and size after "
                f"clipping](gallery/{entry.name}.svg)\n",
                f"*`{entry.call}`. {cost_of}, state {remembered(entry)}.*\n\n"
                f"{references or 'The classic.'} API: {{func}}`optaxclip.{entry.name}`.",
            ]
    return "\n".join(text) + "\n"


def parts(doc: str) -> tuple[str, str]:
    """What a docstring says before its arguments, and its references, as Markdown."""
    before, rest = doc.split("\nArgs:\n")
    before = BLOCK.sub(lambda block: f"$$\n{block[1]}\n$$", before)
    references = re.search(r"\nReferences:\n((?: {4}.*(?:\n|$))+)", rest)
    lines = inspect.cleandoc(references[1]).replace("\n", " ") if references else ""
    return ROLE.sub(r"$\1$", before).strip(), lines


def remembered(entry: Entry) -> str:
    """How large the state is for GPT-2."""
    params = gpt2()
    count = sum(x.size for x in jax.tree.leaves(jax.eval_shape(entry.clip().init, params)))
    share = count / sum(x.size for x in jax.tree.leaves(params))
    return f"{share:.1f} times the parameters" if share > 0.05 else f"{count} numbers"


def direction() -> Figure:
    """A gradient in the plane, clipped as a whole and by element."""
    figure = Figure((5.6, 2.8), layout="constrained")
    gradient = jnp.array([3.0, 1.2])
    for axes, (title, clip) in zip(
        figure.subplots(1, 2, sharey=True),
        {
            "scope tree, limit 2": optaxclip.clip_by_global_norm(2.0),
            "scope element, limit 2": optaxclip.clip_by_value(2.0),
        }.items(),
        strict=True,
    ):
        clipped = clip.update(gradient, clip.init(gradient))[0]
        angle = np.linspace(-0.3, np.pi / 2, 100)
        border = (
            (2 * np.cos(angle), 2 * np.sin(angle))
            if "tree" in title
            else ([2, 2, -0.4], [-0.6, 2, 2])
        )
        axes.plot(*border, color="black", linestyle=(0, (4, 2)), linewidth=1)
        for arrow, style in zip(
            (gradient, clipped),
            (plots.LINES["size_before"], plots.LINES["size_after"]),
            strict=True,
        ):
            axes.annotate(
                "", arrow, (0, 0), arrowprops={"color": style["color"], "width": 2, "headwidth": 9}
            )
            axes.annotate(
                style["label"], arrow, (4, -16), textcoords="offset points", color=style["color"]
            )
        axes.set(
            title=title, xlim=(-0.4, 3.8), ylim=(-0.6, 2.6), aspect="equal", xlabel="first number"
        )
    figure.axes[0].set(ylabel="second number")
    return figure


def response_curves() -> Figure:
    """Size after against size before, at limit 1."""
    figure = Figure((5.6, 2.8), layout="constrained")
    axes, size = figure.subplots(), jnp.linspace(0.005, 3, 600)
    named = ("rescale", "smooth", "drop", "normalize", "band", "automatic", "psac")
    for name, colour in zip(
        named,
        ("#E69F00", "#56B4E9", "#D55E00", "#009E73", "#0072B2", "#CC79A7", "#555555"),
        strict=True,
    ):
        after = getattr(responses, name)(size, size, jnp.ones_like(size))
        axes.plot(size, after, label=name, color=colour, linewidth=3 if name == "rescale" else 1.3)
    axes.set(xlabel="size before, in limits", ylabel="size after, in limits")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def save(figure: Figure, path: Path) -> None:
    """As SVG, the same bytes for the same picture."""
    path.parent.mkdir(exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None})


def measure() -> dict[str, float]:
    """What a step costs on TPU v5e with each method, for GPT-2, in units of its parameters."""
    optimizers = {
        entry.name: entry.chain(entry.clip(), ADAM)
        for entry in sum(ENTRIES.values(), [])
        if entry.chain
    }
    peers = {"adam": ADAM, "optax": optax.chain(optax.clip_by_global_norm(1.0), ADAM)}
    return {
        name: round(cost(optimizer, gpt2(), "v5e").units, 3)
        for name, optimizer in tqdm({**peers, **optimizers}.items())
    }


def main() -> None:
    """Writes the page and all pictures."""
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
