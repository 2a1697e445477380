"""What `moments=` may be, what it gives, and how it refuses."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adamite
from adamite.storage import Blockwise, Dense, PerBlock, Quantized
from naming import named

pytestmark = pytest.mark.few(4)

PARAMS = {"large": jnp.ones((8, 640)), "small": {"bias": jnp.ones(3)}}
BFLOAT16 = jnp.dtype(jnp.bfloat16)


def by_path(path, leaf):
    return "bfloat16" if "large" in jax.tree_util.keystr(path) else "float32"


def by_size(path, leaf):
    return ("int8", "bfloat16") if leaf.size > 100 else ["bfloat16", "int8"]


def kinds(moment):
    """The dtype of the large and of the small leaf, or (codes, in blocks)."""
    in_blocks = isinstance(moment, Quantized)
    values = moment.codes if in_blocks else moment
    return *(x.dtype.name for x in jax.tree.leaves(values)), *(["in blocks"] if in_blocks else [])


FLOAT32, HALF = ("float32", "float32"), ("bfloat16", "bfloat16")
INT8, UINT8 = ("int8", "float32", "in blocks"), ("uint8", "float32", "in blocks")
ALLOWED = [
    ("float32", FLOAT32, FLOAT32),
    ("bfloat16", HALF, HALF),
    ("int8", INT8, UINT8),
    (("int8", "float8"), INT8, INT8),
    (("float32", "int8"), FLOAT32, UINT8),
    (["bfloat16", "float8"], HALF, INT8),
    (("int8", "bfloat16"), INT8, HALF),
    (Dense(), FLOAT32, FLOAT32),
    (Dense(BFLOAT16, seed=3), HALF, HALF),
    (Blockwise(block=64), INT8, UINT8),
    (Blockwise(smallest=1), ("int8", "int8", "in blocks"), ("uint8", "uint8", "in blocks")),
    ((Dense(BFLOAT16), Blockwise(float8=True)), HALF, INT8),
    (("bfloat16", Blockwise()), HALF, UINT8),
    (by_path, (*HALF[:1], "float32", "in blocks"), (*HALF[:1], "float32", "in blocks")),
    (by_size, ("int8", "bfloat16", "in blocks"), ("bfloat16", "float32", "in blocks")),
    ((by_path, "int8"), ("bfloat16", "float32", "in blocks"), UINT8),
]


@pytest.mark.parametrize(("moments", "mu", "nu"), ALLOWED, ids=named)
def test_allowed(moments, mu, nu):
    tx = adamite.scale_by_adam(moments=moments)
    state = tx.init(PARAMS)
    assert (kinds(state.mu), kinds(state.nu)) == (mu, nu)
    updates, after = jax.jit(tx.update)(PARAMS, state)
    assert (kinds(after.mu), kinds(after.nu)) == (mu, nu)
    # Ones are exact in all of them.
    np.testing.assert_allclose(updates["large"], np.ones((8, 640)), rtol=2e-3 if "bfloat16" in mu + nu else 2e-5)


def test_objects_are_taken_as_they_are():
    state = adamite.scale_by_adam(moments=Blockwise(block=64)).init(PARAMS)
    assert state.mu.scales["large"].shape == state.nu.scales["large"].shape == (8, 10)


def test_seeds_are_the_objects():
    def second(seed):
        tx = adamite.scale_by_adam(moments=Dense(BFLOAT16, seed=seed))
        return tx.update(jax.tree.map(lambda p: p / 3, PARAMS), tx.init(PARAMS))[1].nu["large"]

    assert (second(0) == second(0)).all()
    assert (second(0) != second(1)).any()


def test_a_function_sees_paths_and_leaves():
    seen = []

    def choice(path, leaf):
        seen.append((jax.tree_util.keystr(path), leaf.shape))
        return "int8"

    adamite.adam(1e-2, moments=choice).init(PARAMS)
    assert seen == [("['large']", (8, 640)), ("['small']['bias']", (3,))] * 2


def test_float8_is_for_optimizers_with_squares_alone():
    state = adamite.rmsprop(1e-2, moments="float8").init(PARAMS)
    assert kinds(state[0].inner.nu) == INT8
    assert jax.tree.leaves(adamite.sgd(1e-2, moments="float8").init(PARAMS)) == []
    for needs_sign in ({"momentum": 0.9}, {"centered": True}):
        with pytest.raises(ValueError, match=r"^moments='float8' has no sign"):
            adamite.rmsprop(1e-2, moments="float8", **needs_sign)


NAMES = "'float32', 'bfloat16', 'int8', 'float8'"
BAD = [
    ("int4", ValueError, f"moments must be one of {NAMES}, got 'int4'"),
    ("INT8", ValueError, f"moments must be one of {NAMES}, got 'INT8'"),
    (("int8", "uint8"), ValueError, f"moments must be one of {NAMES}, got 'uint8'"),
    ("float8", ValueError, "moments='float8' has no sign, it is for means of squares: use ('int8', 'float8')"),
    (("float8", "float8"), ValueError, "moments='float8' has no sign"),
    *[
        (wrong, TypeError, "moments must be a name, a storage, a pair of these or a function of path and leaf, got ")
        for wrong in (
            8, None, True, {"mu": "int8"}, (), ("int8",), ("int8",) * 3, ("int8", None), (("int8", "int8"), "int8"),
            BFLOAT16, jnp.bfloat16, np.float32, Blockwise, (Dense, "int8"), PerBlock(lambda path, leaf: (0,)),
        )
    ],
]  # fmt: skip


@pytest.mark.parametrize(("moments", "error", "says"), BAD, ids=named)
@pytest.mark.parametrize(
    "make", [adamite.scale_by_adam, lambda **kw: adamite.adamw(1e-2, **kw), adamite.scale_by_adopt]
)
def test_refused_when_built(make, moments, error, says):
    with pytest.raises(error, match=f"^{re.escape(says)}"):
        make(moments=moments)


@pytest.mark.parametrize("answer", [None, "float8", "int4", 8, ("int8", "float8"), ["int8"], {}, np.ones(3), Dense()])
def test_what_a_function_says_is_refused_by_path(answer):
    tx = adamite.adam(1e-2, moments=lambda path, leaf: answer if leaf.size == 3 else "int8")
    says = "moments of params['small']['bias'] must be one of 'float32', 'bfloat16', 'int8', got "
    with pytest.raises(ValueError, match=f"^{re.escape(says)}"):
        tx.init(PARAMS)


@pytest.mark.parametrize("moments", ["int8", "bfloat16", ("float32", "int8"), Dense()], ids=str)
def test_excludes_mu_dtype(moments):
    with pytest.raises(
        ValueError, match=r"moments and mu_dtype \(accumulator_dtype\) exclude each other, got moments="
    ):
        adamite.adam(1e-2, mu_dtype="bfloat16", moments=moments)
    with pytest.raises(ValueError, match="accumulator_dtype"):
        adamite.sgd(1e-2, momentum=0.9, accumulator_dtype="bfloat16", moments=moments)
    assert adamite.adam(1e-2, mu_dtype="bfloat16", moments="float32").init(PARAMS)[0].mu["large"].dtype == BFLOAT16


@pytest.mark.parametrize(
    "make", [adamite.scale_by_stable_adam, adamite.stable_adamw, adamite.scale_by_adam_mini, adamite.adam_mini]
)
@pytest.mark.parametrize("moments", ["int8", "bfloat16", ("int8", "float8"), by_path])
def test_steps_that_need_the_whole_leaf_refuse(make, moments):
    rate = () if make.__name__.startswith("scale_by") else (1e-2,)
    with pytest.raises(ValueError, match="moments must be 'float32' here, where a step needs the whole leaf, got"):
        make(*rate, moments=moments)
    make(*rate, moments="float32")


@pytest.mark.parametrize(
    ("mine", "its", "name", "how"),
    [
        ("float32", "int8", "mu", "in blocks"),
        ("int8", "float32", "mu", "as arrays"),
        ("int8", "bfloat16", "mu", "as arrays"),
        ("bfloat16", ("int8", "float8"), "mu", "in blocks"),
        (("float32", "int8"), "float32", "nu", "as arrays"),
        (by_path, "float32", "mu", "as arrays"),
    ],
)
def test_a_state_kept_otherwise_is_refused(mine, its, name, how):
    state = adamite.scale_by_adam(moments=its).init(PARAMS)
    with pytest.raises(ValueError, match=f"^{name} is kept {how} in this state, .*adamite.convert_moments"):
        adamite.scale_by_adam(moments=mine).update(PARAMS, state)


def test_a_state_in_other_blocks_goes_on_in_them():
    """A state says by itself how long its blocks are, and which of them a leaf is kept in."""
    tx = adamite.scale_by_adam(moments="int8")
    state = adamite.scale_by_adam(moments=(Blockwise(block=64), Blockwise(block=32, float8=True))).init(PARAMS)
    _, after = tx.update(PARAMS, state)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert after.nu.codes["large"].dtype == jnp.int8


WRONG = [
    *[(Blockwise, {"block": block}, "block must be a ") for block in (0, -256, 100, 3, 256.0, "256", None, True)],
    *[(Blockwise, {"smallest": size}, "smallest must be a whole number >= 0, got ") for size in (-1, 4096.0, None)],
    *[(Blockwise, {"seed": seed}, "seed must be a whole number, got ") for seed in (0.5, "0", True)],
    (Blockwise, {"float8": 1}, "float8 must be True or False, got "),
    *[(Dense, {"dtype": x}, "dtype must be None or a floating dtype") for x in ("int8", "float8_e4m3fn", "bool", 3)],
    (Dense, {"seed": 0.5}, "seed must be a whole number, got "),
]  # fmt: skip


@pytest.mark.parametrize(("storage", "arguments", "says"), WRONG, ids=str)
def test_a_storage_refuses_what_it_cannot_be(storage, arguments, says):
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(says)}"):
        storage(**arguments)


def test_a_single_number_is_never_quantized():
    tx = adamite.adam(0.1, moments=Blockwise(smallest=0))
    updates, state = tx.update(jnp.float32(2.0), tx.init(jnp.float32(1.0)))
    assert state[0].mu.codes.dtype == jnp.float32
    np.testing.assert_allclose(updates, -0.1, rtol=1e-5)
