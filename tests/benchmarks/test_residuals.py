"""The t tests of residuals, against tables and by hand."""

import math

import pytest

from residuals import critical_t, residuals

TABLE = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 7: 2.3646, 29: 2.0452, 89: 1.9870, 90: 1.9867, 239: 1.9699}


@pytest.mark.parametrize(("freedom", "expected"), TABLE.items())
def test_the_critical_value_is_that_of_the_tables(freedom: int, expected: float) -> None:
    assert critical_t(freedom) == pytest.approx(expected, abs=1e-4)


def test_by_hand() -> None:
    found = residuals([[1.0, 2.0], [3.0, 4.0]], [[1.5, 1.0], [3.0, 2.5]])  # residuals -0.5, 1 and 0, 1.5
    assert (found.steps.number, found.steps.mean, found.largest) == (4, 0.5, 1.5)
    assert found.steps.standard_error == pytest.approx(math.sqrt((1 + 0.25 + 0.25 + 1) / 3 / 4))
    assert found.steps.t == pytest.approx(0.5 / found.steps.standard_error)
    assert not found.steps.is_different
    assert found.seeds is not None
    assert (found.seeds.number, found.seeds.mean, found.seeds.standard_error) == (2, 0.5, pytest.approx(0.25))
    assert found.seeds.critical_t == pytest.approx(12.7062, abs=1e-4)


def test_a_shift_is_seen_and_noise_is_not() -> None:
    reference = [[5.0 - 0.1 * step for step in range(30)]]
    noisy = [[loss + (-1.0) ** step * 0.01 for step, loss in enumerate(reference[0])]]
    assert not residuals(noisy, reference).steps.is_different
    assert residuals([[loss + 0.005 for loss in noisy[0]]], reference).steps.is_different


def test_equal_curves_do_not_differ_and_a_constant_shift_does() -> None:
    assert not residuals([[1.0, 2.0]], [[1.0, 2.0]]).steps.is_different
    assert residuals([[1.5, 2.5]], [[1.0, 2.0]]).steps.is_different


def test_what_hangs_together_within_seeds_counts_once_a_seed() -> None:
    shifts = [0.03, -0.01, 0.02, -0.02]  # each the same over all 30 steps
    found = residuals([[5.0 + shift] * 30 for shift in shifts], [[5.0] * 30 for _ in shifts])
    assert found.steps.is_different
    assert found.seeds is not None
    assert not found.seeds.is_different


def test_one_seed_has_no_test_over_seeds() -> None:
    assert residuals([[1.0, 2.0]], [[1.0, 2.0]]).seeds is None


def test_what_cannot_be_paired_is_refused() -> None:
    with pytest.raises(ValueError, match="take more steps"):
        residuals([[1.0]], [[1.0]])
    with pytest.raises(ValueError, match="zip"):
        residuals([[1.0, 2.0]], [[1.0, 2.0, 3.0]])
