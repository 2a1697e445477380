"""The runs of tests/fixtures/torch, seen from here: the same weights in Flax's names and layout, the same gradients."""

import copy
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file

from adamite import interop

HERE = pathlib.Path(__file__).parent.parent / "fixtures" / "torch"
RUNS = ["adam", "adam_l2", "adamw", "adamw_groups", "adamw_rates", "adam_amsgrad", "adamw_amsgrad"]
FACTORS = [lambda count: 1 / (1 + 0.1 * count), lambda count: 0.98**count]
"""What "adamw_scheduled" multiplies the rates of its groups by; but for that it is "adamw_rates"."""
SHAPES = {"first.weight": (4, 3), "first.bias": (4,), "second.weight": (2, 4), "second.bias": (2,)}
MAPPING = {
    "first.kernel": ("first.weight", (1, 0)),
    "first.bias": "first.bias",
    "second.kernel": ("second.weight", (1, 0)),
    "second.bias": "second.bias",
}
NUMBERED = {
    "first.kernel": (0, (1, 0)),
    "first.bias": 1,
    "second.kernel": (2, (1, 0)),
    "second.bias": 3,
}


def ours(weights):
    """Weights or gradients by torch's names, as a tree of ours."""
    return {
        layer: {"kernel": jnp.asarray(weights[f"{layer}.weight"].T), "bias": jnp.asarray(weights[f"{layer}.bias"])}
        for layer in ("first", "second")
    }


def gradients():
    """As make.py draws them."""
    rng, drawn = np.random.default_rng(0), []
    for step in range(150):
        scale = 10.0 if step < 10 else 1.0
        drawn.append(
            {k: (scale * (rng.standard_normal(shape) + 0.2)).astype(np.float32) for k, shape in SHAPES.items()}
        )
    return jax.tree.map(lambda *g: jnp.stack(g), *map(ours, drawn))


def start():
    """The weights before the first step."""
    rng = np.random.default_rng(1)
    return ours({name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()})


def weights(run, step):
    stored = load_file(HERE / f"{run}.weights.safetensors")
    return ours({name: stored[f"{step}.{name}"] for name in SHAPES})


STATE_DICTS = {run: interop.read_torch(HERE / f"{run}.safetensors") for run in [*RUNS, "adamw_scheduled"]}


def state_dict(run):
    """One that the test may change."""
    return copy.deepcopy(STATE_DICTS[run])


def nameless(found):
    """As torch < 2.6 has it."""
    for group in found["param_groups"]:
        group.pop("param_names")
        group.pop("decoupled_weight_decay")
    return found


def by_name(found):
    """As FSDP gathers it."""
    names = {}
    for group in found["param_groups"]:
        names |= dict(zip(group["params"], group.pop("param_names"), strict=True))
    for group in found["param_groups"]:
        group["params"] = [names[key] for key in group["params"]]
    return {"state": {names[key]: kept for key, kept in found["state"].items()}, "param_groups": found["param_groups"]}


def train(tx, params, state, first, last):
    """Through the gradients of these steps, under jit."""

    @jax.jit
    def run(params, state, gradients):
        def step(carry, g):
            params, state = carry
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), gradients)[0]

    return run(params, state, jax.tree.map(lambda g: g[first:last], gradients()))


def assert_same(one, other):
    """The same state dict, to the bit."""
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys()
    for key, kept in one["state"].items():
        assert kept.keys() == other["state"][key].keys()
        for name, x in kept.items():
            y = np.asarray(other["state"][key][name])
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
            assert x.tobytes() == y.tobytes(), (key, name)
