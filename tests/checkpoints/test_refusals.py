"""A checkpoint that is another's is refused, with the path and both values; what is meant is told by name."""

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import adamite
from adamite.checkpoint import RefusedError, read_manifest, restore, save
from adamite.checkpoint.leaves import describe, leaves_of
from adamite.checkpoint.manifest import Manifest, types_of
from adamite.checkpoint.plan import planned
from bits import assert_same_bits

PARAMS = {"w": jnp.linspace(-1, 1, 64 * 256).reshape(64, 256), "b": jnp.zeros(3)}
ADAM = adamite.adam(1e-3)


def stepped(tx, params=PARAMS):
    _, state = tx.update(jax.tree.map(lambda p: p + 0.5, params), tx.init(params), params)
    return params, state


def like(tx, params=PARAMS):
    return jax.eval_shape(lambda: (params, tx.init(params)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("adam")
    save(path, 7, stepped(ADAM), ADAM)
    return path


def with_w(leaf):
    return PARAMS | {"w": leaf}


def warmup(steps):
    return adamite.adam(optax.warmup_cosine_decay_schedule(0.0, 1e-3, steps, 1000))


OTHERS = {
    "learning rate": (
        adamite.adam(3e-4),
        PARAMS,
        "optimizer.learning_rate: saved 0.001, now 0.0003 (allow 'optimizer.",
    ),
    "b2": (adamite.adam(1e-3, b2=0.99), PARAMS, "optimizer.b2: saved 0.999, now 0.99 (allow 'optimizer.b2')"),
    "name": (adamite.nadam(1e-3), PARAMS, 'optimizer.name: saved "adam", now "nadam"'),
    "a schedule": (warmup(10), PARAMS, "optimizer.learning_rate: saved 0.001, now nothing"),
    "no optimizer": (None, PARAMS, 'optimizer.name: saved "adam", now nothing'),
    "optax's": (optax.adam(1e-3), PARAMS, 'optimizer.name: saved "adam", now "optax.chain"'),
    "moments": (
        adamite.adam(1e-3, moments="int8"),
        PARAMS,
        'optimizer.moments: saved "float32", now "int8" (allow \'st',
    ),
    "moments' structure": (
        adamite.adam(1e-3, moments="int8"),
        PARAMS,
        "tree[1][0].mu: saved dict, now Quantized (allow",
    ),
    "mu_dtype": (adamite.adam(1e-3, mu_dtype=jnp.bfloat16), PARAMS, "saved null, now \"bfloat16\" (allow 'storage')"),
    "another class": (adamite.adabelief(1e-3), PARAMS, "tree[1][0]: saved ScaleByAdamState, now ScaleByBeliefState"),
    "another chain": (adamite.adamw(1e-3), PARAMS, "tree[1][2]: saved nothing, now EmptyState"),
    "missing": (ADAM, {"w": PARAMS["w"]}, "tree[0]['b']: saved float32[3], now nothing"),
    "more": (ADAM, PARAMS | {"c": jnp.zeros(2)}, "tree[1][0].mu['c']: saved nothing, now float32[2]"),
    "shape": (ADAM, with_w(jnp.zeros((256, 64))), "tree[0]['w']: saved float32[64, 256], now float32[256, 64]"),
    "dtype": (ADAM, with_w(PARAMS["w"].astype(jnp.bfloat16)), "now bfloat16[64, 256] (allow 'dtype')"),
    "none": (ADAM, with_w(None), "tree[0]['w']: saved float32[64, 256], now nothing"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_differs_is_named(folder, case):
    tx, params, text = OTHERS[case]
    with pytest.raises(RefusedError, match=re.escape(text)):
        restore(folder, like(tx or ADAM, params), tx)


def test_all_differences_are_listed_up_to_a_dozen(folder):
    with pytest.raises(RefusedError) as error:
        restore(folder, like(adamite.adamw(3e-4, 0.8, 0.9), {str(i): jnp.zeros(2) for i in range(9)}), ADAM)
    lines = str(error.value).splitlines()
    assert len(lines) == 14
    assert re.fullmatch(r"  and \d+ more", lines[-1])


def test_optax_states_of_one_layout_are_told_apart(tmp_path):
    """Orbax alone reads one as the other."""
    save(tmp_path, 1, stepped(optax.adam(1e-3)), optax.adam(1e-3))
    belief = optax.adabelief(1e-3)
    with pytest.raises(RefusedError, match="saved ScaleByAdamState, now ScaleByBeliefState"):
        restore(tmp_path, like(belief), belief)


def test_another_schedule(tmp_path):
    save(tmp_path, 1, stepped(warmup(10)), warmup(10))
    assert restore(tmp_path, like(warmup(10)), warmup(10)).step == 1
    with pytest.raises(RefusedError, match=r"optimizer.learning_rate.step 1: saved 0.0001, now 2e-05 \(allow 'opti"):
        restore(tmp_path, like(warmup(50)), warmup(50))
    restore(tmp_path, like(warmup(50)), warmup(50), allow="optimizer.learning_rate")


def test_schedules_that_part_late(tmp_path):
    """One that differs only after 100,000 steps is another, too."""
    early, late = (adamite.adam(optax.piecewise_constant_schedule(1e-3, {n: 0.1})) for n in (300_000, 3_000_000))
    save(tmp_path, 1, stepped(early), early)
    with pytest.raises(RefusedError, match=r"optimizer.learning_rate.step 1000000: saved 0.0001, now 0.001"):
        restore(tmp_path, like(late), late)


def test_a_checkpoint_under_another_ones_name(folder, tmp_path):
    shutil.copytree(folder / "7", tmp_path / "8")
    with pytest.raises(RefusedError, match=r"must be of step 8, but says that it is of step 7"):
        restore(tmp_path, like(ADAM), ADAM)
    with pytest.raises(RefusedError, match=r"must be of step 8, but says that it is of step 7"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("field", "shape"),
    [("codes", [64, 512]), ("codes", [32, 256]), ("scales", [64, 257]), ("scales", [65, 1]), ("scales", [64, 1, 1])],
)
def test_a_moment_of_another_parameter_is_no_storage(field, shape):
    """What a manifest says of shapes is not trusted, though another storage is meant: nothing so large is allocated."""
    tx = adamite.adam(1e-3, moments="int8")
    tree = like(tx)
    manifest = Manifest(1, None, {}, types_of(tree), {p: describe(x) for p, x in leaves_of(tree).items()}, {})
    path = f"[1][0].mu.{field}['w']"
    manifest.leaves[path] = manifest.leaves[path]._replace(shape=tuple(shape))
    with pytest.raises(RefusedError, match=re.escape(f"tree{path}: saved")):
        planned(manifest, like(ADAM), None, {"storage", "mesh"})


def test_numbers_and_where_they_live(tmp_path):
    save(tmp_path, 1, {"a": 3, "b": np.ones(2, np.float32)})
    with pytest.raises(RefusedError, match=re.escape("tree['a']: saved int[], now float[]")):
        restore(tmp_path, {"a": 3.0, "b": np.ones(2, np.float32)})
    with pytest.raises(RefusedError, match=re.escape("tree['b']: saved on the host, now in one part on 1 device")):
        restore(tmp_path, {"a": 3, "b": jnp.ones(2)})


def test_fewer_devices_are_refused_unless_meant(tmp_path):
    where = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    eight = {"w": jax.device_put(jnp.arange(8.0), NamedSharding(where, P("data")))}
    save(tmp_path, 1, eight)
    text = "tree['w']: saved in 8 parts on 8 devices, now in one part on 1 device (allow 'mesh')"
    with pytest.raises(RefusedError, match=re.escape(text)):
        restore(tmp_path, {"w": jnp.zeros(8)})
    with pytest.raises(RefusedError, match=re.escape("now in one part on 8 devices")):
        restore(tmp_path, {"w": jax.device_put(jnp.zeros(8), NamedSharding(where, P()))})
    assert_same_bits(restore(tmp_path, {"w": jnp.zeros(8)}, allow="mesh").tree, {"w": jnp.arange(8.0)})


STORAGES = ["float32", "bfloat16", "int8", ("int8", "float8")]


@pytest.mark.more
@pytest.mark.parametrize(
    "make",
    [
        adamite.rmsprop,
        *(pytest.param(make, marks=pytest.mark.slow) for make in (adamite.adamw, adamite.amsgrad, adamite.lion)),
    ],
)
def test_moments_are_converted_where_that_is_meant(tmp_path, make):
    storages = [s for s in STORAGES if s != ("int8", "float8") or make is not adamite.lion]
    for number, saved in enumerate(storages):
        before = make(1e-3, moments=saved)
        params, state = stepped(before)
        save(tmp_path, number, (params, state), before)
        for now in storages:
            after = make(1e-3, moments=now)
            found = restore(tmp_path, like(after), after, step=number, allow="storage").tree
            assert_same_bits(found, (params, adamite.convert_moments(state, now)))


def test_dtypes_are_cast_where_that_is_meant(tmp_path):
    tx = adamite.adamw(1e-3)
    save(tmp_path, 1, stepped(tx), tx)
    short = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    params, state = restore(tmp_path, like(tx, short), tx, allow="dtype").tree
    assert_same_bits(params, short)
    assert_same_bits(state, stepped(tx)[1])


def test_an_argument_that_is_meant_excuses_no_other(folder):
    tx = adamite.adam(3e-4, b1=0.8)
    with pytest.raises(RefusedError) as error:
        restore(folder, like(tx), tx, allow=["optimizer.learning_rate", "dtype"])
    assert "optimizer.b1" in str(error.value)
    assert "learning_rate" not in str(error.value)
    assert restore(folder, like(tx), tx, allow=["optimizer.learning_rate", "optimizer.b1"]).step == 7
    assert restore(folder, like(tx), tx, allow="optimizer").step == 7


NO_CALLS = {
    "allow": (
        lambda f: restore(f, like(ADAM), ADAM, allow="everything"),
        ValueError,
        "allow must hold storage, dtype, mesh",
    ),
    "allow 3": (
        lambda f: restore(f, like(ADAM), ADAM, allow=[3]),
        TypeError,
        "allow must be a string or several, got [3]",
    ),
    "no such step": (lambda f: restore(f, like(ADAM), ADAM, step=8), FileNotFoundError, "no checkpoint of step 8 in"),
    "step": (lambda f: restore(f, like(ADAM), ADAM, step="7"), TypeError, "step must be a whole number >= 0, got '7'"),
    "no folder": (lambda f: restore(f / "none", like(ADAM)), FileNotFoundError, "there is no folder"),
    "empty folder": (lambda f: restore(f.parent, like(ADAM)), FileNotFoundError, "there is no checkpoint in"),
    "where": (
        lambda f: restore(None, like(ADAM)),
        TypeError,
        "where must be a folder or a CheckpointManager, got None",
    ),
    "like": (lambda f: restore(f, {"w": "ones"}), TypeError, "like['w'] must be an array or a number, got 'ones' of"),
    "there": (lambda f: save(f, 7, {}), ValueError, "step must be new, got 7, of which there is a checkpoint in"),
    "negative": (lambda f: save(f, -1, {}), ValueError, "step must be a whole number >= 0, got -1"),
    "fraction": (lambda f: save(f, 1.0, {}), TypeError, "step must be a whole number >= 0, got 1.0 of type float"),
    "leaf": (lambda f: save(f, 9, {"f": print}), TypeError, "tree['f'] must be an array or a number, got <built-in"),
    "record": (
        lambda f: save(f, 9, {}, record={"a": [jnp.ones(1)]}),
        TypeError,
        "record['a'][0] must be what JSON has",
    ),
    "key": (lambda f: save(f, 9, {}, record={1: 2}), TypeError, "record must have strings for keys, got 1 of type int"),
}


@pytest.mark.parametrize("case", NO_CALLS)
def test_calls_that_cannot_be_meant(folder, case):
    call, error, text = NO_CALLS[case]
    with pytest.raises(error, match=re.escape(text)):
        call(folder)
    assert restore(folder, like(ADAM), ADAM).step == 7


GOOD = Manifest(3, None, {"name": "adam"}, {"": "dict"}, {}, {}).to_json()


def resealed(**changes):
    """A manifest with a right SHA-256 and something wrong in it."""
    import hashlib
    import json

    rest = {key: value for key, value in (GOOD | changes).items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return rest | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


LEAF = {"shape": [2], "dtype": "float32", "grid": [1], "devices": 1, "sha256": "00"}
MANIFESTS = {
    "no object": ([], "must be a JSON object with a schema"),
    "no schema": ({}, "must be a JSON object with a schema"),
    "a later schema": (resealed(schema=2), "schema must be 1, got 2: is adamite too old?"),
    "flipped": (GOOD | {"step": 4}, "damaged: it does not have the SHA-256"),
    "no hash": ({key: value for key, value in GOOD.items() if key != "sha256"}, "damaged"),
    "step": (resealed(step=-3), "-3 is no whole number >= 0"),
    "step True": (resealed(step=True), "True is no whole number >= 0"),
    "types": (resealed(types=[]), "[] is no dict"),
    "type": (resealed(types={"": 3}), "3 is no str"),
    "leaf": (resealed(leaves={"": [1]}), "not one that adamite wrote"),
    "shape": (resealed(leaves={"": LEAF | {"shape": [2.0]}}), "2.0 is no whole number"),
    "huge": (resealed(leaves={"": LEAF | {"shape": [2**60]}}), "is no whole number"),
    "grid": (resealed(leaves={"": LEAF | {"grid": [3]}}), "an array of shape (2,) cannot be cut into (3,)"),
    "grid 0": (resealed(leaves={"": LEAF | {"grid": [0]}}), "cannot be cut into (0,)"),
    "rank": (resealed(leaves={"": LEAF | {"grid": []}}), "cannot be cut into ()"),
    "no dtype": (resealed(leaves={"": {k: v for k, v in LEAF.items() if k != "dtype"}}), "KeyError('dtype')"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests_that_adamite_never_wrote(case):
    content, text = MANIFESTS[case]
    with pytest.raises(RefusedError, match=re.escape(text)):
        Manifest.from_json(content)
