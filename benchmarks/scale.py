"""A training step on many devices, replicated, by ZeRO-1 and by FSDP: `make bench-scale`, for TPUs `make tpu-check`.

The model is a stack of MLPs, the batch is cut over the mesh's axis "data". Here 1 to 8 devices are simulated on this
machine's cores, so that times tell how much work all devices do together, and not how fast a mesh is. With ``--tpu``
the step is compiled for slices of TPU v5e, without one, and its figures stand beside those of
`adamite.planning`: bytes that a device keeps (weights and state, in GB), needs beside, and sends. The compiler makes
loops of some exchanges of FSDP, and what is in a loop is counted once; the axis "model" adds those of activations.
"""

import argparse
import json
import pathlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from adam_step import machine
from collectives import collectives
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import adamite
from adamite.planning import Layout, layouts, sent
from adamite.sharding import state_shardings, zero1

CHOICES = [("float32", None), ("int8", "residual8")]
SLICES = [("v5e:2x4", (8, 1)), ("v5e:2x4", (4, 2)), ("v5e:4x8", (32, 1))]
CLOSE = {"kept": 0.005, "sent": 0.15}
"""How far the plan may be from the compiler; activations that the axis "model" exchanges are in what it sends."""
WAYS = ("replicated", "ZeRO-1", "FSDP")


def mlps(width: int, layers: int, dtype: Any) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """The parameters, not allocated."""
    shapes = {"up": (width, 4 * width), "down": (4 * width, width), "bias": (width,)}
    return [{name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()} for _ in range(layers)]


def training_step(tx: optax.GradientTransformation, mesh: Mesh) -> Any:
    """One step; activations are computed again in the backward pass, as large models do."""
    rows = NamedSharding(mesh, PartitionSpec("data"))

    @jax.checkpoint
    def layer(x: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
        x = x + jax.nn.gelu(x @ p["up"]) @ p["down"] + p["bias"]
        return jax.lax.with_sharding_constraint(x, rows)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        for p in params:
            x = layer(x, p)
        return jnp.mean(x.astype(jnp.float32) ** 2)

    def step(params: Any, state: Any, x: jax.Array) -> Any:
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def placed(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes with shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def compile_step(layout: Layout, params: Any, mesh: Mesh, rows: int) -> Any:
    """The step's program."""
    params = placed(params, layout.shardings)
    state = placed(jax.eval_shape(layout.tx.init, params), state_shardings(layout.tx, params))
    batch = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((rows, params[0]["bias"].size), params[0]["bias"].dtype, sharding=batch)
    return training_step(layout.tx, mesh).lower(params, state, x).compile()


def on_tpu(topology: str, shape: tuple[int, int], choice: tuple[str, str | None]) -> dict[str, dict[str, float]]:
    """What the compiler and the plan say of one slice, in GB on each device."""
    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(chips).reshape(shape), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    moments, rounding = choice
    params = mlps(2048, 4, jnp.bfloat16 if rounding else jnp.float32)
    tx = adamite.adamw(1e-3, moments=moments, rounding=rounding)
    rows = {}
    for name, layout in layouts(tx, params, mesh).items():
        program = compile_step(layout, params, mesh, 16 * shape[0])
        memory, found = program.memory_analysis(), collectives(program.as_text())
        plan = adamite.memory_report(layout.tx, params, shardings=layout.shardings).per_device
        largest = max((one.size for one in found if one.kind == "all-reduce"), default=0)
        rows[name] = {
            "kept": memory.argument_size_in_bytes / 1e9,
            "kept, planned": (plan.weights + plan.state) / 1e9,
            "beside": memory.temp_size_in_bytes / 1e9,
            "sent": sum(one.sent for one in found) / 1e9,
            "sent, planned": sent(layout, params) / 1e9,
            "largest all-reduce": largest / 1e9,
            **{kind: sum(one.kind == kind for one in found) for kind in ("all-reduce", "reduce-scatter", "all-gather")},
        }
        matrix = 2048 * 4 * 2048 // shape[1]
        if name == "ZeRO-1" and (largest >= matrix or not rows[name]["reduce-scatter"]):
            raise SystemExit(f"ZeRO-1 on {topology} sums whole matrices: {rows[name]}")
        for figure, close in CLOSE.items():
            found, planned = rows[name][figure], rows[name][f"{figure}, planned"]
            if name != "FSDP" and abs(found - planned) > close * found:
                raise SystemExit(f"{name} on {topology}: the plan says {planned:.4f} GB {figure}, not {found:.4f}")
    return rows


def muon_beside_adam() -> dict[str, int]:
    """ZeRO-1 around `optax.partition`: matrices by Muon, which mixes rows and columns, biases by Adam."""
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = Mesh(np.array(chips), ("data",), axis_types=(AxisType.Auto,))
    params = mlps(1024, 1, jnp.float32)
    labels = jax.tree.map(lambda p: "muon" if len(p.shape) == 2 else "adam", params)
    muon = optax.contrib.scale_by_muon(
        weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), tree)
    )
    matrices = optax.chain(muon, adamite.scale_by_learning_rate(1e-2))
    tx = zero1(optax.partition({"muon": matrices, "adam": adamite.adam(1e-3)}, labels), mesh)
    layout = Layout(tx, jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), params))
    found = collectives(compile_step(layout, params, mesh, 128).as_text())
    return {kind: sum(one.kind == kind for one in found) for kind in ("all-reduce", "reduce-scatter", "all-gather")}


def check_tpu() -> dict[str, Any]:
    """All slices, printed."""
    result: dict[str, Any] = {"compiled for": "TPU v5e"}
    for topology, shape in SLICES:
        for choice in CHOICES:
            title = f"{topology}, data = {shape[0]}, model = {shape[1]}: {choice[0]}, {choice[1] or 'float32 weights'}"
            rows = result[title] = on_tpu(topology, shape, choice)
            print(f"\n{title}\n{'':22}" + "".join(f"{way:>14}" for way in WAYS))
            for name in rows["ZeRO-1"]:
                digits = 0 if name in ("all-reduce", "reduce-scatter", "all-gather") else 4
                print(f"{name:22}" + "".join(f"{rows[way][name]:14.{digits}f}" for way in WAYS), flush=True)
    result["Muon beside Adam, ZeRO-1, v5e:2x4"] = muon_beside_adam()
    print(f"\nMuon beside Adam, ZeRO-1: {result['Muon beside Adam, ZeRO-1, v5e:2x4']}")
    return result


def timed(layout: Layout, params: Any, mesh: Mesh, steps: int) -> tuple[float, int]:
    """Seconds of a step, the median, and bytes of weights and state on one device."""
    step = training_step(layout.tx, mesh)
    weights = jax.tree.map(lambda p, s: jax.device_put(jnp.full(p.shape, 0.01, p.dtype), s), params, layout.shardings)
    state = layout.tx.init(weights)
    x = jax.device_put(jnp.ones((64, params[0]["bias"].size)), NamedSharding(mesh, PartitionSpec("data")))
    kept = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves((weights, state)))
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        weights, state = jax.block_until_ready(step(weights, state, x))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]), kept


def simulate(steps: int) -> dict[str, Any]:
    """1 to 8 simulated devices, printed."""
    params = mlps(1024, 2, jnp.float32)
    tx = adamite.adamw(1e-3)
    result = {}
    print(f"{'devices':>8}{'':14}{'step, s':>10}{'MB on one device':>18}{'MB on all':>12}")
    for devices in (1, 2, 4, 8):
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
        for way, layout in layouts(tx, params, mesh).items():
            seconds, kept = timed(layout, params, mesh, steps)
            result[f"{devices}, {way}"] = {"step_s": seconds, "bytes on one device": kept}
            print(f"{devices:8}  {way:12}{seconds:10.3f}{kept / 1e6:18.1f}{devices * kept / 1e6:12.1f}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="A training step on many devices, in time and in bytes.")
    parser.add_argument("--tpu", action="store_true", help="compile for slices of TPU v5e (see `make tpu-check`)")
    parser.add_argument("--steps", type=int, default=5, help="steps of which the median is taken (5)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/scale.json"))
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    figures = check_tpu() if options.tpu else simulate(options.steps)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": machine(), "figures": figures}, indent=1) + "\n")
    print(f"\nwrote {options.out}")


if __name__ == "__main__":
    main()
