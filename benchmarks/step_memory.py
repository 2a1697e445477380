"""What a step needs in memory, from the compiler: `make bench-memory` for a CPU, `make tpu-check` for a TPU.

A step is ``tx.step``, or ``update`` and ``apply_updates``, under one jit, parameters and state donated. It is compiled
and not run; for one chip of a TPU v5e, without one, also by the Pallas kernel. Rows of "auto" are steps and updates as
they are without ``engine=``, on one chip and on a mesh of 4 x 2 chips with Auto axes, which cut rows and columns;
"placed" is `adamite.sharding.placed` around the optimizer. In bytes per parameter that a chip has:

    kept     what lives between steps: weights, gradients of the weights' dtype, state
    beside   what the program needs beside that for a while
    moved    what a TPU's program reads and writes in the chip's memory; a loop is counted as if it ran once
"""

import argparse
import contextlib
import json
import math
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from adam_step import gpt2_small, machine
from hlo_bytes import moved
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

import adamite

TREES = {"one leaf of 16384 x 16384": [(16384, 16384)], "GPT-2 small, 148 leaves": gpt2_small()}
CHOICES = [
    ("float32", None),
    ("bfloat16", None),
    ("bfloat16", "stochastic"),
    ("bfloat16", "residual16"),
    ("int8", None),
    ("int8", "stochastic"),
    ("int8", "residual8"),
]


LOOPS = [("int8", None), ("int8", "residual8"), ("bfloat16", None)]
"""What is compiled for a mesh, and by `update`."""


def optimizers(engines: list[str]) -> dict[str, tuple[Any, Any, str]]:
    """Each with the dtype of its weights and the engine of its step."""
    ours: dict[str, tuple[Any, Any, str]] = {
        f"{engine}: {moments} moments, {rounding or 'float32'} weights": (
            adamite.adamw(3e-4, moments=moments, rounding=rounding),
            jnp.bfloat16 if rounding else jnp.float32,
            engine,
        )
        for engine in engines
        for moments, rounding in CHOICES
    }
    return {"optax.adamw, float32": (optax.adamw(3e-4), jnp.float32, "xla")} | ours


def measure(
    tx: optax.GradientTransformation,
    params: Any,
    here: Sharding,
    engine: str = "xla",
    *,
    by_step: bool = True,
    placed: bool = False,
) -> dict[str, float]:
    """Bytes per parameter of one step's program, compiled for the devices of `here`."""

    def step(params: Any, state: Any, grads: Any) -> Any:
        if by_step and isinstance(tx, adamite.Optimizer):
            return tx.step(grads, state, params, engine=engine)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def laid(x: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    params = [laid(p, here) for p in params]
    tx = adamite.sharding.placed(tx, params) if placed else tx
    shardings = adamite.sharding.state_shardings(tx, params, here)
    state = jax.tree.map(laid, jax.eval_shape(tx.init, params), shardings)
    start = time.perf_counter()
    mesh: Any = getattr(here, "mesh", None)
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():  # tells Pallas what chip it is
        program: Any = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()

    def on_one(x: Any) -> int:
        return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize

    n = sum(math.prod(p.sharding.shard_shape(p.shape)) for p in params)
    kept = sum(map(on_one, jax.tree.leaves((params, params, state))))
    return {
        "kept": kept / n,
        "beside": program.memory_analysis().temp_size_in_bytes / n,
        "moved": moved(program.as_text())[0] / n,
        "compile_s": time.perf_counter() - start,
    }


def loops(chips: Any) -> dict[str, dict[str, float]]:
    """Updates and steps of one leaf as they are without ``engine=``, on one chip and on eight."""
    one = NamedSharding(Mesh(np.array(chips[:1]), ("chip",), (AxisType.Auto,)), PartitionSpec())
    mesh = Mesh(np.array(chips).reshape(4, 2), ("data", "model"), (AxisType.Auto,) * 2)
    eight = NamedSharding(mesh, PartitionSpec("data", "model"))
    rows = {}
    print(f"\nauto, one leaf\n{'bytes per parameter':46}{'kept':>8}{'beside':>8}{'moved':>8}{'compile':>10}")
    for moments, rounding in LOOPS:
        tx = adamite.adamw(3e-4, moments=moments, rounding=rounding)
        params = [jax.ShapeDtypeStruct((16384, 16384), jnp.bfloat16 if rounding else jnp.float32)]
        for where, sharding, placed in (("1 chip", one, False), ("8 chips", eight, False), ("8 placed", eight, True)):
            for way in ("update", "step"):
                name = f"{moments}, {rounding or 'float32'}, {where}, {way}"
                row = rows[name] = measure(tx, params, sharding, "auto", by_step=way == "step", placed=placed)
                figures = f"{row['kept']:8.2f}{row['beside']:8.2f}{row['moved']:8.1f}{row['compile_s']:8.1f} s"
                print(f"{name:46}{figures}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes per parameter of a step of AdamW, from the compiler.")
    parser.add_argument("--tpu", action="store_true", help="compile for a TPU v5e (see `make tpu-check`)")
    parser.add_argument("--only", default="", help="a part of the name of a tree")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/step-memory.json"))
    options = parser.parse_args()
    here: Sharding = SingleDeviceSharding(jax.devices()[0])
    chips: Any = []
    if options.tpu:
        chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
        here = NamedSharding(Mesh(np.array(chips[:1]), ("chip",), (AxisType.Auto,)), PartitionSpec())
    result = {"compiled for": "TPU v5e" if options.tpu else "CPU", "machine": machine(), "trees": {}}
    wanted = {tree: shapes for tree, shapes in TREES.items() if options.only in tree}
    for tree, shapes in wanted.items():
        print(f"\n{tree}\n{'bytes per parameter':46}{'kept':>8}{'beside':>8}{'moved':>8}{'compile':>10}")
        rows = result["trees"][tree] = {}
        engines = ["xla", "pallas"] if options.tpu and len(shapes) == 1 else ["xla"]
        for name, (tx, dtype, engine) in optimizers(engines).items():
            row = rows[name] = measure(tx, [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes], here, engine)
            bytes_moved = f"{row['moved']:8.1f}" if options.tpu else f"{'':8}"
            print(f"{name:46}{row['kept']:8.2f}{row['beside']:8.2f}{bytes_moved}{row['compile_s']:8.1f} s", flush=True)
    if options.tpu:
        result["trees"]["auto, one leaf of 16384 x 16384"] = loops(chips)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwrote {options.out}")


if __name__ == "__main__":
    main()
