"""How well units agree with phones: purities and phone-normalised mutual information.

The three measures of Hsu et al., "HuBERT" (2021), section IV-C, of the joint distribution ``p(y, z)`` of phone ``y``
and unit ``z`` over frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from speechlm_ext.errors import ConfigError


@dataclass(frozen=True)
class UnitQuality:
    """Agreement of units with phones; each rate is in [0, 1]."""

    pnmi: float
    """Share of the phones' entropy explained by the unit of a frame: I(y; z) / H(y); 0 if only one phone occurs."""
    phone_purity: float
    """Share of frames whose phone is the most frequent one of their unit: Σ_z max_y p(y, z)."""
    cluster_purity: float
    """Share of frames whose unit is the most frequent one of their phone: Σ_y max_z p(y, z)."""
    num_frames: int
    """Frames that have a phone and a unit."""
    num_phones: int
    """Phones that occur among them."""
    num_units: int
    """Units that occur among them."""


def unit_quality(units: np.ndarray, phones: np.ndarray) -> UnitQuality:
    """Compare the unit and the phone of each frame.

    Args:
        units: integers ``[N]``; negative: no unit (the frame is left out).
        phones: integers ``[N]``; negative: no phone (the frame is left out).

    Raises:
        ConfigError: arrays of other shapes or types, or no frame that has both.
    """
    units, phones = np.asarray(units), np.asarray(phones)
    for name, array in (("units", units), ("phones", phones)):
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise ConfigError(
                f"unit_quality: {name} must be integers [N], got {array.dtype} {list(array.shape)}."
            )
    if len(units) != len(phones):
        raise ConfigError(
            f"unit_quality: {len(units)} units but {len(phones)} phones; each frame needs one of each."
        )
    has_both = (units >= 0) & (phones >= 0)
    if not has_both.any():
        raise ConfigError(
            f"unit_quality: of {len(units)} frames none has both a unit and a phone (both >= 0)."
        )
    phone_ids, y = np.unique(phones[has_both], return_inverse=True)
    unit_ids, z = np.unique(units[has_both], return_inverse=True)
    counts_YZ = np.bincount(y * len(unit_ids) + z, minlength=len(phone_ids) * len(unit_ids))
    joint_YZ = counts_YZ.reshape(len(phone_ids), len(unit_ids)) / len(y)
    phone_entropy = entropy(joint_YZ.sum(1))
    information = phone_entropy + entropy(joint_YZ.sum(0)) - entropy(joint_YZ.ravel())
    return UnitQuality(
        pnmi=max(information, 0.0) / phone_entropy if phone_entropy > 0 else 0.0,
        phone_purity=float(joint_YZ.max(0).sum()),
        cluster_purity=float(joint_YZ.max(1).sum()),
        num_frames=len(y),
        num_phones=len(phone_ids),
        num_units=len(unit_ids),
    )


def entropy(p: np.ndarray) -> float:
    """Entropy in nats of probabilities ``[n]`` that add up to 1."""
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())
