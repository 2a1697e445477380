"""Arrays of the host that come back are their own: Orbax's reader gives views of memory that is its own."""

import gc
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from adamite.checkpoint import manager, reading, restore, save
from bits import assert_same_bits


def host_tree(number):
    """Many small leaves of the host, of all kinds, unlike those of other numbers."""
    rng = np.random.default_rng(number)
    return {
        "flags": [bool(x) for x in rng.integers(0, 2, 40)],
        "numbers": [int(x) for x in rng.integers(-(2**40), 2**40, 40)],
        "floats": list(map(float, rng.standard_normal(10))),
        "scalars": list(rng.standard_normal(20).astype(np.float32)),
        "bools": list(rng.integers(0, 2, 20).astype(np.bool_)),
        "arrays": [rng.integers(0, 256, size, np.uint8) for size in (1, 2, 3, 7, 31, 64, 200)],
        "device": jnp.full(3, number),
    }


def test_what_comes_back_does_not_change_with_the_readers_memory(tmp_path, monkeypatch):
    """All that Orbax gave is overwritten when its manager is closed; hashes are of what is given out."""
    tree, given = host_tree(1), []
    save(tmp_path, 1, tree)
    original, close = ocp.CheckpointManager.restore, ocp.CheckpointManager.close

    def restored(self, *args, **kwargs):
        found = original(self, *args, **kwargs)
        given.extend(x for x in jax.tree.leaves(dict(found)) if isinstance(x, np.ndarray))
        return found

    def closed(self):
        for x in given:
            x.reshape(-1).view(np.uint8)[...] = 0xA5 if x.dtype != bool else 0
        close(self)

    monkeypatch.setattr(ocp.CheckpointManager, "restore", restored)
    monkeypatch.setattr(ocp.CheckpointManager, "close", closed)
    found = restore(tmp_path, tree).tree
    assert len(given) >= 137
    assert_same_bits(found, tree)
    assert all(x.base is None for x in found["arrays"])


def test_hashes_are_of_what_is_given_out(tmp_path, monkeypatch):
    tree, hashed = host_tree(1), []
    save(tmp_path, 1, tree)
    sha256 = reading.sha256
    monkeypatch.setattr(reading, "sha256", lambda arrays, grids: hashed.extend(arrays) or sha256(arrays, grids))
    found = restore(tmp_path, tree).tree
    for x in found["arrays"]:
        assert any(x is y for y in hashed)


@pytest.mark.slow
def test_many_readers_at_once_while_memory_is_used_again(tmp_path):
    """A flag once came back as another, under load. Each thread reads its own folder."""
    trees = {number: host_tree(number) for number in range(4)}
    for number, tree in trees.items():
        save(tmp_path / str(number), 1, tree)
    wrong, done = [], threading.Event()

    def churn():
        rng = np.random.default_rng(0)
        while not done.is_set():
            junk = [np.full(size, 0xA5, np.uint8) for size in rng.integers(1, 300, 2000)]
            del junk
            gc.collect()

    def read(number):
        with manager(tmp_path / str(number)) as its:
            for i in range(20):
                found = restore(its if i % 2 else tmp_path / str(number), trees[number]).tree
                gc.collect()
                if any(
                    type(a) is not type(b) or np.asarray(a).tobytes() != np.asarray(b).tobytes()
                    for a, b in zip(*map(jax.tree.leaves, (found, trees[number])), strict=True)
                ):
                    wrong.append((number, i))

    readers = [threading.Thread(target=read, args=(number,)) for number in trees]
    churner = threading.Thread(target=churn)
    for thread in (churner, *readers):
        thread.start()
    for thread in readers:
        thread.join()
    done.set()
    churner.join()
    assert not wrong
