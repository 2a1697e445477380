"""AMSGrad: Reddi, Kale & Kumar 2018, arXiv:1904.09237, Algorithm 2.

The paper's algorithm corrects nothing; optax corrects before the maximum, torch after it.
"""

import numpy as np


def amsgrad(
    theta,
    gradients,
    learning_rate,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    eps_root=0.0,
    bias_correction_mu=True,
    bias_correction_nu=True,
    *,
    max_before_correction=False,
):
    """The parameters after each gradient, in float64.

    `learning_rate` is a number or a function of the number of updates so far.
    """
    theta = np.array(theta, np.float64)
    m, v, largest = np.zeros_like(theta), np.zeros_like(theta), np.zeros_like(theta)
    path = []
    for t, g in enumerate(gradients, start=1):
        alpha = learning_rate(t - 1) if callable(learning_rate) else learning_rate
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        m_hat = m / (1 - b1**t) if bias_correction_mu else m
        correction = 1 - b2**t if bias_correction_nu else 1.0
        if max_before_correction:
            largest = np.where(v > largest, v, largest)
            v_hat = largest / correction
        else:
            largest = np.where(v / correction > largest, v / correction, largest)
            v_hat = largest
        theta = theta - alpha * m_hat / (np.sqrt(v_hat + eps_root) + eps)
        path.append(theta)
    return np.stack(path)
