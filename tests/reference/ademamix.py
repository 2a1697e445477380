"""AdEMAMix, Pagliardini, Ablin & Grangier 2024, arXiv:2409.03137, Algorithm 1, its schedules given as functions."""

import numpy as np


def ademamix(
    theta,
    gradients,
    learning_rate,
    b1=0.9,
    b2=0.999,
    b3=0.9999,
    alpha=5.0,
    eps=1e-8,
    eps_root=0.0,
    weight_decay=0.0,
):
    """The parameters after each gradient, in float64. Schedules are functions of the number of updates so far."""
    theta = np.array(theta, np.float64)
    m1, m2, nu = np.zeros_like(theta), np.zeros_like(theta), np.zeros(theta.shape)
    path = []
    for t, g in enumerate(gradients, start=1):
        eta, beta3, weight = (x(t - 1) if callable(x) else x for x in (learning_rate, b3, alpha))
        m1 = b1 * m1 + (1 - b1) * g
        m2 = beta3 * m2 + (1 - beta3) * g
        nu = b2 * nu + (1 - b2) * np.abs(g) ** 2
        numerator = m1 / (1 - b1**t) + weight * m2
        theta = theta - eta * (numerator / (np.sqrt(nu / (1 - b2**t) + eps_root) + eps) + weight_decay * theta)
        path.append(theta)
    return np.stack(path)
