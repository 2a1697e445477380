"""adamite beside torch 2.13, in float64, wherever both have the optimizer: `make parity`.

Not a part of `make test`: torch is not among its requirements. Conventions that differ are named, and taken out by an
argument where there is one.
"""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch  # pyright: ignore[reportMissingImports]  # `make parity` installs it

import adamite
from adamite import interop

STEPS, SIZE = 1000, 64
RNG = np.random.default_rng(0)
THETA = RNG.standard_normal(SIZE)
GRADIENTS = 10.0 ** RNG.uniform(-4, 2, SIZE) * (RNG.standard_normal((STEPS, SIZE)) + 0.3)
RATE = 1e-2

# name: torch's, ours
PAIRS = {
    "adam": (lambda p: torch.optim.Adam(p, RATE), lambda: adamite.adam(RATE)),
    "adam, betas and eps": (
        lambda p: torch.optim.Adam(p, RATE, betas=(0.8, 0.95), eps=1e-4),
        lambda: adamite.adam(RATE, 0.8, 0.95, 1e-4),
    ),
    "adam with L2": (
        lambda p: torch.optim.Adam(p, RATE, weight_decay=0.1),
        lambda: adamite.chain(adamite.add_decayed_weights(0.1), adamite.adam(RATE)),
    ),
    "adamw": (lambda p: torch.optim.AdamW(p, RATE, weight_decay=0.1), lambda: adamite.adamw(RATE, weight_decay=0.1)),
    "adamw, torch's defaults": (lambda p: torch.optim.AdamW(p), lambda: adamite.adamw(1e-3, weight_decay=1e-2)),
    "amsgrad": (
        lambda p: torch.optim.Adam(p, RATE, amsgrad=True),
        lambda: adamite.amsgrad(RATE, max_before_correction=True),
    ),
    "adamax": (lambda p: torch.optim.Adamax(p, RATE), lambda: adamite.adamax(RATE)),
    "sgd": (lambda p: torch.optim.SGD(p, RATE), lambda: adamite.sgd(RATE)),
    "momentum": (lambda p: torch.optim.SGD(p, RATE, momentum=0.9), lambda: adamite.sgd(RATE, 0.9)),
    "nesterov": (
        lambda p: torch.optim.SGD(p, RATE, momentum=0.9, nesterov=True),
        lambda: adamite.sgd(RATE, 0.9, nesterov=True),
    ),
    "rmsprop, epsilon out of the root": (
        lambda p: torch.optim.RMSprop(p, RATE, alpha=0.9),
        lambda: adamite.rmsprop(RATE, 0.9, eps_in_sqrt=False),
    ),
    "radam without epsilon": (  # torch adds it to the root before the bias correction
        lambda p: torch.optim.RAdam(p, RATE, eps=1e-300),
        lambda: adamite.radam(RATE, eps=1e-300),
    ),
    "adagrad from zero": (  # torch's epsilon is out of the root
        lambda p: torch.optim.Adagrad(p, RATE, eps=0.0),
        lambda: adamite.adagrad(RATE, initial_accumulator_value=0.0, eps=0.0),
    ),
}


def torchs(make):
    p = torch.nn.Parameter(torch.from_numpy(THETA.copy()))
    optimizer, path = make([p]), []
    for g in GRADIENTS:
        p.grad = torch.from_numpy(g.copy())
        optimizer.step()
        path.append(p.detach().numpy().copy())
    return np.stack(path)


def ours(tx):
    def step(carry, g):
        theta, state = carry
        updates, state = tx.update(g, state, theta)
        theta = optax.apply_updates(theta, updates)
        return (theta, state), theta

    theta = jnp.asarray(THETA)
    return np.asarray(jax.jit(lambda: jax.lax.scan(step, (theta, tx.init(theta)), jnp.asarray(GRADIENTS))[1])())


@pytest.mark.parametrize("name", PAIRS)
def test_the_same_path(name):
    theirs, make = PAIRS[name]
    with jax.enable_x64(True):
        np.testing.assert_allclose(ours(make()), torchs(theirs), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["amsgrad", "rmsprop", "adagrad"])
def test_conventions_differ_without_the_argument(name):
    theirs = {
        "amsgrad": lambda p: torch.optim.Adam(p, RATE, amsgrad=True),
        "rmsprop": lambda p: torch.optim.RMSprop(p, RATE, alpha=0.9),
        "adagrad": lambda p: torch.optim.Adagrad(p, RATE),
    }
    with jax.enable_x64(True):
        assert np.abs(ours(getattr(adamite, name)(RATE)) - torchs(theirs[name])).max() > 1e-9


GROUPS = {
    "body": {"lr": 2e-3, "weight_decay": 0.3},
    "head": {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.0},
    "tail": {"lr": 5e-2, "betas": (0.5, 0.9), "weight_decay": 0.1},
}
CUTS = {"body": slice(0, 16), "head": slice(16, 48), "tail": slice(48, SIZE)}
FACTORS = [lambda count: 1.0 / (1.0 + count), lambda count: 0.9**count, lambda count: 1.0 + count]


def torchs_groups(begin, factors=None):
    """20 steps, the tail's from step `begin` on: the path, and the state dicts."""
    weights = {name: torch.nn.Parameter(torch.from_numpy(THETA[cut].copy())) for name, cut in CUTS.items()}
    groups = [{"params": [(name, weights[name])], **GROUPS[name]} for name in GROUPS]
    optimizer = torch.optim.AdamW(groups if not begin else groups[:2])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors) if factors else None
    path, found = [], []
    for step, g in enumerate(GRADIENTS[:20]):
        if step == begin and begin:
            optimizer.add_param_group(groups[2])
        for name, p in weights.items():
            p.grad = torch.from_numpy(g[CUTS[name]].copy())
        optimizer.step()
        if scheduler:
            scheduler.step()
        path.append({name: p.detach().numpy().copy() for name, p in weights.items()})
        found.append(copy.deepcopy(optimizer.state_dict()))
    return path, found


@pytest.mark.parametrize(
    ("known", "begin", "factors"), [(0, 0, None), (0, 0, FACTORS), (12, 0, None), (12, 0, FACTORS), (12, 7, None)]
)
def test_groups_with_their_own_settings(known, begin, factors):
    """From the start, or from torch's state after some steps, to the same weights; and back to torch's groups."""
    path, found = torchs_groups(begin, factors)
    with jax.enable_x64(True):
        params = {name: jnp.asarray(THETA[cut] if not known else path[known - 1][name]) for name, cut in CUTS.items()}
        first = found[max(known - 1, 0)]
        tx = interop.torch_optimizer(first, params, lr_lambda=factors)
        state = interop.from_torch(first, tx, params) if known else tx.init(params)
        assert list(state.inner_states) == ["group0", "group1", "group2"]
        for step in range(known, 20):
            updates, state = tx.update(
                {name: jnp.asarray(GRADIENTS[step][cut]) for name, cut in CUTS.items()}, state, params
            )
            params = optax.apply_updates(params, updates)
            for name, p in params.items():
                np.testing.assert_allclose(p, path[step][name], rtol=1e-11, atol=1e-12)
        again = interop.to_torch(state, tx, params, like=found[-1])
        for key, kept in found[-1]["state"].items():
            for field, x in kept.items():
                np.testing.assert_allclose(again["state"][key][field], x.numpy(), rtol=1e-11)
