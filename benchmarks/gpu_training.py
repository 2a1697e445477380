"""Whole training steps of a GPT-2-sized model on a GPU: forward, backward and the optimizer's step in one program.

A transformer in plain JAX: 12 layers that are scanned, width 768, 1,024 tokens, activations in bfloat16. Weights are
float32, or bfloat16 where the format rounds them.
"""

import concurrent.futures
import functools
import gc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from gpu_record import Record
from gpu_speed import step_of, timed
from gpu_trees import adamw

CONTENDERS = [
    ("optax", "float32, float32 weights", "update"),
    ("native", "float32, float32 weights", "step"),
    ("native", "int8, float32 weights", "step"),
    ("native", "int8, residual8 weights", "step"),
    ("native", "int8, float32 weights", "update"),
    ("native", "float32, float32 weights", "update"),
    ("native", "int8, residual8 weights", "update"),
]


class Size:
    """Of the model and of a batch."""

    def __init__(self, tiny: bool) -> None:
        self.layers, self.width, self.heads, self.words, self.length, self.batch = (
            (2, 64, 4, 256, 32, 2) if tiny else (12, 768, 12, 50_304, 1024, 8)
        )


@functools.cache
def initial(size: Size) -> Any:
    """The weights in float32, on the CPU; those of all layers together."""
    rng, d, n = np.random.default_rng(0), size.width, size.layers

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) * np.float32(0.02)

    def full(value: float, *shape: int) -> np.ndarray:
        return np.full(shape, value, np.float32)

    layers = {
        "norm": full(1, n, 2, d), "shift": full(0, n, 2, d), "qkv": normal(n, d, 3 * d), "qkv bias": full(0, n, 3 * d),
        "out": normal(n, d, d), "out bias": full(0, n, d), "up": normal(n, d, 4 * d), "up bias": full(0, n, 4 * d),
        "down": normal(n, 4 * d, d), "down bias": full(0, n, d),
    }  # fmt: skip
    ends = {"norm": full(1, d), "shift": full(0, d)}
    return {"words": normal(size.words, d), "places": normal(size.length, d), "layers": layers, **ends}


def norm(x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    centered = wide - jnp.mean(wide, -1, keepdims=True)
    wide = centered * jax.lax.rsqrt(jnp.mean(jnp.square(centered), -1, keepdims=True) + 1e-5)
    return wide.astype(x.dtype) * scale + shift


def loss_of(params: Any, tokens: jax.Array, heads: int) -> jax.Array:
    """Mean cross-entropy of the next token."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    x = params["words"][tokens] + params["places"]

    def layer(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
        h = norm(x, w["norm"][0], w["shift"][0])
        q, k, v = jnp.split(h @ w["qkv"] + w["qkv bias"], 3, axis=-1)
        q, k, v = (y.reshape(*y.shape[:-1], heads, -1) for y in (q, k, v))
        h = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
        x = x + h @ w["out"] + w["out bias"]
        h = jax.nn.gelu(norm(x, w["norm"][1], w["shift"][1]) @ w["up"] + w["up bias"])
        return x + h @ w["down"] + w["down bias"], None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    logits = norm(x, params["norm"], params["shift"]) @ params["words"].T
    own = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1].astype(jnp.float32), tokens[:, 1:])
    return jnp.mean(own)


class Training:
    """Compiles all contenders at once, then times one after the other."""

    def __init__(self, record: Record) -> None:
        self.record, self.size = record, Size(record.emulated)
        shape = self.size.batch, self.size.length
        self.tokens = jnp.asarray(np.random.default_rng(1).integers(0, self.size.words, shape, np.int32))
        self.pool = concurrent.futures.ThreadPoolExecutor(record.threads)
        self.compiled: dict[tuple[str, str, str], Any] = {}

    def lower(self, engine: str, name: str, way: str) -> Any:
        """The program of a training step, not compiled."""
        tx, dtype = adamw(name)
        tx = optax.adamw(3e-4, weight_decay=0.1) if engine == "optax" else tx
        move = step_of(tx, engine, way)

        def train(params: Any, state: Any, tokens: Any) -> Any:
            loss, grads = jax.value_and_grad(loss_of)(params, tokens, self.size.heads)
            return *move(params, state, grads), loss

        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), initial(self.size))
        state = jax.eval_shape(tx.init, params)
        return jax.jit(train, donate_argnums=(0, 1)).lower(params, state, self.tokens)

    def compile(self, contenders: list[tuple[str, str, str]]) -> None:
        """Begin to."""
        initial(self.size)
        for its in contenders:
            self.compiled[its] = self.pool.submit(lambda its=its: self.lower(*its).compile())

    def measure(self, engine: str, name: str, way: str) -> dict[str, Any]:
        """The row of a contender."""
        run = self.compiled[engine, name, way].result()
        tx, dtype = adamw(name)
        tx = optax.adamw(3e-4, weight_decay=0.1) if engine == "optax" else tx
        params = jax.tree.map(lambda x: jnp.array(x.astype(dtype)), initial(self.size))
        held, losses = [params, tx.init(params)], []

        def step() -> Any:
            *held[:], loss = run(*held, self.tokens)
            losses.append(loss)
            return loss

        seconds, spread = timed(step, *((0.0, 1) if self.record.emulated else (0.2, 5)))
        memory = run.memory_analysis()
        kept = sum(x.nbytes for x in jax.tree.leaves(held))
        return {
            "engine": engine, "format": name, "way": way, "ms": 1e3 * seconds, "spread": spread,
            "kept MB": kept / 1e6, "temporary MB": memory.temp_size_in_bytes / 1e6 if memory else None,
            "losses": [float(losses[k]) for k in (0, 1, 2, min(9, len(losses) - 1))],
        }  # fmt: skip


def training(record: Record, share: float) -> None:
    """Every contender, optax first."""
    its = Training(record)
    wanted = CONTENDERS[::3] if record.emulated else CONTENDERS
    done = {row["name"] for row in record.result["rows"].get("training", [])}
    wanted = [own for own in wanted if ": ".join(own) not in done]
    if record.left(share) < 15:
        wanted = wanted[:1]
    its.compile(wanted)
    concurrent.futures.wait(its.compiled.values(), timeout=max(record.left(share) - 5, 1))
    for own in wanted:
        if not its.compiled[own].done():
            record.result["left out"].append(f"training: {': '.join(own)}")
            continue
        row = record.attempt("training", ": ".join(own), lambda own=own: its.measure(*own), share=share, needs=2)
        gc.collect()
        if row:
            record.say(
                f"training  {row['name']:54}{row['ms']:9.2f} ms, kept {row['kept MB']:.0f} MB, temporary "
                f"{row['temporary MB'] or 0:.0f} MB, losses {' '.join(f'{x:.3f}' for x in row['losses'])}"
            )
    its.pool.shutdown(wait=False, cancel_futures=True)
