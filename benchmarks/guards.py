"""What guards, accumulation and telemetry cost beside the plain optimizer: `make bench-guards`.

One step is ``update`` and ``apply_updates`` under one jit, parameters and state donated; all take turns in one run, and
the ratio is the median over rounds to plain AdamW of the same round. The second column has ``tx.step`` with the engine
that is chosen there, to plain AdamW's ``tx.step``. The optimizer is a small part of training, so the third has whole
training steps, of an MLP with a batch of 512. ``beside`` is what XLA needs beside parameters, gradients and state, in
bytes per parameter. With ``--tpu`` (`make tpu-check`) the step is compiled for a TPU v5e, and bytes moved are counted:
of a branch all that goes in and comes out, whatever is in it.
"""

import argparse
import json
import math
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from adam_step import Contender, in_turns, machine, step_of
from hlo_bytes import moved
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import adamite
from adamite.core import as_optimizer

# Telemetry of each step comes late: what frees much memory costs its neighbour time.
CONTENDERS: dict[str, Callable[[Any], Any]] = {
    "plain": lambda tx: tx,
    "telemetry, every 100": lambda tx: adamite.with_telemetry(tx, every=100),
    "skip_nonfinite": adamite.skip_nonfinite,
    "skip_spikes": adamite.skip_spikes,
    "accumulate, every 4": lambda tx: adamite.accumulate(tx, 4),
    "guarded, every 4": lambda tx: adamite.accumulate(adamite.skip_nonfinite(tx), 4),
    "with_telemetry": adamite.with_telemetry,
    "optax.apply_if_finite": lambda tx: optax.apply_if_finite(tx, 5),
}
CHOICES = {"float32": {}, "int8": {"moments": "int8"}}
SHAPES, LEAF = [(1024, 4096), (4096, 1024), (4096,), (1024,)], (16384, 16384)


def optimizer(name: str, choice: str) -> Any:
    return CONTENDERS[name](adamite.adamw(1e-3, **CHOICES[choice]))


def compiled(tx: optax.GradientTransformation, params: list[Any]) -> Any:
    """The step's program, for the device that the parameters are on."""
    here, state = params[0].sharding, jax.eval_shape(tx.init, params)
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state)
    return step_of(tx).lower(params, state, params).compile()


class Stepper(Contender):
    """A contender whose step is ``tx.step``."""

    def __init__(self, tx: optax.GradientTransformation, grads: list[jax.Array]) -> None:
        super().__init__(tx, grads)
        one = as_optimizer(tx).step
        self.step = jax.jit(lambda params, state, grads: one(grads, state, params), donate_argnums=(0, 1))


class Training:
    """An MLP whose gradients are computed, too."""

    def __init__(self, tx: optax.GradientTransformation) -> None:
        rng = np.random.default_rng(0)
        self.params = [jnp.asarray(rng.standard_normal(shape) / 64, jnp.float32) for shape in SHAPES]
        self.state, self.x = tx.init(self.params), jnp.asarray(rng.standard_normal((512, 1024)), jnp.float32)

        def loss(params: Any, x: jax.Array) -> jax.Array:
            up, down, inner, outer = params
            return jnp.mean((jax.nn.gelu(x @ up + inner) @ down + outer - x) ** 2)

        def step(params: Any, state: Any, x: jax.Array) -> Any:
            updates, state = tx.update(jax.grad(loss)(params, x), state, params)
            return optax.apply_updates(params, updates), state

        self.step = jax.jit(step, donate_argnums=(0, 1))

    def __call__(self) -> None:
        """Take one step and wait for it."""
        self.params, self.state = jax.block_until_ready(self.step(self.params, self.state, self.x))


def ratios(runs: dict[str, Any], rounds: int) -> dict[str, float]:
    for run in [run for run in runs.values() for _ in range(2)]:
        run()
    times = in_turns({name: lambda run=run: run for name, run in runs.items()}, rounds)
    plain = times["plain"]
    return {name: statistics.median(a / b for a, b in zip(t, plain, strict=True)) for name, t in times.items()}


def on_cpu(choice: str, rounds: int) -> dict[str, dict[str, float]]:
    """A row for each contender."""
    rng = np.random.default_rng(0)
    grads = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in SHAPES]
    parameters = sum(math.prod(shape) for shape in SHAPES)
    steps = ratios({name: Contender(optimizer(name, choice), grads) for name in CONTENDERS}, rounds)
    whole = ratios({name: Stepper(optimizer(name, choice), grads) for name in CONTENDERS}, rounds)
    trainings = ratios({name: Training(optimizer(name, choice)) for name in CONTENDERS}, rounds)
    rows = {}
    for name in CONTENDERS:
        memory = compiled(optimizer(name, choice), grads).memory_analysis()
        rows[name] = {
            "update and apply, ratio": steps[name],
            "tx.step, ratio": whole[name],
            "training step, ratio": trainings[name],
            "beside, bytes per parameter": memory.temp_size_in_bytes / parameters,
        }
    return rows


def on_tpu(choice: str) -> dict[str, dict[str, float]]:
    """Bytes per parameter of one large leaf."""
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    here = NamedSharding(Mesh(np.array(chips[:1]), ("chip",)), PartitionSpec())
    params, rows = [jax.ShapeDtypeStruct(LEAF, jnp.float32, sharding=here)], {}
    for name in CONTENDERS:
        program = compiled(optimizer(name, choice), params)
        rows[name] = {
            "moved, bytes per parameter": moved(program.as_text())[0] / math.prod(LEAF),
            "beside, bytes per parameter": program.memory_analysis().temp_size_in_bytes / math.prod(LEAF),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="What guards, accumulation and telemetry cost.")
    parser.add_argument("--tpu", action="store_true", help="compile for a TPU v5e (see `make tpu-check`)")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each (15)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/guards.json"))
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "compiled for": "TPU v5e" if options.tpu else "CPU"}
    for choice in ("float32",) if options.tpu else CHOICES:
        rows = result[choice] = on_tpu(choice) if options.tpu else on_cpu(choice, options.rounds)
        print(f"\n{choice + ' moments':24}" + "".join(f"{name:>30}" for name in rows["plain"]))
        for name, row in rows.items():
            print(f"{name:24}" + "".join(f"{x:30.2f}" for x in row.values()), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwrote {options.out}")


if __name__ == "__main__":
    main()
