"""A training run that is killed again and again while it saves, and goes on: `python tests/checkpoints/kills.py 200`.

Each life is a process forked from this one, which has imported everything and started no backend. It restores the last
checkpoint, takes steps and saves after each, in the background; at a random moment it gets SIGKILL. When there were
enough of them the last life takes what steps are left. Its parameters and state must be those of a run that was never
killed, to the bit. Some minibatches are NaN, so the guard is in the run, too.
"""

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import adamite
from adamite.checkpoint import manager, restore, save

SHAPES = {"w1": (64, 256), "w2": (256, 64)}


def life(folder: Path, steps: int, started: int, *, every: int = 1) -> str:
    """Go on from the last checkpoint to so many steps; tells the pipe `started` when its first save has begun."""
    tx = adamite.skip_nonfinite(adamite.adamw(1e-3, moments="int8", rounding="residual8"))

    @jax.jit
    def step(params, state, number):
        key = jax.random.fold_in(jax.random.key(0), number)
        g = {name: jax.random.normal(key, p.shape, p.dtype) for name, p in params.items()}
        g["w1"] = jnp.where(number % 7 == 3, jnp.nan, g["w1"])
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    tree = {name: jnp.ones(shape, jnp.bfloat16) for name, shape in SHAPES.items()}
    tree = tree, tx.init(tree)
    with manager(folder, ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)) as its:
        first = 0
        if its.latest_step() is not None:
            first, tree, record = restore(its, tree, tx)
            assert record == {"step": first}
        donating = jax.jit(step, donate_argnums=(0, 1))
        for number in range(first, steps):
            tree = donating(*tree, number)
            if (number + 1) % every == 0 or number + 1 == steps:
                save(its, number + 1, tree, tx, record={"step": number + 1})
            if number == first:
                os.write(started, b"x")
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(tree))).hexdigest()


def live(folder: Path, steps: int, kill_after: float | None, **options: int) -> str | None:
    """One life; its result, or None if it was killed so many seconds after its first save had begun."""
    begun, started = os.pipe()
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(write, life(folder, steps, started, **options).encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(started)
    os.close(write)
    with os.fdopen(begun, "rb") as begun_file, os.fdopen(read, "rb") as result:
        if kill_after is not None and begun_file.read(1):
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == -signal.SIGKILL:
            return None
        assert code == 0, f"a life ended with code {code}: it could not resume"
        return result.read().decode()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int)
    kills = parser.parse_args().kills
    steps, rng, done = kills * 8, random.Random(0), 0
    with tempfile.TemporaryDirectory() as scratch:
        jax.config.update("jax_compilation_cache_dir", f"{scratch}/programs")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        clean = live(Path(scratch) / "clean", steps, None, every=steps)
        result, torn, folder = None, 0, Path(scratch) / "killed"
        while result is None:
            result = live(folder, steps, rng.uniform(0, 0.4) if done < kills else None)
            done += result is None
            torn += any("tmp" in path.name for path in folder.iterdir()) if folder.exists() else 0
    print(f"{done} kills, {torn} of them amid a save; 0 failed resumes; the same bits: {result == clean}")
    return 0 if result == clean and done == kills else 1


if __name__ == "__main__":
    sys.exit(main())
