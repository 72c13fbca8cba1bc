"""Phone-normalised mutual information and purities against values worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.studies.unit_quality import entropy, unit_quality
from speechlm_ext.errors import ConfigError


def test_a_table_worked_by_hand():
    """Of 8 frames phone 0 has 4 (units 0 0 0 1), phone 1 has 4 (units 1 1 2 2)."""
    phones = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    units = np.array([0, 0, 0, 1, 1, 1, 2, 2])
    found = unit_quality(units, phones)
    # Unit 0: 3 frames of phone 0. Unit 1: 1 of phone 0, 2 of phone 1. Unit 2: 2 of phone 1.
    assert found.phone_purity == pytest.approx((3 + 2 + 2) / 8)
    # Phone 0 is mostly unit 0 (3), phone 1 is as often unit 1 as unit 2 (2).
    assert found.cluster_purity == pytest.approx((3 + 2) / 8)
    # H(y) = 1 bit; H(y | z): only unit 1 (3 of 8 frames) leaves a doubt, that of 1 : 2.
    doubt = 3 / 8 * (math.log2(3) - 2 / 3)
    assert found.pnmi == pytest.approx(1 - doubt)
    assert (found.num_frames, found.num_phones, found.num_units) == (8, 2, 3)


def test_the_ends_of_the_scale():
    phones = np.repeat(np.arange(5), 20)
    perfect = unit_quality(phones * 7 + 3, phones)
    assert (perfect.pnmi, perfect.phone_purity, perfect.cluster_purity) == pytest.approx((1, 1, 1))
    independent = unit_quality(np.tile(np.arange(20), 5), phones)
    assert independent.pnmi == pytest.approx(0, abs=1e-12)
    assert (independent.phone_purity, independent.cluster_purity) == pytest.approx((1 / 5, 1 / 20))
    one_unit = unit_quality(np.zeros(100, int), phones)
    assert one_unit.pnmi == pytest.approx(0, abs=1e-12) and one_unit.cluster_purity == 1
    assert unit_quality(np.arange(4), np.zeros(4, int)).pnmi == 0


def test_frames_without_a_phone_or_a_unit_are_left_out():
    found = unit_quality(np.array([0, 1, 5, -1, 1]), np.array([3, 4, -1, 4, 4]))
    assert found == unit_quality(np.array([0, 1, 1]), np.array([3, 4, 4])) and found.num_frames == 3


def test_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    phones = rng.integers(0, 12, 4000)
    units = np.where(rng.random(4000) < 0.6, phones * 3 + rng.integers(0, 3, 4000), rng.integers(0, 40, 4000))
    information = metrics.mutual_info_score(phones, units)
    expected = information / entropy(np.bincount(phones) / 4000)
    assert unit_quality(units, phones).pnmi == pytest.approx(expected, rel=1e-12)


def test_refusals():
    with pytest.raises(ConfigError, match="3 units but 2 phones"):
        unit_quality(np.zeros(3, int), np.zeros(2, int))
    with pytest.raises(ConfigError, match=r"units must be integers \[N\], got float64 \[3\]"):
        unit_quality(np.zeros(3), np.zeros(3, int))
    with pytest.raises(ConfigError, match="of 2 frames none has both"):
        unit_quality(np.array([-1, 2]), np.array([1, -1]))
