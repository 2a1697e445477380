"""Calls of the handler for GPUs with a kernel that is written by hand, against NumPy.

It does p += s g, writes the number of each element in the whole leaf into another array, and for each block how the
kernel's table names the leaf.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np

from engines import emulated

TARGET = "emulated_gpu_step"

KERNEL = """
#ifndef LEAVES
#define LEAVES 48
#endif
struct Leaf {
  unsigned long long rows, columns;
  unsigned first, number, own;
  unsigned short axes, vectors;
  void* array[4];
};
struct Table { const unsigned* words; unsigned leaves, unused; Leaf leaf[LEAVES]; };
#ifndef EMULATED
#define PARAMETER(T) const __grid_constant__ T
#endif
#define WARPS 1
#define TURNS 2

extern "C" __global__ void adamite_step(PARAMETER(Table) table) {
  unsigned k = 0;
  while (k + 1 < table.leaves && table.leaf[k + 1].first <= blockIdx.x) ++k;
  const Leaf& leaf = table.leaf[k];
  const float s = __uint_as_float(table.words[1]);
  const unsigned in_row = (leaf.columns + 255) / 256, blocks = leaf.rows * in_row;
  for (unsigned turn = 0; turn < TURNS; ++turn) {
    const unsigned block = (blockIdx.x - leaf.first) * TURNS + turn;
    if (block >= blocks) break;
    const unsigned row = block / in_row, column = block % in_row * 256;
    unsigned base = table.words[leaf.own];
    if (leaf.axes == 0) base += row * leaf.columns;
    unsigned left = row;
    for (unsigned axis = leaf.axes; axis-- > 0;) {
      const unsigned* its = table.words + leaf.own + 1 + 2 * axis;
      base += left % its[0] * its[1];
      left /= its[0];
    }
    for (unsigned at = column + threadIdx.x; at < column + 256 && at < leaf.columns; at += 32) {
      const unsigned long long e = row * leaf.columns + at;
      ((float*)leaf.array[0])[e] += s * ((const float*)leaf.array[1])[e];
      ((unsigned*)leaf.array[2])[e] = base + at;
    }
    if (threadIdx.x == 0) ((unsigned*)leaf.array[3])[block] = 2 * leaf.number + leaf.vectors;
  }
}
"""


def fresh(text=KERNEL):
    """The same kernel, which nothing has compiled."""
    fresh.count = getattr(fresh, "count", 0) + 1
    return f"{text}// {fresh.count}\n"


def attributes_of(text, shapes, axes=None):
    """Leaves of shapes (rows, columns); of each the axes that lead to a row, pairs of a length and a stride."""
    axes = axes or [()] * len(shapes)
    return dict(
        text=text,
        grid=np.array([32, 2]),
        begin=np.int64(1),
        operands=np.int64(2),
        reads=np.array([0, 1]),
        writes=np.array([0, 2, 3]),
        sizes=np.array([4, 4, 4, -4]),
        number=np.arange(len(shapes)) + 7,
        rows=np.array([rows for rows, _ in shapes]),
        columns=np.array([columns for _, columns in shapes]),
        axes=np.array([len(its) for its in axes]),
    )


def words_of(s, origins, axes):
    own = [x for origin, its in zip(origins, axes, strict=True) for x in (origin, *(y for axis in its for y in axis))]
    return jnp.asarray([98, 99, np.float32(s).view(np.uint32), *own], jnp.uint32)


def call(arguments, results, attributes, aliases):
    its = jax.ffi.ffi_call(TARGET, results, input_output_aliases=aliases, vmap_method="sequential")
    return its(*arguments, **attributes)


def results_of(shapes):
    found = []
    for rows, columns in shapes:
        in_blocks = jax.ShapeDtypeStruct((rows, -(-columns // 256)), jnp.uint32)
        found += [jax.ShapeDtypeStruct((rows, columns), x) for x in (jnp.float32, jnp.uint32)] + [in_blocks]
    return found


def check(text, shapes, origins=None, axes=None, donated=False, s=0.5):
    """One call by jit against NumPy."""
    origins, axes = origins or [0] * len(shapes), axes or [()] * len(shapes)
    rng = np.random.default_rng(0)
    weights, grads = ([rng.normal(size=shape).astype(np.float32) for shape in shapes] for _ in range(2))
    attributes, words = attributes_of(text, shapes, axes), words_of(s, origins, axes)
    aliases = {1 + 2 * k: 3 * k for k in range(len(shapes))}

    def step(words, weights, grads):
        arguments = [words, *(x for pair in zip(weights, grads, strict=True) for x in pair)]
        return call(arguments, results_of(shapes), attributes, aliases)

    given = [jnp.asarray(x) for x in weights]
    before = [x.unsafe_buffer_pointer() for x in given]
    new = jax.block_until_ready(jax.jit(step, donate_argnums=(1,) if donated else ())(words, given, grads))
    for k, (rows, columns) in enumerate(shapes):
        p, where, tags = new[3 * k : 3 * k + 3]
        np.testing.assert_array_equal(p, weights[k] + np.float32(s) * grads[k])
        base = np.full(rows, origins[k])
        lengths, strides = [x for x, _ in axes[k]] or [rows], [x for _, x in axes[k]] or [columns]
        base += sum(i * stride for i, stride in zip(np.unravel_index(np.arange(rows), lengths), strides, strict=True))
        np.testing.assert_array_equal(where, (base[:, None] + np.arange(columns)).astype(np.uint32))
        np.testing.assert_array_equal(tags, 2 * (7 + k) + 1)
        if donated:
            assert p.unsafe_buffer_pointer() == before[k]
        else:
            np.testing.assert_array_equal(given[k], weights[k])


def raises(message, function, *arguments):
    """That it raises an error with that text in it, which is returned."""
    try:
        jax.block_until_ready(function(*arguments))
    except RuntimeError as error:
        said = str(error)
    else:
        raise AssertionError(f"there was no error that says: {message}")
    assert re.search(message, said), f"{message} is not in: {said}"
    return said


def counted(what, function, *arguments):
    before = emulated.count(what)
    function(*arguments)
    return emulated.count(what) - before


def compiles_and_launches(function, *arguments):
    before = [emulated.count(x) for x in ("Compilations", "Launches")]
    function(*arguments)
    return [emulated.count(x) - y for x, y in zip(("Compilations", "Launches"), before, strict=True)]
