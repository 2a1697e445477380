"""A leaf has one path, whatever a framework wraps its arrays in, at init and at update."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.tree_util import DictKey, GetAttrKey, keystr

import adamite
from adamite.paths import leaves_with_path, map_with_path, unwrapped

SHAPE = (64, 256)


class Dense(eqx.Module):
    kernel: jax.Array
    bias: jax.Array


class Value(eqx.Module):
    value: jax.Array


class Partitioned(linen.Module):
    @linen.compact
    def __call__(self, x):
        init = linen.with_partitioning(linen.initializers.lecun_normal(), ("data", None))
        return linen.Dense(SHAPE[1], kernel_init=init)(x)


def nnx_params():
    return nnx.state(nnx.Linear(*SHAPE, rngs=nnx.Rngs(0)), nnx.Param)


def linen_params(module):
    return module.init(jax.random.key(0), jnp.ones(SHAPE[0]))["params"]


TREES = {  # what init is given, and what update is
    "dict": lambda: (p := {"kernel": jnp.ones(SHAPE), "bias": jnp.ones(SHAPE[1])}, p),
    "haiku": lambda: (p := {"linear": {"kernel": jnp.ones(SHAPE), "bias": jnp.ones(SHAPE[1])}}, p),
    "linen": lambda: (p := linen_params(linen.Dense(SHAPE[1])), p),
    "linen, partitioned": lambda: (p := linen_params(Partitioned()), p),
    "equinox": lambda: (p := Dense(jnp.ones(SHAPE), jnp.ones(SHAPE[1])), p),
    "nnx, by hand": lambda: (p := nnx_params(), p),
    "nnx.Optimizer": lambda: (p := nnx_params(), nnx.as_pure(p)),
}
trees = pytest.mark.parametrize("trees", TREES.values(), ids=TREES)


def name(path):
    return getattr(path[-1], "key", getattr(path[-1], "name", ""))


def pure(state):
    """As `nnx.Optimizer` hands its state to update."""
    return nnx.as_pure(state)


@trees
def test_init_and_update_see_one_path(trees):
    at_init, at_update = trees()
    paths = [path for path, _ in leaves_with_path(at_init)]
    assert paths == [path for path, _ in leaves_with_path(at_update)]
    assert {name(path) for path in paths} == {"kernel", "bias"}
    assert all(keystr(path).count("value") == 0 for path in paths)


@trees
def test_a_function_of_paths_chooses_moments(trees):
    at_init, at_update = trees()
    tx = adamite.adam(1e-2, moments=lambda path, _: "int8" if name(path) == "kernel" else "float32")
    state = tx.init(at_init)
    state = state if at_init is at_update else pure(state)
    _, state = jax.jit(tx.update)(at_update, state, at_update)
    codes = {name(path): leaf.dtype for path, leaf in leaves_with_path(state[0].mu.codes)}
    assert codes == {"kernel": jnp.int8, "bias": jnp.float32}


@trees
def test_a_function_of_paths_chooses_the_blocks_of_adam_mini(trees):
    tx = adamite.adam_mini(1e-2, partition=lambda path, leaf: (0,) if name(path) == "kernel" else ())
    shapes = {name(path): leaf.shape for path, leaf in leaves_with_path(tx.init(trees()[0])[0].nu)}
    assert shapes == {"kernel": (1, SHAPE[1]), "bias": (SHAPE[1],)}


@trees
@pytest.mark.parametrize("own", [True, False], ids=["jax's", "adamite's"])
def test_a_function_of_paths_masks_the_decay(trees, own):
    at_init, at_update = trees()
    mapped = jax.tree_util.tree_map_with_path if own else map_with_path
    tx = adamite.adamw(1e-2, weight_decay=0.5, mask=lambda tree: mapped(lambda path, _: name(path) == "kernel", tree))
    state = tx.init(at_init)
    zeros = jax.tree.map(jnp.zeros_like, at_update)
    updates, _ = tx.update(zeros, state if at_init is at_update else pure(state), at_update)
    moved = {name(path): bool(jnp.any(u != 0)) for path, u in leaves_with_path(updates)}
    weights = {name(path): bool(jnp.any(p != 0)) for path, p in leaves_with_path(at_update)}
    assert moved == {"kernel": weights["kernel"], "bias": False}
    assert weights["kernel"]


@trees
@pytest.mark.parametrize(
    ("partition", "mapped"),
    [(optax.partition, map_with_path), (adamite.partition, jax.tree_util.tree_map_with_path)],
    ids=["optax's", "adamite's"],
)
def test_a_function_of_paths_partitions(trees, partition, mapped):
    at_init, at_update = trees()
    tx = partition(
        {"trained": adamite.adam(0.1), "frozen": optax.set_to_zero()},
        lambda tree: mapped(lambda path, _: "trained" if name(path) == "kernel" else "frozen", tree),
    )
    state = tx.init(at_init)
    ones = jax.tree.map(jnp.ones_like, at_update)
    updates, _ = tx.update(ones, state if at_init is at_update else pure(state), at_update)
    largest = {name(path): round(float(jnp.max(jnp.abs(u))), 3) for path, u in leaves_with_path(updates)}
    assert largest == {"kernel": 0.1, "bias": 0.0}


@trees
def test_a_report_has_the_paths_of_an_error(trees):
    at_init, _ = trees()
    report = adamite.memory_report(adamite.adam(1e-3), at_init)
    wrong = map_with_path(lambda path, x: jnp.zeros(3) if name(path) == "kernel" else x, at_init)
    [kernel] = [leaf.path for leaf in report.leaves if "kernel" in leaf.path]
    with pytest.raises(ValueError, match="has shape") as error:
        adamite.adam(1e-3).update(wrong, adamite.adam(1e-3).init(at_init), at_init)
    assert kernel.removeprefix("params") in str(error.value)


def test_a_field_of_that_name_is_no_wrapper():
    """Equinox' modules have fields of any name."""
    [(path, _)] = leaves_with_path({"a": Value(jnp.ones(2))})
    assert path == (DictKey("a"), GetAttrKey("value"))
    assert isinstance(unwrapped(Value(jnp.ones(2))), Value)


def test_a_variable_may_hold_a_tree_or_nothing():
    tree = {"a": nnx.Param({"x": np.ones(2)}), "b": nnx.Param(None)}
    assert [keystr(path) for path, _ in leaves_with_path(tree)] == ["['a']['x']"]
    assert unwrapped(tree)["b"] is None
    assert list(unwrapped(tree)["a"]) == ["x"]


@trees
def test_mapping_keeps_wrappers_and_unwrapping_takes_them_off(trees):
    at_init, at_update = trees()
    doubled = map_with_path(lambda _, x: 2 * x, at_init)
    assert jax.tree.structure(doubled) == jax.tree.structure(at_init)
    off = unwrapped(at_init)
    assert not any(keystr(path).endswith(".value") for path, _ in jax.tree_util.tree_leaves_with_path(off))
    if at_init is not at_update:
        assert jax.tree.structure(off) == jax.tree.structure(at_update)
