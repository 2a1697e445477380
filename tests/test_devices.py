"""Eight devices: state is born where the parameters live, and the numbers are those of one device."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding

import adamite
from bits import assert_same_bits
from compilation import compiled

pytestmark = pytest.mark.few(2)

AXES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
SPECS = {"replicated": P(), "rows": P("data", None), "columns": P(None, "model"), "both": P("data", "model")}
SCHEDULE = optax.cosine_decay_schedule(1e-2, 100)


def mesh_of(axes):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AXES[axes],) * 2)


def values(seed):
    rng = np.random.default_rng(seed)
    return {"w": rng.standard_normal((8, 4)).astype(np.float32), "b": rng.standard_normal(8).astype(np.float32)}


def on(mesh, spec, tree):
    put = {"w": NamedSharding(mesh, spec), "b": NamedSharding(mesh, P(*spec[:1]))}
    return jax.device_put(tree, put)


def train(tx, params, gradients, state=None):
    state = tx.init(params) if state is None else state

    @jax.jit
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    gradients = list(gradients)
    before = compiled()
    for g in gradients:
        params, state = step(params, state, g)
    assert compiled() - before == 1
    return params, state


OPTIMIZERS = {
    "adam": lambda: adamite.adam(1e-2),
    "adamw, schedules": lambda: adamite.adamw(SCHEDULE, weight_decay=optax.linear_schedule(0.1, 0.0, 100)),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("axes", "spec"), [*itertools.product(AXES, SPECS)])
@pytest.mark.parametrize("where", ["eager", "jit", "jit in mesh", "eager in mesh"])
def test_state_follows_the_parameters(optimizer, axes, spec, where):
    mesh = mesh_of(axes)
    params = on(mesh, SPECS[spec], values(0))
    tx = OPTIMIZERS[optimizer]()
    init = jax.jit(tx.init) if "jit" in where else tx.init
    if "mesh" in where:
        with jax.set_mesh(mesh):
            state = init(params)
    else:
        state = init(params)
    everywhere = NamedSharding(mesh, P())
    shardings = jax.tree.map(lambda p: p.sharding, params)
    for name in ("mu", "nu"):
        for moment, sharding in zip(state[0]._asdict()[name].values(), shardings.values(), strict=True):
            assert moment.sharding.is_equivalent_to(sharding, moment.ndim)
    counts = [x for x in jax.tree.leaves(state) if x.ndim == 0]
    assert len(counts) == (1 if optimizer == "adam" else 3)
    assert all(x.sharding.is_equivalent_to(everywhere, 0) and x.committed for x in counts)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("axes", "spec"), [*itertools.product(AXES, SPECS)])
def test_sharded_training_compiles_once_and_gives_the_bits_of_one_device(optimizer, axes, spec):
    mesh = mesh_of(axes)
    tx = OPTIMIZERS[optimizer]()
    alone = train(tx, jax.device_put(values(0)), map(values, range(1, 6)))
    params = on(mesh, SPECS[spec], values(0))
    gradients = [on(mesh, SPECS[spec], values(i)) for i in range(1, 6)]
    together = train(tx, params, gradients)
    assert_same_bits(together, alone)  # parameters, mu, nu and counts
    for name, p in together[0].items():
        assert p.sharding.is_equivalent_to(params[name].sharding, p.ndim)


def test_parameters_on_another_device_keep_their_state_there():
    device = jax.devices()[3]
    params = jax.device_put(values(0), device)
    params_after, state = train(adamite.adam(SCHEDULE), params, [jax.device_put(values(1), device)] * 3)
    leaves = jax.tree.leaves((adamite.adam(SCHEDULE).init(params), params_after, state))
    assert {x.sharding for x in leaves} == {SingleDeviceSharding(device)}


def batches(n=8):
    rng = np.random.default_rng(5)
    x = rng.standard_normal((n, 16, 4)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(x @ np.array([[1.0], [-2.0], [3.0], [0.5]], np.float32))


def loss(params, x, y):
    return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)


MODEL = {"w": np.full((4, 1), 0.1, np.float32), "b": np.zeros(1, np.float32)}


def whole_batch(steps):
    x, y = batches()
    tx = adamite.adam(1e-2)
    params = jax.device_put(MODEL)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss)(params, x.reshape(-1, 4), y.reshape(-1, 1))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def test_pmap_equals_the_whole_batch_and_replicas_stay_equal():
    x, y = batches()
    tx = adamite.adam(1e-2)
    copies = jax.tree.map(lambda p: jnp.stack([p] * 8), MODEL)

    def step(params, state, x, y):
        grads = jax.lax.pmean(jax.grad(loss)(params, x, y), "batch")
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = copies, jax.pmap(tx.init)(copies)
    pmapped = jax.pmap(step, axis_name="batch")
    for _ in range(10):
        params, state = pmapped(params, state, x, y)
    for leaf in jax.tree.leaves((params, state)):
        assert (np.asarray(leaf) == np.asarray(leaf)[:1]).all()
    first = jax.tree.map(lambda x: x[0], (params, state))
    chex.assert_trees_all_close(first, whole_batch(10), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checked", [True, False])
def test_shard_map_equals_the_whole_batch(checked):
    """With check_vma, gradients of replicated parameters are summed already; without, they are local."""
    x, y = batches()
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    tx = adamite.adam(1e-2)

    def step(params, state, x, y):
        mean = (lambda g: g / 8) if checked else (lambda g: jax.lax.pmean(g, "batch"))
        grads = jax.tree.map(mean, jax.grad(loss)(params, x[0], y[0]))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    mapped = jax.jit(
        jax.shard_map(
            step, mesh=mesh, in_specs=(P(), P(), P("batch"), P("batch")), out_specs=(P(), P()), check_vma=checked
        )
    )
    params = jax.device_put(MODEL, NamedSharding(mesh, P()))
    state = tx.init(params)
    for _ in range(10):
        params, state = mapped(params, state, x, y)
    # mu and nu, too: Adam's steps hardly change when every gradient is eight times too large.
    chex.assert_trees_all_close((params, state), whole_batch(10), rtol=1e-4, atol=1e-6)


def test_init_inside_shard_map_is_local():
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    init = jax.shard_map(
        lambda p: adamite.adam(1e-2).init(p)[0], mesh=mesh, in_specs=P("batch"),
        out_specs=optax.ScaleByAdamState(P(), P("batch"), P("batch")),
    )  # fmt: skip
    state = jax.jit(init)(jnp.ones((8, 4)))
    assert state.mu.shape == (8, 4)
    assert state.count.shape == ()


REDUCING = {
    "lamb": lambda **axes: adamite.lamb(1e-2, weight_decay=0.1, **axes),
    "stable_adamw": lambda **axes: adamite.stable_adamw(0.1, **axes),
    "cautious": lambda **axes: adamite.cautious(adamite.scale_by_adam(), **axes),
}


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("name", REDUCING)
def test_norms_and_means_are_over_whole_leaves_where_axis_name_says_what_cuts_them(name, checked):
    """In shard_map a device sees its own part of ``w``, and all of ``b``; without axis_name the result is another."""
    mesh = jax.make_mesh((4, 2), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)
    specs = {"w": P("rows", "columns"), "b": P()} if checked else {"w": P("rows", "columns")}
    params, *gradients = [{leaf: x * 10.0**i for leaf, x in values(i).items() if leaf in specs} for i in range(4)]

    def steps(tx):
        def run(params, gradients):
            state = tx.init(params)
            for g in gradients:
                updates, state = tx.update(g, state, params)
                params = optax.apply_updates(params, updates)
            return params

        return run

    def run_in_parts(**axes):
        every = [specs] * len(gradients)
        mapped = jax.shard_map(
            steps(REDUCING[name](**axes)), mesh=mesh, in_specs=(specs, every), out_specs=specs, check_vma=checked
        )
        return jax.jit(mapped)(params, gradients)

    whole = jax.jit(steps(REDUCING[name]()))(params, gradients)
    chex.assert_trees_all_close(run_in_parts(axis_name=("rows", "columns")), whole, rtol=1e-5, atol=1e-6)
    assert np.abs(run_in_parts()["w"] - whole["w"]).max() > 1e-3


def test_state_shardings_by_tree_map_params():
    mesh = mesh_of("auto")
    params = on(mesh, SPECS["both"], values(0))
    tx = adamite.adamw(SCHEDULE)
    shardings = optax.tree_map_params(
        tx,
        lambda _, s: s,
        jax.eval_shape(tx.init, params),
        jax.tree.map(lambda p: p.sharding, params),
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    assert_same_bits(state, tx.init(params))
    chex.assert_trees_all_equal(
        jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), state, tx.init(params)),
        jax.tree.map(lambda _: True, state),
    )


@pytest.mark.parametrize("axes", AXES)
def test_abstract_states_have_the_shardings_that_types_have(axes):
    """On Explicit axes a sharding is part of a type; on Auto axes only `state_shardings` tells it."""
    mesh = mesh_of(axes)
    params = on(mesh, P("data", "model"), values(0))
    state = jax.eval_shape(adamite.adam(1e-2).init, params)
    expected = NamedSharding(mesh, P("data", "model"))
    told = adamite.sharding.state_shardings(adamite.adam(1e-2), params)
    assert told[0].mu["w"].is_equivalent_to(expected, 2)
    if axes == "explicit":
        assert state[0].mu["w"].sharding.spec == P("data", "model")
    else:
        assert getattr(state[0].mu["w"], "sharding", None) is None


class TestTraps:
    """What docs/scaling.md warns of does happen."""

    def test_replicas_drift_without_pmean(self):
        tx, params = adamite.adam(0.1), jnp.ones(4)
        replicas = jax.tree.map(lambda x: jnp.stack([x] * 8), (tx.init(params), params))
        g = jnp.asarray(np.random.default_rng(0).standard_normal((8, 4)), jnp.float32)
        for average in (True, False):

            def step(g, state, params, average=average):
                return tx.update(jax.lax.pmean(g, "i") if average else g, state, params)

            updates = np.asarray(jax.pmap(step, axis_name="i")(g, *replicas)[0])
            assert np.all(updates == updates[0]) == average

    def test_a_clip_in_shard_map_is_by_the_norm_of_the_part(self):
        mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
        clip = optax.clip_by_global_norm(1.0)
        g = jnp.ones(8)
        part = jax.shard_map(lambda g: clip.update(g, clip.init(g))[0], mesh=mesh, in_specs=P("i"), out_specs=P("i"))
        np.testing.assert_allclose(jax.jit(part)(g), 1.0)
        np.testing.assert_allclose(clip.update(g, clip.init(g))[0], 8**-0.5, rtol=1e-6)


def test_two_billion_elements_are_counted():
    """By shapes alone."""
    p = jax.ShapeDtypeStruct((65536, 65536), jnp.float32)
    for tx in (adamite.stable_adamw(1e-2), adamite.cautious(adamite.scale_by_adam()), adamite.adamw(1e-2)):
        updates, _ = jax.eval_shape(tx.update, p, jax.eval_shape(tx.init, p), p)
        assert updates.shape == p.shape
