"""Every line of the tables in docs/coming_from.md: what it says to write there and here is run, on
the same numbers.

A check is keyed by the very text of its line, and gets the code of the first two cells. A line
without a check fails, and so does a check without a line. Caffe does not install today: there its
rule is transcribed from `SGDSolver::ApplyUpdate`.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"  # read when Keras is imported
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import jax_privacy
import keras
import numpy as np
import optax
import pytest
import reference
import tensorflow as tf
import torch
from jax.experimental import checkify
from jax_privacy import clipping

import optaxclip

PAGE = (Path(__file__).parents[2] / "docs" / "coming_from.md").read_text()
# jax_privacy 2.0 calls it
pytestmark = pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated:DeprecationWarning")
TABLES = [line for line in PAGE.splitlines() if line.startswith("| `")]
CHECKS = {}

# norms 13.01 and 0.56
LARGE = [
    np.array([[3.0, -4.0], [0.5, 12.0]], np.float32),
    np.array([0.25, -0.5], np.float32),
]
SMALL = [0.01 * g for g in LARGE]
TOO_LARGE = [np.array([1e20, 1e20], np.float32), np.ones(1, np.float32)]  # the squares overflow
INFINITE = [np.array([np.inf, 1.0], np.float32), np.ones(1, np.float32)]
MISSING = [np.array([np.nan, 3.0], np.float32), np.array([4.0], np.float32)]
HALF = [np.array([300.0, 1.0], np.float16)]
# norms 13 and 0.3
EXAMPLES = [
    np.array([[3.0, 4.0], [0.1, 0.2]], np.float32),
    np.array([[12.0], [0.2]], np.float32),
]
ZEROS = [np.zeros(2, np.float32)]


def line(there, here, differs):
    """The check of the line with these three cells."""

    def register(check):
        key = f"| {there} | {here} | {differs} |"
        assert key not in CHECKS
        CHECKS[key] = check
        return check

    return register


@pytest.mark.parametrize(
    "text", TABLES, ids=lambda text: CHECKS[text].__name__ if text in CHECKS else None
)
def test_what_a_line_says_is_so(text):
    there, here, _ = (cell.strip() for cell in text.strip("|").split(" | "))
    CHECKS[text](there.strip("`"), here.strip("`"))


def test_every_check_has_its_line_and_every_section_its_table():
    assert set(CHECKS) == set(TABLES) and len(TABLES) == len(CHECKS)
    sections = PAGE.split("\n## ")[1:]
    # fmt: skip
    assert [section.split("\n")[0] for section in sections if "| `" in section] == [
        "PyTorch",
        "Keras",
        "TensorFlow",
        "Caffe",
        "Optax",
        "jax_privacy",
        "Trainers",
        "Limits of weights elsewhere",
    ]


def same(found, expected, rtol=1e-6):
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-30)


def norm(tree):
    return np.sqrt(sum(np.sum(np.asarray(x, np.float64) ** 2) for x in jax.tree.leaves(tree)))


# Running a cell


def evaluate(code, **names):
    return eval(
        code,
        {
            "jax": jax,
            "jnp": jnp,
            "optax": optax,
            "optaxclip": optaxclip,
            **vars(optaxclip),
            **names,
        },
    )


def ours(code, *batches, params=None, **options):
    """The sum of the updates after each batch of gradients, and the last state."""
    transform = evaluate(code)
    batches = [list(map(jnp.asarray, grads)) for grads in batches]
    params = batches[0] if params is None else list(map(jnp.asarray, params))
    state, total, update = (
        transform.init(params),
        jax.tree.map(jnp.zeros_like, batches[0]),
        jax.jit(transform.update),
    )
    for grads in batches:
        updates, state = update(grads, state, params, **options)
        total = jax.tree.map(jnp.add, total, updates)
    return list(map(np.asarray, total)), state


def applied(code, grads):
    """What an expression about a tree, called `grads`, gives."""
    return evaluate(code, grads=list(map(jnp.asarray, grads)))


def size_before(state):
    (key,) = [key for key in optaxclip.telemetry.metrics(state) if key.endswith("/size_before")]
    return float(optaxclip.telemetry.metrics(state)[key])


def refused(code, message):
    with pytest.raises(ValueError, match=message):
        evaluate(code)


# PyTorch


def in_torch(code, grads, dtype=torch.float32):
    """The gradients afterwards, and what the call returned."""
    params = [torch.nn.Parameter(torch.zeros(np.shape(g), dtype=dtype)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = torch.tensor(g, dtype=dtype)
    returned = eval(code, {**vars(torch.nn.utils), "torch": torch, "params": params})
    return [p.grad.numpy() for p in params], returned


@line(
    "`clip_grad_norm_(params, 1.0)`",
    "`clip_by_global_norm(1.0)`",
    "Same. But torch adds 1e-6 to the norm: a gradient of 9e-7 becomes 4.7e-7 at the limit 1e-6, "
    "and [3, 4] is not quite "
    "itself at 5. Where squares overflow (float32 1e20) torch returns zeros, here the norm is 1",
)
def torch_global_norm(there, here):
    for grads in LARGE, SMALL:
        same(ours(here, grads)[0], in_torch(there, grads)[0])
    below = [np.array([9e-7], np.float32)]
    same(in_torch(there.replace("1.0", "1e-6"), below)[0], [[4.7368422e-07]])
    np.testing.assert_array_equal(ours(here.replace("1.0", "1e-6"), below)[0], below)
    assert (in_torch(there.replace("1.0", "5.0"), [np.float32([3, 4])])[0][0] < [3, 4]).all()
    assert norm(in_torch(there, TOO_LARGE)[0]) == 0
    assert norm(ours(here, TOO_LARGE)[0]) == pytest.approx(1, rel=1e-6)


@line(
    "`clip_grad_norm_(params, 1.0).item()`",
    '`telemetry.metrics(opt_state)["clip/size_before"]`',
    "Same: the norm *before* the clip. Float16 gradients: torch returns it in float16 (infinite "
    "above 65504), here it is "
    "float32. The norm after the clip is `clip/size_after`",
)
def torch_returns_the_norm(there, here):
    def read(grads):
        return float(evaluate(here, opt_state=ours("clip_by_global_norm(1.0)", grads)[1]))

    assert (
        read(LARGE)
        == pytest.approx(in_torch(there, LARGE)[1], rel=1e-6)
        == pytest.approx(norm(LARGE), rel=1e-6)
    )
    half = [np.array([60000], np.float16)] * 2
    assert in_torch(there, half, torch.float16)[1] == np.inf
    assert read(half) == pytest.approx(60000 * 2**0.5, rel=1e-6)
    after = here.replace("size_before", "size_after")
    assert float(
        evaluate(after, opt_state=ours("clip_by_global_norm(1.0)", LARGE)[1])
    ) == pytest.approx(1)


@line(
    '`clip_grad_norm_(params, 1.0, norm_type=float("inf"))`',
    "`clip_by_global_norm(1.0, norm=norms.linf())`",
    "Same; `norm_type=p` is `norms.lp(p)`, from p = 1 on: less is no norm, and an error here",
)
def torch_norm_type(there, here):
    same(ours(here, LARGE)[0], in_torch(there, LARGE)[0])
    for p in "1", "3":
        same(
            ours(here.replace("linf()", f"lp({p})"), LARGE)[0],
            in_torch(there.replace('float("inf")', p), LARGE)[0],
        )
    assert np.isfinite(in_torch(there.replace('float("inf")', "0.5"), LARGE)[0][0]).all()
    refused(here.replace("linf()", "lp(0.5)"), "p must be")


@line(
    "`clip_grad_norm_(params, 1.0, error_if_nonfinite=True)`",
    '`clip_by_global_norm(1.0, nonfinite="raise")`',
    "Both raise; here through `checkify`, under `jit` as well. Without it, torch makes one "
    "infinity NaN and all else zero, "
    "and here all is NaN",
)
def torch_error_if_nonfinite(there, here):
    with pytest.raises(RuntimeError, match="non-finite"):
        in_torch(there, INFINITE)
    transform = evaluate(here)
    checked = jax.jit(
        checkify.checkify(lambda grads: transform.update(grads, transform.init(grads)))
    )
    with pytest.raises(checkify.JaxRuntimeError, match="the size of 'tree' is not finite"):
        checked(list(map(jnp.asarray, INFINITE)))[0].throw()
    checked(list(map(jnp.asarray, LARGE)))[0].throw()
    np.testing.assert_array_equal(
        np.concatenate(in_torch(there.replace("True", "False"), INFINITE)[0]), [np.nan, 0, 0]
    )
    assert np.isnan(
        np.concatenate(ours('clip_by_global_norm(1.0, nonfinite="propagate")', INFINITE)[0])
    ).all()


@line(
    "`clip_grad_norm_(params, 1.0, foreach=False)`",
    "`clip_by_global_norm(1.0)`",
    "Same. There is no such choice here: the compiler joins the loops over the leaves",
)
def torch_foreach(there, here):
    same(ours(here, LARGE)[0], in_torch(there, LARGE)[0])
    same(ours(here, LARGE)[0], in_torch(there.replace("False", "True"), LARGE)[0])


@line(
    "`clip_grad_norm_(params, -1.0)`",
    "`clip_by_global_norm(-1.0)`",
    "Torch turns the gradient round and ascends; here it is a `ValueError`, or a zero update if "
    "the limit is traced",
)
def torch_negative(there, here):
    assert (np.sign(in_torch(there, LARGE)[0][0]) == -np.sign(LARGE[0])).all()
    refused(here, "max_norm must be in")
    traced = jax.jit(
        lambda limit: clip_leaves(evaluate(here.replace("-1.0", "limit"), limit=limit))
    )
    np.testing.assert_array_equal(np.concatenate(traced(-1.0)), 0)


def clip_leaves(transform):
    leaves = [jnp.ravel(g) for g in LARGE]
    return transform.update(leaves, transform.init(leaves))[0]


@line(
    "`get_total_norm([p.grad for p in params])`",
    "`telemetry.monitor()`",
    "Same number, in `monitor/size_before`, and nothing is changed. Where squares overflow torch "
    "says infinity, here it is the "
    "norm",
)
def torch_total_norm(there, here):
    for grads in LARGE, SMALL:
        clipped, state = ours(here, grads)
        same(clipped, grads, rtol=0)
        assert size_before(state) == pytest.approx(float(in_torch(there, grads)[1]), rel=1e-6)
    assert float(in_torch(there, TOO_LARGE)[1]) == np.inf
    assert size_before(ours(here, TOO_LARGE)[1]) == pytest.approx(1e20 * 2**0.5, rel=1e-6)


@line(
    "`clip_grads_with_norm_(params, 1.0, torch.tensor(20.0))`",
    "`clip_by_global_norm(1.0)`",
    "Torch takes a norm that was measured elsewhere; here the clip is told what to measure: "
    "`update(grads, state, "
    "measured=other)`. For parameters on many devices neither is needed: the norm is that of the "
    "whole",
)
def torch_with_norm(there, here):
    other = [jnp.array([[12.0, 16.0], [0.0, 0.0]]), jnp.zeros(2)]  # norm 20
    same(ours(here, LARGE, measured=other)[0], in_torch(there, LARGE)[0])


@line(
    "`clip_grad_value_(params, 0.5)`",
    "`clip_by_value(0.5)`",
    "Same. An infinite element becomes 0.5 in torch, and NaN here; a negative limit sets all "
    "elements to it in torch, and is "
    "an error here",
)
def torch_value(there, here):
    same(ours(here, LARGE)[0], in_torch(there, LARGE)[0])
    np.testing.assert_array_equal(in_torch(there, INFINITE)[0][0], [0.5, 0.5])
    np.testing.assert_array_equal(ours(here, INFINITE)[0][0], [np.nan, 0.5])
    np.testing.assert_array_equal(
        in_torch(there.replace("0.5", "-0.5"), LARGE)[0][0], np.full((2, 2), -0.5)
    )
    refused(here.replace("0.5", "-0.5"), "limit must be in")


@line(
    "`[clip_grad_norm_([p], 1.0) for p in params]`",
    "`clip_by_norm(1.0)`",
    "Same: each leaf by its own norm",
)
def torch_by_parameter(there, here):
    same(ours(here, LARGE)[0], in_torch(there, LARGE)[0], rtol=3e-6)


@line(
    "`[clip_grad_norm_(group, 1.0) for group in (params[:2], params[2:])]`",
    '`clip(1.0, scope=scopes.group(lambda path: "a" if path in ("0", "1") else "b"))`',
    "Same: one norm for each group of parameters (`optimizer.param_groups` there, names of paths "
    "here). With limits of their "
    'own: `clip({"a": 1.0, "b": 0.1}, ...)`',
)
def torch_param_groups(there, here):
    grads = [*LARGE, 5 * LARGE[0], LARGE[1]]
    same(ours(here, grads)[0], in_torch(there, grads)[0])
    own = "[clip_grad_norm_(params[:2], 1.0), clip_grad_norm_(params[2:], 0.1)]"
    same(
        ours(here.replace("1.0,", '{"a": 1.0, "b": 0.1},'), grads)[0],
        in_torch(own, grads)[0],
        rtol=1e-5,
    )


@line(
    "`(scaler.unscale_(optimizer), clip_grad_norm_(params, 1.0), scaler.step(optimizer))`",
    "`skip_nonfinite(optax.chain(optax.scale(1 / 1024), clip_by_global_norm(1.0), "
    "optax.sgd(1.0)))`",
    "Same for a loss times 1024: unscale first in both, else the limit is 1024 times too small. "
    "Both leave out a step that is "
    "not finite; GradScaler halves its scale then, here the scale is yours to change",
)
def torch_grad_scaler(there, here):
    def step(grads):
        params = [torch.nn.Parameter(torch.zeros(g.shape)) for g in grads]
        optimizer, scaler = (
            torch.optim.SGD(params, lr=1.0),
            torch.amp.GradScaler("cpu", init_scale=1024.0),
        )
        scaler.scale(torch.zeros(()))  # where the scaler starts
        for p, g in zip(params, grads, strict=True):
            p.grad = torch.tensor(1024 * g)
        eval(
            there,
            {**vars(torch.nn.utils), "scaler": scaler, "optimizer": optimizer, "params": params},
        )
        scaler.update()
        return [p.detach().numpy() for p in params], scaler.get_scale()

    scaled = [1024 * g for g in LARGE]
    same(ours(here, scaled)[0], step(LARGE)[0])
    assert norm(ours(here, [1024 * g for g in INFINITE])[0]) == norm(step(INFINITE)[0]) == 0
    assert step(LARGE)[1] == 1024 and step(INFINITE)[1] == 512
    late = "optax.chain(clip_by_global_norm(1.0), optax.scale(1 / 1024))"
    assert norm(ours(late, scaled)[0]) == pytest.approx(1 / 1024, rel=1e-6)


@line(
    "`h.register_hook(lambda g: g.clamp(-1, 1))`",
    "`clip_cotangent(h, 1.0, scope=scopes.element(), response=responses.clamp)`",
    "Same, in the backward pass. The hook changes `h` where it is; here, go on with what is "
    "returned",
)
def torch_hook(there, here):
    w, x, c = np.float32([1.0, 2.0]), np.float32([3.0, 4.0]), np.float32([10.0, 0.5])
    weights = torch.tensor(w, requires_grad=True)
    h = weights * torch.tensor(x)
    eval(there, {"h": h})
    (torch.tensor(c) * h).sum().backward()
    gradient = jax.grad(lambda w: jnp.sum(c * evaluate(here, h=w * x)))(jnp.asarray(w))
    same([gradient], [weights.grad.numpy()])
    same([gradient], [[3.0, 2.0]])


# Keras


def in_keras(code, *batches, dtype="float32", params=None):
    """The variables after a step for each batch of gradients; they start at zero."""
    variables = [
        keras.Variable(np.zeros(g.shape) if params is None else params[i], dtype=dtype)
        for i, g in enumerate(batches[0])
    ]
    optimizer = eval(code, {**vars(keras.optimizers), "keras": keras})
    optimizer.build(variables)
    values, own = [v.value for v in variables], [v.value for v in optimizer.variables]
    for grads in batches:
        values, own = optimizer.stateless_apply(own, [jnp.asarray(g, dtype) for g in grads], values)
    return list(map(np.asarray, values))


@line(
    "`SGD(1.0, clipnorm=1.0)`",
    "`optax.chain(clip_by_norm(1.0), optax.sgd(1.0))`",
    "Same: `clipnorm` is for each variable by itself, not for all. Where squares overflow (float16 "
    "300, float32 1e20) Keras "
    "has zeros, here the norm is 1",
)
def keras_clipnorm(there, here):
    for grads in LARGE, SMALL:
        same(ours(here, grads)[0], in_keras(there, grads))
    assert norm(in_keras(there, HALF, dtype="float16")) == norm(in_keras(there, TOO_LARGE[:1])) == 0
    assert norm(ours(here, HALF)[0]) == pytest.approx(1, rel=2e-3)
    assert norm(ours(here, TOO_LARGE[:1])[0]) == pytest.approx(1, rel=1e-6)


@line(
    "`SGD(1.0, global_clipnorm=1.0)`",
    "`optax.chain(clip_by_global_norm(1.0), optax.sgd(1.0))`",
    "Same, and where something is not finite all is NaN in both. But where squares overflow Keras "
    "has NaN as well, and here "
    "the norm is 1",
)
def keras_global_clipnorm(there, here):
    for grads in LARGE, SMALL:
        same(ours(here, grads)[0], in_keras(there, grads))
    assert np.isnan(np.concatenate([*in_keras(there, INFINITE), *ours(here, INFINITE)[0]])).all()
    assert np.isnan(
        np.concatenate([*in_keras(there, HALF, dtype="float16"), *in_keras(there, TOO_LARGE)])
    ).all()
    assert norm(ours(here, HALF)[0]) == pytest.approx(1, rel=2e-3)
    assert norm(ours(here, TOO_LARGE)[0]) == pytest.approx(1, rel=1e-6)


@line(
    "`SGD(1.0, clipvalue=0.5)`",
    "`optax.chain(clip_by_value(0.5), optax.sgd(1.0))`",
    "Same. An infinite element becomes 0.5 in Keras, and NaN here",
)
def keras_clipvalue(there, here):
    same(ours(here, LARGE)[0], in_keras(there, LARGE))
    np.testing.assert_array_equal(in_keras(there, INFINITE)[0], [-0.5, -0.5])
    np.testing.assert_array_equal(ours(here, INFINITE)[0][0], [np.nan, -0.5])


@line(
    "`SGD(1.0, clipnorm=0.0)`",
    "`optax.chain(clip_by_norm(0.0), optax.sgd(1.0))`",
    "Keras takes 0, and whatever is negative, for no clipping; here 0 lets nothing pass, and -1 is "
    "an error",
)
def keras_zero(there, here):
    for limit in "0.0", "-1.0":
        same(in_keras(there.replace("0.0", limit, 1), LARGE), [-g for g in LARGE])
    assert norm(ours(here, LARGE)[0]) == 0
    refused(here.replace("0.0", "-1.0", 1), "max_norm must be in")


@line(
    "`SGD(1.0, clipnorm=1.0, clipvalue=0.5)`",
    "`optax.chain(clip_by_norm(1.0), clip_by_value(0.5), optax.sgd(1.0))`",
    "Keras allows only one of the three; here a chain has as many as you like, in its order",
)
def keras_two(there, here):
    with pytest.raises(ValueError, match="Only one of"):
        in_keras(there, LARGE)
    expected = [-np.clip(g / max(1, norm(g)), -0.5, 0.5) for g in LARGE]
    same(ours(here, LARGE)[0], expected)


@line(
    "`SGD(1.0, clipnorm=1.0, gradient_accumulation_steps=2)`",
    "`optax.MultiSteps(optax.chain(clip_by_norm(1.0), optax.sgd(1.0)), 2)`",
    "Same: the mean over the two is clipped",
)
def keras_accumulation(there, here):
    batches = LARGE, [0.2 * g[::-1] for g in LARGE]
    same(ours(here, *batches)[0], in_keras(there, *batches))
    apart = "optax.chain(clip_by_norm(1.0), optax.sgd(0.5))"
    assert np.abs(ours(apart, *batches)[0][0] - ours(here, *batches)[0][0]).max() > 0.01


@line(
    "`LossScaleOptimizer(SGD(1.0, clipnorm=1.0), initial_scale=1024.0)`",
    "`skip_nonfinite(optax.chain(optax.scale(1 / 1024), clip_by_norm(1.0), optax.sgd(1.0)))`",
    "Same for a loss times 1024: both unscale, then clip, and leave out what is not finite; Keras "
    "halves its scale then, here "
    "it is yours to change",
)
def keras_loss_scale(there, here):
    scaled = [1024 * g for g in LARGE]
    same(ours(here, scaled)[0], in_keras(there, scaled))
    assert norm(ours(here, INFINITE)[0]) == norm(in_keras(there, INFINITE)) == 0
    optimizer, variable = evaluate(there, **vars(keras.optimizers)), keras.Variable(np.zeros(2))
    optimizer.build([variable])
    _, own = optimizer.stateless_apply(
        [v.value for v in optimizer.variables], INFINITE[:1], [variable.value]
    )
    assert (
        dict(zip([v.name for v in optimizer.variables], own, strict=True))["dynamic_scale"] == 512
    )


@line(
    "`AdamW(0.1, weight_decay=0.5, clipnorm=1.0)`",
    "`optax.chain(clip_by_norm(1.0), optax.adamw(0.1, weight_decay=0.5, eps=1e-7))`",
    "Same: what decays is not clipped, in either. Keras' default epsilon is 1e-7, that of Optax "
    "1e-8",
)
def keras_weight_decay(there, here):
    params = [np.full(g.shape, 2.0, np.float32) for g in LARGE]
    updates = ours(here, LARGE, params=params)[0]
    same(
        [p + u for p, u in zip(params, updates, strict=True)],
        in_keras(there, LARGE, params=params),
        rtol=1e-5,
    )


# Limits of weights

KERNELS, OUTWARD = [LARGE[0], SMALL[0]], [0.5 * LARGE[0][::-1], -2 * SMALL[0]]


def kept(code, **options):
    """The weights after steps that a transform limits."""
    moves, state = ours(code, OUTWARD, params=KERNELS, **options)
    return [w + move for w, move in zip(KERNELS, moves, strict=True)]


def constrained(code):
    """The weights after the same steps, with a constraint of Keras."""
    moved = [w + move for w, move in zip(KERNELS, OUTWARD, strict=True)]
    return [np.asarray(eval(code, {"keras": keras, "w": w})) for w in moved]


def near(found, expected):
    """Equal up to the 1e-7 that Keras adds to a norm."""
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@line(
    "`keras.constraints.MaxNorm(2.0)(w)`",
    "`max_norm(2.0)`",
    "Same for the kernel of a dense layer (axis 0), except that Keras adds 1e-7 to the norm. Put "
    "it last in the chain: it limits the weights after the step",
)
def keras_max_norm(there, here):
    near(kept(here), constrained(there))
    for x in kept(here):
        assert (np.linalg.norm(x, axis=0) <= 2 + 1e-6).all()


@line(
    "`keras.constraints.NonNeg()(w)`",
    "`keep_params(clip_by_value(0.0, jnp.inf))`",
    "Same",
)
def keras_non_neg(there, here):
    for x, y in zip(kept(here), constrained(there), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


@line(
    "`keras.constraints.UnitNorm()(w)`",
    "`keep_params(clip(1.0, scopes.unit(0), response=responses.normalize))`",
    "Same, except for the 1e-7. Here a column of zeros stays zero, as it does there",
)
def keras_unit_norm(there, here):
    near(kept(here), constrained(there))
    zeros = np.zeros((2, 2), np.float32)
    np.testing.assert_array_equal(ours(here, [zeros], params=[zeros])[0][0], zeros)
    np.testing.assert_array_equal(eval(there, {"keras": keras, "w": zeros}), zeros)


@line(
    "`keras.constraints.MinMaxNorm(1.0, 2.0)(w)`",
    "`keep_params(clip(2.0, scopes.unit(0), response=responses.from_target(lambda n, c: "
    "jnp.clip(n, 1.0, c))))`",
    "Same, except for the 1e-7. `responses.band` has the lower end as a share of the upper one",
)
def keras_min_max_norm(there, here):
    near(kept(here), constrained(there))


# TensorFlow


def in_tensorflow(code, grads):
    return eval(code, {"tf": tf, "grads": list(map(tf.constant, grads))})


@line(
    "`[tf.clip_by_norm(g, 1.0) for g in grads]`",
    "`clip_by_norm(1.0)`",
    "Same. Where squares overflow TensorFlow has zeros, here the norm is 1. Zeros at limit 0 are "
    "NaN there, zeros here; a "
    "negative limit counts as 0 there, and is an error here",
)
def tensorflow_norm(there, here):
    for grads in LARGE, SMALL:
        same(ours(here, grads)[0], in_tensorflow(there, grads))
    assert norm(in_tensorflow(there, TOO_LARGE[:1])) == 0
    assert norm(ours(here, TOO_LARGE[:1])[0]) == pytest.approx(1, rel=1e-6)
    assert np.isnan(in_tensorflow(there.replace("1.0", "0.0"), ZEROS)).all()
    same(ours(here.replace("1.0", "0.0"), ZEROS)[0], ZEROS)
    assert norm(in_tensorflow(there.replace("1.0", "-1.0"), LARGE)) == 0
    refused(here.replace("1.0", "-1.0"), "max_norm must be in")


@line(
    "`[tf.clip_by_norm(g, 1.0, axes=[0]) for g in grads]`",
    "`clip_by_norm(1.0, scope=scopes.unit(0))`",
    "Same: each column by its own norm",
)
def tensorflow_axes(there, here):
    same(ours(here, LARGE[:1])[0], in_tensorflow(there, LARGE[:1]))


@line(
    "`[tf.clip_by_value(g, -0.5, 1.0) for g in grads]`",
    "`clip_by_value(-0.5, 1.0)`",
    "Same, for bounds on both sides of 0; others are an error here, except for weights in "
    "`keep_params`. An infinite element becomes 1 there, and NaN here",
)
def tensorflow_value(there, here):
    same(ours(here, LARGE)[0], in_tensorflow(there, LARGE))
    np.testing.assert_array_equal(in_tensorflow(there, INFINITE)[0], [1, 1])
    np.testing.assert_array_equal(ours(here, INFINITE)[0][0], [np.nan, 1])
    refused(here.replace("-0.5", "0.5") + ".init(jnp.zeros(2))", "low must be")


@line(
    "`tf.clip_by_global_norm(grads, 1.0)[0]`",
    "`clip_by_global_norm(1.0)`",
    "Same, and one infinity makes all NaN in both. But where squares overflow all is NaN there, "
    "and the norm is 1 here. A "
    "negative limit does nothing there, and is an error here; zeros at limit 0 are NaN there",
)
def tensorflow_global_norm(there, here):
    for grads in LARGE, SMALL:
        same(ours(here, grads)[0], in_tensorflow(there, grads))
    assert np.isnan(
        np.concatenate([*in_tensorflow(there, INFINITE), *ours(here, INFINITE)[0]])
    ).all()
    assert np.isnan(np.concatenate(in_tensorflow(there, TOO_LARGE))).all()
    assert norm(ours(here, TOO_LARGE)[0]) == pytest.approx(1, rel=1e-6)
    same(in_tensorflow(there.replace("1.0", "-1.0"), LARGE), LARGE)
    refused(here.replace("1.0", "-1.0"), "max_norm must be in")
    assert np.isnan(in_tensorflow(there.replace("1.0", "0.0"), ZEROS)).all()
    same(ours(here.replace("1.0", "0.0"), ZEROS)[0], ZEROS)


@line(
    "`tf.linalg.global_norm(grads)`",
    "`telemetry.monitor()`",
    "Same number, in `monitor/size_before`",
)
def tensorflow_measures(there, here):
    assert size_before(ours(here, LARGE)[1]) == pytest.approx(
        float(in_tensorflow(there, LARGE)), rel=1e-6
    )


@line(
    "`tf.clip_by_global_norm(grads, 1.0, use_norm=tf.constant(20.0))[0]`",
    "`clip_by_global_norm(1.0)`",
    "There a norm is given; here the tree to measure: `update(grads, state, measured=other)`",
)
def tensorflow_use_norm(there, here):
    other = [jnp.array([[12.0, 16.0], [0.0, 0.0]]), jnp.zeros(2)]  # norm 20
    same(ours(here, LARGE, measured=other)[0], in_tensorflow(there, LARGE))


@line(
    "`[tf.compat.v1.clip_by_average_norm(g, 0.5) for g in grads]`",
    '`clip({"0": 4 * 0.5, "1": 2 * 0.5}, scope=scopes.group(lambda path: path))`',
    "Same: the average norm is the norm over the *number* of elements, here 4 and 2, so each leaf "
    "has a limit of its own. "
    "What most want is the root mean square: `clip_by_block_rms`",
)
def tensorflow_average_norm(there, here):
    for grads in LARGE, SMALL:
        same(ours(here, grads)[0], in_tensorflow(there, grads))
    assert np.abs(ours("clip_by_block_rms(0.5)", LARGE)[0][0] - ours(here, LARGE)[0][0]).max() > 0.1


@line(
    "`tf.clip_by_global_norm([tf.IndexedSlices(grads[0], [0, 0])], 1.0)[0]`",
    "`clip_by_global_norm(1.0)`",
    "TensorFlow measures the rows before those of one index are added up, so a word that occurs "
    "twice counts for less. "
    "Gradients of JAX are dense",
)
def tensorflow_indexed_slices(there, here):
    rows = [np.array([[3.0], [4.0]], np.float32)]
    (slices,) = in_tensorflow(there, rows)
    assert float(tf.reduce_sum(slices.values)) == pytest.approx(7 / 5)
    same(ours(here, [rows[0].sum(0)])[0], [[1.0]])


# Caffe


def in_caffe(code, *passes, weights):
    """The step that a solver with these settings takes: clip the sum over the passes, divide, add
    the decay, times the rate.
    """
    settings = {name: float(value) for name, value in re.findall(r"(\w+): (\S+)", code)}
    total, limit = (
        [np.sum(parts, axis=0, dtype=np.float64) for parts in zip(*passes, strict=True)],
        settings["clip_gradients"],
    )
    with np.errstate(invalid="ignore"):  # infinity times zero
        if limit >= 0 and norm(total) > limit:
            total = [g * (limit / norm(total)) for g in total]
    mean = [g / settings.get("iter_size", 1) for g in total]
    return [
        -0.1 * (g + settings.get("weight_decay", 0) * w) for g, w in zip(mean, weights, strict=True)
    ]


WEIGHTS = [np.full(g.shape, 2.0, np.float32) for g in LARGE]


@line(
    "`clip_gradients: 1.0`",
    "`optax.chain(clip_by_global_norm(1.0), optax.sgd(0.1))`",
    "Same. A NaN is not larger than anything, so Caffe does not clip then, and the other elements "
    "are as they were; here all "
    "is NaN",
)
def caffe_clip(there, here):
    for grads in LARGE, SMALL:
        same(ours(here, grads)[0], in_caffe(there, grads, weights=WEIGHTS))
    np.testing.assert_allclose(
        np.concatenate(in_caffe(there, MISSING, weights=[0, 0])), [np.nan, -0.3, -0.4], rtol=1e-6
    )
    assert np.isnan(np.concatenate(ours(here, MISSING)[0])).all()


@line(
    "`clip_gradients: 1.0 iter_size: 4`",
    "`optax.MultiSteps(optax.chain(clip_by_global_norm(1.0 / 4), optax.sgd(0.1)), 4)`",
    "Same. Caffe clips the *sum* over the passes and then divides by their number, so its limit "
    "for the mean is a quarter; "
    "`MultiSteps` takes the mean, then clips",
)
def caffe_iter_size(there, here):
    passes = LARGE, SMALL, [g[::-1] for g in LARGE], SMALL
    same(ours(here, *passes)[0], in_caffe(there, *passes, weights=WEIGHTS))
    assert norm(in_caffe(there, *passes, weights=WEIGHTS)) == pytest.approx(0.1 / 4, rel=1e-6)


@line(
    "`clip_gradients: 1.0 weight_decay: 0.5`",
    "`optax.chain(clip_by_global_norm(1.0), optax.add_decayed_weights(0.5), optax.sgd(0.1))`",
    "Same: the decay is added to what was clipped",
)
def caffe_weight_decay(there, here):
    same(ours(here, LARGE, params=WEIGHTS)[0], in_caffe(there, LARGE, weights=WEIGHTS))


@line(
    "`clip_gradients: -1`",
    "`optax.chain(clip_by_global_norm(jnp.inf), optax.sgd(0.1))`",
    "Same: Caffe's default, no clipping; here -1 is an error, and infinity the limit that clips "
    "nothing",
)
def caffe_off(there, here):
    same(ours(here, LARGE)[0], in_caffe(there, LARGE, weights=WEIGHTS))
    refused(here.replace("jnp.inf", "-1.0"), "max_norm must be in")


# Optax


@line(
    "`optax.clip(0.5)`",
    "`clip_by_value(0.5)`",
    "Same. An infinite element becomes 0.5 there, and NaN here; complex numbers are clipped by "
    "magnitude here, and refused "
    "there",
)
def optax_clip(there, here):
    same(ours(here, LARGE)[0], ours(there, LARGE)[0], rtol=0)
    np.testing.assert_array_equal(ours(there, INFINITE)[0][0], [0.5, 0.5])
    np.testing.assert_array_equal(ours(here, INFINITE)[0][0], [np.nan, 0.5])
    same(ours(here, [np.complex64([3 + 4j])])[0], [np.complex64([0.3 + 0.4j])])
    with pytest.raises(ValueError):
        ours(there, [np.complex64([3 + 4j])])


@line(
    "`optax.clip_by_global_norm(1.0)`",
    "`clip_by_global_norm(1.0)`",
    "Same. Where squares overflow (float16 300, float32 1e20) Optax returns zeros, here the norm "
    "is 1; one infinity makes one "
    "NaN and zeros there, and all NaN here; zeros at limit 0 are NaN there",
)
def optax_global_norm(there, here):
    for grads in LARGE, SMALL:
        same(ours(here, grads)[0], ours(there, grads)[0])
    assert norm(ours(there, HALF)[0]) == norm(ours(there, TOO_LARGE)[0]) == 0
    assert norm(ours(here, HALF)[0]) == pytest.approx(1, rel=2e-3)
    assert norm(ours(here, TOO_LARGE)[0]) == pytest.approx(1, rel=1e-6)
    np.testing.assert_array_equal(np.concatenate(ours(there, INFINITE)[0]), [np.nan, 0, 0])
    assert np.isnan(np.concatenate(ours(here, INFINITE)[0])).all()
    assert np.isnan(ours(there.replace("1.0", "0.0"), ZEROS)[0]).all()
    same(ours(here.replace("1.0", "0.0"), ZEROS)[0], ZEROS)


@line(
    "`optax.clip_by_block_rms(1.0)`",
    "`clip_by_block_rms(1.0)`",
    "Same. A limit that is a float32 array makes bfloat16 updates float32 there, and does not here",
)
def optax_block_rms(there, here):
    for grads in LARGE, SMALL:
        same(ours(here, grads)[0], ours(there, grads)[0])
    narrow, limit = [np.asarray(g, jnp.bfloat16) for g in LARGE], "jnp.float32(1.0)"
    transform = evaluate(there.replace("1.0", limit))
    assert (
        transform.update(list(map(jnp.asarray, narrow)), transform.init(narrow))[0][0].dtype
        == jnp.float32
    )
    transform = evaluate(here.replace("1.0", limit))
    assert (
        transform.update(list(map(jnp.asarray, narrow)), transform.init(narrow))[0][0].dtype
        == jnp.bfloat16
    )


@line(
    "`optax.adaptive_grad_clip(0.01)`",
    "`adaptive_grad_clip(0.01)`",
    "Same, with the same axes. Rank 6 is an error there. A gradient below 1e-6 that is over its "
    "limit is shrunk below it "
    "there (`div_eps`), to it here",
)
def optax_agc(there, here):
    rng = np.random.default_rng(0)
    for shape in (3,), (2, 3), (2, 3, 4), (2, 2, 3, 4), (2, 2, 2, 3, 4):
        params, grads = rng.standard_normal((2, 1, *shape)).astype(np.float32)
        params[0, ..., 0] *= 1e-5  # the floor
        same(ours(here, grads, params=params)[0], ours(there, grads, params=params)[0], rtol=1e-5)
    with pytest.raises(ValueError, match="Expected parameter"):
        ours(
            there,
            [np.ones((1,) * 5 + (2,), np.float32)],
            params=[np.ones((1, 2, 1, 2, 1, 2), np.float32)],
        )
    ours(
        here,
        [np.ones((1, 2, 1, 2, 1, 2), np.float32)],
        params=[np.ones((1, 2, 1, 2, 1, 2), np.float32)],
    )
    tiny, weights = [np.float32([1e-7])], [np.float32([1e-9])]
    assert ours(there.replace("0.01", "1e-5"), tiny, params=weights)[0][0] == pytest.approx(
        1e-9, rel=1e-5
    )
    assert ours(here.replace("0.01", "1e-5"), tiny, params=weights)[0][0] == pytest.approx(
        1e-8, rel=1e-5
    )


@line(
    "`optax.transforms.unitwise_clip(optax.transforms.unitwise_norm(grads[0]), jnp.full((2, 2), "
    "5.0), grads[0])`",
    "`clip_by_norm(5.0, scope=scopes.unit()).update(grads[0], None)[0]`",
    "Same: a limit for each unit",
)
def optax_unitwise_clip(there, here):
    same([applied(here, LARGE)], [applied(there, LARGE)])
    assert (applied(here, LARGE)[:, 0] == LARGE[0][:, 0]).all() and (
        applied(here, LARGE)[:, 1] != LARGE[0][:, 1]
    ).all()


@line(
    "`optax.transforms.unitwise_norm(grads[0])`",
    "`telemetry.monitor(scope=scopes.unit())`",
    "Same norms: `telemetry.last_sizes(state)` has one number for each unit, Optax repeats it for "
    "each element. Units are as "
    "for AGC",
)
def optax_unitwise_norm(there, here):
    (sizes,) = optaxclip.telemetry.last_sizes(ours(here, LARGE[:1])[1]).values()
    same([np.broadcast_to(sizes[0], (2, 2))], [applied(there, LARGE)])


@line(
    "`optax.scale_by_trust_ratio()`",
    "`clip_by_trust_ratio(1.0, response=responses.normalize)`",
    "Same, and zeros stay as they are in both. Without `response` it only shrinks, as LAMBC and "
    "LARC do",
)
def optax_trust_ratio(there, here):
    for grads, params in (
        (LARGE, SMALL),
        (SMALL, LARGE),
        (ZEROS, ZEROS),
        ([np.ones(2, np.float32)], ZEROS),
    ):
        same(ours(here, grads, params=params)[0], ours(there, grads, params=params)[0], rtol=1e-5)


@line(
    "`optax.normalize_by_update_norm()`",
    "`clip(1.0, scopes.tree(), response=responses.normalize)`",
    "Same; Optax adds 1e-6 to the norm, so a gradient of 1e-6 gets the length 0.5 there and 1 here",
)
def optax_normalize(there, here):
    for grads in LARGE, SMALL:
        same(ours(here, grads)[0], ours(there, grads)[0], rtol=1e-5)
    assert ours(there, [np.float32([1e-6])])[0][0] == pytest.approx(0.5)
    assert ours(here, [np.float32([1e-6])])[0][0] == pytest.approx(1)


@line(
    "`optax.inject_hyperparams(optax.clip_by_global_norm)(max_norm=lambda step: 1.0 + step)`",
    "`clip_by_global_norm(lambda step: 1.0 + step)`",
    "Same: a threshold may be a schedule. There the limit gets the dtype of the first leaf: a "
    "`TypeError` where float32 and "
    "bfloat16 are mixed",
)
def optax_schedule(there, here):
    for count in 1, 2, 3:
        batches = [LARGE] * count
        same(ours(here, *batches)[0], ours(there, *batches)[0])
    mixed = [LARGE[0], np.asarray(LARGE[1], jnp.bfloat16)]
    with pytest.raises(TypeError):
        ours(there, mixed)
    assert ours(here, mixed)[0][1].dtype == jnp.bfloat16


@line(
    "`optax.apply_if_finite(optax.sgd(1.0), 2)`",
    "`skip_nonfinite(optax.sgd(1.0))`",
    "Same, but after two such steps in a row Optax takes the third, NaN and all; here none is ever "
    "taken (`max_consecutive=` "
    "makes it an error)",
)
def optax_apply_if_finite(there, here):
    batches = LARGE, [g * np.nan for g in LARGE], [g * np.nan for g in LARGE], SMALL
    same(ours(here, *batches)[0], ours(there, *batches)[0])
    lasting = [[g * np.nan for g in LARGE]] * 3
    assert np.isnan(ours(there, *lasting)[0][0]).all() and norm(ours(here, *lasting)[0]) == 0


@line(
    "`optax.MultiSteps(optax.sgd(1.0), 2, should_skip_update_fn=optax.skip_not_finite)`",
    "`skip_nonfinite(optax.MultiSteps(optax.sgd(1.0), 2))`",
    "Same: a small batch that is not finite is left out of the mean",
)
def optax_skip_not_finite(there, here):
    batches = LARGE, [g * np.nan for g in LARGE], SMALL
    same(ours(here, *batches)[0], ours(there, *batches)[0])


@line(
    "`optax.MultiSteps(optax.sgd(1.0), 2, "
    "should_skip_update_fn=functools.partial(optax.skip_large_updates, "
    "max_squared_norm=100.0))`",
    "`skip_spikes(optax.MultiSteps(optax.sgd(1.0), 2), 10.0)`",
    "Same; there the limit is the *square* of the norm. Here it may be a rule that learns, and "
    "after ten in a row "
    "(`patience`) one is taken",
)
def optax_skip_large(there, here):
    batches = SMALL, LARGE, [0.5 * g for g in LARGE]
    there = there.replace("functools.partial", "partial")
    found = evaluate(there, partial=functools.partial)
    state = found.init(list(map(jnp.asarray, SMALL)))
    for grads in batches:
        updates, state = found.update(list(map(jnp.asarray, grads)), state)
    same(ours(here, *batches)[0], updates)
    same(updates, [-(0.01 + 0.5) / 2 * g for g in LARGE])
    assert norm(ours(here, *[LARGE] * 10)[0]) == 0
    # the mean of two that were taken
    assert norm(ours(here, *[LARGE] * 22)[0]) == pytest.approx(norm(LARGE), rel=1e-6)


@line(
    "`optax.per_example_global_norm_clip(grads, 1.0)[0]`",
    '`per_example.aggregate(1.0, reduce="sum").update(grads, None)[0]`',
    "Same. How many were clipped is what Optax returns second, and a share in `state.reading` "
    "here. One NaN makes the sum NaN "
    "there; here that example is zero",
)
def optax_per_example(there, here):
    same(applied(here, EXAMPLES), applied(there, EXAMPLES))
    _, state = applied(here.removesuffix("[0]"), EXAMPLES)
    assert state.reading.clipped_share == applied(there.replace("[0]", "[1]"), EXAMPLES) / 2 == 0.5
    broken = [np.array([[np.nan, 0.0], [0.3, 0.4]], np.float32)]
    assert np.isnan(applied(there, broken)[0]).any()
    same(applied(here, broken), [[0.3, 0.4]])


@line(
    "`optax.per_example_layer_norm_clip(grads, 1.0)[0]`",
    (
        "`per_example.aggregate(1.0 / 2**0.5, scope=scopes.leaf(), "
        'reduce="sum").update(grads, None)[0]`'
    ),
    "Same for two layers: Optax gives each of K layers the limit C / √K, here you give it",
)
def optax_per_layer(there, here):
    same(applied(here, EXAMPLES), applied(there, EXAMPLES))


@line(
    "`optax.contrib.differentially_private_aggregate(1.0, 0.0, key=0)`",
    "`per_example.aggregate(1.0)`",
    "Same without noise. That is a transform of its own here: `optax.add_noise`, or jax_privacy's",
)
def optax_private(there, here):
    def mean(code):
        transform = evaluate(code)
        grads = list(map(jnp.asarray, EXAMPLES))
        return transform.update(grads, transform.init([g[0] for g in grads]))[0]

    same(mean(here), mean(there))


@line(
    "`optax.projections.projection_l2_ball(grads, 1.0)`",
    "`clip_by_global_norm(1.0).update(grads, None)[0]`",
    "Same: a clip is a projection onto a ball, of any tree. Where squares overflow it is zero "
    "there; zeros on a ball of "
    "radius 0 are NaN there",
)
def optax_l2_ball(there, here):
    for grads in LARGE, SMALL:
        same(applied(here, grads), applied(there, grads))
    assert norm(applied(there, TOO_LARGE)) == 0 and norm(applied(here, TOO_LARGE)) == pytest.approx(
        1, rel=1e-6
    )
    assert np.isnan(applied(there.replace("1.0", "0.0"), ZEROS)).all()
    same(applied(here.replace("1.0", "0.0"), ZEROS), ZEROS)


@line(
    "`optax.projections.projection_linf_ball(grads, 0.5)`",
    "`clip_by_value(0.5).update(grads, None)[0]`",
    "Same. That of the l1 ball is none: it thresholds elements, and a clip with `norm=norms.l1()` "
    "shrinks all alike",
)
def optax_linf_ball(there, here):
    same(applied(here, LARGE), applied(there, LARGE))
    projected = applied(
        "optax.projections.projection_l1_ball(grads, 1.0)", [np.float32([3.0, 0.1])]
    )
    clipped = applied(
        "clip(1.0, scopes.tree(), norm=norms.l1()).update(grads, None)[0]", [np.float32([3.0, 0.1])]
    )
    assert projected[0][1] == 0 < clipped[0][1]


# jax_privacy


def in_privacy(code, **names):
    return eval(code, {"jax_privacy": jax_privacy, "clip_pytree": clipping.clip_pytree, **names})


def privately(code, grads):
    return in_privacy(code, grads=list(map(jnp.asarray, grads)))


@line(
    "`clip_pytree(grads, 1.0)[0]`",
    "`clip_by_global_norm(1.0).update(grads, None)[0]`",
    "Same. jax_privacy makes a NaN zero and keeps the rest; here all is NaN, or all "
    'zero with `nonfinite="zero"`. Where squares overflow it returns zeros',
)
def privacy_clip(there, here):
    for grads in LARGE, SMALL:
        same(applied(here, grads), privately(there, grads))
    np.testing.assert_allclose(np.concatenate(privately(there, MISSING)), [0, 0.6, 0.8], rtol=1e-6)
    assert np.isnan(np.concatenate(applied(here, MISSING))).all()
    assert norm(applied(here.replace("(1.0", '(1.0, nonfinite="zero"'), MISSING)) == 0
    assert norm(privately(there, TOO_LARGE)) == 0 and norm(
        applied(here, TOO_LARGE)
    ) == pytest.approx(1, rel=1e-6)


@line(
    "`clip_pytree(grads, 1.0)[1]`",
    "`telemetry.monitor()`",
    "Same number, in `monitor/size_before`. Of 400 bfloat16 leaves of 1 it is 16 there, and 20 "
    "here",
)
def privacy_norm(there, here):
    assert size_before(ours(here, LARGE)[1]) == pytest.approx(
        float(privately(there, LARGE)), rel=1e-6
    )
    many = [np.ones((), jnp.bfloat16)] * 400
    assert float(privately(there, many)) == 16
    assert size_before(ours(here, many)[1]) == pytest.approx(20, rel=1e-6)


@line(
    "`clip_pytree(grads, 4.0, rescale_to_unit_norm=True)[0]`",
    "`optax.chain(clip_by_global_norm(4.0), optax.scale(1 / 4.0))`",
    "Same. At limit 0 it returns the direction; `responses.normalize` does at any limit",
)
def privacy_unit_norm(there, here):
    for grads in LARGE, SMALL:
        same(ours(here, grads)[0], privately(there, grads))
    direction = privately(there.replace("4.0", "0.0"), LARGE)
    same(ours("clip(1.0, scopes.tree(), response=responses.normalize)", LARGE)[0], direction)


PARAMS = {"w": jnp.array([0.5, -1.0, 2.0]), "b": jnp.array(0.3)}
X = jnp.array([[1.0, 2.0, -1.0], [0.1, 0.0, 0.1], [3.0, -1.0, 0.5], [0.2, 0.3, 0.1]])
Y = jnp.array([1.0, 0.2, -2.0, 0.9])


def loss(params, x, y):
    """Of one example."""
    return (jnp.tanh(x @ params["w"]) + params["b"] - y) ** 2


def batch_loss(params, x, y):
    return jnp.mean(jax.vmap(lambda x, y: loss(params, x, y))(x, y))


def both(there, here, **arrays):
    """What two expressions about the losses, `params`, `x`, `y` and other arrays give, compiled."""
    losses, arrays = (
        {"loss": loss, "batch_loss": batch_loss},
        {"params": PARAMS, "x": X, "y": Y, **arrays},
    )
    found = jax.jit(lambda arrays: in_privacy(there, **losses, **arrays))(arrays)
    return found, jax.jit(lambda arrays: evaluate(here, **losses, **arrays))(arrays)


def same_tree(found, expected):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@line(
    "`jax_privacy.clipped_grad(loss, l2_clip_norm=0.5, batch_argnums=(1, 2), "
    "keep_batch_dim=False)(params, x, y)`",
    '`per_example.clipped_grad(loss, 0.5, reduce="sum")(params, x, y)[1]`',
    "Same: the sum over the examples. jax_privacy makes a NaN zero and keeps the rest of that "
    "example; here the example is "
    "zero",
)
def privacy_clipped_grad(there, here):
    same_tree(*both(there, here))
    broken = X.at[0, 0].set(jnp.nan)
    found, expected = both(there, here, x=broken)
    others = both(there, here, x=X[1:], y=Y[1:])[1]
    same_tree(expected, others)
    same_tree(found, others)  # here all of that example's gradient is NaN
    partly = "(lambda p, x, y: p['w'] @ x)"  # one element of its gradient is NaN
    found, expected = both(
        there.replace("loss,", f"{partly},"),
        here.replace("loss,", f"{partly},"),
        x=broken[:1],
        y=Y[:1],
    )
    assert norm(found) == pytest.approx(0.5, rel=1e-6) and norm(expected) == 0


@line(
    "`jax_privacy.clipped_grad(loss, l2_clip_norm=0.5, batch_argnums=(1, 2), keep_batch_dim=False, "
    "normalize_by=4)(params, x, "
    "y)`",
    "`per_example.clipped_grad(loss, 0.5)(params, x, y)[1]`",
    "Same: the mean, which is the default here. A fixed number to divide by is a factor on the sum",
)
@line(
    "`jax_privacy.clipped_grad(batch_loss, l2_clip_norm=0.5, batch_argnums=(1, 2))(params, x, y)`",
    (
        '`per_example.clipped_grad(batch_loss, 0.5, reduce="sum", '
        "keep_batch_axis=True)(params, x, y)[1]`"
    ),
    "Same: the loss gets batches of one. That is the default there, and not here",
)
@line(
    "`jax_privacy.clipped_grad(loss, l2_clip_norm=0.5, batch_argnums=(1, 2), keep_batch_dim=False, "
    "microbatch_size=2)(params, "
    "x, y)`",
    '`per_example.clipped_grad(loss, 0.5, reduce="sum", microbatch=2)(params, x, y)[1]`',
    "Same. It is seldom needed here, where no gradient of an example is stored for most layers",
)
def privacy_the_same(there, here):
    same_tree(*both(there, here))


@line(
    "`jax_privacy.clipped_grad(loss, l2_clip_norm=0.5, batch_argnums=(1, 2), keep_batch_dim=False, "
    "return_grad_norms=True)(params, x, y)[1].grad_norms`",
    "`per_example.clipped_grad(loss, 0.5)(params, x, y)[0][1].sizes[:, 0]`",
    "Same: the norm of each example. What is seen is always returned here, losses as well "
    "(`return_values`)",
)
def privacy_norms(there, here):
    found, expected = both(there, here)
    same([found], [expected], rtol=1e-5)
    values = there.replace("return_grad_norms", "return_values").replace("grad_norms", "values")
    found, seen = both(values, here.removesuffix(".sizes[:, 0]"))
    same([found], [seen.losses])


@line(
    "`jax_privacy.clipped_grad(loss, l2_clip_norm=0.5, batch_argnums=(1, 2), "
    "keep_batch_dim=False)(params, x, y, "
    "is_padding_example=~real)`",
    '`per_example.clipped_grad(loss, 0.5, reduce="sum")(params, x, y, mask=real)[1]`',
    "Same. There the examples that do not count are marked, and here those that do",
)
def privacy_padding(there, here):
    found, expected = both(there, here, real=jnp.array([True, False, True, False]))
    same_tree(found, expected)
    same_tree(
        expected,
        both(there, here.replace(", mask=real", ""), x=X[::2], y=Y[::2], real=jnp.ones(2, bool))[1],
    )


@line(
    "`jax_privacy.clipped_grad(loss, l2_clip_norm=0.5, batch_argnums=(1, 2), "
    "keep_batch_dim=False).sensitivity()`",
    '`per_example.clipped_grad(loss, 0.5, reduce="sum").sensitivity("add_or_remove")`',
    'Same. `"replace"` is twice that. With several limits it is the root of the sum of their '
    "squares",
)
def privacy_sensitivity(there, here):
    found, expected = both(there, here)
    same([found], [expected])
    same([2 * found], [both(there, here.replace("add_or_remove", "replace"))[1]])
    limits = here.replace("0.5", "{'w': 3.0, 'b': 4.0}")
    same([both(there, limits)[1]], [5.0])


# Trainers: what a setting calls in PyTorch


@line(
    "`HF Trainer: max_grad_norm=1.0`",
    "`clip_by_global_norm(1.0)`",
    "Same. 1.0 is the default there",
)
@line(
    "`Accelerate: accelerator.clip_grad_norm_(params, 1.0)`",
    "`clip_by_global_norm(1.0)`",
    "Same. It unscales mixed precision first: cast and unscale before the clip",
)
@line(
    '`DeepSpeed: "gradient_clipping": 1.0`',
    "`clip_by_global_norm(1.0)`",
    "Same. Off by default there",
)
@line("`Megatron: --clip-grad 1.0`", "`clip_by_global_norm(1.0)`", "Same. 1.0 is the default there")
@line("`timm: --clip-grad 1.0`", "`clip_by_global_norm(1.0)`", "Same")
@line(
    "`MLX: clip_grad_norm(grads, 1.0)`",
    "`clip_by_global_norm(1.0)`",
    "Same. MLX returns the norm; here it is in the state",
)
@line(
    "`MaxText: gradient_clipping_threshold=1.0`",
    "`clip_by_global_norm(1.0)`",
    "Same. It is Optax's clip there",
)
@line(
    "`levanter: max_grad_norm=1.0`", "`clip_by_global_norm(1.0)`", "Same. It is Optax's clip there"
)
def trainers_norm_1(there, here):
    for grads in LARGE, SMALL:
        same(ours(here, grads)[0], in_torch("clip_grad_norm_(params, 1.0)", grads)[0])


@line("`Lightning: gradient_clip_val=0.5`", "`clip_by_global_norm(0.5)`", "Same")
def trainers_norm_half(there, here):
    for grads in LARGE, SMALL:
        same(ours(here, grads)[0], in_torch("clip_grad_norm_(params, 0.5)", grads)[0])


@line(
    '`Lightning: gradient_clip_val=0.5, gradient_clip_algorithm="value"`',
    "`clip_by_value(0.5)`",
    "Same",
)
@line("`timm: --clip-grad 0.5 --clip-mode value`", "`clip_by_value(0.5)`", "Same")
def trainers_value(there, here):
    for grads in LARGE, SMALL:
        same(ours(here, grads)[0], in_torch("clip_grad_value_(params, 0.5)", grads)[0])


# Limits of weights elsewhere


def projected(project):
    return [project(w + move) for w, move in zip(KERNELS, OUTWARD, strict=True)]


@line(
    "`H2O max_w2=4.0`",
    "`max_norm(4.0**0.5)`",
    'Same for kernels. H2O leaves the bias out: `scopes.unit(where=lambda path: "bias" not in '
    "path)`",
)
def h2o_max_w2(there, here):
    near(kept(here), projected(lambda w: reference.h2o_max_w2(w, 4.0)))


@line("`WGAN: p.data.clamp_(-0.01, 0.01)`", "`keep_params(clip_by_value(0.01))`", "Same")
def wgan_clamp(there, here):
    limited = projected(lambda w: torch.tensor(w).clamp_(-0.01, 0.01).numpy())
    for x, y in zip(kept(here), limited, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)


@line(
    "`MuonClip: QK-Clip, tau = 100`",
    "`qk_clip(100.0)`",
    "Same. Where trainers compute `min(1, tau / S)`, a negative largest logit gives a negative "
    "factor; here it leaves the weights alone",
)
def muon_clip(there, here):
    layer = {side: {"kernel": np.ones((3, 2, 4), np.float32)} for side in ("query", "key")}
    zeros = jax.tree.map(np.zeros_like, layer)
    clip = evaluate(here)
    for largest in [400.0, 50.0], [-400.0, 200.0]:
        logits = {"": np.array(largest)}
        updates, _ = clip.update(zeros, clip.init(layer), layer, logits=logits)
        after, wanted = optax.apply_updates(layer, updates), reference.qk_clip(layer, largest)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), after, wanted)
    assert min(1, 100 / -400.0) < 0
