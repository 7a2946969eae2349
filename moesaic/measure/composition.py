"""From prices of single options to a plan's KL: a rule fitted on plans that were measured whole.

Errors of several units do not add up in nats. On two small trained models the sum of prices is mostly 1.0 to 1.4 times
the plan's KL, nearest to it where KL is large; for MXFP4 in every unit at once 2.3 and 2.8 times, as if errors of one
kind partly undid each other. A power law covers all but such plans, so

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

WEIGHTS = 2 ** np.linspace(-2.0, 2.0, 33)  # of dropping against rounding
ROUNDS, FLOOR = 12, 0.01  # of reweighting; differences of ln KL below a hundredth weigh alike
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
        """Least absolute differences in ln KL: one plan that is out of the ordinary does not bend the rule.

        Raises `InputError` for fewer than four plans, or where KL falls as prices rise.
        """
        r, d, y = (np.array(x, np.float64) for x in (rounding_N, dropping_N, kl_N))
        used = np.isfinite(r + d + y) & (r + d > 0) & (y > 0)
        r, d, y = r[used], d[used], np.log(y[used])
        if len(y) < LEAST:
            raise InputError(f"{len(y)} plans were measured with a KL above 0; wanted {LEAST} to fit a rule on")
        a, b, weight = best(r, d, y)
        if not b > 0:
            raise InputError(
                f"the KL of {len(y)} plans falls as prices rise (exponent {b:.2f}); measure on more tokens"
            )
        squares = []
        for i in range(len(y)):
            rest = np.arange(len(y)) != i
            a_i, b_i, weight_i = best(r[rest], d[rest], y[rest])
            squares.append((a_i + b_i * math.log(r[i] + weight_i * d[i]) - y[i]) ** 2)
        error = math.sqrt(sum(squares) / len(y))
        return Rule(a, b, weight, error, len(y), (float(np.exp(y.min())), float(np.exp(y.max()))))


def best(r_N: np.ndarray, d_N: np.ndarray, y_N: np.ndarray) -> tuple[float, float, float]:
    """(a, b, weight) of the weight that leaves least; 1 where one of the two sums says nothing."""
    weights = WEIGHTS if (d_N > 0).any() and (r_N > 0).any() else np.ones(1)
    found = [(*line(np.log(r_N + w * d_N), y_N), float(w)) for w in weights]
    _, a, b, weight = min(found, key=lambda f: f[0])
    return a, b, weight


def line(x_N: np.ndarray, y_N: np.ndarray) -> tuple[float, float, float]:
    """Mean absolute difference, intercept and slope of the line that makes it least; through equal x, a slope of 1.

    By least squares over and over, each point weighed by the inverse of its last difference (Schlossmacher 1973).
    """
    weight_N, a, b = np.ones(len(x_N)), 0.0, 1.0
    for _ in range(ROUNDS):
        total = weight_N.sum()
        mean_x, mean_y = float(weight_N @ x_N / total), float(weight_N @ y_N / total)
        spread = float(weight_N @ (x_N - mean_x) ** 2)
        b = float(weight_N @ ((x_N - mean_x) * (y_N - mean_y)) / spread) if spread > 1e-12 * total else 1.0
        a = mean_y - b * mean_x
        weight_N = 1 / np.maximum(np.abs(y_N - a - b * x_N), FLOOR)
    return float(np.abs(y_N - a - b * x_N).mean()), a, b
