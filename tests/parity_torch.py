"""adamite beside torch 2.13, in float64, wherever both have the optimizer: `make parity`.

Not a part of `make test`: torch is not among its requirements. Conventions that differ are named, and taken out by an
argument where there is one.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch  # pyright: ignore[reportMissingImports]  # `make parity` installs it

import adamite

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
