"""Kernels on meshes of Auto axes, whose shardings jit does not show: the bits of one device, and nothing sent.

Only the compiled kernels take such leaves, on CPUs: XLA's partitioner says there what each device has.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import AxisType, Mesh, NamedSharding

import adamite
from adamite.sharding import state_shardings
from bits import assert_same_bits
from compilation import compiled

pytest.importorskip("adamite_native", reason="it takes a C++ compiler; .ci/run insists on it")

ADAMW = functools.partial(adamite.adamw, 1e-2, weight_decay=0.1)
STORAGES = {
    "int8": (jnp.float32, ADAMW(moments="int8")),
    "int8, residual8": (jnp.bfloat16, ADAMW(moments="int8", rounding="residual8")),
    "bfloat16, stochastic": (jnp.bfloat16, ADAMW(moments="bfloat16", rounding="stochastic")),
}
WAYS = ("step", "update")


def mesh_of(kind):
    """A mesh of Auto axes: of one axis, of two, of half of the devices, of devices in another order."""
    devices = np.array(jax.devices())
    order = devices[[3, 1, 0, 2, 7, 6, 5, 4]].reshape(4, 2)
    one, two = ("data",), ("data", "model")
    devices, names = {
        "one": (devices, one),
        "two": (devices.reshape(4, 2), two),
        "half": (devices[4:], one),
        "shuffled": (order, two),
    }[kind]
    return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))


WHOLE = {
    "rows": ("one", (64, 512), P("data")),
    "rows and columns": ("two", (64, 1024), P("data", "model")),
    "columns": ("two", (16, 1024), P(None, "model")),
    "columns over both": ("two", (16, 2048), P(None, ("data", "model"))),
    "rows over both": ("two", (64, 512), P(("model", "data"))),
    "a vector": ("one", (8 * 1024,), P("data")),
    "the first of three": ("two", (8, 32, 512), P("data", None, "model")),
    "the middle of three": ("two", (8, 32, 512), P(None, "data")),
    "the middle and the last": ("two", (8, 32, 512), P(None, "data", "model")),
    "all but the last": ("two", (8, 32, 512), P("model", "data")),
    "two of four": ("two", (4, 2, 16, 256), P("model", None, "data")),
    "nothing": ("one", (64, 512), P()),
    "half of the devices": ("half", (64, 512), P("data")),
    "devices in another order": ("shuffled", (64, 1024), P("model", "data")),
    "rows of ragged blocks": ("two", (64, 1000), P("data")),
}
"""Meshes, shapes and shardings by which no block is on two devices."""
CUT = {
    "blocks": ("one", (64, 1024), P(None, "data")),
    "ragged blocks": ("one", (64, 1000), P(None, "data")),
    "blocks, and no other axis is divided": ("one", (7, 1024), P(None, "data")),
}
EACH = [
    pytest.param(
        case,
        storage,
        way,
        marks=[pytest.mark.more] * (i not in ("rows", "rows and columns", "the middle and the last", "blocks")),
    )
    for i in (*WHOLE, *CUT)
    for case, storage, way in [
        (i, *(("int8, residual8", "step"), ("int8", "update"), ("bfloat16, stochastic", "step"))[len(i) % 3]),
        *((i, storage, way) for storage, way in (("int8, residual8", "update"),) if i == "rows and columns"),
    ]
]
ALL = [
    pytest.param(case, storage, way, marks=pytest.mark.slow)
    for case in (*WHOLE, *CUT)
    for storage in STORAGES
    for way in WAYS
    if (case, storage, way) not in [param.values for param in EACH]
]


def normal(shape, dtype, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def sent(program):
    """How often devices send each other anything."""
    kinds = ("all-gather", "all-reduce", "collective-permute", "all-to-all", "reduce-scatter")
    return sum(len(re.findall(rf" {kind}(?:-start)?\(", program)) for kind in kinds)


def copied(program, size):
    """Copies of arrays of at least so many elements."""
    shapes = re.findall(r"= \w+\[([\d,]+)\]\S* copy(?:-start)?\(", program)
    return sum(math.prod(map(int, shape.split(","))) >= size for shape in shapes)


def assert_kept(tree, shape, sharding):
    """What has the leaf's shape is sharded as it is."""
    own = [x for x in jax.tree.leaves(tree) if x.shape == shape]
    assert own
    assert all(x.sharding.is_equivalent_to(sharding, x.ndim) for x in own)


def function(tx, way):
    return jax.jit(lambda g, s, p: getattr(tx, way)(g, s, p), donate_argnums=(1, 2) if way == "step" else (1,))


@pytest.mark.parametrize(("case", "storage", "way"), [*EACH, *ALL])
def test_results_are_those_of_one_device(case, storage, way):
    """Of several steps by one program, in which devices send each other nothing where blocks are whole."""
    kind, shape, spec = (WHOLE | CUT)[case]
    dtype, tx = STORAGES[storage]
    own = NamedSharding(mesh_of(kind), spec)
    gradients = [normal(shape, dtype, seed) for seed in (1, 2, 3)]

    def run(place):
        step, p = function(tx, way), place(normal(shape, dtype, 0))
        state = jax.jit(tx.init)(p)
        program = step.lower(place(gradients[0]), state, p).compile().as_text()
        for g in gradients:
            first, state = step(place(g), state, p)
            p = first if way == "step" else p
        return program, step, first, state

    one, _, *wanted = run(jax.device_put)
    program, step, *found = run(lambda x: jax.device_put(x, own))
    assert one.count("adamite_step") == program.count("adamite_step") == 1
    assert_same_bits(found, wanted)
    assert_kept(found, shape, own)
    if case in WHOLE:
        assert sent(program) == 0
        part = math.prod(own.shard_shape(shape))
        assert copied(program, part) <= copied(one, math.prod(shape))
    before = compiled()
    step(jax.device_put(gradients[0], own), found[1], jax.device_put(normal(shape, dtype, 0), own))
    assert compiled() == before


SHAPES = {
    "a": ((64, 512), P("data")),
    "b": ((16, 1024), P(None, "model")),
    "small": ((300,), P()),
    "number": ((), P()),
    "c": ((8, 32, 512), P("model", "data")),
    "ragged": ((64, 300), P("data", "model")),
    "d": ((12, 8192), P(None, ("data", "model"))),
}


@pytest.fixture(scope="module")
def many():
    """``(tx, whole, parts, shardings)``: gradients, state and parameters on one device, and on eight."""
    tx, mesh = ADAMW(moments="int8"), mesh_of("two")
    g, p = ({k: normal(shape, jnp.float32, i + seed) for i, (k, (shape, _)) in enumerate(SHAPES.items())}
            for seed in (0, 50))  # fmt: skip
    shardings = {k: NamedSharding(mesh, spec) for k, (_, spec) in SHAPES.items()}
    laid = jax.device_put(p, shardings)
    return tx, (g, tx.init(p), p), (jax.device_put(g, shardings), jax.jit(tx.init)(laid), laid), shardings


@pytest.fixture(scope="module")
def stepped(many):
    return jax.jit(many[0].step)(*many[1])


def test_leaves_of_several_shardings_in_one_tree(many, stepped):
    tx, whole, parts, shardings = many
    with adamite.engines.recorded() as choices:
        new, state = jax.jit(lambda *of: tx.step(*of))(*parts)
    assert {choice.engine for choice in choices} == {"native"}
    assert_same_bits((new, state), stepped)
    for name, x in new.items():
        assert x.sharding.is_equivalent_to(shardings[name], x.ndim)
    assert_same_bits(jax.jit(tx.update)(*parts), jax.jit(tx.update)(*whole))


def test_small_leaves_are_cut_anywhere():
    """Their moments are not in blocks: devices step what they have, and send each other nothing."""
    mesh = mesh_of("two")
    specs = {"bias": ((512,), P(("data", "model"))), "scale": ((300,), P("data")), "table": ((6, 40), P(None, "data"))}
    p, g = ({name: normal(shape, jnp.float32, seed) for name, (shape, _) in specs.items()} for seed in (0, 1))
    own = {name: NamedSharding(mesh, spec) for name, (_, spec) in specs.items()}
    tx = ADAMW(moments="int8")
    laid = jax.device_put(p, own)
    step = jax.jit(lambda *of: tx.step(*of))
    program = step.lower(jax.device_put(g, own), jax.jit(tx.init)(laid), laid).compile().as_text()
    assert (program.count("adamite_step"), sent(program)) == (1, 0)
    new, state = step(jax.device_put(g, own), jax.jit(tx.init)(laid), laid)
    assert_same_bits((new, state), step(g, tx.init(p), p))
    for tree in (new, state[0].mu.codes):
        assert all(x.sharding.is_equivalent_to(own[name], x.ndim) for name, x in tree.items())


@pytest.mark.more
def test_gradients_and_states_that_are_sharded_otherwise(many, stepped):
    tx, (g, state, _), (laid_g, laid_state, laid), shardings = many
    mesh = mesh_of("two")
    everywhere, other = NamedSharding(mesh, P()), NamedSharding(mesh, P("model"))
    for given in (
        (laid_g, jax.device_put(state, everywhere), laid),
        (jax.device_put(g, everywhere), laid_state, laid),
        ({**laid_g, "a": jax.device_put(g["a"], other)}, laid_state, laid),
    ):
        assert_same_bits(jax.jit(tx.step)(*given), stepped)
    own = state_shardings(tx, laid)
    told = jax.jit(tx.step, in_shardings=(shardings, own, shardings), out_shardings=(shardings, own))
    new, after = told(*many[1])
    assert_same_bits((new, after), stepped)
    assert all(map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), jax.tree.leaves(after), jax.tree.leaves(own)))


def test_under_set_mesh(many, stepped):
    with jax.set_mesh(mesh_of("two")):
        assert_same_bits(jax.jit(lambda *of: many[0].step(*of))(*many[2]), stepped)


def three_steps(tx, g, state, p):
    return jax.lax.scan(lambda carry, _: (tx.step(g, carry[1], carry[0]), None), (p, state), length=3)[0]


def squares(tx, g, state, p):
    return jax.grad(lambda g: sum(jnp.sum(u**2) for u in jax.tree.leaves(tx.update(g, state, p)[0])))(g)


@pytest.mark.more
@pytest.mark.parametrize("of", [three_steps, squares])
def test_inside_of_scan_and_grad(many, of):
    run = jax.jit(functools.partial(of, many[0]))
    assert_same_bits(run(*many[2]), run(*many[1]))


@pytest.mark.more
def test_more_leaves_than_are_partitioned_together():
    tx = ADAMW(moments="int8")
    p = [normal((64, 512), jnp.float32, seed) for seed in range(adamite.engines.partitioned.GROUP + 3)]
    laid = jax.device_put(p, NamedSharding(mesh_of("one"), P("data")))
    step = jax.jit(tx.step)
    program = step.lower(laid, jax.jit(tx.init)(laid), laid).compile().as_text()
    assert program.count("adamite_step") == 2
    assert_same_bits(step(laid, jax.jit(tx.init)(laid), laid), step(p, tx.init(p), p))


def of_two(tree):
    return jax.tree.map(lambda x: jnp.stack([x, x + jnp.ones((), x.dtype)]), tree)


def test_vmap_of_arrays_on_several_devices_is_xlas():
    """There is no rule for one more axis. Codes differ at ties only."""
    tx, p = ADAMW(moments="int8"), normal((64, 512), jnp.float32, 0)
    g, state = normal((64, 512), jnp.float32, 1), tx.init(p)
    two = of_two((g, p))
    one = jax.jit(jax.vmap(lambda g, p: tx.step(g, state, p)))
    laid = jax.device_put(two, NamedSharding(mesh_of("one"), P(None, "data")))
    assert one.lower(*two).compile().as_text().count("adamite_step") == 1
    assert one.lower(*laid).compile().as_text().count("adamite_step") == 0
    (ours, ours_state), (theirs, their_state) = one(*laid), one(*two)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)
    for x, y in zip(jax.tree.leaves(ours_state), jax.tree.leaves(their_state), strict=True):
        if x.dtype in (jnp.int8, jnp.uint8):
            assert np.mean(np.asarray(x) != np.asarray(y)) < 1e-4


def in_shard_map(tx, axes, **how):
    over = P(axes)
    specs = jax.tree.map(lambda x: over if x.ndim else P(), tx.init(jnp.zeros((64, 512))))
    how |= {"mesh": mesh_of("two"), "in_specs": (over, specs, over), "out_specs": (over, specs)}
    return jax.jit(jax.shard_map(lambda g, s, p: tx.step(g, s, p), **how))


@pytest.mark.parametrize("checked", [True, False])
def test_inside_of_shard_map_over_all_axes(checked):
    """Each device steps an array of its own."""
    tx, g, p = ADAMW(moments="int8"), normal((64, 512), jnp.float32, 1), normal((64, 512), jnp.float32, 0)
    step, state = in_shard_map(tx, ("data", "model"), check_vma=checked), tx.init(p)
    program = step.lower(g, state, p).compile().as_text()
    assert (program.count("adamite_step"), sent(program)) == (1, 0)
    new, after = step(g, state, p)
    alone = jax.jit(tx.step)
    for rows in range(0, 64, 8):
        own = [jax.tree.map(lambda x: x[rows : rows + 8] if x.ndim else x, tree) for tree in (g, state, p)]  # noqa: B023
        wanted = alone(*own)
        assert_same_bits(jax.tree.map(lambda x: x[rows : rows + 8] if x.ndim else x, (new, after)), wanted)  # noqa: B023


def test_inside_of_shard_map_over_some_axes_xla_takes_the_step():
    tx, g, p = ADAMW(moments="int8"), normal((64, 512), jnp.float32, 1), normal((64, 512), jnp.float32, 0)
    step = in_shard_map(tx, "data", axis_names={"data"})
    with adamite.engines.recorded() as choices:
        text = step.lower(g, tx.init(p), p).as_text()
    assert "adamite_step" not in text
    assert choices[0][1:] == ("xla", "it is inside of a shard_map that is not over all axes of the mesh")
    np.testing.assert_allclose(step(g, tx.init(p), p)[0], jax.jit(tx.step)(g, tx.init(p), p)[0], rtol=1e-6, atol=1e-7)


@pytest.mark.more
def test_what_all_devices_have_inside_of_shard_map(many, stepped):
    everywhere = (P(), P(), P())
    step = jax.shard_map(many[0].step, mesh=mesh_of("two"), in_specs=everywhere, out_specs=everywhere[1:])
    assert_same_bits(jax.jit(step)(*many[1]), stepped)


@pytest.mark.more
def test_pmap(many, stepped):
    each = jax.pmap(many[0].step)(*jax.tree.map(lambda x: jnp.stack([x] * 8), many[1]))
    assert_same_bits(jax.tree.map(lambda x: x[5], each), stepped)


def test_shardings_that_do_not_divide():
    """JAX refuses them for arguments; inside of a program the leaf is put together."""
    tx, p = ADAMW(moments="int8"), normal((60, 512), jnp.float32, 0)
    g, state, own = normal((60, 512), jnp.float32, 1), tx.init(p), NamedSharding(mesh_of("one"), P("data"))
    with pytest.raises(ValueError, match="60"):
        jax.jit(tx.step, in_shardings=(own, None, own))(g, state, p)
    constrained = jax.jit(lambda g, s, p: tx.step(g, s, jax.lax.with_sharding_constraint(p, own)))
    assert_same_bits(constrained(g, state, p), jax.jit(tx.step)(g, state, p))


@pytest.mark.more
def test_eager_arrays_on_several_devices(many, stepped):
    """Their devices are known; each steps its part. XLA takes a leaf whose blocks are cut."""
    tx, _, parts, _ = many
    new, state = tx.step(*parts)
    for name in ("a", "b", "c", "d"):
        assert_same_bits(new[name], stepped[0][name])
        assert_same_bits(state[0].mu.codes[name], stepped[1][0].mu.codes[name])
    np.testing.assert_allclose(new["ragged"], stepped[0]["ragged"], rtol=1e-6, atol=1e-7)


@pytest.mark.more
def test_a_training_step():
    """Gradients of a batch over the same axis as the weights: where they are summed, XLA's partitioner decides."""
    tx, w, x = ADAMW(moments="int8"), normal((64, 512), jnp.float32, 0), normal((64, 512), jnp.float32, 1)
    rows = NamedSharding(mesh_of("one"), P("data"))

    @jax.jit
    def train(w, state, x):
        return tx.step(jax.grad(lambda w: jnp.mean((x @ w.T) ** 2))(w), state, w)

    laid = jax.device_put(w, rows)
    program = train.lower(laid, jax.jit(tx.init)(laid), jax.device_put(x, rows)).compile().as_text()
    assert program.count("adamite_step") == 1
    new, state = train(laid, jax.jit(tx.init)(laid), jax.device_put(x, rows))
    assert_kept((new, state), (64, 512), rows)
    np.testing.assert_allclose(new, train(w, tx.init(w), x)[0], rtol=1e-5, atol=1e-5)
