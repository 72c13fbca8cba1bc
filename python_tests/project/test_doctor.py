"""``speechlm doctor``: its report is true of this machine, and survives what it reports on."""

from __future__ import annotations

import importlib.util
import json

import torch

from speechlm_ext import doctor
from speechlm_ext.ops.common.native import native


def test_json_report_is_true_of_this_machine(capsys):
    assert doctor.run_doctor(doctor.DoctorConfig(json=True)) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] == torch.__version__
    assert report["native"]["compiler"] == native.build_info()["compiler"]
    assert report["cpu"]["threads"] == torch.get_num_threads()
    assert report["cuda"]["available"] == torch.cuda.is_available()
    assert report["attention"]["cpu float32"]["kernel"] == "sdpa"


def test_missing_extras_name_the_command(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jiwer" else find(name))
    assert doctor.run_doctor(doctor.DoctorConfig()) == 0
    text = capsys.readouterr().out
    assert "jiwer" in text and "pip install 'speechlm_ext[eval]'" in text


def test_a_broken_package_does_not_hide_the_rest(monkeypatch, capsys):
    def broken() -> None:
        raise RuntimeError("driver is gone")

    monkeypatch.setitem(doctor.SECTIONS, "cuda", ("CUDA devices", broken))
    assert doctor.run_doctor(doctor.DoctorConfig()) == 0
    text = capsys.readouterr().out
    assert "error  RuntimeError: driver is gone" in text
    assert "Compiled module" in text and "Attention" in text


def test_unusable_module_is_a_failure(monkeypatch, capsys):
    def broken() -> None:
        raise ImportError("no _C")

    monkeypatch.setitem(doctor.SECTIONS, "native", ("Compiled module", broken))
    assert doctor.run_doctor(doctor.DoctorConfig()) == 1
    assert "ImportError: no _C" in capsys.readouterr().out
