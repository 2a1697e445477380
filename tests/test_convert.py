"""Moments from one storage to another: what changes, what does not, and what goes on from there."""

import functools
import re
from typing import NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax import P
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding

import adamite
from adamite import convert_moments
from adamite.convert import UNSIGNED, stored_as
from adamite.core.rule_part import Counted
from adamite.storage import Blockwise, Dense, Quantized
from bits import assert_same_bits
from reference.codes import cubic_signed, cubic_unsigned, nearest

pytestmark = pytest.mark.few(1)

BFLOAT16 = jnp.dtype(jnp.bfloat16)


def draw(seed):
    """Weights, or gradients whose sizes differ by decades."""
    rng = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(rng.standard_normal((16, 640)) * 10 ** (rng.standard_normal(640) / 2), jnp.float32),
        "small": {"b": jnp.asarray(rng.standard_normal(5), jnp.float32)},
    }


def train(tx, steps, params=None, state=None, first=1):
    """Through the same gradients, whatever the optimizer."""
    params = draw(0) if params is None else params
    state = tx.init(params) if state is None else state
    update = jax.jit(tx.update)
    for i in range(first, first + steps):
        updates, state = update(draw(i), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@functools.cache
def by_optax(name, steps):
    """Parameters and state of an optimizer of optax's."""
    return train(getattr(optax, name)(1e-2), steps)


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype.name), tree)


def by_path(path, leaf):
    assert leaf.dtype == jnp.float32
    return ("bfloat16", "int8") if "w" in jax.tree_util.keystr(path) else "float32"


STORAGES = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "int8": "int8",
    "float8": ("int8", "float8"),
    "mixed": ("bfloat16", "int8"),
    "by path": by_path,
    "blocks of 64": Blockwise(block=64),
    "objects": (Dense(BFLOAT16), Blockwise(smallest=1, float8=True)),
}
RECIPES = {
    "adam": adamite.adam,
    "amsgrad": adamite.amsgrad,
    "adamax": adamite.adamax,
    "radam": adamite.radam,
    "adabelief": adamite.adabelief,
    "adopt": adamite.adopt,
    "ademamix": adamite.ademamix,
    "laprop": adamite.laprop,
    "adam_atan2": adamite.adam_atan2,
    "lion": adamite.lion,
    "adagrad": adamite.adagrad,
    "momentum": lambda rate, **kwargs: adamite.sgd(rate, momentum=0.9, **kwargs),
    "rmsprop": adamite.rmsprop,
    "centered": lambda rate, **kwargs: adamite.rmsprop(rate, centered=True, momentum=0.9, **kwargs),
    "corrected": lambda rate, **kwargs: adamite.rmsprop(rate, bias_correction=True, **kwargs),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_every_optimizer_goes_on_and_comes_back(recipe, moments):
    make, moments, params = RECIPES[recipe], STORAGES[moments], draw(0)
    state = make(1e-3).init(params)
    lean = convert_moments(state, moments)
    target = make(1e-3, moments=moments)
    assert_same_bits(lean, target.init(params))
    _, after = jax.eval_shape(target.update, params, lean, params)
    assert types(jax.eval_shape(lambda s: convert_moments(s, "float32"), after)) == types(state)


@pytest.mark.parametrize(("moments", "bound"), [("bfloat16", 0.01), ("int8", 0.06), (("int8", "float8"), 0.06)])
def test_an_optax_run_goes_on_lean(moments, bound):
    """The 30 steps that follow end at most that share of their length away from float32's."""
    params, state = by_optax("adam", 20)
    straight, _ = train(optax.adam(1e-2), 30, params, state, first=21)
    lean, _ = train(adamite.adam(1e-2, moments=moments), 30, params, convert_moments(state, moments), first=21)
    for start, a, b in zip(*map(jax.tree.leaves, (params, straight, lean)), strict=True):
        print(np.linalg.norm(b - a) / np.linalg.norm(a - start))
        assert np.linalg.norm(b - a) <= bound * np.linalg.norm(a - start)


def test_a_lean_run_goes_on_with_optax():
    params, state = train(adamite.adam(1e-2, moments="int8"), 20)
    straight, _ = train(adamite.adam(1e-2, moments="int8"), 10, params, state, first=21)
    wide, after = train(optax.adam(1e-2), 10, params, convert_moments(state, "float32"), first=21)
    assert types(after) == types(jax.eval_shape(optax.adam(1e-2).init, params))
    for start, a, b in zip(*map(jax.tree.leaves, (params, straight, wide)), strict=True):
        print(np.linalg.norm(b - a) / np.linalg.norm(a - start))
        assert np.linalg.norm(b - a) <= 0.05 * np.linalg.norm(a - start)


@pytest.mark.parametrize("moments", STORAGES)
def test_to_float32_and_back_are_the_same_bytes(moments):
    moments = STORAGES[moments]
    _, wide = by_optax("amsgrad", 3)
    lean = convert_moments(wide, moments)
    again = convert_moments(lean, "float32")
    assert types(again) == types(wide)
    assert_same_bits(convert_moments(again, moments), lean)


@pytest.mark.parametrize("moments", ["int8", ("int8", "float8")])
def test_what_a_lean_run_keeps_comes_back_in_the_same_bytes(moments):
    """Its codes were rounded stochastically."""
    _, state = train(adamite.adam(1e-3, moments=moments), 3)
    wide = convert_moments(state, "float32")
    assert_same_bits(convert_moments(wide, moments), state)
    for name in ("mu", "nu"):  # and decoded as the optimizer decodes
        kept, storage = getattr(state[0], name), Blockwise(unsigned=UNSIGNED[name])
        decoded = jax.tree.map(lambda *arrays, by=storage: by.decode(Quantized(*arrays)), *kept)
        assert_same_bits(getattr(wide[0], name), decoded)


def test_what_is_kept_so_already_is_not_touched():
    for moments in ("float32", "int8", "bfloat16"):
        state = adamite.adam(1e-3, moments=moments).init(draw(0))
        same = convert_moments(state, moments)
        assert all(map(lambda a, b: a is b, jax.tree.leaves(same), jax.tree.leaves(state)))


def test_a_moment_is_rounded_to_the_nearest():
    _, state = by_optax("adam", 3)
    short, lean = convert_moments(state, "bfloat16")[0], convert_moments(state, "int8")[0]
    wide = convert_moments([lean], "float32")[0]
    for name, table in (("mu", cubic_signed()), ("nu", cubic_unsigned())):
        x, kept = getattr(state[0], name)["w"], getattr(lean, name)
        assert_same_bits(getattr(short, name)["w"], x.astype(jnp.bfloat16))
        scale = np.repeat(kept.scales["w"], 256, axis=-1)[:, :640]
        z, found = np.asarray(x / scale, np.float64), np.asarray(getattr(wide, name)["w"] / scale, np.float64)
        if UNSIGNED[name]:
            z, found = np.sqrt(z), np.sqrt(found)
        _, far = nearest(z.ravel(), table)
        np.testing.assert_allclose(np.abs(found - z).ravel(), far, atol=2e-5 if UNSIGNED[name] else 1e-5)
        assert_same_bits(kept.codes["small"], getattr(state[0], name)["small"])


def test_the_seed_does_not_matter():
    _, state = by_optax("adam", 3)
    assert_same_bits(*(convert_moments(state, Blockwise(seed=seed)) for seed in (0, 7)))
    assert_same_bits(*(convert_moments(state, Dense(BFLOAT16, seed=seed)) for seed in (0, None)))


WRAPPERS = {
    "chain": lambda make: optax.chain(optax.clip_by_global_norm(1.0), make(1e-2), optax.ema(0.9)),
    "masked": lambda make: optax.masked(make(1e-2), {"w": True, "small": False}),
    "partition": lambda make: optax.partition({"a": make(1e-2), "b": optax.sgd(0.1)}, {"w": "a", "small": {"b": "b"}}),
    "MultiSteps": lambda make: optax.MultiSteps(make(1e-2), every_k_schedule=2),
    "apply_if_finite": lambda make: optax.apply_if_finite(make(1e-2), 3),
    "inject_hyperparams": lambda make: optax.inject_hyperparams(make)(optax.linear_schedule(1e-2, 0.0, 9)),
    "masked in MultiSteps in a chain": lambda make: optax.chain(
        optax.MultiSteps(optax.masked(make(1e-2), {"w": True, "small": True}), 2).gradient_transformation()
    ),
}


def others(state):
    """All that is no moment."""
    return {
        jax.tree_util.keystr(path): x
        for path, x in jax.tree_util.tree_leaves_with_path(state)
        if not UNSIGNED.keys() & {key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)}
    }


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_inside_wrappers(wrapper):
    wrap = WRAPPERS[wrapper]
    lean_tx = wrap(lambda rate: adamite.adam(rate, moments="int8"))
    params, state = train(wrap(lambda rate: optax.adam(rate)), 3)
    lean = convert_moments(state, "int8")
    assert types(lean) == types(jax.eval_shape(lean_tx.init, params))
    assert_same_bits(others(lean), others(state))
    assert len(others(state)) > 0
    updates, _ = jax.jit(lean_tx.update)(draw(4), lean, params)
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
    back = convert_moments(lean, "float32")
    assert types(back) == types(state)
    assert_same_bits(convert_moments(back, "int8"), lean)


def test_inside_dicts_and_train_states():
    params, state = by_optax("adam", 3)
    both = convert_moments({"generator": state, "step": 3, "critic": [state]}, "int8")
    assert both["step"] == 3
    assert_same_bits(both["generator"], convert_moments(state, "int8"))
    assert_same_bits(both["critic"][0], both["generator"])
    tx = adamite.adam(1e-2, moments="int8")
    whole = TrainState(step=2, apply_fn=None, params=params, tx=tx, opt_state=state)
    lean = convert_moments(whole, "int8")
    assert lean.params is params or all(map(lambda a, b: a is b, *map(jax.tree.leaves, (lean.params, params))))
    assert_same_bits(lean.opt_state, both["generator"])
    lean.apply_gradients(grads=draw(3))


@pytest.mark.parametrize("shape", [(), (64,)])
def test_parameters_that_are_called_as_a_moment_is_are_none(shape):
    class Gaussian(NamedTuple):
        mu: jax.Array
        log_sigma: jax.Array

    params = Gaussian(jnp.ones((64, 64)), jnp.ones(shape))
    state = optax.chain(optax.adam(1e-2), optax.ema(0.9)).init(params)
    lean = convert_moments(state, "int8")
    assert types(lean[0]) == types(adamite.adam(1e-2, moments="int8").init(params))
    assert_same_bits(lean[1], state[1])


class TestCounts:
    """Of rules that have none: optax's layout in float32, `Counted` where random bits are drawn."""

    def test_starts_at_zero_and_is_dropped(self):
        params, state = by_optax("rmsprop", 3)
        lean = convert_moments(state, "int8")
        assert isinstance(lean[0], Counted)
        assert lean[0].count == 0
        _, lean = train(adamite.rmsprop(1e-2, moments="int8"), 2, params, lean, first=4)
        assert lean[0].count == 2
        assert type(convert_moments(lean, "float32")[0]) is type(state[0])

    def test_goes_on_from_storage_to_storage(self):
        _, state = train(adamite.adagrad(1e-2, moments="bfloat16"), 3)
        assert state[0].count == 3
        assert convert_moments(state, "int8")[0].count == 3
        assert convert_moments(state, Dense(BFLOAT16))[0].sum_of_squares["w"].dtype == BFLOAT16  # draws no bits

    def test_momentum_in_int8_needs_none(self):
        state = optax.sgd(1e-2, momentum=0.9).init(draw(0))
        assert type(convert_moments(state, "int8")[0]) is optax.TraceState
        assert isinstance(convert_moments(state, "bfloat16")[0], Counted)

    def test_of_squares_alone_in_float8(self):
        lean = convert_moments(optax.scale_by_rms().init(draw(0)), "float8")
        assert_same_bits(lean, adamite.scale_by_rms(moments="float8").init(draw(0)))

    def test_lives_where_the_moments_do(self):
        mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
        for home in (SingleDeviceSharding(jax.devices()[3]), NamedSharding(mesh, P())):
            params = jax.device_put(draw(0), home)
            lean = convert_moments(optax.rmsprop(1e-2).init(params), "int8")
            assert all(x.sharding.is_equivalent_to(home, x.ndim) and x.committed for x in jax.tree.leaves(lean))


MESH_AXES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
SPECS = {"rows": P("data"), "columns": P(None, "model"), "both": P("data", "model")}


def sharded(axes, spec, tree):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(MESH_AXES[axes],) * 2)
    return jax.device_put(tree, {"w": NamedSharding(mesh, SPECS[spec]), "small": NamedSharding(mesh, P())})


@pytest.mark.parametrize(("spec", "jit"), [("rows", False), ("columns", True), ("both", False), ("both", True)])
@pytest.mark.parametrize("axes", MESH_AXES)
def test_shardings_stay_and_the_bits_are_those_of_one_device(axes, spec, jit):
    def there(state):
        return convert_moments(state, "int8")

    def back(state):
        return convert_moments(state, "float32")

    _, alone = by_optax("adam", 3)
    params = sharded(axes, spec, draw(0))
    state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), alone, adamite.adam(1e-2).init(params))
    lean = (jax.jit(there) if jit else there)(state)
    wide = (jax.jit(back) if jit else back)(lean)
    for ours, born in ((lean, adamite.adam(1e-2, moments="int8").init(params)), (wide, state)):
        for x, like in zip(*map(jax.tree.leaves, (ours, born)), strict=True):
            assert x.sharding.is_equivalent_to(like.sharding, x.ndim)
    assert_same_bits(lean, there(alone))
    assert_same_bits(wide, back(there(alone)))


def test_scales_of_shards_smaller_than_a_block_are_where_init_puts_them():
    """On all devices, though XLA could cut four blocks in four."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    params = jax.device_put(jnp.ones((8, 1024)), NamedSharding(mesh, P(None, ("data", "model"))))
    scales = convert_moments(optax.adam(1e-2).init(params), "int8")[0].mu.scales
    assert scales.shape == (8, 4)
    assert scales.sharding.is_equivalent_to(adamite.adam(1e-2, moments="int8").init(params)[0].mu.scales.sharding, 2)


@pytest.mark.parametrize("moments", STORAGES)
def test_abstract_and_traced_states(moments):
    moments = STORAGES[moments]
    params, state = by_optax("adam", 3)
    abstract = jax.eval_shape(lambda s: convert_moments(s, moments), jax.eval_shape(optax.adam(1e-2).init, params))
    assert types(abstract) == types(jax.eval_shape(adamite.adam(1e-2, moments=moments).init, params))
    assert_same_bits(jax.jit(lambda s: convert_moments(s, moments))(state), convert_moments(state, moments))


class TestErrors:
    STATE = optax.adam(1e-2).init({"w": jnp.ones((64, 64)), "b": jnp.ones(3)})

    @pytest.mark.parametrize("moments", ["int7", "float8", ("int8", "int7"), lambda path, leaf: "int7"])
    def test_unknown_names(self, moments):
        with pytest.raises(ValueError, match="moments"):
            convert_moments(self.STATE, moments)

    @pytest.mark.parametrize("moments", [None, 8, ("int8", "int8", "int8")])
    def test_wrong_kinds(self, moments):
        with pytest.raises(TypeError, match="moments must be a name, a storage, a pair"):
            convert_moments(self.STATE, moments)

    @pytest.mark.parametrize(
        "state",
        [
            (),
            {"w": jnp.ones((64, 64))},
            optax.sgd(0.1).init(jnp.ones(3)),
            flax.serialization.to_state_dict(STATE),
            optax.contrib.scale_by_muon().init({"w": jnp.ones((64, 64))}),
        ],
    )
    def test_no_moments(self, state):
        with pytest.raises(ValueError, match="state must hold moments, the fields mu, m1"):
            convert_moments(state, "float32")

    def test_averages_over_blocks_stay_float32(self):
        params = {"kernel": jnp.ones((64, 64))}
        state = adamite.adam_mini(1e-2).init(params)
        assert_same_bits(convert_moments(state, "float32"), state)
        for moments in ("bfloat16", "int8", ("int8", "float32")):
            message = "nu['kernel'] has shape (1, 64) and mu['kernel'] (64, 64)"
            with pytest.raises(ValueError, match=re.escape(message)):
                convert_moments(state, moments)

    @pytest.mark.parametrize("make", [optax.sm3, optax.novograd])
    def test_other_layouts_are_refused(self, make):
        with pytest.raises(ValueError, match="are kept in float32 only"):
            convert_moments(make(1e-2).init({"w": jnp.ones((64, 64))}), "int8")

    def test_complex_moments(self):
        params = {"z": jnp.ones((64, 64), jnp.complex64)}
        state = adamite.adam(1e-2).init(params)
        for moments, message in (("int8", r"int8: params\['z'\]"), ("bfloat16", "bfloat16: use float32")):
            with pytest.raises(ValueError, match=message):
                convert_moments(state, moments)
        assert_same_bits(convert_moments(state, "float32"), state)


ROUNDINGS = ["stochastic", "residual8", "residual16"]
KEPT = [(moments, None) for moments in STORAGES] + [("int8", rounding) for rounding in ROUNDINGS]


def blank(moments, rounding, place=lambda params: params):
    """Weights and a state of every kind: moments, counts beside them and apart, residuals."""
    params = draw(0) if rounding is None else jax.tree.map(lambda p: p.astype(jnp.bfloat16), draw(0))
    params, kept = place(params), STORAGES[moments]
    tx = adamite.chain(adamite.scale_by_rms(moments=kept), adamite.adam(1e-2, moments=kept, rounding=rounding))
    return {"params": params, "state": tx.init(params)}


def filled(tree):
    """With random bytes, NaN and subnormal numbers among them."""
    rng = np.random.default_rng(0)

    def one(x):
        noise = np.frombuffer(rng.bytes(x.nbytes), np.dtype(x.dtype)).reshape(x.shape)
        return jax.device_put(noise, x.sharding)

    return jax.tree.map(one, tree)


@pytest.mark.parametrize(("moments", "rounding"), KEPT)
def test_msgpack_returns_every_byte(moments, rounding):
    target = blank(moments, rounding)
    tree = filled(target)
    assert_same_bits(flax.serialization.from_bytes(target, flax.serialization.to_bytes(tree)), tree)


def by_orbax(path, tree, target):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "state", target)


@pytest.mark.parametrize(("moments", "rounding"), KEPT)
def test_orbax_returns_every_byte_on_another_mesh_too(tmp_path, moments, rounding):
    """Saved from 4 x 2 devices, restored onto 2 x 4 with rows and columns exchanged."""
    tree = filled(blank(moments, rounding, lambda params: sharded("auto", "both", params)))
    mesh = jax.make_mesh((2, 4), ("model", "data"), axis_types=(AxisType.Auto,) * 2)
    there = {"w": NamedSharding(mesh, P("model", "data")), "small": NamedSharding(mesh, P())}
    born = blank(moments, rounding, lambda params: jax.device_put(params, there))
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), born)
    restored = by_orbax(tmp_path, tree, target)
    assert_same_bits(restored, tree)
    for x, like in zip(*map(jax.tree.leaves, (restored, born)), strict=True):
        assert x.sharding.is_equivalent_to(like.sharding, x.ndim)
    assert restored["params"]["w"].addressable_shards[0].data.shape == (8, 160)


def test_a_checkpoint_of_optax_is_read_converted_and_goes_on(tmp_path):
    params, state = by_optax("adam", 3)
    home = SingleDeviceSharding(jax.devices()[0])
    target = jax.eval_shape(optax.adam(1e-2).init, params)
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=home), target)
    restored = convert_moments(by_orbax(tmp_path, state, target), "int8")
    assert_same_bits(restored, convert_moments(state, "int8"))
    train(adamite.adam(1e-2, moments="int8"), 2, params, restored, first=4)


def test_a_function_sees_the_paths_of_init_in_models_of_nnx():
    model, seen = nnx.Linear(64, 256, rngs=nnx.Rngs(0)), []

    def kernels(path, leaf):
        seen.append(jax.tree_util.keystr(path))
        return "int8" if "kernel" in seen[-1] else "float32"

    tx = adamite.adam(1e-2, moments=kernels)
    born = tx.init(nnx.state(model, nnx.Param))
    at_init, seen[:] = sorted({*seen}), []
    state = nnx.Optimizer(model, adamite.adam(1e-2), wrt=nnx.Param).opt_state
    lean = convert_moments(state, kernels)
    assert sorted({*seen}) == at_init == ["['bias']", "['kernel']"]
    assert_same_bits(nnx.as_pure(lean)[0].mu.codes, nnx.as_pure(born)[0].mu.codes)


class TestStatesThatDiffer:
    """The first path that differs, and no structure that is cut off."""

    STATE = optax.adam(1e-2).init({"w": jnp.ones((64, 64))})

    def test_no_moments(self):
        text = r"of an optimizer's NamedTuples, got a dict of 2 leaves, the first at state\['a'\]\[0\]"
        with pytest.raises(ValueError, match=text):
            convert_moments({"b": jnp.ones(2), "a": [jnp.ones(3)]}, "int8")
        with pytest.raises(ValueError, match=r"NamedTuples, got a tuple of 0 leaves$"):
            convert_moments((), "int8")

    @pytest.mark.parametrize(
        ("like", "text"),
        [
            (optax.adamw(1e-2).init({"w": jnp.ones((64, 64))}), "like[2] has no counterpart in state"),
            (
                (optax.scale_by_lion().init({"w": jnp.ones((64, 64))}), optax.EmptyState()),
                "state must be a ScaleByLionState, got ScaleByAdamState",
            ),
            (
                optax.adam(1e-2).init({"v": jnp.ones((64, 64))}),
                "mu must have the structure of the parameters: mu['w'] has no counterpart in like's mu",
            ),
            ({"state": STATE}, "state and like differ in structure: state[0] has no counterpart in like"),
        ],
    )
    def test_another_state(self, like, text):
        with pytest.raises(ValueError, match=re.escape(text)):
            stored_as(self.STATE, like)
