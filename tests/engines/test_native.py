"""The compiled kernels against XLA's programs of the same steps.

XLA's operations one by one round each result, as the kernels do: the same bits. In one program XLA fuses products with
sums (``a * b + c`` rounded once) on processors that can; there the numbers differ by a rounding here and there.
"""

import functools
import operator
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import adamite
from adamite.core.tree_pass import TreePass
from adamite.engines import Leaf
from adamite.engines.choice import may_have_kernel
from adamite.engines.native import cpu as native
from adamite.random_bits import element_index

pytestmark = pytest.mark.few(1)

library = pytest.importorskip("adamite_native", reason="it takes a C++ compiler; .ci/run insists on it")

SHAPES = [(5003,), (2, 2, 3, 5, 97)]
MORE_SHAPES = [
    (1,),
    (256,),
    (4099, 2),
    (33, 127),
    (40, 129),
    (32, 256),
    (17, 255),
    (17, 257),
    (3, 5, 7),
    (2, 3, 11, 101),
]
FEW = [(5000,), (15, 300)]

WEIGHTS = [
    ("float32", "float32", None),
    ("bfloat16", "bfloat16", None),
    ("float32", "bfloat16", None),
    ("bfloat16", "float32", None),
] + [
    ("bfloat16", gradients, rounding)
    for rounding in ("nearest", "stochastic", "residual8", "residual16")
    for gradients in ("bfloat16", "float32")
]

ADAMW = functools.partial(adamite.adamw, 1e-2, weight_decay=0.1)


def leaves_of(tx, params, grads, state, result="weights"):
    """The step, what it takes once, the leaves, and the structure of their tree."""
    run = TreePass(tx.part)
    step = run.to_weights if result == "weights" else run.to_updates
    scalars, columns = tx.part.begin(grads, state, params)
    weights, structure = jax.tree.flatten(params)
    each = zip(jax.tree.leaves(grads), weights, columns, strict=True)
    leaves = [Leaf(number, g, p, stored, run.rounded_to(step, g, p)) for number, (g, p, stored) in enumerate(each)]
    return step, scalars, leaves, structure


def by_kernels(tx, params, grads, state, result="weights"):
    """One step of the compiled kernels."""
    step, scalars, leaves, structure = leaves_of(tx, params, grads, state, result)
    assert {native.why_not(step, scalars, leaf) for leaf in leaves} == {""}
    first, columns = zip(*native.run(step, scalars, leaves), strict=True)
    return structure.unflatten(first), tx.part.end(state, list(columns), structure)


def by_xla(tx, params, grads, state, result="weights"):
    """The same step, by XLA, operation by operation."""
    step, scalars, leaves, structure = leaves_of(tx, params, grads, state, result)
    results = [
        step(scalars, leaf.number, functools.partial(element_index, leaf.g.shape), *leaf[1:5]) for leaf in leaves
    ]
    first, columns = zip(*results, strict=True)
    return structure.unflatten(first), tx.part.end(state, list(columns), structure)


def normal(shapes, dtype, seed):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def assert_same_bits(one, other):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        x, y = (np.asarray(z).astype(np.float32) if z.dtype == jnp.bfloat16 else np.asarray(z) for z in (x, y))
        nan = np.isnan(x) & np.isnan(y) if x.dtype.kind == "f" else np.zeros(x.shape, bool)
        bits = (np.where(nan, 0, z).astype(z.dtype).view(f"u{z.dtype.itemsize}") for z in (x, y))
        np.testing.assert_array_equal(*bits)


def assert_like_xla(tx, shapes, dtype="float32", gradients="float32"):
    """Two steps, and an update, are XLA's operations one by one, to the bit."""
    params = normal(shapes, dtype, 0)
    ours = theirs = (params, tx.init(params))
    for seed in (1, 2):
        grads = normal(shapes, gradients, seed)
        ours, theirs = by_kernels(tx, ours[0], grads, ours[1]), by_xla(tx, theirs[0], grads, theirs[1])
    assert_same_bits(ours, theirs)
    grads = normal(shapes, gradients, 3)
    step, _, leaves, _ = leaves_of(tx, *ours[:1], grads, ours[1], "update")
    if all(may_have_kernel("auto", step, leaf) for leaf in leaves):  # else XLA's, with Optax's bits
        assert_same_bits(*(by(tx, ours[0], grads, ours[1], "update") for by in (by_kernels, by_xla)))


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize(
    "moments",
    [pytest.param("float32", marks=pytest.mark.slow), pytest.param("bfloat16", marks=pytest.mark.slow), "int8"],
)
def test_steps_are_xlas_operations_to_the_bit(moments, weights):
    dtype, gradients, rounding = weights
    assert_like_xla(ADAMW(moments=moments, rounding=rounding), FEW, dtype, gradients)


@pytest.mark.parametrize("shape", [*SHAPES, *(pytest.param(x, marks=pytest.mark.slow) for x in MORE_SHAPES)], ids=str)
def test_shapes(shape):
    assert_like_xla(ADAMW(moments="int8", rounding="residual8"), [(3,), shape], "bfloat16", "bfloat16")


RULES = {
    "adam": adamite.adam(1e-2),
    "nadam": adamite.nadam(1e-2),
    "nadamw": adamite.nadamw(1e-2),
    "amsgrad": adamite.amsgrad(1e-2),
    "amsgrad before": adamite.amsgrad(1e-2, max_before_correction=True),
    "adabelief": adamite.adabelief(1e-2),
    "lion": adamite.lion(1e-3),
    "sgd": adamite.sgd(0.1, 0.9),
    "nesterov": adamite.sgd(0.1, 0.9, nesterov=True),
    "a schedule": adamite.adamw(optax.linear_schedule(1e-2, 0.0, 10), b1=0.8),
}


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] * (x not in ("amsgrad", "lion", "a schedule"))) for x in RULES]
)
def test_rules_are_xlas_operations_to_the_bit(name):
    assert_like_xla(RULES[name], FEW)


@pytest.mark.more
def test_unusual_numbers_come_out_as_in_xla():
    tiny = np.float32(1e-40)
    odd = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, tiny, -tiny, 1.2e-38, 3e38, -3e38, 1e-20, 1.0], np.float32)
    g, p = (x.ravel() for x in np.meshgrid(odd, odd))
    for rounding, dtype in ((None, "float32"), ("residual8", "bfloat16"), ("stochastic", "bfloat16")):
        for moments in ("float32", "bfloat16"):
            tx = ADAMW(moments=moments, rounding=rounding)
            params, grads = [jnp.asarray(p, dtype)], [jnp.asarray(g, dtype)]
            state = tx.init(params)
            assert_same_bits(by_kernels(tx, params, grads, state), by_xla(tx, params, grads, state))


@pytest.mark.more
def test_unusual_numbers_in_blocks_come_out_as_in_xla():
    tx = ADAMW(moments="int8")
    params = [jnp.ones((16, 600))]
    state = tx.init(params)
    for odd in (np.inf, -np.inf, 1e-40, 0.0, -0.0):
        grads = [normal([(16, 600)], jnp.float32, 1)[0].at[3, 300].set(odd).at[5, :256].set(odd)]
        assert_same_bits(by_kernels(tx, params, grads, state), by_xla(tx, params, grads, state))


def test_a_nan_makes_its_block_nan_and_no_other():
    """Not compared with XLA: the largest of numbers with a NaN is a number there, for some shapes."""
    tx = ADAMW(moments="int8")
    params, grads = [jnp.ones((16, 600))], normal([(16, 600)], jnp.float32, 1)
    for place in (0, 255, 256, 300, 511, 512, 599):
        _, state = by_kernels(tx, params, [grads[0].at[3, place].set(np.nan)], tx.init(params))
        for moment in (state[0].mu, state[0].nu):
            wanted = np.zeros((16, 3), bool)
            wanted[3, place // 256] = True
            np.testing.assert_array_equal(np.isnan(moment.scales[0]), wanted)


def test_trajectories_stay_with_xlas_program():
    """In one program XLA rounds a product and a sum once."""
    tx = ADAMW()
    params = normal([(64, 300)], jnp.float32, 0)
    state = tx.init(params)
    kernels, xla = (jax.jit(functools.partial(step, tx), donate_argnums=(0, 2)) for step in (by_kernels, by_xla))
    ours, theirs = jax.tree.map(jnp.copy, ((params, state), (params, state)))
    for seed in range(200):
        grads = normal([(64, 300)], jnp.float32, seed + 1)
        ours, theirs = kernels(ours[0], grads, ours[1]), xla(theirs[0], grads, theirs[1])
    np.testing.assert_allclose(ours[0][0], theirs[0][0], rtol=2e-6, atol=2e-6)


def test_codes_differ_from_those_of_xlas_program_at_ties_only():
    """Each step begins where XLA's ended: a scale that once fell to the other side of a tie would change its block."""
    tx = ADAMW(moments="int8")
    params = normal([(64, 300)], jnp.float32, 0)
    start = params, tx.init(params)
    kernels, xla = (jax.jit(functools.partial(step, tx), donate_argnums=(0, 2)) for step in (by_kernels, by_xla))
    different = 0
    for seed in range(200):
        grads = normal([(64, 300)], jnp.float32, seed + 1)
        params, state = jax.tree.map(jnp.copy, start)
        ours, start = kernels(params, grads, state), xla(start[0], grads, start[1])
        for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(start), strict=True):
            if x.dtype in (jnp.int8, jnp.uint8):
                apart = np.abs(np.asarray(x, int) - np.asarray(y, int))
                assert apart.max() <= 1
                different += np.sum(apart)
            else:
                np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-6)
    assert different <= 200 * 2 * 64 * 300 / 100_000


def test_a_single_step_is_xlas_program_to_two_roundings():
    tx = ADAMW()
    params, grads = normal([(4097,), ()], jnp.float32, 0), normal([(4097,), ()], jnp.float32, 1)
    state = tx.init(params)
    ours, theirs = (jax.jit(functools.partial(step, tx))(params, grads, state) for step in (by_kernels, by_xla))
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        if x.dtype == jnp.float32:
            # Next to 0 a weight is the difference of larger numbers: two units in the last place of what it was.
            np.testing.assert_allclose(x, y, rtol=2.4e-7, atol=1e-9)


@pytest.mark.parametrize("donated", [False, True])
def test_what_is_not_donated_is_not_changed(donated):
    tx = ADAMW(moments="int8", rounding="residual8")
    shapes = [(17, 300), (5,)]
    params, grads = normal(shapes, jnp.bfloat16, 0), normal(shapes, jnp.bfloat16, 1)
    state = tx.init(params)
    before = jax.tree.map(np.array, (params, grads, state))
    wanted = jax.tree.map(np.array, jax.jit(functools.partial(by_kernels, tx))(params, grads, state))
    step = jax.jit(functools.partial(by_kernels, tx), donate_argnums=(0, 2) if donated else ())
    assert_same_bits(step(params, grads, state), wanted)
    assert_same_bits(grads, before[1])
    if not donated:
        assert_same_bits((params, grads, state), before)
        assert_same_bits(step(params, grads, state), wanted)
        assert_same_bits(by_kernels(tx, params, grads, state)[0], wanted[0])


@pytest.mark.more
def test_many_leaves_under_scan_and_vmap():
    tx = ADAMW()
    shapes = [(n % 50 + 1,) for n in range(150)]
    params, grads = normal(shapes, jnp.float32, 0), normal(shapes, jnp.float32, 1)
    state = tx.init(params)

    @jax.jit
    def three(params, state):
        return jax.lax.scan(
            lambda carry, _: (by_kernels(tx, carry[0], grads, carry[1]), None), (params, state), length=3
        )[0]

    wanted = (params, state)
    for _ in range(3):
        wanted = jax.jit(functools.partial(by_kernels, tx))(wanted[0], grads, wanted[1])
    assert_same_bits(three(params, state), wanted)

    two = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), (params[:3], grads[:3]))
    states = jax.vmap(tx.init)(two[0])
    stepped = jax.vmap(functools.partial(by_kernels, tx))(*two, states)
    for k in (0, 1):
        own = jax.tree.map(operator.itemgetter(k), (*two, states))
        assert_same_bits(
            jax.tree.map(operator.itemgetter(k), stepped), jax.jit(functools.partial(by_kernels, tx))(*own)
        )


SCRIPT = """
import hashlib, sys
import jax, jax.numpy as jnp, numpy as np
sys.path.insert(0, sys.argv[1])
import test_native as t
tx = t.ADAMW(moments="int8", rounding="residual8")
shapes = [(700, 257), (3,), (300, 300)]
params, grads = t.normal(shapes, jnp.bfloat16, 0), t.normal(shapes, jnp.bfloat16, 1)
result = t.by_kernels(tx, params, grads, tx.init(params))
print(hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(result))).hexdigest())
"""


@pytest.mark.more
def test_results_do_not_depend_on_threads_or_instructions():
    """The kernels of another instruction set, and one, two or eight threads, give the same bits."""
    found = set()
    for threads, instructions in (("1", "v4"), ("2", "v4"), ("8", "base")):
        environment = os.environ | {"ADAMITE_NATIVE_THREADS": threads, "ADAMITE_NATIVE_SET": instructions}
        command = [sys.executable, "-c", SCRIPT, os.path.dirname(__file__)]
        found.add(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert len(found) == 1


def test_nobody_has_to_wait_for_a_step():
    """XLA runs a program of fewer operations than that at once, on the thread of its caller."""
    tx, x = ADAMW(), [jnp.ones(1)]
    step = jax.jit(functools.partial(by_kernels, tx)).lower(x, x, tx.init(x)).compile()
    assert step.cost_analysis()["flops"] >= 1000


def reason(tx, p, g=None):
    params, grads = [p], [p if g is None else g]
    step, scalars, (leaf,), _ = leaves_of(tx, params, grads, tx.init(params))
    return native.why_not(step, scalars, leaf)


def test_what_has_no_kernel_says_why():
    assert reason(ADAMW(), jnp.ones(3)) == ""
    assert reason(ADAMW(), jnp.ones((0, 3))) == "it has no elements"
    assert "complex64" in reason(adamite.adam(1e-2), jnp.ones(3, jnp.complex64))
    assert "no kernel" in reason(ADAMW(), jnp.ones(3, jnp.float16))
    assert "no kernel" in reason(adamite.adamax(1e-2), jnp.ones(3))
    with jax.enable_x64(True):
        assert "float64" in reason(ADAMW(), jnp.ones(3, jnp.float64))


def call(arguments, shapes, **attributes):
    assert native._refused() == ""
    name = next(iter(k for k, v in library.kernels().items() if any(_is_plain(of) for of in v)))
    one = np.zeros(1, np.int64)
    given = dict(kernels=name, kernel=one, number=one, columns=one + 8, axes=one, lengths=one[:0], strides=one[:0])
    given |= attributes
    return jax.block_until_ready(jax.ffi.ffi_call(native.TARGET, shapes)(*arguments, **given))


def _is_plain(of):
    return of == "adamw, float32 moments, float32 weights, float32 gradients, rounding None"


def of_axes(lengths):
    return dict(axes=np.full(1, len(lengths)), lengths=np.array(lengths), strides=np.full(len(lengths), 8))


def test_bad_calls_are_refused():
    eight, operands, origin = jnp.ones(8), jnp.zeros(10, jnp.uint32), jnp.zeros(1, jnp.uint32)
    good, results = [origin, operands, *[eight] * 4], [jax.ShapeDtypeStruct((8,), jnp.float32)] * 3
    call(good, results)
    call(good, results, axes=np.full(1, 1), lengths=np.full(1, 2), strides=np.full(1, 100), columns=np.full(1, 4))
    bad = [
        ("there is no kernel nonsense", good, results, dict(kernels="nonsense")),
        ("there is no kernel number 1", good, results, dict(kernel=np.ones(1, np.int64))),
        ("there is no kernel number -1", good, results, dict(kernel=-np.ones(1, np.int64))),
        ("as long as there are leaves", good, results, dict(number=np.zeros(2, np.int64))),
        ("must be positive", good, results, dict(columns=np.zeros(1, np.int64))),
        ("must be positive", good, results, of_axes([0])),
        ("at most 2\\^48", good, results, of_axes([2**62]) | dict(columns=np.full(1, 2**62))),
        ("at most 2\\^48", good, results, of_axes([2**30, 2**30])),
        ("no lengths and strides of 1 axes", good, results, dict(axes=np.full(1, 1))),
        ("no lengths and strides of -1 axes", good, results, dict(axes=np.full(1, -1))),
        ("too many lengths", good, results, dict(lengths=np.full(1, 1))),
        ("8 elements instead of 16", good, results, of_axes([2])),
        ("a uint32 for each of 1 leaves", [operands, *good[1:]], results, {}),
        ("a uint32 for each of 1 leaves", [jnp.zeros(1), *good[1:]], results, {}),
        ("another dtype", [origin, operands, *[eight.astype(jnp.int32)] * 4], results, {}),
        ("needs 10 operands, uint32", [origin, operands[:9], *[eight] * 4], results, {}),
        ("needs 10 operands, uint32", [origin, eight, *[eight] * 4], results, {}),
        ("too few arguments", good[:-1], results, {}),
        ("too many arguments", [*good, eight], results, {}),
        ("too few results", good, results[:-1], {}),
        ("too many results", good, [*results, results[0]], {}),
        ("too few arguments", [], results, {}),
    ]
    for message, arguments, shapes, attributes in bad:
        with pytest.raises(Exception, match=message):
            call(arguments, shapes, **attributes)


EXPORTED = """
import jax, jax.export, jax.numpy as jnp, adamite
from adamite.engines.native import cpu as native
tx, params = adamite.adamw(1e-2, moments="int8"), {"w": jnp.ones((16, 256))}
state = tx.init(params)
alone, plain = jax.jit(tx.step), jax.jit(lambda *of: tx.step(*of, engine="xla"))
known = [jax.export.DisabledSafetyCheck.custom_call(native.TARGET)]
try:
    jax.export.export(alone)(params, state, params)
except ValueError as error:
    assert native.TARGET in str(error)
    print("refused")
for exported in (jax.export.export(plain), jax.export.export(alone, disabled_checks=known)):
    ours, theirs = (step(params, state, params)[0]["w"] for step in (exported(params, state, params).call, alone))
    print(bool(jnp.allclose(ours, theirs, rtol=1e-6)))
"""


@pytest.mark.more
def test_a_step_is_exported():
    """JAX exports the custom calls that it knows. XLA's step has none; a kernel's has to be named."""
    one_device = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run([sys.executable, "-c", EXPORTED], capture_output=True, text=True, check=True, env=one_device)
    assert done.stdout.split() == ["refused", "True", "True"]


def test_one_optimizer_under_meshes_of_several_kinds():
    """What was traced under one is not computed under another."""
    tx, p = ADAMW(moments="int8", rounding="residual8"), [jnp.ones((64, 512), jnp.bfloat16)]
    steps = []
    for kind in (AxisType.Auto, AxisType.Explicit, AxisType.Auto):
        mesh = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1], axis_types=(kind,))
        with jax.set_mesh(mesh):
            own = jax.device_put(p, NamedSharding(mesh, PartitionSpec("x")))
            steps.append(jax.jit(lambda p, s: tx.step(p, s, p, engine="native"))(own, tx.init(own)))
    assert_same_bits(steps[0], steps[1])
    assert_same_bits(steps[0], steps[2])
