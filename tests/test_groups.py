"""Frozen weights, LoRA, groups with rates of their own: the whole tree goes in and comes out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import adamite
from adamite import interop
from bits import assert_same_bits

SHAPE = (16, 256)
LABELS = {"base": "frozen", "lora": {"a": "fast", "b": "slow"}}


def params(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda: jnp.asarray(rng.uniform(0.5, 2.0, SHAPE), jnp.bfloat16)  # noqa: E731
    return {"base": draw(), "lora": {"a": draw(), "b": draw()}}


def lean(rate):
    return adamite.adamw(rate, moments="int8", rounding="residual8")


def groups(fast, slow):
    """The same training, written in the ways that people write it."""
    frozen = optax.set_to_zero()
    return {
        "partition": optax.partition({"fast": fast, "slow": slow, "frozen": frozen}, LABELS),
        "partition of chains": optax.chain(
            optax.clip_by_global_norm(1e6),
            optax.partition({"fast": fast, "slow": slow, "frozen": frozen}, lambda tree: LABELS),
        ),
        "masked": optax.chain(
            optax.masked(fast, {"base": False, "lora": {"a": True, "b": False}}),
            optax.masked(slow, {"base": False, "lora": {"a": False, "b": True}}),
            optax.masked(frozen, {"base": True, "lora": {"a": False, "b": False}}),
        ),
        "nested": optax.partition(
            {"lora": optax.partition({"fast": fast, "slow": slow, "frozen": frozen}, LABELS), "frozen": frozen},
            {"base": "frozen", "lora": "lora"},
        ),
        "guarded": adamite.skip_nonfinite(optax.partition({"fast": fast, "slow": slow, "frozen": frozen}, LABELS)),
        "accumulated": adamite.accumulate(
            optax.partition({"fast": fast, "slow": slow, "frozen": frozen}, LABELS), every=1
        ),
    }


WAYS = list(groups(lean(1e-3), lean(1e-4)))
each = pytest.mark.parametrize("way", WAYS)


def trained(tx, start, steps=3):
    step = jax.jit(lambda p, s, g: (lambda u, s: (optax.apply_updates(p, u), s))(*tx.update(g, s, p)))
    state = tx.init(start)
    for i in range(steps):
        start, state = step(start, state, params(i + 1))
    return start, state


def alone(name, rate):
    """One leaf under its own optimizer, and its full weights."""
    tx = lean(rate)
    weights, state = {name: params()["lora"][name]}, tx.init({name: params()["lora"][name]})
    for i in range(3):
        updates, state = tx.update({name: params(i + 1)["lora"][name]}, state, weights)
        weights = optax.apply_updates(weights, updates)
    return adamite.full_weights(weights, state)[name]


@each
def test_full_weights_are_those_of_each_group(way):
    weights, state = trained(groups(lean(1e-3), lean(1e-4))[way], params())
    full = adamite.full_weights(weights, state)
    assert jax.tree.structure(full) == jax.tree.structure(weights)
    assert {x.dtype for x in jax.tree.leaves(full)} == {jnp.dtype(jnp.float32)}
    assert_same_bits(full["base"], params()["base"].astype(jnp.float32))
    for name, rate in (("a", 1e-3), ("b", 1e-4)):
        np.testing.assert_allclose(full["lora"][name], alone(name, rate), atol=rate / 50)
        moved = jnp.abs(full["lora"][name] - params()["lora"][name].astype(jnp.float32)).mean()
        assert moved == pytest.approx(3 * rate, rel=0.5)


@each
def test_saved_weights_are_the_full_ones(way, tmp_path):
    weights, state = trained(groups(lean(1e-3), lean(1e-4))[way], params())
    interop.save_weights(tmp_path / "all.safetensors", weights, state)
    full = adamite.full_weights(weights, state)
    assert_same_bits(interop.load_weights(tmp_path / "all.safetensors", full), full)


@each
def test_the_report_counts_each_leaf_once(way):
    report = adamite.memory_report(groups(lean(1e-3), lean(1e-4))[way], params())
    size = SHAPE[0] * SHAPE[1]
    summed = 4 * size if way == "accumulated" else 0
    states = {leaf.path: leaf.bytes.state - summed for leaf in report.leaves}
    lora = 3 * size + 2 * 4 * SHAPE[0]  # two codes and a residual, and two scales a row
    assert states == {"params['base']": 0, "params['lora']['a']": lora, "params['lora']['b']": lora}
    kept = {leaf.path: leaf.moments for leaf in report.leaves}
    assert kept == {"params['base']": "", "params['lora']['a']": "int8", "params['lora']['b']": "int8"}


@each
def test_moments_are_converted_in_each_group(way):
    weights, state = trained(groups(lean(1e-3), lean(1e-4))[way], params())
    wide = adamite.convert_moments(state, "float32")
    plain = groups(adamite.adamw(1e-3, rounding="residual8"), adamite.adamw(1e-4, rounding="residual8"))[way]
    assert jax.tree.structure(wide) == jax.tree.structure(jax.eval_shape(plain.init, weights))
    plain.update(params(9), wide, weights)
    assert_same_bits(adamite.convert_moments(wide, "int8"), state)


@each
def test_an_error_names_what_the_user_passed(way):
    tx = groups(lean(1e-3), lean(1e-4))[way]
    weights, state = trained(tx, params())
    other = {"base": weights["base"], "lora": {"a": weights["lora"]["a"], "c": weights["lora"]["b"]}}
    with pytest.raises(ValueError, match=r"params\['lora'\]\['c'\] has no counterpart in the residual"):
        adamite.full_weights(other, state)
    short = {"base": weights["base"], "lora": {"a": weights["lora"]["a"][:3], "b": weights["lora"]["b"]}}
    with pytest.raises(ValueError, match=r"params\['lora'\]\['a'\] has shape \(3, 256\), but its residual in"):
        adamite.full_weights(short, state)


def test_two_residuals_of_one_leaf_are_refused():
    state = lean(1e-3).init(params())
    with pytest.raises(ValueError, match=r"^state must have one residual of params\['base'\], got two"):
        adamite.full_weights(params(), (state, state))


def test_in_the_variables_of_nnx():
    model = nnx.Linear(*SHAPE, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    tx = optax.partition(
        {"trained": lean(1e-3), "frozen": optax.set_to_zero()},
        lambda tree: adamite.map_with_path(lambda path, _: "trained" if path[-1].key == "kernel" else "frozen", tree),
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(3):
        optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, SHAPE[0]), jnp.bfloat16))))(model))
    weights = nnx.state(model, nnx.Param)
    full = adamite.full_weights(weights, optimizer.opt_state)
    assert jax.tree.structure(full) == jax.tree.structure(weights)
    assert full["kernel"].dtype == full["bias"].dtype == jnp.float32
    assert not np.array_equal(full["kernel"][...], weights["kernel"][...].astype(jnp.float32))
    pure = adamite.full_weights(nnx.as_pure(weights), nnx.as_pure(optimizer.opt_state))
    assert_same_bits(jax.tree.leaves(pure), jax.tree.leaves(full))
