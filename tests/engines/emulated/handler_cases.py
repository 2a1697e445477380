"""What `test_gpu_handler.py` runs where a GPU is emulated: ``python -m engines.emulated.handler_cases CASE ...``.

Prints the traceback of each case that fails, by its name, as JSON. The kernel is written by hand: p += s g, and in
another array the number of each element in the whole leaf; for each block, how the kernel's table names the leaf.
"""

import concurrent.futures
import json
import os
import re
import sys
import traceback

import adamite_native as native
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
    return jnp.asarray([99, np.float32(s).view(np.uint32), *own], jnp.uint32)


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


def case_nvrtc_is_not_there():
    native.set_nvrtc("/nowhere/libnvrtc.so")
    raises("NVRTC was not found.*jax\\[cuda13\\]", check, KERNEL, [(1, 3)])
    raises("NVRTC was not found", native.compile_for_gpu, KERNEL, "9.0", 8)
    native.set_nvrtc(os.environ["EMULATED_NVRTC"])
    check(KERNEL, [(1, 3)])


def case_one_leaf():
    for shape in ((1, 3), (1, 256), (1, 5000), (7, 300)):
        for donated in (True, False):
            check(KERNEL, [shape], donated=donated)


def case_scalars():
    check(KERNEL, [(1, 1)] * 5)
    check(KERNEL, [(1, 1), (3, 257), (1, 1)], s=-3.0)


def case_origins_and_axes():
    axes = [((2, 5000), (3, 600)), (), ((4, 2**32 - 700),)]
    check(KERNEL, [(6, 500), (2, 300), (4, 700)], [17, 2**32 - 100, 5], axes)


def case_many_leaves():
    shapes = [(1 + k % 3, 1 + 37 * k % 700) for k in range(300)]
    text = fresh()
    assert compiles_and_launches(check, text, shapes) == [1, 3]
    assert "-DLEAVES=128 " in emulated.options()
    assert compiles_and_launches(check, text, shapes[:9]) == [0, 1]
    assert compiles_and_launches(check, text, shapes[:8]) == [1, 1]
    assert "-DLEAVES=8 " in emulated.options()


def case_many_leaves_with_an_old_driver():
    """4096 bytes of parameters are room for (4096 - 16) / (32 + 4 * 8) = 63 leaves."""
    check(KERNEL, [(1, 3)] * 3)
    assert compiles_and_launches(check, KERNEL, [(1, 3)] * 127) == [1, 3]
    assert "-DLEAVES=63 " in emulated.options()


def case_a_text_is_compiled_once():
    text = fresh()
    assert counted("Compilations", check, text, [(1, 3)]) == 1
    assert counted("Compilations", check, text, [(2, 300), (1, 1)], None, None, False, 0.25) == 0
    assert counted("Loads", check, text, [(1, 5)]) == 0
    assert emulated.options() == "--gpu-architecture=sm_90 -DLEAVES=8 --fmad=false --std=c++17 -default-device"


def case_a_program_compiles_before_it_runs():
    text = fresh()
    os.environ["EMULATED_STAGE"] = "initialize"
    arguments = [words_of(1, [0], [()]), jnp.ones((1, 3)), jnp.ones((1, 3))]
    given = arguments, results_of([(1, 3)]), attributes_of(text, [(1, 3)]), {1: 0}
    assert compiles_and_launches(call, *given) == [1, 0]
    os.environ["EMULATED_STAGE"] = "execute"
    assert compiles_and_launches(check, text, [(1, 3)]) == [0, 1]
    assert compiles_and_launches(check, fresh(), [(1, 3)]) == [1, 1]  # as where XLA calls nothing before
    del os.environ["EMULATED_STAGE"]


def at_once(function, *each):
    with concurrent.futures.ThreadPoolExecutor(len(each)) as pool:
        return [future.result() for future in [pool.submit(function, *arguments) for arguments in each]]


def case_threads_compile_once():
    text = fresh()
    assert counted("Compilations", at_once, check, *[(text, [(1, 3 + k)]) for k in range(4)]) == 1


def case_devices_compile_once_and_load_each():
    text, shapes, devices = fresh(), [(2, 300)], jax.devices()

    def on(device):
        with jax.default_device(device):
            check(text, shapes)

    before = emulated.count("Loads")
    assert len(devices) == 2
    assert counted("Compilations", at_once, on, *[(x,) for x in devices]) == 1
    assert emulated.count("Loads") - before == 2


def case_compiler_says_what_is_wrong():
    text = fresh(KERNEL.replace("leaf.columns", "leaf.colums", 1))
    error = raises("NVRTC_ERROR_COMPILATION", check, text, [(1, 3)])
    assert re.search("adamite_gpu_step: NVRTC.*error: .*has no member named .colums", error, re.DOTALL)
    assert "colums" in raises("NVRTC_ERROR_COMPILATION", native.compile_for_gpu, text, "9.0", 8)


def case_compute_capability():
    os.environ["EMULATED_CAPABILITY"] = "75"
    text = fresh()
    raises("compute capability 8.0, and this GPU has 7.5", check, text, [(1, 3)])
    os.environ["EMULATED_CAPABILITY"] = "86"  # NVRTC knows 8.0
    check(text, [(1, 3)])
    assert emulated.options().startswith("--gpu-architecture=compute_80 ")


def case_compile_for_gpu():
    text = fresh()
    assert native.compile_for_gpu(text, "10.0", 5) == text.encode() + b"\0"
    assert emulated.options().startswith("--gpu-architecture=sm_100 -DLEAVES=5 ")
    assert native.compile_for_gpu(text, "12.1", 5) == text.encode() + b"\0"
    assert emulated.options().startswith("--gpu-architecture=compute_100 ")
    raises("no GPU of compute capability 7.0 or older", native.compile_for_gpu, text, "7.0", 8)


def case_driver_is_not_there():
    raises("libcuda.so.1 was not found", check, KERNEL, [(1, 3)])


def case_bad_calls():
    shapes = [(2, 300), (1, 5)]
    p, g, q, h = (jnp.ones(shape) for shape in (*[shapes[0]] * 2, *[shapes[1]] * 2))
    words, good, results = words_of(1, [0, 0], [(), ()]), [p, g, q, h], results_of(shapes)
    aliases = {1: 0, 3: 3}

    def of(**changes):
        return attributes_of(KERNEL, shapes) | {k: np.array(v)[()] for k, v in changes.items()}

    def given(*arguments):
        return [words, *arguments]

    def change(k, shape, dtype):
        return [jax.ShapeDtypeStruct(shape, dtype) if i == k else x for i, x in enumerate(results)]

    call(given(*good), results, of(), aliases)
    huge = 2**62
    bad = [
        ("as long as there are leaves", given(*good), results, of(number=[1])),
        ("as long as there are leaves", given(*good), results, of(axes=[0, 0, 0])),
        ("grid must be", given(*good), results, of(grid=[32])),
        ("grid must be", given(*good), results, of(grid=[33, 2])),
        ("grid must be", given(*good), results, of(grid=[2048, 2])),
        ("grid must be", given(*good), results, of(grid=[32, 0])),
        ("operands must be", given(*good), results, of(operands=-1)),
        ("operands must be", given(*good), results, of(operands=huge)),
        ("1 to 32 arrays", given(*good), results, of(sizes=[4] * 33)),
        ("1 to 32 arrays", given(*good), results, of(sizes=np.zeros(0, np.int64))),
        ("there is no array 4 to read", given(*good), results, of(reads=[0, 4])),
        ("there is no array -1 to read", given(*good), results, of(reads=[0, -1])),
        ("there is no array 4 to write", given(*good), results, of(writes=[0, 2, 4])),
        ("array 1 is read twice", given(*good), results, of(reads=[1, 1])),
        ("array 2 is written twice", given(*good), results, of(writes=[0, 2, 2])),
        ("array 1 is neither read nor written", given(p, q), results, of(reads=[0])),
        ("array 1 has elements of no size", given(*good), results, of(sizes=[4, 0, 4, -4])),
        ("array 1 has elements of no size", given(*good), results, of(sizes=[4, -(2**63), 4, -4])),
        ("leaf 1: it cannot have -1 axes", given(*good), results, of(axes=[0, -1])),
        ("leaf 1: it cannot have 65 axes", given(*good), results, of(axes=[0, 65])),
        ("leaf 1: rows and columns must be positive", given(*good), results, of(rows=[2, 0])),
        ("leaf 0: rows and columns must be positive", given(*good), results, of(columns=[-300, 5])),
        ("leaf 1: rows .* at most 2\\^48", given(*good), results, of(rows=[2, huge], columns=[300, huge])),
        ("leaf 1: it has too many blocks", given(*good), results, of(rows=[2, 2**32], columns=[300, 5])),
        ("leaf 1: it has too many blocks", given(*good), results, of(rows=[2, 1], columns=[300, 2**40])),
        ("leaf 1: it has too many CTAs", given(*good), results, of(rows=[2, 2**31], columns=[300, 5], grid=[32, 1])),
        ("leaf 1: argument 1 has 4 elements instead of 5", given(p, g, q, jnp.ones((1, 4))), results, of()),
        ("leaf 0: argument 1 has elements of 2 bytes", given(p, g.astype(jnp.bfloat16), q, h), results, of()),
        ("leaf 1: result 1 has 6 elements instead of 5", given(*good), change(4, (1, 6), jnp.uint32), of()),
        ("leaf 1: result 2 has 2 elements instead of 1", given(*good), change(5, (1, 2), jnp.uint32), of()),
        ("leaf 0: result 1 has elements of 1 bytes", given(*good), change(1, (2, 300), jnp.uint8), of()),
        ("leaf 1: argument 1 is missing: too few arguments", given(p, g, q), results, of()),
        ("leaf 0: argument 0 is missing: too few arguments", given(), results, of()),
        ("too few arguments", [], results, of()),
        ("too many arguments", given(*good, p), results, of()),
        ("leaf 1: result 2 is missing: too few results", given(*good), results[:-1], of()),
        ("too many results", given(*good), [*results, results[0]], of()),
        ("must be 4 uint32", [words[:-1], *good], results, of()),
        ("must be 8 uint32", given(*good), results, of(axes=[0, 2])),
        ("must be 4 uint32", [words.astype(jnp.int32), *good], results, of()),
    ]
    launches = emulated.count("Launches")
    for message, arguments, shapes_of, attributes in bad:
        its = {k: v for k, v in aliases.items() if k < len(arguments) and v < len(shapes_of)}
        raises(f"adamite_gpu_step: .*{message}", call, arguments, shapes_of, attributes, its)
    raises("leaf 1: result 0 is not where its argument is", call, given(*good), results, of(), {1: 0})
    raises("attributes", call, given(*good), results, {k: v for k, v in of().items() if k != "axes"}, aliases)
    assert emulated.count("Launches") == launches


def case_contexts_are_left():
    """Last, of all calls before: as many were left as were entered."""
    assert emulated.count("Launches") > 0
    assert emulated.count("ContextsLeft") == 0


def main():
    emulated.register(TARGET)
    failed = {}
    for name in sys.argv[1:]:
        try:
            globals()[f"case_{name}"]()
        except Exception:
            failed[name] = traceback.format_exc()
    print(json.dumps(failed))


if __name__ == "__main__":
    main()
