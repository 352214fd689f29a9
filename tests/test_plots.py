"""Pictures show the numbers that a run recorded, and say in words what is missing."""

import functools
import gc
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.colors import same_color
from matplotlib.figure import Figure

import optaxclip
from optaxclip import plots, scopes, telemetry

NAN, INF = np.nan, np.inf
PARAMS = {"enc": {"w": jnp.zeros(1)}, "head": jnp.zeros(1)}
LIMITS = {"enc/w": 1.0, "head": 10.0}
# [steps, groups]
SIZES = np.array([[0.5, 3.0], [2.0, 3.0], [0.25, 40.0], [4.0, 20.0], [0.5, 9.0]], np.float32)


def run(sizes, clip=None, params=PARAMS):
    """What a loop that was scanned records, for sizes `[steps, groups]`."""
    clip = optaxclip.clip(LIMITS, scope=scopes.leaf()) if clip is None else clip

    def step(state, size):
        _, state = clip.update({"enc": {"w": size[:1]}, "head": size[1:]}, state)
        return state, telemetry.metrics(state, params)

    return jax.lax.scan(step, clip.init(PARAMS), jnp.asarray(sizes, jnp.float32))[1]


@functools.cache
def recorded():
    return run(SIZES)


def by_hand(before, limit, **more):
    """A history with one group."""
    before, limit = np.broadcast_arrays(np.asarray(before, float), limit)
    steps = np.broadcast_to(
        np.arange(1.0, len(before) + 1).reshape(-1, *[1] * (before.ndim - 1)), before.shape
    )
    after = np.where(np.isfinite(before), np.minimum(before, limit), NAN)
    share = (np.isfinite(before) & (before > limit)).astype(float)
    names = {
        "size_before": before,
        "size_after": after,
        "limit": limit,
        "clipped_share": share,
        "steps": steps,
    }
    return {f"clip/{name}": value for name, value in names.items()} | more


def listed(history, prefix="clip"):
    """The same history as a list of dicts."""
    return [
        {name: values[i] for name, values in history.items()}
        for i in range(len(history[f"{prefix}/steps"]))
    ]


def lines(ax):
    return {line.get_label(): line for line in ax.lines}


def band(ax, number):
    """Steps, lower and upper edge of a band."""
    x, y = ax.collections[number].get_paths()[0].vertices.T
    return {step: (y[x == step].min(), y[x == step].max()) for step in np.unique(x)}


def assert_draws(ax, label, x, y):
    np.testing.assert_allclose(lines(ax)[label].get_xydata(), np.stack([x, y], 1), rtol=1e-6)


# Sizes


@pytest.mark.parametrize("kind", ["stacked", "listed", "floats", "tuple"])
def test_lines_are_sizes_before_and_after_and_the_limit_of_the_largest_group(kind):
    history = recorded()
    rows = listed(history)
    kinds = {"stacked": history, "listed": rows, "tuple": tuple(rows)}
    kinds["floats"] = [
        {name: float(value) for name, value in row.items()} | {"loss": "low"} for row in rows
    ]
    ax, steps = plots.sizes(kinds[kind]), np.arange(1, 6)
    assert_draws(ax, "before", steps, [3, 3, 40, 20, 9])
    assert_draws(ax, "after", steps, [3, 3, 10, 10, 9])
    assert_draws(ax, "limit", steps, [10] * 5)
    assert_draws(ax, "clipped", [2, 3, 4], [3, 40, 20])  # in step 2 the smaller group was
    assert set(lines(ax)) == {"before", "after", "limit", "clipped"}
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "before",
        "after",
        "limit",
        "clipped",
    ]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_yscale()) == (
        "step",
        "norm of the largest group",
        "log",
    )
    assert ax.get_title() == "Norm before and after clipping" and not ax.collections


def test_lines_of_one_group():
    for history in recorded(), listed(recorded()):
        ax = plots.sizes(history, group="enc/w")
        assert_draws(ax, "before", np.arange(1, 6), SIZES[:, 0])
        assert_draws(ax, "after", np.arange(1, 6), [0.5, 1, 0.25, 1, 0.5])
        assert_draws(ax, "limit", np.arange(1, 6), [1] * 5)
        assert_draws(ax, "clipped", [2, 4], [2, 4])
        assert ax.get_ylabel() == "norm of enc/w"


def test_a_run_with_one_group_has_norms_of_nothing_else():
    ax = plots.sizes(run(SIZES, optaxclip.clip_by_global_norm(1e3)))
    assert ax.get_ylabel() == "norm" and set(lines(ax)) == {"before", "after", "limit"}
    assert_draws(ax, "before", np.arange(1, 6), np.linalg.norm(SIZES, axis=1))


def test_a_prefix_chooses_one_of_several_clips():
    history = run(SIZES, optax.chain(telemetry.monitor(), optaxclip.clip_by_global_norm(2.0)))
    norms = np.linalg.norm(SIZES, axis=1)
    assert set(lines(plots.sizes(history, prefix="monitor"))) == {"before", "after"}
    assert_draws(plots.sizes(history), "after", np.arange(1, 6), np.minimum(norms, 2))


def test_what_no_logarithm_can_draw_is_left_out_and_steps_that_are_not_finite_are_marked():
    ax = plots.sizes(by_hand([1, 0, NAN, 5, INF, 7], [INF, INF, INF, 2, 2, 2]))
    assert_draws(ax, "before", np.arange(1, 7), [1, NAN, NAN, 5, NAN, 7])
    assert_draws(ax, "after", np.arange(1, 7), [1, NAN, NAN, 2, NAN, 2])
    assert_draws(ax, "limit", np.arange(1, 7), [NAN, NAN, NAN, 2, 2, 2])
    assert_draws(ax, "not finite", [3, 5], [1, 1])
    at_the_edge = lines(ax)["not finite"].get_transform() == ax.get_xaxis_transform()
    assert at_the_edge and set(lines(ax)) == {"before", "after", "limit", "clipped", "not finite"}


def test_a_point_between_gaps_has_a_mark_of_its_own():
    ax = plots.sizes(by_hand([1, NAN, 2, 3, NAN, 4], INF))
    assert np.flatnonzero(lines(ax)["before"].get_markevery()).tolist() == [0, 5]
    assert lines(ax)["before"].get_marker() == "_"


def test_a_run_of_nothing_but_nan_is_ticks():
    assert set(lines(plots.sizes(by_hand([NAN, NAN], INF)))) == {"not finite"}


def test_of_seeds_there_are_medians_and_quartiles():
    before = np.random.default_rng(0).lognormal(size=(6, 5))
    before[2, 1], before[3, :3] = INF, NAN
    history = by_hand(before, np.median(before[:2]))
    ordered = np.sort(np.where(np.isfinite(before), before, INF), axis=1)
    medians = [median if median < INF else NAN for median in ordered[:, 2]]
    for kind in (
        history,
        listed(history),
        {name: values.T for name, values in history.items()},
    ):  # or seeds first
        ax = plots.sizes(kind)
        assert_draws(ax, "before", np.arange(1, 7), medians)
        assert_draws(ax, "not finite", [3, 4], [1, 1])
        half = (before > np.median(before[:2])).sum(1) >= 3
        assert (
            half.any()
            and lines(ax)["clipped"].get_xdata().tolist() == (1 + np.flatnonzero(half)).tolist()
        )
        found = band(ax, 0)
        for step in 1, 2:
            np.testing.assert_allclose(found[step], ordered[step - 1, [1, 3]], rtol=1e-6)
        assert same_color(ax.collections[0].get_facecolor()[0][:3], lines(ax)["before"].get_color())


def test_the_median_of_an_even_number_of_seeds_is_between_two():
    ax = plots.sizes(by_hand([[1, 2, 4, 9], [1, 1, 3, 3]], 3.5))
    assert_draws(ax, "before", [1, 2], [3, 2])
    assert_draws(ax, "clipped", [1], [3])  # two of four
    assert band(ax, 0) == {1: (1, 9), 2: (1, 3)}


def test_steps_are_those_that_the_clip_counted():
    history = listed(recorded())
    assert_draws(plots.sizes(history[1::2]), "before", [2, 4], [3, 20])
    slim = [{name: value for name, value in row.items() if name.count("/") < 2} for row in history]
    assert_draws(
        plots.sizes([slim[0], history[1], slim[2], history[3]], group="head"),
        "before",
        [2, 4],
        [3, 20],
    )


@pytest.mark.parametrize("clip", ["clip_1", "clip_x_0", "monitor_x"])
@pytest.mark.parametrize("as_a_list", [False, True])
def test_steps_that_a_guard_left_out_are_marked_and_are_no_steps_of_the_clip(as_a_list, clip):
    sizes = SIZES.copy()
    sizes[[0, 2, 3], 0] = [1.0, NAN, INF]
    monitor, by_norm = telemetry.monitor(scope=scopes.leaf()), optaxclip.clip_by_norm(1e3)
    first = optax.named_chain(("x", optax.chain(monitor, by_norm, by_norm)), ("y", monitor))
    named = optax.chain(first, by_norm) if clip == "clip_x_0" else first
    history = run(sizes, optaxclip.skip_nonfinite(named))
    ax = plots.sizes(listed(history, clip) if as_a_list else history, prefix=clip)
    assert_draws(ax, "before", [1, 2, 5], [3, 3, 9])
    assert_draws(ax, "skipped", [3, 4], [1, 1])
    assert "not finite" not in lines(ax)


def test_a_state_that_has_seen_nothing_yet_is_no_step():
    clip = optaxclip.clip_by_global_norm(1.0)
    states = [clip.init(PARAMS)]
    for size in 3.0, 4.0:
        states.append(
            clip.update({"enc": {"w": None}, "head": jnp.array([size])}, states[-1], PARAMS)[1]
        )
    assert_draws(
        plots.sizes([telemetry.metrics(state) for state in states]), "before", [1, 2], [3, 4]
    )


# Shares


def picture(ax):
    """Names, edges of the columns, and values of a heat map."""
    (mesh,) = ax.collections
    return (
        [text.get_text() for text in ax.get_yticklabels()],
        mesh.get_coordinates()[0, :, 0],
        np.asarray(mesh.get_array()),
    )


def many(shares, names):
    """A history with many groups and their shares `[steps, groups]`."""
    shares = dict(zip(names, shares.T, strict=True))
    return by_hand(
        np.ones(len(shares[names[0]])),
        1.0,
        **{f"clip/clipped_share/{name}": x for name, x in shares.items()},
    )


@pytest.mark.parametrize("bins", [1, 3, 7, 100])
def test_rows_are_groups_and_columns_means_over_steps(bins):
    names = [f"layers_{i}/w" for i in (0, 1, 2, 10, 11)]
    shares = np.random.default_rng(bins).random((20, 5))
    history = many(shares, names)
    # as jit returns it: layers_10 before layers_2
    history = {name: history[name] for name in sorted(history)}
    columns = min(bins, 20)
    edges = [
        sum(len(part) for part in np.array_split(range(20), columns)[:k])
        for k in range(columns + 1)
    ]
    want = [
        [
            np.mean([shares[t, k] for t in range(a, b)])
            for a, b in zip(edges, edges[1:], strict=False)
        ]
        for k in range(5)
    ]
    for kind in history, listed(history):
        ax = plots.clipped_shares(kind, bins=bins)
        found, columns_at, values = picture(ax)
        assert found == names and ax.yaxis_inverted()  # the first at the top
        np.testing.assert_allclose(values, want)
        np.testing.assert_allclose(columns_at, np.array(edges) + 0.5)
    mesh, bar = ax.collections[0], ax.figure.axes[1]
    assert (
        mesh.get_clim() == (0, 1)
        and bar.get_ylabel() == "share clipped"
        and ax.get_xlabel() == "step"
    )


def test_shares_of_a_run():
    names, _, values = picture(plots.clipped_shares(recorded()))
    assert names == ["enc/w", "head"]
    np.testing.assert_array_equal(values, [[0, 1, 0, 1, 0], [0, 0, 1, 1, 0]])


def test_shares_are_means_over_seeds():
    history = jax.vmap(run)(jnp.stack([SIZES, 0 * SIZES + 2, 0 * SIZES + 0.5, 0 * SIZES + 0.5]))
    np.testing.assert_allclose(
        picture(plots.clipped_shares(history))[2],
        [np.array([1, 2, 1, 2, 1]) / 4, [0, 0, 0.25, 0.25, 0]],
    )


def test_without_names_there_is_one_row():
    for history in run(SIZES, params=None), run(SIZES, optaxclip.clip_by_global_norm(10.0)):
        names, _, values = picture(plots.clipped_shares(history))
        assert names == ["all"]
        np.testing.assert_allclose(values[0], history["clip/clipped_share"])
    assert plots.clipped_shares(history).get_title() == "What was clipped"
    assert plots.clipped_shares(recorded()).get_title() == "What was clipped, by group"


def heights(ax):
    """Height of a row, and of its letters, in points, as drawn."""
    ax.figure.canvas.draw()
    return 72 * ax.bbox.height / ax.figure.dpi / len(
        ax.collections[0].get_array()
    ), ax.get_yticklabels()[0].get_fontsize()


@pytest.mark.parametrize("groups", [2, 60, 150])
def test_names_of_many_rows_can_be_read(groups):
    history = many(np.zeros((3, groups)), [f"layers/{i}/kernel" for i in range(groups)])
    row, letters = heights(plots.clipped_shares(history))
    assert 6 < letters < row < 120
    ax = Figure((4, 3)).subplots()  # too low for all names
    plots.clipped_shares(history, ax=ax)
    names = picture(ax)[0]
    every = 1 if groups == 2 else -(-groups // len(names))
    row, letters = heights(ax)
    assert 5 < letters < row * every and names == [
        f"layers/{i}/kernel" for i in range(0, groups, every)
    ]
    assert ax.get_yticks().tolist() == list(range(0, groups, every))


def test_long_names_are_shortened_alike_and_differ_still():
    long = [
        f"transformer/encoder/layers_{i}/self_attention/{part}/kernel"
        for i in range(12)
        for part in ("query", "value")
    ]
    names = picture(plots.clipped_shares(many(np.zeros((2, 24)), long)))[0]
    assert len(set(names)) == 24 and max(map(len, names)) <= plots.LONGEST
    assert all(
        name.endswith(f"{i // 2}/self_…on/{long[i].split('/')[-2]}/kernel")
        for i, name in enumerate(names)
    ), names
    assert plots._shortened(["short/one", "x" * 48]) == ["short/one", "x" * 48]
    assert plots._shortened([]) == []
    assert len(plots._shortened(["word" * 100 + "_12"])[0]) <= plots.LONGEST


# Histogram


def monitored(sizes, **options):
    monitor = telemetry.monitor(**options)

    def step(state, size):
        return monitor.update({"enc": {"w": size[:1]}, "head": size[1:]}, state)[1], None

    return jax.jit(lambda sizes: jax.lax.scan(step, monitor.init(PARAMS), sizes)[0])(
        jnp.asarray(sizes, jnp.float32)
    )


@functools.cache
def state():
    return monitored(SIZES)


def flags(ax):
    """Thresholds, tops and labels of the candidates."""
    return [
        (line.get_xdata()[0], line.get_ydata()[1], text.get_text())
        for line, text in zip(ax.lines, ax.texts, strict=True)
    ]


@pytest.mark.parametrize("steps", [1, 2, 300, 1500])
def test_bars_count_the_sizes_that_were_seen(steps):
    sizes = np.random.default_rng(steps).lognormal(sigma=0.7, size=(steps, 1)) * [1, 0]
    sizes[-1] *= 1 if steps < 100 else 50
    ax = plots.histogram(monitored(sizes))
    left, widths, counts = np.array(
        [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in ax.patches]
    ).T
    assert counts.sum() == steps and (counts > 0).all() and len(counts) <= plots.BARS
    ratios = (left + widths) / left
    np.testing.assert_allclose(ratios, ratios[0])
    np.testing.assert_array_less(
        ratios, max(1.03, (sizes.max() / sizes[:, 0].min()) ** (1.5 / plots.BARS))
    )
    near = 1e-5 if steps < 1024 else 0.0101  # beyond 1024 a monitor knows sizes within 1 %
    for x, count in zip(left + widths, np.cumsum(counts), strict=True):
        assert np.sum(sizes[:, 0] < x * (1 - near)) <= count <= np.sum(sizes[:, 0] < x * (1 + near))
    assert (ax.get_xscale(), ax.get_xlabel(), ax.get_ylabel()) == ("log", "norm", "how often")


def test_flags_are_the_suggestions():
    for sizes in np.random.default_rng(0).lognormal(size=(200, 2)), np.full((3, 2), 2.0):
        state = (monitored(sizes), optax.EmptyState())
        ax, suggestions = plots.histogram(state), telemetry.suggest(state)
        assert len(flags(ax)) == len(suggestions) == 9
        for (threshold, top, label), line in zip(flags(ax), suggestions, strict=True):
            assert threshold == line.threshold and 0.5 < top < 1
            share = f"{100 * line.clipped_share:.3g}"
            assert label == f"{line.candidate} = {line.threshold:.3g} clips {share}%"


@pytest.mark.parametrize("size", [(7, 4), (4, 3.2)])
@pytest.mark.parametrize("spread", [0.01, 0.5, 3.0])
def test_no_label_covers_another_or_a_line_or_leaves_the_picture(spread, size):
    state = monitored(np.random.default_rng(0).lognormal(sigma=spread, size=(500, 2)))
    figure = Figure(size, layout="constrained")
    ax = plots.histogram(state, ax=figure.subplots())
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.texts]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert ax.bbox.x0 < box.x0 and box.x1 < ax.bbox.x1 and box.y1 < ax.bbox.y1
        # above the bars
        assert box.y0 > ax.transData.transform((1, max(bar.get_height() for bar in ax.patches)))[1]
        for line in ax.lines:
            x, top = line.get_transform().transform((line.get_xdata()[0], line.get_ydata()[1]))
            assert not (box.x0 < x < box.x1 and top > box.y0 + 1)


def test_a_histogram_of_one_group_of_several():
    state = monitored(SIZES, scope=scopes.leaf())
    ax = plots.histogram(state, group="head")
    assert [threshold for threshold, *_ in flags(ax)] == [
        x.threshold for x in telemetry.suggest(state) if x.group == "head"
    ]
    assert sum(bar.get_height() for bar in ax.patches) == 5 and ax.get_xlabel() == "norm of head"
    assert min(bar.get_x() for bar in ax.patches) > 2


# Axes


DRAWN = {
    "sizes": lambda **options: plots.sizes(recorded(), **options),
    "sizes of seeds": lambda **options: plots.sizes(
        by_hand(np.arange(1.0, 13).reshape(4, 3), 5.0), **options
    ),
    "shares": lambda **options: plots.clipped_shares(recorded(), **options),
    "histogram": lambda **options: plots.histogram(state(), **options),
}


@pytest.mark.parametrize("name", DRAWN)
def test_pictures_are_saved(name, tmp_path):
    DRAWN[name]().figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", DRAWN)
def test_pictures_go_where_they_are_told(name):
    figure = Figure((11, 8), layout="constrained")
    corners = [
        *figure.subplots(2, 1),
        figure.add_subfigure(figure.add_gridspec(1, 1)[0]).subplots(),
    ]
    for corner in corners:
        assert DRAWN[name](ax=corner) is corner and corner.has_data() and corner.get_title()
    figure.canvas.draw()


@pytest.mark.parametrize("name", DRAWN)
def test_a_new_figure_is_freed(name):
    figure = weakref.ref(DRAWN[name]().figure)
    gc.collect()
    assert figure() is None


@pytest.mark.parametrize("name", DRAWN)
def test_axes_are_checked(name):
    for wrong in Figure(), np.array([Figure().subplots()]), "ax":
        with pytest.raises(
            TypeError,
            match=r"(?s)^ax must be a Axes, got .*; pass one such as Figure\(\)\.subplots\(\)$",
        ):
            DRAWN[name](ax=wrong)


@pytest.mark.parametrize("name", DRAWN)
def test_without_matplotlib_the_extra_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        ImportError,
        match=r"^optaxclip\.plots has no matplotlib .*; pip install 'optaxclip\[plots\]'$",
    ):
        DRAWN[name]()


def test_matplotlib_is_imported_when_something_is_drawn_and_pyplot_never():
    code = """
import sys
from optaxclip import plots
assert not any(name.startswith("matplotlib") for name in sys.modules)
names = "steps", "size_before", "size_after", "limit", "clipped_share"
numbers = {"clip/" + name: [1.0, 2.0] for name in names}
plots.sizes(numbers).figure.savefig(sys.argv[1])
assert "matplotlib.figure" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, "/dev/null"], check=True, timeout=120)


# Refusals


@pytest.mark.parametrize("draw", [plots.sizes, plots.clipped_shares])
def test_a_history_is_checked(draw):
    rows = listed(recorded())
    for wrong, kind in (
        (None, "NoneType"),
        (3, "int"),
        ([1.0], "list"),
        (iter(rows), "list_iterator"),
        ("text", "str"),
    ):
        words = f"^history must be dicts, got {kind}; pass a list of what telemetry.metrics gave$"
        with pytest.raises(TypeError, match=words):
            draw(wrong)
    for wrong, keys in (
        ([], r"\[\]"),
        ({}, r"\[\]"),
        ([{"loss": 1.0, 0: 2.0}], r"\['loss', '0'\]"),
        ([{"clip/steps": 1}], "."),
    ):
        words = (
            f"^history has no metrics of a clip, only {keys}.*; pass what "
            "telemetry.metrics gave at each step$"
        )
        with pytest.raises(ValueError, match=words):
            draw(wrong)
    words = (
        "^history has arrays of shape {}; give them one axis of steps, and at "
        "most one more, of seeds$"
    )
    for wrong, shape in (
        (rows[0], r"\(\)"),
        (by_hand(np.ones((2, 3, 4)), 1.0), r"\(2, 3, 4\)"),
        (by_hand([], 1.0), r"\(0,\)"),
    ):
        with pytest.raises(ValueError, match=words.format(shape)):
            draw(wrong)
    clip = optaxclip.clip_by_global_norm(1.0)
    with pytest.raises(
        ValueError,
        match=(
            "^history has no step that was done, got steps=0; record telemetry.metrics after each"
        ),
    ):
        draw([telemetry.metrics(clip.init(PARAMS))])


@pytest.mark.parametrize("draw", [plots.sizes, plots.clipped_shares])
def test_a_prefix_is_one_of_the_history(draw):
    with pytest.raises(
        ValueError, match="^prefix must be one of 'clip', got 'grad'; choose one of these$"
    ):
        draw(recorded(), prefix="grad")
    two = run(SIZES, optax.chain(optaxclip.clip_by_norm(1.0), optaxclip.clip_by_global_norm(1.0)))
    with pytest.raises(
        ValueError,
        match="^prefix must be one of 'clip_0', 'clip_1', got 'clip'; choose one of these$",
    ):
        draw(two)


def test_a_group_is_one_of_the_history():
    with pytest.raises(
        ValueError, match="^group must be one of 'enc/w', 'head', got 'w'; choose one of these$"
    ):
        plots.sizes(recorded(), group="w")
    words = (
        "^history has no groups by name, got group='enc/w'; record "
        r"telemetry.metrics\(opt_state, params\)$"
    )
    with pytest.raises(ValueError, match=words):
        plots.sizes(run(SIZES, params=None), group="enc/w")


def test_bins_are_counted():
    with pytest.raises(ValueError, match="^bins must be at least 1, got 0; pass a larger count$"):
        plots.clipped_shares(recorded(), bins=0)
    with pytest.raises(TypeError, match="^bins must be an integer, got 2.5"):
        plots.clipped_shares(recorded(), bins=2.5)


def test_a_state_has_a_monitor_that_has_seen_something():
    for wrong, kind in (
        (optaxclip.clip_by_norm(1.0).init(PARAMS), "ClipState"),
        (None, "NoneType"),
        ([], "list"),
    ):
        with pytest.raises(
            ValueError,
            match=f"^opt_state has no telemetry.monitor, got a {kind}; put one into the chain$",
        ):
            plots.histogram(wrong)
    monitor = telemetry.monitor()
    with pytest.raises(
        ValueError,
        match=(
            "^opt_state has a monitor of 'tree' that saw nothing; pass a state after some updates$"
        ),
    ):
        plots.histogram(monitor.init(PARAMS))
    leaves = monitored(SIZES * [1, 0], scope=scopes.leaf())
    with pytest.raises(ValueError, match="^opt_state has a monitor of 'head' that saw nothing; "):
        plots.histogram(leaves, group="head")
    for group in None, "w":
        with pytest.raises(
            ValueError,
            match=f"^group must be one of 'enc/w', 'head', got {group!r}; choose one of these$",
        ):
            plots.histogram(leaves, group=group)
    with pytest.raises(
        ValueError, match="^group must be one of 'tree', got 'head'; choose one of these$"
    ):
        plots.histogram(state(), group="head")
    for group in "tree", None:
        words = (
            "^opt_state has several monitors of 'tree'; pass the state of one, "
            r"such as opt_state\[0\]$"
        )
        with pytest.raises(ValueError, match=words):
            plots.histogram((state(), state()), group=group)
