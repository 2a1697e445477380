"""RMSProp: Tieleman & Hinton 2012, lecture 6.5. Centred, with momentum: Graves 2013, arXiv:1308.0850, eq. 38 to 41.

The bias corrections are Adam's. Nesterov's momentum: see `reference.sgd`.
"""

import numpy as np


def rmsprop(
    theta,
    gradients,
    learning_rate,
    decay=0.9,
    eps=1e-8,
    initial_scale=0.0,
    eps_in_sqrt=True,
    centered=False,
    momentum=None,
    nesterov=False,
    bias_correction=False,
):
    """The parameters after each gradient, in float64."""
    theta = np.array(theta, np.float64)
    mean, mean_square = np.zeros_like(theta), np.full(theta.shape, float(initial_scale))
    delta = np.zeros_like(theta)
    path = []
    for t, g in enumerate(gradients, start=1):
        alpha = learning_rate(t - 1) if callable(learning_rate) else learning_rate
        mean = decay * mean + (1 - decay) * g
        mean_square = decay * mean_square + (1 - decay) * np.abs(g) ** 2
        correction = 1 - decay**t if bias_correction else 1.0
        power = mean_square / correction
        if centered:
            power = np.maximum(power - np.abs(mean / correction) ** 2, 0)
        step = -alpha * g / (np.sqrt(power + eps) if eps_in_sqrt else np.sqrt(power) + eps)
        if momentum is not None:
            delta = momentum * delta + step
            step = momentum * delta + step if nesterov else delta
        theta = theta + step
        path.append(theta)
    return np.stack(path)
