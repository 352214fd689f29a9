"""The transformer does the same on every mesh, each device having its part alone, and after every
restart.
"""

import re
import shutil
from functools import partial

import chex
import fsdp_transformer
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_example import as_script, help_of, in_process

from optaxclip import adagc

STEPS, BAD = 120, 32  # with half of the gradient accumulated
SMALL = {
    "WIDTH": 32,
    "BLOCKS": 1,
    "LENGTH": 32,
    "RATE": 1e-2,
    "CLIPS": {"adagc": partial(adagc, warmup=10)},
}
COMPILED, DONE = {}, []
compile_programs = fsdp_transformer.programs


def programs(options, mesh):
    """Those of the example, each compiled once, with a note of every step."""
    if mesh.devices.shape not in COMPILED:
        COMPILED[mesh.devices.shape] = compile_programs(options, mesh)
    init, step = COMPILED[mesh.devices.shape]
    return init, lambda state: DONE.append(mesh.devices.shape) or step(state)


def run(out, *meshes):
    options = ["--mesh", *meshes, "--steps", STEPS, "--bad-step", BAD]
    return in_process(fsdp_transformer, out, *options, programs=programs, **SMALL)["meshes"]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    out = tmp_path_factory.mktemp("fsdp")
    return run(out, "1,1", "4,2"), out


@pytest.fixture(scope="module")
def around(both):
    """On the larger mesh, the states before and after the bad step, and after the next one."""
    init, step = COMPILED[4, 2]
    state, states = init(), []
    for done in range(1, BAD + 2):
        if done >= BAD:
            states.append(jax.tree.map(jnp.copy, state))  # the step gives its argument away
        state = step(state)
    return [*states, state]


def test_every_mesh_has_the_same_losses_norms_and_limits(both):
    one, split = both[0].values()
    np.testing.assert_allclose(split["loss"], one["loss"], rtol=3e-3)  # bfloat16 has eight bits
    np.testing.assert_allclose(np.float64(split["norm"]), np.float64(one["norm"]), rtol=0.08)
    np.testing.assert_allclose(np.float64(split["limit"]), np.float64(one["limit"]), rtol=0.01)
    assert min(one["clipped"], split["clipped"]) > 10


def test_it_learns_more_than_how_often_each_byte_occurs(both):
    shares = np.bincount(fsdp_transformer.TEXT) / len(fsdp_transformer.TEXT)
    entropy = -np.sum(shares * np.log(np.maximum(shares, 1e-30)))
    for row in both[0].values():
        assert row["loss"][0] > np.log(256) - 0.5 and np.mean(row["loss"][-20:]) < entropy - 0.5


def test_parameters_and_the_float32_state_are_split(around):
    state = around[0]
    accumulated, (clip, (adam, *_)) = (
        state["optimizer"].inner.acc_grads,
        state["optimizer"].inner.inner_opt_state,
    )
    for tree in state["params"], state["weights"], accumulated, adam.mu, adam.nu:
        dtype = "bfloat16" if tree is state["params"] else "float32"
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(tree)} == {dtype}
        block = tree["blocks"]["layers"][0]
        parts = [  # the whole, and what each of the 4 x 2 devices has
            (tree["bytes"]["embedding"], (256, 32), (128, 8)),
            (tree["head"]["kernel"], (32, 256), (8, 128)),
            (block["attend"]["kernel"], (32, 96), (8, 48)),
            (block["join"]["kernel"], (32, 32), (16, 8)),
            (block["up"]["kernel"], (32, 128), (8, 64)),
            (block["down"]["kernel"], (128, 32), (64, 8)),
            (block["norm"]["scale"], (32,), (32,)),
        ]
        for leaf, whole, part in parts:
            assert (
                leaf.shape == whole
                and [shard.data.shape for shard in leaf.addressable_shards] == [part] * 8
            )
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(clip))


def test_parameters_are_the_weights_rounded(around):
    for state in around:
        rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state["weights"])
        chex.assert_trees_all_equal(state["params"], rounded)


def test_the_bad_step_is_as_if_it_had_never_been(around):
    before, after, following = around
    for name in "params", "weights":
        chex.assert_trees_all_equal(after[name], before[name])
    chex.assert_trees_all_equal(after["optimizer"].inner, before["optimizer"].inner)
    counts = [
        (guard.steps, guard.skipped_steps, guard.consecutive)
        for guard in (state["optimizer"] for state in around)
    ]
    assert counts == [(BAD - 1, 0, 0), (BAD, 1, 1), (BAD + 1, 1, 0)]
    # half of the gradient is still there, and the other half comes later
    assert before["optimizer"].inner.mini_step == 1
    assert following["optimizer"].inner.gradient_step == 1 + before["optimizer"].inner.gradient_step


def test_the_bad_step_is_skipped_by_all_and_counted_once(both):
    for row in both[0].values():
        assert row["skipped"] == 1 and np.isfinite(row["loss"]).all()
        # half a batch first
        assert np.isfinite(np.float64(row["norm"])).tolist() == [False] + [True] * (
            len(row["norm"]) - 1
        )
        assert row["norm"][BAD - 1] == row["norm"][BAD - 2] != row["norm"][BAD]


def test_from_a_checkpoint_it_goes_on_bit_for_bit(both):
    for row in both[0].values():
        assert (row["restart"], row["same_bits"]) == (3 * STEPS // 4, True)


def test_a_run_that_was_killed_is_started_again_by_the_same_command(both):
    rows, out = both
    (folder,) = (out / "checkpoints").glob("mesh4,2-*")
    assert sorted(path.name for path in folder.iterdir()) == ["120", "90"]
    shutil.rmtree(folder / "120")
    DONE.clear()
    assert run(out, "4,2")["4,2"] == rows["4,2"]
    assert len(DONE) == 60  # thirty steps, and again from the checkpoint


def test_bits_that_differ_are_told(both, monkeypatch):
    restore, found = fsdp_transformer.ocp.CheckpointManager.restore, []

    def wrong(*arguments, **options):
        state = restore(*arguments, **options)
        found.append(state["weights"]["head"]["kernel"])
        return (
            state | {"weights": jax.tree.map(lambda x: x * (1 + 2**-23), state["weights"])}
            if len(found) == 2
            else state
        )

    monkeypatch.setattr(fsdp_transformer.ocp.CheckpointManager, "restore", wrong)
    assert run(both[1], "1,1")["1,1"]["same_bits"] is False
    assert len(found) == 2


def test_as_a_script_it_makes_its_own_devices(tmp_path):
    stdout = as_script(
        "fsdp_transformer",
        "--mesh",
        "2,4",
        "--steps",
        4,
        "--clip",
        "zclip",
        "--seed",
        1,
        "--out",
        tmp_path,
    )
    assert re.search(r"\n2,4 .* yes\n", stdout) and str(tmp_path) in stdout


def test_help_names_every_option(capsys):
    text = help_of(fsdp_transformer, capsys)
    assert set(re.findall(r"--([\w-]+)", text)) >= {
        "help",
        "mesh",
        "clip",
        "bad-step",
        "steps",
        "seed",
        "out",
    }
    assert "{adagc,zclip,global,none}" in text
