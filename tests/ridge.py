"""Ridge regressions by NumPy, in double precision: the oracle of the closed forms of erasure."""

import numpy as np
from torch import Tensor


def as_matrix(features: Tensor) -> np.ndarray:
    """Features in double precision, standardised as the closed forms have it."""
    x = features.detach().double().numpy()
    return (x - x.mean(0)) / (x.std(0) + 1e-3)


def r_squared(features: Tensor, is_class: Tensor, ridge: float) -> float:
    """R^2 of the ridge regression to the indicator of a class, by NumPy: features (samples, n), is_class (samples)."""
    h, t = as_matrix(features), is_class.double().numpy()
    b = h.T @ (t - t.mean()) / len(t)
    return b @ np.linalg.solve(h.T @ h / len(t) + ridge * np.eye(len(b)), b) / t.var()


def ridge_recalls(features: Tensor, labels: Tensor, ridge: float) -> list[float]:
    """Percent of each class that a ridge regression finds, by NumPy, one class at a time."""
    h, y = as_matrix(features), labels.numpy()
    correlation = h.T @ h / len(h) + ridge * np.eye(h.shape[1])
    scores = []
    for label in range(int(y.max()) + 1):
        t = (y == label).astype(float)
        scores.append(h @ np.linalg.solve(correlation, h.T @ (t - t.mean()) / len(t)) + t.mean())
    found = np.argmax(scores, 0)
    return [100 * float((found[y == label] == label).mean()) for label in range(len(scores))]
