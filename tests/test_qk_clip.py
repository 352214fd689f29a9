"""`qk_clip`: heads whose attention logits are too large get smaller query and key weights."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip
from optaxclip import qk_clip, responses, scopes, telemetry, thresholds

IN, HEADS, DEPTH = 6, 4, 3


def attention(seed=0, heads=HEADS, keys=HEADS):
    """Query, key, value and out of one layer, as Flax has them."""
    random = np.random.default_rng(seed)

    def leaf(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    return {
        "query": {"kernel": leaf(IN, heads, DEPTH), "bias": leaf(heads, DEPTH)},
        "key": {"kernel": leaf(IN, keys, DEPTH), "bias": leaf(keys, DEPTH)},
        "value": {"kernel": leaf(IN, keys, DEPTH), "bias": leaf(keys, DEPTH)},
        "out": {"kernel": leaf(heads, DEPTH, IN), "bias": leaf(IN)},
    }


PARAMS = {"encoder": {"attn": attention(0)}, "decoder": {"attn": attention(1)}}
LOGITS = {
    "encoder/attn": jnp.array([400.0, 50.0, -300.0, 100.0]),
    "decoder/attn": jnp.array([1.0, 2.0, 101.0, 99.0]),
}
MOVE = jax.tree.map(lambda p: 0.1 * jnp.cos(7 * p), PARAMS)


def step(transform, updates, params, logits, state=None):
    state = transform.init(params) if state is None else state
    return transform.update(updates, state, params, logits=logits)


def after(transform, updates, params, logits):
    return optax.apply_updates(params, step(transform, updates, params, logits)[0])


def still(params):
    return jax.tree.map(jnp.zeros_like, params)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("way", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_it_is_algorithm_1(alpha, way):
    kept = way(functools.partial(after, qk_clip(alpha=alpha)))(MOVE, PARAMS, LOGITS)
    for name in "encoder", "decoder":
        moved = jax.tree.map(lambda p, u: np.float64(p) + u, PARAMS[name], MOVE[name])["attn"]
        wanted = reference.qk_clip(moved, LOGITS[f"{name}/attn"], tau=100.0, alpha=alpha)
        chex.assert_trees_all_close(kept[name]["attn"], wanted, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("value", [100.0, 50.0, 0.0, -5.0, -1e30, np.nan, np.inf, -np.inf])
def test_heads_within_the_limit_and_unknown_logits_leave_the_bits(value):
    logits = {layer: jnp.full(HEADS, value) for layer in LOGITS}
    out, state = jax.jit(functools.partial(step, qk_clip()))(MOVE, PARAMS, logits)
    chex.assert_trees_all_equal(out, MOVE)
    found = telemetry.metrics(state)
    assert found["clip/nonfinite_steps"] == (not np.isfinite(value))
    assert found["clip/clipped_steps"] == 0


def test_one_unknown_logit_leaves_the_other_heads_to_be_clipped():
    logits = LOGITS | {"decoder/attn": jnp.array([400.0, jnp.nan, 1.0, 1.0])}
    kept = after(qk_clip(), still(PARAMS), PARAMS, logits)["decoder"]["attn"]["query"]["kernel"]
    before = PARAMS["decoder"]["attn"]["query"]["kernel"]
    np.testing.assert_allclose(kept[:, 0], 0.5 * before[:, 0], rtol=1e-6)
    np.testing.assert_array_equal(kept[:, 1:], before[:, 1:])


def test_query_heads_that_share_a_key_head_share_the_largest_logit():
    params = {"attn": attention(0, heads=4, keys=2)}
    logits = {"attn": jnp.array([400.0, 1.0, 1.0, 2.0])}
    kept = after(qk_clip(), still(params), params, logits)["attn"]
    factors = np.array([0.5, 0.5, 1.0, 1.0])
    query, key = params["attn"]["query"], params["attn"]["key"]
    np.testing.assert_allclose(kept["query"]["kernel"], query["kernel"] * factors[:, None], 1e-6)
    np.testing.assert_allclose(kept["key"]["kernel"], key["kernel"] * factors[::2, None], 1e-6)
    np.testing.assert_allclose(kept["key"]["bias"], key["bias"] * factors[::2, None], 1e-6)


def test_mla_scales_slices_by_powers():
    params = {"q": jnp.ones((IN, HEADS, 5)), "kv": jnp.ones((IN, HEADS, 6)), "rope": jnp.ones(2)}

    def parts(path, leaf):
        return {
            "q": [("mla", 1, "query", slice(0, 3)), ("mla", 1, 1.0, slice(3, 5))],
            "kv": [("mla", 1, "key", slice(0, 3))],  # the values are behind the keys
        }.get(path)

    logits = {"mla": jnp.array([1.0, 800.0, 1.0, 1.0])}
    kept = after(qk_clip(100.0, alpha=1 / 3, parts=parts), still(params), params, logits)
    np.testing.assert_allclose(kept["q"][0, 1], [0.5] * 3 + [0.125] * 2, rtol=1e-6)
    np.testing.assert_allclose(kept["kv"][0, 1], [0.25] * 3 + [1.0] * 3, rtol=1e-6)
    np.testing.assert_array_equal(kept["rope"], params["rope"])
    np.testing.assert_array_equal(kept["q"][:, [0, 2, 3]], params["q"][:, [0, 2, 3]])


def test_fused_kernels_are_scaled_by_slices():
    params = {"attn": {"qkv": jnp.ones((IN, HEADS, 3 * DEPTH))}}

    def parts(path, leaf):
        q, k = slice(0, DEPTH), slice(DEPTH, 2 * DEPTH)
        return [("attn", -2, 0.5, q), ("attn", -2, 0.5, k)]

    logits = {"attn": [400.0, 1.0, 1.0, 1.0]}
    kept = after(qk_clip(parts=parts), still(params), params, logits)["attn"]["qkv"]
    np.testing.assert_allclose(kept[0, 0], [0.5] * 2 * DEPTH + [1.0] * DEPTH, rtol=1e-6)
    np.testing.assert_array_equal(kept[:, 1:], np.ones((IN, 3, 3 * DEPTH)))


def test_scanned_layers_have_logits_by_layer():
    layers = [attention(k) for k in range(3)]
    params = {"attn": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}
    logits = jnp.array([[400.0, 1.0, 1.0, 1.0], [1.0] * 4, [1.0, 1.0, 200.0, 1.0]])
    kept = after(qk_clip(), still(params), params, {"attn": logits})["attn"]
    for k, layer in enumerate(layers):
        wanted = after(qk_clip(), still(layer), layer, {"": logits[k]})
        chex.assert_trees_all_close(jax.tree.map(lambda x, k=k: x[k], kept), wanted, rtol=1e-6)


def test_the_reading_is_of_the_logits():
    _, state = step(qk_clip(), MOVE, PARAMS, LOGITS)
    found = telemetry.metrics(state, PARAMS)
    assert telemetry.group_names(state.reading) == ["decoder/attn", "encoder/attn"]
    np.testing.assert_allclose(state.reading.size_before, [101, 400])
    np.testing.assert_allclose(state.reading.size_after, [100, 100], rtol=1e-6)
    np.testing.assert_allclose(state.reading.limit, [100, 100])
    np.testing.assert_allclose(state.reading.clipped_share, [0.25, 0.25])
    assert found["clip/size_before/encoder/attn"] == 400
    assert isinstance(step(qk_clip(record=False), MOVE, PARAMS, LOGITS)[1].reading, tuple)


def test_the_limit_may_be_a_schedule_or_a_rule():
    kept = after(qk_clip(lambda step: 100.0), MOVE, PARAMS, LOGITS)
    chex.assert_trees_all_equal(kept, after(qk_clip(), MOVE, PARAMS, LOGITS))
    rule, state = qk_clip(thresholds.growth(2.0)), None
    for scale in 1.0, 1.5, 100.0:
        logits = jax.tree.map(lambda s, scale=scale: scale * jnp.abs(s), LOGITS)
        out, state = step(rule, still(PARAMS), PARAMS, logits, state)
    assert (state.reading.size_after < 1300).all() and (state.reading.size_before > 9e3).all()
    assert any(np.any(x) for x in jax.tree.leaves(out))


def test_in_other_programs():
    optimizer = optax.MultiSteps(optax.chain(optax.adam(0.1), qk_clip()), 2)
    state = optimizer.init(PARAMS)
    for _ in range(2):
        out, state = jax.jit(optimizer.update)(MOVE, state, PARAMS, logits=LOGITS)
    assert telemetry.metrics(state)["clip/clipped_steps"] == 1
    guarded = optaxclip.skip_nonfinite(optax.chain(optax.sgd(0.1), qk_clip()))
    bad = jax.tree.map(lambda x: x * jnp.nan, MOVE)
    out, _ = guarded.update(bad, guarded.init(PARAMS), PARAMS, logits=LOGITS)
    chex.assert_trees_all_equal(out, still(PARAMS))
    mask = {"encoder": True, "decoder": False}
    out, _ = step(optax.masked(qk_clip(), mask), still(PARAMS), PARAMS, LOGITS)
    assert np.any(out["encoder"]["attn"]["key"]["bias"])
    chex.assert_trees_all_equal(out["decoder"], still(PARAMS["decoder"]))
    injected = optax.inject_hyperparams(qk_clip)(max_logit=100.0, alpha=0.3)
    chex.assert_trees_all_close(
        jax.jit(functools.partial(after, injected))(MOVE, PARAMS, LOGITS),
        after(qk_clip(alpha=0.3), MOVE, PARAMS, LOGITS),
        rtol=1e-6,
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_weights_keep_their_dtype(dtype):
    params, updates = jax.tree.map(lambda x: x.astype(dtype), (PARAMS, MOVE))
    out, _ = step(qk_clip(), updates, params, LOGITS)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, updates)
    wanted = after(qk_clip(), MOVE, PARAMS, LOGITS)
    kept = jax.tree.map(lambda x: x.astype(jnp.float32), optax.apply_updates(params, out))
    chex.assert_trees_all_close(kept, wanted, rtol=3e-2, atol=1e-2)


# Over devices: heads are split, as tensor parallel programs do.


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_split_heads_under_jit(kind):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(kind,))
    specs = jax.tree.map(lambda x: P(), PARAMS)
    for name in PARAMS:
        for side in "query", "key":
            specs[name]["attn"][side] = {"kernel": P(None, "x", None), "bias": P("x", None)}
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    split = jax.device_put((MOVE, PARAMS), (shardings, shardings))
    logits = jax.device_put(LOGITS, NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        out, _ = jax.jit(functools.partial(step, qk_clip()))(*split, logits)
    chex.assert_trees_all_close(out, step(qk_clip(), MOVE, PARAMS, LOGITS)[0], rtol=1e-5, atol=1e-6)


def test_split_heads_in_shard_map():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    params = {side: PARAMS["encoder"]["attn"][side]["kernel"] for side in ("query", "key")}
    params = {side: {"kernel": leaf} for side, leaf in params.items()}
    logits, spec = {"": LOGITS["encoder/attn"]}, P(None, "x", None)
    wanted, wanted_state = step(qk_clip(), still(params), params, logits)
    out, state = jax.jit(
        jax.shard_map(
            lambda *args: step(qk_clip(), *args),
            mesh=mesh,
            in_specs=(spec, spec, P("x")),
            out_specs=(spec, P()),
        )
    )(still(params), params, logits)
    chex.assert_trees_all_close(out, wanted, rtol=1e-6)
    chex.assert_trees_all_close(state.reading, wanted_state.reading, rtol=1e-6)


# Where the logits come from: attention functions of Flax.


def linen_attention(module, query, key, value, bias=None, mask=None, **options):
    logits = jnp.einsum("...qhd,...khd->...hqk", query, key) / query.shape[-1] ** 0.5
    module.sow("logits", "largest", logits.max((0, 2, 3)))
    return nn.dot_product_attention(query, key, value, bias, mask, **options)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        def attend(*args, **options):
            options.pop("module", None)
            return linen_attention(self, *args, **options)

        return nn.MultiHeadDotProductAttention(2, attention_fn=attend, name="attn")(x)


def logits_by_hand(params, x):
    q, k = (
        jnp.einsum("bti,ihd->bthd", x, params[side]["kernel"]) + params[side]["bias"]
        for side in ("query", "key")
    )
    return (jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5).max((0, 2, 3))


def test_logits_of_linen_are_sown():
    x = 9 * jax.random.normal(jax.random.key(0), (2, 5, 6))
    model = Linen()
    params = model.init(jax.random.key(1), x)["params"]
    _, sown = model.apply({"params": params}, x, mutable=["logits"])
    logits = {"attn": sown["logits"]["largest"][0]}
    np.testing.assert_allclose(logits["attn"], logits_by_hand(params["attn"], x), rtol=1e-5)
    kept = after(qk_clip(3.0), still(params), params, logits)
    np.testing.assert_allclose(logits_by_hand(kept["attn"], x), [3.0, 3.0], rtol=1e-5)


def test_logits_of_nnx_are_sown():
    x = 9 * jax.random.normal(jax.random.key(0), (2, 5, 6))

    def attend(query, key, value, bias=None, mask=None, module=None, **options):
        logits = jnp.einsum("...qhd,...khd->...hqk", query, key) / query.shape[-1] ** 0.5
        seen.append(logits.max((0, 2, 3)))
        options = {k: v for k, v in options.items() if k in ("deterministic", "precision")}
        return nnx.dot_product_attention(query, key, value, bias, mask, **options)

    seen = []
    model = nnx.MultiHeadAttention(2, 6, attention_fn=attend, decode=False, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(optax.sgd(0.0), qk_clip(3.0)), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer):
        def loss(model):
            seen.clear()
            return model(x).sum(), {"": seen[0]}

        grads, logits = nnx.grad(loss, has_aux=True)(model)
        optimizer.update(model, grads, logits=logits)
        return logits

    before = train_step(model, optimizer)[""]
    assert (before > 3).all()
    np.testing.assert_allclose(train_step(model, optimizer)[""], [3.0, 3.0], rtol=1e-5)


# What is refused.


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="^max_logit must be in "):
        qk_clip(-1.0)
    with pytest.raises(ValueError, match=r"^alpha must be in \[0, 1\], got 1.5"):
        qk_clip(alpha=1.5)
    with pytest.raises(TypeError, match="^parts must be a function, got 3"):
        qk_clip(parts=3)
    with pytest.raises(ValueError, match=r"^parts must name .*, got None for all of \['w'\]"):
        qk_clip().init({"w": jnp.ones(3)})
    for wrong in ("attn", 1), ("attn", 1.0, 0.5), ("attn", 0, "values"), (1, 0, 0.5), 5:
        with pytest.raises(TypeError, match="^parts must return .layer, head axis, exponent. for"):
            qk_clip(parts=lambda path, leaf, wrong=wrong: [wrong]).init({"w": jnp.ones(3)})
    with pytest.raises(ValueError, match="^parts chose the head axis 2 for 'w' of shape"):
        qk_clip(parts=lambda path, leaf: ("attn", 2, 0.5)).init({"w": jnp.ones(3)})


def test_logits_are_checked():
    clip, state = qk_clip(), qk_clip().init(PARAMS)
    with pytest.raises(TypeError, match=r"^logits must be a dict .* got None; call update\("):
        clip.update(MOVE, state, PARAMS)
    with pytest.raises(
        ValueError, match=r"^logits must have the layers .*; add \['decoder/attn'\]"
    ):
        clip.update(MOVE, state, PARAMS, logits={"encoder/attn": jnp.ones(HEADS)})
    for wrong in jnp.ones(3), jnp.ones(()), 1.0:
        with pytest.raises(ValueError, match="^logits must be numbers by query head"):
            clip.update(MOVE, state, PARAMS, logits=dict.fromkeys(LOGITS, wrong))
    with pytest.raises(ValueError, match="got params=None"):
        clip.update(MOVE, state, logits=LOGITS)


# responses.power


@pytest.mark.parametrize("e", [0.0, 0.25, 0.5, 1.0, 1.5, 4.0])
def test_a_power_shrinks_what_is_above_the_limit(e):
    response = responses.power(e)
    for size in 0.0, 0.5, 2.0, 3.0, 1e3, 1e10:
        gradient = jnp.array([0.6, -0.8]) * size
        for limit in 1e-3, 2.0, jnp.inf:
            wanted = np.float64(gradient) * min(1.0, limit / size if size else 1.0) ** e
            for way in lambda f: f, jax.jit:
                found = way(response)(gradient, jnp.float32(size), jnp.float32(limit))
                np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-37)
                if size <= limit:
                    np.testing.assert_array_equal(found, gradient)
    assert repr(response) == f"responses.power({e})"
    slopes = jax.grad(lambda s, c: response(s, s, c), argnums=(0, 1))
    for size, limit in (0.0, 1.0), (2.0, 0.0), (2.0, 1.0), (2.0, jnp.inf), (1e15, 1e-15):
        chex.assert_tree_all_finite(slopes(jnp.float32(size), jnp.float32(limit)))


def test_a_power_of_given_sizes_follows_the_loss():
    clip = optaxclip.clip(1.0, scopes.tree(), response=responses.power(4))
    gradient = jnp.array([3.0, 4.0])
    out, state = clip.update(gradient, clip.init(gradient), sizes=2.0)  # the loss over its average
    np.testing.assert_allclose(out, gradient / 16, rtol=1e-6)
    np.testing.assert_allclose(state.reading.size_after, [0.125], rtol=1e-6)


def test_a_power_is_not_negative():
    with pytest.raises(ValueError, match="^e must be in "):
        responses.power(-1.0)
    with pytest.raises(TypeError, match="^e must be a real number, got "):
        responses.power("2")
