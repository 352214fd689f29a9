"""Each part of JAX that may move, tried by itself: after a new version of JAX, look here first.

The name of a test is the name of the part that has changed.
"""

import ast
import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optaxclip import _jax


def mesh(kind):
    return jax.make_mesh((4,), ("x",), axis_types=(kind,), devices=jax.devices()[:4])


def in_shard_map(run, check_vma=True):
    """What `run` makes of four numbers, one on each of four devices."""
    mapped = jax.shard_map(
        run, mesh=mesh(AxisType.Auto), in_specs=P("x"), out_specs=P("x"), check_vma=check_vma
    )
    return jax.jit(mapped)(jnp.arange(4.0))


def literal():
    program = jax.make_jaxpr(lambda x: (x + 1.0, 2.0))(0.0).jaxpr
    constants = [
        v.val for v in [*program.eqns[0].invars, *program.outvars] if isinstance(v, _jax.Literal)
    ]
    assert constants == [1.0, 2.0]


def jaxpr_as_fun():
    weights = jnp.arange(3.0)
    program = jax.make_jaxpr(lambda x: x * weights)(0.0)
    assert isinstance(program, _jax.ClosedJaxpr) and isinstance(program.jaxpr, _jax.Jaxpr)
    for constants in program.consts, [weights + 1]:
        (found,) = _jax.jaxpr_as_fun(_jax.ClosedJaxpr(program.jaxpr, constants))(2.0)
        np.testing.assert_array_equal(found, 2.0 * constants[0])


@jax.custom_vjp
def twice(x):
    return 2 * x


twice.defvjp(lambda x: (2 * x, None), lambda _, g: (g,))

PROGRAMS = [  # one equation each, of every kind that takes functions, programs or options
    lambda x: x + 1.0,
    lambda x: jax.lax.top_k(x, 2),
    jax.jit(lambda x: x * 2.0),
    lambda x: jax.lax.while_loop(lambda y: y.sum() < 100.0, lambda y: y * 2.0, x),
    lambda x: jax.lax.cond(True, jnp.sin, jnp.cos, x),
    lambda x: jax.lax.scan(lambda carry, y: (carry + y, carry), x[0], x),
    jax.checkpoint(jnp.sin),
    twice,
    jax.nn.relu,
    lambda x: jnp.linalg.qr(x.reshape(2, 2)),
    lambda x: x.astype(jnp.bfloat16),
    lambda x: x.sum(),
]


def bind():
    for program in PROGRAMS:
        traced, x = jax.make_jaxpr(program)(jnp.arange(1.0, 5.0)), jnp.arange(1.0, 5.0)
        values = dict(zip(traced.jaxpr.invars, [x], strict=True))
        for equation in traced.jaxpr.eqns:
            inputs = [v.val if isinstance(v, _jax.Literal) else values[v] for v in equation.invars]
            values.update(zip(equation.outvars, _jax.bind(equation, inputs), strict=True))
        found = [v.val if isinstance(v, _jax.Literal) else values[v] for v in traced.jaxpr.outvars]
        for one, want in zip(found, jax.tree.leaves(program(x)), strict=True):
            np.testing.assert_array_equal(one, want)


def context():
    with jax.sharding.use_abstract_mesh(mesh(AxisType.Explicit).abstract_mesh):
        (equation,) = jax.make_jaxpr(jnp.sin)(jax.ShapeDtypeStruct((4,), jnp.float32)).jaxpr.eqns
    assert jax.sharding.get_abstract_mesh().empty
    with _jax.context(equation):
        assert jax.sharding.get_abstract_mesh().axis_names == ("x",)


def float64():
    def program(x):
        with _jax.float64():
            return (x.astype(jnp.float64) ** 2).sum().astype(jnp.float32) * 1e-30, jnp.float64(
                1
            ).dtype.name == "float64"

    assert not jax.config.jax_enable_x64
    for run in program, lambda x: jax.jit(lambda x: program(x)[0])(x) and program(x):
        number, wide = run(jnp.array([3e20, 4e20]))
        assert wide and jnp.asarray(number).dtype == jnp.float32


def is_weakly_typed():
    assert [_jax.is_weakly_typed(x) for x in (1.0, jnp.asarray(1.0), jnp.ones(()), np.ones(2))] == [
        True,
        True,
        False,
        False,
    ]


def varying():
    seen = []

    def run(x):
        seen.append([_jax.varying(y) for y in (x, jax.lax.psum(x, "x"), 1.0, jnp.ones(2))])
        return x

    in_shard_map(run)
    in_shard_map(run, check_vma=False)
    run_alone = [frozenset()] * 4
    assert seen == [[frozenset("x"), *run_alone[1:]], run_alone]


def axis_names():
    def seen(run):
        found = []
        run(lambda x: (found.append(_jax.axis_names()), x)[1])
        return found[-1]

    assert seen(lambda f: f(1.0)) == () == seen(lambda f: jax.jit(f)(1.0))
    assert seen(in_shard_map) == ("x",)
    assert seen(lambda f: jax.vmap(f, axis_name="v")(jnp.ones(2))) == ("v",)
    assert seen(lambda f: in_shard_map(jax.vmap(f, axis_name="v"))) == ("x", "v")
    assert seen(lambda f: jax.pmap(f, "p", devices=jax.devices()[:2])(jnp.ones(2))) == ("p",)


def is_nameless():
    found = []

    def run(x):
        found.append(list(map(_jax.is_nameless, jax.sharding.get_abstract_mesh().manual_axes)))
        return x

    jax.pmap(run, devices=jax.devices()[:2])(jnp.ones(2))
    jax.pmap(run, "p", devices=jax.devices()[:2])(jnp.ones(2))
    in_shard_map(run)
    assert found == [[True], [False], [False]]


def vary():
    seen = []

    def run(x):
        y = _jax.vary(jax.lax.psum(x, "x"), ("x",))
        seen.append(_jax.varying(y))
        return y

    np.testing.assert_array_equal(in_shard_map(run), np.full(4, 6.0))
    assert seen == [frozenset("x")]


def reshard():
    split = NamedSharding(mesh(AxisType.Explicit), P("x"))
    for run in _jax.reshard, jax.jit(_jax.reshard, static_argnums=1):
        assert jax.typeof(
            run(jax.device_put(jnp.ones(4), split.update(spec=P())), split)
        ).sharding.spec == P("x")


OTHERS = [bind, context, float64, is_weakly_typed, varying, axis_names, is_nameless, vary, reshard]
PARTS = {"Literal": literal, **{part.__name__: part for part in OTHERS}}
PARTS |= dict.fromkeys(["Jaxpr", "ClosedJaxpr", "jaxpr_as_fun"], jaxpr_as_fun)


@pytest.mark.parametrize("name", PARTS)
def test_the_part_does_what_it_says(name):
    PARTS[name]()


def test_every_part_is_tried():
    tree = ast.parse(Path(_jax.__file__).read_text())
    constants = [node for node in tree.body if isinstance(node, ast.Assign)]
    assigned = {
        name.id
        for node in constants
        for name in ast.walk(node)
        if isinstance(name, ast.Name) and name.id != "core"
    }
    own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    exported = {
        alias.asname
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    assert own | exported | assigned == set(PARTS)
    assert all(inspect.getdoc(getattr(_jax, name)) for name in own)
