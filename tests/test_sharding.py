"""State spread over an axis of the mesh: a part on each device, and the numbers of one device."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P
from jax.sharding import AxisType, NamedSharding
from jax.tree_util import keystr, tree_leaves_with_path

import adamite
from adamite import engines
from adamite.sharding import offload, state_shardings, zero1
from bits import assert_same_bits
from compilation import compiled

pytestmark = pytest.mark.few(1)

TYPES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
SHAPES = {"w": (64, 512), "v": (2, 512), "b": (512,), "odd": (3, 5), "scalar": ()}
SPECS = {
    "replicated": {},
    "tensor": {"w": P(None, "model"), "v": P(None, "model"), "b": P("model")},
    "rows": {"w": P("model"), "v": P("model", None)},
}
# Where the axis "data", of four devices, goes.
SPREAD = {
    "replicated": {"w": P("data"), "v": P(None, "data"), "b": P("data")},
    "tensor": {"w": P("data", "model"), "v": P(None, ("model", "data")), "b": P(("model", "data"))},
    "rows": {"w": P("model", "data"), "v": P("model", "data"), "b": P("data")},
}
OPTIMIZERS = {
    "adamw": (jnp.float32, lambda: adamite.adamw(1e-2)),
    "optax": (jnp.float32, lambda: optax.adamw(1e-2)),
    "int8, residual8": (jnp.bfloat16, lambda: adamite.adamw(1e-3, moments="int8", rounding="residual8")),
    "bfloat16, residual16": (jnp.bfloat16, lambda: adamite.amsgrad(1e-3, moments="bfloat16", rounding="residual16")),
    "float8, stochastic": (
        jnp.bfloat16,
        lambda: adamite.adamw(1e-3, moments=("int8", "float8"), rounding="stochastic"),
    ),
}


def mesh_of(types):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(TYPES[types],) * 2)


def values(seed, dtype):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}


def shardings_of(mesh, specs):
    return {name: NamedSharding(mesh, specs.get(name, P())) for name in SHAPES}


def train(tx, place, dtype, init=None):
    """Parameters and state after three steps. A program of its own adds the updates, so that no product is fused."""
    params = place(values(0, dtype))
    state = (init or tx.init)(params)
    gradients = [place(values(seed, dtype)) for seed in (1, 2, 3)]

    @jax.jit
    def update(*args):
        with engines.asking("xla"):  # which takes leaves whose blocks are cut
            return tx.update(*args)

    apply = jax.jit(lambda p, u: optax.apply_updates(p, u))
    for number, g in enumerate(gradients):
        before = compiled()
        updates, state = update(g, state, params)
        params = apply(params, updates)
        assert compiled() - before == 2 * (number == 0)
    return params, state


def assert_sharded(tree, expected):
    for (path, x), sharding in zip(tree_leaves_with_path(tree), jax.tree.leaves(expected), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim), (path, x.sharding, sharding)


# All storages on one mesh, all meshes for two of them.
CASES = [
    *((types, spec, "adamw") for types in TYPES for spec in SPECS),
    ("auto", "tensor", "optax"),
    ("explicit", "rows", "int8, residual8"),
    *(
        pytest.param(types, spec, optimizer, marks=pytest.mark.slow)
        for types, spec, optimizer in [
            *(
                (types, spec, "int8, residual8")
                for types in TYPES
                for spec in SPECS
                if (types, spec) != ("explicit", "rows")
            ),
            ("auto", "tensor", "bfloat16, residual16"),
            ("auto", "tensor", "float8, stochastic"),
        ]
    ),
]


@pytest.mark.parametrize(("types", "spec", "optimizer"), CASES)
def test_zero1_keeps_its_part_and_gives_the_bits_of_one_device(types, spec, optimizer):
    dtype, make = OPTIMIZERS[optimizer]
    mesh, tx = mesh_of(types), make()
    own = shardings_of(mesh, SPECS[spec])
    spread = zero1(tx, mesh, param_shardings=own if types == "auto" else None)
    params, state = train(spread, lambda tree: jax.device_put(tree, own), dtype)
    assert_same_bits((params, state), train(tx, jax.device_put, dtype))
    assert_sharded(params, own)
    over = shardings_of(mesh, SPREAD[spec])
    assert_sharded(state, state_shardings(tx, params, over))
    assert_sharded(state, state_shardings(spread, params))


@pytest.mark.parametrize("types", TYPES)
def test_init_and_update_under_jit_and_eagerly_agree(types):
    mesh = mesh_of(types)
    tx = zero1(adamite.adamw(1e-2), mesh)
    params = jax.device_put(values(0, jnp.float32), NamedSharding(mesh, P()))
    at = state_shardings(tx, params)
    states = [tx.init(params), jax.jit(tx.init)(params), jax.jit(tx.init, out_shardings=at)(params)]
    if types == "explicit":
        with jax.set_mesh(mesh):
            states.append(jax.jit(tx.init)(params))
    for state in states:
        assert_sharded(state, at)
        assert_same_bits(state, states[0])
    for update in (tx.update, jax.jit(tx.update)):
        updates, state = update(params, states[0], params)
        assert_sharded(state, at)
        assert_sharded(updates, jax.tree.map(lambda p: p.sharding, params))


def test_norms_are_over_all_devices():
    """Of the leaf for LAMB, of all leaves for the clip: both see more than their part."""
    mesh = mesh_of("auto")
    tx = optax.chain(optax.clip_by_global_norm(1.0), adamite.lamb(1e-2, weight_decay=0.1))
    place = lambda tree: jax.device_put(tree, NamedSharding(mesh, P()))  # noqa: E731 (one line, used once below)
    together = train(zero1(tx, mesh), place, jnp.float32)
    alone = train(tx, jax.device_put, jnp.float32)
    for one, other in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * np.abs(other).max())


def test_a_device_keeps_its_part_of_the_state_only():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params = jax.device_put({"w": jnp.ones((512, 256)), "b": jnp.ones(3)}, NamedSharding(mesh, P()))
    whole = 2 * 4 * 512 * 256
    for tx, share in ((adamite.adamw(1e-3), whole), (zero1(adamite.adamw(1e-3), mesh), whole // 8)):
        state = tx.init(params)
        kept = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
        assert kept == share + 2 * 4 * 3 + 4
        report = adamite.memory_report(tx, params)
        assert report.per_device.state == kept
        program = jax.jit(tx.update, donate_argnums=(0, 1)).lower(params, state, params).compile()
        arguments = program.memory_analysis().argument_size_in_bytes
        assert arguments == pytest.approx(kept + 2 * 4 * (512 * 256 + 3), rel=1e-3)


def test_twenty_steps_of_training_leave_replicas_equal_and_the_state_spread():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, P())
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 16)).astype(np.float32)
    y = x @ rng.standard_normal((16, 8)).astype(np.float32)

    def loss(params, x, y):
        return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)

    def run(tx, batch, params):
        @jax.jit
        def step(params, state, batch):
            value, g = jax.value_and_grad(loss)(params, *batch)
            updates, state = tx.update(g, state, params)
            return optax.apply_updates(params, updates), state, value

        state = tx.init(params)
        before = compiled()
        losses = []
        for _ in range(20):
            params, state, value = step(params, state, batch)
            losses.append(value)
        assert compiled() - before == 1
        return params, state, jnp.stack([jax.device_get(v) for v in losses])

    start = {"w": jnp.zeros((16, 8)), "b": jnp.zeros(8)}
    alone = run(adamite.adamw(1e-1), (x, y), start)
    tx = zero1(adamite.adamw(1e-1), mesh)
    batch = jax.device_put((x, y), NamedSharding(mesh, P("data")))
    together = run(tx, batch, jax.device_put(start, everywhere))
    # Devices add their gradients up in another order, and Adam magnifies what is left of a gradient near 0.
    chex.assert_trees_all_close(together[0], alone[0], rtol=0, atol=1e-3)  # a hundredth of a step
    chex.assert_trees_all_close(together[2], alone[2], rtol=1e-3)
    assert together[2][-1] < 0.5 * together[2][0]
    for leaf in jax.tree.leaves(together[0]):
        assert leaf.sharding.is_equivalent_to(everywhere, leaf.ndim)
        first, *others = (np.asarray(shard.data) for shard in leaf.addressable_shards)
        assert all((first == other).all() for other in others)
    assert together[1][0].nu["w"].addressable_shards[0].data.shape == (2, 8)


def test_what_is_left_out_stays_out():
    """Gradients of None, masked leaves, update without params."""
    mesh = mesh_of("auto")
    params = jax.device_put(values(0, jnp.float32), NamedSharding(mesh, P()))
    tx = zero1(adamite.adam(1e-2), mesh)
    state = tx.init(params)
    updates, after = jax.jit(tx.update)({**params, "v": None}, state)
    assert updates["v"] is None
    assert_same_bits(after[0].mu["v"], state[0].mu["v"])
    assert_sharded(after, state_shardings(tx, params))
    only_w = zero1(optax.masked(adamite.adam(1e-2), {name: name == "w" for name in SHAPES}), mesh)
    state = only_w.init(params)
    assert len(jax.tree.leaves(state)) == 3
    assert_sharded(state, state_shardings(only_w, params))
    around = optax.masked(tx, {name: name == "w" for name in SHAPES})
    updates, after = jax.jit(around.update)(params, around.init(params), params)
    assert_same_bits(updates["b"], params["b"])
    assert_sharded(after.inner_state[0].mu["w"], NamedSharding(mesh, P("data")))


@pytest.mark.more
@pytest.mark.parametrize("spread", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("types", TYPES)
def test_offloaded_state_is_the_hosts_between_steps_and_gives_the_same_bits(types, spread):
    mesh = mesh_of(types)
    tx = adamite.adamw(1e-3, moments="int8", rounding="residual8")
    tx = zero1(tx, mesh) if spread else tx
    place = lambda tree: jax.device_put(tree, NamedSharding(mesh, P()))  # noqa: E731 (one line, used twice below)
    params, state = train(offload(tx), place, jnp.bfloat16)
    kinds = {keystr(path): x.sharding.memory_kind for path, x in tree_leaves_with_path(state)}
    assert {kind for path, kind in kinds.items() if "count" not in path} == {"pinned_host"}
    assert {kind for path, kind in kinds.items() if "count" in path} == {"device"}
    at = state_shardings(offload(tx), params)
    assert jax.tree.map(lambda x: x.sharding.memory_kind, state) == jax.tree.map(lambda s: s.memory_kind, at)
    assert_sharded(state, at)
    assert_same_bits((params, state), train(tx, place, jnp.bfloat16))


def test_offload_on_one_device():
    tx = adamite.adamw(1e-2)
    place = lambda tree: jax.device_put(tree, jax.devices()[0])  # noqa: E731 (one line, used once below)
    at_once, offloaded = (train(tx, place, jnp.float32) for tx in (tx, offload(tx)))
    assert_same_bits(at_once, offloaded)
    assert offloaded[1][0].nu["scalar"].sharding.memory_kind == "pinned_host"
    with pytest.raises(TypeError, match=r"^tx must be a gradient transformation, got 3 of type int"):
        offload(3)


class TestRefused:
    MESH = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    TX = adamite.adam(1e-2)

    @pytest.mark.parametrize(
        ("arguments", "error", "says"),
        [
            (("adam", MESH), TypeError, "tx must be a gradient transformation, got 'adam' of type str"),
            ((TX, "mesh"), TypeError, "mesh must be a jax.sharding.Mesh, got 'mesh' of type str"),
            ((TX, MESH, "dp"), ValueError, "axis must be one of 'data', 'model', or several, each once, got 'dp'"),
            ((TX, MESH, ()), ValueError, "axis must be one of 'data', 'model', or several, each once, got ()"),
            (
                (TX, MESH, ("data", "data")),
                ValueError,
                "axis must be one of 'data', 'model', or several, each once, got ('data', 'data')",
            ),
            ((TX, MESH, None), ValueError, "axis must be one of 'data', 'model', or several, each once, got None"),
        ],
    )
    def test_when_built(self, arguments, error, says):
        with pytest.raises(error, match=f"^{re.escape(says)}"):
            zero1(*arguments)

    def test_a_mesh_of_both_types(self):
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Explicit))
        with pytest.raises(ValueError, match=r"^mesh must have axes of one type"):
            zero1(self.TX, mesh)

    def test_parameters_that_are_not_on_the_mesh(self):
        tx = zero1(self.TX, self.MESH)
        other = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        for params, where in (
            ({"w": jnp.ones(8)}, "no mesh"),
            ({"w": 1.0}, "no mesh"),
            ({"w": jax.device_put(jnp.ones(8), NamedSharding(other, P()))}, "the mesh {'data': 8}"),
        ):
            says = f"params['w'] is on {where}, and not on that of zero1, {{'data': 4, 'model': 2}}: put it there"
            with pytest.raises(ValueError, match=f"^{re.escape(says)}"):
                tx.init(params)

    def test_parameters_whose_shardings_jit_does_not_show(self):
        params = {"w": jax.device_put(jnp.ones((8, 8)), NamedSharding(self.MESH, P(None, "model")))}
        says = "params['w'] is sharded as P(None, 'model') over Auto axes, which jit does not show"
        with pytest.raises(ValueError, match=f"^{re.escape(says)}"):
            zero1(self.TX, self.MESH).init(params)

    def test_shardings_of_other_parameters(self):
        params = jax.device_put({"w": jnp.ones((8, 8))}, NamedSharding(self.MESH, P()))
        tx = zero1(self.TX, self.MESH, param_shardings={"v": NamedSharding(self.MESH, P())})
        with pytest.raises(ValueError, match=r"^param_shardings must have the structure of params or a prefix of it"):
            tx.init(params)
        tx = zero1(self.TX, self.MESH, param_shardings=NamedSharding(self.MESH, P(None, None, "model")))
        with pytest.raises(ValueError, match=r"^param_shardings must divide params\['w'\] of shape \(8, 8\)"):
            tx.init(params)

    def test_inside_of_shard_map(self):
        tx = zero1(self.TX, self.MESH)
        inside = jax.shard_map(tx.init, mesh=self.MESH, in_specs=P("data"), out_specs=P())
        with pytest.raises(ValueError, match="is one device's own, inside of shard_map or pmap: zero1 is for jit"):
            jax.jit(inside)(jnp.ones(8))

    def test_a_parameter_without_a_sharding(self):
        says = r"^params\['w'\] is not sharded over a mesh: state_shardings needs param_shardings"
        with pytest.raises(TypeError, match=says):
            state_shardings(self.TX, {"w": jax.ShapeDtypeStruct((8,), jnp.float32)})


def test_one_device_changes_nothing():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    place = lambda tree: jax.device_put(tree, NamedSharding(mesh, P()))  # noqa: E731 (one line, used once below)
    assert_same_bits(
        train(zero1(adamite.adam(1e-2), mesh), place, jnp.float32),
        train(adamite.adam(1e-2), jax.device_put, jnp.float32),
    )


def test_axes_that_shard_a_parameter_already_are_left_alone():
    mesh = mesh_of("explicit")
    params = jax.device_put({"w": jnp.ones((8, 8))}, NamedSharding(mesh, P("data")))
    state = zero1(adamite.adam(1e-2), mesh).init(params)
    assert_sharded(state[0].mu["w"], NamedSharding(mesh, P("data")))
    over = zero1(adamite.adam(1e-2), mesh, ("data", "model")).init(jax.device_put(params, NamedSharding(mesh, P())))
    assert_sharded(over[0].mu["w"], NamedSharding(mesh, P(("data", "model"))))


WRAPPERS = {
    "zero1": lambda tx, mesh: zero1(tx, mesh),
    "offload": lambda tx, _: offload(tx),
    "both": lambda tx, mesh: offload(zero1(tx, mesh)),
}


class TestAbsentParameters:
    """None stands for a parameter that is not trained, as Equinox's filters leave it."""

    @pytest.mark.parametrize("wrapper", WRAPPERS)
    @pytest.mark.parametrize("moments", ["float32", "int8"])
    def test_the_bits_are_those_of_one_device(self, wrapper, moments):
        mesh, tx = mesh_of("auto"), adamite.adamw(1e-2, moments=moments)
        params = {"w": jnp.ones((64, 512)), "f": None}
        there = jax.device_put(params, NamedSharding(mesh, P()))
        wrapped = WRAPPERS[wrapper](tx, mesh)
        updates, state = jax.jit(wrapped.update)(there, wrapped.init(there), there)
        assert_same_bits((updates, state), jax.jit(tx.update)(params, tx.init(params), params))
        moment = jax.tree.leaves(state[0].mu)[0]
        assert moment.sharding.memory_kind == ("pinned_host" if wrapper != "zero1" else "device")
        assert moment.addressable_shards[0].data.size == moment.size // (4 if wrapper != "offload" else 1)

    def test_equinox(self):
        import equinox as eqx

        mesh = mesh_of("auto")
        model = eqx.filter(eqx.nn.MLP(8, 8, 64, 2, key=jax.random.key(0)), eqx.is_array)
        model = jax.device_put(model, NamedSharding(mesh, P()))
        tx = zero1(adamite.adamw(1e-2), mesh)
        _, state = jax.jit(tx.update)(model, tx.init(model), model)
        assert state[0].mu.layers[0].weight.addressable_shards[0].data.shape == (16, 8)


class TestFlaxNNX:
    def train(self, wrap, place):
        from flax import nnx

        model = nnx.Linear(64, 128, rngs=nnx.Rngs(0))
        nnx.update(model, place(nnx.to_pure_dict(nnx.state(model, nnx.Param))))
        own = jax.tree.map(lambda p: p.sharding, nnx.state(model, nnx.Param))
        optimizer = nnx.Optimizer(model, wrap(adamite.adamw(1e-2), own), wrt=nnx.Param)
        bytes_at_first = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(nnx.state(optimizer)))

        @nnx.jit
        def step(model, optimizer, x):
            optimizer.update(model, nnx.grad(lambda m: jnp.mean(m(x) ** 2))(model))

        for seed in range(3):
            step(model, optimizer, jax.random.normal(jax.random.key(seed), (8, 64)))
        return bytes_at_first, model, optimizer

    @pytest.mark.parametrize("cut", [False, True])
    def test_one_line_spreads_the_state_and_changes_no_weight(self, cut):
        from flax import nnx

        mesh = mesh_of("auto")
        specs = {"kernel": P(None, "model"), "bias": P("model")} if cut else {"kernel": P(), "bias": P()}

        def place(tree):
            return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)

        before, plain, _ = self.train(lambda tx, _: tx, place)
        after, spread, optimizer = self.train(lambda tx, own: zero1(tx, mesh, param_shardings=own), place)
        assert after - 8 == (before - 8) // 4  # two counts stay
        chex.assert_trees_all_close(nnx.state(plain), nnx.state(spread), rtol=0, atol=1e-4)  # a hundredth of a step
        assert spread.kernel[...].sharding.is_equivalent_to(NamedSharding(mesh, specs["kernel"]), 2)
        moment = nnx.state(optimizer)["opt_state"][0]["mu"]["kernel"]
        assert jax.tree.leaves(moment)[0].sharding.spec[0] == "data"

    @pytest.mark.parametrize("spread", [False, True])
    def test_sharding_metadata_is_carried(self, spread):
        """Flax lays a new optimizer's state by its variables' metadata; a step spreads it over the axis of ZeRO-1."""
        from flax import nnx

        mesh = mesh_of("explicit")
        with jax.set_mesh(mesh):
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
            model = nnx.Linear(64, 128, use_bias=False, kernel_init=init, rngs=nnx.Rngs(0))
            tx = zero1(adamite.adamw(1e-2), mesh) if spread else adamite.adamw(1e-2)
            optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
            step = nnx.jit(lambda model, optimizer: optimizer.update(model, nnx.state(model, nnx.Param)))
            for specs in ((P(None, "model"),), (P("data", "model"),) if spread else (P(None, "model"),)):
                moment = nnx.state(optimizer)["opt_state"][0]["mu"]["kernel"]
                assert jax.tree.leaves(moment)[0].sharding.spec in specs
                assert moment.get_metadata()["out_sharding"] == (None, "model")
                step(model, optimizer)
            assert model.kernel[...].sharding.spec == P(None, "model")


@pytest.mark.parametrize(
    "tx",
    [optax.adafactor(1e-2, min_dim_size_to_factor=32), optax.novograd(1e-2), optax.adamw(1e-2)],
    ids=["adafactor", "novograd", "adamw"],
)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_states_of_other_shapes_stay_where_they_were_born(tx, wrapper):
    mesh = mesh_of("auto")
    params = jax.device_put({"w": jnp.ones((64, 512)), "b": jnp.ones(512)}, NamedSharding(mesh, P()))
    wrapped = WRAPPERS[wrapper](tx, mesh)
    state, update = wrapped.init(params), jax.jit(wrapped.update)
    born = jax.tree.map(lambda x: x.sharding, state)
    for number in range(3):
        before = compiled()
        _, state = update(params, state, params)
        assert compiled() - before == (number == 0)
    assert_sharded(state, born)


def test_several_axes_of_which_a_parameter_has_one():
    mesh = mesh_of("auto")
    own = shardings_of(mesh, {"w": P(None, "model")})
    tx = zero1(adamite.adam(1e-2), mesh, ("data", "model"), param_shardings=own)
    state = tx.init(jax.device_put(values(0, jnp.float32), own))
    assert state[0].mu["w"].sharding.spec == P("data", "model")
    assert state[0].mu["b"].sharding.spec == P(("data", "model"))


def test_a_state_of_another_mesh_is_laid_anew():
    mesh, flat = mesh_of("auto"), jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params = values(0, jnp.float32)
    there, then = (jax.device_put(params, NamedSharding(m, P())) for m in (flat, mesh))
    state = zero1(adamite.adam(1e-2), flat).init(there)
    tx = zero1(adamite.adam(1e-2), mesh)
    _, state = jax.jit(tx.update)(then, state, then)
    assert_same_bits(state, jax.jit(adamite.adam(1e-2).update)(params, adamite.adam(1e-2).init(params), params)[1])
    assert state[0].mu["w"].sharding.is_equivalent_to(NamedSharding(mesh, P("data")), 2)


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("optimizer", ["adamw", "int8, residual8"])
def test_donated_buffers_are_used(types, optimizer):
    dtype, make = OPTIMIZERS[optimizer]
    mesh = mesh_of(types)
    tx, params = zero1(make(), mesh), jax.device_put(values(0, dtype), NamedSharding(mesh, P()))

    def step(g, state, params):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    state, g = tx.init(params), jax.device_put(values(1, dtype), NamedSharding(mesh, P()))
    given = jax.tree.leaves(state)
    _, state = jax.jit(step, donate_argnums=1)(g, state, params)
    assert all(x.is_deleted() for x in given)
    jax.block_until_ready(state)


class TestRefusedLayouts:
    def on(self, mesh, spec=None):
        return jax.device_put(values(0, jnp.float32), shardings_of(mesh, {"w": spec} if spec else {}))

    def test_devices_in_another_order(self):
        mesh = mesh_of("auto")
        other = jax.sharding.Mesh(mesh.devices[::-1], mesh.axis_names, axis_types=mesh.axis_types)
        with pytest.raises(ValueError, match=re.escape("and the mesh of zero1 has [6, 7, 4, 5, 2, 3, 0, 1], in this")):
            zero1(adamite.adam(1e-2), other).init(self.on(mesh))

    def test_parameters_that_are_otherwise_than_told(self):
        mesh = mesh_of("auto")
        tx = zero1(adamite.adam(1e-2), mesh, param_shardings=NamedSharding(mesh, P()))
        with pytest.raises(ValueError, match=re.escape("params['w'] is sharded as P(None, 'model'), but param_shard")):
            tx.init(self.on(mesh, P(None, "model")))

    def test_arrays_on_an_abstract_mesh(self):
        mesh = mesh_of("auto")
        with pytest.raises(ValueError, match="but the mesh of zero1 is abstract"):
            zero1(adamite.adam(1e-2), mesh.abstract_mesh).init(self.on(mesh))

    def test_explicit_axes_without_params(self):
        mesh = mesh_of("explicit")
        tx, params = zero1(adamite.adam(1e-2), mesh), self.on(mesh)
        with pytest.raises(ValueError, match="zero1 needs params on a mesh of Explicit axes"):
            jax.jit(tx.update)(params, tx.init(params))

    @pytest.mark.parametrize("wrap", [offload, lambda tx: zero1(tx, mesh_of("auto"))])
    def test_what_lives_elsewhere_already(self, wrap):
        with pytest.raises(ValueError, match="tx must keep its state beside the parameters: give all axes to one"):
            zero1(wrap(adamite.adam(1e-2)), mesh_of("auto"))

    def test_shardings_of_another_mesh_in_a_plan(self):
        other = jax.make_mesh((8,), ("dp",), axis_types=(AxisType.Auto,))
        tx = zero1(adamite.adam(1e-2), mesh_of("auto"))
        for sharding in (NamedSharding(other, P()), jax.sharding.SingleDeviceSharding(jax.devices()[0])):
            with pytest.raises(ValueError, match=re.escape("parameters must be on the mesh of zero1, {'data': 4, 'mo")):
                state_shardings(tx, values(0, jnp.float32), sharding)

    def test_no_parameters(self):
        with pytest.raises(ValueError, match="params must hold an array at least"):
            state_shardings(adamite.adam(1e-2), {})
