"""Adam-atan2, transcribed from Everett et al. 2024, arXiv:2407.05872."""

import numpy as np


def adam_atan2(theta, gradients, learning_rate, b1=0.9, b2=0.999, weight_decay=0.0, *, a=1.0, b=1.0):
    """The parameters after each gradient. `learning_rate`: a number or a function of the number of updates so far."""
    theta = np.array(theta, np.float64)
    m, v, path = np.zeros_like(theta), np.zeros_like(theta), []
    for t, g in enumerate(gradients, start=1):
        alpha = learning_rate(t - 1) if callable(learning_rate) else learning_rate
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        theta = theta - alpha * (a * np.arctan2(m_hat, b * np.sqrt(v_hat)) + weight_decay * theta)
        path.append(theta)
    return np.stack(path)
