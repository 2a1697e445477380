"""What people pass as target: abstract keys, numbers in place of scalars, the states of Flax, Equinox and Haiku."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import adamite
from adamite.checkpoint import RefusedError, read_manifest, restore, save
from bits import assert_same_bits


def data(tree):
    """Random keys as their numbers."""

    def is_key(x):
        return jnp.issubdtype(getattr(x, "dtype", jnp.int32), jax.dtypes.prng_key)

    return jax.tree.map(lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x), tree)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_abstract_random_keys(tmp_path, impl):
    def tree():
        return {"one": jax.random.key(0, impl=impl), "more": jax.random.split(jax.random.key(1, impl=impl), (8, 2))}

    save(tmp_path, 1, tree())
    for like in (tree(), jax.eval_shape(tree)):
        found = restore(tmp_path, like).tree
        assert_same_bits(data(found), data(tree()))
        assert jax.tree.map(lambda key: key.dtype, found) == jax.tree.map(lambda key: key.dtype, tree())
        assert [str(jax.random.key_impl(key)) for key in found.values()] == [impl] * 2
    other = "rbg" if impl == "threefry2x32" else "threefry2x32"
    with pytest.raises(RefusedError, match=re.escape("tree['one']: saved key<")):
        restore(tmp_path, {"one": jax.random.key(0, impl=other), "more": tree()["more"]})


def test_abstract_random_keys_on_a_mesh(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    keys = jax.device_put(jax.random.split(jax.random.key(0), 16), rows)
    save(tmp_path, 1, keys)
    for sharding in (rows, everywhere):
        like = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=sharding)
        found = restore(tmp_path, like, allow="mesh").tree
        assert_same_bits(data(found), data(keys))
        assert found.sharding.is_equivalent_to(sharding, 1)
    assert restore(tmp_path, keys).tree.sharding.is_equivalent_to(rows, 1)


SCALARS = {
    "an int for an int32": (jnp.int32(7), 0, 7),
    "an int for a uint8 of numpy's": (np.uint8(7), 0, 7),
    "an int for an array of numpy's": (np.array(-(2**40)), 0, -(2**40)),
    "an int32 for an int": (7, jnp.int32(0), jnp.int32(7)),
    "the least int32": (-(2**31), jnp.int32(0), jnp.int32(-(2**31))),
    "a numpy int16 for an int": (7, np.int16(0), np.int16(7)),
    "an abstract uint32 for an int": (7, jax.ShapeDtypeStruct((), jnp.uint32), jnp.uint32(7)),
    "a float for a float32": (jnp.float32(0.1), 0.0, float(np.float32(0.1))),
    "a float for a bfloat16": (jnp.bfloat16(0.5), 0.0, 0.5),
    "a float32 for a float": (0.1, jnp.float32(0), jnp.float32(0.1)),
    "NaN": (float("nan"), jnp.float32(0), jnp.float32(np.nan)),
    "infinity": (float("inf"), jnp.bfloat16(0), jnp.bfloat16(np.inf)),
    "NaN of an array": (jnp.float32(np.nan), 0.0, float("nan")),
    "a bool for a flag": (jnp.array(True), False, True),
    "a flag for a bool": (True, jnp.array(False), jnp.array(True)),
}


@pytest.mark.few(4)
@pytest.mark.parametrize("case", SCALARS)
def test_a_number_and_a_scalar_of_its_kind_are_one(tmp_path, case):
    """The type that comes back is the target's."""
    saved, like, wanted = SCALARS[case]
    save(tmp_path, 1, {"x": saved})
    found = restore(tmp_path, {"x": like}).tree["x"]
    assert type(found) is type(wanted)
    assert getattr(found, "dtype", None) == getattr(wanted, "dtype", None)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


UNFIT = {
    "too large for int32": (2**31, jnp.int32(0), "tree['x']: 2147483648 was saved, which does not fit int32"),
    "too small for int32": (-(2**31) - 1, jnp.int32(0), "tree['x']: -2147483649 was saved, which does not fit int32"),
    "too large for NumPy's": (300, np.uint8(0), "tree['x']: 300 was saved, which does not fit uint8"),
    "negative": (-1, jnp.uint32(0), "tree['x']: -1 was saved, which does not fit uint32"),
    "too large for float32": (1e300, jnp.float32(0), "tree['x']: 1e+300 was saved, which does not fit float32"),
    "a float for a whole number": (jnp.int32(1), 0.0, "tree['x']: saved int32[], now float[]"),
    "a whole number for a float": (0.5, jnp.int32(0), "tree['x']: saved float[], now int32[]"),
    "a flag for a whole number": (1, jnp.array(True), "tree['x']: saved int[], now bool[]"),
    "a bool for a whole number": (jnp.int32(1), True, "tree['x']: saved int32[], now bool[]"),
    "several": (jnp.ones(1, jnp.int32), 0, "tree['x']: saved int32[1], now int[]"),
    "two arrays": (jnp.int32(1), jnp.uint32(1), "tree['x']: saved int32[], now uint32[]"),
    "a key": (jnp.uint32(1), jax.random.key(0), "tree['x']: saved uint32[], now key<fry>[2]"),
}


@pytest.mark.few(4)
@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_is_refused_by_name(tmp_path, case):
    saved, like, text = UNFIT[case]
    save(tmp_path, 1, {"x": saved})
    with pytest.raises(RefusedError, match=re.escape(text)):
        restore(tmp_path, {"x": like})


def test_whole_numbers_of_more_than_64_bits(tmp_path):
    for number in (2**63, -(2**63) - 1):
        with pytest.raises(ValueError, match=r"tree\['n'\] must be a whole number of 64 bits, got -?9223372036854775"):
            save(tmp_path, 1, {"n": number})
    save(tmp_path, 1, {"n": 2**63 - 1})
    assert restore(tmp_path, {"n": 0}).tree == {"n": 2**63 - 1}


def test_a_fresh_train_state_of_linen(tmp_path):
    tx = adamite.adam(0.1)

    def new():
        return TrainState.create(apply_fn=None, params={"w": jnp.ones(3)}, tx=tx)

    @jax.jit
    def step(state):
        traced.append(state.step)
        return state.apply_gradients(grads=state.params)

    traced = []
    state = step(step(new()))
    save(tmp_path, state.step, state, tx)
    found = restore(tmp_path, new(), tx).tree
    assert found.step == 2
    assert type(found.step) is int
    before = len(traced)
    assert step(found).step == 3
    assert len(traced) == before  # the program of a new run
    again = restore(tmp_path, state, tx).tree
    assert again.step.dtype == jnp.int32
    assert_same_bits(data(again.params), data(state.params))
    assert restore(tmp_path, jax.eval_shape(lambda: state), tx).tree.step.dtype == jnp.int32


class Model(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.dense(x)))


def nnx_run(seed, moments="float32"):
    """A model of NNX and its optimizer, after a step."""
    model = Model(nnx.Rngs(seed))
    tx = adamite.adamw(1e-2, moments=moments)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.grad(lambda model: jnp.sum(model(jnp.ones((2, 4)) * seed) ** 2))(model)
    optimizer.update(model, grads)
    return model, optimizer, tx


STATES_OF_NNX = {
    "state": lambda model, optimizer: nnx.state((model, optimizer)),
    "split": lambda model, optimizer: nnx.split(optimizer)[1],
    "filtered": lambda model, optimizer: nnx.split(model, nnx.Param, nnx.BatchStat, ...)[1:],
    "pure": lambda model, optimizer: nnx.to_pure_dict(nnx.state((model, optimizer))),
    "optimizer's": lambda model, optimizer: (nnx.state(model), optimizer.opt_state),
}


@pytest.mark.few(4)
@pytest.mark.parametrize("case", STATES_OF_NNX)
def test_states_of_nnx(tmp_path, case):
    of = STATES_OF_NNX[case]
    model, optimizer, tx = nnx_run(1)
    tree, like = of(model, optimizer), of(*nnx_run(2)[:2])
    save(tmp_path, 1, tree, tx)
    for target in (like, jax.eval_shape(lambda: like)):
        found = restore(tmp_path, target, tx).tree
        assert jax.tree.structure(found) == jax.tree.structure(tree)
        assert_same_bits(data(found), data(tree))


def test_a_model_of_nnx_goes_on(tmp_path):
    model, optimizer, tx = nnx_run(1)
    save(tmp_path, 1, nnx.state((model, optimizer)), tx)
    other, its = nnx_run(2)[:2]
    nnx.update((other, its), restore(tmp_path, nnx.state((other, its)), tx).tree)
    for one in ((model, optimizer), (other, its)):
        one[1].update(one[0], nnx.grad(lambda model: jnp.sum(model(jnp.ones((2, 4))) ** 2))(one[0]))
    assert_same_bits(data(nnx.state((other, its))), data(nnx.state((model, optimizer))))


def test_a_filtered_module_of_equinox(tmp_path):
    def run(seed):
        mlp = eqx.nn.MLP(3, 2, 8, 1, key=jax.random.key(seed))
        params = eqx.filter(mlp, eqx.is_array)
        tx = adamite.adamw(1e-2)
        return mlp, params, tx.init(params), tx

    mlp, params, state, tx = run(1)
    save(tmp_path, 1, (params, state), tx)
    other, like, like_state, _ = run(2)
    params, _ = restore(tmp_path, (like, like_state), tx).tree
    whole = eqx.combine(params, other)
    np.testing.assert_array_equal(whole(jnp.ones(3)), mlp(jnp.ones(3)))


def test_dicts_of_haiku(tmp_path):
    params = {"mlp/~/linear_0": {"w": jnp.ones((3, 4)), "b": jnp.zeros(4)}, "mlp/~/linear_1": {"w": jnp.ones((4, 2))}}
    tx = adamite.adamw(1e-2, moments="bfloat16")
    tree = params, tx.init(params)
    save(tmp_path, jnp.int32(5), tree, tx)
    found = restore(tmp_path, jax.eval_shape(lambda: tree), tx)
    assert (found.step, type(found.step)) == (5, int)
    assert_same_bits(found.tree, tree)


@pytest.mark.parametrize("step", [jnp.int32(3), np.int64(3), np.array(3), jnp.asarray(3, jnp.uint8)])
def test_a_step_may_be_an_array(tmp_path, step):
    save(tmp_path, step, {"w": jnp.ones(2)})
    assert restore(tmp_path, {"w": jnp.ones(2)}, step=step).step == 3
    assert read_manifest(tmp_path, step=step).step == 3


def test_a_traced_step_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"step must be a whole number >= 0 that is known outside of jit, got a traced"):
        jax.jit(lambda step: save(tmp_path, step, {"w": jnp.ones(2)}))(1)
    with pytest.raises(TypeError, match=r"tree\['w'\] must be an array outside of jit, got a traced one"):
        jax.jit(lambda w: save(tmp_path, 1, {"w": w}))(1)
    with pytest.raises(TypeError, match=r"record\['loss'\] must be known outside of jit, got a traced array"):
        jax.jit(lambda w: save(tmp_path, 1, {}, record={"loss": w}))(1)
    assert not any(tmp_path.iterdir())


def test_a_record_of_scalars(tmp_path):
    record = {
        "loss": jnp.float32(0.5),
        "best": np.float64(0.25),
        "short": jnp.bfloat16(1.5),
        "epoch": np.int64(3),
        "array": np.array(2),
        "done": np.bool_(True),
        "name": np.str_("run"),
        "nan": float("nan"),
        "inf": [np.float32("inf"), -jnp.inf],
        "large": 2**70,
    }
    save(tmp_path, 1, {"w": jnp.ones(2)}, record=record)
    found = read_manifest(tmp_path).record
    assert np.isnan(found.pop("nan"))
    assert found == {
        "loss": 0.5, "best": 0.25, "short": 1.5, "epoch": 3, "array": 2, "done": True, "name": "run",
        "inf": [float("inf"), float("-inf")], "large": 2**70,
    }  # fmt: skip
    assert {type(x) for x in found.values()} == {float, int, bool, str, list}
    for wrong in (np.ones(1), jnp.complex64(1), np.datetime64("2020"), object(), {1}):
        with pytest.raises(TypeError, match=r"record\['x'\] must be what JSON has"):
            save(tmp_path, 2, {}, record={"x": wrong})


def test_arrays_on_the_host_stay_there(tmp_path):
    tx = optax.adam(1e-2)
    tree = jax.device_get(({"w": jnp.ones((64, 256))}, tx.init({"w": jnp.ones((64, 256))})))
    save(tmp_path, 1, tree)
    short = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == np.float32 else x, tree)
    lean = jax.device_get(adamite.convert_moments(tree[1], "int8"))
    for like, allow in ((tree, ()), (short, "dtype"), ((tree[0], lean), "storage")):
        found = restore(tmp_path, like, allow=allow).tree
        assert_same_bits(found, like)
        assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(found))
