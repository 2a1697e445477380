"""Files that were damaged: none gives other numbers than were saved.

`test_a_thousand_damages` is run by `make test-all`; it prints how many of each kind were refused, and how many were
harmless: the numbers that were saved came back, as from a file that holds a date or a copy.
"""

import collections
import gc
import random
import shutil

import jax
import jax.numpy as jnp
import pytest

import adamite
from adamite.checkpoint import RefusedError, restore, save
from bits import assert_same_bits

TX = adamite.skip_nonfinite(adamite.adamw(1e-3, moments="int8", rounding="residual8"))
PARAMS = {
    "w": jax.random.normal(jax.random.key(0), (64, 256)).astype(jnp.bfloat16),
    "v": jax.random.normal(jax.random.key(1), (300,)),
    "z": jnp.zeros((32, 32)),
}
STEPS = (10, 20)
# When one array cannot be read, Orbax drops the coroutines that read the others: `forget` collects them.
pytestmark = [
    pytest.mark.few(1),
    pytest.mark.filterwarnings(
        "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine .* was never awaited:RuntimeWarning"
    ),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Two checkpoints, and what they hold."""
    folder, trees = tmp_path_factory.mktemp("good"), {}
    for step in STEPS:
        params = jax.tree.map(lambda p: (p * step).astype(p.dtype), PARAMS)  # noqa: B023 (called at once)
        trees[step] = params, TX.update(params, TX.init(params), params)[1]
        save(folder, step, trees[step], TX, record={"loss": [0.25] * 50})
    return folder, trees


@pytest.fixture(autouse=True)
def forget():
    yield
    gc.collect()


def in_one_order(file):
    """TensorStore's names are random, their sizes are not."""
    return [part for part in file.parts if part in map(str, STEPS)], file.stat().st_size, file.parent.name


def any_byte(files, rng):
    """A file: that of any byte of the checkpoint that will be read."""
    mine = [f for f in files if str(STEPS[1]) in f.parts]
    return rng.choices(mine, [f.stat().st_size for f in mine])[0]


def flip(files, rng):
    path = any_byte(files, rng)
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(files, rng):
    path = any_byte(files, rng)
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def zero(files, rng):
    path = any_byte(files, rng)
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.choice([1, 16, 512, len(data)]))
    data[start:end] = bytes(end - start)
    path.write_bytes(data)


def delete(files, rng):
    rng.choice([f for f in files if str(STEPS[1]) in f.parts]).unlink()


def swap(files, rng):
    one, other = rng.sample(files, 2)
    a, b = one.read_bytes(), other.read_bytes()
    one.write_bytes(b)
    other.write_bytes(a)


def swap_steps(files, rng):
    """A file of one checkpoint in place of the other's."""
    at = {f: next(p for p in f.parents if p.name in map(str, STEPS)) for f in files}
    names = collections.Counter(f.relative_to(root) for f, root in at.items())
    shared = sorted(name for name, count in names.items() if count == 2)
    root = next(iter(at.values())).parent
    name = rng.choice(shared)
    shutil.copy(root / str(STEPS[0]) / name, root / str(STEPS[1]) / name)


def swap_items(files, rng):
    """A whole item, or the whole checkpoint, of one step in place of the other's."""
    root = next(p for p in files[0].parents if p.name in map(str, STEPS)).parent
    name = rng.choice(["arrays", "adamite", ""])
    shutil.rmtree(root / str(STEPS[1]) / name)
    shutil.copytree(root / str(STEPS[0]) / name, root / str(STEPS[1]) / name)


DAMAGES = {
    "bit flip": (flip, 40),
    "truncation": (truncate, 16),
    "zeroed range": (zero, 16),
    "deleted file": (delete, 8),
    "swapped files": (swap, 8),
    "file of another step": (swap_steps, 8),
    "item of another step": (swap_items, 4),
}


def damaged(good, folder, kind, seed):
    """What comes of a checkpoint that was damaged: "refused" or "harmless"."""
    source, trees = good
    shutil.copytree(source, folder)
    files = sorted((f for f in folder.rglob("*") if f.is_file()), key=in_one_order)
    DAMAGES[kind][0](files, random.Random(f"{kind}{seed}"))
    like = jax.eval_shape(lambda: (PARAMS, TX.init(PARAMS)))
    try:
        found = restore(folder, like, TX, step=STEPS[1])
    except (RefusedError, FileNotFoundError):
        return "refused"
    finally:
        shutil.rmtree(folder)
    assert_same_bits(found.tree, trees[STEPS[1]])
    assert found.record == {"loss": [0.25] * 50}
    return "harmless"


@pytest.mark.more
@pytest.mark.parametrize("kind", DAMAGES)
def test_no_damage_is_silent(good, tmp_path, kind):
    outcomes = collections.Counter(damaged(good, tmp_path / "copy", kind, seed) for seed in range(DAMAGES[kind][1]))
    assert outcomes["refused"]


@pytest.mark.slow
def test_a_thousand_damages(good, tmp_path):
    total = sum(share for _, share in DAMAGES.values())
    outcomes = collections.Counter()
    for kind, (_, share) in DAMAGES.items():
        for seed in range(1000 * share // total + 1):
            outcomes[kind, damaged(good, tmp_path / "copy", kind, 1000 + seed)] += 1
    for (kind, outcome), count in sorted(outcomes.items()):
        print(f"{kind:24} {outcome:10} {count:5}")
    assert sum(outcomes.values()) >= 1000
