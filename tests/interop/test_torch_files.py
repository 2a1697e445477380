"""State dicts as files."""

import json
import pathlib
import pickle
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from adamite import interop
from adamite.checks import RefusedError
from adamite.interop.torch_files import LONGEST
from interop.runs import RUNS, assert_same, by_name, nameless, state_dict

GROUP = {"params": [0], "lr": 0.1, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False}
TENSORS = {
    "state.0.step": np.asarray(np.float32(3)),
    "state.0.exp_avg": np.ones(2, np.float32),
    "state.0.exp_avg_sq": np.ones(2, np.float32),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_file_returns_every_bit(tmp_path, run):
    for number, found in enumerate((state_dict(run), by_name(state_dict(run)), nameless(state_dict(run)))):
        interop.write_torch(tmp_path / f"{number}", found)
        assert_same(interop.read_torch(tmp_path / f"{number}"), found)
        assert len(list(tmp_path.iterdir())) == number + 1  # nothing lies beside


def test_numbers_may_be_tensors_and_16_bits_become_32(tmp_path):
    found = state_dict("adam")
    found["param_groups"][0]["lr"] = np.asarray(np.float32(0.5))
    found["state"][0]["exp_avg"] = found["state"][0]["exp_avg"].astype(np.float16)
    interop.write_torch(tmp_path / "adam", found)
    again = interop.read_torch(tmp_path / "adam")
    assert again["param_groups"][0]["lr"] == 0.5
    np.testing.assert_array_equal(again["state"][0]["exp_avg"], found["state"][0]["exp_avg"].astype(np.float32))


FILES = {
    "no groups": (TENSORS, {}, "must have param_groups of at most 16777216 characters, got 0"),
    "no json": (TENSORS, {"param_groups": "[1,"}, "must have param_groups in JSON, got '[1,'"),
    "deep json": (TENSORS, {"param_groups": "[" * 10**5}, "must have param_groups in JSON"),
    "long number": (TENSORS, {"param_groups": "[" + "1" * 5000 + "]"}, "must have param_groups in JSON"),
    "no list": (TENSORS, {"param_groups": "{}"}, "must have a list of param_groups, got {}"),
    "no group": (TENSORS, {"param_groups": "[7]"}, "param_groups[0] must be a dict, got 7"),
    "weights": (TENSORS | {"w": np.ones(2)}, [GROUP], "'w' must be state.KEY.FIELD, of a key in param_groups"),
    "no key": (TENSORS | {"state.exp_avg": np.ones(2)}, [GROUP], "'state.exp_avg' must be state.KEY.FIELD"),
    "other key": (TENSORS | {"state.1.step": np.ones(2)}, [GROUP], "'state.1.step' must be state.KEY.FIELD"),
    "other field": (
        TENSORS | {"state.0.sum": np.ones(2)},
        [GROUP],
        "state[0] must have the fields step, exp_avg, exp_avg_sq",
    ),
    "integers": (TENSORS | {"state.0.exp_avg": np.ones(2, int)}, [GROUP], "must be of a floating dtype, got int64"),
    "NaN": (TENSORS | {"state.0.exp_avg": np.full(2, np.nan)}, [GROUP], "state.0.exp_avg must be finite, got nan"),
    "negative": (TENSORS | {"state.0.exp_avg_sq": -np.ones(2)}, [GROUP], "state.0.exp_avg_sq must be >= 0, got -1.0"),
    "one key as text": (TENSORS, [GROUP | {"params": [0, "0"]}], "must have keys that differ as text"),
    "complex": (TENSORS | {"state.0.exp_avg": np.ones(2, "c8")}, [GROUP], "must be of one of BOOL, U8"),
    "vast and empty": (
        TENSORS | {"state.0.exp_avg": np.zeros((2**60, 0), np.float32)},
        [GROUP],
        "must have a shape that memory can hold, got (1152921504606846976, 0)",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_is_refused_by_name(tmp_path, case):
    tensors, metadata, message = FILES[case]
    metadata = metadata if isinstance(metadata, dict) else {"param_groups": json.dumps(metadata)}
    save_file({name: np.asarray(x, order="C") for name, x in tensors.items()}, tmp_path / "adam", metadata)
    with pytest.raises(RefusedError, match=re.escape(message)):
        interop.read_torch(tmp_path / "adam")


def test_long_groups_are_not_parsed(tmp_path):
    save_file(TENSORS, tmp_path / "adam", {"param_groups": " " * (LONGEST + 1)})
    with pytest.raises(RefusedError, match="must have param_groups of at most"):
        interop.read_torch(tmp_path / "adam")


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04", bytes(8), b"\xff" * 64, (10**9).to_bytes(8, "little") + b"{}", b"\x02" + bytes(7) + b"[]"],
)
def test_what_is_no_safetensors_file(tmp_path, content):
    (tmp_path / "adam").write_bytes(content)
    with pytest.raises(RefusedError, match="adam must be a whole safetensors file: "):
        interop.read_torch(tmp_path / "adam")


PICKLES = {
    "zip": b"PK\x03\x04\0\0\x08\x08" + bytes(18) + b"\x0d\0\x15\0adam/data.pklFB",  # of torch 2.13
    "legacy": b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.",  # before torch 1.6
    "protocol 5": pickle.dumps({"state": {}, "param_groups": []}, protocol=5),
}


@pytest.mark.parametrize("kind", PICKLES)
def test_a_file_of_torch_save_is_refused_with_what_to_do(tmp_path, kind):
    (tmp_path / "adam.pt").write_bytes(PICKLES[kind])
    message = (
        r"adam\.pt must be a safetensors file, got one of torch\.save: that is a pickle, a program, and is not read"
    )
    with pytest.raises(RefusedError, match=message) as refused:
        interop.read_torch(tmp_path / "adam.pt")
    assert 'safetensors.torch.save_file(tensors, "adam.safetensors", {"param_groups":' in str(refused.value)
    manual = (pathlib.Path(__file__).parents[2] / "docs/interop.md").read_text()
    assert all(line.strip() in manual for line in str(refused.value).splitlines()[2:])
    with pytest.raises(RefusedError, match=message) as refused:
        interop.load_weights(tmp_path / "adam.pt", {"w": np.ones(2, np.float32)})
    assert "safetensors.torch.save_file({name: x.contiguous()" in str(refused.value)


def test_a_cut_off_file_whose_header_begins_as_a_pickle_is_not_called_one(tmp_path):
    for length in range(2, 6):
        header = 0x80 + 256 * length
        (tmp_path / "adam").write_bytes(header.to_bytes(8, "little") + b"{")
        with pytest.raises(RefusedError, match="adam must be a whole safetensors file: "):
            interop.read_torch(tmp_path / "adam")


def test_a_whole_file_whose_header_begins_as_a_pickle_is_read(tmp_path):
    path = tmp_path / "adam"
    for padding in range(2048):
        save_file(TENSORS, path, {"param_groups": json.dumps([GROUP | {"padding": "x" * padding}])})
        if path.read_bytes()[:2] == b"\x80\x02":
            break
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert interop.read_torch(path)["state"][0]["step"] == 3


def test_no_file_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        interop.read_torch(tmp_path / "adam")


def test_what_is_no_state_dict_is_not_written(tmp_path):
    found = state_dict("adam")
    found["param_groups"][0]["lr"] = -1.0
    with pytest.raises(RefusedError, match=re.escape("param_groups[0]['lr'] must be finite and >= 0")):
        interop.write_torch(tmp_path / "adam", found)
    found = state_dict("adam")
    found["param_groups"][0]["foreach"] = object()
    with pytest.raises(TypeError, match="param_groups must hold numbers, strings, lists and None only"):
        interop.write_torch(tmp_path / "adam", found)
    assert list(tmp_path.iterdir()) == []
