"""Every mistake is refused by name: the argument (or the path), what came, and what is allowed."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamite
from adamite.checkpoint.settings import settings
from adamite.core.matching import difference

NAN, INF = float("nan"), float("inf")
RECIPES = {"adam": adamite.adam, "adamw": adamite.adamw, "nadam": adamite.nadam, "nadamw": adamite.nadamw}

DECAY_RATE = [
    (1.0, ValueError, "must lie in [0, 1), got 1.0"),
    (1.5, ValueError, "must lie in [0, 1), got 1.5"),
    (-0.1, ValueError, "must lie in [0, 1), got -0.1"),
    (NAN, ValueError, "must lie in [0, 1), got nan"),
    (np.float32(1.0), ValueError, "must lie in [0, 1), got 1.0"),
    (jnp.float32(2.0), ValueError, "must lie in [0, 1), got 2.0 of dtype float32"),
    (jnp.bfloat16(0.999), ValueError, "must lie in [0, 1), got 1.0 of dtype bfloat16, to which it was rounded"),
    (jnp.ones(3), ValueError, "must be a number or an array of shape (), got shape (3,)"),
    ("0.9", TypeError, "must be a number or an array of shape (), got '0.9' of type str"),
    (None, TypeError, "must be a number or an array of shape (), got None"),
    (True, TypeError, "got True of type bool"),
    (0.9j, TypeError, "got 0.9j of type complex"),
    (jnp.array(True), TypeError, "must be a number"),
    ([0.9], TypeError, "got [0.9] of type list"),
]
NON_NEGATIVE = [
    (-1e-8, ValueError, "must be finite and >= 0, got -1e-08"),
    (INF, ValueError, "must be finite and >= 0, got inf"),
    (NAN, ValueError, "must be finite and >= 0, got nan"),
    (jnp.float32(-1.0), ValueError, "must be finite and >= 0, got -1.0 of dtype float32"),
    (np.zeros(2), ValueError, "must be a number or an array of shape (), got shape (2,)"),
    ("1e-8", TypeError, "got '1e-8' of type str"),
    (None, TypeError, "got None"),
    ((1e-8,), TypeError, "of type tuple"),
]
OR_SCHEDULE = [
    *(row for row in NON_NEGATIVE if row[1] is ValueError),
    ("1e-3", TypeError, "got '1e-3' of type str, or a schedule (a function of the step count)"),
    (None, TypeError, "got None, or a schedule"),
    (False, TypeError, "got False of type bool, or a schedule"),
    ({"lr": 1e-3}, TypeError, "of type dict, or a schedule"),
]
MU_DTYPE = [
    ("int8", ValueError, "must be None or a floating dtype of at least 16 bits, got int8"),
    (jnp.float8_e4m3fn, ValueError, "got float8_e4m3fn"),
    (jnp.complex64, ValueError, "got complex64"),
    (bool, ValueError, "got bool"),
    ("float33", TypeError, "must be None or a floating dtype, got 'float33' of type str"),
    (3, TypeError, "must be None or a floating dtype, got 3 of type int"),
]
FLAG = [
    ("yes", TypeError, "must be True or False, got 'yes' of type str"),
    (1, TypeError, "must be True or False, got 1 of type int"),
    (None, TypeError, "must be True or False, got None"),
]
MASK = [
    ("all", TypeError, "must be None, a tree of booleans or a function; mask is 'all' of type str"),
    ({"w": 1, "b": True}, TypeError, "mask['w'] is 1 of type int"),
    ({"w": {"x": "yes"}}, TypeError, "mask['w']['x'] is 'yes' of type str"),
]
ARGUMENTS = {
    "learning_rate": OR_SCHEDULE,
    "b1": DECAY_RATE,
    "b2": DECAY_RATE,
    "eps": NON_NEGATIVE,
    "eps_root": NON_NEGATIVE,
    "mu_dtype": MU_DTYPE,
    "nesterov": FLAG,
    "weight_decay": OR_SCHEDULE,
    "mask": MASK,
}
CASES = [
    pytest.param(make, name, value, error, text, id=f"{recipe}-{name}-{value!r:.30}")
    for recipe, make in RECIPES.items()
    for name, rows in ARGUMENTS.items()
    if recipe.endswith("w") or name not in ("weight_decay", "mask")
    for value, error, text in rows
]


@pytest.mark.parametrize(("make", "name", "value", "error", "text"), CASES)
def test_arguments_of_recipes(make, name, value, error, text):
    with pytest.raises(error, match=f"^{name}.*{re.escape(text)}"):
        make(**{"learning_rate": 1e-3, name: value})


def test_there_are_at_least_sixty():
    assert len(CASES) >= 60


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: adamite.scale_by_adam(b1=2.0), "b1 must lie in [0, 1), got 2.0"),
        (lambda: adamite.scale_by_adam(eps=-1.0), "eps must be finite and >= 0, got -1.0"),
        (lambda: adamite.scale_by_adam(bias_correction=0), "bias_correction must be True or False, got 0 of type int"),
        (lambda: adamite.scale_by_learning_rate(-0.1), "to maximize, negate the gradients"),
        (lambda: adamite.scale_by_learning_rate(0.1, flip_sign=None), "flip_sign must be True or False, got None"),
        (lambda: adamite.add_decayed_weights(-0.1), "weight_decay must be finite and >= 0, got -0.1"),
        (lambda: adamite.add_decayed_weights(0.1, mask=3), "mask must be None, a tree of booleans or a function"),
    ],
)
def test_arguments_of_parts(build, text):
    with pytest.raises((ValueError, TypeError), match=re.escape(text)):
        build()


PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}


def with_leaf(leaf):
    return {**PARAMS, "w": leaf}


TREES = {
    "broadcast": (with_leaf(jnp.ones(2)), ValueError, "updates['w'] has shape (2,), but {}['w'] has shape (3, 2)"),
    "transposed": (with_leaf(jnp.ones((2, 3))), ValueError, "updates['w'] has shape (2, 3), but {}['w'] has shape"),
    "scalar": (with_leaf(1.0), ValueError, "updates['w'] has shape (), but {}['w'] has shape (3, 2)"),
    "missing": ({"w": PARAMS["w"]}, ValueError, "updates and {} differ in structure: {}['b'] has no counterpart"),
    "extra": ({**PARAMS, "c": jnp.ones(1)}, ValueError, "updates['c'] has no counterpart in {}"),
    "renamed": ({"w": PARAMS["w"], "bias": PARAMS["b"]}, ValueError, "updates['bias'] has no counterpart in {}"),
    "deeper": (with_leaf({"x": jnp.ones((3, 2))}), ValueError, "updates['w'] is a dict, and {}['w'] is an array"),
    "list": ([PARAMS["b"], PARAMS["w"]], ValueError, "updates[0] has no counterpart in {}"),
    "array": (jnp.ones((3, 2)), ValueError, "updates and {} differ in structure"),
    "integer": (with_leaf(jnp.ones((3, 2), jnp.int32)), TypeError, "updates['w'] has dtype int32, but only floating"),
    "boolean": (with_leaf(jnp.ones((3, 2), bool)), TypeError, "updates['w'] has dtype bool"),
    "string": (with_leaf("gradient"), TypeError, "updates['w'] must be a floating or complex array, got 'gradient'"),
}


@pytest.mark.parametrize(
    ("case", "jitted"),  # jit refuses a string by itself
    [*((case, False) for case in TREES), *((case, True) for case in TREES if case != "string")],
)
@pytest.mark.parametrize(("name", "against"), [("adam", "mu"), ("adamw", "params")])
def test_gradients_that_do_not_match(name, against, case, jitted):
    gradients, error, text = TREES[case]
    tx = RECIPES[name](1e-3)
    state = tx.init(PARAMS)
    update = jax.jit(tx.update) if jitted else tx.update
    with pytest.raises(error, match=re.escape(text.format(against, against))):
        update(gradients, state, PARAMS if against == "params" else None)
    assert all(not x.is_deleted() for x in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("leaf", "text"),
    [
        (jnp.ones(2, jnp.int32), "params['w'] has dtype int32"),
        (jnp.ones(2, bool), "params['w'] has dtype bool"),
        (np.ones(2, np.int64), "leave it out with optax.masked"),
        ("weights", "params['w'] must be a floating or complex array, got 'weights' of type str"),
        (True, "params['w'] must be a floating or complex array, got True of type bool"),
        (jax.random.key(0), "params['w'] has dtype key<fry>"),
        (object, "params['w'] must be a floating or complex array"),
    ],
)
def test_parameters_that_cannot_be_optimized(leaf, text):
    with pytest.raises(TypeError, match=re.escape(text)):
        adamite.adam(1e-3).init(with_leaf(leaf))


def test_a_complex_parameter_refuses_a_16_bit_mu():
    with pytest.raises(ValueError, match="complex parameter cannot be kept in bfloat16: use float32"):
        adamite.adam(1e-3, mu_dtype=jnp.bfloat16).init({"z": jnp.ones(2, jnp.complex64)})


OTHERS = {
    "adabelief": optax.scale_by_belief(),
    "amsgrad": optax.scale_by_amsgrad(),
    "rmsprop": optax.scale_by_rms(),
    "trace": optax.trace(0.9),
}


@pytest.mark.parametrize("other", OTHERS)
def test_the_state_of_another_optimizer(other):
    state = OTHERS[other].init(PARAMS)
    with pytest.raises(TypeError, match=f"state must be a ScaleByAdamState, got {type(state).__name__}"):
        adamite.scale_by_adam().update(PARAMS, state)


def test_swapped_arguments():
    tx = adamite.scale_by_adam()
    with pytest.raises(TypeError, match="state must be a ScaleByAdamState, got dict"):
        tx.update(tx.init(PARAMS), PARAMS)
    with pytest.raises((TypeError, ValueError)):
        adamite.adam(1e-3).update(adamite.adam(1e-3).init(PARAMS), PARAMS)


@pytest.mark.parametrize("state", [PARAMS, None, adamite.adam(1e-3).init(PARAMS), {}, (1, 2, 3, 4)])
def test_a_state_that_no_chain_of_this_length_has(state):
    with pytest.raises(
        TypeError, match=r"state must be a tuple of the 3 parts' states, got .*is it what this optimizer"
    ):
        adamite.adamw(1e-3).update(PARAMS, state, PARAMS)


def test_a_mask_of_another_structure():
    tx = adamite.adamw(1e-3, mask={"w": True, "bias": False})
    first = re.escape("the structure of params or a prefix of it: mask['bias'] has no counterpart in params")
    with pytest.raises(ValueError, match=first):
        tx.init(PARAMS)
    fitting = adamite.adamw(1e-3, mask={"w": True, "b": False}).init(PARAMS)
    with pytest.raises(ValueError, match=first):
        tx.update(PARAMS, fitting, PARAMS)


def test_a_prefix_of_a_mask_is_no_difference():
    params = {"a": {"w": jnp.ones(2), "b": jnp.ones(2)}, "c": {"w": jnp.ones(2)}}
    adamite.adamw(1e-3, mask={"a": True, "c": {"w": False}}).init(params)
    with pytest.raises(ValueError, match=re.escape("mask['c']['v'] has no counterpart in params")):
        adamite.adamw(1e-3, mask={"a": True, "c": {"v": False}}).init(params)


@pytest.mark.parametrize(
    ("other", "first"),
    [
        ([jnp.ones(2), jnp.ones(2)], "updates is a tuple, and params is a list"),
        ((jnp.ones(2), None), "updates[1] has shape (2,), but params[1] is None"),
        ((jnp.ones(2), optax.MaskedNode()), "updates[1] is an array, and params[1] is a MaskedNode"),
        ((jnp.ones(2), (jnp.ones(2),)), "updates[1] is an array, and params[1] is a tuple"),
    ],
)
def test_the_first_path_that_differs_is_named(other, first):
    tx, g = adamite.adam(1e-3), (jnp.ones(2), jnp.ones(2))
    with pytest.raises(ValueError, match=re.escape(first)):
        tx.update(g, tx.init(g), other)


def test_state_of_other_parameters():
    tx = adamite.adam(1e-3)
    with pytest.raises(ValueError, match=re.escape("updates['b'] has no counterpart in mu")):
        tx.update(PARAMS, tx.init({"w": PARAMS["w"]}))


def test_parameter_that_was_none_at_init():
    tx = adamite.adam(1e-3)
    with pytest.raises(ValueError, match=re.escape("updates['b'] has shape (2,), but mu['b'] is None")):
        tx.update(PARAMS, tx.init({**PARAMS, "b": None}))


def test_inject_hyperparams_on_bfloat16_is_refused_and_told():
    """optax casts b2 to the parameters' bfloat16, where 0.999 is 1: NaN at the first step (optax issue 1414)."""
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    with pytest.raises(ValueError, match=r"b2 must lie in \[0, 1\), got 1.0 .*hyperparam_dtype=jnp\.float32"):
        optax.inject_hyperparams(adamite.adam)(1e-3).init(params)
    tx = optax.inject_hyperparams(adamite.adam, hyperparam_dtype=jnp.float32)(1e-3)
    updates, _ = tx.update({"w": jnp.ones(3, jnp.bfloat16)}, tx.init(params), params)
    np.testing.assert_allclose(updates["w"].astype(jnp.float32), -1e-3, rtol=1e-2)


WHOLE = {
    "accumulate": lambda n: adamite.accumulate(adamite.adam(1e-3), n),
    "guard": lambda n: adamite.skip_nonfinite(adamite.adam(1e-3), n),
    "block": lambda n: adamite.adam(1e-3, moments=adamite.storage.Blockwise(block=n, smallest=n, seed=n)),
    "dense": lambda n: adamite.adam(1e-3, moments=adamite.storage.Dense(jnp.dtype(jnp.bfloat16), seed=n)),
    "rounding": lambda n: adamite.adam(1e-3, rounding=adamite.rounding.Residual8(seed=n)),
}


@pytest.mark.parametrize("case", WHOLE)
def test_whole_numbers_may_be_arrays(case):
    """They are plain numbers from there on: the optimizer says the same of itself, and takes steps."""
    plain = WHOLE[case](4)
    params = {"w": jnp.ones((4, 64), jnp.bfloat16)}
    for number in (jnp.int32(4), jnp.asarray(4, jnp.uint8), np.int64(4), np.array(4)):
        tx = WHOLE[case](number)
        assert settings(tx) == settings(plain)
        tx.update(params, tx.init(params), params)
    for wrong in (jnp.int32([4]), jnp.float32(4), jnp.array(True), np.array([4]), np.array(4.0)):
        with pytest.raises(TypeError, match="must be a whole number"):
            WHOLE[case](wrong)
    with pytest.raises(TypeError, match=r"must be a whole number.* that is known outside of jit, got a traced array"):
        jax.jit(lambda n: WHOLE[case](n).init(params))(4)


class Pair(NamedTuple):
    a: jax.Array
    b: jax.Array


CLASSES = {
    "a list for a tuple": ({"w": [1.0, 2.0]}, {"w": (1.0, 2.0)}, "ours['w'] is a list, and theirs['w'] is a tuple"),
    "another NamedTuple": ([Pair(1.0, 2.0)], [(1.0, 2.0)], "ours[0].a has no counterpart in theirs"),
    "nothing within": ({"w": 1.0, "n": ()}, {"w": 1.0, "n": []}, "ours['n'] is a tuple, and theirs['n'] is a list"),
    "a leaf": ({"w": 1.0, "n": ()}, {"w": 1.0}, "ours['n'] has no counterpart in theirs"),
    "static": (
        jax.tree_util.Partial(abs, 1.0),
        jax.tree_util.Partial(max, 1.0),
        "ours and theirs are of one class, Partial, and differ in their static fields",
    ),
}


@pytest.mark.parametrize("case", CLASSES)
def test_trees_of_the_same_paths_differ_in_a_class(case):
    ours, theirs, text = CLASSES[case]
    assert difference(ours, "ours", theirs, "theirs") == text
