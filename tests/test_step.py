"""`tx.step`: update and sum to the bit where XLA steps; the same state whatever steps; everywhere JAX goes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import adamite
from adamite import engines
from adamite.core.optimizer import apply_updates
from adamite.engines.native import gpu
from adamite.engines.native.library import library
from bits import assert_same_bits, types
from engines.cases import QUICKLY, assert_close
from specs import SPECS

pytestmark = pytest.mark.few(2)

each = pytest.mark.parametrize("spec", SPECS, ids=str)
SHAPES = {"w": (16, 300), "b": (3,), "s": ()}


def tree(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}


def one_device():
    """A mesh on which it is known where everything is."""
    return jax.make_mesh((1,), ("here",), axis_types=(jax.sharding.AxisType.Auto,))


def both(tx, engine="xla"):
    """A step by itself, and as optax takes it."""

    def plainly(grads, state, params):
        updates, state = tx.update(grads, state, params, engine="xla")
        return optax.apply_updates(params, updates), state

    return jax.jit(functools.partial(tx.step, engine=engine)), jax.jit(plainly)


def agree(tx, dtype=jnp.float32, steps=3):
    params = tree(0, dtype)
    ours, theirs = (params, tx.init(params)), (params, tx.init(params))
    alone, plain = both(tx)
    for i in range(steps):
        g = tree(i + 1, dtype)
        ours, theirs = alone(g, ours[1], ours[0]), plain(g, theirs[1], theirs[0])
        assert_same_bits(ours, theirs)
    assert types(ours[1]) == types(tx.init(params))


@each
def test_a_step_is_an_update_and_a_sum(spec):
    agree(spec.build())


@pytest.mark.few(2)
@pytest.mark.parametrize("rounding", [None, "nearest", "stochastic", "residual8", "residual16"])
@pytest.mark.parametrize("moments", [pytest.param("float32", marks=pytest.mark.slow), "int8"])
def test_with_storages_and_roundings(moments, rounding):
    agree(adamite.adamw(1e-2, moments=moments, rounding=rounding), jnp.bfloat16)


AROUND = {
    "clipping": lambda tx: adamite.chain(optax.clip_by_global_norm(0.1), tx),
    "clipping, optax behind": lambda tx: adamite.chain(optax.clip_by_global_norm(0.1), tx, optax.scale(0.5)),
    "skip_nonfinite": adamite.skip_nonfinite,
    "skip_spikes": adamite.skip_spikes,
    "accumulate": lambda tx: adamite.accumulate(tx, every=2),
    "accumulate, guarded": lambda tx: adamite.accumulate(adamite.skip_nonfinite(tx), every=2),
    "with_telemetry": adamite.with_telemetry,
    "with_ema": adamite.with_ema,
    "with_ema, accumulated": lambda tx: adamite.accumulate(adamite.with_ema(tx, storage="bfloat16"), every=2),
    "guarded optax": lambda _: adamite.skip_nonfinite(optax.adamw(1e-2)),
}


@pytest.mark.parametrize("around", AROUND)
def test_around_an_optimizer(around):
    agree(AROUND[around](adamite.adamw(1e-2)), jnp.bfloat16)


@pytest.mark.parametrize("around", ["clipping", "skip_spikes", "accumulate"])
def test_around_a_kernel(around):
    """Two micro-batches make a step, a step is clipped and so on, whatever steps."""
    tx = AROUND[around](adamite.adamw(1e-2))
    with jax.set_mesh(one_device()), engines.recorded() as choices:
        start = tree(), tx.init(tree())
        by_kernel, plain = (
            jax.jit(functools.partial(tx.step, engine=engine), compiler_options=QUICKLY) for engine in ("pallas", "xla")
        )
        for i in range(3):
            g = tree(i + 1)
            ours, start = by_kernel(g, start[1], start[0]), plain(g, start[1], start[0])
            assert_close(ours, start)
    assert {choice.engine for choice in choices} == {"pallas"}


@pytest.mark.few(1)
@pytest.mark.parametrize("engine", ["xla", "pallas"])
def test_a_bad_step_changes_no_bit_of_weights_and_moments(engine):
    tx, params = adamite.skip_nonfinite(adamite.adamw(1e-2, moments="int8")), tree()
    alone, _ = both(tx, engine)
    params, state = alone(tree(1), tx.init(params), params)
    bad = tree(2) | {"b": jnp.array([0.0, jnp.nan, 1.0])}
    after, then = alone(bad, state, params)
    assert_same_bits(after, params)
    assert_same_bits(then.inner, state.inner)


def test_parameters_without_a_gradient_stay():
    tx, params = adamite.adamw(1e-2), tree()
    state = tx.init(params)
    after, then = tx.step(tree(1) | {"w": None}, state, params)
    assert_same_bits(after["w"], params["w"])
    assert_same_bits(then[0].mu["w"], state[0].mu["w"])
    assert not np.array_equal(after["b"], params["b"])
    assert apply_updates(params, {"w": None, "b": params["b"], "s": None})["b"][0] == 2 * params["b"][0]


def test_scan_and_one_program():
    tx, params = adamite.adamw(optax.linear_schedule(1e-2, 0.0, 5), moments="int8", rounding="residual8"), tree()
    alone, _ = both(tx)
    gradients = jax.tree.map(lambda *g: jnp.stack(g), *(tree(i) for i in range(4)))
    scanned, _ = jax.jit(
        lambda p, s, g: jax.lax.scan(lambda carry, g: (tx.step(g, carry[1], carry[0], engine="xla"), None), (p, s), g)
    )(params, tx.init(params), gradients)
    carry = params, tx.init(params)
    for i in range(4):
        carry = alone(tree(i), carry[1], carry[0])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-7), scanned[0], carry[0])
    assert alone._cache_size() == 1


def test_vmap():
    tx = adamite.adamw(1e-2)
    many = jax.tree.map(lambda *p: jnp.stack(p), *(tree(i) for i in range(3)))
    states = jax.vmap(tx.init)(many)
    after, _ = jax.jit(jax.vmap(tx.step))(many, states, many)
    one, _ = jax.jit(tx.step)(tree(1), tx.init(tree(1)), tree(1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-6, atol=1e-7), after, one)


def test_donation():
    tx, params = adamite.adamw(1e-2, moments="int8"), tree()
    step = jax.jit(lambda params, state, grads: tx.step(grads, state, params), donate_argnums=(0, 1))
    given = params, tx.init(params)
    before = [x for x in jax.tree.leaves(given) if x.size]
    step(*given, tree(1))
    assert all(x.is_deleted() for x in before)


def mesh(explicit):
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    return jax.make_mesh((4,), ("data",), axis_types=(kind,), devices=jax.devices()[:4])


@pytest.mark.few(1)
@pytest.mark.parametrize("engine", ["auto", "pallas"])
@pytest.mark.parametrize("explicit", [False, True], ids=["Auto", "Explicit"])
def test_on_a_mesh_results_and_places_are_those_of_one_device(explicit, engine):
    over = NamedSharding(mesh(explicit), P("data"))
    tx, params = adamite.adamw(1e-2, moments="int8"), {"w": tree()["w"]}
    one, _ = both(tx)
    alone = one(params, tx.init(params), params)
    laid = jax.device_put(params, over)
    step = jax.jit(functools.partial(tx.step, engine=engine))
    spread = step(laid, tx.init(laid), laid)
    (assert_same_bits if engine == "auto" else assert_close)(jax.device_get(spread), jax.device_get(alone))
    assert spread[0]["w"].sharding.is_equivalent_to(over, 2)


@pytest.mark.parametrize("explicit", [False, True], ids=["Auto", "Explicit"])
@pytest.mark.parametrize("moments", ["float32", "int8"])
def test_zero1_by_a_kernel(moments, explicit):
    """Each device steps its part."""
    where, alone = mesh(explicit), adamite.adamw(1e-2, moments=moments)
    tx, params, grads = adamite.sharding.zero1(alone, where), {"w": tree()["w"]}, {"w": tree(1)["w"]}
    laid, laid_grads = jax.device_put((params, grads), NamedSharding(where, P()))
    with engines.recorded() as choices:
        after, state = jax.jit(functools.partial(tx.step, engine="pallas"))(laid_grads, tx.init(laid), laid)
    assert [choice.engine for choice in choices] == ["pallas"]
    assert after["w"].sharding.is_fully_replicated
    assert not jax.tree.leaves(state[0].mu)[0].sharding.is_fully_replicated
    one, _ = both(alone)
    assert_close(jax.device_get((after, state)), jax.device_get(one(grads, alone.init(params), params)))


def test_zero1_by_a_kernel_on_two_axes_with_a_gradient_missing():
    kind = (jax.sharding.AxisType.Auto,) * 2
    where = jax.make_mesh((2, 2), ("data", "model"), axis_types=kind, devices=jax.devices()[:4])
    params, grads = {name: tree()[name] for name in "wb"}, {"w": tree(1)["w"], "b": None}
    shardings = {"w": NamedSharding(where, P("model")), "b": NamedSharding(where, P())}
    alone = adamite.adamw(1e-2)
    tx, laid = adamite.sharding.zero1(alone, where, param_shardings=shardings), jax.device_put(params, shardings)
    laid_grads = grads | {"w": jax.device_put(grads["w"], shardings["w"])}
    with engines.recorded() as choices:
        after, state = jax.jit(functools.partial(tx.step, engine="pallas"))(laid_grads, tx.init(laid), laid)
    assert [choice.engine for choice in choices] == ["pallas"]
    assert state[0].mu["w"].sharding.spec == P("model", "data")
    one, _ = both(alone)
    assert_close(jax.device_get((after, state)), jax.device_get(one(grads, alone.init(params), params)))


def test_zero1():
    where = mesh(explicit=False)
    tx = adamite.sharding.zero1(adamite.adamw(1e-2), where)
    params = jax.device_put({"w": tree()["w"]}, NamedSharding(where, P()))
    after, state = jax.jit(tx.step)(params, tx.init(params), params)
    plain, _ = jax.jit(adamite.adamw(1e-2).step)(
        {"w": tree()["w"]}, adamite.adamw(1e-2).init(params), {"w": tree()["w"]}
    )
    np.testing.assert_allclose(after["w"], plain["w"], rtol=1e-6)
    assert after["w"].sharding.is_fully_replicated
    assert not state[0].mu["w"].sharding.is_fully_replicated


NO_CALLS = {
    "engine": ({"engine": "cuda"}, ValueError, "engine must be one of 'auto', 'xla', 'pallas', 'native', got 'cuda'"),
    "engine 3": ({"engine": 3}, (TypeError, ValueError), "engine must be"),
    "params": ({"params": None}, TypeError, "params must be the tree of parameters, got None"),
    "shape": ({"params": {"w": jnp.zeros(2)}}, ValueError, "updates"),
    "state": ({"state": ()}, (TypeError, ValueError), "state must be"),
}


@pytest.mark.parametrize("case", NO_CALLS)
def test_calls_that_cannot_be_meant(case):
    wrong, error, text = NO_CALLS[case]
    tx, params = adamite.adam(1e-2), tree()
    with pytest.raises(error, match=text):
        tx.step(**({"grads": params, "state": tx.init(params), "params": params} | wrong))


ON_A_GPU = {
    "auto": "kernels for GPUs are not measured yet: ask for engine='native'",
    "pallas": "Pallas kernels are for TPUs",
}


@pytest.mark.parametrize("engine", ON_A_GPU)
def test_a_gpu_is_left_to_xla(engine, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    leaves = adamite.memory_report(adamite.adam(1e-2), tree(), engine=engine).leaves
    assert {(leaf.engine, leaf.why_xla) for leaf in leaves} == {("xla", ON_A_GPU[engine])}


@pytest.mark.skipif(library() is None, reason="adamite-native is not installed")
def test_a_gpu_has_kernels_for_who_asks(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(gpu, "_refused", lambda: "")
    leaves = adamite.memory_report(adamite.adamax(1e-2, moments="int8"), tree(), engine="native").leaves
    assert {(leaf.engine, leaf.why_xla) for leaf in leaves} == {("native", "")}


@pytest.mark.parametrize("engine", ["xla", "auto", "pallas"])
def test_derivatives_go_through_a_step(engine):
    """Of a loss after two steps, by the weights before and by the learning rate; whatever takes the steps."""

    def loss(params, rate):
        tx = adamite.adamw(rate)
        state = tx.init(params)
        for _ in range(2):
            params, state = tx.step(jax.tree.map(jnp.sin, params), state, params, engine=engine)
        return sum(jnp.sum(p**2) for p in jax.tree.leaves(params))

    def plainly(params, rate):
        tx = optax.adamw(rate)
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
            params = optax.apply_updates(params, updates)
        return sum(jnp.sum(p**2) for p in jax.tree.leaves(params))

    with jax.set_mesh(one_device()), engines.recorded() as choices:
        ours, theirs = (jax.jit(jax.grad(f, (0, 1)))(tree(), 0.1) for f in (loss, plainly))
    auto = "native" if library() else "xla"
    assert {choice.engine for choice in choices} <= {auto if engine == "auto" else engine}
    assert bool(choices) == (engine == "pallas" or (engine == "auto" and auto == "native"))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), ours, theirs)
