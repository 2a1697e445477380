"""Each regularizer, at its place in the chain, against the mathematics that it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamite
from bits import assert_same_bits

P = {"w": jnp.array([2.0, -0.3, 0.0]), "b": jnp.array([0.5])}
G = {"w": jnp.array([0.1, 0.2, -0.3]), "b": jnp.array([1.0])}


def updates(*parts, params=P, steps=1, g=G):
    tx = adamite.chain(*parts)
    state = tx.init(params)
    for _ in range(steps):
        u, state = tx.update(g, state, params)
        params = optax.apply_updates(params, u)
    return u, params


def penalized(penalty):
    """The gradients G plus those of a penalty in the loss."""
    return jax.tree.map(lambda g, p: g + jax.grad(penalty)(p), G, P)


def test_decay_before_adam_is_l2_in_the_loss():
    ours, _ = updates(adamite.add_decayed_weights(0.3), adamite.adam(0.1))
    expected, _ = updates(adamite.adam(0.1), g=penalized(lambda w: 0.15 * jnp.sum(w**2)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, expected)


def test_l1_before_adam_is_l1_in_the_loss():
    ours, _ = updates(adamite.add_l1(0.3), adamite.adam(0.1))
    expected, _ = updates(adamite.adam(0.1), g=penalized(lambda w: 0.3 * jnp.sum(jnp.where(w == 0, 0, jnp.abs(w)))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, expected)


def test_decoupled_decay_shrinks_all_weights_alike():
    _, params = updates(adamite.adamw(0.1, weight_decay=0.5), g=jax.tree.map(jnp.zeros_like, G), steps=3)
    np.testing.assert_allclose(params["w"], P["w"] * 0.95**3, rtol=1e-6)


def test_decay_after_the_learning_rate_does_not_depend_on_it():
    for rate in (0.1, 1e-6):
        tail = adamite.add_decayed_weights(0.05, after_learning_rate=True)
        _, params = updates(adamite.adam(rate), tail, g=jax.tree.map(jnp.zeros_like, G), steps=3)
        np.testing.assert_allclose(params["w"], P["w"] * 0.95**3, rtol=1e-6)


def test_soft_threshold_lands_on_exact_zeros():
    _, params = updates(adamite.adam(0.01), adamite.soft_threshold(0.4))
    aims = {k: P[k] + updates(adamite.adam(0.01))[0][k] for k in P}
    for k, aim in aims.items():
        np.testing.assert_allclose(params[k], np.sign(aim) * np.maximum(np.abs(aim) - 0.4, 0), atol=1e-7)
    assert params["w"][1] == 0
    assert params["w"][2] == 0


def test_gradient_descent_with_soft_threshold_solves_the_lasso():
    """For an orthonormal design the lasso's solution is the soft-thresholded least-squares one."""
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((20, 5)))
    y = q @ np.array([3.0, -2.0, 0.4, 0.1, 0.0]) + 0.05
    least_squares = q.T @ y
    solution = np.sign(least_squares) * np.maximum(np.abs(least_squares) - 0.5, 0)
    tx = adamite.chain(adamite.scale_by_learning_rate(0.5), adamite.soft_threshold(0.5 * 0.5))
    w = jnp.zeros(5)
    state = tx.init(w)
    for _ in range(60):
        u, state = tx.update(jax.grad(lambda w: 0.5 * jnp.sum((q @ w - y) ** 2))(w), state, w)
        w = optax.apply_updates(w, u)
    np.testing.assert_allclose(w, solution, atol=1e-6)
    assert ((np.asarray(w) == 0) == (solution == 0)).all()


PARTS = {
    "add_decayed_weights": adamite.add_decayed_weights,
    "after_learning_rate": lambda *a, **k: adamite.add_decayed_weights(*a, after_learning_rate=True, **k),
    "add_l1": adamite.add_l1,
    "soft_threshold": adamite.soft_threshold,
}
each = pytest.mark.parametrize("part", PARTS)


@each
def test_schedules_and_masks(part):
    tx = PARTS[part](optax.linear_schedule(0.0, 0.2, 2), mask={"w": True, "b": False})
    state = tx.init(P)
    sizes = []
    for _ in range(3):
        u, state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, G), state, P)
        sizes.append(float(jnp.abs(u["w"]).max()))
        assert (u["b"] == 0).all()
    assert sizes[0] == 0
    np.testing.assert_allclose(sizes[2], 2 * sizes[1], rtol=1e-5)


@each
def test_bfloat16_and_none_and_complex(part):
    tx = PARTS[part](0.1)
    params = {"h": jnp.ones(2, jnp.bfloat16), "n": jnp.ones(2), "z": jnp.full(2, 3 + 4j, jnp.complex64)}
    g = {"h": jnp.ones(2, jnp.bfloat16), "n": None, "z": jnp.zeros(2, jnp.complex64)}
    u, _ = tx.update(g, tx.init(params), params)
    assert [None if x is None else x.dtype.name for x in u.values()] == ["bfloat16", None, "complex64"]
    np.testing.assert_allclose(jnp.angle(u["z"]) % jnp.pi, jnp.angle(params["z"]), rtol=1e-5)


@each
def test_params_are_needed_and_matched(part):
    tx = PARTS[part](0.1)
    with pytest.raises(ValueError, match="without params"):
        tx.update(G, tx.init(P))
    with pytest.raises(ValueError, match=r"updates\['w'\] has shape \(3,\), but params\['w'\] has shape \(2,\)"):
        tx.update(G, tx.init(P), {**P, "w": jnp.ones(2)})


@each
@pytest.mark.parametrize("wrong", [-0.1, float("nan"), "0.1", None])
def test_strengths_are_checked(part, wrong):
    with pytest.raises((ValueError, TypeError), match=r"^(weight_decay|strength|threshold) must be"):
        PARTS[part](wrong)


def test_zero_strength_changes_nothing():
    plain, _ = updates(adamite.adam(0.1))
    for part in (adamite.add_decayed_weights(0.0), adamite.add_l1(0.0)):
        assert_same_bits(updates(part, adamite.adam(0.1))[0], plain)
