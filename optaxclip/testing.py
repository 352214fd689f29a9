"""The contract as checks of your own parts: `check_threshold check_scope check_transform`.

Each raises an `AssertionError` that says which law is broken, by what, and what usually helps. The
tests of this library run the same checks over every rule, scope and transform that it has.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip import _jax, _validate, norms
from optaxclip._clip import clip
from optaxclip._layout import lay_out
from optaxclip._measure import measure
from optaxclip._types import Context, Scope, Threshold

STREAM = (1.0, 3.0, 0.5, 1e-20, 1e20, 2.0, 2.0, 100.0, 1.0, 1e-3, 1.5, 1.0)
TREE = {"dense": (4, 3), "conv": (1, 2, 2, 3), "bias": (3,), "number": ()}


def check_threshold(rule: Threshold, *, stream: Sequence[float] = STREAM) -> None:
    """Checks a threshold rule.

    * What `init` returns ends in the shape of the sizes, whatever that is, and depends on no number
      in them.
    * `learn` returns what it was given: the same structure, shapes, dtypes and weak types.
    * A limit broadcasts against the sizes, and is not NaN and not negative.
    * Every group has a limit of its own, by its own sizes: beside others it is what it is alone.
    * Under `jit` and in `lax.scan` it is what it is without.
    * Limits have finite derivatives by the sizes.

    Not checked: whether a limit can fall so low that it never rises again, and whether limits
    follow the scale of the sizes.

    Args:
        rule: to be checked.
        stream: sizes that one group has, one after the other, all positive.

    Raises:
        TypeError: `rule` is not a `Threshold`.
        AssertionError: a law is broken.

    Example:
        >>> import jax.numpy as jnp
        >>> from optaxclip import Threshold, testing
        >>> def learn(sizes, clipped_sizes, state, context):
        ...     return state + sizes.sum()
        >>> testing.check_threshold(Threshold(jnp.ones_like, lambda sizes, state, context: state, learn))
        Traceback (most recent call last):
        AssertionError: groups must not know of each other, but the limit of one was 2.0 alone and 9.00... beside others; ...
    """
    _validate.rule("rule", rule)
    for shape in (3,), (2, 1, 3):
        _check_states(rule, jnp.ones(shape))
    run, sizes, scales = (
        jax.jit(functools.partial(_limits_of, rule)),
        jnp.asarray(stream),
        jnp.array([1.0, 1e-3, 7.0]),
    )
    try:
        together = run(sizes[:, None] * scales)
    except jax.errors.ConcretizationTypeError as error:
        raise AssertionError(
            "a rule must be a program for any numbers, but it has to know one of them while it is "
            "compiled; "
            f"choose with jnp.where in place of if, and compute with jax.numpy "
            f"({str(error).splitlines()[0]})"
        ) from error
    for step, limits in enumerate(together):
        seen = f"after the sizes {list(stream[:step])}" if step else "before anything was learned"
        _say_unless(
            bool((limits >= 0).all()),
            f"a limit must be at least 0, and inf where nothing is to be clipped, but {seen} "
            f"limits were {limits}; "
            "return jnp.inf where nothing is known",
        )
    for i, scale in enumerate(scales):
        _say_unless_close(
            together[:, i],
            run(sizes[:, None] * scale)[:, 0],
            "groups must not know of each other, but the limit of one was {1} alone and {0} beside "
            "others; "
            "compute elementwise, without a sum or a maximum over the sizes",
        )
    with jax.disable_jit():
        eager = _limits_of(rule, sizes[:3, None])
    _say_unless_close(
        run(sizes[:3, None]),
        eager,
        "jit must change nothing, but a limit was {1} without it and {0} with it",
    )
    slopes = jax.grad(lambda sizes: jnp.sum(jnp.where(jnp.isinf(found := run(sizes)), 0, found)))(
        sizes[:, None]
    )
    _say_unless(
        np.isfinite(slopes).all(),
        f"limits must have finite derivatives, but those by the sizes {list(stream)} were "
        f"{np.ravel(slopes).tolist()}; "
        "guard roots, logarithms and quotients on the inside: jnp.sqrt(jnp.where(x > 0, x, 1))",
    )
    _check_states(rule, jnp.ones((0,)))  # of a tree without floats


def check_scope(scope: Scope, tree: Any = None) -> None:
    """Checks a scope on a tree.

    * It finds the same groups every time, also under `jit`.
    * Every number is in one group at most: what is large in one group changes no other.
    * With a limit, every group ends within it.

    Args:
        scope: to be checked.
        tree: of arrays of floats whose leaves it has to understand; a small one if none is given.

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
        f"{again.names}; "
        "decide by path and shape alone",
    )
    transform = clip(1.0, scope=scope)
    eager, state = transform.update(tree, transform.init(tree))
    jitted, _ = jax.jit(transform.update)(tree, transform.init(tree))
    for path, found, want in _leaves(jitted, eager):
        _say_unless_close(
            found,
            want,
            f"the groups of {path} must be the same under jit, but it became {{0}} instead of "
            f"{{1}}; decide by shape",
        )
    after = measure(
        norms.l2(), lay_out(scope, eager).gradients, axes=layout.axes, groups=layout.groups or None
    )
    for sizes in after if layout.gradients else []:
        _say_unless(
            bool((sizes <= 1 + 1e-6).all()),
            f"every group must end within the limit 1, but one has the size {np.max(sizes)}; "
            f"return axes that the leaf has",
        )
    for k, path in enumerate(layout.paths):
        louder = list(layout.gradients)
        louder[k] = louder[k] * 100
        out, _ = transform.update(layout.rebuild(louder), state)
        mates = {m for group in layout.groups if k in group for m in group} | {k}
        for m, (found, want) in enumerate(
            zip(lay_out(scope, out).gradients, lay_out(scope, eager).gradients, strict=True)
        ):
            if m not in mates:
                _say_unless_close(
                    found,
                    want,
                    f"{layout.paths[m]!r} must not depend on {path!r}, which is in another group: "
                    f"{{0}}, not {{1}}",
                )


def check_transform(
    transform: optax.GradientTransformation, params: Any = None, *, shrinks: bool = True
) -> None:
    """Checks a transform of updates, such as a clip or a chain of clips.

    * Updates keep structure, shapes and dtypes, in all floats; so does the state from `init` on,
      weak types as well.
    * None, `optax.MaskedNode`, integers and empty arrays come back as they are, and change nothing
      else.
    * Zeros stay zeros. With `shrinks`, no number becomes larger or changes its sign.
    * It does the same with and without `jit`.
    * After NaN or infinity, finite updates are finite again, and the state has no NaN.

    Args:
        transform: to be checked.
        params: a tree of arrays of floats; a small one if none is given.
        shrinks: whether it only makes updates smaller.

    Raises:
        TypeError: `transform` is not a `GradientTransformation`.
        AssertionError: a law is broken.

    Example:
        >>> import optax
        >>> from optaxclip import testing
        >>> testing.check_transform(optax.clip(1.0))
        Traceback (most recent call last):
        AssertionError: what is no float must pass, but ['integer'] became float32[3] from int32[3]; leave it alone
    """
    _validate.part(
        "transform", transform, optax.GradientTransformation, "optaxclip.clip_by_global_norm(1.0)"
    )
    eager = optax.with_extra_args_support(transform).update
    update = jax.jit(eager)
    params = _normal_tree() if params is None else params
    for dtype in jnp.float32, jnp.bfloat16, jnp.float16:
        own = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params)
        _check_step(update, transform.init(own), own)
    _check_other_leaves(transform, update, params)
    state = transform.init(params)
    out, _ = update(jax.tree.map(jnp.zeros_like, params), state, params)
    for path, x in _leaves(out):
        _say_unless(
            not np.any(x),
            f"zeros must stay zeros, but {path} became {x}; guard a quotient by a size of 0",
        )
    out, _ = eager(params, state, params)
    for path, found, want in _leaves(update(params, state, params)[0], out):
        _say_unless_close(
            found,
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
                f"became {after}; "
                "pass shrinks=False if it should",
            )
        for bad in np.nan, np.inf, -np.inf:
            _, after = update(
                jax.tree.map(lambda x, bad=bad: x.at[(0,) * x.ndim].set(bad), updates),
                state,
                params,
            )
            for path, x in _leaves(update(updates, after, params)):
                _say_unless(
                    not jnp.isnan(x).any(),
                    f"what is not finite must not be learned, but a step after {bad} there was NaN "
                    f"at {path}; "
                    "keep the old state where a size is not finite: jnp.where(jnp.isfinite(size), "
                    "new, old)",
                )


def _check_states(rule: Threshold, sizes: Any) -> None:
    state, context = (
        rule.init(sizes),
        Context(jnp.zeros((), jnp.int32), jnp.ones_like(sizes) if rule.uses_params else None),
    )
    other = rule.init(2 * sizes)
    for path, x, y in _leaves(state, other):
        ends = np.shape(x)[max(np.ndim(x) - sizes.ndim, 0) :]
        _say_unless(
            ends == sizes.shape,
            f"every array of the state must end in the shape of the sizes, {sizes.shape}, but "
            f"{path} is {np.shape(x)}; "
            "make it with jnp.zeros_like(sizes), or with axes of its own in front",
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
    alike = jax.tree.map(np.shape, learned) == jax.tree.map(np.shape, state)
    _say_unless(
        _described(learned) == _described(state),
        f"learn must return a state as init does, {_described(state)}, but returned "
        f"{_described(learned)}; "
        + ("keep every dtype with .astype" if alike else "keep the structure and every shape"),
    )


def _limits_of(rule: Threshold, stream: Any) -> Any:
    """The limits that groups `[groups]` have, one step after the other."""

    def step(state: Any, item: Any) -> tuple[Any, Any]:
        number, sizes = item
        context = Context(number, 2 * jnp.ones_like(sizes) if rule.uses_params else None)
        limits = jnp.broadcast_to(rule.limit(sizes, state, context), sizes.shape)
        return rule.learn(sizes, jnp.minimum(sizes, limits), state, context), limits

    return jax.lax.scan(
        step, rule.init(stream[0]), (jnp.arange(len(stream), dtype=jnp.int32), stream)
    )[1]


def _check_step(update: Any, state: Any, updates: Any) -> None:
    out, after = update(updates, state, updates)
    for what, found, want in ("updates", out, updates), ("the state", after, state):
        _say_unless(
            _described(found) == _described(want),
            f"{what} must keep structure, shapes, dtypes and weak types, {_described(want)}, but "
            f"became {_described(found)}; "
            "compute in float32 and cast back",
        )


def _check_other_leaves(transform: Any, update: Any, params: Any) -> None:
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
    for path, found, expected in _leaves(out["others"], others):
        kinds = [f"{x.dtype}{list(x.shape)}" for x in (found, expected)]
        _say_unless(
            kinds[0] == kinds[1],
            f"what is no float must pass, but {path} became {kinds[0]} from {kinds[1]}; leave it "
            f"alone",
        )
    for path, x in _leaves((out, after)):
        _say_unless(
            not jnp.isnan(x).any(),
            f"an empty array must count nothing, but beside one there was NaN at {path}",
        )
    want, _ = update(params, transform.init(params), params)
    for path, found, expected in _leaves(out["params"], want):
        words = f"what is no float must count nothing, but beside it {path} became {{0}} instead of {{1}}; do not measure it"
        _say_unless_close(found, expected, words)


def _normal_tree() -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), len(TREE))
    return {
        name: jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, TREE.items(), strict=True)
    }


def _described(tree: Any) -> list[tuple[str, str]]:
    return [
        (
            _name(path),
            f"{jnp.result_type(x)}{list(jnp.shape(x))}"
            + ("~" if _jax.is_weakly_typed(jnp.asarray(x)) else ""),
        )
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path) or "all of it"


def _leaves(*trees: Any) -> list[tuple[Any, ...]]:
    """For each leaf its path, and what the trees have there."""
    paths = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(trees[0])]
    return list(zip(paths, *(jax.tree.leaves(tree) for tree in trees), strict=True))


def _say_unless_close(found: Any, want: Any, words: str) -> None:
    ok = np.isclose(
        np.asarray(found, np.float64),
        np.asarray(want, np.float64),
        rtol=1e-4,
        atol=1e-30,
        equal_nan=True,
    )
    if not ok.all():
        at = np.unravel_index(np.argmin(ok), ok.shape)
        raise AssertionError(words.format(np.asarray(found)[at], np.asarray(want)[at]))


def _say_unless(holds: bool, words: str) -> None:
    if not holds:
        raise AssertionError(words)
