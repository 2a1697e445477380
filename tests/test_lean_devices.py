"""Lean state on many devices: sharded as the parameters, nothing gathered, and the bits of one device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P
from jax.sharding import AxisType, NamedSharding

import adamite
from adamite.engines import slices
from bits import assert_same_bits
from compilation import compiled

pytestmark = pytest.mark.few(1)

MESHES = {1: (1, 1), 2: (2, 1), 4: (2, 2), 8: (4, 2)}
SPECS = {
    "replicated": {"w": P(), "b": P()},
    "data": {"w": P("data", None), "b": P("data")},
    "tensor": {"w": P(None, "model"), "b": P("model")},
    "data and tensor": {"w": P("data", "model"), "b": P("model")},
    "one axis over all": {"w": P(("data", "model"), None), "b": P()},
}
SHAPES = {"w": (96, 2048), "b": (2048,), "small": (8,)}
OPTIMIZERS = {
    "int8, residual8": (lambda: adamite.adamw(1e-3, moments="int8", rounding="residual8"), jnp.bfloat16),
    "float8, stochastic": (
        lambda: adamite.adamw(1e-3, moments=("int8", "float8"), rounding="stochastic"),
        jnp.bfloat16,
    ),
    "bfloat16, residual16": (lambda: adamite.amsgrad(1e-3, moments="bfloat16", rounding="residual16"), jnp.bfloat16),
    "int8": (lambda: adamite.lion(1e-3, moments="int8"), jnp.float32),
}
COLLECTIVE = re.compile(r"\b(?:all-(?:gather|reduce|to-all)|reduce-scatter|collective-(?:permute|broadcast))\b")


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """So that "w" is stepped in 12 of them."""
    monkeypatch.setattr(slices, "SLICE", 2**14)


def values(seed, dtype):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}


def train(optimizer, place, jit_init=False):
    """Parameters and state after three steps, and the program of a step."""
    make, dtype = OPTIMIZERS[optimizer]
    tx, params = make(), place(values(0, dtype))
    state = (jax.jit(tx.init) if jit_init else tx.init)(params)
    gradients = [place(values(seed, dtype)) for seed in (1, 2, 3)]

    @jax.jit
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    before = compiled()
    for g in gradients:
        params, state = step(params, state, g)
    assert compiled() - before == 1
    return (params, state), step.lower(params, state, gradients[0]).compile().as_text()


@pytest.fixture(scope="module")
def alone():
    """The results of one device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "SLICE", 2**14)
        return {optimizer: train(optimizer, jax.device_put)[0] for optimizer in OPTIMIZERS}


def check(optimizer, alone, mesh, spec, *, jit_init=False):
    shardings = {name: NamedSharding(mesh, SPECS[spec].get(name, P())) for name in SHAPES}
    (params, state), program = train(optimizer, lambda tree: jax.device_put(tree, shardings), jit_init)
    assert_same_bits((params, state), alone[optimizer])
    assert COLLECTIVE.findall(program) == []
    for path, x in jax.tree_util.tree_leaves_with_path((params, state)):
        name = next((name for name in SHAPES if f"'{name}'" in jax.tree_util.keystr(path)), None)
        if name is None or x.shape == (1,) * x.ndim:
            continue
        # Codes, residuals and scales: each device has those of its own weights.
        assert x.sharding.is_equivalent_to(shardings[name], x.ndim), path


@pytest.mark.parametrize("devices", [pytest.param(n, marks=[pytest.mark.slow] if n < 8 else []) for n in MESHES])
@pytest.mark.parametrize("spec", SPECS)
def test_any_number_of_devices_gives_the_bits_of_one(devices, spec, alone):
    mesh = jax.make_mesh(MESHES[devices], ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    check("int8, residual8", alone, mesh, spec, jit_init=devices == 4)


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS][1:])
@pytest.mark.parametrize("spec", ["data", "data and tensor"])
def test_any_storage_and_rounding(optimizer, spec, alone):
    check(optimizer, alone, jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2), spec)


@pytest.mark.parametrize("spec", SPECS)
def test_explicit_meshes(spec, alone):
    check("int8, residual8", alone, jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2), spec)


@pytest.mark.more
def test_replicas_under_pmap_round_alike(alone):
    """Each replica takes the same random bits: they stay replicas."""
    make, dtype = OPTIMIZERS["int8, residual8"]
    tx, devices = make(), jax.devices()[:4]

    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    def copies(tree):
        return jax.tree.map(lambda x: jnp.stack([x] * len(devices)), tree)

    step = jax.pmap(step, devices=devices)
    params, state = copies(values(0, dtype)), copies(tx.init(values(0, dtype)))
    for seed in (1, 2, 3):
        params, state = step(params, state, copies(values(seed, dtype)))
    for i in range(len(devices)):
        assert_same_bits(jax.tree.map(lambda x, i=i: x[i], (params, state)), alone["int8, residual8"])
