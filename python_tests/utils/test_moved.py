"""Old names of modules give what is now elsewhere, and say so; unknown ones are errors as ever."""

from __future__ import annotations

import importlib
import sys

import pytest

import speechlm_ext as sx
from speechlm_ext.utils.moved import MODULES, NAMES


@pytest.mark.parametrize("old", MODULES)
def test_old_modules_have_the_names_of_the_new_ones(old: str):
    sys.modules.pop(f"speechlm_ext.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"speechlm_ext.{old} has moved to speechlm_ext"):
        module = importlib.import_module(f"speechlm_ext.{old}")
    for place in MODULES[old]:
        new = importlib.import_module(f"speechlm_ext.{place}")
        public = [name for name in vars(new) if not name.startswith("_")]
        assert public and all(hasattr(module, name) for name in public)


def test_old_names():
    import speechlm_ext.model

    with pytest.warns(
        DeprecationWarning, match=r"speechlm_ext.model.SpeechLM has moved to speechlm_ext.speechlm"
    ):
        assert speechlm_ext.model.SpeechLM is sx.SpeechLM
    with pytest.raises(AttributeError, match="has no attribute 'SpeachLM'"):
        _ = speechlm_ext.model.SpeachLM
    for (old, name), (place, now) in NAMES.items():
        if old in MODULES:
            module = importlib.import_module(f"speechlm_ext.{old}")
            assert getattr(module, name) is getattr(importlib.import_module(f"speechlm_ext.{place}"), now)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("speechlm_ext.data.shard")
