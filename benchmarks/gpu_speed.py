"""How fast are steps on a GPU, beside a copy that is measured between them?

ms           of a step, parameters and state donated: the median of rounds, each a row of steps without a wait
bytes        that the format must move for a parameter: weights, gradients and state read, weights and state
             written; by update also the updates written and read, and the weights read again
GB/s, copy   these bytes in that time; the share of what a large array needs that is scaled in place
device ms    the kernels of a step alone, by the profiler; kernels: how many there are, copies too
x            how many times as fast as optax.adamw in float32
"""

import functools
import gc
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from gpu_bits import in_threads
from gpu_profile import events, launches
from gpu_record import Record
from gpu_trees import FORMATS, adamw, trees

ROUNDS = 7
ROW = 0.05
"""Seconds of a row of steps, at least."""
OF_COPY = 2**28


class Contender(NamedTuple):
    """A tree, and who steps it how. Optax has no format."""

    tree: str
    engine: str
    format: str = "float32, float32 weights"
    way: str = "step"

    def __str__(self) -> str:
        return f"{self.tree}: {self.engine}: {self.format}, by {self.way}"


LEAN = ["float32, float32 weights", "int8, float32 weights", "int8, residual8 weights", "bfloat16, stochastic weights"]
OTHERS = [name for name in FORMATS if name not in LEAN]


def first() -> list[Contender]:
    """What is wanted most, in this order."""
    found = []
    for tree, formats in (("leaf", [*LEAN, *OTHERS]), ("gpt2", LEAN), ("many", LEAN[:2])):
        found += [Contender(tree, "optax", way="update")] + [Contender(tree, "native", name) for name in formats]
    found += [Contender("gpt2", "native", name, "update") for name in LEAN[:3]]
    return found


def rest() -> list[Contender]:
    """What is wanted less: updates, and the engine xla, which compiles many lean leaves for minutes."""
    found = [Contender("leaf", "native", name, "update") for name in (*LEAN, *OTHERS)]
    found += [Contender(tree, "xla", LEAN[0]) for tree in ("leaf", "gpt2")]
    found += [Contender("leaf", "xla", name) for name in ("bfloat16, float32 weights", *LEAN[1:3])]
    found += [Contender("gpt2", "native", name) for name in OTHERS]
    found += [Contender("many", "native", name, "update") for name in LEAN[:2]]
    return [*found, Contender("many", "native", LEAN[2])]


def chain(run: Callable[[], Any], steps: int) -> float:
    """Seconds of a step, of several in a row."""
    began, out = time.perf_counter(), None
    for _ in range(steps):
        out = run()
    jax.block_until_ready(out)
    return (time.perf_counter() - began) / steps


def timed(run: Callable[[], Any], row: float = ROW, rounds: int = ROUNDS) -> tuple[float, float]:
    """Seconds of a step, and how far its rounds are apart, as a share of that."""
    chain(run, 2)
    steps = max(1, min(200, int(row / max(chain(run, 1), 1e-6))))
    times = [chain(run, steps) for _ in range(rounds)]
    median = statistics.median(times)
    return median, (max(times) - min(times)) / median


class Speeds:
    """Measures contenders; keeps the copy's speed and optax's time for each tree."""

    def __init__(self, record: Record) -> None:
        self.record, self.tiny = record, record.emulated
        self.trees = trees(self.tiny)
        self.row, self.rounds = (0.0, 1) if self.tiny else (ROW, ROUNDS)
        rows = record.result["rows"].get("steps", [])
        self.optax = {row["tree"]: row["ms"] for row in rows if row["engine"] == "optax"}
        self.copies: dict[str, float] = {row["tree"]: row["copy GB/s"] for row in rows}

    def copy(self) -> float:
        """GB/s of a large array that is scaled in place."""
        x = [jnp.ones(2**12 if self.tiny else OF_COPY)]
        scale = jax.jit(lambda x: x * 1.0000001, donate_argnums=0)

        def run() -> jax.Array:
            x[0] = scale(x[0])
            return x[0]

        return 8 * x[0].size / timed(run, self.row, self.rounds)[0] / 1e9

    @functools.cached_property
    def _numbers(self) -> dict[tuple[str, Any], list[np.ndarray]]:
        return {}

    def grads(self, tree: str, dtype: Any) -> list[jax.Array]:
        """Gradients, drawn on the CPU, which has nothing to compile for it."""
        key = tree, jnp.dtype(dtype)
        if key not in self._numbers:
            self._numbers.clear()
            sizes = [math.prod(shape) for shape in self.trees[tree]]
            drawn = (np.random.default_rng(0).random(sum(sizes), np.float32) * 0.02 - 0.01).astype(dtype)
            parts = np.split(drawn, np.cumsum(sizes)[:-1])
            self._numbers[key] = [x.reshape(shape) for x, shape in zip(parts, self.trees[tree], strict=True)]
        return [jnp.asarray(x) for x in self._numbers[key]]

    def warm(self) -> None:
        """Let NVRTC compile what is stepped later, many texts at once: rows then tell XLA's time alone."""

        def one(name: str, way: str) -> None:
            tx, dtype = adamw(name)
            params = [jnp.ones((64, 512), dtype)]
            jax.block_until_ready(jax.jit(step_of(tx, "native", way))(params, tx.init(params), params))

        in_threads(
            self.record,
            {
                f"{name}, {way}": functools.partial(
                    self.record.attempt, "warm", f"{name}, {way}", lambda n=name, w=way: one(n, w) or {}
                )
                for way in ("step", "update")
                for name in (FORMATS if not self.tiny else LEAN)
            },
        )

    def measure(self, its: Contender) -> dict[str, Any]:
        """The row of a contender."""
        if its.engine == "optax" or its.tree not in self.copies:
            self.copies[its.tree] = self.copy()
        tx, dtype = adamw(its.format)
        tx = optax.adamw(3e-4, weight_decay=0.1) if its.engine == "optax" else tx
        grads = self.grads(its.tree, dtype)
        held: list[Any] = [[jnp.ones(g.shape, dtype) for g in grads]]
        held.append(tx.init(held[0]))
        moved = bytes_of(tx, its, held, grads)

        t0 = time.perf_counter()
        lowered = jax.jit(step_of(tx, its.engine, its.way), donate_argnums=(0, 1)).lower(*held, grads)
        t1 = time.perf_counter()
        compiled = lowered.compile()
        t2 = time.perf_counter()

        def run() -> Any:
            held[:] = compiled(*held, grads)
            return held

        jax.block_until_ready(run())
        t3 = time.perf_counter()
        seconds, spread = timed(run, self.row, self.rounds)
        row = its._asdict() | {
            "ms": 1e3 * seconds, "spread": spread, "bytes": moved, "trace s": t1 - t0, "compile s": t2 - t1,
            "first run s": t3 - t2, "copy GB/s": self.copies[its.tree],
        }  # fmt: skip
        parameters = sum(g.size for g in grads)
        row["GB/s"] = moved * parameters / seconds / 1e9
        row["copy"] = row["GB/s"] / row["copy GB/s"]
        row["custom calls"] = launches(lowered)
        if bool(row["custom calls"]) != (its.engine == "native"):
            raise RuntimeError(f"the program has {row['custom calls']} calls of adamite's kernels")
        if its.engine == "optax":
            self.optax[its.tree] = row["ms"]
        row["x"] = self.optax[its.tree] / row["ms"] if its.tree in self.optax else None
        if memory := compiled.memory_analysis():
            given = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            row["temporary bytes"] = memory.temp_size_in_bytes / parameters
            row["peak bytes"] = (given + memory.temp_size_in_bytes) / parameters
        return row | self.profile(run, row["bytes"] * parameters / row["copy GB/s"] / 1e6)

    def profile(self, run: Callable[[], Any], at_best: float) -> dict[str, Any]:
        """What the profiler saw of three steps; a machine may not let it."""
        try:
            seen = events(lambda: [run() for _ in range(3)][-1])
        except Exception as error:
            return {"profile": repr(error)[:300]}
        kernels = sum(seen.kernels.values()) / 3
        if not kernels:
            return {"profile": "no kernels were seen"}
        ours = {name[:60]: count / 3 for name, count in sorted(seen.kernels.items(), key=lambda x: -x[1])[:5]}
        found = {"device ms": seen.ms / 3, "kernels": kernels, "most": ours, "calls": seen.calls}
        return found | {"device copy": at_best / (seen.ms / 3)}


def step_of(tx: Any, engine: str, way: str) -> Any:
    """A step, not jitted."""

    def by_update(params: Any, state: Any, grads: Any) -> Any:
        asked = {} if engine == "optax" else {"engine": engine}
        updates, state = tx.update(grads, state, params, **asked)
        return optax.apply_updates(params, updates), state

    return by_update if way == "update" else lambda p, s, g: tx.step(g, s, p, engine=engine)


def bytes_of(tx: Any, its: Contender, held: Any, grads: Any) -> float:
    """Bytes that the format must move for a parameter."""

    def size(tree: Any) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    moved = 2 * size(held) + size(grads)
    if its.way == "update" and its.engine != "optax":  # XLA fuses optax's
        updates = jax.eval_shape(lambda *of: tx.update(*of, engine="xla")[0], grads, held[1], held[0])
        moved += 2 * size(updates) + size(held[0])
    return moved / sum(g.size for g in grads)


def steps(record: Record, share: float) -> None:
    """The rows that are wanted most."""
    speeds = Speeds(record)
    speeds.warm()
    _measure(record, speeds, first()[:: 4 if record.emulated else 1], share)


def more(record: Record, share: float) -> None:
    """The rows that are wanted less."""
    _measure(record, Speeds(record), rest()[:: 6 if record.emulated else 1], share)


def _measure(record: Record, speeds: Speeds, contenders: list[Contender], share: float) -> None:
    for its in contenders:
        slow = its.engine == "xla" and its.format != LEAN[0] and not record.emulated
        make = functools.partial(speeds.measure, its)
        row = record.attempt("steps", str(its), make, share=share, needs=25 if slow else 5)
        gc.collect()
        if row:
            device = f"  device {row['device ms']:.3f} ms in {row['kernels']:g}" if "kernels" in row else ""
            x = f"{row['x']:6.2f} x" if row["x"] else ""
            record.say(
                f"{row['name']:58}{row['ms']:9.3f} ms{row['bytes']:7.2f} B{row['GB/s']:8.0f} GB/s{row['copy']:7.1%}"
                f"{x}  trace {row['trace s']:.2f} compile {row['compile s']:.2f} s{device}"
            )
