"""Shardings that are told: each device steps its part by a kernel, and the numbers are those of one device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P
from jax.sharding import AxisType, Mesh, NamedSharding

import adamite
from adamite import checkpoint
from adamite.core.optimizer import as_optimizer
from adamite.engines import recorded
from adamite.sharding import offload, placed, state_shardings, zero1
from bits import assert_same_bits
from engines.cases import assert_close

TYPES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
SHAPES = {"w": (64, 1024), "v": (8, 16, 512), "b": (300,), "x": ()}
SPECS = {"w": P("data", "model"), "v": P(None, "data"), "b": P(), "x": P()}
INT8 = adamite.adamw(1e-2, weight_decay=0.1, moments="int8")
OPTIMIZERS = {
    "int8": (jnp.float32, INT8),
    "int8, residual8": (jnp.bfloat16, adamite.adamw(1e-2, moments="int8", rounding="residual8")),
    "bfloat16, stochastic": (jnp.bfloat16, adamite.adamw(1e-2, moments="bfloat16", rounding="stochastic")),
}
WAYS = ("step", "update")


def mesh_of(types="auto"):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(TYPES[types],) * 2)


def shardings(types="auto"):
    return {name: NamedSharding(mesh_of(types), spec) for name, spec in SPECS.items()}


def tree(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}


def laid(seed, types="auto", dtype=jnp.float32):
    return jax.device_put(tree(seed, dtype), shardings(types))


def assert_sharded(of, expected):
    for (path, x), sharding in zip(jax.tree_util.tree_leaves_with_path(of), jax.tree.leaves(expected), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim), (path, x.sharding, sharding)


def run(tx, way, engine="auto"):
    """A jitted step or update by an engine."""
    return jax.jit(lambda g, s, p: getattr(tx, way)(g, s, p, engine=engine))


def taken(tx, way, *of, engine="auto"):
    with recorded() as choices:
        jax.eval_shape(lambda *of: getattr(tx, way)(*of, engine=engine), *of)
    return {choice.path: choice.engine for choice in choices}


@pytest.fixture
def library():
    pytest.importorskip("adamite_native", reason="it takes a C++ compiler; .ci/run insists on it")


@pytest.mark.few(4)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("storage", OPTIMIZERS)
def test_native_gives_the_bits_of_one_device(library, storage, types, way):
    dtype, tx = OPTIMIZERS[storage]
    p, g, own = laid(0, types, dtype), laid(1, types, dtype), shardings(types)
    told = placed(tx, p)
    state = told.init(p)
    assert_same_bits(state, tx.init(tree(0, dtype)))
    one, step = run(tx, way, "native"), run(told, way, "native")
    engines = taken(told, way, g, state, p)
    assert engines["['w']"] == engines["['v']"] == "native"
    program = step.lower(g, state, p).compile().as_text()
    assert "adamite_step" in program
    assert not re.search(r" (all-gather|all-to-all|collective-permute)(-start)?\(", program)
    ours, theirs = (p, state), (tree(0, dtype), tx.init(tree(0, dtype)))
    for seed in (1, 2):
        first, state = step(laid(seed, types, dtype), ours[1], ours[0])
        wanted, their_state = one(tree(seed, dtype), theirs[1], theirs[0])
        assert_same_bits((first, state), (wanted, their_state))
        ours = (first if way == "step" else ours[0]), state
        theirs = (wanted if way == "step" else theirs[0]), their_state
    assert_sharded(first, own)
    assert_sharded(state, state_shardings(tx, p))


@pytest.mark.few(1)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("types", TYPES)
def test_pallas_gives_the_numbers_of_one_device(types, way):
    dtype, tx = OPTIMIZERS["int8, residual8"]
    p, g = laid(0, types, dtype), laid(1, types, dtype)
    told = placed(tx, p)
    state = told.init(p)
    assert set(taken(told, way, g, state, p, engine="pallas").values()) == {"pallas"}
    found = run(told, way, "pallas")(g, state, p)
    wanted = run(tx, way, "xla")(tree(1, dtype), tx.init(tree(0, dtype)), tree(0, dtype))
    assert_close(*((first if way == "step" else add(first, dtype), state) for first, state in (found, wanted)))
    assert_sharded(found[1], state_shardings(told, p))


def add(updates, dtype):
    """Updates, from one device, as weights."""
    return jax.tree.map(lambda p, u: (p + np.asarray(u)).astype(dtype), jax.device_get(tree(0, dtype)), updates)


@pytest.mark.parametrize("types", TYPES)
def test_init_eagerly_and_under_jit(types):
    p = laid(0, types)
    told = placed(INT8, p)
    for init in (told.init, jax.jit(told.init)):
        state = init(p)
        assert_same_bits(state, INT8.init(tree(0)))
        assert_sharded(state, state_shardings(told, p))


def test_shardings_may_be_told_by_anything_that_has_them():
    p = laid(0)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), p)
    for told in (placed(INT8, abstract), placed(INT8, shardings())):
        assert_sharded(jax.jit(told.init)(p), state_shardings(INT8, p))
    rows = NamedSharding(mesh_of(), P("data"))
    p = jax.device_put({name: x for name, x in tree(0).items() if name in "wv"}, rows)
    assert_sharded(jax.jit(placed(INT8, rows).init)(p), state_shardings(INT8, p))


def test_what_lies_elsewhere_is_moved(library):
    """Gradients that are all on each device, and a state that is."""
    p, told = laid(0), placed(INT8, laid(0))
    everywhere = NamedSharding(mesh_of(), P())
    state, g = jax.device_put((INT8.init(tree(0)), tree(1)), everywhere)
    new, after = run(told, "step", "native")(g, state, p)
    assert_same_bits((new, after), run(INT8, "step", "native")(tree(1), INT8.init(tree(0)), tree(0)))
    assert_sharded((new, after), (shardings(), state_shardings(INT8, p)))


@pytest.mark.more
def test_eager_steps(library):
    p, told = laid(0), placed(INT8, laid(0))
    for way in WAYS:
        first, state = getattr(told, way)(laid(1), told.init(p), p)
        assert_sharded((first, state), (shardings(), state_shardings(INT8, p)))
        wanted, their_state = run(INT8, way)(tree(1), INT8.init(tree(0)), tree(0))
        assert_same_bits([first[name] for name in "wv"], [wanted[name] for name in "wv"])
        assert_same_bits(state[0].nu.codes, their_state[0].nu.codes)


WRAPPED = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1e6), tx),
    "adamite.chain": lambda tx: adamite.chain(optax.clip_by_global_norm(1e6), tx),
    "partition": lambda tx: optax.partition(
        {"on": tx, "off": optax.set_to_zero()}, {"w": "on", "v": "on", "b": "off", "x": "on"}
    ),
    "masked": lambda tx: optax.masked(tx, {"w": True, "v": True, "b": False, "x": True}),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
    "inject_hyperparams": lambda _: optax.inject_hyperparams(adamite.adamw, static_args="moments")(
        1e-2, moments="int8"
    ),
    "accumulate": lambda tx: adamite.accumulate(tx, 1),
}
"""The clip changes nothing: sums over devices would."""


@pytest.mark.few(3)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_inside(library, name, types, way):
    """Their leaves have the paths of the parameters."""
    p, g = laid(0, types), laid(1, types)
    tx = WRAPPED[name](INT8)
    told, plain = placed(tx, p), as_optimizer(tx)
    state = told.init(p)
    engines = taken(told, way, g, state, p)
    assert engines["['w']"] == engines["['v']"] == "native"
    first, after = run(told, way)(g, state, p)
    wanted, _ = run(plain, way)(tree(1), plain.init(tree(0)), tree(0))
    for leaf in "wv":
        assert_same_bits(first[leaf], wanted[leaf])
    assert_sharded(after, state_shardings(told, p))
    assert_sharded(first, shardings(types))


def test_zero1_tells_them_too(library):
    mesh = mesh_of()
    p = jax.device_put(tree(0), NamedSharding(mesh, P()))
    told = zero1(INT8, mesh)
    state = told.init(p)
    engines = taken(told, "step", p, state, p)
    assert engines["['w']"] == engines["['v']"] == "native"
    g = jax.device_put(tree(1), NamedSharding(mesh, P()))
    new, after = run(told, "step", "native")(g, state, p)
    assert_same_bits((new, after), run(INT8, "step", "native")(tree(1), INT8.init(tree(0)), tree(0)))


@pytest.mark.more
def test_offloaded(library):
    p = laid(0)
    around = offload(placed(INT8, p))
    new, state = jax.jit(around.step)(laid(1), around.init(p), p)
    wanted, _ = run(INT8, "step")(tree(1), INT8.init(tree(0)), tree(0))
    assert_same_bits([new[name] for name in "wv"], [wanted[name] for name in "wv"])
    assert state[0].mu.codes["w"].sharding.memory_kind == "pinned_host"


def test_gradients_of_none():
    p, told = laid(0), placed(INT8, laid(0))
    state = told.init(p)
    updates, after = jax.jit(told.update)({**laid(1), "w": None}, state, p)
    assert updates["w"] is None
    assert_same_bits(after[0].mu.codes["w"], state[0].mu.codes["w"])
    new, _ = jax.jit(told.step)({**laid(1), "w": None}, state, p)
    assert_same_bits(new["w"], p["w"])


def test_in_scan(library):
    p, g, told = laid(0), laid(1), placed(INT8, laid(0))

    def three(tx):
        return jax.jit(lambda g, s, p: jax.lax.scan(lambda c, _: (tx.step(g, c[1], c[0]), None), (p, s), length=3)[0])

    new, _ = three(told)(g, told.init(p), p)
    wanted, _ = three(INT8)(tree(1), INT8.init(tree(0)), tree(0))
    assert_same_bits([new[name] for name in "wv"], [wanted[name] for name in "wv"])
    assert_sharded(new, shardings())


def test_reports():
    """Bytes on one device, and the engine of each leaf."""
    p = laid(0)
    told = placed(INT8, p)
    state = told.init(p)
    kept = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    report = adamite.memory_report(told, p, engine="pallas")
    assert report.per_device.state == kept
    assert {leaf.engine for leaf in report.leaves} == {"pallas"}
    plain = adamite.memory_report(INT8, p)
    assert (plain.per_device, plain.bytes) == (report.per_device, report.bytes)


@pytest.mark.parametrize("types", TYPES)
def test_checkpoints(library, tmp_path, types):
    """A run goes on on the mesh, and on one device, with the same bits."""
    p, g = laid(0, types), laid(1, types)
    told = placed(INT8, p)
    step = run(told, "step", "native")
    p, state = step(g, told.init(p), p)
    checkpoint.save(tmp_path, 1, (p, state), told)
    again = checkpoint.restore(tmp_path, (p, state), told).tree
    assert_same_bits(again, (p, state))
    assert_sharded(again, (shardings(types), state_shardings(told, p)))
    home = checkpoint.restore(tmp_path, (tree(0), INT8.init(tree(0))), INT8, allow="mesh").tree
    assert_same_bits(step(g, again[1], again[0]), run(INT8, "step", "native")(tree(1), home[1], home[0]))


def test_arrays_are_not_kept():
    """The parameters that told the shardings may be donated, and a checkpoint's settings hold none of their numbers."""
    p = laid(0)
    told = placed(INT8, p)
    assert told.identity["tx"] == INT8.identity
    assert told.identity["param_shardings"]["['w']"] == p["w"].sharding
    assert not any(isinstance(x, jax.Array) for x in jax.tree.leaves(told.identity))
    new, _ = jax.jit(told.step, donate_argnums=2)(laid(1), told.init(p), p)
    jax.jit(told.step)(laid(1), told.init(new), new)


def test_nnx(library):
    nnx = pytest.importorskip("flax.nnx")
    rows = NamedSharding(mesh_of(), P("data"))

    class Model(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(jax.device_put(tree(0)["w"], rows))

    def trained(told):
        model = Model()
        if not told:
            model.kernel.set_value(tree(0)["w"])
        tx = placed(INT8, nnx.state(model, nnx.Param)) if told else INT8
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            g = nnx.grad(lambda model: jnp.sum(model.kernel[...] ** 2))(model)
            optimizer.update(model, g)

        step(model, optimizer)
        return model.kernel[...], optimizer

    (ours, optimizer), (theirs, _) = trained(told=True), trained(told=False)
    assert_same_bits(ours, theirs)
    assert ours.sharding.is_equivalent_to(rows, 2)
    codes = [x for x in jax.tree.leaves(nnx.state(optimizer)) if x.dtype == jnp.int8]
    assert codes[0].sharding.is_equivalent_to(rows, 2)


class TestRefused:
    P = staticmethod(functools.partial(laid, 0))

    def refuses(self, says, of, error=ValueError):
        with pytest.raises(error, match=f"^{re.escape(says)}"):
            of()

    def test_what_is_on_no_mesh(self):
        w = {"w": tree(0)["w"]}
        self.refuses("params['w'] is not sharded over a mesh, got SingleDeviceSharding", lambda: placed(INT8, w))
        self.refuses("params['w'] is not sharded over a mesh, got None", lambda: placed(INT8, {"w": 1.0}))

    def test_several_meshes(self):
        other = Mesh(np.array(jax.devices()), ("other",), axis_types=(AxisType.Auto,))
        params = {**laid(0), "x": jax.device_put(1.0, NamedSharding(other, P()))}
        self.refuses("params['x'] is on the mesh", lambda: placed(INT8, params))

    def test_no_parameters(self):
        self.refuses("params must hold an array or a sharding at least", lambda: placed(INT8, {}))

    def test_what_is_no_transformation(self):
        says = "tx must be a gradient transformation, got 'adam' of type str"
        self.refuses(says, lambda: placed("adam", laid(0)), TypeError)

    def test_one_inside_of_another(self):
        says = "tx must keep its state beside the parameters"
        self.refuses(says, lambda: placed(placed(INT8, laid(0)), laid(0)))
        self.refuses(says, lambda: zero1(placed(INT8, laid(0)), mesh_of()))
        self.refuses(says, lambda: placed(zero1(INT8, mesh_of()), laid(0)))

    def test_axes_of_two_types(self):
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Explicit))
        params = {"w": jax.device_put(tree(0)["w"], NamedSharding(mesh, P("data")))}
        self.refuses("params['w'] must be on a mesh whose axes are all Auto or all", lambda: placed(INT8, params))

    @pytest.mark.parametrize("types", TYPES)
    def test_parameters_elsewhere(self, types):
        told, p = placed(INT8, laid(0, types)), laid(0, types)
        self.refuses("params['b'] is on no mesh, and not on that of placed", lambda: told.init(tree(0)))
        other = {**p, "w": jax.device_put(tree(0)["w"], NamedSharding(mesh_of(types), P("model")))}
        says = "params['w'] is sharded as P('model',), but param_shardings says P('data', 'model')"
        self.refuses(says.replace("P('model',)", str(other["w"].sharding.spec)), lambda: told.init(other))
        self.refuses(says.replace("P('model',)", str(other["w"].sharding.spec)),
                     lambda: told.update(p, told.init(p), other))  # fmt: skip

    def test_other_parameters(self):
        told = placed(INT8, laid(0))
        self.refuses("param_shardings must have the structure of params", lambda: told.init({"w": laid(0)["w"]}))

    def test_inside_of_shard_map(self):
        told = placed(INT8, laid(0))
        inside = jax.shard_map(told.init, mesh=mesh_of(), in_specs=P(), out_specs=P())
        self.refuses("params['b'] is one device's own, inside of shard_map or pmap", lambda: jax.jit(inside)(laid(0)))


def test_a_parameter_may_have_any_name():
    """A mesh's shardings are named by parameters, and no argument of a rounding."""
    told = placed(adamite.adam(1e-2), {"rounding": NamedSharding(mesh_of(), P())})
    assert not adamite.core.rounds_weights(told)
    assert adamite.core.rounds_weights(placed(OPTIMIZERS["int8, residual8"][1], {"w": NamedSharding(mesh_of(), P())}))
