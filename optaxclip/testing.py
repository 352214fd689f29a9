"""Checks for parts that you write: `check_threshold check_scope check_transform`.

Each raises an `AssertionError` that names the broken law, the offending value and the usual fix.
The tests of this library run the same checks over all of its rules, scopes and transforms.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from optaxclip import _jax, _validate, norms
from optaxclip._clip import clip
from optaxclip._layout import Layout, lay_out
from optaxclip._measure import measure
from optaxclip._types import Context, Scope, Threshold

__all__ = [
    "check_threshold",
    "check_scope",
    "check_transform",
]


def __dir__() -> list[str]:
    return __all__


STREAM = (1.0, 3.0, 0.5, 1e-20, 1e20, 2.0, 2.0, 100.0, 1.0, 1e-3, 1.5, 1.0)
TREE = {"dense": (4, 3), "conv": (1, 2, 2, 3), "bias": (3,), "number": ()}


def check_threshold(rule: Threshold, *, stream: Sequence[float] = STREAM) -> None:
    """Checks a threshold rule.

    * The last axes of every array that `init` returns are the axes of the sizes. `init` uses their
      shape and dtype, not their values.
    * `learn` returns a state with the same structure, shapes, dtypes and weak types.
    * A limit broadcasts against the sizes, and is neither NaN nor negative.
    * Groups are independent: the limit of a group does not depend on the sizes of other groups.
    * Results are the same with and without `jit`, and in `lax.scan`.
    * Limits have finite derivatives with respect to the sizes.

    Not checked: whether a limit can fall so low that it never rises again, and whether limits
    follow the scale of the sizes.

    Args:
        rule: the rule to check.
        stream: the sizes of one group at consecutive steps, all positive.

    Raises:
        TypeError: `rule` is not a `Threshold`.
        AssertionError: a law is broken.

    Example:
        >>> import jax.numpy as jnp
        >>> from optaxclip import Threshold, testing
        >>> def limit(sizes, state, context):
        ...     return state
        >>> def learn(sizes, clipped_sizes, state, context):
        ...     return state + sizes.sum()
        >>> testing.check_threshold(Threshold(jnp.ones_like, limit, learn))
        Traceback (most recent call last):
        AssertionError: groups must not know of each other, but the limit of one was 2.0 alone ...
    """
    _validate.rule("rule", rule)
    for shape in (3,), (2, 1, 3):
        _check_states(rule, jnp.ones(shape))
    _check_groups(rule, jnp.asarray(stream), list(stream))
    _check_slopes(rule, jnp.asarray(stream), list(stream))
    _check_states(rule, jnp.ones((0,)))  # the sizes of a tree without floats


def _check_groups(rule: Threshold, sizes: Array, stream: list[float]) -> None:
    """Checks that limits are valid, and the same alone, beside other groups, and without jit."""
    run, scales = jax.jit(functools.partial(_limits_of, rule)), jnp.array([1.0, 1e-3, 7.0])
    try:
        together = run(sizes[:, None] * scales)
    except jax.errors.ConcretizationTypeError as error:
        raise AssertionError(
            "a rule must be a program for any numbers, but it has to know one of them while it is "
            "compiled; choose with jnp.where in place of if, and compute with jax.numpy "
            f"({str(error).splitlines()[0]})"
        ) from error
    for step, limits in enumerate(together):
        when = f"after the sizes {stream[:step]}" if step else "before anything was learned"
        _say_unless(
            bool((limits >= 0).all()),
            f"a limit must be at least 0, and inf where nothing is to be clipped, but {when} "
            f"limits were {limits}; return jnp.inf where nothing is known",
        )
    for i, scale in enumerate(scales):
        _say_unless_close(
            together[:, i],
            run(sizes[:, None] * scale)[:, 0],
            "groups must not know of each other, but the limit of one was {1} alone and {0} beside "
            "others; compute elementwise, without a sum or a maximum over the sizes",
        )
    with jax.disable_jit():
        eager = _limits_of(rule, sizes[:3, None])
    _say_unless_close(
        run(sizes[:3, None]),
        eager,
        "jit must change nothing, but a limit was {1} without it and {0} with it",
    )


def _check_slopes(rule: Threshold, sizes: Array, stream: list[float]) -> None:
    """Checks that the derivatives of limits with respect to the sizes are finite."""

    def sum_of_finite(sizes: Array) -> Array:
        limits = _limits_of(rule, sizes)
        return jnp.sum(jnp.where(jnp.isinf(limits), 0, limits))

    slopes = jax.grad(jax.jit(sum_of_finite))(sizes[:, None])
    _say_unless(
        np.isfinite(slopes).all(),
        f"limits must have finite derivatives, but those by the sizes {stream} were "
        f"{np.ravel(slopes).tolist()}; "
        "guard roots, logarithms and quotients on the inside: jnp.sqrt(jnp.where(x > 0, x, 1))",
    )


def check_scope(scope: Scope, tree: Any = None) -> None:
    """Checks a scope on a tree.

    * It makes the same groups every time, also under `jit`.
    * Groups are disjoint: a large gradient in one group does not change another group.
    * After clipping, every group is within its limit.

    Args:
        scope: the scope to check.
        tree: a tree of float arrays with paths that the scope understands; None for a small tree.

    Raises:
        TypeError: `scope` is not a `Scope`.
        AssertionError: a law is broken.

    Example:
        >>> from optaxclip import scopes, testing
        >>> testing.check_scope(scopes.group(lambda path: path.split("/")[0]))
    """
    _validate.part("scope", scope, Scope, "scopes.leaf()")
    tree = _normal_tree() if tree is None else tree
    layout, again = lay_out(scope, tree), lay_out(scope, tree)
    _say_unless(
        (layout.names, layout.axes, list(layout.groups))
        == (again.names, again.axes, list(again.groups)),
        f"a scope must find the same groups every time, but found {layout.names} and then "
        f"{again.names}; decide by path and shape alone",
    )
    transform = clip(1.0, scope=scope)
    eager, _ = transform.update(tree, transform.init(tree))
    jitted, _ = jax.jit(transform.update)(tree, transform.init(tree))
    for path, got, want in _leaves(jitted, eager):
        _say_unless_close(
            got,
            want,
            f"the groups of {path} must be the same under jit, but it became {{0}} instead of "
            f"{{1}}; decide by shape",
        )
    clipped = lay_out(scope, eager).gradients
    after = measure(norms.l2(), clipped, axes=layout.parts, groups=layout.groups or None)
    for sizes in after if layout.gradients else []:
        _say_unless(
            bool((sizes <= 1 + 1e-6).all()),
            f"every group must end within the limit 1, but one has the size {np.max(sizes)}; "
            f"return axes that the leaf has",
        )
    _check_disjoint(scope, tree, layout, clipped)


def _check_disjoint(scope: Scope, tree: Any, layout: Layout, clipped: Sequence[Array]) -> None:
    """Checks that a leaf a hundred times as large changes no leaf of another group."""
    transform = clip(1.0, scope=scope)
    state = transform.init(tree)
    of_leaf = layout.group_of if layout.groups else range(len(layout.paths))
    groups = [set(np.ravel(group).tolist()) for group in of_leaf]
    for k, path in enumerate(layout.paths):
        louder = list(layout.gradients)
        louder[k] = louder[k] * 100
        out, _ = transform.update(layout.rebuild(louder), state)
        pairs = zip(lay_out(scope, out).gradients, clipped, strict=True)
        for m, (got, want) in enumerate(pairs):
            if not groups[m] & groups[k]:
                _say_unless_close(
                    got,
                    want,
                    f"{layout.paths[m]!r} must not depend on {path!r}, which is in another group: "
                    f"{{0}}, not {{1}}",
                )


def check_transform(
    transform: optax.GradientTransformation, params: Any = None, *, shrinks: bool = True
) -> None:
    """Checks a transform of updates, such as a clip or a chain of clips.

    * Updates keep structure, shapes and dtypes, in float32, bfloat16 and float16. The state also
      keeps them from `init` on, weak types included.
    * None, `optax.MaskedNode`, integers and empty arrays are returned unchanged, and do not affect
      other leaves.
    * Zeros stay zeros. With `shrinks`, no number becomes larger or changes its sign.
    * Results are the same with and without `jit`.
    * After NaN or infinity, finite updates are finite again, and the state has no NaN.

    Args:
        transform: the transform to check.
        params: a tree of float arrays; None for a small tree.
        shrinks: whether the transform only makes updates smaller.

    Raises:
        TypeError: `transform` is not a `GradientTransformation`.
        AssertionError: a law is broken.

    Example:
        >>> import optax
        >>> from optaxclip import testing
        >>> testing.check_transform(optax.clip(1.0))
        Traceback (most recent call last):
        AssertionError: what is no float must pass, but ['integer'] became float32[3] from int32...
    """
    _validate.part(
        "transform", transform, optax.GradientTransformation, "optaxclip.clip_by_global_norm(1.0)"
    )
    eager = optax.with_extra_args_support(transform).update
    update = jax.jit(eager)
    params = _normal_tree() if params is None else params
    for dtype in jnp.float32, jnp.bfloat16, jnp.float16:
        narrow = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params)
        _check_step(update, transform.init(narrow), narrow)
    _check_other_leaves(transform, update, params)
    state = transform.init(params)
    out, _ = update(jax.tree.map(jnp.zeros_like, params), state, params)
    for path, x in _leaves(out):
        _say_unless(
            not np.any(x),
            f"zeros must stay zeros, but {path} became {x}; guard a quotient by a size of 0",
        )
    out, _ = eager(params, state, params)
    for path, got, want in _leaves(update(params, state, params)[0], out):
        _say_unless_close(
            got,
            want,
            f"jit must change nothing, but {path} was {{1}} without it and {{0}} with it",
        )
    for scale in 1e-3, 1.0, 1e3:
        updates = jax.tree.map(
            lambda x, scale=scale: scale * x[..., ::-1] if x.ndim else scale * x, params
        )
        out, state = update(updates, state, params)
        for path, after, before in _leaves(out, updates):
            smaller = ((np.abs(after) <= np.abs(before)) & (after * before >= 0)).all()
            _say_unless(
                not shrinks or bool(smaller),
                f"no number may become larger or change its sign, but {path} was {before} and "
                f"became {after}; pass shrinks=False if it should",
            )
        _check_recovery(update, state, updates, params)


def _check_recovery(update: Any, state: Any, updates: Any, params: Any) -> None:
    """Checks that one NaN or infinity leaves no NaN in the next step or in the state."""
    for bad in np.nan, np.inf, -np.inf:
        broken = jax.tree.map(lambda x, bad=bad: x.at[(0,) * x.ndim].set(bad), updates)
        _, after = update(broken, state, params)
        for path, x in _leaves(update(updates, after, params)):
            _say_unless(
                not jnp.isnan(x).any(),
                f"what is not finite must not be learned, but a step after {bad} there was NaN "
                f"at {path}; keep the old state where a size is not finite: "
                "jnp.where(jnp.isfinite(size), new, old)",
            )


def _check_states(rule: Threshold, sizes: Any) -> None:
    """Checks the shapes of the state and of the limits, for sizes of this shape."""
    params = jnp.ones_like(sizes) if rule.uses_params else None
    state, context = rule.init(sizes), Context(jnp.zeros((), jnp.int32), params)
    other = rule.init(2 * sizes)
    for path, x, y in _leaves(state, other):
        ends = np.shape(x)[max(np.ndim(x) - sizes.ndim, 0) :]
        _say_unless(
            ends == sizes.shape,
            f"every array of the state must end in the shape of the sizes, {sizes.shape}, but "
            f"{path} is {np.shape(x)}; "
            "make it with jnp.zeros_like(sizes), or with further axes in front",
        )
        _say_unless(
            np.array_equal(x, y, equal_nan=True),
            f"init must use only shape and dtype of the sizes, but {path} depends on them",
        )
    limits = rule.limit(sizes, state, context)
    try:
        _validate.limits(limits, sizes.shape)
    except (TypeError, ValueError) as error:
        raise AssertionError(str(error)) from None
    learned = rule.learn(sizes, jnp.minimum(sizes, limits), state, context)
    same_shapes = jax.tree.map(np.shape, learned) == jax.tree.map(np.shape, state)
    fix = "keep every dtype with .astype" if same_shapes else "keep the structure and every shape"
    _say_unless(
        _described(learned) == _described(state),
        f"learn must return a state as init does, {_described(state)}, but returned "
        f"{_described(learned)}; {fix}",
    )


def _limits_of(rule: Threshold, stream: Any) -> Any:
    """Returns the limits `[steps, groups]` for a stream of sizes `[steps, groups]`."""

    def step(state: Any, item: Any) -> tuple[Any, Any]:
        number, sizes = item
        context = Context(number, 2 * jnp.ones_like(sizes) if rule.uses_params else None)
        limits = jnp.broadcast_to(rule.limit(sizes, state, context), sizes.shape)
        return rule.learn(sizes, jnp.minimum(sizes, limits), state, context), limits

    steps = jnp.arange(len(stream), dtype=jnp.int32)
    return jax.lax.scan(step, rule.init(stream[0]), (steps, stream))[1]


def _check_step(update: Any, state: Any, updates: Any) -> None:
    """Checks that one step keeps structure, shapes, dtypes and weak types."""
    out, after = update(updates, state, updates)
    for what, got, want in ("updates", out, updates), ("the state", after, state):
        _say_unless(
            _described(got) == _described(want),
            f"{what} must keep structure, shapes, dtypes and weak types, {_described(want)}, but "
            f"became {_described(got)}; compute in float32 and cast back",
        )


def _check_other_leaves(transform: Any, update: Any, params: Any) -> None:
    """Checks that leaves without floats pass unchanged and do not affect the others."""
    others = {
        "none": None,
        "masked": optax.MaskedNode(),
        "integer": jnp.arange(3),
        "empty": jnp.zeros((0, 3)),
    }
    mixed = {"params": params, "others": others}
    try:
        out, after = update(mixed, transform.init(mixed), mixed)
    except Exception as error:
        raise AssertionError(
            f"what is no float must pass, but there was {error!r}; leave it alone"
        ) from error
    for path, *pair in _leaves(out["others"], others):
        got, want = (f"{x.dtype}{list(x.shape)}" for x in pair)
        _say_unless(
            got == want,
            f"what is no float must pass, but {path} became {got} from {want}; leave it alone",
        )
    for path, x in _leaves((out, after)):
        _say_unless(
            not jnp.isnan(x).any(),
            f"an empty array must count nothing, but beside one there was NaN at {path}",
        )
    want, _ = update(params, transform.init(params), params)
    for path, got, expected in _leaves(out["params"], want):
        words = (
            f"what is no float must count nothing, but beside it {path} became {{0}} instead of "
            f"{{1}}; do not measure it"
        )
        _say_unless_close(got, expected, words)


def _normal_tree() -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), len(TREE))
    shapes = zip(keys, TREE.items(), strict=True)
    return {name: jax.random.normal(key, shape) for key, (name, shape) in shapes}


def _described(tree: Any) -> list[tuple[str, str]]:
    """Returns the path, dtype and shape of each leaf; `~` marks a weak type."""

    def described(x: Any) -> str:
        weak = "~" if _jax.is_weakly_typed(jnp.asarray(x)) else ""
        return f"{jnp.result_type(x)}{list(jnp.shape(x))}{weak}"

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(_name(path), described(x)) for path, x in leaves]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path) or "all of it"


def _leaves(*trees: Any) -> list[tuple[Any, ...]]:
    """Returns for each leaf its path, and its value in each of the trees."""
    paths = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(trees[0])]
    return list(zip(paths, *(jax.tree.leaves(tree) for tree in trees), strict=True))


def _say_unless_close(got: Any, want: Any, words: str) -> None:
    got, want = np.asarray(got), np.asarray(want)
    wide = got.astype(np.float64), want.astype(np.float64)
    ok = np.isclose(*wide, rtol=1e-4, atol=1e-30, equal_nan=True)
    if not ok.all():
        at = np.unravel_index(np.argmin(ok), ok.shape)
        raise AssertionError(words.format(got[at], want[at]))


def _say_unless(holds: bool, words: str) -> None:
    if not holds:
        raise AssertionError(words)
