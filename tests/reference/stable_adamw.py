"""StableAdamW, transcribed from Wortsman et al. 2023, arXiv:2304.13013, Algorithm 2.

One line differs: the decay takes the learning rate before it is clipped (`clipped_decay=True` is the paper's).
"""

import numpy as np


def stable_adamw(theta, gradients, learning_rate, b1=0.9, b2=0.99, eps=1e-6, weight_decay=1e-4, *, clipped_decay=False):
    """The parameters, one tensor, after each gradient. `learning_rate`: a number or a function of the step from 0."""
    theta = np.array(theta, np.float64)
    v, u, path = np.zeros_like(theta), np.zeros_like(theta), []
    for t, g in enumerate(gradients, start=1):
        alpha = learning_rate(t - 1) if callable(learning_rate) else learning_rate
        b1_hat = b1 * (1 - b1 ** (t - 1)) / (1 - b1**t)
        b2_hat = b2 * (1 - b2 ** (t - 1)) / (1 - b2**t)
        v = b1_hat * v + (1 - b1_hat) * g
        u = b2_hat * u + (1 - b2_hat) * g**2
        rms = np.sqrt(np.mean(g**2 / np.maximum(u, eps**2)))
        eta = alpha / max(1, rms)
        decay = (eta if clipped_decay else alpha) * weight_decay
        theta = theta - decay * theta - eta * v / (np.sqrt(u) + eps)
        path.append(theta)
    return np.stack(path)
