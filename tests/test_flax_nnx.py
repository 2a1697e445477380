"""The fused step in Flax NNX: the bits and the state of Flax's own optimizer, wherever Flax takes it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import adamite
from adamite import checkpoint, engines
from adamite.flax import ModelAndOptimizer, Optimizer
from bits import assert_same_bits, place
from compilation import compiled

X = jnp.asarray(np.random.default_rng(0).standard_normal((8, 64)), jnp.float32)


class Model(nnx.Module):
    """A LoRA layer, and two that share a kernel."""

    def __init__(self, seed=0, dtype=jnp.float32):
        rngs = nnx.Rngs(seed)
        self.first = nnx.LoRALinear(64, 64, lora_rank=4, rngs=rngs, param_dtype=dtype, lora_param_dtype=dtype)
        self.second, self.third = (nnx.Linear(64, 64, rngs=rngs, param_dtype=dtype) for _ in range(2))
        self.third.kernel = self.second.kernel
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] += 1
        return self.third(nnx.relu(self.second(self.first(x))))


def gradients(model, wrt=nnx.Param, x=X):
    def loss(model):
        return jnp.mean((model(x) - 1.0) ** 2)

    return nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(model)


def exactly(cls):
    """What its update takes besides, to give Flax's bits."""
    return {"engine": "xla"} if issubclass(cls, Optimizer) else {}


def data(tree):
    """Random keys as their numbers."""

    def is_key(x):
        return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)

    return jax.tree.map(lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x), tree)


def train(cls, tx, dtype=jnp.float32, wrt=nnx.Param, steps=3, started=None, **extra_args):
    """Model and optimizer after some steps under one `nnx.jit`."""
    model, optimizer = started or (Model(dtype=dtype), None)
    optimizer = optimizer or cls(model, tx, wrt=wrt)

    @nnx.jit
    def step(model, optimizer):
        with engines.asking("xla"):
            optimizer.update(model, gradients(model, wrt), **exactly(cls), **extra_args)

    before = compiled()
    for number in range(steps):
        step(model, optimizer)
        assert compiled() - before <= 1, number
    return model, optimizer


def assert_same_state(ours, theirs):
    assert_same_bits(data(nnx.state(ours)), data(nnx.state(theirs)))


FORMATS = {
    "float32": (jnp.float32, {}),
    "int8": (jnp.float32, {"moments": "int8"}),
    "int8, residual8": (jnp.bfloat16, {"moments": "int8", "rounding": "residual8"}),
    "stochastic": (jnp.bfloat16, {"rounding": "stochastic"}),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("name", FORMATS)
def test_xla_gives_the_bits_of_flax(name):
    dtype, formats = FORMATS[name]
    tx = adamite.adamw(1e-2, **formats)
    ours, theirs = train(Optimizer, tx, dtype), train(nnx.Optimizer, tx, dtype)
    assert_same_state(ours, theirs)
    assert ours[1].step[...] == ours[0].calls[...] == 3
    assert not np.array_equal(ours[0].first.kernel, Model(dtype=dtype).first.kernel)


OTHERS = {
    "optax": (optax.adamw(1e-2), {}),
    "optax's chain": (optax.chain(optax.clip_by_global_norm(0.1), adamite.adamw(1e-2)), {}),
    "accumulate": (adamite.accumulate(adamite.adamw(1e-2), 2), {}),
    "skip_spikes": (adamite.skip_spikes(adamite.adamw(1e-2), loss=True), {"loss": jnp.float32(1.0)}),
    "plateau": (optax.chain(adamite.adamw(1e-2), optax.contrib.reduce_on_plateau()), {"value": jnp.float32(1.0)}),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("name", OTHERS)
def test_any_transformation_and_its_arguments(name):
    tx, extra_args = OTHERS[name]
    assert_same_state(train(Optimizer, tx, **extra_args), train(nnx.Optimizer, tx, **extra_args))


@pytest.mark.parametrize("loss", [jnp.float32(jnp.nan), nnx.Variable(jnp.float32(jnp.nan))], ids=["array", "variable"])
def test_what_skip_spikes_is_told(loss):
    """A loss that is not finite: no weight changes."""
    model = Model()
    optimizer = Optimizer(model, adamite.skip_spikes(adamite.adamw(1e-2), loss=True), wrt=nnx.Param)
    optimizer.update(model, gradients(model), loss=loss)
    assert_same_bits(data(nnx.state(model, nnx.Param)), data(nnx.state(Model(), nnx.Param)))
    assert nnx.as_pure(optimizer.opt_state).skipped == 1


def test_update_takes_the_step_of_an_engine():
    """The one asked for, and by itself the one that a step in plain JAX takes."""
    tx, where = adamite.adamw(1e-2), jax.make_mesh((1,), ("here",), axis_types=(AxisType.Auto,))

    def chosen(**how):
        with jax.set_mesh(where), engines.recorded() as choices:
            model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
            optimizer = Optimizer(model, tx, wrt=nnx.Param)
            nnx.jit(lambda m, o: o.update(m, nnx.state(m, nnx.Param), **how))(model, optimizer)
        return [choice.engine for choice in choices], model

    by_kernel, ours = chosen(engine="pallas")
    none, plain = chosen(engine="xla")
    assert (by_kernel, none) == (["pallas"] * 2, [])
    np.testing.assert_allclose(ours.kernel, plain.kernel, rtol=1e-6, atol=1e-7)
    assert chosen()[0] == chosen(engine="auto")[0]


def eagerly(cls, tx):
    model = Model()
    optimizer = cls(model, tx, wrt=nnx.Param)
    for _ in range(2):
        with engines.asking("xla"):
            optimizer.update(model, gradients(model), **exactly(cls))
    return model, optimizer


def split_and_merged(cls, tx):
    model = Model()
    graph, state = nnx.split((model, cls(model, tx, wrt=nnx.Param)))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        model, optimizer = nnx.merge(graph, state)
        with engines.asking("xla"):
            optimizer.update(model, gradients(model), **exactly(cls))
        return nnx.state((model, optimizer))

    return nnx.merge(graph, step(step(state)))


def scanned(cls, tx):
    model = Model()
    both = model, cls(model, tx, wrt=nnx.Param)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def steps(both, x):
        model, optimizer = both
        with engines.asking("xla"):
            optimizer.update(model, gradients(model, x=x), **exactly(cls))
        return both, None

    steps(both, jnp.stack([X, X[::-1]]))
    return both


def an_ensemble(cls, tx):
    @nnx.vmap(in_axes=0, out_axes=0)
    def new(key):
        model = Model(key)
        return model, cls(model, tx, wrt=nnx.Param)

    @nnx.jit
    @nnx.vmap(in_axes=(0, 0), out_axes=None)
    def step(model, optimizer):
        with engines.asking("xla"):
            optimizer.update(model, gradients(model), **exactly(cls))

    both = new(jax.random.split(jax.random.key(0), 2))
    step(*both)
    return both


def as_a_tree(cls, tx):
    """Flax's tree mode, which knows no shared variables."""
    model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    optimizer = cls(model, tx, wrt=nnx.Param, graph=False)

    @nnx.jit(graph=False)
    def step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.mean(m(X) ** 2), graph=False)(model)
        with engines.asking("xla"):
            optimizer.update(model, grads, **exactly(cls))

    step(model, optimizer)
    return model, optimizer


@pytest.mark.few(3)
@pytest.mark.parametrize("way", [eagerly, split_and_merged, scanned, an_ensemble, as_a_tree], ids=lambda f: f.__name__)
def test_wherever_flax_takes_it(way):
    tx = adamite.adamw(1e-2, moments="int8")
    assert_same_state(way(Optimizer, tx), way(nnx.Optimizer, tx))


def test_donation():
    """All of model and optimizer is written in place, each array where it was: JAX pairs them by their order."""
    model = Model()
    optimizer = Optimizer(model, adamite.adamw(1e-2, moments="int8"), wrt=nnx.Param)

    @nnx.jit(donate_argnames=("model", "optimizer"))
    def step(model, optimizer):
        optimizer.update(model, gradients(model))

    given = jax.tree.leaves(nnx.state((model, optimizer)))
    memory = step.lower(model, optimizer).compile().memory_analysis()
    assert memory.alias_size_in_bytes == memory.argument_size_in_bytes > 0
    places = [place(x) for x in given]
    step(model, optimizer)
    assert all(x.is_deleted() for x in given)
    assert [place(x) for x in jax.tree.leaves(nnx.state((model, optimizer)))] == places
    assert optimizer.step[...] == 1


@pytest.mark.parametrize("engine", ["auto", "pallas"])
@pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_on_a_mesh(types, engine):
    """Weights and moments stay where they are, over two axes; the results are those of one device."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(types,) * 2)
    specs = {"kernel": P("data", "model"), "bias": P("model")}
    tx = adamite.adamw(1e-2)

    def run(place, engine):
        model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
        nnx.update(model, place(nnx.to_pure_dict(nnx.state(model, nnx.Param))))
        optimizer = Optimizer(model, tx, wrt=nnx.Param)
        step = nnx.jit(lambda m, o: o.update(m, nnx.state(m, nnx.Param), engine=engine))
        before = compiled()
        for _ in range(3):
            step(model, optimizer)
        assert compiled() - before == 1
        return model, optimizer

    def laid(params):
        return {name: jax.device_put(params[name], NamedSharding(mesh, spec)) for name, spec in specs.items()}

    with jax.set_mesh(mesh):
        model, optimizer = run(laid, engine)
    moments = nnx.as_pure(optimizer.opt_state)[0]
    for name, spec in specs.items():
        for x in (getattr(model, name)[...], moments.mu[name], moments.nu[name]):
            assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim), (name, x.sharding)
    alone, _ = run(lambda params: params, "xla")
    np.testing.assert_allclose(model.kernel, alone.kernel, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_spread_state_stays_spread(types):
    """ZeRO-1: each device keeps a part of the moments, and all of the weights."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(types,))
    tx = adamite.sharding.zero1(adamite.adamw(1e-2), mesh)
    with jax.set_mesh(mesh):
        model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
        nnx.update(model, jax.device_put(nnx.state(model, nnx.Param), NamedSharding(mesh, P())))
        optimizer = Optimizer(model, tx, wrt=nnx.Param)
        step = nnx.jit(lambda m, o: o.update(m, nnx.state(m, nnx.Param)))
        step(model, optimizer)
        step(model, optimizer)
    assert model.kernel[...].sharding.is_fully_replicated
    assert nnx.as_pure(optimizer.opt_state)[0].nu["kernel"].addressable_shards[0].data.size == 64 * 64 // 8


def test_lora_trains_its_own_variables_only():
    tx = adamite.adamw(1e-2)
    model, optimizer = train(Optimizer, tx, wrt=nnx.LoRAParam)
    assert_same_state((model, optimizer), train(nnx.Optimizer, tx, wrt=nnx.LoRAParam))
    before, others = Model(), nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
    assert_same_bits(data(nnx.state(model, others)), data(nnx.state(before, others)))
    assert not np.array_equal(model.first.lora.lora_b, before.first.lora.lora_b)
    assert set(nnx.to_pure_dict(nnx.state(optimizer.opt_state[0].mu))["first"]) == {"lora"}


FILTERS = {
    "a path": nnx.All(nnx.Param, nnx.PathContains("third")),
    "several": nnx.Any(nnx.LoRAParam, nnx.PathContains("bias")),
    "a function": lambda path, x: isinstance(x, nnx.Param) and "second" in path,
}


@pytest.mark.few(1)
@pytest.mark.parametrize("wrt", FILTERS.values(), ids=FILTERS)
def test_filters(wrt):
    tx = adamite.adamw(1e-2)
    assert_same_state(train(Optimizer, tx, wrt=wrt), train(nnx.Optimizer, tx, wrt=wrt))


def test_gradients_outside_of_the_filter_are_ignored():
    model = Model()
    optimizer = Optimizer(model, adamite.adamw(1e-2), wrt=nnx.LoRAParam)
    optimizer.update(model, gradients(model, nnx.Param))
    np.testing.assert_array_equal(model.second.kernel, Model().second.kernel)
    assert not np.array_equal(model.first.lora.lora_b, Model().first.lora.lora_b)


def test_shared_variables_stay_shared():
    model, optimizer = train(Optimizer, adamite.adamw(1e-2))
    assert model.third.kernel is model.second.kernel
    assert "kernel" not in optimizer.opt_state[0].mu["third"]


def test_a_weight_without_a_gradient_stays():
    """Flax's optimizer fails there."""
    model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    before, optimizer = jax.tree.map(np.array, nnx.state(model)), Optimizer(model, adamite.adamw(1e-2), wrt=nnx.Param)
    grads = nnx.grad(lambda m: jnp.mean((m(X) - 1.0) ** 2))(model)
    grads["bias"].set_value(None)
    nnx.jit(lambda m, o, grads: o.update(m, grads))(model, optimizer, grads)
    np.testing.assert_array_equal(model.bias, before["bias"])
    assert not np.array_equal(model.kernel, before["kernel"])
    assert not np.any(nnx.as_pure(optimizer.opt_state)[0].mu["bias"])


@pytest.mark.parametrize(("writer", "reader"), [(nnx.Optimizer, Optimizer), (Optimizer, nnx.Optimizer)])
def test_checkpoints_go_both_ways(tmp_path, writer, reader):
    dtype, tx = jnp.bfloat16, adamite.adamw(1e-2, moments="int8", rounding="residual8")
    checkpoint.save(tmp_path, 2, nnx.state(train(writer, tx, dtype, steps=2)), tx)
    model = Model(seed=1, dtype=dtype)
    optimizer = reader(model, tx, wrt=nnx.Param)
    nnx.update((model, optimizer), checkpoint.restore(tmp_path, nnx.state((model, optimizer)), tx).tree)
    assert optimizer.step[...] == 2
    resumed = train(reader, tx, started=(model, optimizer), steps=1)
    assert_same_state(resumed, train(writer, tx, dtype, steps=3))


def test_what_asks_for_its_state():
    """Full weights, bytes, telemetry, moments in other formats."""
    tx = adamite.with_telemetry(adamite.adamw(1e-2, moments="int8", rounding="residual8"))
    (model, optimizer), (plain, its) = (train(cls, tx, jnp.bfloat16) for cls in (Optimizer, nnx.Optimizer))
    ours, theirs = ((nnx.state(m, nnx.Param), o.opt_state) for m, o in ((model, optimizer), (plain, its)))
    assert_same_bits(data(adamite.full_weights(*ours)), data(adamite.full_weights(*theirs)))
    assert not np.array_equal(
        nnx.as_pure(adamite.full_weights(*ours))["second"]["kernel"],
        np.asarray(model.second.kernel, np.float32),
    )
    assert adamite.telemetry(optimizer.opt_state) == adamite.telemetry(its.opt_state)
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(optimizer.opt_state))
    assert adamite.memory_report(tx, nnx.state(model, nnx.Param)).bytes.state == state_bytes
    wide, its_wide = (adamite.convert_moments(o.opt_state, "float32") for o in (optimizer, its))
    assert_same_bits(data(wide), data(its_wide))
    assert sum(x.nbytes for x in jax.tree.leaves(wide)) > state_bytes


def test_model_and_optimizer():
    def run(cls):
        both = cls(Model(), adamite.adamw(1e-2))

        def update(both, cls=cls):
            with engines.asking("xla"):
                both.update(gradients(both.model), **exactly(cls))

        step = nnx.jit(update, donate_argnums=0)
        step(both)
        step(both)
        return both

    ours, theirs = run(ModelAndOptimizer), run(nnx.ModelAndOptimizer)
    assert_same_state(ours, theirs)
    assert ours.step[...] == 2
    with pytest.raises(ValueError, match=r"^engine must be one of"):
        ours.update(gradients(ours.model), engine="cuda")
    spikes = ModelAndOptimizer(Model(), adamite.skip_spikes(adamite.adamw(1e-2), loss=True))
    spikes.update(gradients(spikes.model), loss=jnp.nan)
    assert nnx.as_pure(spikes.opt_state).skipped == 1


class TestRefused:
    """By name, and before anything changes."""

    def refuses(self, error, says, grads=None, **how):
        model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
        optimizer = Optimizer(model, adamite.adamw(1e-2), wrt=nnx.Param)
        before = data(nnx.state((model, optimizer)))
        with pytest.raises(error, match=re.escape(says)):
            optimizer.update(model, (grads or nnx.state)(model), **how)
        assert_same_bits(data(nnx.state((model, optimizer))), before)

    def test_engines(self):
        self.refuses(ValueError, "engine must be one of", engine="cuda")
        self.refuses(TypeError, "engine must be", engine=3)

    def test_gradients_of_other_weights(self):
        def without_bias(model):
            return nnx.State({"kernel": nnx.state(model)["kernel"]})

        self.refuses(ValueError, "params['bias'] has no counterpart in updates", without_bias)

    def test_gradients_of_other_shapes(self):
        def short(model):
            return nnx.State({"kernel": nnx.Param(jnp.ones((64, 64))), "bias": nnx.Param(jnp.ones(3))})

        self.refuses(ValueError, "['bias'] has shape (3,), but params['bias'] has shape (64,)", short)

    def test_shared_variables_in_a_tree(self):
        with pytest.raises(ValueError, match="shared references"):
            Optimizer(Model(), adamite.adamw(1e-2), wrt=nnx.Param, graph=False)

    @pytest.mark.parametrize("cls", [Optimizer, ModelAndOptimizer])
    def test_what_is_no_transformation(self, cls):
        with pytest.raises(TypeError, match=r"^tx must be a gradient transformation, got <function adamw"):
            cls(Model(), adamite.adamw, wrt=nnx.Param)
