"""Shared checks of settings, and the guard that runs torch on one thread."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from speechlm_ext.errors import ConfigError
from speechlm_ext.utils.device import one_thread
from speechlm_ext.utils.options import check_positive


def test_check_positive():
    settings = SimpleNamespace(beam=1, rate=2.5, steps=0)
    check_positive(settings, "beam", "rate")
    with pytest.raises(ConfigError, match="SimpleNamespace: steps must be at least 1, got 0"):
        check_positive(settings, "beam", "steps")


def test_one_thread_is_restored_after_overlapping_uses():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, second = one_thread(), one_thread()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.get_num_threads() == 1
        second.__exit__(None, None, None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
