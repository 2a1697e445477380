"""Do the kernels hold up in all that JAX does with a step? Races, donation, loops, graphs, vmap, meshes, derivatives.

Each row says how many elements have another bit than by the plain jitted step, which must be 0 unless it says so.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_bits import bits_that_differ, by_engine, distance, draw, start
from gpu_profile import events, launches
from gpu_record import Record
from gpu_trees import adamw
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import adamite

WAYS = ("float32, float32 weights", "int8, float32 weights", "int8, residual8 weights")
RACES = (*WAYS, "bfloat16, stochastic weights", "int8, stochastic weights", "int8, residual16 weights")
SHAPES = [(64, 512), (33, 1001), (300,)]
STEPS = 5
GRAPHS = {"on": {"xla_gpu_graph_min_graph_size": 1}, "off": {"xla_gpu_enable_command_buffer": ""}}
"""XLA records in a graph what is at least so many launches long, and what it records is a list that may be empty."""


class Setting:
    """A step with its arrays."""

    def __init__(self, name: str) -> None:
        self.tx, self.dtype = adamw(name)
        self.params, self.state = start(self.tx, SHAPES, self.dtype)
        self.grads = draw(SHAPES, self.dtype, 3, wide=True)
        self.step = lambda params, state, grads: self.tx.step(grads, state, params, engine="native")
        lowered = jax.jit(self.step).lower(self.params, self.state, self.grads)
        if not launches(lowered):
            raise RuntimeError("no kernel steps it: engine native fell back to XLA")
        self.plain = lowered.compile()(self.params, self.state, self.grads)

    def after(self, steps: int) -> Any:
        """Several steps, each by itself."""
        run, held = jax.jit(self.step), (self.params, self.state)
        for _ in range(steps):
            held = run(*held, self.grads)
        return held

    def copies(self) -> Any:
        """Arrays to donate."""
        return jax.tree.map(jnp.copy, (self.params, self.state))


def races(name: str, result: str, emulated: bool) -> dict[str, Any]:
    """The same step again and again, on a tree that fills the GPU: repetitions that gave another bit."""
    tx, dtype = adamw(name)
    shapes = [(64, 512), (7, 1000)] if emulated else [(1024, 4096), (4099, 1000), (513, 769), (100_003,), (300,)]
    params, state = start(tx, shapes, dtype)
    grads = draw(shapes, dtype, 2, wide=True)
    run = by_engine(tx, result, "native")

    @jax.jit
    def differ(one: Any, other: Any) -> Any:
        def raw(x: jax.Array) -> jax.Array:
            return (
                x if jnp.issubdtype(x.dtype, jnp.integer) else jax.lax.bitcast_convert_type(x, f"uint{8 * x.itemsize}")
            )

        both = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
        return sum(jnp.sum(raw(a) != raw(b)) for a, b in both)

    first, repetitions = run(params, state, grads), 5 if emulated else 200
    found = [differ(first, run(params, state, grads)) for _ in range(repetitions)]
    return {"repetitions": repetitions, "others": sum(int(x) > 0 for x in found), "elements": sum(map(int, found))}


def donated(its: Setting) -> dict[str, Any]:
    """Weights and state donated: in the same buffers after the step."""
    held = its.copies()
    before = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(held)}
    compiled = jax.jit(its.step, donate_argnums=(0, 1)).lower(*held, its.grads).compile()
    after = compiled(*held, its.grads)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(after)]
    memory = compiled.memory_analysis()
    return {
        "differ": bits_that_differ(after, its.plain),
        "arrays elsewhere": sum(x not in before for x in pointers),
        "of arrays": len(pointers),
        "temporary bytes": memory.temp_size_in_bytes if memory else None,
    }


def scanned(its: Setting) -> dict[str, Any]:
    """A scan of steps. Its operands are computed in another program: a rounding may be another."""

    def loop(params: Any, state: Any) -> Any:
        return jax.lax.scan(lambda held, _: (its.step(*held, its.grads), None), (params, state), length=STEPS)[0]

    ours, theirs = jax.jit(loop, donate_argnums=(0, 1))(*its.copies()), its.after(STEPS)
    return {"differ": bits_that_differ(ours, theirs), "distance": distance(ours, theirs)}


def graphs(its: Setting) -> dict[str, Any]:
    """Steps with and without XLA's command buffers (CUDA graphs): the bits, the time, and the driver's calls."""
    row: dict[str, Any] = {}
    repetitions = 200 if jax.default_backend() == "gpu" else 10
    for name, options in GRAPHS.items():
        held = its.copies()
        run = jax.jit(its.step, donate_argnums=(0, 1)).lower(*held, its.grads).compile(compiler_options=options)
        for _ in range(20):
            held = run(*held, its.grads)
        row[f"{name}: differ"] = bits_that_differ(held, its.after(20))
        began = time.perf_counter()
        for _ in range(repetitions):
            held = run(*held, its.grads)
        jax.block_until_ready(held)
        row[f"{name}: ms"] = 1e3 * (time.perf_counter() - began) / repetitions

        def steps(run: Any = run, held: Any = held) -> Any:
            for _ in range(3):
                held = run(*held, its.grads)
            return held

        row[f"{name}: calls"] = events(steps).calls
    row["differ"] = sum(row[f"{name}: differ"] for name in GRAPHS)
    row["recorded"] = any("Graph" in call for call in row["on: calls"])
    return row


def vmapped(its: Setting) -> dict[str, Any]:
    """Two trees at once."""
    two = jax.tree.map(lambda x: jnp.stack([x, x]), (its.params, its.state, its.grads))
    both = jax.jit(jax.vmap(its.step))(*two)
    each = [jax.tree.map(lambda x, k=k: x[k], both) for k in range(2)]
    return {"differ": sum(bits_that_differ(one, its.plain) for one in each)}


def manual(its: Setting) -> dict[str, Any]:
    """Inside of shard_map, on a mesh of one device."""
    mesh = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1], axis_types=(AxisType.Auto,))
    run = jax.jit(jax.shard_map(its.step, mesh=mesh, in_specs=(P(), P(), P()), out_specs=P()))
    return {"differ": bits_that_differ(run(its.params, its.state, its.grads), its.plain)}


def on_mesh(its: Setting, axes: AxisType) -> dict[str, Any]:
    """Arrays that are sharded over a mesh of one device."""
    mesh = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1], axis_types=(axes,))

    def put(x: jax.Array) -> jax.Array:
        return jax.device_put(x, NamedSharding(mesh, P("x") if x.ndim else P()))

    with jax.set_mesh(mesh):
        after = jax.jit(its.step)(*jax.tree.map(put, (its.params, its.state, its.grads)))
    return {"differ": bits_that_differ(after, its.plain)}


def differentiated(its: Setting) -> dict[str, Any]:
    """The derivative through a step is that of XLA's: `distance` says how far it is from engine="xla"."""

    def loss(params: Any, engine: str) -> Any:
        after = its.tx.step(its.grads, its.state, params, engine=engine)[0]
        return sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(after))

    ours, theirs = (jax.jit(jax.grad(functools.partial(loss, engine=e)))(its.params) for e in ("native", "xla"))
    return {"distance": distance(ours, theirs)}


def eager(its: Setting) -> dict[str, Any]:
    """Without jit."""
    return {"differ": bits_that_differ(its.step(its.params, its.state, its.grads), its.plain)}


def huge(emulated: bool) -> dict[str, Any]:
    """A leaf of more than 2^31 elements, the end of which is stepped as a leaf of its own is."""
    rows, columns, end = (65, 256, 7) if emulated else (65_537, 32_768, 3)
    tx = adamite.adamw(3e-4, rounding="nearest")
    params = jnp.full((rows, columns), 0.5, jnp.bfloat16)
    line = jnp.asarray(draw([(end, columns)], jnp.bfloat16, 5)[0])
    grads = jnp.full((rows, columns), 0.25, jnp.bfloat16).at[-end:].set(line)
    small = jax.jit(lambda p, g: tx.step([g], tx.init([p]), [p], engine="native"))(params[-end:], line)
    run = jax.jit(lambda p, s, g: tx.step([g], s, [p], engine="native"), donate_argnums=(0, 1))
    (after,), state = run(params, tx.init([params]), grads)
    ends = jax.tree.map(lambda x: x[-end:] if x.ndim == 2 else x, ([after], state))
    first = {float(x) for x in np.asarray(jnp.stack([after[0, 0], after[-end - 1, -1]]), np.float32)}
    return {"elements": rows * columns, "differ": bits_that_differ(ends, small), "values of equal elements": len(first)}


KINDS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "donated": donated,
    "scan of steps": scanned,
    "graphs": graphs,
    "vmap": vmapped,
    "shard_map": manual,
    "Auto axes": functools.partial(on_mesh, axes=AxisType.Auto),
    "Explicit axes": functools.partial(on_mesh, axes=AxisType.Explicit),
    "eager": eager,
    "gradient": differentiated,
}


def ways(record: Record, share: float) -> None:
    """All of that."""
    for name in RACES[: 1 if record.emulated else None]:
        for result in ("weights", "update"):
            again = functools.partial(races, name, result, record.emulated)
            tell(record, record.attempt("races", f"{name}, {result}", again, share=share, needs=6))
    settings: dict[str, Setting] = {}
    for name in WAYS[-1:] if record.emulated else WAYS:
        for kind, run in KINDS.items():

            def make(run: Any = run, name: str = name) -> dict[str, Any]:
                if name not in settings:
                    settings[name] = Setting(name)
                return run(settings[name])

            tell(record, record.attempt("ways", f"{kind}: {name}", make, share=share, needs=6))
    tell(record, record.attempt("ways", "2^31 elements", lambda: huge(record.emulated), share=share, needs=8))


def tell(record: Record, row: dict[str, Any] | None) -> None:
    if row:
        record.say(f"ways  {row['name']:48} " + ", ".join(f"{k} {v}" for k, v in row.items() if k != "name"))
