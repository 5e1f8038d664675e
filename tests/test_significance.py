"""tools/significance.py: the t test against printed tables and closed forms."""

import math
import statistics
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import significance  # noqa: E402  (the path comes first)

# upper quantiles of Student's distribution, as statistical tables print them
TABLE = {
    1: {0.25: 1.000, 0.05: 6.314, 0.01: 31.821, 0.005: 63.657},
    2: {0.25: 0.816, 0.05: 2.920, 0.01: 6.965, 0.005: 9.925},
    4: {0.25: 0.741, 0.05: 2.132, 0.01: 3.747, 0.005: 4.604},
    10: {0.25: 0.700, 0.05: 1.812, 0.01: 2.764, 0.005: 3.169},
    120: {0.25: 0.677, 0.05: 1.658, 0.01: 2.358, 0.005: 2.617},
}


@pytest.mark.parametrize("df, p", [(df, p) for df, row in TABLE.items() for p in row])
def test_quantiles_are_those_of_the_tables(df, p):
    t = TABLE[df][p]
    assert significance.t_tail(t, df) == pytest.approx(p, rel=2e-3)
    assert significance.t_tail(-t, df) == pytest.approx(1 - p, rel=2e-3)


@pytest.mark.parametrize("t", [-30.0, -1.0, 0.0, 0.3, 2.0, 500.0])
def test_one_and_two_degrees_have_closed_forms(t):
    cauchy = 0.5 - math.atan(t) / math.pi
    assert significance.t_tail(t, 1) == pytest.approx(cauchy, rel=1e-9, abs=1e-13)
    assert significance.t_tail(t, 2) == pytest.approx(
        0.5 - t / (2 * math.sqrt(2 + t * t)), rel=1e-6, abs=1e-13
    )


def test_many_degrees_are_the_normal_distribution():
    for t in 0.5, 1.96, 3.0:
        normal = math.erfc(t / math.sqrt(2)) / 2
        assert significance.t_tail(t, 1e7) == pytest.approx(normal, rel=1e-5)


def test_fractions_of_degrees_lie_between():
    tails = [significance.t_tail(2.0, df) for df in (2, 2.5, 3, 3.5, 4)]
    assert tails == sorted(tails, reverse=True) and len(set(tails)) == 5


def test_mean_and_deviation_are_those_of_the_sample():
    values = [1.05989454, 1.06124613, 1.06208695]
    assert significance.mean(values) == pytest.approx(statistics.mean(values), rel=1e-15)
    assert significance.deviation(values) == pytest.approx(statistics.stdev(values), rel=1e-12)
    assert significance.deviation([1.0]) is None


def test_against_one_number_it_is_the_test_of_one_sample():
    """1, 2, 3 against 5: the mean lies 3 below, its standard error is 1 / sqrt(3)."""
    test = significance.one_sided([1.0, 2.0, 3.0], [5.0])
    assert (test.lower_by, test.df) == (3.0, 2.0)
    assert test.t == pytest.approx(3 * math.sqrt(3), rel=1e-12)
    assert test.p == pytest.approx(0.5 - test.t / (2 * math.sqrt(2 + test.t**2)), rel=1e-9)


def test_welch_by_hand():
    """Variances 1 and 4 of three each: error sqrt(5 / 3), df (5/3)^2 / ((1/9 + 16/9) / 2)."""
    test = significance.one_sided([1.0, 2.0, 3.0], [4.0, 6.0, 8.0], margin=1.0)
    assert test.t == pytest.approx(3 / math.sqrt(5 / 3), rel=1e-12)
    assert test.df == pytest.approx(25 / 9 / (17 / 18), rel=1e-12)
    tails = [significance.t_tail(test.t, df) for df in (3, 2)]
    assert tails[0] < test.p < tails[1]


def test_a_margin_and_a_worse_score_make_p_larger():
    ours, theirs = [1.0, 1.1, 1.2], [1.3, 1.4, 1.5]
    p = [significance.one_sided(ours, theirs, margin).p for margin in (0.0, 0.1, 0.3, 0.5)]
    assert p == sorted(p) and p[2] == pytest.approx(0.5) and p[3] > 0.9
    assert significance.one_sided(theirs, ours).p > 0.5


def test_without_spread_it_is_certain_and_of_one_seed_there_is_no_test():
    assert significance.one_sided([1.0, 1.0], [2.0], 0.5).p == 0
    assert significance.one_sided([1.0, 1.0], [1.5], 0.5).p == 1
    assert significance.one_sided([1.0], [2.0, 3.0]) is None
