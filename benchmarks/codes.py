"""What 8-bit codes do to Adam's step: `make bench-codes`.

16,384 elements in blocks of 256 see 3,000 steps of noise around a mean, each element on its own scale; the scales of a
block are spread over so many decades (the standard deviation of their logarithm). In the scenario "grow" half of the
elements have gradients four times larger from half way on. Printed against float32 moments: the 1st and 99th
percentile of v's error at the end, the largest update over all steps, the mean error of an update.
"""

import argparse
import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from adam_step import machine

from adamite.random_bits import element_index, fold, random_bits
from adamite.storage import Blockwise, Dense, Storage

B1, B2, EPS = 0.9, 0.999, 1e-8
SHAPE = (64, 256)
SCENARIOS = [("steady", 0.0), ("steady", 0.5), ("steady", 1.0), ("grow", 0.5)]


@dataclasses.dataclass(frozen=True)
class Paper:
    """Dynamic codes to the nearest, of a mean square itself, not of its root: what the paper does."""

    values: tuple[float, ...]  # of the codes, ascending

    def fresh(self, leaf: Any) -> Any:
        """Zeros."""
        return jnp.full(leaf.shape, self.values.index(0.0), jnp.uint8), jnp.ones((*leaf.shape[:-1], 1))

    def decode(self, stored: Any) -> jax.Array:
        """The values."""
        return jnp.asarray(self.values)[stored[0]] * stored[1]

    def encode(self, x: jax.Array, stored: Any, bits: Any) -> Any:
        """The codes and one scale a block."""
        del stored, bits
        scale = jnp.maximum(jnp.abs(x).max(-1, keepdims=True), 1e-30)
        values = np.array(self.values)
        codes = jnp.searchsorted((values[1:] + values[:-1]) / 2, x / scale).astype(jnp.uint8)
        if values.min() == 0:  # nothing above 0 becomes 0; with what does, updates explode
            codes = jnp.where(x > 0, jnp.maximum(codes, 1), codes)
        return codes, scale


def decades(fewest: int) -> list[float]:
    """The middles of equal intervals, in each of seven decades below 1 twice as many as in the one below."""
    bounds = [10.0 ** (k - 6) * np.linspace(0.1, 1, fewest * 2**k + 1) for k in range(7)]
    return [float(x) for b in bounds for x in (b[1:] + b[:-1]) / 2]


def paper(unsigned: bool) -> Paper:
    """The paper's 256 values, or those >= 0."""
    if unsigned:
        return Paper((0.0, *decades(2), 1.0))
    above = decades(1)
    return Paper((*(-x for x in reversed(above)), 0.0, *above, 1.0))


M, V = Dense(), Dense(unsigned=True)
STORAGES: dict[str, tuple[Any, Any]] = {
    "int8": (Blockwise(), Blockwise(unsigned=True)),
    "int8, float8": (Blockwise(), Blockwise(unsigned=True, float8=True)),
    "bfloat16": (Dense(jnp.dtype(jnp.bfloat16), seed=0), Dense(jnp.dtype(jnp.bfloat16), unsigned=True, seed=0)),
    "bfloat16 to the nearest": (Dense(jnp.dtype(jnp.bfloat16)), Dense(jnp.dtype(jnp.bfloat16), unsigned=True)),
    "m int8, v float32": (Blockwise(), V),
    "m float32, v int8": (M, Blockwise(unsigned=True)),
    "m float32, v int8 to the nearest": (M, Blockwise(unsigned=True, seed=None)),
    "m as in the paper, v float32": (paper(unsigned=False), V),
    "m float32, v as in the paper": (M, paper(unsigned=True)),
    "m float32, v float8": (M, Blockwise(unsigned=True, float8=True)),
}


def run(mu: Storage, nu: Storage, scenario: str, spread: float, steps: int) -> dict[str, float]:
    """The errors of one pair of storages."""
    rng = np.random.default_rng(0)
    sizes = jnp.asarray(10 ** (spread * rng.standard_normal(SHAPE)), jnp.float32)
    means = jnp.asarray(0.3 * rng.standard_normal(SHAPE), jnp.float32)
    grows = jnp.arange(SHAPE[1]) % 2 == 1

    def update(m: jax.Array, v: jax.Array, t: jax.Array) -> jax.Array:
        return (m / (1 - B1 ** (t + 1.0))) / (jnp.sqrt(v / (1 - B2 ** (t + 1.0))) + EPS)

    def step(t: jax.Array, carry: Any) -> Any:
        (m, v), (m_kept, v_kept), (largest, error, size) = carry
        g = sizes * (means + jax.random.normal(jax.random.fold_in(jax.random.key(0), t), SHAPE))
        g = jnp.where(grows & (t > steps // 2), 4 * g, g) if scenario == "grow" else g
        m, v = (1 - B1) * g + B1 * m, (1 - B2) * g**2 + B2 * v
        new_m, new_v = (1 - B1) * g + B1 * mu.decode(m_kept), (1 - B2) * g**2 + B2 * nu.decode(v_kept)
        exact, ours, settled = update(m, v, t), update(new_m, new_v, t), t >= 100
        index = element_index(SHAPE)
        m_kept = mu.encode(new_m, m_kept, lambda: random_bits(fold(fold(0, t), 0), index))
        v_kept = nu.encode(new_v, v_kept, lambda: random_bits(fold(fold(0, t), 1), index))
        error += settled * jnp.abs(ours - exact).mean()
        size += settled * jnp.abs(exact).mean()
        return (m, v), (m_kept, v_kept), (jnp.maximum(largest, jnp.abs(ours).max()), error, size)

    leaf, zeros = jax.ShapeDtypeStruct(SHAPE, jnp.float32), jnp.zeros(SHAPE)
    start = (zeros, zeros), (mu.fresh(leaf), nu.fresh(leaf)), (0.0, 0.0, 0.0)
    (_, v), (_, v_kept), (largest, error, size) = jax.jit(lambda: jax.lax.fori_loop(0, steps, step, start))()
    low, high = np.quantile(np.asarray(nu.decode(v_kept) / v), [0.01, 0.99])
    return {"v low": low, "v high": high, "largest": float(largest), "error": float(error / size)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Errors of Adam's step with moments in 8 bits.")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/codes.json"))
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "steps": options.steps, "scenarios": {}}
    for scenario, spread in SCENARIOS:
        name = f"{scenario}, {spread} decades"
        rows = result["scenarios"][name] = {}
        print(f"\n{name:34}{'v / exact: 1% .. 99%':>22}{'largest update':>16}{'error':>8}")
        for label, (mu, nu) in {"float32": (M, V), **STORAGES}.items():
            row = rows[label] = run(mu, nu, scenario, spread, options.steps)
            print(
                f"{label:34}{row['v low']:12.2f} .. {row['v high']:6.2f}{row['largest']:16.2f}{row['error']:8.3f}",
                flush=True,
            )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwrote {options.out}")


if __name__ == "__main__":
    main()
