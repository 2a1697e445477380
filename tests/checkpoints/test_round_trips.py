"""What was saved comes back: the same classes, shapes, dtypes, devices and bits."""

import hashlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import adamite
from adamite.checkpoint import manager, restore, save
from adamite.checkpoint.hashing import grid, sha256
from adamite.checkpoint.manifest import Manifest
from adamite.sharding import zero1
from bits import assert_same_bits
from specs import SPECS

pytestmark = pytest.mark.few(2)

PARAMS = {"w": jnp.ones((64, 256), jnp.bfloat16), "b": jnp.zeros(3)}
LEAN = adamite.adamw(1e-2, moments="int8", rounding="residual8")


def trained(tx, params, steps=3):
    state = tx.init(params)
    for seed in range(steps):
        keys = jax.random.key(seed)
        g = jax.tree.map(lambda p: jax.random.normal(keys, p.shape).astype(p.dtype), params)  # noqa: B023 (called at once)
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_same(ours, theirs):
    assert_same_bits(jax.tree.map(np.asarray, ours), jax.tree.map(np.asarray, theirs))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert type(a) is type(b)
        if isinstance(a, jax.Array):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def mesh(shape, names):
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return jax.sharding.Mesh(devices, names)


def test_a_lean_run_goes_on_to_the_same_bits(tmp_path):
    tree = trained(LEAN, PARAMS)
    assert save(tmp_path, 3, tree, LEAN, record={"loss": [0.1, 1e-300], "name": "run"})
    step, found, record = restore(tmp_path, (PARAMS, LEAN.init(PARAMS)), LEAN)
    assert (step, record) == (3, {"loss": [0.1, 1e-300], "name": "run"})
    assert_same(found, tree)


@pytest.mark.more
def test_all_optimizers_and_wrappers_in_one_tree(tmp_path):
    params = {"w": jnp.linspace(0.1, 1, 12).reshape(3, 4), "none": None}
    txs = {str(spec): spec.build() for spec in SPECS}
    for name, wrap in {
        "guard": adamite.skip_nonfinite,
        "spikes": adamite.skip_spikes,
        "accumulate": lambda tx: adamite.accumulate(tx, 2),
        "telemetry": adamite.with_telemetry,
        "average": lambda tx: adamite.with_ema(tx, storage="bfloat16"),
        "masked": lambda tx: optax.masked(tx, {"w": False, "none": None}),
        "injected": lambda tx: optax.inject_hyperparams(optax.adam)(1e-3),
        "steps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    }.items():
        txs[name] = wrap(adamite.adam(1e-3, moments="bfloat16"))
    tree = {name: trained(tx, params, 2) for name, tx in txs.items()}
    save(tmp_path, 2, tree)
    assert_same(restore(tmp_path, tree).tree, tree)


def test_every_kind_of_leaf(tmp_path):
    tree = {
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(4, impl="rbg"), 3),
        "empty": jnp.zeros((0, 3)),
        "numpy": np.arange(4.0),
        "a number of numpy's": np.float32(0.1),
        "none": None,
        "numbers": [True, 3, 0.1, -(2**40)],
        "flags": jnp.array([True, False]),
        "f8": jnp.ones(3, jnp.float8_e4m3fn),
        "complex": jnp.array([1 + 2j], jnp.complex64),
        "not finite": jnp.array([jnp.nan, jnp.inf, -0.0, 1e-45]),
        "awk/ward '\"name.[0]": {"": jnp.ones(1), "ü": jnp.ones(2)},
        "large": np.arange(3_000_000, dtype=np.int16),
    }
    save(tmp_path, 0, tree)
    found = restore(tmp_path, tree).tree
    data = {name: jax.random.key_data(tree[name]) for name in ("key", "keys")}
    assert_same({name: jax.random.key_data(found.pop(name)) for name in data}, data)
    assert_same(found, {name: leaf for name, leaf in tree.items() if name not in data})


def test_nothing_at_all_and_a_single_array(tmp_path):
    for step, tree in enumerate([(), None, {"a": ()}, jnp.arange(3), {"only": jnp.zeros(0)}]):
        save(tmp_path, step, tree)
        assert_same(restore(tmp_path, tree).tree, tree)


def test_abstract_trees_say_where(tmp_path):
    eight = NamedSharding(mesh((8,), ("data",)), P("data"))
    tree = {"w": jax.device_put(jnp.arange(64.0).reshape(8, 8), eight)}
    save(tmp_path, 1, tree)
    like = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=eight)}
    assert_same(restore(tmp_path, like).tree, tree)
    alone = restore(tmp_path, {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32)}, allow="mesh").tree
    assert alone["w"].sharding.num_devices == 1
    assert_same_bits(alone, jax.device_get(tree))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(*pair, marks=[] if set(pair) == {(8, 1), (2, 4)} or pair == ((8, 1), (1, 1)) else pytest.mark.slow)
        for pair in itertools.permutations([(8, 1), (1, 8), (2, 4), (4, 1), (1, 1)], 2)
    ],
)
def test_from_mesh_to_mesh(tmp_path, before, after):
    tx = adamite.adamw(1e-2, moments="int8")
    params = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((64, 1024)), jnp.float32), "b": jnp.ones(3)}

    def on(shape):
        where = mesh(shape, ("data", "model"))
        specs = {"w": P(None, "model"), "b": P()}
        placed = {name: jax.device_put(x, NamedSharding(where, specs[name])) for name, x in params.items()}
        spread = zero1(tx, where, param_shardings=jax.tree.map(lambda x: x.sharding, placed))
        return spread, (placed, spread.init(placed))

    tx_before, (placed, _) = on(before)
    tree = trained(tx_before, placed, 2)
    save(tmp_path, 2, tree, tx_before)
    tx_after, like = on(after)
    with pytest.raises(adamite.checkpoint.RefusedError, match="allow 'mesh'"):
        restore(tmp_path, like, tx_after)
    found = restore(tmp_path, like, tx_after, allow="mesh").tree
    assert_same_bits(jax.device_get(found), jax.device_get(tree))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(like), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


@pytest.mark.parametrize(("shape", "spec"), [((8, 6), P("a", "b")), ((8, 6), P(("a", "b"))), ((6,), P("b")), ((), P())])
def test_the_hash_is_that_of_the_parts_hashes(shape, spec):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    placed = jax.device_put(x, NamedSharding(mesh((4, 2), ("a", "b")), spec))
    cut = grid(placed)
    parts = [x.reshape(-1)]
    if shape:
        rows = np.split(x, cut[0])
        parts = [part for row in rows for part in (np.split(row, cut[1], axis=1) if len(cut) > 1 else [row])]
    digests = b"".join(hashlib.sha256(part.tobytes()).digest() for part in parts)
    wanted = hashlib.sha256(digests).hexdigest()
    assert sha256([placed, x, jnp.asarray(x)], [cut] * 3) == [wanted] * 3


def test_many_parts_are_hashed_in_order():
    x = np.arange(2**16, dtype=np.uint8)
    digests = b"".join(hashlib.sha256(part.tobytes()).digest() for part in np.split(x, 512))
    assert sha256([x], [(512,)]) == [hashlib.sha256(digests).hexdigest()]


def test_written_in_the_background_from_arrays_that_are_donated_meanwhile(tmp_path):
    tx = adamite.adam(1e-2)
    params = {"w": jnp.ones((512, 1024))}
    tree = params, tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    donating = jax.jit(step, donate_argnums=(0, 1))
    wanted = {}
    with manager(tmp_path, ocp.CheckpointManagerOptions(max_to_keep=2)) as its:
        for number in range(1, 5):
            tree = donating(*tree)
            wanted[number] = jax.device_get(tree)
            assert save(its, number, tree, tx)
        its.wait_until_finished()
        assert its.all_steps() == [3, 4]
        for number in (3, 4):
            assert_same_bits(jax.device_get(restore(its, tree, tx, step=number).tree), wanted[number])
    assert restore(tmp_path, tree, tx).step == 4


def test_a_manager_may_leave_steps_out_and_hold_more(tmp_path):
    options = ocp.CheckpointManagerOptions(save_interval_steps=2)
    with manager(tmp_path, options, {"loader": ocp.JsonCheckpointHandler()}) as its:
        also = {"loader": ocp.args.JsonSave({"position": 7})}
        assert [save(its, step, {"w": jnp.ones(2)}, also=also) for step in range(3)] == [True, False, True]
        its.wait_until_finished()
        assert its.restore(2, args=ocp.args.Composite(loader=ocp.args.JsonRestore())).loader == {"position": 7}
        assert restore(its, {"w": jnp.ones(2)}).step == 2


def test_an_older_step_can_be_written_after_a_newer_one(tmp_path):
    for step in (5, 2):
        assert save(tmp_path, step, {"w": jnp.full(2, step)})
    assert [restore(tmp_path, {"w": jnp.zeros(2, int)}, step=n).tree["w"][0] for n in (2, 5)] == [2, 5]


def test_a_manifest_is_json_and_back(tmp_path):
    manifest = Manifest(3, [1, None], {"name": "adam"}, {"": "dict"}, {}, {})
    assert Manifest.from_json(manifest.to_json()) == manifest
