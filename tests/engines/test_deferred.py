"""What is decided when a program is lowered: the platform it is for, and over how many devices arrays are spread."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import AxisType, NamedSharding

import adamite
from adamite.engines.deferred import Target, deferred
from adamite.sharding import placed
from bits import assert_same_bits

X = jnp.arange(64.0).reshape(8, 8)


class Told:
    """A function that notes what it was lowered for."""

    def __init__(self):
        self.targets, self.meshes = [], []

    def __call__(self, x):
        """``2 x``, deferred."""

        def double(target, x):
            self.targets.append(target)
            self.meshes.append(jax.sharding.get_abstract_mesh())
            return [2 * x]

        return deferred(double, [jax.typeof(x)], x)[0]


def mesh_of(*kinds):
    return jax.make_mesh((4, 2)[: len(kinds)], ("data", "model")[: len(kinds)], axis_types=kinds)


def test_it_is_traced_once_and_when_it_is_lowered():
    told = Told()
    step = jax.jit(told)
    traced = step.trace(X)
    jax.eval_shape(step, X)
    assert "adamite_deferred" in str(jax.make_jaxpr(told)(X))
    assert told.targets == []
    traced.lower()
    assert told.targets == [Target(1, 1)]
    for _ in range(3):
        assert_same_bits(step(X), 2 * X)
    assert told.targets == [Target(1, 1)]


def test_eager_arrays_do_not_wait():
    told = Told()
    assert_same_bits(told(X), 2 * X)
    assert told.targets == [Target()]


def test_where_the_platform_differs_it_is_not_traced():
    here, there = Told(), Told()
    step = jax.jit(lambda x: jax.lax.platform_dependent(x, cpu=here, tpu=there, default=there))
    assert_same_bits(step(X), 2 * X)
    assert (len(here.targets), len(there.targets)) == (1, 0)
    step.trace(X).lower(lowering_platforms=("tpu",))
    assert (len(here.targets), len(there.targets)) == (1, 1)


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


@pytest.mark.parametrize(
    ("kinds", "axes", "devices"),
    [
        ((AUTO, AUTO), None, 8),
        ((AUTO,), None, 4),
        ((EXPLICIT, EXPLICIT), None, 8),
        ((AUTO, AUTO), ("data", "model"), 1),
        ((EXPLICIT, EXPLICIT), ("data", "model"), 1),
        ((AUTO, AUTO), ("data",), 2),
        ((AUTO, AUTO), ("model",), 4),
    ],
)
def test_it_is_told_over_how_many_devices_the_partitioner_spreads_arrays(kinds, axes, devices):
    told, mesh = Told(), mesh_of(*kinds)
    spec = P(axes or "data")
    of_parts = told if axes is None else jax.shard_map(
        told, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=set(axes)
    )  # fmt: skip
    x = jax.device_put(X, NamedSharding(mesh, spec))
    assert_same_bits(jax.jit(of_parts)(x), 2 * X)
    assert told.targets == [Target(devices)]


@pytest.mark.parametrize("manual", [True, False])
def test_it_is_traced_on_the_mesh_on_which_it_was_called(manual):
    told, mesh = Told(), mesh_of(EXPLICIT, EXPLICIT)
    seen = []

    def step(x):
        seen.append(jax.sharding.get_abstract_mesh())
        return told(x)

    x = jax.device_put(X, NamedSharding(mesh, P("data")))
    if manual:
        traced = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P("data"), out_specs=P("data"))).trace(x)
    else:
        with jax.set_mesh(mesh):
            traced = jax.jit(step).trace(x)
    traced.lower()  # where no mesh is set
    assert told.meshes == seen
    assert seen[0].shape == mesh.shape


def test_it_is_told_of_several_platforms():
    told = Told()
    exported = jax.export.export(jax.jit(told), platforms=("cpu", "tpu"))(X)
    assert told.targets == [Target(1, 2)]
    assert_same_bits(exported.call(X), 2 * X)


def test_vmap():
    told = Told()
    for axis in (0, 1, -1):
        assert_same_bits(jax.jit(jax.vmap(told, axis, axis))(X), 2 * X)
        assert_same_bits(jax.vmap(told, axis, axis)(X), 2 * X)
    assert_same_bits(jax.jit(jax.vmap(jax.vmap(told)))(X), 2 * X)
    assert_same_bits(jax.jit(jax.vmap(lambda _: told(X[0]), out_axes=None))(X), 2 * X[0])


def test_inside_of_control_flow_and_checkpoints():
    told = Told()
    assert_same_bits(jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, x: told(x), x))(X), 8 * X)
    assert len(told.targets) == 1
    assert_same_bits(jax.jit(lambda x: jax.lax.cond(x[0, 1] > 0, told, lambda x: x, x))(X), 2 * X)
    assert_same_bits(jax.jit(jax.checkpoint(told))(X), 2 * X)
    assert_same_bits(jax.jit(lambda x: jax.jit(told)(x))(X), 2 * X)


# Steps.

TX = adamite.adamw(1e-2, weight_decay=0.1, moments="int8")
PARAMS = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((64, 512)), jnp.float32), "b": jnp.ones(3)}
STATE = TX.init(PARAMS)
KNOWN = [jax.export.DisabledSafetyCheck.custom_call(name) for name in ("adamite_step", "tpu_custom_call")]


@pytest.fixture(autouse=True)
def library():
    pytest.importorskip("adamite_native", reason="it takes a C++ compiler; .ci/run insists on it")


def calls(text):
    """Custom calls of the compiled kernels, and of the TPU's."""
    return text.count("@adamite_step("), text.count("@tpu_custom_call")


def lowered(function, platform, *of):
    return calls(jax.jit(lambda *of: function(*of)).trace(*of).lower(lowering_platforms=(platform,)).as_text())


@pytest.mark.parametrize("way", ["step", "update"])
def test_a_step_is_for_the_platform_that_it_is_lowered_for(way):
    step = getattr(TX, way)
    assert lowered(step, "cpu", PARAMS, STATE, PARAMS)[1] == 0
    assert lowered(step, "tpu", PARAMS, STATE, PARAMS) == (0, 1)
    assert lowered(step, "cuda", PARAMS, STATE, PARAMS) == (0, 0)


@pytest.mark.parametrize("way", ["step", "update"])
def test_on_several_chips_pallas_needs_to_know_the_shardings(way):
    for kind in (AUTO, EXPLICIT):
        mesh = mesh_of(kind)
        laid = jax.device_put(PARAMS, {"w": NamedSharding(mesh, P("data")), "b": NamedSharding(mesh, P())})
        told = placed(TX, laid)
        state = told.init(laid)
        assert lowered(getattr(TX, way), "tpu", laid, state, laid) == (0, int(kind == EXPLICIT))
        assert lowered(getattr(told, way), "tpu", laid, state, laid) == (0, 1)


def test_a_vector_is_xlas_where_the_chip_is_not_known():
    """Pallas asks which TPU it is for, and a host without one does not say."""
    tx, p = adamite.adamw(1e-2, moments="bfloat16"), [jnp.ones(768)]
    assert lowered(functools.partial(tx.step, engine="pallas"), "tpu", p, tx.init(p), p) == (0, 0)
    with jax.set_mesh(mesh_of(AUTO)):
        assert lowered(functools.partial(tx.step, engine="pallas"), "tpu", p, tx.init(p), p) == (0, 0)


@pytest.mark.parametrize("way", ["step", "update"])
def test_exports(way):
    """Of one platform with its kernels; of both with those for CPUs: Pallas is not lowered for two at once."""
    step = jax.jit(lambda *of: getattr(TX, way)(*of))
    wanted = step(PARAMS, STATE, PARAMS)
    for platforms, kernels in ((("cpu",), 1), (("cpu", "tpu"), 1), (("tpu",), 0)):
        exported = jax.export.export(step, platforms=platforms, disabled_checks=KNOWN)(PARAMS, STATE, PARAMS)
        text = exported.mlir_module()
        assert text.count('call_target_name = "adamite_step"') + calls(text)[0] == kernels, platforms
        if "cpu" in platforms:
            assert_same_bits(exported.call(PARAMS, STATE, PARAMS), wanted)


def test_derivatives_are_xlas():
    """A kernel has none. That of a step is the derivative of XLA's."""

    def moved(engine):
        return jax.jit(functools.partial(jax.jvp, lambda g: TX.update(g, STATE, PARAMS, engine=engine)[0]))

    ours, theirs = (moved(engine)((PARAMS,), (PARAMS,)) for engine in ("auto", "xla"))
    assert_same_bits(ours, theirs)
    assert any(np.any(np.asarray(x)) for x in jax.tree.leaves(ours[1]))
