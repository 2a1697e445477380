"""Adam-mini, transcribed from Zhang et al. 2024, arXiv:2406.16793, Algorithm 1."""

import numpy as np


def adam_mini(theta, gradients, learning_rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, *, axes=None):
    """The parameters, one tensor, after each gradient, float64.

    `learning_rate` may be a function of the number of updates so far. A block extends over `axes`; None: all of them.
    """
    theta = np.array(theta, np.float64)
    m, v, path = np.zeros_like(theta), 0.0, []
    for t, g in enumerate(gradients, start=1):
        alpha = learning_rate(t - 1) if callable(learning_rate) else learning_rate
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * np.mean(g**2, axis=axes, keepdims=True)
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        theta = theta - alpha * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * theta)
        path.append(theta)
    return np.stack(path)
