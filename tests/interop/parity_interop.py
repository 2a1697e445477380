"""Runs that change sides, with torch 2.13 itself: from here to torch and back, in its own tensors and files.

Not collected by name, as torch is not among the requirements; tests/parity_torch.py says how to run such a file.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch  # pyright: ignore[reportMissingImports]  # `make parity` installs it

from adamite import interop
from adamite.checks import RefusedError
from bits import assert_same_bits
from interop.runs import MAPPING, RUNS, SHAPES, assert_same, gradients, ours, start, state_dict, train
from interop.test_torch import BOUND, BY_HAND, far

NAMES = list(SHAPES)
PATHS = [(name, *name.replace("weight", "kernel").split(".")) for name in NAMES]


def theirs(tree):
    """Weights of ours as torch's parameters, by its names."""
    there = {name: tree[layer][own] for name, layer, own in PATHS}
    return {name: torch.nn.Parameter(torch.from_numpy(np.array(x.T, order="C"))) for name, x in there.items()}


def back(weights):
    return ours({name: p.detach().numpy().copy() for name, p in weights.items()})


FIRST = {"adamw_groups": "weight", "adamw_rates": "first"}
"""What is in the names of the first group, where there are two."""


def groups(run, weights):
    first = [name for name in NAMES if FIRST.get(run, "") in name]
    parts = [part for part in (first, [name for name in NAMES if name not in first]) if part]
    return [{"params": [(name, weights[name]) for name in part]} for part in parts]


def optimizer(run, weights):
    kind = torch.optim.AdamW if run.startswith("adamw") else torch.optim.Adam
    return kind(groups(run, weights), amsgrad=run.endswith("amsgrad"))


def steps(torchs, weights, first, last):
    drawn = gradients()
    for step in range(first, last):
        for name, layer, own in PATHS:
            weights[name].grad = torch.from_numpy(np.array(drawn[layer][own][step].T, order="C"))
        torchs.step()


def tensors(found):
    """The recipe of to_torch's docstring."""
    for kept in found["state"].values():
        kept.update({name: torch.from_numpy(x) for name, x in kept.items()})
    return found


@pytest.mark.parametrize("run", RUNS)
def test_torch_goes_on_where_adamite_stopped(run):
    tx = BY_HAND[run]
    params, state = train(tx, start(), tx.init(start()), 0, 50)
    weights = theirs(params)
    torchs = optimizer(run, weights)
    torchs.load_state_dict(tensors(interop.to_torch(state, tx, params, MAPPING)))
    straight, _ = train(tx, params, state, 50, 150)
    steps(torchs, weights, 50, 150)
    print(far(back(weights), straight))
    assert far(back(weights), straight) <= BOUND


@pytest.mark.parametrize("run", RUNS)
def test_torchs_own_tensors_are_taken_and_given_back(run):
    weights = theirs(start())
    torchs = optimizer(run, weights)
    torchs.load_state_dict(tensors(state_dict(run)))
    found, params = torchs.state_dict(), back(weights)
    state = interop.from_torch(found, BY_HAND[run], params, MAPPING)
    assert_same(interop.to_torch(state, BY_HAND[run], params, MAPPING, like=found), found)
    before = jax.tree.map(np.array, state)
    steps(torchs, weights, 50, 51)  # torch writes its memory anew
    assert all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(state)))


def test_bfloat16_tensors_and_rates_in_tensors():
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    torchs = torch.optim.Adam([("w", p)], torch.tensor(0.1))
    p.grad = torch.full((3,), 0.3, dtype=torch.bfloat16)
    torchs.step()
    tx = interop.torch_optimizer(torchs.state_dict())
    state = interop.from_torch(torchs.state_dict(), tx, {"w": jnp.ones(3, jnp.bfloat16)})
    kept = torchs.state_dict()["state"][0]["exp_avg"].float().numpy()
    np.testing.assert_array_equal(state[0].mu["w"], kept)


def test_a_file_carries_it(tmp_path):
    weights = theirs(start())
    torchs = optimizer("adamw", weights)
    steps(torchs, weights, 0, 3)
    interop.write_torch(tmp_path / "adam", torchs.state_dict())
    found = interop.read_torch(tmp_path / "adam")
    assert_same(found, torchs.state_dict())
    optimizer("adamw", weights).load_state_dict(tensors(found))


@pytest.mark.parametrize("new", [True, False])
def test_files_of_torch_save_become_ours_by_the_lines_of_the_error(tmp_path, monkeypatch, new):
    monkeypatch.chdir(tmp_path)
    weights = theirs(start())
    torchs = optimizer("adamw_rates", weights)
    steps(torchs, weights, 0, 3)
    model = {name: torch.stack([p.detach()] * 2, -1)[..., 0] for name, p in weights.items()}  # not contiguous
    like = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    for saved, read in (
        (model, lambda path: interop.load_weights(path, like)),
        (torchs.state_dict(), interop.read_torch),
    ):
        torch.save(saved, "it.pt", _use_new_zipfile_serialization=new)
        with pytest.raises(RefusedError, match="a pickle") as refused:
            read("it.pt")
        lines = [line.strip() for line in str(refused.value).splitlines()[1:]]
        exec("\n".join(lines), {"torch": torch, "safetensors": safetensors, "json": json, "path": "it.pt"})
    assert_same(interop.read_torch("adam.safetensors"), torchs.state_dict())
    for name, x in interop.load_weights("model.safetensors", like).items():
        np.testing.assert_array_equal(x, weights[name].detach().numpy())


def test_numbers_are_the_order_of_parameters():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    torchs = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    torchs.step()
    found, names = torchs.state_dict(), [name for name, _ in model.named_parameters()]
    tx, params = interop.torch_optimizer(found), {name: jnp.asarray(p.detach()) for name, p in model.named_parameters()}
    state = interop.from_torch(found, tx, params, {name: number for number, name in enumerate(names)})
    for name, p in model.named_parameters():
        np.testing.assert_array_equal(state[0].mu[name], torchs.state[p]["exp_avg"].numpy())
    found["param_groups"][0]["param_names"] = names
    assert_same_bits(interop.from_torch(found, tx, params), state)
    torchs.load_state_dict(tensors(interop.to_torch(state, tx, params, {name: name for name in names})))
