"""Each deliberate difference from optax 0.2.8, both sides of it; docs/differences.md lists these tests."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding

import adamite
from compilation import compiled

BF16 = jnp.bfloat16


def steady(tx, dtype, steps, gradient=0.5):
    """The state after `steps` equal gradients, parameters and gradients in `dtype`."""
    params = {"w": jnp.ones(4, dtype)}
    g = {"w": jnp.full(4, gradient, dtype)}

    @jax.jit
    def run(state):
        return jax.lax.fori_loop(0, steps, lambda _, s: tx.update(g, s, params)[1], state)

    return run(tx.init(params))


def one_step(library, params, gradients, name="adam", **kwargs):
    tx = getattr(library, name)(1e-2, **kwargs)
    return tx.update(gradients, tx.init(params), params)


def test_bfloat16_parameters_have_float32_moments():
    """In bfloat16 nu stops growing where (1 - b2) g^2 is half a unit in its last place: here at half its value."""
    expected = 0.25 * (1 - 0.999**5000)
    ours = steady(adamite.scale_by_adam(), BF16, 5000).nu["w"]
    theirs = steady(optax.scale_by_adam(), BF16, 5000).nu["w"].astype(jnp.float32)
    np.testing.assert_allclose(ours, expected, rtol=1e-3)
    np.testing.assert_allclose(theirs, 0.125)


@pytest.mark.parametrize(("b1", "optax_mean"), [(0.9, 0.671875), (0.999, 0.75)])
def test_mu_in_bfloat16_decays_at_b1(b1, optax_mean):
    """optax multiplies mu by b1 in mu's dtype, where 0.9 is 0.8984 and 0.999 is 1: the mean never decays."""
    state = optax.ScaleByAdamState(jnp.int32(10**6), mu=jnp.full(3, 0.75, BF16), nu=jnp.ones(3))

    def mean(library):
        tx = library.scale_by_adam(b1, b2=0.0, eps=1.0, mu_dtype=BF16)
        return tx.update(jnp.zeros(3), state)[0]  # nu is 0, the denominator 1

    np.testing.assert_allclose(mean(adamite), b1 * 0.75, rtol=1e-6)
    np.testing.assert_allclose(mean(optax), optax_mean, rtol=1e-6)


def test_the_state_keeps_its_dtypes():
    params, g = {"w": jnp.ones(3, BF16)}, {"w": jnp.ones((4, 3))}

    def scan(tx):
        return jax.lax.scan(lambda s, g: (tx.update(g, s)[1], None), tx.init(params), g)[0]

    with pytest.raises(TypeError, match="carry"):
        scan(optax.scale_by_adam())
    assert scan(adamite.scale_by_adam()).count == 4


def test_updates_are_rounded_once():
    """Ours is the float32 result, rounded. optax rounds every part: a decay of 0.003 beside 1 is lost."""
    rng = np.random.default_rng(0)
    params, g = ({"w": jnp.asarray(rng.standard_normal(1000), BF16)} for _ in range(2))
    wide_params, wide_g = (jax.tree.map(lambda x: x.astype(jnp.float32), tree) for tree in (params, g))
    for decay in (3e-3, 0.5):
        kwargs = dict(name="adamw", eps=0.5, weight_decay=decay)
        exact, _ = one_step(optax, wide_params, wide_g, **kwargs)
        ours, _ = one_step(adamite, params, g, **kwargs)
        chex.assert_trees_all_equal(ours, jax.tree.map(lambda u: u.astype(BF16), exact))
    ones = {"w": jnp.ones(3, BF16)}
    decayed, plain = (one_step(optax, ones, ones, "adamw", weight_decay=decay)[0] for decay in (3e-3, 0.0))
    chex.assert_trees_all_equal(decayed, plain)


def test_updates_without_params_are_not_rounded():
    """With them, an update has the wider dtype of gradient and weight, as optax's has by promotion."""
    g = {"w": jnp.ones(3, jnp.float16)}
    ours, theirs = (library.sgd(2e-8).update(g, library.sgd(2e-8).init(g))[0]["w"] for library in (adamite, optax))
    assert (ours.dtype, theirs.dtype) == (jnp.float32, jnp.float16)
    assert np.all(theirs == 0)
    np.testing.assert_array_equal(ours, np.float32(-2e-8))
    for library in (adamite, optax):
        wide, _ = one_step(library, {"w": jnp.ones(3)}, g)
        assert wide["w"].dtype == jnp.float32


def test_none_gradients():
    params, g = {"a": jnp.ones(2), "b": jnp.ones(2)}, {"a": jnp.ones(2), "b": None}
    with pytest.raises(ValueError, match="None"):
        one_step(optax, params, g)
    updates, _ = one_step(adamite, params, g)
    assert updates["b"] is None


def test_float16_zero_and_large_gradients():
    """In float16 eps = 1e-8 is 0, and 300^2 is infinite."""
    params, g = {"w": jnp.ones(2, jnp.float16)}, {"w": jnp.array([0.0, 300.0], jnp.float16)}
    theirs, _ = one_step(optax, params, g)
    ours, _ = one_step(adamite, params, g)
    assert jnp.isnan(theirs["w"][0])
    assert theirs["w"][1] == 0
    np.testing.assert_allclose(ours["w"].astype(jnp.float32), [0.0, -1e-2], rtol=1e-3)


def test_complex_second_moment_is_stored_real():
    params = {"z": jnp.ones(2, jnp.complex64)}
    assert adamite.adam(1e-2).init(params)[0].nu["z"].dtype == jnp.float32
    assert optax.adam(1e-2).init(params)[0].nu["z"].dtype == jnp.complex64
    ours, _ = one_step(adamite, params, params)
    theirs, _ = one_step(optax, params, params)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-6)
    _, continued = adamite.adam(1e-2).update(params, optax.adam(1e-2).init(params), params)
    assert continued[0].nu["z"].dtype == jnp.complex64  # an optax state keeps its type


def sharded(axes=AxisType.Auto):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axes,))
    return jax.device_put({"w": jnp.ones((16, 2))}, NamedSharding(mesh, jax.P("data")))


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
def test_init_under_jit_keeps_the_sharding(axes):
    params = sharded(axes)
    state = jax.jit(adamite.adam(1e-2).init)(params)[0]
    assert state.mu["w"].sharding.is_equivalent_to(params["w"].sharding, 2)
    assert state.count.sharding.num_devices == 8
    with contextlib.suppress(ValueError):  # jax 0.10 raises on Explicit axes
        assert jax.jit(optax.adam(1e-2).init)(params)[0].mu["w"].sharding.num_devices == 1


@pytest.mark.parametrize(("library", "programs"), [(adamite, 1), (optax, 2)])
def test_one_program_for_all_steps_on_a_mesh(library, programs):
    params = sharded()
    tx = library.adam(optax.constant_schedule(1e-2))
    state = tx.init(params)
    step = jax.jit(lambda p, s: tx.update(p, s, p))
    before = compiled()
    for _ in range(4):
        _, state = step(params, state)
    assert compiled() - before == programs


def test_learning_rates_below_zero_or_none():
    optax.adam(-1.0), optax.adam(None), optax.adam(float("nan"))
    for wrong in (-1.0, None, float("nan")):
        with pytest.raises((ValueError, TypeError), match="learning_rate must be"):
            adamite.adam(wrong)


def test_hyperparameters_out_of_range():
    for wrong in (dict(b1=1.0), dict(b2=1.5), dict(eps=-1.0), dict(mu_dtype=jnp.int8), dict(eps_root=float("inf"))):
        optax.adam(1e-3, **wrong)
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must"):
            adamite.adam(1e-3, **wrong)


def test_gradients_of_another_shape():
    params, g = {"w": jnp.ones((3, 2))}, {"w": jnp.ones(2)}
    updates, _ = one_step(optax, params, g)
    assert updates["w"].shape == (3, 2)
    with pytest.raises(ValueError, match=r"updates\['w'\] has shape \(2,\), but params\['w'\] has shape \(3, 2\)"):
        one_step(adamite, params, g)


def test_integer_parameters():
    params = {"step": jnp.arange(3)}
    optax.adam(1e-2).init(params)
    with pytest.raises(TypeError, match=r"params\['step'\] has dtype int32.*optax.masked"):
        adamite.adam(1e-2).init(params)


def test_the_state_of_another_optimizer():
    params = jnp.ones(2)
    state = optax.adabelief(1e-2).init(params)
    optax.adam(1e-2).update(params, state)
    with pytest.raises(TypeError, match="state must be a ScaleByAdamState, got ScaleByBeliefState"):
        adamite.adam(1e-2).update(params, state)


def test_injected_hyperparameters_on_bfloat16_parameters():
    params = {"w": jnp.ones(3, BF16)}
    tx = optax.inject_hyperparams(optax.adam)(1e-2)
    updates, _ = tx.update(params, tx.init(params), params)
    assert jnp.isnan(updates["w"]).all()
    with pytest.raises(ValueError, match="b2 must lie in"):
        optax.inject_hyperparams(adamite.adam)(1e-2).init(params)


def test_parameters_passed_to_adam_are_checked_though_not_needed():
    params = {"w": jnp.ones(3)}
    optax.adam(1e-2).update(params, optax.adam(1e-2).init(params), {"other": jnp.ones(7)})
    with pytest.raises(ValueError, match=r"updates\['w'\] has no counterpart in params"):
        adamite.adam(1e-2).update(params, adamite.adam(1e-2).init(params), {"other": jnp.ones(7)})


def test_adopt_needs_an_epsilon():
    params = {"w": jnp.ones(2)}
    updates, _ = (tx := optax.contrib.adopt(1e-2, eps=0.0)).update({"w": jnp.zeros(2)}, tx.init(params), params)
    assert jnp.isnan(updates["w"]).all()
    with pytest.raises(ValueError, match="eps must"):
        adamite.adopt(1e-2, eps=0.0)


def test_a_centred_variance_is_never_negative():
    g = jnp.asarray(np.random.default_rng(0).standard_normal(10_000), jnp.float32)

    def first(library):
        tx = library.rmsprop(1e-2, centered=True, bias_correction=True)  # the variance of one number is 0, but rounded
        return jax.jit(tx.update)(g, tx.init(g))[0]

    assert jnp.isnan(first(optax)).sum() > 10
    assert jnp.isfinite(first(adamite)).all()


def test_ademamix_keeps_its_dtypes():
    params = {"w": jnp.ones(2)}

    def dtypes(tx):
        state = tx.init(params)
        after = tx.update(params, state, params)[1]
        return [[x["w"].dtype.name for x in (s[0].m1, s[0].m2, s[0].nu)] for s in (state, after)]

    kept = ["bfloat16", "bfloat16", "float32"]
    assert dtypes(adamite.ademamix(1e-2, mu_dtype=BF16)) == [kept, kept]
    assert dtypes(optax.contrib.ademamix(1e-2, mu_dtype=BF16)) == [["bfloat16"] * 3, ["float32"] * 3]


def test_radam_differentiates():
    def slope(library):
        tx = library.radam(0.1, eps_root=1e-8)

        def loss(w):
            state = tx.init(w)
            for _ in range(7):
                updates, state = tx.update(w, state, w)
                w = optax.apply_updates(w, updates)
            return jnp.sum(w**2)

        return jax.grad(loss)(jnp.ones(2))

    assert jnp.isnan(slope(optax)).all()
    assert jnp.isfinite(slope(adamite)).all()
