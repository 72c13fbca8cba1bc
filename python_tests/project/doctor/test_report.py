"""``speechlm doctor``: its report is true of this machine, and survives what it reports on."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from speechlm_ext import doctor
from speechlm_ext.doctor import fallbacks
from speechlm_ext.doctor.driver import Driver, Gpu
from speechlm_ext.ops.common import matmul
from speechlm_ext.ops.common.native import native

H100 = Gpu("NVIDIA H100", (9, 0))
BUILD = {"cuda_version": "13.0", "cuda_archs": "80-real;90a-real;100-real;100-virtual"}


@pytest.fixture
def machine(monkeypatch):
    """Sets the driver, the build and torch's CUDA version that the report is about."""

    def set_up(driver: Driver, torch_cuda: str | None = None, **build: str) -> None:
        monkeypatch.setattr(fallbacks, "this_driver", lambda: driver)
        monkeypatch.setattr(fallbacks, "_build_info", lambda: BUILD | build)
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)

    return set_up


def test_a_driver_that_is_too_old_for_the_build_and_for_torch(machine):
    machine(Driver("550.54.14", (12, 4), (H100,)), torch_cuda="13.0")
    build, of_torch = fallbacks.find_problems()
    assert build.startswith(
        "this build has CUDA 13.0 and needs a driver of 580 or later; here is 550.54.14 ("
    )
    assert "`CUDACXX=/path/to/nvcc SPEECHLM_CUDA=ON pip install" in build
    assert of_torch.startswith("torch has CUDA 13.0 and needs a driver of 580 or later")


def test_a_driver_that_is_too_old_for_the_build_alone(machine):
    machine(Driver("550.54.14", (12, 4), (H100,)), torch_cuda="12.6")
    (found,) = fallbacks.find_problems()
    assert found.startswith("this build has CUDA 13.0")


def test_a_gpu_that_the_build_has_no_code_for(machine):
    gpus = (H100, Gpu("Tesla T4", (7, 5)), Gpu("Tesla T4", (7, 5)))
    machine(Driver("580.65.06", (13, 0), gpus), torch_cuda="13.0")
    (found,) = fallbacks.find_problems()
    assert "this build has no code for Tesla T4 (sm_75)" in found


def test_a_gpu_and_a_build_without_kernels(machine):
    machine(Driver("580.65.06", (13, 0), (H100,)), torch_cuda="13.0", cuda_version="", cuda_archs="")
    (found,) = fallbacks.find_problems()
    assert "this machine has a GPU (NVIDIA H100) but the build has no CUDA kernels" in found
    assert "SPEECHLM_CUDA=ON pip install" in found


@pytest.mark.parametrize("driver", [Driver(), Driver("580.65.06", (13, 0), (H100,))])
def test_what_fits_is_no_problem(machine, driver):
    machine(driver, torch_cuda="13.0")
    assert fallbacks.find_problems() == []


def test_a_torch_without_cuda_on_a_machine_with_a_driver(machine):
    machine(Driver("580.65.06", (13, 0), (H100,)))
    first, *_ = fallbacks.find_fallbacks()
    assert first.startswith(
        "everything runs on the CPU: torch is a CPU build, and this machine has a driver, 580."
    )
    (found,) = fallbacks.find_problems()
    assert found.startswith(
        "this machine has a GPU (NVIDIA H100) but torch is a CPU build: pip install torch"
    )


def test_ptx_and_an_old_torch_on_a_gpu(machine, monkeypatch):
    machine(Driver("580.65.06", (13, 0)), torch_cuda="13.0")
    monkeypatch.setattr(fallbacks, "visible_gpus", lambda: [Gpu("RTX 5090", (12, 0))])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(matmul, "GIVES_FLOAT32", False)
    found = "\n".join(fallbacks.find_fallbacks())
    assert "compiles the kernels for RTX 5090 from PTX of compute_100" in found
    assert "SPEECHLM_CUDA_ARCHS=120" in found
    assert "kmeans_assign multiplies in float32 on the GPU" in found
    assert "everything runs on the CPU" not in found
    (problem,) = fallbacks.find_problems()
    assert "the loss in bfloat16 on a GPU needs torch 2.8; here is" in problem


def test_problems_are_the_exit_code(monkeypatch, capsys):
    monkeypatch.setitem(doctor.SECTIONS, "problems", ("Problems", lambda: ["the driver is too old"]))
    assert doctor.run_doctor(doctor.DoctorConfig()) == 1
    assert "the driver is too old" in capsys.readouterr().out


def test_json_report_is_true_of_this_machine(capsys):
    assert doctor.run_doctor(doctor.DoctorConfig(json=True)) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] == torch.__version__
    assert report["native"]["compiler"] == native.build_info()["compiler"]
    assert report["cpu"]["threads"] == torch.get_num_threads()
    assert report["cuda"]["available"] == torch.cuda.is_available()
    assert report["cuda"]["torch_cuda"] == torch.version.cuda
    assert report["attention"]["cpu float32"]["kernel"] == "packed"
    assert report["native"]["cuda"] == (native.build_info()["cuda_version"] or None)
    assert {"versions", "native", "cpu", "cuda", "attention", "fallbacks", "missing_extras"} <= set(report)
    assert {"torch_cuda", "available", "devices"} <= set(report["cuda"])


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
