"""What guards, accumulation and telemetry cost to trace and compile beside the plain optimizer: `make bench-compile`.

One program is the ``update`` of AdamW under jit, the state donated, for 20 to 160 leaves, all of one shape or all of
different shapes. Times are CPU seconds of this process, all its threads together, so that neither other processes nor
the number of cores count. The ratio is to the plain optimizer's sum of both. XLA's CPU compiler takes about the same
time for every loop that it makes: ``loops`` is how many of them write an array of a leaf's size, per leaf.
"""

import argparse
import json
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from adam_step import machine

import adamite

CONTENDERS: dict[str, Callable[[Any], Any]] = {
    "plain": lambda tx: tx,
    "skip_nonfinite": adamite.skip_nonfinite,
    "skip_spikes": adamite.skip_spikes,
    "accumulate": lambda tx: adamite.accumulate(tx, 4),
    "accumulate(skip_nonfinite)": lambda tx: adamite.accumulate(adamite.skip_nonfinite(tx), 4),
    "with_telemetry": adamite.with_telemetry,
    "with_telemetry, every 100": lambda tx: adamite.with_telemetry(tx, every=100),
    "optax.MultiSteps(apply_if_finite)": lambda tx: _as_optax(optax.MultiSteps(optax.apply_if_finite(tx, 5), 4)),
}
CHOICES = {"float32": {}, "int8": {"moments": "int8"}}
LOOP = re.compile(r"^ +(?:ROOT )?%\S+ = \S*\[\d+,\d+\]\S* fusion\(", re.MULTILINE)


def _as_optax(tx: Any) -> Any:
    return optax.GradientTransformationExtraArgs(tx.init, tx.update)


def shapes(leaves: int, *, equal: bool) -> list[tuple[int, int]]:
    return [(128, 256) if equal else (64 + number, 256) for number in range(leaves)]


def measure(name: str, leaves: int, choice: str, *, equal: bool) -> dict[str, float]:
    """Of one program."""
    jax.clear_caches()
    tx = CONTENDERS[name](adamite.adamw(1e-3, **CHOICES[choice]))
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes(leaves, equal=equal)]
    state = jax.eval_shape(tx.init, params)
    start = time.process_time()
    lowered = jax.jit(lambda grads, state, params: tx.update(grads, state, params), donate_argnums=1).lower(
        params, state, params
    )
    traced = time.process_time()
    program = lowered.compile()
    compiled = time.process_time()
    return {
        "trace s": traced - start,
        "compile s": compiled - traced,
        "loops per leaf": len(LOOP.findall(program.as_text() or "")) / leaves,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU seconds to trace and compile guards and the like.")
    parser.add_argument("--leaves", type=int, nargs="+", default=[20, 40, 80, 160])
    parser.add_argument("--moments", choices=CHOICES, default="float32")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/compile-time.json"))
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    measure("plain", 2, options.moments, equal=True)  # the first program of a process takes longer
    result: dict[str, Any] = {"machine": machine(), "moments": options.moments}
    print(json.dumps(result["machine"]))
    for equal in (False, True):
        kind = "equal shapes" if equal else "different shapes"
        print(f"\n{kind:36}{'leaves':>8}{'trace s':>10}{'compile s':>11}{'ratio':>8}{'loops':>8}")
        plain: dict[int, float] = {}
        for name in CONTENDERS:
            for leaves in options.leaves:
                row = measure(name, leaves, options.moments, equal=equal)
                total = row["trace s"] + row["compile s"]
                row["ratio"] = total / plain.setdefault(leaves, total)
                result.setdefault(kind, {}).setdefault(name, {})[str(leaves)] = row
                print(
                    f"{name:36}{leaves:8}{row['trace s']:10.2f}{row['compile s']:11.2f}{row['ratio']:8.2f}"
                    f"{row['loops per leaf']:8.1f}",
                    flush=True,
                )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwrote {options.out}")


if __name__ == "__main__":
    main()
