"""Runs that torch began go on here, to the same weights; states go there and back without a change."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P
from jax.sharding import AxisType, NamedSharding

import adamite
from adamite import interop
from adamite.sharding import zero1
from bits import assert_same_bits, types
from interop.runs import MAPPING, NUMBERED, RUNS, assert_same, by_name, nameless, state_dict, train, weights

# The same 100 steps in float64 end 0.9e-6 from ours and 1.9e-6 from torch's, who rounds a weight's decay by itself.
BOUND = 2e-6


def far(one, other):
    """The largest difference, relative to the weight where that is above 1."""
    pairs = zip(*map(jax.tree.leaves, (one, other)), strict=True)
    return max(float((np.abs(a - b) / np.maximum(np.abs(b), 1)).max()) for a, b in pairs)


@pytest.mark.few(1)
@pytest.mark.parametrize("run", RUNS)
def test_a_run_of_torch_goes_on_to_the_same_weights(run):
    params, found = weights(run, 50), state_dict(run)
    tx = interop.torch_optimizer(found, params, MAPPING)
    after, state = train(tx, params, interop.from_torch(found, tx, params, MAPPING), 50, 150)
    print(far(after, weights(run, 150)))
    assert far(after, weights(run, 150)) <= BOUND
    assert {int(count) for _, count in optax.tree_utils.tree_get_all_with_path(state, "count")} == {150}


BY_HAND = {
    "adam": adamite.adam(1e-2),
    "adam_l2": adamite.chain(adamite.add_decayed_weights(0.1), adamite.adam(1e-2, 0.8, 0.99, 1e-6)),
    "adamw": adamite.adamw(lambda _: 1e-2, weight_decay=0.1),
    "adamw_groups": adamite.adamw(1e-2, weight_decay=0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    "adamw_rates": adamite.partition(
        {"body": adamite.adamw(2e-3, weight_decay=0.3), "head": adamite.adamw(1e-2, 0.8, 0.99, 1e-6, weight_decay=0.0)},
        {"first": "body", "second": "head"},
    ),
    "adam_amsgrad": adamite.amsgrad(1e-2, max_before_correction=True),
    "adamw_amsgrad": adamite.chain(
        adamite.scale_by_amsgrad(max_before_correction=True),
        adamite.add_decayed_weights(0.1),
        adamite.scale_by_learning_rate(1e-2),
    ),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_transformation_written_by_hand_goes_on_too(run):
    params, tx = weights(run, 50), BY_HAND[run]
    after, _ = train(tx, params, interop.from_torch(state_dict(run), tx, params, MAPPING), 50, 150)
    assert far(after, weights(run, 150)) <= BOUND


@pytest.mark.parametrize("run", RUNS)
def test_there_and_back_is_the_same_to_the_bit(run):
    params, found = weights(run, 50), state_dict(run)
    for tx in (interop.torch_optimizer(found, params, MAPPING), BY_HAND[run]):
        state = interop.from_torch(found, tx, params, MAPPING)
        assert_same(interop.to_torch(state, tx, params, MAPPING), found)
        assert_same(interop.to_torch(state, tx, params, MAPPING, like=found), found)


@pytest.mark.parametrize("run", RUNS)
def test_numbers_and_names_are_the_same_state(run):
    params, tx = weights(run, 50), BY_HAND[run]
    state = interop.from_torch(state_dict(run), tx, params, MAPPING)
    names = by_name(state_dict(run))
    assert_same_bits(interop.from_torch(names, tx, params, MAPPING), state)
    assert_same(interop.to_torch(state, tx, params, MAPPING, like=names), names)
    grouped = {"first.bias": 2, "second.kernel": (1, (1, 0))}  # torch numbers weights group by group
    numbered = NUMBERED | grouped if run == "adamw_groups" else NUMBERED
    old = nameless(state_dict(run))
    assert_same_bits(interop.from_torch(old, tx, params, numbered), state)
    assert_same(interop.to_torch(state, tx, params, numbered, like=old), old)
    again = interop.to_torch(state, tx, params, numbered)
    assert "param_names" not in again["param_groups"][0]
    assert_same_bits(interop.from_torch(again, tx, params, numbered), state)


def test_without_a_mapping_names_are_ours():
    params = {"w": jnp.ones((4, 3)), "b": jnp.ones(2)}
    tx = adamite.adam(1e-2)
    _, state = tx.update(params, tx.init(params))
    found = interop.to_torch(state, tx, params)
    assert found["param_groups"][0]["param_names"] == ["b", "w"]
    assert_same_bits(interop.from_torch(found, tx, params), state)


@pytest.mark.parametrize("shape", [(2, 3, 4), (5, 1, 2, 3), (2, 3, 4, 5, 6)])
def test_kernels_of_convolutions_are_transposed_both_ways(shape):
    params = {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)}
    names, tx = interop.flax_names(params), adamite.adam(1e-2)
    _, state = tx.update(params, tx.init(params))
    found = interop.to_torch(state, tx, params, names)
    *spatial, inputs, outputs = shape
    assert found["state"][0]["exp_avg"].shape == (outputs, inputs, *spatial)
    np.testing.assert_array_equal(found["state"][0]["exp_avg"][1, 0].ravel(), state[0].mu["kernel"][..., 0, 1].ravel())
    assert_same_bits(interop.from_torch(found, tx, params, names), state)


@pytest.mark.parametrize("moments", ["int8", "bfloat16", ("int8", "float8"), ("bfloat16", "float32")])
def test_moments_of_any_storage_are_those_of_float32_converted(moments):
    rng = np.random.default_rng(0)
    params = {"w": jnp.zeros((64, 512)), "b": jnp.zeros(3)}
    wide = adamite.adam(1e-2)
    _, state = wide.update(
        jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params), wide.init(params)
    )
    found = interop.to_torch(state, wide, params)
    lean = adamite.adam(1e-2, moments=moments)
    kept = interop.from_torch(found, lean, params)
    assert_same_bits(kept, adamite.convert_moments(state, moments))
    assert types(kept) == types(lean.init(params))
    assert_same_bits(interop.from_torch(interop.to_torch(kept, lean, params), lean, params), kept)


def on_mesh(params):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return jax.device_put(params, NamedSharding(mesh, P())), mesh


WRAPPERS = {
    "skip_nonfinite": adamite.skip_nonfinite,
    "skip_spikes": adamite.skip_spikes,
    "with_telemetry": adamite.with_telemetry,
    "accumulate": lambda tx: adamite.accumulate(tx, 2),
    "with_ema": adamite.with_ema,
    "clipped": lambda tx: adamite.chain(optax.clip_by_global_norm(1e9), tx),
    "all of them": lambda tx: adamite.with_telemetry(adamite.accumulate(adamite.skip_nonfinite(tx), 2)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_filled_through_and_compared_through(wrapper):
    params, found = weights("adamw", 50), state_dict("adamw")
    tx = WRAPPERS[wrapper](adamite.adamw(1e-2, weight_decay=0.1))
    state = interop.from_torch(found, tx, params, MAPPING)
    assert types(state) == types(tx.init(params))
    assert not any(x.committed for x in jax.tree.leaves(state))  # as init leaves it
    assert_same(interop.to_torch(state, tx, params, MAPPING), found)
    with pytest.raises(adamite.checks.RefusedError, match=r"weight_decay: torch has 0\.1, tx 0\.2"):
        interop.from_torch(found, WRAPPERS[wrapper](adamite.adamw(1e-2, weight_decay=0.2)), params, MAPPING)


def test_zero1_keeps_its_part_on_each_device():
    params, mesh = on_mesh({"w": jnp.ones((16, 4)), "b": jnp.ones(3)})
    tx = adamite.adamw(1e-2)
    _, state = tx.update(params, tx.init(params), params)
    found = interop.to_torch(state, tx, params)
    for spread in (zero1(tx, mesh), zero1(adamite.adamw(1e-2, moments="int8"), mesh)):
        ours, born = interop.from_torch(found, spread, params), spread.init(params)
        assert types(ours) == types(born)
        for x, like in zip(*map(jax.tree.leaves, (ours, born)), strict=True):
            assert x.sharding.is_equivalent_to(like.sharding, x.ndim)
        assert_same(interop.to_torch(ours, spread, params, like=found), found)


def test_schedules_count_on():
    params, found = weights("adamw", 50), state_dict("adamw")
    rate = optax.linear_schedule(1.0, 0.0, 100)
    tx = adamite.adamw(rate, weight_decay=lambda count: 0.1)
    state = interop.from_torch(found, tx, params, MAPPING)
    counts = [x for x in jax.tree.leaves(state) if x.shape == ()]
    assert [int(x) for x in counts] == [50, 50, 50]
    assert interop.to_torch(state, tx, params, MAPPING)["param_groups"][0]["lr"] == 0.5
    assert interop.to_torch(state, tx, params, MAPPING, like=found)["param_groups"][0]["lr"] == 1e-2


def test_before_the_first_step_the_state_is_fresh():
    params, tx = weights("adam", 50), adamite.adam(1e-2)
    for state in ({}, {0: {}, 1: {}, 2: {}, 3: {}}):
        found = {"state": state, "param_groups": state_dict("adam")["param_groups"]}
        fresh = interop.from_torch(found, tx, params, MAPPING)
        assert_same_bits(fresh, tx.init(params))
        assert interop.to_torch(fresh, tx, params, MAPPING)["state"] == {}


def test_what_torch_freezes_is_masked_here():
    params, found = weights("adam", 50), state_dict("adam")
    del found["state"][1]
    mask = {"first": {"kernel": True, "bias": False}, "second": True}
    tx = optax.masked(adamite.adam(1e-2), mask)
    state = interop.from_torch(found, tx, params, MAPPING)
    assert types(state) == types(tx.init(params))
    assert_same(interop.to_torch(state, tx, params, MAPPING, like=found), found)


def test_optax_itself_goes_on():
    params, found, tx = weights("adam", 50), state_dict("adam"), optax.adam(1e-2)
    state = interop.from_torch(found, tx, params, MAPPING)
    assert far(train(tx, params, state, 50, 150)[0], weights("adam", 150)) <= 2e-5  # its bias correction is coarser
    assert_same(interop.to_torch(state, tx, params, MAPPING, like=found), found)


def test_tensors_of_shape_zero_and_of_16_bits_are_taken():
    params, found, tx = weights("adam", 50), state_dict("adam"), adamite.adam(1e-2)
    for group in found["param_groups"]:
        group["lr"] = np.asarray(np.float32(1e-2))
    for kept in found["state"].values():
        kept["step"] = 50
        for name in ("exp_avg", "exp_avg_sq"):
            kept[name] = kept[name].astype(jnp.bfloat16)
    state = interop.from_torch(found, tx, params, MAPPING)
    exact = interop.from_torch(state_dict("adam"), tx, params, MAPPING)
    assert_same_bits(state[0].nu, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), exact[0].nu))
    assert interop.torch_optimizer(found).identity["parts"][1]["learning_rate"] == np.float32(1e-2)


def test_the_state_shares_no_memory_with_torch():
    params, tx = {"w": jnp.ones(4096)}, adamite.adam(1e-2)
    _, state = tx.update(params, tx.init(params))
    found, before = interop.to_torch(state, tx, params), np.array(state[0].mu["w"])
    again = interop.from_torch(found, tx, params)
    found["state"][0]["exp_avg"] *= 2  # as torch steps: in place
    for one in (state, again):
        np.testing.assert_array_equal(one[0].mu["w"], before)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        params, tx = {"w": jnp.ones(3, jnp.float64)}, adamite.adam(1e-2)
        _, state = tx.update({"w": jnp.full(3, 1 / 3)}, tx.init(params))
        found = interop.to_torch(state, tx, params)
        assert found["state"][0]["exp_avg"].dtype == np.float64
        assert_same_bits(interop.from_torch(found, tx, params), state)


def test_import_adamite_imports_no_interop():
    import subprocess
    import sys

    code = "import sys, adamite; sys.exit(any('interop' in name or 'safetensors' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
