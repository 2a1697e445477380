"""The loss at the average of the weights, kept in each format: `python benchmarks/averaging.py`.

The character language model of `benchmarks/lean.py` is trained by AdamW at a constant learning rate, and along a
cosine. Beside the weights run averages of the same decay: in float32 and bfloat16 as `adamite.with_ema` keeps them, in
bfloat16 rounded to the nearest, and in int8 blocks with codes rounded stochastically, which `with_ema` does not offer.
Printed of each: the loss of held-out data, and the distance from the float32 average, relative to its norm.

Then the mean of 4,096 averages of decay 0.9999, of weights that jumped from 0.1 to 0.2 20,000 steps ago.
"""

import argparse
import json
import pathlib
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from adam_step import machine
from lean import CHUNK, PEAK, WEIGHT_DECAY, language

import adamite
from adamite.random_bits import element_index, fold, random_bits
from adamite.rounding import nearest, stochastic
from adamite.storage.blockwise import SIGNED, Blockwise, Quantized
from adamite.storage.codes import random_r


def stochastic_bfloat16(x: jax.Array, key: jax.Array) -> jax.Array:
    """`x` in bfloat16, as `with_ema` rounds it."""
    return stochastic(x, jnp.dtype(jnp.bfloat16), random_bits(key, element_index(x.shape)))


def nearest_bfloat16(x: jax.Array, key: jax.Array) -> jax.Array:
    """`x` in bfloat16."""
    del key
    return nearest(x, jnp.dtype(jnp.bfloat16))


def stochastic_int8(x: jax.Array, key: jax.Array) -> jax.Array:
    """`x` in blocks with random codes; small leaves as they are."""
    storage = Blockwise(seed=None)
    blank = storage.fresh(x)
    if jnp.issubdtype(blank.codes.dtype, jnp.inexact):
        return x
    scales = storage.encode(x, blank, lambda: key).scales
    unit = storage.decode(Quantized(jnp.full_like(blank.codes, SIGNED.one), scales))
    codes = SIGNED.encode(x / unit, random_r(random_bits(key, element_index(x.shape))))
    return storage.decode(Quantized(codes, scales))


OTHERS = {"bfloat16, nearest": nearest_bfloat16, "int8, stochastic": stochastic_int8}


def jump(steps: int = 20_000, decay: float = 0.9999) -> dict[str, float]:
    """The mean of averages of weights that jumped, in blocks whose largest number is 1, and what it should be."""
    start = jnp.where(jnp.arange(2**14) % 4 == 0, 0.1, 1.0)
    formats = {"bfloat16": stochastic_bfloat16, **OTHERS}

    def step(averages: Any, t: jax.Array) -> tuple[Any, None]:
        moved = {name: m + (1 - decay) * (start + 0.1 - m) for name, m in averages.items()}
        return {name: formats[name](m, fold(0, t)) for name, m in moved.items()}, None

    averages, _ = jax.lax.scan(step, dict.fromkeys(formats, start), jnp.arange(steps))
    return {"exact": 0.2 - 0.1 * decay**steps, **{name: float(m[::4].mean()) for name, m in averages.items()}}


def train(schedule: Any, decay: float, steps: int, seed: int) -> dict[str, Any]:
    """Weights and averages after so many steps."""
    problem = language()
    adamw = adamite.adamw(schedule, weight_decay=WEIGHT_DECAY)
    tx = adamite.with_ema(adamite.with_ema(adamw, decay, storage="bfloat16"), decay)

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        params, state, averages = carry
        grads = jax.grad(problem.loss)(params, problem.batch(key))
        updates, after = tx.update(grads, state, params)
        params, state = optax.apply_updates(params, updates), cast(adamite.EmaState, after)
        t = state.count
        rate = jnp.maximum(1 - decay, 9 / (10 + t))
        leaves, structure = jax.tree.flatten(params)
        for name, keep in OTHERS.items():
            old = structure.flatten_up_to(averages[name])
            new = [
                keep(m + rate * (w - m), fold(fold(0, t), n)) for n, (m, w) in enumerate(zip(old, leaves, strict=True))
            ]
            averages = averages | {name: structure.unflatten(new)}
        return (params, state, averages), None

    first, rest = jax.random.split(jax.random.key(seed))
    params, keys = problem.draw(first), jax.random.split(rest, steps)
    carry: Any = params, tx.init(params), dict.fromkeys(OTHERS, params)
    advance = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[0])
    for start in range(0, steps, CHUNK):
        carry = advance(carry, keys[start : start + CHUNK])
    params, state, averages = carry
    trees = {
        "weights": params,
        "float32": adamite.ema_params(state),
        "bfloat16": adamite.ema_params(state.inner),
        **averages,
    }
    exact, loss = trees["float32"], jax.jit(problem.loss)
    return {
        name: {
            "loss": float(loss(tree, problem.held_out)),
            "distance": float(optax.tree.norm(jax.tree.map(jnp.subtract, tree, exact)) / optax.tree.norm(exact)),
        }
        for name, tree in trees.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Loss at the average of the weights, by its format.")
    parser.add_argument("--steps", type=int, default=4000, help="of each training (default 4000)")
    parser.add_argument("--seeds", type=int, default=2, help="trainings with each schedule (default 2)")
    parser.add_argument("--decay", type=float, default=0.999, help="of the average (default 0.999)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/averaging.json"))
    options = parser.parse_args()
    cosine = optax.warmup_cosine_decay_schedule(0.0, PEAK, options.steps // 20, options.steps, PEAK / 100)
    schedules = {"constant": PEAK, "cosine": cosine}
    result: dict[str, Any] = {
        "machine": machine(),
        "steps": options.steps,
        "seeds": options.seeds,
        "decay": options.decay,
        "runs": {},
    }
    for name, schedule in schedules.items():
        seeds = [train(schedule, options.decay, options.steps, seed) for seed in range(options.seeds)]
        rows = {kept: {k: sum(s[kept][k] for s in seeds) / len(seeds) for k in seeds[0][kept]} for kept in seeds[0]}
        result["runs"][name] = rows
        print(f"\n{name}")
        for kept, row in rows.items():
            print(f"  {kept:20}{row['loss']:8.4f}{row['distance']:9.4f}", flush=True)
    result["jump"] = jump()
    print("\njump")
    for name, mean in result["jump"].items():
        print(f"  {name:20}{mean:8.4f}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
