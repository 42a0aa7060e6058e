"""The entropy terms and the sigmoid loss in numpy, float64, written from the formulas and with
loops where the package has products."""

import numpy as np


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def koleo(x, eps=1e-8):
    u, cost = unit(x), 0.0
    for i in range(len(u)):
        others = [j for j in range(len(u)) if j != i]
        nearest = others[int(np.argmax([u[i] @ u[j] for j in others]))]
        cost -= np.log(np.sqrt(((u[i] - u[nearest] + eps) ** 2).sum()) + eps)
    return cost / len(u)


def variance_covariance(x, variance=25.0, covariance=2.0):
    c = np.cov(x.T)
    hinge = np.maximum(0, 1 - np.sqrt(np.diag(c) + 1e-4)).mean()
    off = sum(c[i, j] ** 2 for i in range(len(c)) for j in range(len(c)) if i != j)
    return variance * hinge + covariance * off / len(c)


def sigreg(x, directions, knots=17, reach=3.0):
    """`directions` [D, S] of length 1."""
    values = []
    t = np.linspace(0, reach, knots)
    for a in directions.T:
        phi = np.array([np.exp(1j * tk * (x @ a)).mean() for tk in t])
        gap = np.abs(phi - np.exp(-(t**2) / 2)) ** 2 * np.exp(-(t**2) / 2)
        values.append(2 * len(x) * np.trapezoid(gap, t))  # both signs of t
    return np.mean(values)


def uniformity(x, t=2.0):
    u = unit(x)
    pairs = [(i, j) for i in range(len(u)) for j in range(i)]
    return np.log(np.mean([np.exp(-t * ((u[i] - u[j]) ** 2).sum()) for i, j in pairs]))


def coding_rate(x, eps=0.5, scaled=False):
    z = unit(x)
    m, d = z.shape
    rate = 0.5 * np.linalg.slogdet(np.eye(d) + d / (m * eps) * z.T @ z)[1]
    return -rate * ((d + m) / (d * m) if scaled else 1)


def moment_energy(x):
    c = x.T @ x / len(x)
    return np.mean([z @ c @ z for z in x]) / x.shape[1]


def text_sigmoid(image, text, log_scale, bias, group=None):
    u, v, total = unit(image), unit(text), 0.0
    for i in range(len(u)):
        for j in range(len(v)):
            if group is not None and i != j and group[i] == group[j]:
                continue
            logit = np.exp(log_scale) * (u[i] @ v[j]) + bias
            total += np.log1p(np.exp(-logit if i == j else logit))
    return total / len(u)


def gradient(f, *arrays, step=1e-5):
    """Central differences of every array."""
    out = []
    for k, x in enumerate(arrays):
        grad = np.zeros(np.shape(x))
        for index in np.ndindex(grad.shape):
            move = np.zeros(grad.shape)
            move[index] = step
            ends = [f(*arrays[:k], x + sign * move, *arrays[k + 1 :]) for sign in (1, -1)]
            grad[index] = (ends[0] - ends[1]) / (2 * step)
        out.append(grad)
    return out
