"""Whether one set of scores is lower than another: means, spread, one-sided t test."""

import math
from typing import NamedTuple


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def deviation(values: list[float]) -> float | None:
    """The sample's standard deviation, n - 1 below; None of fewer than two."""
    if len(values) < 2:
        return None
    center = mean(values)
    return math.sqrt(math.fsum((x - center) ** 2 for x in values) / (len(values) - 1))


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised, I_x(a, b), by its continued fraction (Lentz)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast below
        return 1 - incomplete_beta(b, a, 1 - x)
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    scale = math.exp(scale + a * math.log(x) + b * math.log1p(-x)) / a
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    result = d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in even, odd:
            d, c = 1 / (1 + term * d), 1 + term / c
            result *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return scale * result


def t_tail(t: float, df: float) -> float:
    """Of Student's distribution, above t."""
    half = incomplete_beta(df / 2, 0.5, df / (df + t * t)) / 2
    return half if t >= 0 else 1 - half


class Test(NamedTuple):
    lower_by: float  # theirs less ours
    t: float
    df: float
    p: float  # of such a difference or a larger one, if ours were lower by `margin` only


def one_sided(ours: list[float], theirs: list[float], margin: float = 0.0) -> Test | None:
    """That the mean of ours is lower by more than margin (Welch). Theirs may be one number, which
    is then taken as exact. None if ours are fewer than two."""
    if len(ours) < 2:
        return None
    spread = [(deviation(x) or 0.0) ** 2 / len(x) for x in (ours, theirs)]
    lower_by, error = mean(theirs) - mean(ours), math.sqrt(sum(spread))
    if error == 0:
        return Test(lower_by, math.inf, len(ours) - 1, float(lower_by <= margin))
    degrees = [s**2 / (len(x) - 1) for s, x in zip(spread, (ours, theirs), strict=True) if s]
    df, t = sum(spread) ** 2 / sum(degrees), (lower_by - margin) / error
    return Test(lower_by, t, df, t_tail(t, df))
