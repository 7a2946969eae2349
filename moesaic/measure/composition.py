"""From prices of single options to a plan's KL: a rule fitted on plans that were measured whole.

Errors of several units neither add up in nats nor multiply: each price includes routing that flips anyway, and
large errors saturate. What is seen is a power law, so

    KL(plan) = e^a · (Σ rounding + w · Σ dropping)^b

with one exponent and one weight for dropping. It rises with the sum, so that of two plans the one with the smaller sum is
the better, and an allocator that is exact for the sum is exact for the rule. Leaves out measuring, and plans.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import InputError

WEIGHTS = np.exp(np.linspace(-2.0, 2.0, 41))  # of dropping against rounding
LEAST = 4  # plans that two coefficients, a weight and an error can be had from


@dataclass(frozen=True)
class Rule:
    """KL = e^a · (rounding + weight · dropping)^b.

    error   root mean square of ln(predicted / measured) over plans, each predicted by a rule fitted on the others
    plans   that it was fitted on; range_nats: the least and the largest KL among them
    """

    a: float
    b: float
    weight: float
    error: float
    plans: int
    range_nats: tuple[float, float]

    def predict(self, total: Any) -> Any:
        """KL in nats of a sum of prices (weighted), a number or an array; 0 for 0."""
        return np.exp(self.a) * np.power(np.maximum(total, 0.0), self.b)

    def total(self, rounding: float, dropping: float) -> float:
        return rounding + self.weight * dropping

    @property
    def facts(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def fit(rounding_N: Sequence[float], dropping_N: Sequence[float], kl_N: Sequence[float]) -> "Rule":
        """Least squares in ln KL, with the weight that predicts plans left out best; 1 where nothing is dropped.

        Raises `InputError` for fewer than four plans, or for ones that differ in nothing.
        """
        r, d, y = (np.array(x, np.float64) for x in (rounding_N, dropping_N, kl_N))
        used = np.isfinite(r + d + y) & (r + d > 0) & (y > 0)
        r, d, y = r[used], d[used], np.log(y[used])
        if len(y) < LEAST:
            raise InputError(f"{len(y)} plans were measured with a KL above 0; wanted {LEAST} to fit a rule on")
        weights = WEIGHTS if (d > 0).any() and (r > 0).any() else np.ones(1)
        errors = [left_out(np.log(r + w * d), y) for w in weights]
        weight = float(weights[int(np.argmin(errors))])
        a, b = line(np.log(r + weight * d), y)
        if not b > 0:
            raise InputError(
                f"the KL of {len(y)} plans falls as prices rise (exponent {b:.2f}); measure on more tokens"
            )
        error = nested(r, d, y, weights)
        return Rule(a, b, weight, error, len(y), (float(np.exp(y.min())), float(np.exp(y.max()))))


def line(x_N: np.ndarray, y_N: np.ndarray) -> tuple[float, float]:
    """Intercept and slope of least squares; through equal x, a slope of 1."""
    off_N = x_N - x_N.mean()
    spread = float((off_N**2).sum())
    slope = float((off_N * y_N).sum() / spread) if spread > 1e-12 else 1.0
    return float(y_N.mean() - slope * x_N.mean()), slope


def left_out(x_N: np.ndarray, y_N: np.ndarray) -> float:
    """Root mean square residual of each point from the line through the others (leverages; exact for least squares)."""
    a, b = line(x_N, y_N)
    off_N = x_N - x_N.mean()
    leverage_N = 1 / len(x_N) + off_N**2 / max(float((off_N**2).sum()), 1e-12)
    return math.sqrt(float(np.mean(((y_N - a - b * x_N) / np.maximum(1 - leverage_N, 1e-9)) ** 2)))


def nested(r_N: np.ndarray, d_N: np.ndarray, y_N: np.ndarray, weights: np.ndarray) -> float:
    """As `left_out`, the weight too being chosen without the plan that it is to predict."""
    squares = []
    for i in range(len(y_N)):
        rest = np.arange(len(y_N)) != i
        logs = [np.log(r_N[rest] + w * d_N[rest]) for w in weights]
        best = int(np.argmin([left_out(x, y_N[rest]) for x in logs]))
        a, b = line(logs[best], y_N[rest])
        squares.append((a + b * math.log(r_N[i] + weights[best] * d_N[i]) - y_N[i]) ** 2)
    return math.sqrt(float(np.mean(squares)))
