"""The report's bytes are those of the arrays, leaf by leaf and device by device; the plan's are the report's."""

import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import P
from jax.sharding import AbstractMesh, AxisType, NamedSharding

import adamite
import adamite.__main__
from adamite.__main__ import main
from adamite.engines.native.library import library
from adamite.memory import CHOSEN, SMALL
from adamite.planning import decoder, layouts, sent

pytestmark = pytest.mark.few(3)

D = 768
BLOCK = [(D,), (D,), (D, 3 * D), (3 * D,), (D, D), (D,), (D,), (D,), (D, 4 * D), (4 * D,), (4 * D, D), (D,)]
GPT2 = [(50257, D), (1024, D), *BLOCK * 12, (D,), (D,)]


def abstract(shapes, dtype=jnp.float32):
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def by_path(path, leaf):
    return "float32" if "embedding" in jax.tree_util.keystr(path) else ("int8", "bfloat16")


PARAMS = {
    "embedding": jnp.ones((40, 300)),
    "layers": [jnp.ones((64, 640), jnp.bfloat16), jnp.ones(640)],
    "scale": jnp.ones(()),
}
OPTIMIZERS = {
    "adamite": adamite.adamw(1e-3),
    "int8": adamite.adamw(1e-3, moments="int8"),
    "lean": adamite.adamw(1e-3, moments=("int8", "float8"), rounding="residual8"),
    "residual16": adamite.amsgrad(1e-3, moments="bfloat16", rounding="residual16"),
    "by path": adamite.adamw(optax.linear_schedule(1e-3, 0.0, 9), moments=by_path),
    "counted": adamite.rmsprop(1e-3, moments="int8", centered=True),
    "adam_mini": adamite.adam_mini(1e-3),
    "sgd": adamite.sgd(1e-3),
    "optax": optax.adamw(1e-3, mu_dtype=jnp.bfloat16),
    "adafactor": optax.adafactor(1e-3),
    "lookahead-free": optax.chain(optax.clip_by_global_norm(1.0), optax.adadelta(1e-3), optax.ema(0.9)),
    "masked": optax.masked(adamite.adam(1e-3, moments="int8"), {"embedding": True, "layers": False, "scale": True}),
    "partition": optax.partition(
        {"a": adamite.adam(1e-3, moments="int8"), "b": optax.sgd(1e-3, momentum=0.9)},
        {"embedding": "a", "layers": ["a", "b"], "scale": "b"},
    ),
    "MultiSteps": optax.MultiSteps(adamite.adam(1e-3, moments="int8"), 4),
    "inject_hyperparams": optax.inject_hyperparams(adamite.adam)(1e-3),
    "flatten": optax.flatten(optax.adam(1e-3)),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bytes_are_those_of_the_arrays(optimizer):
    tx = OPTIMIZERS[optimizer]
    params = PARAMS if optimizer != "flatten" else jax.tree.map(lambda p: p.astype(jnp.float32), PARAMS)
    report = adamite.memory_report(tx, jax.eval_shape(lambda: params))
    assert report == adamite.memory_report(tx, params)
    weights = sum(p.nbytes for p in jax.tree.leaves(params))
    state = sum(x.nbytes for x in jax.tree.leaves(tx.init(params)))
    assert report.bytes == (weights, weights, state)
    assert report.per_device == report.bytes
    assert report.devices == 1
    assert report.bytes.total == 2 * weights + state
    assert report.parameters == sum(p.size for p in jax.tree.leaves(params))
    assert report.bytes_per_parameter == report.bytes.total / report.parameters
    assert report.other + sum(leaf.bytes.state for leaf in report.leaves) == state


def rows(tx, params=PARAMS):
    return {leaf.path: (leaf.moments, leaf.why) for leaf in adamite.memory_report(tx, params).leaves}


EMBEDDING, FIRST, SECOND, SCALE = rows(optax.sgd(1.0))


@pytest.mark.parametrize(
    ("optimizer", "embedding", "first", "second"),
    [
        ("adamite", ("float32", ""), ("float32", ""), ("float32", "")),
        ("int8", ("int8", ""), ("int8", ""), ("float32", SMALL)),
        ("lean", ("int8, float8", ""), ("int8, float8", ""), ("float32", SMALL)),
        ("residual16", ("bfloat16", ""), ("bfloat16", ""), ("bfloat16", "")),
        ("by path", ("float32", CHOSEN), ("int8, bfloat16", CHOSEN), ("float32, bfloat16", SMALL)),
        ("counted", ("int8", ""), ("int8", ""), ("float32", SMALL)),
        ("adam_mini", ("float32", ""), ("float32", ""), ("float32", "")),
        ("sgd", ("", ""), ("", ""), ("", "")),
        ("optax", ("bfloat16, float32", ""), ("bfloat16", ""), ("bfloat16, float32", "")),
        ("masked", ("int8", ""), ("", ""), ("", "")),
        ("partition", ("int8", ""), ("int8", ""), ("float32", "")),
        ("MultiSteps", ("int8", ""), ("int8", ""), ("float32", SMALL)),
        ("inject_hyperparams", ("float32", ""), ("float32", ""), ("float32", "")),
    ],
)
def test_rows_say_how_moments_are_kept_and_why(optimizer, embedding, first, second):
    found = rows(OPTIMIZERS[optimizer])
    assert [found[path] for path in (EMBEDDING, FIRST, SECOND)] == [embedding, first, second]
    assert EMBEDDING == "params['embedding']"
    assert SECOND == "params['layers'][1]"


def test_state_is_attributed_to_its_leaf():
    report = adamite.memory_report(OPTIMIZERS["masked"], PARAMS)
    assert [leaf.bytes.state for leaf in report.leaves] == [2 * (40 * 300 + 40 * 2 * 4), 0, 0, 2 * (4 + 4)]
    assert report.other == 4
    report = adamite.memory_report(OPTIMIZERS["MultiSteps"], PARAMS)
    assert report.leaves[1].bytes.state == 64 * 640 * (1 + 1 + 4) + 2 * 64 * 3 * 4  # float32 sums
    assert report.other == 3 * 4  # two counts of MultiSteps and Adam's
    report = adamite.memory_report(OPTIMIZERS["adafactor"], PARAMS)
    assert all(leaf.moments == "" for leaf in report.leaves)


def test_one_array_is_a_tree_too():
    report = adamite.memory_report(adamite.adam(1e-3, moments="int8"), jax.ShapeDtypeStruct((64, 64), jnp.float32))
    assert report.leaves[0][:5] == ("params", (64, 64), "float32", "int8", "")
    assert report.leaves[0].bytes == (4 * 4096, 4 * 4096, 2 * (4096 + 4 * 64))
    assert report.other == 4


def test_integers_have_no_gradients_and_an_empty_tree_no_bytes():
    params = {"table": jnp.arange(5), "w": jnp.ones(3)}
    report = adamite.memory_report(optax.masked(optax.adam(1e-3), {"table": False, "w": True}), params)
    assert report.bytes == (5 * 4 + 12, 12, 24 + 4)
    assert adamite.memory_report(optax.adam(1e-3), {}).bytes == (0, 0, 4)


GPT2_SMALL = 124_439_808


@pytest.mark.parametrize(
    ("moments", "rounding", "state", "together"),
    [("int8", None, 2.1, 10.1), ("int8", "residual8", 3.1, 7.2), ("int8", "stochastic", 2.1, 6.2)],
)
def test_gpt2_small(moments, rounding, state, together):
    params = abstract(GPT2, jnp.bfloat16 if rounding else jnp.float32)
    report = adamite.memory_report(adamite.adamw(1e-3, moments=moments, rounding=rounding), params)
    assert report.parameters == GPT2_SMALL
    assert report.bytes.state / GPT2_SMALL <= state
    assert report.bytes_per_parameter <= together
    text = str(report).splitlines()
    assert len(text) <= 24
    assert max(map(len, text)) <= 120
    assert sum(int(line.split()[0]) for line in text[1:10]) == 148
    assert text[-1] == f"{report.bytes.total:,} bytes together, {report.bytes_per_parameter:.2f} per parameter"


def temporaries(tx, params, engine="auto"):
    """Bytes per parameter that the compiled, donated step needs beside what lives between steps."""

    def step(params, state, g):
        updates, state = tx.update(g, state, params, engine=engine)
        return optax.apply_updates(params, updates), state

    arguments = params, jax.eval_shape(tx.init, params), params
    program = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
    return program.memory_analysis().temp_size_in_bytes / sum(p.size for p in params)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moments", "rounding"), [("int8", None), ("int8", "residual8"), ("int8", "stochastic"), ("bfloat16", "residual16")]
)
def test_a_step_of_gpt2_small_makes_little_beside(moments, rounding):
    """By XLA: the largest leaf is 31% of the tree, and its float32 update alone is 1.24. By kernels: all updates."""
    tx = adamite.adamw(1e-3, moments=moments, rounding=rounding)
    params = abstract(GPT2, jnp.bfloat16 if rounding else jnp.float32)
    assert temporaries(tx, params, "xla") <= 1.5
    assert temporaries(tx, params) <= 4.01


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("moments", "rounding"), [("int8", "residual8"), ("int8", "stochastic"), ("bfloat16", "residual16")]
)
def test_a_step_of_one_huge_leaf_stays_far_below_float32(moments, rounding):
    """4 of them are the float32 update."""
    tx, params = adamite.adamw(1e-3, moments=moments, rounding=rounding), abstract([(8192, 8192)], jnp.bfloat16)
    kept = adamite.memory_report(tx, params).bytes_per_parameter
    assert temporaries(tx, params) < 4.8
    assert kept + temporaries(tx, params) < 0.91 * 16


def test_columns_of_the_table_are_aligned():
    head, *lines = str(adamite.memory_report(OPTIMIZERS["by path"], PARAMS)).splitlines()
    assert len({line.split("  ")[0] for line in lines}) > 1
    for column in ("weights", "gradients", "state"):
        end = head.index(column) + len(column)
        for line in lines[:4]:
            assert re.fullmatch(r"[\d,.]*\d", line[:end].split()[-1]), line
            assert line[end : end + 2].strip() == ""
    assert [line[head.index("not quantized") :] for line in lines if line[head.index("not quantized") :]] == [
        CHOSEN, CHOSEN, SMALL, SMALL,
    ]  # fmt: skip


def test_nothing_is_allocated():
    before = nbytes(jax.live_arrays())
    report = adamite.memory_report(adamite.adamw(1e-3, moments="int8"), abstract([(10**6, 10**6), (10**6,)]))
    assert report.parameters == 10**12 + 10**6
    assert nbytes(jax.live_arrays()) < before + 1000


SPECS = {"rows": P("data"), "columns": P(None, "model"), "both": P("data", "model"), "one axis": P(("data", "model"))}


@pytest.mark.parametrize(
    ("spec", "jit"), [("rows", True), ("columns", False), ("both", False), ("both", True), ("one axis", False)]
)
@pytest.mark.parametrize("optimizer", ["int8", "lean", "residual16", "by path", "adam_mini"])
def test_each_device_holds_what_the_report_says(optimizer, spec, jit):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    shardings = {
        "embedding": NamedSharding(mesh, SPECS[spec]),
        "layers": [NamedSharding(mesh, SPECS[spec]), NamedSharding(mesh, P("data"))],
        "scale": NamedSharding(mesh, P()),
    }
    params, tx = jax.device_put(PARAMS, shardings), OPTIMIZERS[optimizer]
    report = adamite.memory_report(tx, jax.eval_shape(lambda: PARAMS), shardings=shardings)
    assert report == adamite.memory_report(tx, params)
    assert report.devices == 8
    state = (jax.jit(tx.init) if jit else tx.init)(params)
    for device in jax.devices():
        held = [
            sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == device)
            for tree in (params, params, state)
        ]
        assert report.per_device == tuple(held)
    assert f"{report.per_device.total:,} on each of 8 devices" in str(report)


def test_shardings_may_be_a_prefix():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params = {"a": jnp.ones((16, 3)), "b": [jnp.ones((8, 1000))]}
    report = adamite.memory_report(optax.adam(1e-3), params, shardings=NamedSharding(mesh, P("data")))
    assert report.per_device == (4 * 1006, 4 * 1006, 2 * 4 * 1006 + 4)


class TestErrors:
    MESH = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    ROWS = NamedSharding(MESH, P("data"))
    PARAMS = jax.tree.map(jnp.ones, {"w": (12, 3), "b": ()}, is_leaf=lambda x: isinstance(x, tuple))

    @pytest.mark.parametrize("tx", [None, adamite.adam, 1e-3])
    def test_tx(self, tx):
        with pytest.raises(TypeError, match="tx must be a gradient transformation"):
            adamite.memory_report(tx, self.PARAMS)

    def test_params(self):
        with pytest.raises(TypeError, match=r"params\['w'\] must have a shape and a dtype, got 'x'"):
            adamite.memory_report(optax.adam(1e-3), {"w": "x"})

    @pytest.mark.parametrize("shardings", [{"w": ROWS}, [ROWS, ROWS], {"w": [ROWS], "b": ROWS}])
    def test_structure_of_shardings(self, shardings):
        with pytest.raises(ValueError, match="shardings must have the structure of params or a prefix of it"):
            adamite.memory_report(optax.adam(1e-3), self.PARAMS, shardings=shardings)

    @pytest.mark.parametrize("sharding", [P("data"), MESH, 8])
    def test_kind_of_shardings(self, sharding):
        with pytest.raises(TypeError, match="shardings must hold jax"):
            adamite.memory_report(optax.adam(1e-3), self.PARAMS, shardings=sharding)

    @pytest.mark.parametrize(("name", "other"), [("w", "b"), ("b", "w")])
    def test_shardings_that_do_not_divide(self, name, other):
        shardings = {name: self.ROWS, other: NamedSharding(self.MESH, P())}
        with pytest.raises(ValueError, match=rf"shardings must divide params\['{name}'\] of shape \("):
            adamite.memory_report(optax.adam(1e-3), self.PARAMS, shardings=shardings)


@pytest.mark.parametrize("parameters", [1, 100, 128, 129, 10**5, 10**6 + 1, 124_439_808, 8 * 10**9, 10**12])
def test_the_plans_decoder_has_all_its_parameters(parameters):
    shapes = decoder(parameters)
    assert sum(map(math.prod, shapes)) == parameters
    assert min(map(math.prod, shapes)) > 0
    if parameters >= 10**8:
        assert 0.1 < math.prod(shapes[0]) / parameters < 0.25
        assert 0 < sum(n for (n,) in filter(lambda shape: len(shape) == 1, shapes)) / parameters < 2e-3


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "adamite", *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("short", "whole"), [("1.5B", 1_500_000_000), ("124m", 124_000_000), ("2k", 2_000), ("8e9", 8 * 10**9)]
)
def test_numbers_of_parameters_as_models_are_called(short, whole):
    assert adamite.__main__._count(short) == whole


def test_a_plan():
    """Seven bytes for each of eight billion parameters, on eight devices."""
    options = "--params 8e9 --moments int8 --rounding residual8 --devices 8 --hbm 80"
    result = command("memory", *options.split())
    assert (result.returncode, result.stderr) == (0, "")
    numbers = {
        re.split(r"\s{2,}", line)[0]: [float(n.replace(",", "")) for n in re.split(r"\s{2,}", line)[1:]]
        for line in result.stdout.splitlines()[3:8]
    }
    assert numbers["weights, bfloat16"] == numbers["gradients, bfloat16"] == [2.0, 16.0, 2.0]
    assert numbers["optax.adamw, float32"] == [16.0, 128.0, 16.0]
    state, together = numbers["optimizer state"], numbers["together"]
    assert 3.03 <= state[0] <= 3.04
    assert together == pytest.approx([4 + state[0], 32 + state[1], 4 + state[2]], abs=1e-9)
    assert together[1] == pytest.approx(8 * together[2], abs=5e-3)
    tx = adamite.adamw(1e-3, moments="int8", rounding="residual8")
    report = adamite.memory_report(tx, abstract(decoder(8 * 10**9), jnp.bfloat16))
    assert together[1] == round(report.bytes.total / 1e9, 3)
    assert f"Of 80 GB on each device {80 - report.bytes.total / 8e9:.3f} GB are left" in result.stdout
    assert "float32 update" in result.stdout


def test_a_plan_that_does_not_fit():
    options = ["--params", "1.5e9", "--moments", "int8+float8", "--weights", "bfloat16", "--devices", "4"]
    result = command("memory", *options, "--hbm", "1.5")
    assert (result.returncode, result.stderr) == (0, "")
    assert "1,500,000,000 parameters on 4 devices: AdamW, moments int8+float8\n" in result.stdout
    share = float(re.search(r"^together .* ([\d.]+)$", result.stdout, re.M)[1])
    assert share == pytest.approx(1.5 * 6.03 / 4, rel=1e-3)
    assert "1.5 GB on each device are not enough: the table alone takes 7 of them." in result.stdout


def test_a_plan_on_a_mesh():
    """Of a billion weights a device keeps an eighth; what the axis of 64 devices spreads is cut again."""
    result = command("memory", *["--params", "1e9", "--mesh", "data=64,model=8", "--hbm", "16"])
    assert (result.returncode, result.stderr) == (0, "")
    title, _, head, *lines = result.stdout.splitlines()
    assert title == "1,000,000,000 parameters on a mesh of data = 64, model = 8: AdamW, moments float32"
    assert head.split("  ")[-1].strip() == "FSDP"
    rows = {name: list(map(float, numbers)) for name, *numbers in (re.split(r"\s{2,}", line) for line in lines)}
    assert rows["weights, float32"] == pytest.approx([0.5, 0.5, 0.5 / 64], rel=0.1)
    assert rows["optimizer state"] == pytest.approx([1, 1 / 64, 1 / 64], rel=0.1)
    assert rows["sent each step"] == pytest.approx([0.5 * 2 * 63 / 64, 0.5 * 2 * 63 / 64, 0.5 * 3 * 63 / 64], rel=1e-2)
    assert rows["left of 16 GB"] == pytest.approx([16 - x for x in rows["together"]], abs=1e-3)


def test_what_a_device_sends_is_of_gradients_updates_and_weights():
    """Of a leaf that the axis of the data divides, and of one that it does not."""
    tx = adamite.adamw(1e-3, rounding="residual8", moments="int8")
    params = abstract([(64, 256), (3, 5)], jnp.bfloat16)
    mesh = AbstractMesh((8, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    ways = {name: sent(way, params) for name, way in layouts(tx, params, mesh).items()}
    small = 2 * 2 * 15
    weights, updates = 2 * 64 * 256 // 2, 4 * 64 * 256 // 2  # in float32, with a rounding
    assert ways == {
        "replicated": 7 * (2 * weights + small) // 8,
        "ZeRO-1": 7 * (weights + updates + small) // 8,
        "FSDP": 7 * (3 * weights + small) // 8,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--params 8e9 --moments int7", "invalid choice: 'int7' (choose from float32, bfloat16, int8, int8+float8)"),
        ("--params 8e9 --rounding up", "'up' (choose from nearest, stochastic, residual8, residual16)"),
        ("--params 8e9 --weights int8", "invalid choice: 'int8' (choose from bfloat16, float32)"),
        ("--params 8e9 --rounding residual8 --weights float32", "--rounding: it is for weights of 16 bits"),
        ("--params many", "--params: must be a whole number from 1 to 1e+13, such as 124M, got 'many'"),
        ("--params 0", "--params: must be a whole number"),
        ("--params 1.5", "--params: must be a whole number"),
        ("--params nan", "--params: must be a whole number"),
        ("--params 1e14", "--params: must be a whole number"),
        ("--params 8e9 --devices -8", "--devices: must be a whole number"),
        ("--params 8e9 --hbm 0", "--hbm: must be a finite number of GB > 0, got '0'"),
        ("--params 8e9 --hbm inf", "--hbm: must be a finite number of GB > 0, got 'inf'"),
        (
            "--params 8e9 --mesh model=8",
            "--mesh: must be data=N or data=N,model=M, such as data=64,model=8, got 'model=8'",
        ),
        ("--params 8e9 --mesh data=64,rows=8", "--mesh: must be data=N or data=N,model=M"),
        ("--params 8e9 --mesh data=999999,model=999999", "--mesh: must have at most 1,000,000 devices, got"),
        ("--params 8e9 --mesh data=4 --devices 1", "not allowed with argument"),
        ("--params 8e9 --mesh data=0", "--mesh: must be data=N or data=N,model=M"),
        ("--params 8e9 --mesh data=2,data=4", "--mesh: must be data=N or data=N,model=M"),
        ("--params 8e9 --mesh data=2 --devices 2", "--devices: not allowed with argument --mesh"),
        ("", "the following arguments are required: --params"),
    ],
)
def test_bad_options_say_what_is_allowed(options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["memory", *options.split()])
    assert message.replace("'", "") in capsys.readouterr().err.replace("'", "")  # Python 3.11 quotes the choices


def test_help_says_what_is_assumed(capsys):
    for arguments, said in (([], "{memory}"), (["memory", "-h"], "(4d, d)")):
        with pytest.raises(SystemExit):
            main(arguments)
        captured = capsys.readouterr()
        assert said in captured.out + captured.err


def test_what_no_axis_divides_is_told(capsys):
    main(["memory", "--params", "8e9", "--mesh", "data=3,model=7"])
    printed = capsys.readouterr().out
    assert "data = 3 divides no dimension of 79% of the parameters\n" in printed
    assert "model = 7 divides no dimension of 100% of the parameters\n" in printed
    main(["memory", "--params", "8e9", "--mesh", "data=64,model=8"])
    assert "divides no dimension" not in capsys.readouterr().out


def test_a_report_names_the_state_that_is_whole_on_each_device():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params = {"w": jax.ShapeDtypeStruct((64, 8), jnp.float32), "odd": jax.ShapeDtypeStruct((3, 5), jnp.float32)}
    everywhere = NamedSharding(mesh, P())
    spread = adamite.memory_report(adamite.sharding.zero1(adamite.adam(1e-3), mesh), params, shardings=everywhere)
    assert str(spread).endswith("\nwhole on each device: the state of params['odd']")
    assert "whole" not in str(adamite.memory_report(adamite.adam(1e-3), params, shardings=everywhere))


def test_which_engine_takes_which_leaf():
    params = {"w": jnp.zeros((16, 300)), "c": jnp.zeros(3, jnp.complex64)}
    tx = adamite.adam(1e-3)
    with jax.default_device(jax.devices()[0]):
        told = {
            leaf.path: (leaf.engine, leaf.why_xla) for leaf in adamite.memory_report(tx, params, engine="xla").leaves
        }
    assert told == dict.fromkeys(("params['w']", "params['c']"), ("xla", "it was asked for"))
    assert all(leaf.engine == "" for leaf in adamite.memory_report(tx, params).leaves)
    report = adamite.memory_report(optax.adam(1e-3), params, engine="pallas")
    assert {leaf.why_xla for leaf in report.leaves} == {"it is stepped by a transformation that is not adamite's"}
    assert str(report).splitlines()[0].endswith("engine  why XLA")
    whole = adamite.memory_report(adamite.stable_adamw(1e-3), params, engine="pallas").leaves
    assert {leaf.why_xla for leaf in whole} == {"its step needs the whole leaf"}
    with pytest.raises(ValueError, match="engine must be one of 'auto', 'xla', 'pallas', 'native', got 'gpu'"):
        adamite.memory_report(tx, params, engine="gpu")


INT8 = adamite.adamw(1e-3, moments="int8")
AROUND = {
    "partition": lambda tx: optax.partition({"a": tx, "b": optax.set_to_zero()}, {"frozen": "b", "w": "a"}),
    "masked": lambda tx: optax.masked(tx, {"frozen": False, "w": True}),
    "optax.chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "chain": lambda tx: adamite.chain(optax.clip_by_global_norm(1.0), tx),
    "named_chain": lambda tx: optax.named_chain(("clip", optax.clip(1.0)), ("adam", tx)),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "inject_hyperparams": lambda _: optax.inject_hyperparams(adamite.adamw, static_args="moments")(
        1e-3, moments="int8"
    ),
    "skip_nonfinite": adamite.skip_nonfinite,
    "accumulate": lambda tx: adamite.accumulate(tx, 2),
    "with_ema": adamite.with_ema,
    "cautious": adamite.cautious,
}


class TestEngines:
    """Which engine takes which leaf: on meshes, and through wrappers."""

    @staticmethod
    def report(tx, shape=(512, 2048), engine="pallas", *, axes=None):
        params = {"frozen": jax.ShapeDtypeStruct((3,), jnp.float32), "w": jax.ShapeDtypeStruct(shape, jnp.float32)}
        shardings = None
        if axes is not None:
            mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axes,) * 2)
            shardings = {"frozen": NamedSharding(mesh, P()), "w": NamedSharding(mesh, P("data", "model"))}
        leaves = adamite.memory_report(tx, params, shardings=shardings, engine=engine).leaves
        return leaves[1].engine, leaves[1].why_xla

    @pytest.mark.parametrize("wrapper", AROUND)
    def test_through_wrappers(self, wrapper):
        assert self.report(AROUND[wrapper](INT8)) == ("pallas", "")

    def test_updates_that_are_optaxs_to_the_bit(self):
        why = "by XLA its update has Optax's bits"
        assert self.report(AROUND["masked"](adamite.adam(1e-3)), engine="auto")[0] == "xla"
        if library():
            assert self.report(AROUND["masked"](adamite.adam(1e-3)), engine="auto") == ("xla", why)
            assert self.report(AROUND["masked"](INT8), engine="auto") == ("native", "")

    @pytest.mark.parametrize("engine", ["pallas", "native"])
    @pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
    def test_on_meshes(self, axes, engine):
        if engine == "native" and library() is None:
            assert self.report(INT8, engine="native", axes=axes)[1] == "adamite-native is not installed"
            return
        assert self.report(INT8, engine=engine, axes=axes) == (engine, "")
        cut = self.report(INT8, (512, 256), engine, axes=axes)
        why = "its last axis is cut into 2 parts, in which blocks of 256 are not whole"
        assert cut == ((engine, "") if axes == AxisType.Auto else ("xla", why))

    def test_for_tpus(self, monkeypatch):
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
        assert self.report(INT8, engine="auto") == ("pallas", "")
        assert self.report(INT8, engine="auto", axes=AxisType.Explicit) == ("pallas", "")
        assert "adamite.sharding.placed" in self.report(INT8, engine="auto", axes=AxisType.Auto)[1]
