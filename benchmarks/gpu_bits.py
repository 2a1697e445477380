"""Are the kernels' numbers right on a GPU? Each step beside the same text as C++ on the CPU, and beside XLA's.

emulated   elements of another bit than in the emulation of `tests/engines`; must be 0. A GPU keeps subnormals, and
           so does the emulation here. NaN's own bits, and the codes of blocks whose scale is NaN, do not count.
jitted     the same beside the jitted step, whose operands (bias corrections, say) XLA computes in one program
xla        beside engine="xla": elements that differ, the largest difference in units in the last place of the
           number or of the leaf's mean magnitude, whichever is larger, and codes that differ
"""

import concurrent.futures
import functools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gpu_record import Record
from gpu_trees import FORMATS, adamw

import adamite
from adamite import storage
from adamite.core import Rule, chain, from_rule
from adamite.core.tree_pass import TreePass
from adamite.engines import Leaf
from adamite.engines.native import cuda, gpu

SHAPES = [
    *[(16, 512), (7, 1000), (5, 769), (3, 37), (1000,), (255,), (), (2, 3, 260), (1, 256), (4099, 2), (17, 257)],
    *[(64, 1024), (33, 1001)],
]
FEW = [(16, 512), (5, 1001), (300,)]
ODD = [np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-40, -1e-42, 3e38, 1e-20]


class Own(NamedTuple):
    """The state of a rule that adamite does not know."""

    mu: Any


def own_rule(moments: str) -> Any:
    """An optimizer of operations that every compiler rounds in the same way."""

    def step(scalars: Any, g: Any, m: Any) -> Any:
        del scalars
        m = 0.9 * m + 0.1 * g
        return jnp.where(jnp.abs(m) > 0.01, m / (1 + m * m), jnp.sign(g) * jnp.sqrt(jnp.abs(g))), m

    rule = Rule(lambda: (), step)
    return chain(from_rule(rule, Own, {"mu": storage.Dense()}, moments), adamite.scale_by_learning_rate(0.1))


def cases() -> dict[str, Callable[[], tuple[Any, Any]]]:
    """Optimizers, with the dtype of weights and gradients; those first that matter most."""
    found: dict[str, Any] = {f"adamw, {name}": functools.partial(adamw, name) for name in FORMATS}
    for moments in ("float32", "int8"):
        found[f"own rule, {moments}"] = lambda moments=moments: (own_rule(moments), jnp.float32)
        found[f"lion, {moments}"] = lambda moments=moments: (adamite.lion(1e-4, moments=moments), jnp.float32)
    found["lion, int8, residual8"] = lambda: (adamite.lion(1e-4, moments="int8", rounding="residual8"), jnp.bfloat16)
    found["adamw, int8, nearest"] = lambda: (adamite.adamw(3e-4, moments="int8", rounding="nearest"), jnp.bfloat16)
    found["adamw, float32 moments, float16"] = lambda: (adamite.adamw(3e-4), jnp.float16)
    return found


def draw(shapes: list[tuple[int, ...]], dtype: Any, seed: int, *, wide: bool = False, odd: bool = False) -> Any:
    """Normal numbers; `wide`: of all sizes; `odd`: one in twenty is infinite, NaN, 0, subnormal or huge."""
    rng, made = np.random.default_rng(seed), []
    for shape in shapes:
        x = rng.standard_normal(shape) * (10.0 ** rng.integers(-6, 3, shape) if wide else 1.0)
        x = np.where(rng.random(shape) < 0.05, rng.choice(ODD, shape), x) if odd else x
        with np.errstate(over="ignore"):
            made.append(jnp.asarray(np.asarray(x).astype(dtype)))
    return made


def by_engine(tx: Any, result: str, engine: str) -> Any:
    """``(params, state, grads) -> (params or updates, state)``, jitted."""
    if result == "weights":
        return jax.jit(lambda params, state, grads: tx.step(grads, state, params, engine=engine))
    return jax.jit(lambda params, state, grads: tx.update(grads, state, params, engine=engine))


def pairs(one: Any, other: Any) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The arrays of two results, and which of their elements count."""
    ends = [jax.tree.leaves(x, is_leaf=lambda y: isinstance(y, adamite.Quantized)) for x in (one, other)]
    for x, y in zip(*ends, strict=True):
        known = [None] * len(jax.tree.leaves(x))
        if isinstance(x, adamite.Quantized):  # the codes of all leaves, then their scales
            known[: len(known) // 2] = jax.tree.leaves(x.scales)
        for a, b, scales in zip(jax.tree.leaves(x), jax.tree.leaves(y), known, strict=True):
            a, b = np.asarray(a), np.asarray(b)
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                raise TypeError(f"{a.dtype}{a.shape} beside {b.dtype}{b.shape}")
            counts = np.ones(a.shape, bool)
            if scales is not None and a.dtype.itemsize == 1:
                counts = ~np.repeat(np.isnan(np.asarray(scales)), 256, axis=-1)[..., : a.shape[-1]]
            yield a, b, counts


def bits_that_differ(one: Any, other: Any) -> int:
    """Elements of another bit."""
    found = 0
    for a, b, counts in pairs(one, other):
        differ = np.atleast_1d(a).view(f"u{a.dtype.itemsize}") != np.atleast_1d(b).view(f"u{b.dtype.itemsize}")
        if jnp.issubdtype(a.dtype, jnp.floating):
            wide = [np.atleast_1d(x).astype(np.float32) for x in (a, b)]
            differ &= ~(np.isnan(wide[0]) & np.isnan(wide[1]))
        found += int(np.sum(differ & np.atleast_1d(counts)))
    return found


def distance(one: Any, other: Any) -> dict[str, Any]:
    """How far two results are from each other (see above)."""
    numbers = codes = differ = codes_differ = not_finite = 0
    ulps = 0.0
    for a, b, counts in pairs(one, other):
        if not jnp.issubdtype(a.dtype, jnp.floating):
            codes += a.size
            codes_differ += int(np.sum((a != b) & counts))
            continue
        numbers += a.size
        unit = float(jnp.finfo(a.dtype).eps)
        x, y = a.astype(np.float64), b.astype(np.float64)
        finite = np.isfinite(x) & np.isfinite(y)
        not_finite += int(np.sum(~finite & ~((x == y) | (np.isnan(x) & np.isnan(y)))))
        x, y = np.where(finite, x, 0), np.where(finite, y, 0)
        differ += int(np.sum(x != y))
        scale = np.maximum(np.abs(y), np.mean(np.abs(y))) * unit
        ulps = max(ulps, float(np.max(np.abs(x - y) / np.where(scale > 0, scale, 1), initial=0)))
    found = {"differ": differ, "of": numbers, "ulps": ulps, "codes": codes_differ, "of codes": codes}
    return found | ({"not finite in one": not_finite} if not_finite else {})


_building: dict[str, threading.Lock] = defaultdict(threading.Lock)


def by_emulation(record: Record, step: Any, scalars: Any, leaves: list[Leaf]) -> Any:
    """As `gpu.run`, on the CPU. Each text is compiled once."""
    import emulation  # pyright: ignore[reportMissingImports]  # of tests/engines (see `gpu_build.use`)

    emulation.FLAGS = [flag for flag in emulation.FLAGS if flag != "-Werror"]  # of another compiler than the tests'
    for text in {cuda.source(gpu.program_of(step, scalars, leaf)) for leaf in leaves}:
        with _building[text]:
            emulation.library(text)
    return emulation.run(step, scalars, leaves, flush=record.emulated)


def opened(tx: Any, result: str, params: Any, state: Any, grads: Any) -> tuple[Any, Any, list[Leaf]]:
    """The step of a tree, what it takes once, and the leaves."""
    run = TreePass(tx.part)
    step = run.to_weights if result == "weights" else run.to_updates
    scalars, columns = tx.part.begin(grads, state, params)
    rows = zip(grads, params, columns, strict=True)
    leaves = [Leaf(k, g, p, stored, run.rounded_to(step, g, p)) for k, (g, p, stored) in enumerate(rows)]
    refused = {gpu.why_not(step, scalars, leaf) for leaf in leaves} - {""}
    if refused:
        raise RuntimeError(f"no kernel steps it: {refused}")
    return step, scalars, leaves


def start(tx: Any, shapes: list[tuple[int, ...]], dtype: Any) -> tuple[Any, Any]:
    """Weights and a state that has seen a step."""
    params = draw(shapes, dtype, 0)
    step, scalars, leaves = opened(tx, "weights", params, state := tx.init(params), draw(shapes, dtype, 1, wide=True))
    first, columns = zip(*gpu.run(step, scalars, leaves), strict=True)
    return list(first), tx.part.end(state, list(columns), jax.tree.structure(params))


def check(record: Record, make: Callable[[], tuple[Any, Any]], result: str) -> dict[str, Any]:
    """The row of one kind of step: plain gradients, then odd ones."""
    tx, dtype = make()
    shapes = FEW if record.emulated else SHAPES
    params, state = start(tx, shapes, dtype)
    jitted, row = by_engine(tx, result, "native"), {}
    for kind in ("plain", "odd"):
        grads = draw(shapes, dtype, 2, wide=True, odd=kind == "odd")
        step, scalars, leaves = opened(tx, result, params, state, grads)
        ours, theirs = (
            (list(first), tx.part.end(state, list(columns), jax.tree.structure(grads)))
            for first, columns in (
                zip(*run(step, scalars, leaves), strict=True)
                for run in (gpu.run, functools.partial(by_emulation, record))
            )
        )
        row |= {f"{kind}, emulated": bits_that_differ(ours, theirs)}
        row |= {f"{kind}, jitted": bits_that_differ(ours, jitted(params, state, grads))}
    return row | {"of": sum(x.size for x in jax.tree.leaves(ours))}


def beside_xla(make: Callable[[], tuple[Any, Any]], result: str) -> dict[str, Any]:
    """The row of one kind of step by both engines; few leaves, for XLA compiles them one by one."""
    tx, dtype = make()
    params, state = start(tx, FEW, dtype)
    grads = draw(FEW, dtype, 2, wide=True)
    ours, theirs = (by_engine(tx, result, engine)(params, state, grads) for engine in ("native", "xla"))
    return distance(ours, theirs)


def in_threads(record: Record, items: dict[str, Callable[[], Any]]) -> None:
    """Run all of them; NVRTC, XLA and g++ compile beside each other."""
    with concurrent.futures.ThreadPoolExecutor(record.threads) as pool:
        list(pool.map(lambda run: run(), items.values()))


def bits(record: Record, share: float) -> None:
    """Every kind of step beside the emulation."""

    def one(name: str, make: Any, result: str) -> None:
        row = record.attempt("bits", f"{name}, {result}", lambda: check(record, make, result), share=share, needs=8)
        if row:
            found = ", ".join(f"{row[f'{kind}, {by}']} {kind} {by}" for kind in ("plain", "odd") for by in BESIDE)
            record.say(f"bits  {row['name']:48} differ: {found}; of {row['of']}  ({row['seconds']} s)")

    in_threads(record, {f"{k} {r}": functools.partial(one, k, make, r) for k, make, r in wanted(record)})


def xla(record: Record, share: float) -> None:
    """Some kinds of step beside XLA's."""

    def one(name: str, make: Any, result: str) -> None:
        row = record.attempt("xla", f"{name}, {result}", lambda: beside_xla(make, result), share=share, needs=15)
        if row:
            numbers = f"{row['differ']} of {row['of']} numbers differ, by {row['ulps']:.1f} ulps at most"
            record.say(f"xla   {row['name']:48} {numbers}; codes {row['codes']} of {row['of codes']}")

    in_threads(record, {f"{k} {r}": functools.partial(one, k, make, r) for k, make, r in wanted(record)})


BESIDE = ("emulated", "jitted")


def wanted(record: Record) -> list[tuple[str, Any, str]]:
    """Names, optimizers and results: steps before updates. A rehearsal has each format, rounding and rule once."""
    found = [(name, make, result) for result in ("weights", "update") for name, make in cases().items()]
    return found[::4] if record.emulated else found


def nvrtc(record: Record, share: float) -> None:
    """Seconds that NVRTC takes for the texts of some formats, one after the other; no GPU is needed."""
    import adamite_native  # pyright: ignore[reportMissingImports]  # a package of its own

    capability = "9.0" if record.emulated else str(jax.devices()[0].compute_capability)

    def one(name: str) -> dict[str, Any]:
        tx, dtype = adamw(name)
        params = [jnp.ones((64, 512), dtype)]
        step, scalars, (leaf,) = opened(tx, "weights", params, tx.init(params), params)
        text = cuda.source(gpu.program_of(step, scalars, leaf))
        began = time.perf_counter()
        code = adamite_native.compile_for_gpu(text, capability, 8)
        return {"nvrtc s": time.perf_counter() - began, "text": len(text), "code": len(code)}

    record.set("nvrtc", adamite_native.find_nvrtc() or "left to the loader")
    for name in (*(f"{moments}, float32 weights" for moments in ("float32", "int8")), "int8, residual8 weights"):
        if row := record.attempt("nvrtc", name, lambda name=name: one(name), share=share):
            record.say(f"nvrtc {name:40}{row['nvrtc s']:6.2f} s, {row['code']} bytes of code")
