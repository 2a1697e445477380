"""Adam and its kin, transcribed from the papers.

Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1. NAdam: Dozat 2016, Algorithm 2, with a constant b1 and without its
factor b2 on the second moment, as every library has it. AdamW: Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 2,
with the decay multiplied by the learning rate.
"""

import functools

import numpy as np


def adam(
    theta,
    gradients,
    learning_rate,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    eps_root=0.0,
    weight_decay=0.0,
    *,
    nesterov=False,
    bias_correction=True,
):
    """The parameters after each gradient, in float64.

    `learning_rate` is a number or a function of the number of updates so far.
    """
    theta = np.array(theta, np.float64)
    m, v = np.zeros_like(theta), np.zeros(theta.shape)
    path = []
    for t, g in enumerate(gradients, start=1):
        alpha = learning_rate(t - 1) if callable(learning_rate) else learning_rate
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * np.abs(g) ** 2
        m_hat, v_hat = m, v
        if bias_correction:
            m_hat = m / (1 - b1**t)
            v_hat = v / (1 - b2**t)
        if nesterov and bias_correction:
            m_hat = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
        elif nesterov:
            m_hat = b1 * m + (1 - b1) * g
        theta = theta - alpha * (m_hat / (np.sqrt(v_hat + eps_root) + eps) + weight_decay * theta)
        path.append(theta)
    return np.stack(path)


adamw = functools.partial(adam, weight_decay=1e-4)
nadam = functools.partial(adam, nesterov=True)
nadamw = functools.partial(adam, nesterov=True, weight_decay=1e-4)
