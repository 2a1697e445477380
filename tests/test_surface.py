"""The whole public surface: every argument of every function refuses what it cannot be, and names itself."""

import inspect

import jax
import jax.numpy as jnp
import optax
import pytest

import adamite
from adamite import checkpoint, interop, sharding

PARAMS = {"w": jnp.ones(2)}
GOOD = {
    "learning_rate": 1e-3,
    "tx": optax.sgd(0.1),
    "params": PARAMS,
    "strength": 0.1,
    "threshold": 0.1,
    "weight_decay": 0.1,
    "every": 2,
    "mesh": jax.make_mesh((1,), ("data",)),
    "moments": "int8",
    "state": (),
    "decay": 0.9,
    "transforms": {"a": optax.sgd(0.1)},
    "param_labels": "a",
}
ADAM = adamite.adam(1e-3)
STATE = ADAM.init(PARAMS)
GOOD_FILES = {
    "where": "there",
    "folder": "there",
    "step": 1,
    "tree": PARAMS,
    "like": PARAMS,
    "path": "there.safetensors",
}
GOOD_TORCH = {"tx": ADAM, "params": PARAMS, "state": STATE, "state_dict": interop.to_torch(STATE, ADAM, PARAMS)}
ROOMS = {
    adamite: [name for name in adamite.__all__ if inspect.isfunction(getattr(adamite, name))],
    sharding: ["zero1", "offload", "state_shardings"],
    checkpoint: ["save", "restore", "read_manifest", "manager"],
    interop: interop.__all__,
}
LEFT_OUT = {
    "identity": "anything may be asked what it is",
    "adam_mini_partition": "called with paths and leaves, by scale_by_adam_mini",
    "update_moment": "arithmetic inside of rules: JAX's own errors",
    "bias_correction": "arithmetic inside of rules: JAX's own errors",
    "map_with_path": "any tree is one, and the function is called as it is",
    "full_weights(params)": "what is no weight is returned as it is",
    "ema_params(params)": "a state without an average is told first: tests/test_averaging.py",
    "full_weights(state)": "a state without residuals has nothing to add",
    "zero1(param_shardings)": "compared with the parameters at init: tests/test_sharding.py",
    "state_shardings(tx)": "the parameters' shardings are asked for first: tests/test_sharding.py",
    "save_weights(state)": "a state without residuals has nothing to add",
    "torch_optimizer(params)": "asked for where groups differ only: tests/interop",
    "torch_optimizer(mapping)": "asked for where groups differ only: tests/interop",
    "manager(options)": "Orbax's",
    "manager(also)": "Orbax's",
    "save(also)": "Orbax's",
    "save(tx)": "anything may be asked what it is",
    "restore(tx)": "anything may be asked what it is",
}


class Odd:
    """What no argument can be."""

    def __repr__(self):
        return "<odd>"


def cases():
    for room, names in ROOMS.items():
        for name in names:
            for argument in inspect.signature(getattr(room, name)).parameters:
                if not {name, f"{name}({argument})"} & LEFT_OUT.keys():
                    yield pytest.param(getattr(room, name), argument, id=f"{name}-{argument}")


CASES = list(cases())


@pytest.mark.parametrize(("function", "argument"), CASES)
def test_every_argument_refuses_what_it_cannot_be(function, argument, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    room = function.__module__
    if room.startswith(("adamite.checkpoint", "adamite.interop")):
        checkpoint.save("there", 0, PARAMS)
        interop.save_weights("there.safetensors", PARAMS)
    given = GOOD | (GOOD_FILES if room.startswith("adamite.checkpoint") else {})
    given |= GOOD_FILES | GOOD_TORCH if room.startswith(("adamite.interop", "adamite.convert")) else {}
    positional, keywords = [], {}
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.VAR_POSITIONAL:
            positional = [Odd() if p.name == argument else optax.sgd(0.1)]
        elif p.name == argument:
            keywords[p.name] = Odd()
        elif p.default is p.empty:
            keywords[p.name] = given[p.name]
    with pytest.raises((TypeError, ValueError), match=rf"\b{argument}\b.*"):
        function(*positional, **keywords)
    assert {path.name for path in tmp_path.iterdir()} <= {"there", "there.safetensors"}
    assert all(path.name == "0" for path in tmp_path.glob("there/*"))


def test_there_are_enough():
    assert len(CASES) >= 150
