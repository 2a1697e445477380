"""Weights from one rounding to another: nothing is lost that the new one can hold, and the run goes on."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import adamite
from adamite import convert_weights, full_weights
from adamite.convert_weights import keys
from bits import assert_same_bits

BFLOAT16, FLOAT16 = jnp.bfloat16, jnp.float16
ROUNDINGS = [None, "nearest", "stochastic", "residual8", "residual16"]


def draw(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((16, 64)) * 10 ** rng.uniform(-3, 3, (16, 64))
    return {"w": jnp.asarray(w, dtype), "small": {"b": jnp.asarray(rng.standard_normal(5), dtype)}}


def make(rounding, **options):
    return adamite.adamw(1e-2, rounding=rounding, **options)


def train(tx, params, state=None, steps=3):
    state = tx.init(params) if state is None else state
    update = jax.jit(tx.update)
    for seed in range(steps):
        g = jax.tree.map(lambda p: jnp.sin(p.astype(jnp.float32) + seed), params)  # noqa: B023 (called at once)
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype.name), tree)


@pytest.mark.few(4)
@pytest.mark.parametrize(("before", "after"), [*itertools.product(ROUNDINGS, ROUNDINGS)])
def test_full_weights_stay(before, after):
    """To half a unit in the last place that the new rounding has; the state is as `init` makes it."""
    dtype = BFLOAT16 if after else jnp.float32
    tree = train(make(before), draw(BFLOAT16 if before else jnp.float32))
    params, state = convert_weights(*tree, make(after), dtype)
    assert types((params, state)) == types((draw(dtype), jax.eval_shape(make(after).init, draw(dtype))))
    assert_same_bits(state[0], tree[1][0])
    bits = {"nearest": 8, "stochastic": 8, "residual8": 16}.get(after, 24)
    for was, now in zip(*map(jax.tree.leaves, (full_weights(*tree), full_weights(params, state))), strict=True):
        distance = np.abs(np.asarray(was, np.float64) - np.asarray(now, np.float64))
        assert (distance <= np.abs(was) * (2.0**-bits if bits < 24 else 0)).all()
        if bits == 16:
            assert (distance > 0).any() or before not in (None, "residual16")
    train(make(after), params, state, steps=1)


@pytest.mark.parametrize(
    ("dtype", "rounding"), [(BFLOAT16, "residual8"), (BFLOAT16, "residual16"), (FLOAT16, "residual8")]
)
def test_there_and_back_are_the_same_bits(dtype, rounding):
    tree = train(make(rounding), jax.tree.map(lambda p: jnp.clip(p, -100, 100), draw(dtype)))
    wide = convert_weights(*tree, make(None), "float32")
    assert_same_bits(wide[0], full_weights(*tree))
    again = convert_weights(*wide, make(rounding), dtype)
    assert_same_bits(full_weights(*again), wide[0])
    assert_same_bits(again[0], tree[0])
    assert_same_bits(again[1][3].residual, tree[1][3].residual)


def test_the_count_goes_on_or_starts_at_zero():
    tree = train(make("stochastic"), draw(BFLOAT16))
    params, state = convert_weights(*tree, make("residual8"))
    assert state[3].count == 3
    assert convert_weights(params, state, make("residual16"))[1][3].count == 3
    plain = convert_weights(params, state, make(None), jnp.float32)
    assert convert_weights(*plain, make("residual8"), BFLOAT16)[1][3].count == 0


def test_a_run_goes_on_as_float32_would():
    """With the moments and the full weights, residual16 is float32 to the bit."""
    tree = train(make(None), draw())
    straight, _ = train(make(None), *tree, steps=1)
    params, state = convert_weights(*tree, make("residual16"), BFLOAT16)
    g = jax.tree.map(lambda p: jnp.sin(p), tree[0])
    updates, state = jax.jit(functools.partial(make("residual16").update, engine="xla"))(g, state, params)
    for x, y in zip(
        *map(jax.tree.leaves, (straight, full_weights(optax.apply_updates(params, updates), state))), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=2**-22)


def test_values_that_are_not_finite_or_large():
    params = {"w": jnp.array([jnp.nan, jnp.inf, -jnp.inf, 3.4e38, -0.0, 1e-45, 70000.0])}
    state = make(None).init(params)
    for rounding, dtype in (("residual8", BFLOAT16), ("residual16", BFLOAT16), ("nearest", FLOAT16)):
        w = convert_weights(params, state, make(rounding), dtype)[0]["w"]
        assert jnp.isnan(w[0])
        np.testing.assert_array_equal(w[1:3], [np.inf, -np.inf])
        assert jnp.isfinite(w[3:]).all()
        assert w[4] == 0


WRAPPERS = {
    "masked": lambda make: optax.masked(make(), {"w": True, "small": False}),
    "partition": lambda make: optax.partition({"a": make(), "b": make()}, {"w": "a", "small": {"b": "b"}}),
    "frozen": lambda make: optax.partition({"a": make(), "b": optax.set_to_zero()}, {"w": "a", "small": {"b": "b"}}),
    "guard": lambda make: adamite.skip_nonfinite(make()),
    "accumulate": lambda make: adamite.accumulate(make(), 2),
    "chain": lambda make: optax.chain(optax.clip_by_global_norm(1.0), make()),
    "telemetry in MultiSteps": lambda make: optax.MultiSteps(
        adamite.with_telemetry(make()), 2
    ).gradient_transformation(),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_inside_wrappers(wrapper):
    wrap = WRAPPERS[wrapper]
    lean, plain = (wrap(lambda rounding=rounding: make(rounding)) for rounding in ("residual8", None))
    wide = draw()
    state = plain.init(wide)
    params, after = convert_weights(wide, state, lean, BFLOAT16)
    assert types(after) == types(jax.eval_shape(lean.init, draw(BFLOAT16)))
    back = convert_weights(params, after, plain, jnp.float32)
    assert types(back) == types((wide, state))
    kept = {"masked": ["w"], "frozen": ["w"]}.get(wrapper, ["w", "small"])
    for name in ("w", "small"):
        for x, y in zip(*(jax.tree.leaves(tree[name]) for tree in (wide, back[0])), strict=True):
            far = np.abs(np.asarray(x) - np.asarray(y)) / np.abs(x)
            assert far.max() <= (2**-16 if name in kept else 2**-8)
            assert name in kept or far.max() > 2**-12


def test_the_same_names_inside_and_out_under_a_mask():
    """What a mask leaves out tells which tree a residual is of."""
    params = {"b": jnp.full(4, 1.001), "x": {"b": jnp.full(4, 3.003)}}
    mask = {"b": True, "x": {"b": False}}
    lean, plain = (optax.masked(make(rounding), mask) for rounding in ("residual8", None))
    new, state = convert_weights(params, plain.init(params), lean, BFLOAT16)
    back, _ = convert_weights(new, state, plain, "float32")
    np.testing.assert_allclose(back["b"], 1.001, rtol=2**-16)
    np.testing.assert_array_equal(back["x"]["b"], new["x"]["b"].astype(jnp.float32))


def test_leaf_by_leaf():
    def dtype(path, leaf):
        return BFLOAT16 if "w" in jax.tree_util.keystr(path) else leaf.dtype

    params, state = convert_weights(draw(), make(None).init(draw()), make("residual8"), dtype)
    assert params["w"].dtype == BFLOAT16
    assert_same_bits(params["small"], draw()["small"])
    assert state[3].residual["small"]["b"].shape == (1,)
    assert_same_bits(convert_weights(params, state, make(None), "float32")[0]["small"], draw()["small"])


def test_models_of_nnx():
    model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, make(None), wrt=nnx.Param)
    grads = nnx.grad(lambda model: jnp.sum(model(jnp.ones(64)) ** 2))
    optimizer.update(model, grads(model))
    params, state = nnx.as_pure((nnx.state(model, nnx.Param), optimizer.opt_state))
    new, lean = convert_weights(params, state, make("residual8"), BFLOAT16)
    for x, y in zip(*map(jax.tree.leaves, (params, full_weights(new, lean))), strict=True):
        np.testing.assert_allclose(x, y, rtol=2**-16)
    nnx.update(model, new)
    optimizer = nnx.Optimizer(model, make("residual8"), wrt=nnx.Param)
    optimizer.opt_state = jax.tree.structure(optimizer.opt_state).unflatten(jax.tree.leaves(lean))
    optimizer.update(model, grads(model))
    assert model.kernel[...].dtype == BFLOAT16
    assert nnx.as_pure(optimizer.opt_state)[0].count == 2


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("jit", [False, True])
def test_shardings_stay_and_bits_are_those_of_one_device(axes, jit):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axes,) * 2)
    home = {"w": NamedSharding(mesh, P("data", "model")), "small": {"b": NamedSharding(mesh, P())}}
    alone = draw(), make(None).init(draw())
    params = jax.device_put(draw(), home)

    def there(params, state):
        return convert_weights(params, state, make("residual8"), BFLOAT16)

    found = (jax.jit(there) if jit else there)(params, make(None).init(params))
    assert_same_bits(jax.device_get(found), jax.device_get(there(*alone)))
    born = make("residual8").init(jax.tree.map(lambda p: p.astype(BFLOAT16), params))
    for x, like in zip(*map(jax.tree.leaves, (found, (params, born))), strict=True):
        assert x.sharding.is_equivalent_to(like.sharding, x.ndim)


PLAIN = {"w": jnp.ones((64, 64))}
STATE = make(None).init(PLAIN)


class TestErrors:
    @pytest.mark.parametrize(
        ("tx", "text"),
        [
            (
                make("residual8", moments="int8"),
                "state must be that of tx but for the rounding: state[0].mu['w'] has no",
            ),
            (adamite.lion(1e-3), "state must be that of tx but for the rounding: state[0].nu has no counterpart"),
            (adamite.adabelief(1e-3), "state[0] is a ScaleByAdamState, and tx.init(params)[0] is a ScaleByBeliefState"),
            (optax.sgd(1e-3), "state must be that of tx but for the rounding"),
        ],
    )
    def test_another_optimizer(self, tx, text):
        with pytest.raises(ValueError, match=re.escape(text)):
            convert_weights(PLAIN, STATE, tx, BFLOAT16)

    def test_other_parameters(self):
        with pytest.raises(ValueError, match=re.escape("state[0].mu['w'] has no counterpart in tx.init(params)")):
            convert_weights({"v": jnp.ones((64, 64))}, STATE, make("residual8"), BFLOAT16)
        with pytest.raises(
            ValueError, match=re.escape("state[0].mu['w'] must have the shape (2, 2) of tx's, got (64, ")
        ):
            convert_weights({"w": jnp.ones((2, 2))}, STATE, make("residual8"), BFLOAT16)

    def test_float16_has_no_residual16(self):
        with pytest.raises(ValueError, match=r"params\['w'\] is float16; residual16 is for bfloat16"):
            convert_weights(PLAIN, STATE, make("residual16"), FLOAT16)

    @pytest.mark.parametrize("dtype", ["int8", "complex64", "float8_e4m3fn"])
    def test_dtypes_that_are_none(self, dtype):
        with pytest.raises(ValueError, match="dtype must be None or a floating dtype"):
            convert_weights(PLAIN, STATE, make("nearest"), dtype)


@pytest.mark.parametrize("path", ["", "[0]['a'].mu['it\\'s']", "['mlp/~/linear_0']['w'].value", '["it\'s"][3].x'])
def test_keys_of_a_path(path):
    assert "".join(keys(path)) == path


def test_keys_are_those_of_the_tree():
    tree = {"a.b": [({"c[": 1},)], "it's": (2,), "3": {3: {'"': 4}}}
    for path, _ in jax.tree_util.tree_leaves_with_path(tree):
        assert keys(jax.tree_util.keystr(path)) == tuple(jax.tree_util.keystr((key,)) for key in path)
