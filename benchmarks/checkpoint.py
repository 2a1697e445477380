"""What the checks of a checkpoint cost beside Orbax alone: `make bench-checkpoint`.

Both save and restore the same float32 AdamW of 16M weights (200 MB), in turns, into a scratch folder; the ratio is the
median over rounds. "blocked" is how long training waits where writing goes on in the background.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from adam_step import machine

import adamite
from adamite.checkpoint import manager, restore, save

WEIGHTS = [(1024, 4096)] * 4
ASYNC = ocp.CheckpointManagerOptions(max_to_keep=1)


def orbax(folder: str, tree: Any) -> tuple[float, float, float]:
    """Seconds that training is blocked, until all is written, and of reading."""
    with ocp.CheckpointManager(folder, options=ASYNC) as its:
        blocked, written = timed(its, lambda: its.save(1, args=ocp.args.StandardSave(tree)))
        like = jax.tree.map(ocp.tree.to_shape_dtype_struct, tree)
        began = time.perf_counter()
        jax.block_until_ready(its.restore(1, args=ocp.args.StandardRestore(like)))
    return blocked, written, time.perf_counter() - began


def ours(folder: str, tree: Any, tx: Any) -> tuple[float, float, float]:
    """The same, with every check."""
    with manager(folder, ASYNC) as its:
        blocked, written = timed(its, lambda: save(its, 1, tree, tx))
        began = time.perf_counter()
        jax.block_until_ready(restore(its, tree, tx).tree)
    return blocked, written, time.perf_counter() - began


def timed(its: ocp.CheckpointManager, write: Callable[[], Any]) -> tuple[float, float]:
    began = time.perf_counter()
    write()
    blocked = time.perf_counter() - began
    its.wait_until_finished()
    return blocked, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description="What the checks of a checkpoint cost.")
    parser.add_argument("--rounds", type=int, default=7, help="checkpoints of each (7)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/checkpoint.json"))
    options = parser.parse_args()
    tx = adamite.adamw(1e-3)
    params = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(WEIGHTS)]
    tree = jax.tree.map(jnp.asarray, (params, tx.update(params, tx.init(params), params)[1]))
    size = sum(x.nbytes for x in jax.tree.leaves(tree))
    rounds: list[tuple[tuple[float, ...], tuple[float, ...]]] = []
    for _ in range(options.rounds + 1):
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
            rounds.append((orbax(one, tree), ours(other, tree, tx)))
    rows = {}
    print(f"{size / 1e6:.0f} MB{'Orbax, s':>20}{'adamite, s':>14}{'ratio':>10}")
    for i, name in enumerate(("blocked", "written", "restored")):
        theirs, mine = ([pair[side][i] for pair in rounds[1:]] for side in (0, 1))
        ratio = statistics.median(b / a for a, b in zip(theirs, mine, strict=True))
        rows[name] = {"orbax": statistics.median(theirs), "adamite": statistics.median(mine), "ratio": ratio}
        print(f"{name:12}{rows[name]['orbax']:14.3f}{rows[name]['adamite']:14.3f}{ratio:10.2f}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": machine(), "bytes": size, "seconds": rows}, indent=1) + "\n")
    print(f"\nwrote {options.out}")


if __name__ == "__main__":
    main()
