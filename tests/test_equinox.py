"""Equinox: a model is its own parameters, and holds functions and whole numbers beside them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamite
from bits import assert_same_bits
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
