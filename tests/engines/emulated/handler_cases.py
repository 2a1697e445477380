"""What `test_gpu_handler.py` runs where a GPU is emulated: ``python -m engines.emulated.handler_cases CASE ...``.

Prints the traceback of each case that fails, by its name, as JSON.
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
from engines.emulated.calls import (
    KERNEL,
    TARGET,
    attributes_of,
    call,
    check,
    compiles_and_launches,
    counted,
    fresh,
    raises,
    results_of,
    words_of,
)


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
        ("begin must be", given(*good), results, of(begin=-1)),
        ("begin must be", given(*good), results, of(begin=huge)),
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
        ("must be 5 uint32 or more", [words[:-1], *good], results, of()),
        ("must be 9 uint32 or more", given(*good), results, of(axes=[0, 2])),
        ("must be 5 uint32 or more", [words.astype(jnp.int32), *good], results, of()),
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
