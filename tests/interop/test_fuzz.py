"""State dicts and files in which something is wrong: refused in words of ours, or taken as they are, to the bit."""

import copy
import pathlib
import random
import traceback
from collections.abc import Hashable

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

import adamite
from adamite import interop
from interop.runs import HERE, MAPPING, RUNS, by_name, nameless, state_dict, weights

OURS = pathlib.Path(adamite.__file__).parent
PARAMS = weights("adam", 50)
TXS = {run: interop.torch_optimizer(state_dict(run), PARAMS, MAPPING) for run in RUNS}
JUNK = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, 0.5, -0.5, 1e-320, 1e300, float("nan"), float("inf"), 1j),
    *("", "a", "state", b"bytes", (), [], {}, [0], {"a": 1}, object, lambda: 0),
    *(np.float32(1), np.float64("nan"), np.ones(()), np.zeros(0, np.float32), np.datetime64(0, "s")),
    *(np.ones((4, 3), dtype) for dtype in ("f4", "f8", "c8", "i4", ">f4", "O", "U1", "i4,f4")),
    *(np.array(None), np.array("text"), np.array([{}])),
]


def nodes(found):
    """All places in it: the container and the key."""
    for key, value in list(found.items() if isinstance(found, dict) else enumerate(found)):
        yield found, key
        if isinstance(value, (dict, list)):
            yield from nodes(value)


def bits_flipped(rng, x):
    raw = bytearray(x.tobytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return np.frombuffer(bytes(raw), x.dtype).reshape(x.shape)


def mutate(rng, found):
    """One change."""
    places = list(nodes(found))
    node, key = rng.choice(places)
    old = node[key]
    kind = rng.randrange(6)
    if getattr(old, "dtype", None) == np.float32 and old.size and kind < 3:
        with np.errstate(all="ignore"):
            node[key] = [bits_flipped(rng, old), old.T, old.astype(rng.choice(["f2", "f4", "f8", "i4"]))][kind]
    elif kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[rng.choice([key, *(x for x in JUNK if isinstance(x, Hashable))])] = node.pop(key)
    elif kind == 2 and isinstance(node, list):
        node.append(copy.deepcopy(old))
    elif kind == 3:
        other, its = rng.choice(places)
        if not any(isinstance(x, (dict, list)) for x in (old, other[its])):
            node[key], other[its] = other[its], old
    else:
        node[key] = copy.deepcopy(rng.choice(JUNK))


def refused(call):
    """Whether it was, in words of ours; its result, if not."""
    try:
        return False, call()
    except (TypeError, ValueError) as error:
        where = pathlib.Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if not where.is_relative_to(OURS) or not str(error):
            raise
        return True, None


def try_one(seed):
    rng = random.Random(seed)
    run = rng.choice(RUNS)
    found = rng.choice([lambda x: x, by_name, nameless])(state_dict(run))
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        if found:
            mutate(rng, found)
    was_refused, state = refused(lambda: interop.from_torch(found, TXS[run], PARAMS, MAPPING))
    if not was_refused:
        assert_taken(found, interop.to_torch(state, TXS[run], PARAMS, MAPPING, like=found))
    return was_refused


def assert_taken(found, again):
    assert again["state"].keys() == {key for key, kept in found["state"].items() if kept}
    for key, kept in again["state"].items():
        assert kept["step"] == found["state"][key]["step"]
        for name in kept.keys() - {"step"}:
            assert kept[name].tobytes() == found["state"][key][name].astype(np.float32).tobytes()


@hypothesis.settings(max_examples=200)
@hypothesis.given(st.integers(0, 2**62))
def test_a_state_dict_is_refused_or_taken_as_it_is(seed):
    try_one(seed)


@pytest.mark.slow
def test_a_hundred_thousand_state_dicts():
    taken = sum(not try_one(seed) for seed in range(100_000))
    print(taken)
    assert 0 < taken < 50_000


STORED = [(HERE / f"{run}.safetensors").read_bytes() for run in RUNS]


def broken(rng, raw):
    """Bytes changed, cut out, doubled or cut off."""
    for _ in range(rng.choice([1, 1, 2, 8])):
        at, length = rng.randrange(len(raw)), rng.choice([0, 1, 1, 4, 64])
        middle = rng.choice([b"", rng.randbytes(length), raw[at : at + length] * 2, b"9" * length])
        raw = (raw[:at] + middle + raw[at + length :])[: rng.choice([None, None, None, at])] or b"\0"
    return raw


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@hypothesis.settings(max_examples=400)
@hypothesis.given(seed=st.integers(0, 2**62))
def test_a_file_of_a_state_dict_is_refused_or_whole(folder, seed):
    rng = random.Random(seed)
    path = folder / "adam"
    path.write_bytes(broken(rng, rng.choice(STORED)))
    was_refused, found = refused(lambda: interop.read_torch(path))
    if not was_refused:
        interop.write_torch(path, found)


@hypothesis.settings(max_examples=400)
@hypothesis.given(seed=st.integers(0, 2**62))
def test_a_file_of_weights_is_refused_or_whole(folder, seed):
    rng = random.Random(seed)
    path = folder / "model"
    interop.save_weights(path, PARAMS, mapping=MAPPING)
    path.write_bytes(broken(rng, path.read_bytes()))
    was_refused, found = refused(lambda: interop.load_weights(path, PARAMS, MAPPING))
    assert was_refused or all(np.isfinite(x).all() for x in jax.tree.leaves(found))
