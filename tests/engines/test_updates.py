"""Updates by kernels, added up, beside those by XLA; alone, transformed by JAX, and inside of Optax's wrappers."""

import copy
import functools
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamite
from adamite.engines import recorded
from bits import assert_same_bits
from engines.cases import ROUNDINGS, assert_close

pytest.importorskip("adamite_native", reason="it takes a C++ compiler; .ci/run insists on it")

STORAGES = {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8", "float8": ("int8", "float8")}
SHAPES = {"w": (16, 512), "v": (3, 40, 300), "b": (300,), "x": ()}
ADAMW = functools.partial(adamite.adamw, 1e-2, weight_decay=0.1)
INT8 = ADAMW(moments="int8")


def tree(seed, dtype=jnp.float32, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}


def moved(tx, engine, **extra):
    """``(g, state, p) -> (p, state)``: an update, and the sum."""

    def run(g, state, p):
        updates, state = tx.update(g, state, p, engine=engine, **extra)
        return optax.apply_updates(p, updates), state

    return run


def taken(function, *of):
    """The engines that take the leaves. A leaf that is stepped in two branches of a condition counts once."""
    with recorded() as choices:
        jax.eval_shape(lambda *of: function(*of), *of)
    return list({choice.path: choice.engine for choice in choices}.values())


@pytest.mark.few(5)
@pytest.mark.parametrize("engine", ["native", "pallas"])
@pytest.mark.parametrize("gradients", ["float32", "bfloat16"])
@pytest.mark.parametrize("rounding", [None, *ROUNDINGS])
@pytest.mark.parametrize("name", STORAGES)
def test_every_storage_rounding_and_dtype(name, rounding, gradients, engine):
    tx, dtype = ADAMW(moments=STORAGES[name], rounding=rounding), jnp.bfloat16 if rounding else jnp.float32
    p = tree(0, dtype)
    state = tx.init(p)
    g = tree(1, gradients)
    found = set(taken(moved(tx, engine), g, state, p))
    # The library has no kernels for updates of leaves that are float32 throughout, and none for float8.
    plain = rounding is None and gradients == "float32"
    with_kernel = {"float32": not plain, "bfloat16": True, "int8": True, "float8": not plain}[name]
    without = name == "float8" or (plain and name != "bfloat16")
    assert found == ({engine} if engine == "pallas" else set([engine] * with_kernel + ["xla"] * without))
    ours, theirs = jax.jit(moved(tx, engine)), jax.jit(moved(tx, "xla"))
    for seed in (1, 2):
        g = tree(seed, gradients)
        assert_close(ours(g, state, p), after := theirs(g, state, p))
        p, state = after


def test_which_updates_auto_gives_to_kernels():
    """Those of leaves of which anything is not float32."""
    for tx, p_dtype, g_dtype, engine in (
        (ADAMW(), "float32", "float32", "xla"),
        (ADAMW(), "float32", "bfloat16", "native"),
        (ADAMW(), "bfloat16", "bfloat16", "native"),
        (ADAMW(mu_dtype=jnp.bfloat16), "float32", "float32", "xla"),  # as Optax has it
        (ADAMW(moments="bfloat16"), "float32", "float32", "native"),
    ):
        p, g = tree(0, p_dtype), tree(1, g_dtype)
        assert set(taken(tx.update, g, tx.init(p), p)) == {engine}
    p = tree(0)
    assert taken(INT8.update, p, INT8.init(p), p) == ["xla", "native", "native", "xla"]  # b and x are float32
    assert set(taken(functools.partial(INT8.update, engine="xla"), p, INT8.init(p), p)) <= {"xla"}


@pytest.mark.parametrize("engine", ["native", pytest.param("pallas", marks=pytest.mark.more)])
def test_without_params_and_without_gradients(engine):
    tx, p, g = adamite.adam(1e-2, moments="int8"), tree(0), tree(1)
    state = tx.init(p)
    ours, theirs = (jax.jit(functools.partial(tx.update, engine=e))(g, state) for e in (engine, "xla"))
    assert_close(ours, theirs)
    for way in (jax.jit, lambda f: f):
        some = {**g, "w": None}
        updates, after = way(functools.partial(INT8.update, engine=engine))(some, INT8.init(p), p)
        assert updates["w"] is None
        assert_same_bits(jax.tree.map(lambda x: x, after[0].mu.codes["w"]), state[0].mu.codes["w"])
        wanted = jax.jit(functools.partial(INT8.update, engine="xla"))(some, INT8.init(p), p)
        assert_close((updates, after), wanted)


def test_extra_arguments_are_ignored_and_engines_are_checked():
    p = tree(0)
    assert_same_bits(
        jax.jit(moved(INT8, "auto", value=1.0, anything="at all"))(p, INT8.init(p), p),
        jax.jit(moved(INT8, "auto"))(p, INT8.init(p), p),
    )
    with pytest.raises(ValueError, match=r"^engine must be one of"):
        INT8.update(p, INT8.init(p), p, engine="nonsense")


# Transformations of JAX.

QUANTIZED = {"w": SHAPES["w"], "v": SHAPES["v"]}
P, G = tree(0, shapes=QUANTIZED), tree(1, shapes=QUANTIZED)
STATE = INT8.init(P)


@pytest.fixture(scope="module")
def alone():
    return jax.jit(lambda *of: INT8.update(*of))(G, STATE, P)


def stacked(of):
    return jax.tree.map(lambda x: jnp.stack([x, x]), of)


def first(of):
    return jax.tree.map(lambda x: x[0], of)


def batched(*of):
    return first(jax.vmap(INT8.update)(*stacked(of)))


def batched_along_the_last_axis(g, state, p):
    last = jax.tree.map(lambda x: jnp.stack([x, x], -1), g)
    return first(jax.vmap(lambda g: INT8.update(g, state, p), -1)(last))


def scanned(*of):
    return jax.lax.scan(lambda _, i: (None, INT8.update(*of)), None, jnp.arange(2))[1]


def traced_alone(g, state, p):
    return INT8.update({"w": g["w"], "v": G["v"]}, STATE, P)


def loop(*of):
    start = jax.tree.map(jnp.zeros_like, jax.eval_shape(INT8.update, *of))
    return jax.lax.fori_loop(0, 2, lambda _, __: INT8.update(*of), start)


WAYS = {
    "vmap": batched,
    "vmap along the last axis": batched_along_the_last_axis,
    "vmap of vmap": lambda *of: first(first(jax.vmap(jax.vmap(INT8.update))(*stacked(stacked(of))))),
    "vmap of a part": lambda g, s, p: first(jax.vmap(lambda g: INT8.update(g, s, p))(stacked(g))),
    "vmap of nothing": lambda *of: jax.vmap(lambda i: (i, INT8.update(*of)), out_axes=(0, None))(jnp.arange(2))[1],
    "scan": lambda *of: first(scanned(*of)),
    "fori_loop": loop,
    "cond": lambda *of: jax.lax.cond(of[0]["w"][0, 0] < 9, INT8.update, lambda g, s, p: (g, s), *of),
    "vmap of cond": lambda *of: first(
        jax.vmap(lambda on: jax.lax.cond(on, INT8.update, lambda g, s, p: (g, s), *of))(jnp.array([True, False]))
    ),
    "jit": lambda *of: jax.jit(INT8.update)(*of),
    "checkpoint": lambda *of: jax.checkpoint(INT8.update)(*of),
    "vjp": lambda g, s, p: jax.vjp(lambda g: INT8.update(g, s, p), g)[0],
    "linearize": lambda g, s, p: (jax.linearize(lambda g: INT8.update(g, s, p)[0], g)[0], INT8.update(g, s, p)[1]),
    "closed over": lambda *of: jax.jit(lambda: INT8.update(*of))(),
    "one leaf traced": traced_alone,
}  # fmt: skip


@pytest.mark.few(5)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("jitted", [True, False])
def test_transformed_by_jax(alone, way, jitted):
    """XLA's updates may differ by a rounding; the state and the kernels' updates do not."""
    run = (lambda *of: WAYS[way](*of)) if not jitted else jax.jit(lambda *of: WAYS[way](*of))
    found = run(G, STATE, P)
    if way in ("vjp", "linearize"):  # of functions that are differentiated the numbers are XLA's
        return assert_close(found, alone)
    return assert_same_bits(found, alone)


def test_all_is_closed_over(alone):
    assert_same_bits(jax.jit(lambda: INT8.update(G, STATE, P))(), alone)


@pytest.mark.parametrize("engine", ["native", "pallas"])
@pytest.mark.parametrize("way", ["grad", "checkpoint", "jvp", "vmap of grad", "grad of vmap"])
@pytest.mark.few(4)
def test_derivatives_are_those_of_xlas_update(way, engine):
    def loss(engine, g):
        run = functools.partial(INT8.update, engine=engine)
        run = jax.checkpoint(run) if way == "checkpoint" else run
        return sum(jnp.sum(u**2) for u in jax.tree.leaves(run(g, STATE, P)[0]))

    of = {
        "grad": lambda e: jax.grad(functools.partial(loss, e)),
        "checkpoint": lambda e: jax.grad(functools.partial(loss, e)),
        "jvp": lambda e: lambda g: jax.jvp(functools.partial(loss, e), (g,), (g,))[1],
        "vmap of grad": lambda e: lambda g: jax.vmap(jax.grad(functools.partial(loss, e)))(stacked(g)),
        "grad of vmap": lambda e: jax.grad(lambda g: jnp.sum(jax.vmap(functools.partial(loss, e))(stacked(g)))),
    }[way]
    ours, theirs = (jax.jit(of(e))(G) for e in (engine, "xla"))
    assert all(np.any(np.asarray(x)) for x in jax.tree.leaves(ours))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-9), ours, theirs)


@pytest.mark.parametrize("donated", [(), (1,), (1, 2), (0, 1)], ids=str)
def test_what_is_donated_is_gone_and_nothing_else_is_changed(alone, donated):
    """An update may lie where its gradient did, but only where the gradient was given away."""
    of = jax.tree.map(jnp.copy, (G, STATE, P))
    step = jax.jit(lambda *of: INT8.update(*of), donate_argnums=donated)
    assert_same_bits(step(*of), alone)
    for number, (x, before) in enumerate(zip(of, (G, STATE, P), strict=True)):
        gone = {leaf.is_deleted() for leaf in jax.tree.leaves(x)}
        assert gone == {number in donated}
        if number not in donated:
            assert_same_bits(x, before)


def test_nothing_is_copied_where_all_is_donated():
    """The update lies where the gradient did. Where the gradient is still the caller's, it has a place of its own."""

    def copies(*donated):
        program = jax.jit(lambda *of: INT8.update(*of), donate_argnums=donated).lower(G, STATE, P).compile().as_text()
        return len(re.findall(r"= f32\[(?:16,512|3,40,300)\]\S* copy\(", program))

    assert (copies(0, 1), copies(1)) == (0, len(G))


def test_a_gradient_that_is_used_again_is_not_changed(alone):
    """The update is written over a gradient whose last use it is."""

    @jax.jit
    def step(g, state, p):
        g = jax.tree.map(lambda x: x * 1, g)
        updates, state = INT8.update(g, state, p)
        return (updates, state), jax.tree.map(lambda x, u: (x, x + u), g, updates)

    found, used = step(G, STATE, P)
    assert_same_bits(found, alone)
    for name in G:
        assert_same_bits(used[name], (G[name], G[name] + alone[0][name]))


# Wrappers of Optax.


def injected(make, **how):
    return optax.inject_hyperparams(make, static_args=("moments",))(1e-2, weight_decay=0.1, **how)


LABELS = {"w": "on", "v": "on", "b": "on", "x": "off"}
WRAPPERS = {
    "partition": lambda make, **how: optax.partition(
        {"on": make(1e-2, weight_decay=0.1, **how), "off": optax.set_to_zero()}, LABELS
    ),
    "masked": lambda make, **how: optax.masked(
        make(1e-2, weight_decay=0.1, **how), {name: label == "on" for name, label in LABELS.items()}
    ),
    "inject_hyperparams": injected,
    "chain": lambda make, **how: optax.chain(
        optax.clip_by_global_norm(1.0), make(1e-2, weight_decay=0.1, **how), optax.scale(0.5)
    ),
    "named_chain": lambda make, **how: optax.named_chain(
        ("clip", optax.clip(0.5)), ("adam", make(1e-2, weight_decay=0.1, **how))
    ),
    "MultiSteps": lambda make, **how: optax.MultiSteps(
        make(1e-2, weight_decay=0.1, **how), 1
    ).gradient_transformation(),
    "apply_if_finite": lambda make, **how: optax.apply_if_finite(make(1e-2, weight_decay=0.1, **how), 3),
}


@pytest.mark.few(5)
@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("moments", ["int8", "bfloat16"])
def test_inside_of_optaxs_wrappers(name, moments):
    """The kernels are taken; ``engine="xla"`` is passed through to them as an extra argument."""
    tx, p, g = WRAPPERS[name](adamite.adamw, moments=moments), tree(0), tree(1)
    state = tx.init(p)
    stepped = [name_ for name_ in LABELS if name not in ("partition", "masked") or LABELS[name_] == "on"]
    few_bits = [name_ for name_ in stepped if moments == "bfloat16" or name_ in QUANTIZED]
    assert taken(tx.update, g, state, p).count("native") == len(few_bits)
    assert "native" not in taken(functools.partial(tx.update, engine="xla"), g, state, p)
    run = jax.jit(moved(tx, "auto"))
    with_xla = jax.jit(moved(tx, "xla"))
    for seed in (1, 2):
        g = tree(seed)
        ours, theirs = run(g, state, p), with_xla(g, state, p)
        assert_close((ours[0], ()), (theirs[0], ()))
        for a, b in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(theirs[1]), strict=True):
            assert np.mean(~np.isclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=1e-2, atol=1e-6)) < 1e-3
        p, state = theirs


@pytest.mark.parametrize("name", WRAPPERS)
def test_float32_has_optaxs_bits_inside_of_optaxs_wrappers(name):
    p, g = tree(0), tree(1)
    ours = WRAPPERS[name](adamite.adamw, moments="float32")
    theirs = (
        optax.inject_hyperparams(optax.adamw)(1e-2, weight_decay=0.1)
        if name == "inject_hyperparams"
        else WRAPPERS[name](optax.adamw)
    )
    found, wanted = (jax.jit(tx.update)(g, tx.init(p), p)[0] for tx in (ours, theirs))
    assert_same_bits(found, wanted)


@pytest.mark.more
def test_lookahead():
    p = optax.LookaheadParams(tree(0), tree(0))
    tx = optax.lookahead(INT8, sync_period=2, slow_step_size=0.5)
    state = tx.init(p)
    for seed in (1, 2):
        updates, state = jax.jit(tx.update)(tree(seed), state, p)
        p = optax.apply_updates(p, updates)
    inner, q = INT8.init(tree(0)), tree(0)
    for seed in (1, 2):
        updates, inner = jax.jit(INT8.update)(tree(seed), inner, q)
        q = optax.apply_updates(q, updates)
    jax.tree.map(lambda x, y, z: np.testing.assert_allclose(x, (y + z) / 2, atol=1e-6), p.slow, tree(0), q)


HYPERPARAMETERS = {"b1": 0.8, "b2": 0.99, "eps": 1e-6, "weight_decay": 0.2}


@pytest.mark.few(2)
@pytest.mark.parametrize("way", ["update", "step"])
@pytest.mark.parametrize("engine", ["native", "pallas", "xla"])
def test_numbers_that_are_computed_under_jit(way, engine):
    """The transformation is built there from them, and its rule closes over them."""

    def run(numbers, g, state, p):
        tx = adamite.adamw(1e-2, **numbers, moments="int8")
        if way == "step":
            return tx.step(g, state, p, engine=engine)
        updates, state = tx.update(g, state, p, engine=engine)
        return optax.apply_updates(p, updates), state

    computed = jax.jit(run)(HYPERPARAMETERS, G, STATE, P)
    assert_close(computed, jax.jit(functools.partial(run, HYPERPARAMETERS))(G, STATE, P), ulps=64)

    def end(engine, numbers):
        tx = adamite.adamw(1e-2, **numbers, moments="int8")
        p, _ = moved(tx, engine)(G, STATE, P) if way == "update" else tx.step(G, STATE, P, engine=engine)
        return sum(jnp.sum(x) for x in jax.tree.leaves(p))

    ours, theirs = (jax.jit(jax.grad(functools.partial(end, e)))(HYPERPARAMETERS) for e in (engine, "xla"))
    assert ours["weight_decay"] != 0
    for name, derivative in ours.items():
        np.testing.assert_allclose(derivative, theirs[name], rtol=1e-4, atol=1e-6)


# What is no ordinary tree.


def agree(tx, g, state, p):
    """Eagerly, under jit and by XLA."""
    found = jax.jit(lambda *of: tx.update(*of))(g, state, p)
    wanted = jax.jit(lambda *of: tx.update(*of, engine="xla"))(g, state, p)
    eager = tx.update(g, state, p)
    for other in (wanted, eager):
        assert jax.tree.structure(found) == jax.tree.structure(other)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(other), strict=True):
            assert (x.shape, x.dtype, x.weak_type) == (y.shape, y.dtype, y.weak_type)
            x, y = (np.asarray(z) if z.dtype.kind in "iufc" else np.asarray(z, np.float32) for z in (x, y))
            assert np.mean(~np.isclose(x, y, rtol=1e-5, atol=1e-7, equal_nan=True)) < 1e-3 if x.size else True


def of_float16():
    return {"h": jnp.ones((8, 512), jnp.float16), "w": jnp.ones((8, 512)), "b": jnp.ones((8, 512), jnp.bfloat16)}


def of_no_elements():
    return {"none": jnp.zeros((0, 512)), "w": jnp.ones((8, 512)), "number": jnp.float32(2)}


def of_numbers():
    return {"number": 1.5, "w": jnp.ones((8, 512))}


@pytest.mark.parametrize("make", [of_float16, of_no_elements, of_numbers])
def test_leaves_of_other_kinds_beside_those_in_blocks(make):
    p = make()
    agree(INT8, p, INT8.init(p), p)


def test_complex_leaves_beside_those_in_blocks():
    tx = ADAMW(moments=lambda path, leaf: "float32" if jnp.iscomplexobj(leaf) else "int8")
    p = {"c": jnp.ones((8, 512), jnp.complex64), "w": tree(0)["w"]}
    assert taken(tx.update, p, tx.init(p), p) == ["xla", "native"]
    agree(tx, p, tx.init(p), p)


@pytest.mark.more
def test_float64():
    with jax.enable_x64(True):
        p = {"d": jnp.ones((8, 512), jnp.float64), "w": jnp.ones((8, 512), jnp.float32)}
        assert taken(INT8.update, p, INT8.init(p), p) == ["xla", "native"]
        agree(INT8, p, INT8.init(p), p)


def test_weakly_typed_gradients():
    p = tree(0)
    new = jax.jit(lambda x: INT8.update({**G, "w": jax.lax.broadcast(x, (16, 512))}, STATE, {k: p[k] for k in G}))(1.0)
    assert not any(x.weak_type for x in jax.tree.leaves(new))


@pytest.mark.parametrize("way", ["update", "step"])
def test_numpy_arrays(way):
    """Wherever arrays may stand."""
    arrays = jax.tree.map(np.asarray, (G, STATE, P))
    step = functools.partial(getattr(INT8, way))
    wanted = jax.jit(step)(G, STATE, P)
    assert_same_bits(step(*arrays), wanted)
    assert_same_bits(jax.jit(step)(*arrays), wanted)
    assert_same_bits(jax.jit(lambda g: step(g, *arrays[1:]))(G), wanted)
    assert_same_bits(jax.jit(lambda s: step(arrays[0], s, arrays[2]))(STATE), wanted)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_gradients_that_are_not_finite_stay_in_their_blocks(value):
    g = {**G, "w": G["w"].at[3, 300].set(value)}
    updates, _ = jax.jit(lambda *of: INT8.update(*of))(g, STATE, P)
    plain, _ = jax.jit(lambda *of: INT8.update(*of))(G, STATE, P)
    bad = ~np.isfinite(updates["w"])
    assert bad[3, 300]
    assert not bad[:3].any()
    assert_same_bits(updates["w"][:3], plain["w"][:3])
    assert_same_bits(updates["w"][3, :256], plain["w"][3, :256])
    assert_same_bits(updates["v"], plain["v"])


@pytest.mark.more
def test_a_thousand_leaves():
    """In few calls, and traced once for all that are alike."""
    p = [jnp.ones((16, 256))] * 1000
    state = INT8.init(p)
    lowered = jax.jit(lambda *of: INT8.update(*of)).lower(p, state, p)
    assert lowered.compile().as_text().count('custom_call_target="adamite_step"') == -(-1000 // 64)
    updates, _ = INT8.update(p, state, p)
    assert len(updates) == 1000


# Switches of JAX, and what is done to an optimizer.


def test_disable_jit(alone):
    with jax.disable_jit():
        assert_same_bits(INT8.update(G, STATE, P), alone)
        assert_same_bits(jax.jit(lambda *of: INT8.update(*of))(G, STATE, P), alone)


def test_debug_nans(alone):
    with jax.debug_nans(True):
        step = jax.jit(lambda *of: INT8.update(*of))
        assert_same_bits(step(G, STATE, P), alone)
        with pytest.raises(FloatingPointError):
            step(jax.tree.map(lambda x: jnp.asarray(np.full(x.shape, np.nan, np.float32)), G), STATE, P)


def test_types_before_anything_is_computed(alone):
    types = jax.eval_shape(INT8.update, G, STATE, P)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), types) == jax.tree.map(lambda x: (x.shape, x.dtype), alone)
    assert jax.make_jaxpr(INT8.update)(G, STATE, P).out_avals == [jax.typeof(x) for x in jax.tree.leaves(alone)]


def test_two_optimizers_in_one_program(alone):
    other = ADAMW(moments="int8", b1=0.5)
    both = jax.jit(lambda: (INT8.update(G, STATE, P), other.update(G, STATE, P)))()
    assert_same_bits(both, (alone, jax.jit(other.update)(G, STATE, P)))


@pytest.mark.more
def test_caches_that_are_cleared_between_steps(alone):
    for step in (INT8.update, jax.jit(INT8.update)):
        for _ in range(2):
            assert_same_bits(step(G, STATE, P), alone)
            jax.clear_caches()


@pytest.mark.more
def test_threads_that_trace_at_once(alone):
    jax.clear_caches()
    found = {}

    def run(number):
        found[number] = jax.jit(lambda *of: INT8.update(*of))(G, STATE, P)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for of_thread in found.values():
        assert_same_bits(of_thread, alone)


def test_an_optimizer_that_was_used_is_copied_and_sent(alone):
    cloudpickle = pytest.importorskip("cloudpickle")
    for tx in (copy.deepcopy(INT8), cloudpickle.loads(cloudpickle.dumps(INT8))):
        assert_same_bits(jax.jit(lambda *of: tx.update(*of))(G, STATE, P), alone)  # noqa: B023
        assert_same_bits(tx.update(G, STATE, P), alone)
