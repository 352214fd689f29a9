"""How far one example moves the sum: the number holds, is reached, and is refused where unknown."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optaxclip import norms, per_example, responses, scopes, thresholds

PARAMS = {
    "encoder": {"w": np.ones((3, 4), np.float32), "b": np.ones(4, np.float32)},
    "head": np.ones((4, 2), np.float32),
}
LIMITS = {"encoder": 3.0, "head": 4.0}


def loss(params, x):
    """Its gradient is the example."""
    return sum(jax.tree.leaves(jax.tree.map(lambda p, g: jnp.sum(p * g), params, x)))


def made(limit, **options):
    return per_example.clipped_grad(loss, limit, **{"reduce": "sum", **options})


def layer(path):
    return path.split("/")[0]


KNOWN = {
    "tree": (1.5, {}, 1.5),
    "tree of limits": (LIMITS, {}, 5.0),
    "group": (LIMITS, {"scope": scopes.group(layer)}, 5.0),
    "group, one limit": (2.0, {"scope": scopes.group(layer)}, 8**0.5),
    "leaf": (2.0, {"scope": scopes.leaf()}, 12**0.5),
    "leaf, tree of limits": (LIMITS, {"scope": scopes.leaf()}, 34**0.5),
    "unit": (1.0, {"scope": scopes.unit()}, 7**0.5),  # 4 columns, a bias, 2 columns
    "element": (0.5, {"scope": scopes.element()}, 0.5 * 24**0.5),
    "stack": (1.0, {"scope": scopes.tree(batch_axes=-1)}, 6**0.5),
    "schedule": (optax.constant_schedule(2.0), {}, 2.0),
}
RESPONSES = "rescale smooth drop normalize band automatic psac".split()


@pytest.mark.parametrize("case", KNOWN)
def test_the_root_of_the_sum_of_squared_limits(case):
    limit, options, want = KNOWN[case]
    if case == "stack":
        options = {"scope": scopes.tree(batch_axes=lambda path, leaf: leaf.ndim - 1)}
    clipped = made(limit, **options)
    # a stack of layers: all of one length
    params = {"a": np.ones((3, 6), np.float32)} if case == "stack" else PARAMS
    got = clipped.sensitivity("add_or_remove", params=params)
    assert got == pytest.approx(want, rel=1e-6)
    assert clipped.sensitivity("replace", params=params) == pytest.approx(2 * want, rel=1e-6)
    # an example so large that all its groups are clipped moves the sum by exactly this
    example = jax.tree.map(lambda x: 1e3 * np.ones((1, *x.shape), np.float32), params)
    moved = clipped(params, example)[1]
    size = np.sqrt(sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(moved)))
    assert size == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("name", RESPONSES)
def test_no_example_moves_the_sum_further(name):
    clipped = made(LIMITS, response=getattr(responses, name))
    bound = clipped.sensitivity("add_or_remove")
    rng = np.random.default_rng(0)
    scales = np.geomspace(1e-3, 1e4, 60, dtype=np.float32)

    def example(x):
        noise = rng.normal(size=(60, 1, *x.shape)).astype(np.float32)
        return scales.reshape(-1, *[1] * (x.ndim + 1)) * noise

    batch = jax.tree.map(example, PARAMS)
    moved = jax.jit(jax.vmap(lambda one: clipped(PARAMS, one)[1]))(batch)
    squares = sum(jnp.sum(x**2, range(1, x.ndim)) for x in jax.tree.leaves(moved))
    assert (jnp.sqrt(squares) <= bound * (1 + 1e-6)).all()


def test_replacing_an_example_by_its_opposite_moves_the_sum_by_twice_as_much():
    clipped = made(LIMITS)
    example = jax.tree.map(lambda x: 1e3 * np.ones((1, *x.shape), np.float32), PARAMS)
    one = clipped(PARAMS, example)[1]
    other = clipped(PARAMS, jax.tree.map(lambda x: -x, example))[1]
    moved = sum(
        float(jnp.sum((a - b) ** 2))
        for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True)
    )
    assert moved**0.5 == pytest.approx(float(clipped.sensitivity("replace")), rel=1e-6)


def test_limits_that_change():
    clipped = made(optax.exponential_decay(4.0, 1, 0.5))
    state = clipped.init(PARAMS)
    assert clipped.sensitivity("add_or_remove") == 4
    after = state._replace(step=jnp.int32(2))
    assert clipped.sensitivity("add_or_remove", state=after) == 1
    clipped = made(per_example.quantile(expected=64, initial=0.5), scope=scopes.leaf())
    assert clipped.sensitivity("add_or_remove", params=PARAMS) == pytest.approx(0.75**0.5)
    state = clipped.init(PARAMS)._replace(threshold=jnp.array([1.0, 2.0, 2.0]))
    assert clipped.sensitivity("replace", params=PARAMS, state=state) == pytest.approx(6)
    assert made(per_example.quantile(expected=64, initial=0.5)).sensitivity("replace") == 1


def test_under_jit_it_is_a_number_or_follows_a_traced_limit():
    numbers = []
    jax.jit(lambda x: numbers.append(float(made(LIMITS).sensitivity("add_or_remove"))) or x)(1.0)
    assert numbers == [5.0]
    assert jax.jit(lambda limit: made(limit).sensitivity("replace"))(0.5) == 1


BAD = {
    "mean": ((1.0, {"reduce": "mean"}), r"reduce='sum', got 'mean'; the divisor of a mean depends"),
    "kept": ((1.0, {"reduce": "kept"}), r"reduce='sum', got 'kept'"),
    "norm": ((1.0, {"norm": norms.linf()}), r"norm=norms.l2\(\), got norms.linf\(\); limits of"),
    "clamp": (
        (1.0, {"scope": scopes.element(), "response": responses.clamp}),
        r"a response that keeps sizes within the limit, got .*clamp.*responses.rescale",
    ),
    "custom": (
        (1.0, {"response": responses.from_target(lambda size, limit: 2 * size)}),
        r"a response that keeps sizes within the limit, got ",
    ),
    "relative": (
        (thresholds.relative_to_params(0.1), {}),
        r"limits that depend on neither sizes nor parameters, got ",
    ),
    "sizes": (
        (thresholds.by_global_norm(1.0), {"scope": scopes.tree()}),
        r"limits that depend on neither sizes nor parameters, got ",
    ),
    "learned": (
        (per_example.quantile(), {}),
        r"a limit whose learning does not depend on .*; pass per_example.quantile\(expected=...\)$",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_where_it_is_not_known_it_is_refused(case):
    (limit, options), words = BAD[case]
    with pytest.raises(ValueError, match=r"^sensitivity\(\) needs " + words):
        made(limit, **options).sensitivity("add_or_remove", params=PARAMS)


@pytest.mark.parametrize(
    "scope",
    [
        scopes.leaf(),
        scopes.unit(),
        scopes.element(),
        scopes.group(layer),
        scopes.tree(batch_axes=0),
        scopes.tree(where=lambda path: path != "head"),
    ],
    ids=str,
)
def test_where_the_groups_depend_on_the_parameters_they_are_needed(scope):
    message = r"^sensitivity\(\) needs the parameters, to count the groups, got .*; pass params"
    with pytest.raises(ValueError, match=message):
        made(1.0, scope=scope).sensitivity("replace")


def test_a_leaf_that_is_not_clipped_has_no_sensitivity():
    scope = scopes.tree(where=lambda path: path != "head")
    message = r"^sensitivity\(\) needs a limit for every leaf, got '1 without'; choose a scope"
    with pytest.raises(ValueError, match=message):
        made(1.0, scope=scope).sensitivity("replace", params=PARAMS)
    message = "^neighbors must be one of 'add_or_remove', 'replace', got 'swap'"
    with pytest.raises(ValueError, match=message):
        made(1.0).sensitivity("swap")
