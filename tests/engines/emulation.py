"""Steps of the kernels for GPUs, run on a CPU: the CUDA text is C++ behind a header (see `emulated`)."""

import ctypes
import hashlib
import pathlib
import subprocess
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from adamite.core.tree_pass import TreePass
from adamite.engines import Leaf
from adamite.engines.native import cuda, gpu
from adamite.engines.native.rows import rows_of

HERE = pathlib.Path(__file__).parent / "emulated"
FOLDER = tempfile.TemporaryDirectory(prefix="adamite-emulated-")
LEAVES = 128
"""Of one launch, at most."""
FLAGS = [
    *("-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-Wall", "-Werror", "-Wno-unknown-pragmas"),
    *("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"),  # a vector that is not aligned ends the process
]

_libraries = {}


def library(text):
    """The kernel of a text, compiled for this CPU."""
    if text not in _libraries:
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        kernel, built = (pathlib.Path(FOLDER.name) / f"{name}.{end}" for end in ("cu", "so"))
        kernel.write_text(text)
        defined = [f'-DKERNEL="{kernel}"', f"-DLEAVES={LEAVES}"]
        subprocess.run(["g++", "-O0", *FLAGS, *defined, str(HERE / "emulate.cc"), "-o", str(built)], check=True)
        _libraries[text] = ctypes.CDLL(str(built))
    return _libraries[text]


def step_group(its, scalars, leaves, flush=True):
    """The arrays of leaves of one program after a step: of each leaf those that are written, by their places."""
    slots = cuda.slots(its)
    words = np.array(gpu.words([gpu.Call(its, its.operands(scalars), leaves)])[0])
    table, buffers, ctas, own = [np.array([words.ctypes.data, len(leaves)], np.uint64)], [], 0, len(its.scalars)
    for leaf in leaves:
        rows = rows_of(its, leaf)
        held = {x.place: np.array(leaf.arrays[x.place], order="C") for x in its.inputs}
        for x in its.outputs:
            like = leaf.g if x.kind == "element" else leaf.arrays[x.place]
            held.setdefault(x.place, np.zeros(like.shape, x.dtype))
        buffers.append(held)
        head = np.array([rows.rows, rows.columns], np.uint64)
        aligned = all(held[place].ctypes.data % 16 == 0 for place in slots)
        last = np.array([ctas, leaf.number, own, len(rows.axes) | aligned << 16], np.uint32).view(np.uint64)
        table.append(np.concatenate([head, last, np.array([held[place].ctypes.data for place in slots], np.uint64)]))
        ctas += -(-rows.rows * -(-rows.columns // 256) // (cuda.WARPS * cuda.TURNS))
        own += 1 + 2 * len(rows.axes)
    table = np.concatenate([*table, np.zeros(len(table[-1]) * (LEAVES - len(leaves)), np.uint64)])
    failed = library(cuda.source(its)).run(ctypes.c_void_p(table.ctypes.data), ctas, int(flush))
    assert not failed, "the lanes of a warp went different ways"
    return [{x.place: held[x.place] for x in its.outputs} for held in buffers]


def run(step, scalars, leaves, flush=True):
    """As `gpu.run`."""
    programs = [gpu.program_of(step, scalars, leaf) for leaf in leaves]
    results = [None] * len(leaves)
    for its in {own.name: own for own in programs}.values():
        members = [i for i, other in enumerate(programs) if other.name == its.name]
        for i, new in zip(members, step_group(its, scalars, [leaves[i] for i in members], flush), strict=True):
            begin = len(leaves[i].arrays) - len(leaves[i].kept)
            stored = [jnp.asarray(new.get(begin + k, x)) for k, x in enumerate(leaves[i].kept)]
            first = next(jnp.asarray(x) for place, x in new.items() if place < begin)
            results[i] = first, jax.tree.unflatten(jax.tree.structure(leaves[i].stored), stored)
    return results


def by_emulation(tx, params, grads, state, result="weights", flush=True):
    """One step, or the updates of one."""
    run_of = TreePass(tx.part)
    step = run_of.to_weights if result == "weights" else run_of.to_updates
    scalars, columns = tx.part.begin(grads, state, params)
    weights, structure = jax.tree.flatten(params)
    rows = zip(jax.tree.leaves(grads), weights, columns, strict=True)
    leaves = [Leaf(i, g, p, stored, run_of.rounded_to(step, g, p)) for i, (g, p, stored) in enumerate(rows)]
    first, columns = zip(*run(step, scalars, leaves, flush), strict=True)
    return structure.unflatten(first), tx.part.end(state, list(columns), structure)
