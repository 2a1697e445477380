"""The libraries that people train with, each used as its own documentation says."""

import chex
import equinox as eqx
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import adamite
from bits import assert_same_bits

pytestmark = pytest.mark.few(2)

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((64, 5)), jnp.float32)
Y = jnp.sin(X @ jnp.arange(5.0))[:, None]
STEPS = 12


def loss(params, x=X, y=Y):
    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    return jnp.mean((hidden @ params["w2"] - y) ** 2)


def fresh():
    rng = np.random.default_rng(1)
    return {
        "w1": jnp.asarray(rng.standard_normal((5, 7)) / 3, jnp.float32),
        "b1": jnp.zeros(7),
        "w2": jnp.asarray(rng.standard_normal((7, 1)) / 3, jnp.float32),
    }


def train(tx, params, steps=STEPS):
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=loss)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def no_bias(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


PIPELINES = {
    "chain": lambda adam: optax.chain(optax.clip_by_global_norm(0.1), adam(1e-2), optax.ema(0.9)),
    "masked": lambda adam: optax.masked(adam(1e-2), no_bias),
    "partition": lambda adam: optax.partition(
        {"adam": adam(1e-2), "sgd": optax.sgd(1e-2)}, {"w1": "adam", "b1": "sgd", "w2": "adam"}
    ),
    "MultiSteps": lambda adam: optax.MultiSteps(adam(1e-2), every_k_schedule=3),
    "inject_hyperparams": lambda adam: optax.inject_hyperparams(adam)(optax.linear_schedule(1e-2, 0.0, STEPS)),
    "inject b1": lambda adam: optax.inject_hyperparams(adam)(1e-2, b1=optax.linear_schedule(0.8, 0.95, STEPS)),
    "apply_if_finite": lambda adam: optax.apply_if_finite(adam(1e-2), max_consecutive_errors=3),
    "flatten": lambda adam: optax.flatten(adam(1e-2)),
    "schedule_free": lambda adam: optax.contrib.schedule_free(adam(1e-2, b1=0.0), learning_rate=1e-2),
    "conditionally": lambda adam: optax.conditionally_transform(adam(1e-2), lambda step: step % 2 == 0),
    "freeze": lambda adam: optax.chain(adam(1e-2), optax.transforms.freeze({"w1": False, "b1": True, "w2": False})),
    "plateau": lambda adam: optax.chain(adam(1e-2), optax.contrib.reduce_on_plateau(patience=2)),
}


@pytest.mark.parametrize("recipe", ["adamw", *(pytest.param(x, marks=pytest.mark.slow) for x in ("adam", "nadam"))])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_optax_wrappers_give_the_bits_of_optax(pipeline, recipe):
    build = PIPELINES[pipeline]
    ours, theirs = (train(build(getattr(library, recipe)), fresh()) for library in (adamite, optax))
    assert_same_bits(ours, theirs)


@pytest.mark.more
def test_lookahead():
    def run(library):
        tx = optax.lookahead(library.adam(1e-2), sync_period=3, slow_step_size=0.5)
        params = optax.LookaheadParams.init_synced(fresh())
        state = tx.init(params)
        update = jax.jit(tx.update)
        for _ in range(STEPS):
            updates, state = update(jax.grad(loss)(params.fast), state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    assert_same_bits(run(adamite), run(optax))


def test_injected_learning_rate_can_be_read_and_changed():
    tx = optax.inject_hyperparams(adamite.adamw)(1e-2)
    params = fresh()
    state = tx.init(params)
    assert state.hyperparams["learning_rate"] == np.float32(1e-2)
    grads = jax.grad(loss)(params)
    before, _ = jax.jit(tx.update)(grads, state, params)
    state.hyperparams["learning_rate"] = jnp.asarray(2e-2)
    after, _ = jax.jit(tx.update)(grads, state, params)
    chex.assert_trees_all_close(after, jax.tree.map(lambda u: 2 * u, before), rtol=1e-6)


def test_functions_among_injected_arguments():
    """Optax takes a function for a schedule, unless static_args names it."""
    by_rank = optax.inject_hyperparams(adamite.adamw, static_args=("moments",))
    tx = by_rank(1e-2, moments=lambda path, leaf: "int8" if leaf.size >= 4096 else "float32")
    state = tx.init({"w": jnp.ones((16, 256)), "b": jnp.ones(3)})
    assert state.inner_state[0].mu.codes["w"].dtype == jnp.int8
    params = fresh()
    injected, plain = (make(1e-2) for make in (optax.inject_hyperparams(adamite.adam_mini), adamite.adam_mini))
    ours, theirs = (jax.jit(tx.update)(params, tx.init(params), params)[0] for tx in (injected, plain))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32])
def test_rates_as_numpy_has_them(dtype):
    params = fresh()
    for rate in (np.array(1, dtype), dtype(1)):
        assert_same_bits(
            *(jax.jit(tx.update)(params, tx.init(params), params) for tx in (adamite.adam(rate), adamite.adam(1.0)))
        )


class TestFlaxNNX:
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(5, 7, rngs=rngs)
            self.dropout = nnx.Dropout(0.1, rngs=rngs)
            self.last = nnx.Linear(7, 1, rngs=rngs)

        def __call__(self, x):
            return self.last(self.dropout(nnx.relu(self.first(x))))

    def run(self, tx):
        model = self.Model(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            value, grads = nnx.value_and_grad(lambda m: jnp.mean((m(X) - Y) ** 2))(model)
            optimizer.update(model, grads)
            return value

        losses = [step(model, optimizer).item() for _ in range(STEPS)]
        return losses, nnx.to_pure_dict(nnx.state(model, nnx.Param)), jax.tree.leaves(nnx.state(optimizer))

    def test_optimizer(self):
        losses, params, state = self.run(adamite.adamw(1e-2))
        assert losses[-1] < losses[0]
        assert_same_bits((losses, params, state), self.run(optax.adamw(1e-2)))


class TestFlaxLinen:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(nn.relu(nn.Dense(7)(x)))

    def run(self, tx, steps=STEPS, state=None):
        if state is None:
            model = self.Model()
            state = TrainState.create(apply_fn=model.apply, params=model.init(jax.random.key(0), X)["params"], tx=tx)

        @jax.jit
        def step(state):
            grads = jax.grad(lambda p: jnp.mean((state.apply_fn({"params": p}, X) - Y) ** 2))(state.params)
            return state.apply_gradients(grads=grads)

        for _ in range(steps):
            state = step(state)
        return state

    def test_train_state(self):
        ours, theirs = self.run(adamite.adamw(1e-2)), self.run(optax.adamw(1e-2))
        assert_same_bits((ours.params, ours.opt_state), (theirs.params, theirs.opt_state))

    @pytest.mark.parametrize(("writer", "reader"), [(optax, adamite), (adamite, optax), (adamite, adamite)])
    def test_msgpack_both_ways(self, writer, reader):
        saved = self.run(writer.adamw(1e-2))
        blank = self.run(reader.adamw(1e-2), steps=0)
        restored = flax.serialization.from_bytes(blank, flax.serialization.to_bytes(saved))
        assert_same_bits((restored.params, restored.opt_state), (saved.params, saved.opt_state))
        resumed = self.run(None, state=restored)
        straight = self.run(writer.adamw(1e-2), steps=2 * STEPS)
        assert_same_bits((resumed.params, resumed.opt_state), (straight.params, straight.opt_state))


def test_equinox():
    def run(tx):
        model = eqx.nn.MLP(5, 1, 7, 1, key=jax.random.key(0))
        state = tx.init(eqx.filter(model, eqx.is_inexact_array))

        @eqx.filter_jit
        def step(model, state):
            grads = eqx.filter_grad(lambda m: jnp.mean((jax.vmap(m)(X) - Y) ** 2))(model)
            updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
            return eqx.apply_updates(model, updates), state

        for _ in range(STEPS):
            model, state = step(model, state)
        return jax.tree.leaves((eqx.filter(model, eqx.is_array), state))

    assert_same_bits(run(adamite.adamw(1e-2)), run(optax.adamw(1e-2)))


@pytest.mark.parametrize(("writer", "reader"), [(optax, adamite), (adamite, optax)])
def test_orbax_both_ways(tmp_path, writer, reader):
    params, state = train(writer.adam(optax.cosine_decay_schedule(1e-2, 100)), fresh())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"params": params, "state": state})
        checkpointer.wait_until_finished()
        tx = reader.adam(optax.cosine_decay_schedule(1e-2, 100))
        target = jax.eval_shape(lambda p: {"params": p, "state": tx.init(p)}, params)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), target)
        restored = checkpointer.restore(tmp_path / "state", target)
    assert_same_bits(restored, {"params": params, "state": state})


def test_dataclass_trees():
    @chex.dataclass
    class Layer:
        w: jax.Array
        b: jax.Array

    params = [Layer(w=jnp.ones((2, 3)), b=jnp.zeros(3)), Layer(w=jnp.ones((3, 1)), b=jnp.zeros(1))]
    ours, theirs = (jax.jit(tx.update)(params, tx.init(params)) for tx in (adamite.adam(1e-2), optax.adam(1e-2)))
    assert_same_bits(ours, theirs)
