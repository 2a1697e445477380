"""Equinox: a model is its own parameters, and holds functions and whole numbers beside them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import adamite
from adamite import checkpoint
from bits import assert_same_bits, place
from compilation import compiled
from specs import SPECS

X = jnp.asarray(np.random.default_rng(0).standard_normal((16, 8)), jnp.float32)

RECIPES = {spec.name: spec.build for spec in SPECS if spec.full}
AROUND = {
    "clip": lambda **how: adamite.chain(optax.clip_by_global_norm(0.1), adamite.adamw(1e-2, **how)),
    "cautious": lambda **how: adamite.chain(
        adamite.cautious(adamite.scale_by_adam()), adamite.scale_by_learning_rate(1e-2), **how
    ),
    "skip_nonfinite": lambda **how: adamite.skip_nonfinite(adamite.adamw(1e-2, **how)),
    "skip_spikes": lambda **how: adamite.skip_spikes(adamite.adamw(1e-2, **how)),
    "accumulate": lambda **how: adamite.accumulate(adamite.adamw(1e-2, **how), 2),
    "with_telemetry": lambda **how: adamite.with_telemetry(adamite.adamw(1e-2, **how)),
}


class Model(eqx.Module):
    mlp: eqx.nn.MLP
    dropout: eqx.nn.Dropout
    activation: object
    calls: jax.Array
    width: int

    def __init__(self, dtype=jnp.float32):
        self.mlp = eqx.nn.MLP(8, 4, 128, 2, key=jax.random.key(0), dtype=dtype)
        self.dropout, self.activation = eqx.nn.Dropout(0.1), jax.nn.gelu
        self.calls, self.width = jnp.zeros((), jnp.int32), 128

    def __call__(self, x):
        return self.mlp(self.activation(x))


def loss(model):
    return jnp.mean((jax.vmap(model)(X.astype(model.mlp.layers[0].weight.dtype)) - 1.0) ** 2)


def trained(tx, dtype, way, *, whole):
    """The parameters after three steps; `whole`: the optimizer is given the model, and not its arrays."""
    model = Model(dtype)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        grads = eqx.filter_grad(loss)(model)
        params, rest = (model, None) if whole else eqx.partition(model, eqx.is_inexact_array)
        if way == "step":
            params, state = tx.step(grads, state, params)
        else:
            updates, state = tx.update(grads, state, params)
            params = jax.tree.map(
                lambda u, p: p if u is None else optax.apply_updates(p, u), updates, params, is_leaf=lambda u: u is None
            )
        return (params if whole else eqx.combine(params, rest)), state

    for _ in range(3):
        model, state = step(model, state)
    assert model.activation is jax.nn.gelu
    assert (model.width, model.calls.dtype) == (128, jnp.int32)
    return eqx.filter(model, eqx.is_inexact_array), state


@pytest.mark.few(8)
@pytest.mark.parametrize("name", [*RECIPES, *AROUND])
@pytest.mark.parametrize("way", ["update", "step"])
@pytest.mark.parametrize("rounding", [None, "residual8"])
def test_whole_models_are_parameters(name, way, rounding):
    how = {} if rounding is None or name == "lion mode" else {"rounding": rounding}
    dtype = jnp.bfloat16 if rounding else jnp.float32
    tx = (RECIPES | AROUND)[name](**how)
    arrays, whole = (trained(tx, dtype, way, whole=whole) for whole in (False, True))
    assert_same_bits(arrays, whole)
    assert not np.array_equal(np.asarray(arrays[0].mlp.layers[0].weight), np.asarray(Model(dtype).mlp.layers[0].weight))


def test_donation_and_one_program():
    """Weights and moments are written in place, each array where it was; nothing else is copied but scalars."""
    tx, model = adamite.adamw(1e-2, moments="int8"), Model()
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit(donate="all")
    def step(model, state):
        return tx.step(eqx.filter_grad(loss)(model), state, model)

    before = compiled()
    memory = step.lower(model, state).compile().compiled.memory_analysis()
    assert memory.alias_size_in_bytes == memory.argument_size_in_bytes > 0
    for _ in range(3):
        given = [x for x in jax.tree.leaves((model, state)) if eqx.is_array(x)]
        places = [place(x) for x in given if x.ndim]
        model, state = step(model, state)
        assert all(x.is_deleted() for x in given)
        assert [place(x) for x in jax.tree.leaves((model, state)) if eqx.is_array(x) and x.ndim] == places
    assert compiled() - before == 1
    assert (model.calls, model.activation, state[0].count) == (0, jax.nn.gelu, 3)


@pytest.mark.few(1)
@pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_on_a_mesh(types):
    """Weights and moments stay where they are; the results are those of one device."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(types,) * 2)
    tx, start = adamite.adamw(1e-2), Model()
    over = NamedSharding(mesh, P("model")), NamedSharding(mesh, P("model", "data"))

    def laid(x):
        return jax.device_put(x, over[x.ndim - 1]) if eqx.is_inexact_array(x) else x

    @eqx.filter_jit(donate="all")
    def step(grads, state, model):
        return tx.step(grads, state, model, engine="xla")

    def run(lay):
        model = jax.tree.map(lambda x: lay(jnp.array(x)) if eqx.is_array(x) else x, start)
        state = tx.init(eqx.filter(model, eqx.is_inexact_array))
        for _ in range(2):
            grads = jax.tree.map(jnp.sin, eqx.filter(model, eqx.is_inexact_array))
            model, state = step(grads, state, model)
        return model, state

    with jax.set_mesh(mesh):
        model, state = run(laid)
    alone, _ = run(lambda x: x)
    assert_same_bits(*(jax.device_get(eqx.filter(m, eqx.is_array)) for m in (model, alone)))
    for tree in (model, state[0].mu, state[0].nu):
        for x in (tree.mlp.layers[0].weight, tree.mlp.layers[0].bias):
            assert x.sharding.is_equivalent_to(over[x.ndim - 1], x.ndim), x.sharding


def test_a_checkpoint_goes_on(tmp_path):
    """The arrays of a model are saved; the rest comes from the model that is there."""
    tx = adamite.adamw(1e-2, moments="int8", rounding="residual8")

    @eqx.filter_jit
    def step(model, state):
        return tx.step(eqx.filter_grad(loss)(model), state, model)

    def new():
        model = Model(jnp.bfloat16)
        return model, tx.init(eqx.filter(model, eqx.is_inexact_array))

    model, state = step(*new())
    arrays, _ = eqx.partition(model, eqx.is_array)
    checkpoint.save(tmp_path, 1, (arrays, state), tx)
    blank, blank_state = new()
    like, functions = eqx.partition(blank, eqx.is_array)
    arrays, restored = checkpoint.restore(tmp_path, (like, blank_state), tx).tree
    resumed, straight = step(eqx.combine(arrays, functions), restored), step(model, state)
    assert resumed[0].activation is jax.nn.gelu
    assert_same_bits(*((eqx.filter(m, eqx.is_array), s) for m, s in (resumed, straight)))


def test_weights_that_equinox_widened_are_refused():
    """`eqx.apply_updates` adds a float32 update to a bfloat16 weight, and the weight becomes float32."""
    tx, model = adamite.adamw(1e-2, rounding="residual8"), eqx.filter(Model(jnp.bfloat16), eqx.is_inexact_array)
    state = tx.init(model)
    updates, state = tx.update(model, state, model)
    widened = eqx.apply_updates(model, updates)
    assert widened.mlp.layers[0].weight.dtype == jnp.float32
    with pytest.raises(ValueError, match=r"^params\.mlp\.layers\[0\]\.weight is float32.*tx\.step or optax\.apply_upd"):
        tx.update(model, state, widened)
    with pytest.raises(ValueError, match=r"^params\.mlp\.layers\[0\]\.weight is float32"):
        adamite.full_weights(widened, state)
    right = optax.apply_updates(model, updates)
    tx.update(model, state, right)


@pytest.mark.parametrize("tx", [adamite.adamw(1e-3, moments="int8"), adamite.skip_nonfinite(adamite.lion(1e-3))])
def test_an_optimizer_inside_of_a_pytree_stays_whole(tx):
    class Trainer(eqx.Module):
        model: jax.Array
        tx: adamite.Optimizer
        state: optax.OptState

    @eqx.filter_jit
    def step(trainer):
        params, state = trainer.tx.step(trainer.model, trainer.state, trainer.model)
        return eqx.tree_at(lambda t: (t.model, t.state), trainer, (params, state))

    params = jnp.ones((64, 256))
    trainer = step(step(Trainer(params, tx, tx.init(params))))
    assert trainer.tx is tx
    assert adamite.identity(trainer.tx) == adamite.identity(tx)
