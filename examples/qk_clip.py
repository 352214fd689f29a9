"""An attention layer learns to look up a token: its logits run away, unless QK-Clip holds them.

The learning rate is too high on purpose. Of seeds 0, 1 and 2, with 1500 steps: without the clip the
largest logit reaches 904, 1605 and 3929, and the loss of the last 100 steps is 0.38, 0.17 and 0.82.
With `qk_clip(20)` no logit of any step is above 34, the last ones are 20, and the loss is 0.00. The
clip scales 34 to 46 % of the heads over the run. A step can exceed the limit by what one update
adds.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array
from matplotlib.figure import Figure
from report import command_line, save

import optaxclip
from optaxclip import telemetry

TOKENS, LENGTH, WIDTH, HEADS, BATCH = 16, 8, 32, 4, 64
LIMIT, RATE = 20.0, 0.05
ROWS = {"none": None, f"qk_clip({LIMIT:g})": LIMIT}


class Lookup(nn.Module):
    """Attention from a question to pairs of a key token and a value token."""

    @nn.compact
    def __call__(self, question: Array, keys: Array, values: Array) -> Array:
        """Returns the logits of the answer `[batch, tokens]`."""

        def attend(query: Array, key: Array, value: Array, *args: Any, **options: Any) -> Array:
            logits = jnp.einsum("...qhd,...khd->...hqk", query, key) / query.shape[-1] ** 0.5
            self.sow("logits", "largest", jax.lax.stop_gradient(logits.max((0, 2, 3))))
            return nn.dot_product_attention(query, key, value, *args, **options)

        embed = nn.Embed(TOKENS, WIDTH)
        attention = nn.MultiHeadDotProductAttention(HEADS, attention_fn=attend, name="attention")
        answer = attention(embed(question)[:, None], embed(keys), embed(values))
        return nn.Dense(TOKENS)(answer[:, 0])


def batch(key: Array) -> tuple[Array, Array, Array, Array]:
    """Draws questions, keys without repetition, values, and the answers."""
    first, second, third = jax.random.split(key, 3)
    order = jax.vmap(lambda key: jax.random.permutation(key, TOKENS))
    keys = order(jax.random.split(first, BATCH))[:, :LENGTH]
    values = jax.random.randint(second, (BATCH, LENGTH), 0, TOKENS)
    place = jax.random.randint(third, (BATCH, 1), 0, LENGTH)
    question, answer = (jnp.take_along_axis(x, place, 1)[:, 0] for x in (keys, values))
    return question, keys, values, answer


def train(limit: float | None, seed: int, steps: int) -> dict[str, Array]:
    """Trains once; returns by step the loss, the largest logit, and the share of clipped heads."""
    model, key = Lookup(), jax.random.key(seed)
    params = model.init(key, *batch(key)[:-1])["params"]
    last = optaxclip.qk_clip(jnp.inf if limit is None else limit)
    optimizer = optax.chain(optax.adam(RATE), last)

    def step(carry: Any, key: Array) -> tuple[Any, dict[str, Array]]:
        params, state = carry
        *inputs, answer = batch(key)

        def loss_fn(params: Any) -> tuple[Array, Array]:
            sown: Any
            out, sown = model.apply({"params": params}, *inputs, mutable=["logits"])
            loss = optax.softmax_cross_entropy_with_integer_labels(out, answer).mean()
            return loss, sown["logits"]["largest"][0]

        (loss, largest), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        logits = {"attention": largest}
        updates, state = optimizer.update(grads, state, params, logits=logits)
        metrics = telemetry.metrics(state)
        numbers = {"loss": loss, "largest": metrics["clip/size_before"]}
        numbers["clipped"] = metrics["clip/clipped_share"]
        return (optax.apply_updates(params, updates), state), numbers

    keys = jax.random.split(jax.random.key(seed + 1), steps)
    return jax.jit(lambda *carry: jax.lax.scan(step, carry, keys)[1])(
        params, optimizer.init(params)
    )


def main() -> None:
    """Trains without a limit and with one, and draws the largest logit."""
    parser = command_line("Logits of attention that run away.", "results/qk_clip", epochs=False)
    parser.set_defaults(seeds=1, steps=1500)
    options = parser.parse_args()
    figure, rows = Figure((8, 4), layout="constrained"), {}
    axes = figure.subplots()
    print(f"{'limit':14}{'loss':>10}{'largest logit':>15}{'at the end':>12}{'heads clipped':>15}")
    for name, limit in ROWS.items():
        run = train(limit, options.seed, options.steps)
        loss, end, most = run["loss"][-100:].mean(), run["largest"][-1], run["largest"].max()
        rows[name] = {key: values for key, values in run.items()}
        print(f"{name:14}{loss:10.4f}{most:15.1f}{end:12.1f}{run['clipped'].mean():15.1%}")
        axes.plot(run["largest"], label=name)
    axes.axhline(LIMIT, color="black", linewidth=0.5)
    axes.set(xlabel="step", ylabel="largest attention logit", yscale="symlog")
    axes.legend()
    save(options.out, {"options": vars(options), "rows": rows}, qk_clip=figure)


if __name__ == "__main__":
    main()
