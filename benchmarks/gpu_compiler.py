"""What compilers make of a step of AdamW for an NVIDIA H100, without a GPU: `make gpu-check`.

A step is ``tx.step``, or ``update`` and ``optax.apply_updates``, under one jit, parameters and state donated, compiled
by XLA's GPU compiler for one leaf of 16384 x 16384 and for the 148 leaves of GPT-2 small:

    moved        bytes per parameter that all kernels read and write in the GPU's memory
    temporary    bytes per parameter that the program needs beside its arguments and results
    launches     kernels that it launches
    trace s      CPU seconds of JAX, to trace and lower
    compile s    CPU seconds of XLA

Kernels that adamite prints as CUDA C++ are compiled by NVRTC (see `sass`): registers of a thread, bytes of local
memory, instructions per element, and how long these take where the time that the memory takes is 1.

With ``--check`` only what compiles in seconds is compiled: for many leaves XLA takes up to 20 for most formats. Every
figure but the seconds is then compared with `results/gpu-compiler.json`; the check fails where one is larger, or not
there. Figures of other versions of the compilers are not compared.
"""

import argparse
import importlib.metadata
import itertools
import json
import math
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from adam_step import gpt2_small, machine
from hlo_launches import launches
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from sass import report, time_of_issue

import adamite
from adamite.core.tree_pass import TreePass
from adamite.engines import Leaf
from adamite.engines.native import gpu as gpu_engine
from adamite.engines.native.cuda import source
from adamite.engines.native.program import BLOCK, Program

HERE = pathlib.Path(__file__).parent
COMMITTED = HERE / "results" / "gpu-compiler.json"
GPU, COMPUTE_CAPABILITY = "H100", (9, 0)
ENGINES = ("xla", "native")
"""Whose steps are compiled by XLA. One of "native" must hold a custom call."""

TREES = {"one leaf of 16384 x 16384": [(16384, 16384)], "GPT-2 small, 148 leaves": gpt2_small()}
FORMATS = [*itertools.product(("float32", "bfloat16", "int8"), (None, "stochastic", "residual8"))]
WAYS = ("update", "step")
KERNELS = "kernels"
EACH = BLOCK // 32
"""Elements of a lane."""
EXACT = (
    "moved", "temporary", "launches", "registers", "spilled bytes", "memory accesses", "instructions per element"
)  # fmt: skip
"""Figures that are compared."""


class Row(NamedTuple):
    """One optimizer, and how it steps."""

    name: str
    tx: Any
    weights: Any
    engine: str | None
    way: str
    is_slow: bool  # to compile for many leaves


def rows() -> Iterator[Row]:
    yield Row("optax.adamw, float32", optax.adamw(3e-4), jnp.float32, None, "update", is_slow=False)
    for engine, (moments, rounding), way in itertools.product(ENGINES, FORMATS, WAYS):
        tx = adamite.adamw(3e-4, weight_decay=0.1, moments=moments, rounding=rounding)
        weights = jnp.bfloat16 if rounding else jnp.float32
        slow = engine == "xla" and (moments == "int8" or rounding is not None)
        yield Row(f"{engine}: {_named(moments, rounding)}, {way}", tx, weights, engine, way, slow)


def _named(moments: str, rounding: str | None) -> str:
    return f"{moments} moments, {rounding or 'float32'} weights"


def gpu() -> NamedSharding:
    """Where arrays are on the GPU that `h100_sxm.txtpb` describes."""
    described = (HERE / "h100_sxm.txtpb").read_text()
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=described, topology="1x1x1"
    )
    return NamedSharding(Mesh(np.array(topology.devices[:1]), ("gpu",), (AxisType.Auto,)), PartitionSpec())


def compile_step(row: Row, shapes: list[tuple[int, ...]], here: NamedSharding) -> dict[str, float]:
    """The figures of one program."""
    jax.clear_caches()

    def step(params: Any, state: Any, grads: Any) -> Any:
        if row.way == "step":
            return row.tx.step(grads, state, params, engine=row.engine)
        asked = {"engine": row.engine} if row.engine else {}
        updates, state = row.tx.update(grads, state, params, **asked)
        return optax.apply_updates(params, updates), state

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)

    params = placed([jax.ShapeDtypeStruct(shape, row.weights) for shape in shapes])
    state = placed(jax.eval_shape(row.tx.init, params))
    mesh: Any = here.mesh  # that kernels may ask what GPU it is
    start = time.process_time()
    with jax.set_mesh(mesh):
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)
    traced = time.process_time()
    if row.engine == "native" and "adamite_gpu_step" not in lowered.as_text():
        raise RuntimeError(f"{row.name}: the engine fell back to XLA")
    lowered_at = time.process_time()
    compiled: Any = lowered.compile()
    seconds = time.process_time() - lowered_at
    found, n = launches(compiled.as_text()), sum(map(math.prod, shapes))
    return {
        "moved": sum(one.moved for one in found) / n,
        "temporary": compiled.memory_analysis().temp_size_in_bytes / n,
        "launches": sum(one.times for one in found),
        "trace s": traced - start,
        "compile s": seconds,
    }


def step_of(moments: str, rounding: str | None, way: str) -> Program:
    """What a step of one leaf does, as kernels are printed from it."""
    tx: Any = adamite.adamw(3e-4, weight_decay=0.1, moments=moments, rounding=rounding)
    p = jnp.zeros((32, 256), jnp.bfloat16 if rounding else jnp.float32)
    scalars, (stored,) = tx.part.begin({"leaf": p}, tx.init({"leaf": p}), {"leaf": p})
    run = TreePass(tx.part)
    step = run.to_weights if way == "step" else run.to_updates
    return gpu_engine.program_of(step, scalars, Leaf(0, p, p, stored, run.rounded_to(step, p, p)))


def compile_kernel(own: Program) -> dict[str, Any]:
    """The figures of one printed kernel."""
    arrays = [(x, jnp.dtype(x.dtype).itemsize) for x in (*own.inputs, *own.outputs)]
    of_lane = [size * EACH if x.kind == "element" else size for x, size in arrays]
    read = len(own.inputs)
    figures = report(source(own), COMPUTE_CAPABILITY, sum(of_lane[:read]), sum(of_lane[read:]))
    moved = sum(size / (1 if x.kind == "element" else own.block) for x, size in arrays)
    return {"moved": moved, **figures, "issue of memory time": time_of_issue(figures, moved, GPU)}


def worse(now: dict[str, dict[str, Any]], committed: dict[str, dict[str, Any]]) -> list[str]:
    """In words, each figure that is larger than the committed one, or has none."""
    said = []
    for name, figures in now.items():
        for figure in (x for x in EXACT if x in figures):
            new, old = figures[figure], committed.get(name, {}).get(figure)
            if old is None:
                said.append(f"{name}: {figure} is {new:.6g}, and {COMMITTED.name} has no such figure")
            elif new > old:
                said.append(f"{name}: {figure} is {new:.6g}, and was {old:.6g}")
    return said


def versions(*names: str) -> dict[str, str]:
    """Those of packages."""
    return {name: importlib.metadata.version(name) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes, launches and instructions of a step on an H100, without one.")
    parser.add_argument("--check", action="store_true", help="what compiles fast, compared with the committed figures")
    parser.add_argument("--only", default="", help="a part of the name of a row: the file keeps the figures of others")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/gpu-compiler.json"))
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    compilers = {"xla": versions("jax", "jax-cuda13-pjrt"), "nvrtc": versions("nvidia-cuda-nvrtc")}
    result: dict[str, Any] = {"compiled for": GPU, "machine": machine(), **compilers}
    here = gpu()
    compile_step(next(rows()), [(8, 256)], here)  # the first program of a process takes longer
    sections: dict[str, dict[str, Any]] = {}
    there = json.loads(options.out.read_text())["sections"] if options.only and options.out.exists() else {}

    def keep(section: str, name: str, figures: dict[str, Any]) -> None:
        sections.setdefault(section, {})[name] = figures
        there.setdefault(section, {})[name] = figures
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result | {"sections": there}, indent=1) + "\n")

    for tree, shapes in TREES.items():
        print(f"\n{tree}\n{'':56}{'moved':>8}{'temporary':>11}{'launches':>10}{'trace':>9}{'compile':>10}")
        for row in rows():
            if options.only in row.name and not (options.check and row.is_slow and len(shapes) > 1):
                figures = compile_step(row, shapes, here)
                keep(tree, row.name, figures)
                print(
                    f"{row.name:56}{figures['moved']:8.2f}{figures['temporary']:11.2f}{figures['launches']:10}"
                    f"{figures['trace s']:7.2f} s{figures['compile s']:8.2f} s",
                    flush=True,
                )
    print(f"\n{KERNELS:56}{'moved':>8}{'registers':>11}{'spilled':>9}{'instructions':>14}{'issue':>7}{'compile':>10}")
    for (moments, rounding), way in itertools.product(FORMATS, WAYS):
        name = f"kernel: {_named(moments, rounding)}, {way}"
        if options.only in name:
            figures = compile_kernel(step_of(moments, rounding, way))
            keep(KERNELS, name, figures)
            print(
                f"{name:56}{figures['moved']:8.2f}{figures['registers']:11}{figures['spilled bytes']:9}"
                f"{figures['instructions per element']:14.1f}{figures['issue of memory time']:7.2f}"
                f"{figures['compile s']:8.2f} s",
                flush=True,
            )
    print(f"\nwrote {options.out}")
    if options.check:
        sys.exit(not passes(result, sections))


def passes(result: dict[str, Any], sections: dict[str, Any]) -> bool:
    """Whether no figure is worse than the committed one; those that are, are printed."""
    committed, said, compared = json.loads(COMMITTED.read_text()), [], 0
    for section, figures in sections.items():
        compiler = "nvrtc" if section == KERNELS else "xla"
        if result[compiler] != committed[compiler]:
            print(f"{section}: not compared, for {COMMITTED.name} is of {compiler} {committed[compiler]}")
        else:
            compared += len(figures)
            said += [f"{section}: {line}" for line in worse(figures, committed["sections"].get(section, {}))]
    print(f"compared {compared} rows with {COMMITTED.name}, {len(said)} figures are worse", *said, sep="\n")
    return not said


if __name__ == "__main__":
    main()
