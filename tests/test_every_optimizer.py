"""Around every optimizer of Optax: a good step is that of the bare optimizer, and a bad one has
never been.
"""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import optaxclip

PARAMS = {"w": jnp.arange(1.0, 7.0).reshape(2, 3) / 7, "b": jnp.array([0.5, -1.0])}
SGD, CLIP = optax.sgd(0.1, momentum=0.9), optaxclip.clip_by_global_norm(1e6, record=False)
BAD = np.array([False, False, True, False, False])
SEEDS = 2


class Row(NamedTuple):
    """How to make an optimizer, and what is special about its trees."""

    make: Callable[[], Any]
    params: Callable[[Any], Any] = lambda params: params
    # of the parameters, those that gradients belong to
    learned: Callable[[Any], Any] = lambda params: params
    gradients: Callable[[Any], Any] = lambda grads: grads
    primed: bool = False  # whether its state has its structure only after one step
    extra: str = "value"  # arguments of its `update`
    carries: str = ""  # why not, if `error_feedback` can't be used


def plain(module: Any, *names: str) -> dict[str, Row]:
    """Optimizers that need no argument, or a learning rate alone."""

    def row(make: Callable[..., Any]) -> Row:
        needs = [p for p in inspect.signature(make).parameters.values() if p.default is p.empty]
        return Row(functools.partial(make, *[0.1 for p in needs if p.name == "learning_rate"]))

    return {name: row(getattr(module, name)) for name in names}


def each_example(grads: Any) -> Any:
    # after the seeds and the steps
    return jax.tree.map(lambda g: jnp.stack([g, 2 * g], axis=2), grads)


def random(param: Any) -> jax.Array:
    """A gradient of this parameter for each seed and step."""
    rng = np.random.default_rng(param.size)
    parts = rng.standard_normal((2, SEEDS, len(BAD), *param.shape))
    return jnp.asarray(
        parts[0] + 1j * parts[1] if param.dtype == jnp.complex64 else parts[0], param.dtype
    )


LOOKAHEAD = "its gradients are those of the fast parameters alone: the clip belongs inside"
EXAMPLES = "its gradients are those of each example: the clip belongs behind it"
SEARCH = "value grad value_fn"
LABELS = {"w": "one", "b": "other"}
OPTAX = {
    **plain(
        optax,
        *"adabelief adadelta adafactor adagrad adam adamax".split(),
        *"adamaxw adamw adan add_decayed_weights amsgrad apply_every".split(),
        *"centralize chain fromage identity".split(),
        *"keep_params_nonnegative lamb lars lion normalize_by_update_norm".split(),
        *"novograd optimistic_adam optimistic_adam_v2 optimistic_gradient_descent".split(),
        *"polyak_sgd radam rmsprop rprop".split(),
        *"scale_by_adadelta scale_by_adam scale_by_adamax".split(),
        *"scale_by_adan scale_by_amsgrad scale_by_belief".split(),
        *"scale_by_distance_over_gradients scale_by_factored_rms".split(),
        *"scale_by_lbfgs scale_by_learning_rate scale_by_lion".split(),
        *"scale_by_novograd scale_by_optimistic_gradient".split(),
        *"scale_by_param_block_norm scale_by_param_block_rms".split(),
        *"scale_by_polyak scale_by_radam scale_by_rms".split(),
        *"scale_by_rprop scale_by_rss scale_by_sign scale_by_sm3".split(),
        *"scale_by_stddev scale_by_trust_ratio scale_by_yogi set_to_zero sgd".split(),
        *"sign_sgd signum sm3 yogi zero_nans".split(),
    ),
    "MultiSteps": Row(lambda: optax.MultiSteps(SGD, 2)),
    "adaptive_grad_clip": Row(lambda: optax.adaptive_grad_clip(0.1)),
    "add_noise": Row(lambda: optax.add_noise(0.1, 0.5, key=jax.random.key(3))),
    "apply_if_finite": Row(lambda: optax.apply_if_finite(SGD, 3)),
    "chain": Row(
        lambda: optax.chain(
            optax.scale_by_adam(), optax.add_decayed_weights(0.1), optax.scale(-0.1)
        )
    ),
    "clip": Row(lambda: optax.clip(0.1)),
    "clip_by_block_rms": Row(lambda: optax.clip_by_block_rms(0.1)),
    "clip_by_global_norm": Row(lambda: optax.clip_by_global_norm(0.1)),
    "conditionally_mask": Row(lambda: optax.conditionally_mask(SGD, lambda step: step % 2 == 0)),
    "conditionally_transform": Row(
        lambda: optax.conditionally_transform(SGD, lambda step: step % 2 == 0)
    ),
    "ema": Row(lambda: optax.ema(0.9)),
    "flatten": Row(lambda: optax.flatten(SGD)),
    "freeze": Row(lambda: optax.freeze({"w": True, "b": False})),
    "inject_hyperparams": Row(
        lambda: optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.1, 0.0, 9))
    ),
    "inject_stateful_hyperparams": Row(lambda: optax.inject_stateful_hyperparams(optax.adam)(0.1)),
    "lbfgs": Row(lambda: optax.lbfgs(linesearch=optax.scale_by_zoom_linesearch(3)), extra=SEARCH),
    "lookahead": Row(
        lambda: optax.lookahead(SGD, 2, 0.5),
        optax.LookaheadParams.init_synced,
        lambda p: p.fast,
        carries=LOOKAHEAD,
    ),
    "masked": Row(lambda: optax.masked(SGD, {"w": True, "b": False})),
    "measure_with_ema": Row(
        lambda: optax.monitor({"norm": optax.measure_with_ema(optax.tree.norm, 0.9)}), primed=True
    ),
    "monitor": Row(lambda: optax.monitor({"norm": optax.tree.norm}), primed=True),
    "multi_transform": Row(
        lambda: optax.multi_transform({"one": SGD, "other": optax.adam(0.1)}, LABELS)
    ),
    "named_chain": Row(lambda: optax.named_chain(("one", SGD), ("other", optax.scale(2.0)))),
    "noisy_sgd": Row(lambda: optax.noisy_sgd(0.1, key=3)),
    "partition": Row(lambda: optax.partition({"one": SGD, "other": optax.set_to_zero()}, LABELS)),
    "scale": Row(lambda: optax.scale(-0.1)),
    "scale_by_backtracking_linesearch": Row(
        lambda: optax.chain(
            optax.scale(-1.0), optax.scale_by_backtracking_linesearch(3, store_grad=True)
        ),
        extra=SEARCH,
    ),
    "scale_by_schedule": Row(lambda: optax.scale_by_schedule(optax.linear_schedule(-0.1, 0.0, 9))),
    "scale_by_zoom_linesearch": Row(
        lambda: optax.chain(optax.scale(-1.0), optax.scale_by_zoom_linesearch(3)), extra=SEARCH
    ),
    "selective_transform": Row(
        lambda: optax.selective_transform(SGD, freeze_mask={"w": True, "b": False})
    ),
    "snapshot": Row(lambda: optax.snapshot("norm", optax.tree.norm)),
    "stateless": Row(
        lambda: optax.stateless(lambda updates, params: jax.tree.map(jnp.add, updates, params))
    ),
    "stateless_with_tree_map": Row(lambda: optax.stateless_with_tree_map(jnp.add)),
    "trace": Row(lambda: optax.trace(0.9, nesterov=True)),
    "with_extra_args_support": Row(lambda: optax.with_extra_args_support(SGD)),
}
CONTRIB = {
    **plain(
        optax.contrib,
        *"acprop ademamix adopt cocob dadapt_adamw dog dowg galore madgrad momo".split(),
        *"momo_adam muon normalize prodigy".split(),
        *"reduce_on_plateau scale_by_acprop scale_by_ademamix scale_by_adopt".split(),
        *"scale_by_cocob scale_by_galore scale_by_madgrad scale_by_simplified_ademamix".split(),
        *"schedule_free_adamw schedule_free_sgd simplified_ademamix".split(),
    ),
    "differentially_private_aggregate": Row(
        lambda: optax.contrib.differentially_private_aggregate(0.1, 0.5, key=3),
        gradients=each_example,
        carries=EXAMPLES,
    ),
    "dpsgd": Row(
        lambda: optax.contrib.dpsgd(0.1, 0.1, 0.5, seed=3), gradients=each_example, carries=EXAMPLES
    ),
    "hutchinson_estimator_diag_hessian": Row(
        optax.contrib.hutchinson_estimator_diag_hessian, extra="obj_fn"
    ),
    "mechanize": Row(lambda: optax.contrib.mechanize(SGD)),
    "sam": Row(lambda: optax.contrib.sam(SGD, optax.contrib.normalize()), extra=""),
    "scale_by_muon": Row(
        lambda: optax.contrib.scale_by_muon(
            weight_dimension_numbers=optax.contrib.MuonDimensionNumbers()
        ),
        lambda params: params["w"],
    ),
    "schedule_free": Row(lambda: optax.contrib.schedule_free(SGD, 0.1)),
    "sophia": Row(lambda: optax.contrib.sophia(0.1), extra="obj_fn"),
    "split_real_and_imaginary": Row(
        lambda: optax.contrib.split_real_and_imaginary(optax.adam(0.1)),
        functools.partial(jax.tree.map, lambda x: x * jnp.exp(1j * x)),
    ),
}
MORE = {
    "apply_if_finite in MultiSteps": Row(
        lambda: optax.MultiSteps(optax.apply_if_finite(SGD, 3), 2)
    ),
    "sam in one call": Row(
        lambda: optax.contrib.sam(
            SGD, optax.chain(optax.contrib.normalize(), optax.scale(0.1)), opaque_mode=True
        ),
        extra="grad_fn",
    ),
}
NO_OPTIMIZERS = {  # what is returned by these functions, that do not say what they return, is none
    *"WrappedSchedule matrix_inverse_pth_root".split(),
    *"schedule_free_eval_params sigmoid_binary_cross_entropy".split(),
    *"update_infinity_moment update_moment update_moment_per_elem_norm".split(),
}
ROWS = OPTAX | CONTRIB | MORE


def carried(inner: Any) -> Any:
    """`error_feedback` before the optimizer, with a clip that cuts nothing off, and around it,
    where it forgets what is cut off.
    """
    return optaxclip.error_feedback(optax.chain(optaxclip.error_feedback(CLIP), inner), decay=0.0)


def spikes_of(row: Row) -> dict[str, Any]:
    """What to watch: the norm and the loss, or the norm alone if the row is not told the loss."""
    loss = {"norm": 1e6, "loss": optaxclip.thresholds.zscore(1e6)}
    if "value" in row.extra.split() and not row.primed:
        return {"threshold": loss, "watch": "both", "patience": None}
    return {"threshold": 1e6, "where": lambda path: True}


def makes_optimizers(name: str, value: Any) -> bool:
    """Whether something public may be an optimizer: it says so, or says nothing."""
    if name.startswith("_") or inspect.isclass(value):
        return (
            not name.startswith("_")
            and hasattr(value, "init")
            and hasattr(value, "update")
            and not hasattr(value, "_fields")
        )
    if not inspect.isfunction(value):
        return False
    returned = inspect.signature(value).return_annotation
    return returned is inspect.Signature.empty or "GradientTransformation" in str(returned)


@pytest.mark.parametrize(("module", "rows"), [(optax, OPTAX), (optax.contrib, CONTRIB)])
def test_every_optimizer_is_listed(module, rows):
    found = {name for name, value in vars(module).items() if makes_optimizers(name, value)}
    assert found - NO_OPTIMIZERS == set(rows)


def loss(params: Any, step: Any = 0) -> Any:
    return sum(jnp.sum(jnp.abs(x - 0.1 * step) ** 2) for x in jax.tree.leaves(params))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def run(row: Row, optimizers: tuple[tuple[str, Any], ...], carries: Any, gradients: Any) -> Any:
    """Each optimizer's state before, updates, and state after, at steps of which one has a gradient
    with NaN.
    """

    def advance(name: str, optimizer: Any, carry: Any, grads: Any, bad: Any) -> Any:
        params, state = carry
        known = {"value": jnp.abs(jax.tree.leaves(grads)[0]).sum(), "grad": grads}
        known |= {"value_fn": loss, "obj_fn": loss, "grad_fn": jax.grad(loss)}
        if name != "bare":
            grads = jax.tree.map(
                lambda g: g.at[(0,) * g.ndim].set(jnp.where(bad, jnp.nan, g[(0,) * g.ndim])), grads
            )
        takes = inspect.signature(optimizer.update).parameters
        passed = (
            row.extra.split()
            if name != "bare" or "extra_args" in takes or row.extra in takes
            else []
        )
        if name != "bare":  # the loss is as bad as the gradient
            known["value"] *= jnp.where(bad, jnp.nan, 1)
        updates, after = optimizer.update(
            grads, state, params, **{key: known[key] for key in passed}
        )
        if name == "bare":  # the run without the bad step
            updates = jax.tree.map(lambda x: jnp.where(bad, 0, x), updates)
            after = jax.tree.map(lambda new, old: jnp.where(bad, old, new), after, state)
        return (optax.apply_updates(params, updates), after), (updates, state, after)

    def step(carries: Any, at: Any) -> Any:
        results = {
            name: advance(name, optimizer, carries[name], *at) for name, optimizer in optimizers
        }
        return {name: carry for name, (carry, _) in results.items()}, {
            name: seen for name, (_, seen) in results.items()
        }

    return jax.vmap(lambda carries, gradients: jax.lax.scan(step, carries, (gradients, BAD)))(
        carries, gradients
    )


def numbers(tree: Any) -> Any:
    def raw(x: Any) -> np.ndarray:
        return np.asarray(
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        )

    return jax.tree.map(raw, tree)


@pytest.mark.parametrize("name", ROWS)
def test_good_steps_are_those_of_the_bare_optimizer_and_bad_ones_leave_no_trace(name):
    row = ROWS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Optax will leave out some
        inner = row.make()
    optimizers = {
        "bare": inner,
        "skip_nonfinite": optaxclip.skip_nonfinite(inner),
        "skip_spikes": optaxclip.skip_spikes(
            inner if row.carries else carried(inner),
            **spikes_of(row),
        ),
    }

    def start(scale: Any) -> Any:
        params = row.params(jax.tree.map(lambda p: p * scale, PARAMS))
        states = {key: optimizer.init(params) for key, optimizer in optimizers.items()}
        if row.primed:
            states = {
                key: optimizer.update(params, states[key], params)[1]
                for key, optimizer in optimizers.items()
            }
        return {key: (params, state) for key, state in states.items()}

    carries = jax.vmap(start)(jnp.linspace(1.0, 2.0, SEEDS))
    carries = jax.tree.map(lambda x: x.copy(), carries)  # to be donated: none may be there twice
    params = row.learned(jax.eval_shape(lambda: row.params(PARAMS)))
    gradients = row.gradients(jax.tree.map(random, params))
    carries, seen = numbers(run(row, tuple(optimizers.items()), carries, gradients))
    updates_of_bare, _, _ = seen.pop("bare")
    for updates, before, after in seen.values():
        assert (after.skipped_steps[:, -1] == 1).all()
        jax.tree.map(lambda x: np.testing.assert_array_equal(x[:, BAD], 0), updates)
        jax.tree.map(
            lambda x, y: np.testing.assert_array_equal(x[:, BAD], y[:, BAD]),
            after.inner,
            before.inner,
        )
        # Not to the bit: a product is fused with a sum in some of the programs, and then rounded
        # once instead of twice.
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6),
            updates,
            updates_of_bare,
        )
