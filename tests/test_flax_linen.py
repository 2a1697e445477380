"""The fused step in Flax Linen: the bits and the fields of Flax's own train state."""

import functools
import re
from typing import Any

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import adamite
from adamite import checkpoint, engines
from adamite.flax import TrainState
from bits import assert_same_bits, place
from compilation import compiled

X = jnp.asarray(np.random.default_rng(0).standard_normal((8, 64)), jnp.float32)
BOTH = TrainState, train_state.TrainState


class Model(nn.Module):
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        hidden = nn.relu(nn.Dense(64, param_dtype=self.dtype)(x))
        return nn.Dense(8, param_dtype=self.dtype)(hidden)


def exactly(cls):
    """What a step takes besides, to give Flax's bits."""
    return {"engine": "xla"} if issubclass(cls, TrainState) else {}


def new(cls, tx, dtype=jnp.float32, lay=lambda params: params):
    model = Model(dtype)
    params = lay(model.init(jax.random.key(0), X)["params"])
    return cls.create(apply_fn=model.apply, params=params, tx=tx)


def train(state, steps=3, **how):
    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        grads = jax.grad(lambda params: jnp.mean((state.apply_fn({"params": params}, X) - 1.0) ** 2))(state.params)
        with engines.asking("xla"):
            return state.apply_gradients(grads=grads, **(how or exactly(type(state))))

    before = compiled()
    for number in range(steps):
        state = step(state)
        assert compiled() - before <= 1, number
    return state


def assert_same_state(ours, theirs):
    assert (ours.step, ours.tx) == (theirs.step, theirs.tx)
    assert_same_bits((ours.params, ours.opt_state), (theirs.params, theirs.opt_state))


FORMATS = {
    "float32": (jnp.float32, {}),
    "int8": (jnp.float32, {"moments": "int8"}),
    "int8, residual8": (jnp.bfloat16, {"moments": "int8", "rounding": "residual8"}),
    "stochastic": (jnp.bfloat16, {"rounding": "stochastic"}),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("name", FORMATS)
def test_xla_gives_the_bits_of_flax(name):
    dtype, formats = FORMATS[name]
    tx = adamite.adamw(1e-2, **formats)
    start = new(TrainState, tx, dtype)
    ours, theirs = (train(new(cls, tx, dtype)) for cls in BOTH)
    assert_same_state(ours, theirs)
    assert isinstance(ours, train_state.TrainState)
    assert ours.step == 3
    assert not np.array_equal(ours.params["Dense_0"]["kernel"], start.params["Dense_0"]["kernel"])


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "tx", [optax.adamw(1e-2), adamite.accumulate(adamite.adamw(1e-2), 2)], ids=["optax", "accumulate"]
)
def test_any_transformation(tx):
    assert_same_state(*(train(new(cls, tx)) for cls in BOTH))


def test_an_engine_takes_the_step():
    tx, where = adamite.adamw(1e-2), jax.make_mesh((1,), ("here",), axis_types=(AxisType.Auto,))

    def chosen(**how):
        with jax.set_mesh(where), engines.recorded() as choices:
            state = train(new(TrainState, tx), steps=1, **how)
        return [choice.engine for choice in choices], state

    (by_kernel, ours), (none, plain) = chosen(engine="pallas"), chosen(engine="xla")
    assert (by_kernel, none) == (["pallas"] * 4, [])
    np.testing.assert_allclose(
        ours.params["Dense_0"]["kernel"], plain.params["Dense_0"]["kernel"], rtol=1e-6, atol=1e-7
    )
    assert chosen(extra_args={})[0] == chosen(engine="auto")[0]


def test_donation():
    state = train(new(TrainState, adamite.adamw(1e-2, moments="int8")), steps=1)
    step = jax.jit(lambda state: state.apply_gradients(grads=state.params), donate_argnums=0)
    given, memory = jax.tree.leaves(state), step.lower(state).compile().memory_analysis()
    assert memory.alias_size_in_bytes == memory.argument_size_in_bytes > 0
    places = [place(x) for x in given]
    after = step(state)
    assert all(x.is_deleted() for x in given)
    assert [place(x) for x in jax.tree.leaves(after)] == places


@pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_on_a_mesh(types):
    """Weights and moments stay where they are; the results are those of one device."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(types,) * 2)
    specs = {"kernel": P("data", "model"), "bias": P("model")}

    def laid(params):
        return {
            n: {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in p.items()} for n, p in params.items()
        }

    def run(lay):
        state = new(TrainState, adamite.adamw(1e-2), lay=lay)
        step = jax.jit(lambda state: state.apply_gradients(grads=state.params), donate_argnums=0)
        return step(step(state))

    alone = run(lambda params: params)
    with jax.set_mesh(mesh):
        state = run(laid)
    assert_same_bits(jax.device_get(state.params), jax.device_get(alone.params))
    for name, spec in specs.items():
        for tree in (state.params, state.opt_state[0].mu, state.opt_state[0].nu):
            x = tree["Dense_0"][name]
            assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim), (name, x.sharding)


def test_more_fields_and_arguments():
    class WithStats(TrainState):
        batch_stats: Any = None

    tx = adamite.skip_spikes(adamite.adamw(1e-2), loss=True)
    state = WithStats.create(apply_fn=None, params={"w": jnp.ones(3)}, tx=tx, batch_stats=0)
    after = state.apply_gradients(grads={"w": jnp.ones(3)}, batch_stats=1, extra_args={"loss": 1.0})
    assert (type(after), state.batch_stats, after.batch_stats, after.step) == (WithStats, 0, 1, 1)
    assert after.params["w"][0] < 1
    bad = after.apply_gradients(grads={"w": jnp.ones(3)}, extra_args={"loss": jnp.nan})
    assert_same_bits(bad.params, after.params)
    assert (bad.opt_state.skipped, bad.batch_stats) == (1, 1)


@pytest.mark.parametrize("frozen", [False, True])
def test_parameters_that_their_gradients_replace(frozen):
    """Scales of fp8: they have no moments."""
    params = {"params": {"w": jnp.ones((3, 4))}, OVERWRITE_WITH_GRADIENT: {"scale": jnp.ones(1)}}
    grads = {"params": {"w": jnp.full((3, 4), 2.0)}, OVERWRITE_WITH_GRADIENT: {"scale": jnp.full(1, 7.0)}}
    params, grads = (FrozenDict(params), FrozenDict(grads)) if frozen else (params, grads)
    ours, theirs = (
        cls.create(apply_fn=None, params=params, tx=adamite.adamw(1e-2)).apply_gradients(grads=grads, **exactly(cls))
        for cls in BOTH
    )
    assert_same_bits((ours.params, ours.opt_state), (theirs.params, theirs.opt_state))
    assert ours.params[OVERWRITE_WITH_GRADIENT]["scale"] == 7
    assert ours.params["params"]["w"][0, 0] < 1


def test_parameters_that_are_one_array():
    state = TrainState.create(apply_fn=None, params=jnp.ones(3), tx=adamite.adamw(1e-2))
    assert state.apply_gradients(grads=jnp.ones(3)).params.shape == (3,)


def test_a_parameter_without_a_gradient_stays():
    """Flax's train state fails there."""
    state = TrainState.create(apply_fn=None, params={"w": jnp.ones(3), "v": jnp.ones(3)}, tx=adamite.adamw(1e-2))
    after = state.apply_gradients(grads={"w": jnp.ones(3), "v": None})
    assert_same_bits(after.params["v"], state.params["v"])
    assert after.params["w"][0] < 1


@pytest.mark.parametrize(("writer", "reader"), [BOTH, BOTH[::-1]], ids=["ours first", "Flax's first"])
def test_checkpoints_go_both_ways(tmp_path, writer, reader):
    tx, dtype = adamite.adamw(1e-2, moments="int8", rounding="residual8"), jnp.bfloat16
    saved, wanted = train(new(writer, tx, dtype), steps=2), train(new(writer, tx, dtype))
    checkpoint.save(tmp_path, 2, saved, tx)
    blank = new(reader, tx, dtype)
    for restored in (
        checkpoint.restore(tmp_path, blank, tx).tree,
        flax.serialization.from_bytes(blank, flax.serialization.to_bytes(saved)),
    ):
        assert type(restored) is reader
        resumed = train(restored, steps=1)
        assert resumed.step == 3
        assert_same_bits((resumed.params, resumed.opt_state), (wanted.params, wanted.opt_state))


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ({"engine": "cuda"}, ValueError, "engine must be one of"),
        ({"grads": {"w": jnp.ones(3)}}, ValueError, "params['v'] has no counterpart in updates"),
        ({"grads": {"w": jnp.ones(3), "v": jnp.ones(2)}}, ValueError, "['v'] has shape (2,), but params['v'] has"),
        ({"loss": 1.0}, TypeError, "unexpected keyword argument 'loss'"),
    ],
)
def test_refused(how, error, says):
    state = TrainState.create(apply_fn=None, params={"w": jnp.ones(3), "v": jnp.ones(3)}, tx=adamite.adamw(1e-2))
    with pytest.raises(error, match=re.escape(says)):
        state.apply_gradients(**{"grads": state.params} | how)


def test_what_is_no_transformation_is_refused():
    with pytest.raises(TypeError, match=r"^tx must be a gradient transformation, got <function adamw"):
        TrainState.create(apply_fn=None, params={"w": jnp.ones(3)}, tx=adamite.adamw)
