"""Optimizers travel: to another process, and through jit as part of a tree."""

import pickle
import subprocess
import sys

import cloudpickle
import jax
import jax.numpy as jnp
import optax
import pytest

import adamite
from adamite import checkpoint, sharding
from adamite.identity import LOST
from bits import assert_same_bits
from specs import SPECS

PARAMS = {"w": jnp.ones((16, 256)), "b": jnp.ones(3)}

WRAPPERS = {
    "chain": lambda: adamite.chain(optax.clip_by_global_norm(1.0), adamite.adamw(1e-2)),
    "rounding": lambda: adamite.adamw(1e-2, moments="int8", rounding="residual8"),
    "schedule": lambda: adamite.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 10)),
    "cautious": lambda: adamite.chain(adamite.cautious(adamite.scale_by_adam()), adamite.scale_by_learning_rate(0.1)),
    "accumulate": lambda: adamite.accumulate(adamite.adamw(1e-2), 2),
    "skip_nonfinite": lambda: adamite.skip_nonfinite(adamite.adamw(1e-2)),
    "skip_spikes": lambda: adamite.skip_spikes(adamite.adamw(1e-2)),
    "with_telemetry": lambda: adamite.with_telemetry(adamite.adamw(1e-2)),
    "offload": lambda: sharding.offload(adamite.adamw(1e-2)),
    "mask": lambda: adamite.adamw(1e-2, mask=lambda tree: jax.tree.map(lambda p: p.ndim > 1, tree)),
    "moments by leaf": lambda: adamite.adamw(1e-2, moments=lambda path, leaf: "int8" if leaf.ndim > 1 else "float32"),
    "optax.partition": lambda: optax.partition(
        {"a": adamite.adam(1e-2), "b": adamite.lion(1e-3)}, {"w": "a", "b": "b"}
    ),
    "optax.MultiSteps": lambda: optax.MultiSteps(adamite.adam(1e-2), 2).gradient_transformation(),
}
BUILD = {spec.name: spec.build for spec in SPECS} | WRAPPERS


def stepped(tx):
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(2):
        updates, state = tx.update(PARAMS, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.few(6)
@pytest.mark.parametrize("name", BUILD)
def test_every_optimizer_is_pickled_by_value(name):
    """Before it has run, and after it has run and holds compiled steps."""
    tx = BUILD[name]()
    new = cloudpickle.loads(cloudpickle.dumps(tx))
    expected = stepped(tx)
    for one in (new, cloudpickle.loads(cloudpickle.dumps(tx))):
        assert type(one) is type(tx)
        assert adamite.identity(one)["name"] == adamite.identity(tx)["name"]
        assert_same_bits(stepped(one), expected)
        if isinstance(tx, adamite.Optimizer):
            assert_same_bits(*(jax.jit(each.step)(PARAMS, each.init(PARAMS), PARAMS) for each in (one, tx)))


@pytest.mark.more
def test_another_process_steps_it(tmp_path):
    (tmp_path / "tx").write_bytes(cloudpickle.dumps((adamite.adamw(1e-2, moments="int8"), jax.device_get(PARAMS))))
    program = (
        "import pickle, sys, jax, adamite\n"
        "tx, params = pickle.load(open(sys.argv[1], 'rb'))\n"
        "params, state = tx.step(params, tx.init(params), params)\n"
        "print(adamite.identity(tx)['moments'], float(params['w'][0, 0]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "tx"], capture_output=True, text=True, check=True)
    tx = adamite.adamw(1e-2, moments="int8")
    params, _ = tx.step(PARAMS, tx.init(PARAMS), PARAMS)
    assert done.stdout.split() == ["int8", str(float(params["w"][0, 0]))]


@pytest.mark.parametrize("name", ["rounding", "chain", "skip_nonfinite", "offload"])
def test_jit_takes_an_optimizer_as_an_argument(name):
    tx, traces = WRAPPERS[name](), []

    @jax.jit
    def step(tx, params, state):
        traces.append(1)
        assert adamite.identity(tx)["name"]
        params, state = tx.step(params, state, params)
        return tx, params, state

    out, params, state = tx, PARAMS, tx.init(PARAMS)
    for _ in range(3):
        out, params, state = step(out, params, state)
    assert out is tx
    assert len(traces) == 1
    assert jax.tree.leaves(tx) == []


def test_what_is_lost_is_told_and_not_saved(tmp_path):
    """Two optimizers without names would pass for one another."""
    tx = adamite.adamw(1e-3)
    rebuilt = optax.GradientTransformation(tx.init, tx.update)
    assert adamite.identity(rebuilt) == {"name": LOST}
    for lost in (rebuilt, adamite.skip_nonfinite(rebuilt), adamite.chain(optax.clip(1.0), rebuilt)):
        with pytest.raises(ValueError, match=r"^tx has lost its name and its arguments"):
            checkpoint.save(tmp_path, 0, PARAMS, lost)
        assert not list(tmp_path.iterdir())
    checkpoint.save(tmp_path, 0, PARAMS, tx)
    with pytest.raises(ValueError, match=r"^tx has lost its name and its arguments"):
        checkpoint.restore(tmp_path, PARAMS, rebuilt)


def test_optimizers_of_optax_are_known_by_the_function_that_built_them(tmp_path):
    assert adamite.identity(optax.clip_by_global_norm(1.0)) == {"name": "optax.clip_by_global_norm"}
    checkpoint.save(tmp_path, 0, PARAMS, optax.scale_by_adam())
    with pytest.raises(
        checkpoint.RefusedError, match=r'name: saved "optax\.scale_by_adam", now "optax\.scale_by_belief'
    ):
        checkpoint.restore(tmp_path, PARAMS, optax.scale_by_belief())
    checkpoint.restore(tmp_path, PARAMS, optax.scale_by_adam())


def test_plain_pickle_is_refused_by_python():
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(adamite.adam(1e-3))
