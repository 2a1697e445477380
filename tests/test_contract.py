"""What every optimizer and every part keeps to: DESIGN's contract, run over all of `specs`."""

import inspect
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamite
from bits import assert_same_bits, types
from specs import SPECS

pytestmark = pytest.mark.few(5)

each = pytest.mark.parametrize("spec", SPECS, ids=str)
each_twin = pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.twin], ids=str)


def tree(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {
        "dense": {"kernel": jnp.asarray(rng.standard_normal((6, 4)), dtype), "bias": jnp.zeros(4, dtype)},
        "scale": jnp.asarray(1.5, dtype) * jnp.ones((), dtype),
    }


def step(tx, params, state, gradients):
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def moments(state):
    """The leaves of a state that hold moments; the others are counts."""
    return [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)]


def counts(state):
    return [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.integer)]


def of_leaf(state, name):
    """The leaves of a state that belong to one leaf of the parameters."""
    return [x for path, x in jax.tree_util.tree_leaves_with_path(state) if f"['{name}']" in jax.tree_util.keystr(path)]


class TestDropIn:
    @each_twin
    def test_signature_is_optax_with_ours_after_it_keyword_only(self, spec):
        ours = inspect.signature(spec.make).parameters
        theirs = inspect.signature(spec.twin).parameters

        def looks(p):
            return p.name, p.kind, type(p.default) if callable(p.default) else p.default

        assert [looks(p) for p in ours.values() if p.name in theirs] == [looks(p) for p in theirs.values()]
        assert all(p.kind is p.KEYWORD_ONLY for name, p in ours.items() if name not in theirs)

    @each
    def test_learning_rate_is_annotated_as_tools_expect(self, spec):
        if spec.full:
            assert inspect.signature(spec.make).parameters["learning_rate"].annotation == optax.ScalarOrSchedule

    @each
    def test_is_a_gradient_transformation_that_unpacks_and_hashes(self, spec):
        tx = spec.build()
        assert isinstance(tx, optax.GradientTransformationExtraArgs)
        init, update = tx
        assert callable(init)
        assert callable(update)
        assert {tx: "a key"}[tx] == "a key"

    @each_twin
    def test_state_is_optax_state(self, spec):
        ours, theirs = spec.build().init(tree()), spec.build_twin().init(tree())
        assert_same_bits(ours, theirs)

    @each
    def test_update_by_keyword_and_with_unknown_extra_arguments(self, spec):
        tx, params = spec.build(), tree()
        plain = tx.update(tree(1), tx.init(params), params)
        assert_same_bits(plain, tx.update(updates=tree(1), state=tx.init(params), params=params))
        assert_same_bits(plain, tx.update(tree(1), tx.init(params), params, loss=3.0, anything="else"))

    @each
    def test_params_may_be_left_out_unless_weights_decay(self, spec):
        tx = spec.build()
        if spec.needs_params:
            with pytest.raises(ValueError, match="params"):
                tx.update(tree(1), tx.init(tree()))
        else:
            with_params = tx.update(tree(1), tx.init(tree()), tree())
            assert_same_bits(with_params, tx.update(tree(1), tx.init(tree())))

    @each_twin
    def test_chains_with_optax(self, spec):
        ours = optax.chain(optax.clip_by_global_norm(0.5), spec.build(), optax.scale(2.0))
        theirs = optax.chain(optax.clip_by_global_norm(0.5), spec.build_twin(), optax.scale(2.0))
        params = tree()
        a, b = (jax.jit(tx.update)(tree(1), tx.init(params), params) for tx in (ours, theirs))
        assert_same_bits(a, b)

    @each
    def test_tree_map_params_and_eval_shape(self, spec):
        tx, params = spec.build(), tree()
        state = jax.eval_shape(tx.init, params)
        marked = optax.tree_map_params(tx, lambda s: "param", state, transform_non_params=lambda s: "other")
        leaves = jax.tree.leaves(marked)
        assert leaves.count("param") == len(moments(state))
        abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
        chex.assert_trees_all_equal_shapes_and_dtypes(tx.init(abstract), tx.init(params))


class TestTypes:
    """State has one type for ever; updates have the wider type of gradients and weights."""

    DTYPES = ("float32", "bfloat16", "float16")

    @each
    @pytest.mark.parametrize(("weights", "gradients"), [*itertools.product(DTYPES, DTYPES)])
    def test_dtypes_are_a_fixed_point(self, spec, weights, gradients):
        tx, params, g = spec.build(), tree(0, weights), tree(1, gradients)
        state = tx.init(params)
        updates, after = tx.update(g, state, params)
        wider = jnp.promote_types(weights, gradients)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, jax.tree.map(lambda x: x.astype(wider), g))
        assert types(state) == types(after)
        assert {x.dtype.name for x in moments(after)} <= {"float32"}

    @each
    @pytest.mark.parametrize("gradients", ["bfloat16", "float16"])
    def test_16_bit_gradients_do_not_round_the_updates_of_float32_weights(self, spec, gradients):
        """In 16 bits lion's weight decay would be lost, and an update of 2e-8."""
        tx, params, short = spec.build(), tree(), tree(1, gradients)
        long = jax.tree.map(lambda g: g.astype(jnp.float32), short)

        def same(of_short, of_long):
            """But for what XLA fuses otherwise where it reads other dtypes."""
            assert types(of_short) == types(of_long)
            chex.assert_trees_all_close(of_short, of_long, rtol=1e-5, atol=1e-9)

        same(tx.update(short, tx.init(params), params), tx.update(long, tx.init(params), params))
        same(tx.step(short, tx.init(params), params), tx.step(long, tx.init(params), params))
        if not spec.needs_params:  # nobody knows what the updates will be added to
            same(tx.update(short, tx.init(params)), tx.update(long, tx.init(params)))

    @pytest.mark.parametrize(
        "spec", [spec for spec in SPECS if "mu_dtype" in inspect.signature(spec.make).parameters], ids=str
    )
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
    def test_mu_dtype_is_the_stored_dtype_of_mu_alone(self, spec, dtype):
        with jax.enable_x64(dtype == "float64"):
            tx, params = spec.build(mu_dtype=dtype), tree()
            state = tx.init(params)
            _, after = tx.update(tree(1), state, params)
            assert types(state) == types(after)
            for path, x in jax.tree_util.tree_leaves_with_path(after):
                if jnp.issubdtype(x.dtype, jnp.inexact):
                    first = {".mu", ".m1", ".m2"} & {str(key) for key in path}
                    assert x.dtype.name == (dtype if first else "float32")

    @each
    def test_scan_and_bfloat16(self, spec):
        tx, params = spec.build(), tree(0, jnp.bfloat16)
        g = jax.tree.map(lambda x: jnp.stack([x] * 3), tree(1, jnp.float32))  # optax: mu drifts, scan raises
        (params, _), _ = jax.lax.scan(lambda c, g: (step(tx, *c, g), None), (params, tx.init(params)), g)
        chex.assert_tree_all_finite(params)

    @each
    def test_weakly_typed_parameters_do_not_weaken_the_state(self, spec):
        params = {"b": jnp.array(0.5)}
        assert params["b"].weak_type
        tx = spec.build()
        state = tx.init(params)
        for _ in range(2):  # optax.apply_updates makes the parameters strong in the first step
            params, after = step(tx, params, state, jax.grad(lambda p: p["b"] ** 2)(params))
            assert types(after) == types(state)

    @each
    def test_none_gradients_leave_their_leaf_alone(self, spec):
        tx, params = spec.build(), {"a": jnp.ones(3), "b": jnp.ones(2)}
        update = jax.jit(tx.update)
        _, state = update({"a": jnp.ones(3), "b": jnp.ones(2)}, tx.init(params), params)
        updates, after = update({"a": -jnp.ones(3), "b": None}, state, params)
        assert updates["b"] is None
        assert_same_bits(of_leaf(state, "b"), of_leaf(after, "b"))
        for before, now in zip(of_leaf(state, "a"), of_leaf(after, "a"), strict=True):
            assert not np.array_equal(before, now) or (now == 1).all()  # the mean square of ones and minus ones

    @each
    def test_float16_is_float32_rounded(self, spec):
        """A gradient of 0 gives no NaN, and one of 300, whose square is past float16, no 0."""
        tx = spec.build()
        half = {"w": jnp.full(3, 0.5, jnp.float16)}, {"w": jnp.array([0.0, 300.0, 60000.0], jnp.float16)}
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), half)
        (ours, _), (expected, _) = (tx.update(g, tx.init(params), params) for params, g in (half, wide))
        assert_same_bits(ours["w"], expected["w"].astype(jnp.float16))
        assert jnp.isfinite(ours["w"]).all()

    @each
    def test_complex_gradients_turn_as_they_are_turned(self, spec):
        """Second moments are of the modulus: a rotation of all gradients and parameters rotates the updates."""
        tx, g, turn = spec.build(), jnp.array([3 + 4j, 0.5, -2j], jnp.complex64), np.complex64(np.exp(2j))
        params = jnp.array([1j, 2.0, -1.0], jnp.complex64)
        state = tx.init(params)
        (updates, after), (turned, _) = tx.update(g, state, params), tx.update(g * turn, state, params * turn)
        assert types(state) == types(after)
        assert updates.dtype == jnp.complex64
        np.testing.assert_allclose(turned, updates * turn, rtol=1e-5, atol=1e-7)

    @each
    def test_python_numbers_are_float32_scalars(self, spec):
        tx = spec.build()
        params = {"a": 1.0, "b": 2, "c": 1j}
        updates, state = tx.update({"a": 0.5, "b": 1, "c": 2j}, tx.init(params), params)
        assert [x.dtype.name for x in jax.tree.leaves(updates)] == ["float32", "float32", "complex64"]
        assert {x.shape for x in jax.tree.leaves(state)} <= {()}

    @each
    def test_numpy_arrays_and_empty_trees(self, spec):
        tx = spec.build()
        params = {"w": np.ones((2, 3))}
        updates, _ = tx.update({"w": np.ones((2, 3))}, tx.init(params), params)
        assert updates["w"].dtype == jnp.float32
        for empty in ({}, (), [], {"a": {}, "b": None}):
            updates, state = jax.jit(tx.update)(empty, tx.init(empty), empty)
            assert updates == empty
            assert all(count == 1 for count in counts(state))


class TestCompilation:
    @each
    def test_five_steps_compile_once_with_donation(self, spec):
        tx, params = spec.build(), tree()
        traces = []

        def f(params, state, gradients):
            traces.append(1)
            return step(tx, params, state, gradients)

        jitted = jax.jit(f, donate_argnums=(0, 1))
        state = tx.init(params)
        for i in range(5):
            before = jax.tree.leaves((params, state))
            params, state = jitted(params, state, tree(i))
            assert all(x.is_deleted() for x in before)
        assert len(traces) == 1
        assert jitted._cache_size() == 1

    @each
    @pytest.mark.parametrize("jitted", [False, True])
    def test_state_leaves_are_distinct_buffers(self, spec, jitted):
        init = jax.jit(spec.build().init) if jitted else spec.build().init
        pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(init(tree())) if x.size]
        assert len(set(pointers)) == len(pointers)

    def test_the_step_is_traced_once_a_shape(self):
        params = [jnp.ones((3, 2))] * 10
        tx = adamite.adam(1e-2)
        jaxpr = str(jax.make_jaxpr(tx.update)(params, tx.init(params), params))
        assert jaxpr.count(" sqrt ") == 1

    @each
    def test_same_input_same_bits(self, spec):
        tx, params = spec.build(), tree()
        runs = [jax.jit(tx.update)(tree(1), tx.init(params), params) for _ in range(2)]
        assert_same_bits(*runs)


class TestTransformed:
    """jit, scan, vmap, grad: same numbers."""

    @each
    def test_eager_jit_and_scan_agree(self, spec):
        tx, params = spec.build(), tree()
        eager, jitted = (params, tx.init(params)), (params, tx.init(params))
        jit_step = jax.jit(lambda c, g: step(tx, *c, g))
        for i in range(4):
            eager, jitted = step(tx, *eager, tree(i)), jit_step(jitted, tree(i))
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *map(tree, range(4)))
        scanned, _ = jax.lax.scan(lambda c, g: (step(tx, *c, g), None), (params, tx.init(params)), stacked)
        chex.assert_trees_all_close(eager, jitted, rtol=2e-5, atol=2e-5)  # 1 - b2^t is rounded differently
        chex.assert_trees_all_close(scanned, jitted, rtol=2e-6, atol=1e-7)

    @pytest.mark.parametrize("spec", [s for s in SPECS if s.full], ids=str)
    def test_vmap_over_learning_rates(self, spec):
        params, rates = tree(), jnp.array([1e-3, 1e-2, 1e-1])

        def train(rate):
            tx = spec.make(rate)
            carry = (params, tx.init(params))
            for i in range(3):
                carry = step(tx, *carry, tree(i))
            return carry

        together = jax.jit(jax.vmap(train))(rates)
        for i, rate in enumerate(rates):
            alone = jax.jit(train)(rate)
            chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], together), alone, rtol=2e-6, atol=1e-7)

    @pytest.mark.slow
    @each
    def test_vmap_over_models(self, spec):
        tx = spec.build()
        params = jax.tree.map(lambda *x: jnp.stack(x), tree(0), tree(1))
        updates, _ = jax.vmap(tx.update)(params, jax.vmap(tx.init)(params), params)
        alone, _ = tx.update(tree(1), tx.init(tree(1)), tree(1))
        chex.assert_trees_all_close(jax.tree.map(lambda x: x[1], updates), alone, rtol=1e-6)


VARIED = {"adam", "adamw", "lamb", "adagrad", "rmsprop", "ademamix", "scale_by_lion"}


class TestVariants(chex.TestCase):
    """chex's own variants, of one spec of each kind: with and without jit, on a device, under pmap."""

    @chex.all_variants(with_pmap=True)
    def test_shapes_and_structure(self):
        for spec in (s for s in SPECS if str(s) in VARIED):
            tx, params, gradients = spec.build(), tree(), tree(1)
            state = tx.init(params)
            updates, after = self.variant(tx.update)(gradients, state, params)
            chex.assert_trees_all_equal_structs(updates, params)
            chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
            chex.assert_trees_all_equal_structs(after, state)
            chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
            chex.assert_tree_all_finite((updates, after))
            expected, _ = jax.jit(tx.update)(gradients, state, params)
            chex.assert_trees_all_close(updates, expected, rtol=1e-5)
