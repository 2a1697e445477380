"""What every optimizer keeps to with every storage and rounding: one type for ever, one program, one pass in slices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import adamite
from adamite.engines import slices, xla
from adamite.storage import Blockwise
from bits import assert_same_bits, trajectory, types
from specs import SPECS

pytestmark = pytest.mark.few(1)

MOMENTS = {"bfloat16": "bfloat16", "int8": "int8", "float8": ("int8", "float8"), "half": ("bfloat16", "int8")}
WHOLE_LEAF = {"stable_adamw", "adam_mini"}
each = pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.name not in WHOLE_LEAF], ids=str)
each_moments = pytest.mark.parametrize(
    "moments", [pytest.param(name, marks=() if name == "int8" else pytest.mark.slow) for name in MOMENTS]
)


def tree(seed=0, dtype=jnp.bfloat16):
    """A leaf in blocks, the last one ragged, and a small one."""
    rng = np.random.default_rng(seed)
    return {"large": jnp.asarray(rng.standard_normal((16, 300)), dtype), "small": jnp.asarray(rng.standard_normal(5))}


@each
@each_moments
def test_one_type_one_program_and_state_in_place(spec, moments):
    """Five donated steps: the state's buffers are used again. A missing gradient leaves what is kept of its leaf."""
    rounding = {"rounding": "residual8"} if spec.full and spec.name != "lion mode" else {}
    tx, params = spec.build(moments=MOMENTS[moments], **rounding), tree()
    state = tx.init(params)
    assert types(state) == types(jax.eval_shape(tx.init, params))
    first, traces = types(state), []
    of_large = jnp.float32 if rounding else jnp.bfloat16  # rounded weights need updates that are not

    def step(params, state, g):
        traces.append(1)
        updates, state = tx.update(g, state, params)
        assert {name: u.dtype for name, u in updates.items()} == {"large": of_large, "small": jnp.float32}
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    for i in range(5):
        given = [x for x in jax.tree.leaves((params, state)) if x.size]
        params, state = step(params, state, tree(i))
        assert all(x.is_deleted() for x in given)
    assert len(traces) == 1
    assert types(state) == first
    assert params["large"].dtype == jnp.bfloat16
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves((params, state)))

    _, after = jax.jit(tx.update)(tree(9) | {"large": None}, state, params)
    now = dict(jax.tree_util.tree_leaves_with_path(after))
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        if "large" in jax.tree_util.keystr(path):
            assert_same_bits(now[path], x)


@each
@each_moments
@pytest.mark.parametrize("gradients", ["bfloat16", "float16"])
def test_16_bit_gradients_do_not_round_the_updates_of_float32_weights(spec, moments, gradients):
    """Nothing may be lost that the weight could hold, in an update or a step, by whatever engine."""
    tx, params = spec.build(moments=MOMENTS[moments]), tree(0, jnp.float32)
    short = jax.tree.map(lambda g: g.astype(gradients), tree(1))
    long = jax.tree.map(lambda g: g.astype(jnp.float32), short)
    for do in (tx.update, tx.step):
        (ours, _), (expected, _) = (jax.jit(do)(g, tx.init(params), params) for g in (short, long))
        assert types(ours) == types(expected)
        for name in ours:  # XLA may fuse otherwise where it reads other dtypes
            np.testing.assert_allclose(ours[name], expected[name], rtol=1e-5, atol=1e-9)


@pytest.mark.slow
@each
@each_moments
def test_close_to_float32(spec, moments):
    """After ten steps within 5% of the way; a small leaf, which stays float32, is there to the bit."""
    tx, plain = spec.build(moments=MOMENTS[moments]), spec.build()
    params, gradients = tree(0, jnp.float32), jax.tree.map(lambda *g: jnp.stack(g), *(tree(i) for i in range(10)))
    (end, _), (lean, _) = trajectory(tx, params, gradients)
    (goal, _), (full, _) = trajectory(plain, params, gradients)
    for name in params:
        assert np.isfinite(lean[name]).all()
        way = np.linalg.norm(goal[name] - params[name])
        assert np.linalg.norm(end[name] - goal[name]) < 0.05 * way
    if moments in ("int8", "float8"):
        assert_same_bits(lean["small"], full["small"])


@pytest.mark.parametrize("name", ["nadam", "rmsprop", "adabelief"])
def test_a_small_leaf_of_an_int8_optimizer_is_stepped_as_float32(name):
    """By Optax's operations: no product is rounded before a sum, as in leaves of few bits (`engines.products`)."""
    (spec,) = (spec for spec in SPECS if spec.name == name)

    def roundings(moments, shape):
        tx, params = spec.build(moments=moments), jnp.ones(shape)
        update = jax.jit(functools.partial(tx.update, engine="xla"))
        return update.lower(params, tx.init(params), params).as_text().count("is_finite")

    assert roundings("int8", (5,)) == roundings("float32", (5,)) == roundings("float32", (16, 300)) == 0
    assert roundings("int8", (16, 300)) > 0


SLOW_SHAPES = [pytest.param(shape, marks=pytest.mark.slow) for shape in [(5000,), (7, 3, 512), (256, 40), (1, 70_000)]]


@pytest.mark.more
@pytest.mark.parametrize("shape", [(40, 300), (37, 1, 256), *SLOW_SHAPES])
@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_slices_give_the_bits_of_the_whole(shape, devices, monkeypatch):
    """A leaf of one slice, of many, of more than there are rows: the last one ragged, or overlapping."""
    params = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.bfloat16)
    gradients = jnp.asarray(np.random.default_rng(1).standard_normal((3, *shape)), jnp.bfloat16)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    results = []
    for size in (2**30, 2**12, 2**10):
        monkeypatch.setattr(slices, "SLICE", size)
        monkeypatch.setattr(xla, "SLICED", 0 if size < 2**30 else 2**30)
        tx = adamite.adamw(1e-3, moments="int8", rounding="residual8")
        results.append(trajectory(tx, params, gradients))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


def test_a_rule_that_does_not_count_is_counted():
    tx = adamite.scale_by_rms(moments="int8")
    state = tx.init(tree())
    assert state.count == 0
    assert type(state.inner) is optax.ScaleByRmsState
    assert tx.update(tree(1), state)[1].count == 1
    assert type(adamite.trace(0.9, moments=Blockwise(seed=None)).init(tree())) is optax.TraceState


@pytest.mark.parametrize("wrap", ["masked", "partition", "MultiSteps", "apply_if_finite", "inject_hyperparams"])
def test_inside_optax_wrappers(wrap):
    params, labels = tree(), {"large": "a", "small": "b"}
    lean = adamite.adamw(1e-3, moments="int8", rounding="residual8")
    tx = {
        "masked": lambda: optax.masked(lean, {"large": True, "small": False}),
        "partition": lambda: optax.partition({"a": lean, "b": optax.sgd(1e-3)}, labels),
        "MultiSteps": lambda: optax.MultiSteps(lean, 2),
        "apply_if_finite": lambda: optax.apply_if_finite(lean, 3),
        "inject_hyperparams": lambda: optax.inject_hyperparams(
            adamite.adamw, static_args=("moments", "rounding"), hyperparam_dtype=jnp.float32
        )(1e-3, moments="int8", rounding="residual8"),
    }[wrap]()
    state = tx.init(params)

    @jax.jit
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    start = params
    for i in range(4):
        before = types(state)
        # Updates are float32, and apply_if_finite wants the gradients to be what the updates are.
        params, state = step(params, state, tree(i, jnp.float32 if wrap == "apply_if_finite" else jnp.bfloat16))
        assert types(state) == before
    assert (params["large"] != start["large"]).any()
    assert params["large"].dtype == jnp.bfloat16


@pytest.mark.more
def test_under_vmap_members_are_as_alone():
    """They share their random bits."""
    tx = adamite.adamw(1e-3, moments="int8", rounding="residual8")
    members = [tree(i) for i in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)
    updates, _ = jax.jit(jax.vmap(tx.update))(stacked, jax.vmap(tx.init)(stacked), stacked)
    for i, member in enumerate(members):
        alone, _ = jax.jit(tx.update)(member, tx.init(member), member)
        landed = optax.apply_updates(member, jax.tree.map(lambda u, i=i: u[i], updates))
        assert_same_bits(landed["large"], optax.apply_updates(member, alone)["large"])


@pytest.mark.more
def test_one_line_makes_a_flax_loop_lean():
    """`adamite.adamw(3e-4, moments="int8", rounding="residual8")` where `optax.adamw(3e-4)` stood."""

    def train(tx, dtype):
        model = nnx.Linear(64, 128, rngs=nnx.Rngs(0), param_dtype=dtype)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        x = jax.random.normal(jax.random.key(1), (256, 64))
        y = jnp.sin(x @ jax.random.normal(jax.random.key(2), (64, 128)) / 8)

        @nnx.jit
        def step(model, optimizer):
            loss, gradients = nnx.value_and_grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
            optimizer.update(model, gradients)
            return loss

        losses = [float(step(model, optimizer)) for _ in range(300)]
        assert model.kernel[...].dtype == dtype
        return losses[0] - losses[-1], sum(x.nbytes for x in jax.tree.leaves(nnx.state(optimizer)))

    fell, size = train(optax.adamw(3e-4), jnp.float32)
    lean_fell, lean_size = train(adamite.adamw(3e-4, moments="int8", rounding="residual8"), jnp.bfloat16)
    assert abs(lean_fell / fell - 1) < 0.02
    assert lean_size < 0.5 * size
