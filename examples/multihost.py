"""Training on many processes, of one machine or of many: ZeRO-1, sharded checkpoints, another number of devices.

    python examples/multihost.py --devices 8                alone, on eight simulated devices
    python examples/multihost.py --local 2 --devices 4      two processes here: `make multihost`
    srun python examples/multihost.py                       under SLURM; or mpirun, or on every worker of a TPU slice

Under a launcher that JAX knows, or with --coordinator, --processes and --process, all processes run this one script;
they share the global arrays, and each holds its part. You will see the loss of a small network (scikit-learn's digits),
and the bytes of optimizer state on one device. Start it again with the same --folder and it goes on from its last
checkpoint, on as many processes and devices as there are now; docs/scaling.md says more.

What to learn: the training step is that of one device. Arrays are made for a mesh, and `zero1` is one line.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import adamite
from adamite import checkpoint
from adamite.sharding import state_shardings, zero1

BATCH, WIDTH = 256, 256
SAVING = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
# What launchers set: SLURM, Open MPI (to 4), TPU slices, Kubernetes' indexed jobs.
LAUNCHERS = ("SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri", "TPU_WORKER_HOSTNAMES", "JOB_COMPLETION_INDEX")


def connect(options: argparse.Namespace) -> None:
    """Join the other processes, if there are any."""
    if options.devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options.devices)
    beat = options.heartbeat
    if options.coordinator:
        jax.distributed.initialize(
            options.coordinator, options.processes, options.process, heartbeat_timeout_seconds=beat
        )
    elif any(name in os.environ for name in LAUNCHERS):
        jax.distributed.initialize(heartbeat_timeout_seconds=beat)
    elif int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        sys.exit("JAX does not know this Open MPI: give --coordinator, --processes and --process $OMPI_COMM_WORLD_RANK")


def init(key: jax.Array, dtype: Any) -> dict[str, jax.Array]:
    keys, he = jax.random.split(key), jax.nn.initializers.he_normal()
    return {
        "w1": he(keys[0], (64, WIDTH), dtype),
        "b1": jnp.zeros(WIDTH, dtype),
        "w2": he(keys[1], (WIDTH, 10), dtype),
        "b2": jnp.zeros(10, dtype),
    }


def loss_fn(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    p = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    logits = jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def train(options: argparse.Namespace) -> None:
    """The whole run of one process."""
    connect(options)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    everywhere, rows = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("data")))
    dtype = jnp.bfloat16 if options.rounding else jnp.float32
    tx = zero1(adamite.adamw(3e-3, moments=options.moments, rounding=options.rounding), mesh)

    shapes = jax.eval_shape(lambda: init(jax.random.key(0), dtype))
    shardings = jax.tree.map(lambda _: everywhere, shapes), state_shardings(tx, shapes, everywhere)
    abstract = shapes, jax.eval_shape(tx.init, shapes)
    like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    manager = checkpoint.manager(options.folder, SAVING)
    start = manager.latest_step() or 0
    if start:
        params, state = checkpoint.restore(manager, like, tx, allow="mesh").tree
    else:
        params = jax.jit(init, static_argnums=1, out_shardings=everywhere)(jax.random.key(0), dtype)
        state = jax.jit(tx.init)(params)

    @jax.jit
    def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_fn)(params, x, y)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    def say(words: str) -> None:
        if jax.process_index() == 0:
            print(words, flush=True)

    arrays = jax.tree.leaves(state)
    here = sum(x.addressable_shards[0].data.nbytes for x in arrays)
    say(f"{jax.process_count()} processes, {jax.device_count()} devices")
    say(f"{type(state[0]).__name__}: {sum(x.nbytes for x in arrays):,} bytes, of which one device has {here:,}")
    say(f"resumed at step {start}" if start else "from the start")
    images, digits = load_digits(return_X_y=True)
    for number in range(start, options.steps):
        chosen = np.random.default_rng(number).integers(len(images), size=BATCH)  # the same in every process
        x, y = (images[chosen] / 16).astype(np.float32), digits[chosen]
        batch = (jax.make_array_from_callback(a.shape, rows, a.__getitem__) for a in (x, y))  # each makes its own rows
        params, state, loss = step(params, state, *batch)
        if (number + 1) % options.save_every == 0 or number + 1 == options.steps:
            checkpoint.save(manager, number + 1, (params, state), tx)
            say(f"step {number + 1}: loss {loss:.4f}, saved")
    manager.close()
    if options.dump and jax.process_index() == 0:
        np.save(options.dump, np.concatenate([np.ravel(p).astype(np.float32) for p in jax.tree.leaves(params)]))


def local(processes: int, arguments: list[str]) -> int:
    """Run this script as so many processes of this machine; the first that fails ends the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, __file__, "--coordinator", coordinator, "--processes", str(processes), *arguments]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and end the others
    running = [subprocess.Popen([*command, "--process", str(i)]) for i in range(processes)]
    try:
        while any(process.poll() is None for process in running):
            if any(process.poll() for process in running):
                return 1
            time.sleep(0.1)
        return max(process.returncode for process in running)
    finally:
        for process in running:
            process.kill()
            process.wait()


def count(text: str) -> int:
    """A whole number above 0."""
    if not (text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local", type=count, metavar="N", help="start N processes on this machine")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens, if no launcher says it")
    parser.add_argument("--processes", type=count, metavar="N", help="how many there are")
    parser.add_argument("--process", type=int, metavar="N", help="which of them this is, from 0")
    parser.add_argument("--devices", type=count, metavar="N", help="simulate N devices in each process")
    parser.add_argument("--heartbeat", type=count, default=100, metavar="S", help="seconds of silence that are death")
    parser.add_argument("--steps", type=count, default=100, metavar="N", help="batches of 256 (100)")
    parser.add_argument("--save-every", type=count, default=25, metavar="N", help="steps between checkpoints (25)")
    parser.add_argument("--folder", default="out/multihost", help="where they are, gs:// too (out/multihost)")
    parser.add_argument("--moments", default="float32", choices=["float32", "bfloat16", "int8"], help="see adamw")
    parser.add_argument("--rounding", choices=["stochastic", "residual8", "residual16"], help="see adamw")
    parser.add_argument("--dump", type=Path, metavar="FILE", help="write the final parameters there, as .npy")
    options = parser.parse_args()
    if bool(options.coordinator) != (options.processes is not None and options.process is not None):
        parser.error("--coordinator, --processes and --process go together")
    if options.process is not None and options.process not in range(options.processes or 0):
        parser.error(f"argument --process: must be below --processes, got {options.process}")
    if options.local:
        launcher = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        launcher.add_argument("--local")
        return local(options.local, launcher.parse_known_args()[1])
    train(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
