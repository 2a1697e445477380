"""Weights as files: every bit, in other names and axes, whole or not at all."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors
import safetensors.numpy
from jax import P
from jax.sharding import NamedSharding
from safetensors.numpy import load_file, save_file

import adamite
from adamite import interop
from adamite.checks import RefusedError
from bits import assert_same_bits

DTYPES = ["float32", "bfloat16", "float16", "int32", "uint8", "bool"]


def tree(dtype):
    noise = np.random.default_rng(0).bytes(4 * 12)
    x = jnp.asarray(np.frombuffer(noise, np.uint8)[:12] > 127 if dtype == "bool" else np.frombuffer(noise, dtype)[:12])
    return {"dense": {"kernel": x.reshape(3, 4), "scale": x[0]}, "empty": x[:0]}


def abstract(like):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_comes_back(tmp_path, dtype):
    """Of random bytes, NaN and subnormal numbers among them."""
    params = tree(dtype)
    mapping = {"dense.kernel": ("out.weight", (1, 0)), "dense.scale": "out.scale", "empty": "none"}
    for names in (None, mapping):
        interop.save_weights(tmp_path / "model", params, mapping=names)
        for like in (params, abstract(params)):
            assert_same_bits(interop.load_weights(tmp_path / "model", like, names, allow_nonfinite=True), params)


def test_what_others_read_is_transposed_and_named(tmp_path):
    kernel = jnp.arange(6.0).reshape(2, 3)
    params = {"dense": {"kernel": kernel, "bias": jnp.ones(3)}}
    interop.save_weights(tmp_path / "model", params, mapping=interop.flax_names(params), metadata={"by": "adamite"})
    found = load_file(tmp_path / "model")
    assert sorted(found) == ["dense.bias", "dense.weight"]
    np.testing.assert_array_equal(found["dense.weight"], [[0, 3], [1, 4], [2, 5]])
    with safetensors.safe_open(tmp_path / "model", "np") as file:
        assert file.metadata() == {"format": "pt", "by": "adamite"}


@pytest.mark.parametrize(
    ("rounding", "dtype", "kept"), [("residual8", None, "float32"), ("residual16", "float16", "float16")]
)
def test_residuals_are_folded_in(tmp_path, rounding, dtype, kept):
    tx, params = adamite.adam(1e-3, rounding=rounding), {"w": jnp.ones(5, jnp.bfloat16)}
    updates, state = tx.update({"w": jnp.ones(5, jnp.bfloat16)}, tx.init(params), params)
    params = optax.apply_updates(params, updates)
    interop.save_weights(tmp_path / "model", params, state, dtype=dtype)
    found = load_file(tmp_path / "model")["w"]
    assert found.dtype == kept
    np.testing.assert_array_equal(found, adamite.full_weights(params, state)["w"].astype(kept))
    assert (found != params["w"]).all()


def test_dtype_casts_floating_weights_only(tmp_path):
    interop.save_weights(tmp_path / "model", {"w": jnp.ones(2), "n": jnp.arange(2)}, dtype="bfloat16")
    found = load_file(tmp_path / "model")
    assert (found["w"].dtype, found["n"].dtype) == (jnp.bfloat16, np.int32)


def test_weights_are_laid_as_like_is(tmp_path):
    mesh = jax.make_mesh((8,), ("d",))
    sharding = NamedSharding(mesh, P(None, "d"))
    params = {"w": jax.device_put(jnp.arange(32.0).reshape(2, 16), sharding)}
    interop.save_weights(tmp_path / "model", params)
    wanted = {"w": jax.ShapeDtypeStruct((2, 16), jnp.float32, sharding=sharding)}
    for like in (params, wanted):
        found = interop.load_weights(tmp_path / "model", like)["w"]
        assert found.sharding.is_equivalent_to(sharding, 2)
        assert_same_bits({"w": found}, params)
    assert not interop.load_weights(tmp_path / "model", {"w": jnp.zeros((2, 16))})["w"].committed


class TestOneFileOrTheOther:
    OLD, NEW = {"w": jnp.zeros(3)}, {"w": jnp.ones(3)}

    @pytest.mark.parametrize("broken", ["save_file", "fsync", "replace"])
    def test_an_exception_leaves_the_old_file(self, tmp_path, monkeypatch, broken):
        interop.save_weights(tmp_path / "model", self.OLD)

        def half(*args):
            if broken == "save_file":
                args[1].write_bytes(b"half")
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(safetensors.numpy if broken == "save_file" else os, broken, half)
            with pytest.raises(KeyboardInterrupt):
                interop.save_weights(tmp_path / "model", self.NEW)
        assert_same_bits(interop.load_weights(tmp_path / "model", self.OLD), self.OLD)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    def test_others_may_read_it(self, tmp_path):
        (tmp_path / "plain").touch()
        interop.save_weights(tmp_path / "model", self.NEW)
        assert (tmp_path / "model").stat().st_mode == (tmp_path / "plain").stat().st_mode


class TestErrors:
    LIKE = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}  # noqa: RUF012 (never written to)

    @pytest.mark.parametrize(
        ("stored", "message"),
        [
            ({"w": np.ones((2, 3), np.float32)}, "must have 'b', for b"),
            ({"w": np.ones((3, 2), np.float32)}, "'w' must be ((2, 3), 'float32'), for w, got ((3, 2), 'float32')"),
            ({"w": np.ones((2, 3))}, "'w' must be ((2, 3), 'float32'), for w, got ((2, 3), 'float64')"),
            ({"w": np.ones((2, 3), np.float32), "head": np.ones(1)}, "has 'head', like has no place for it"),
            ({"w": np.full((2, 3), np.nan, np.float32)}, "'w' must be finite; allow_nonfinite=True takes it as it is"),
            ({"w": np.full((2, 3), np.inf, np.float32)}, "'w' must be finite"),
        ],
    )
    def test_a_file_that_is_not_like(self, tmp_path, stored, message):
        whole = {"b": np.ones(3, np.float32)} | stored if "'b'" not in message else stored
        save_file(whole, tmp_path / "model")
        with pytest.raises(RefusedError, match=re.escape(message)):
            interop.load_weights(tmp_path / "model", self.LIKE)

    def test_nan_in_bfloat16(self, tmp_path):
        params = {"w": jnp.array([1.0, jnp.nan], jnp.bfloat16)}
        interop.save_weights(tmp_path / "model", params)
        with pytest.raises(RefusedError, match="'w' must be finite"):
            interop.load_weights(tmp_path / "model", params)

    @pytest.mark.parametrize("length", [0, 4, 8, 40, -1])
    def test_a_file_that_is_cut_off(self, tmp_path, length):
        interop.save_weights(tmp_path / "model", self.LIKE)
        (tmp_path / "model").write_bytes((tmp_path / "model").read_bytes()[:length])
        with pytest.raises(RefusedError, match="model must be a whole safetensors file: "):
            interop.load_weights(tmp_path / "model", self.LIKE)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            (dict(mapping={"w": 0, "b": 1}), TypeError, "mapping must give 'w' a name, got the number 0"),
            (dict(mapping={"w": "w"}), ValueError, "got none for 'b'"),
            (dict(metadata={"step": 3}), TypeError, "metadata must be None or a dict of strings, got {'step': 3}"),
            (dict(dtype="int8"), ValueError, "dtype must be None or a floating dtype of at least 16 bits, got int8"),
        ],
    )
    def test_wrong_arguments(self, tmp_path, arguments, error, message):
        with pytest.raises(error, match=re.escape(message)):
            interop.save_weights(tmp_path / "model", self.LIKE, **arguments)
        assert list(tmp_path.iterdir()) == []

    def test_dtypes_that_such_files_have_not(self, tmp_path):
        with pytest.raises(ValueError, match="w must be of one of bool, uint8"):
            interop.save_weights(tmp_path / "model", {"w": jnp.ones(2, jnp.complex64)})

    def test_allow_nonfinite_is_a_flag(self, tmp_path):
        with pytest.raises(TypeError, match="allow_nonfinite must be True or False"):
            interop.load_weights(tmp_path / "model", self.LIKE, allow_nonfinite="yes")
