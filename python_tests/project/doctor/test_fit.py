"""CUDA's rules of compatibility: which driver runs a build, and which code a GPU runs."""

from __future__ import annotations

import pytest

from speechlm_ext.doctor.driver import Driver
from speechlm_ext.doctor.fit import build_for, code_for, driver_problem, gpu_problem, parse_codes

BUILD = ["80-real", "90a-real", "100-real", "100-virtual"]
TORCH = ["sm_75", "sm_80", "sm_90", "compute_90"]


@pytest.mark.parametrize(
    ("gpu", "build", "torch"),
    [
        ((7, 0), None, None),
        ((7, 5), None, "sm_75"),
        ((8, 0), "sm_80", "sm_80"),
        ((8, 6), "sm_80", "sm_80"),  # machine code runs on later minor versions
        ((8, 9), "sm_80", "sm_80"),
        ((8, 7), None, None),  # of an integrated GPU: no machine code of others
        ((9, 0), "sm_90a", "sm_90"),
        ((10, 0), "sm_100", "compute_90"),
        ((10, 3), "sm_100", "compute_90"),
        ((11, 0), "compute_100", "compute_90"),
        ((12, 0), "compute_100", "compute_90"),  # PTX runs on everything later
        ((12, 1), "compute_100", "compute_90"),
    ],
)
def test_the_code_that_a_gpu_runs(gpu, build, torch):
    for archs, wanted in ((BUILD, build), (TORCH, torch)):
        found = code_for(gpu, parse_codes(archs))
        assert (found and found.name) == wanted


@pytest.mark.parametrize(
    ("arch", "gpu", "runs"),
    [
        ("90a-real", (9, 0), True),
        ("90a-real", (10, 0), False),
        ("90a-virtual", (9, 0), True),
        ("90a-virtual", (12, 0), False),  # PTX of a suffix does not run on later GPUs
        ("100f-real", (10, 3), True),
        ("100f-real", (12, 0), False),
        ("100a-real", (10, 3), False),
        ("120-real", (10, 0), False),
        ("86-real", (8, 0), False),
    ],
)
def test_suffixes(arch, gpu, runs):
    (code,) = parse_codes([arch])
    assert code.runs_on(gpu) == runs


def test_an_unknown_architecture_is_an_error():
    with pytest.raises(ValueError, match="unknown CUDA architecture 'native'"):
        parse_codes(["native"])


@pytest.mark.parametrize(
    ("built", "driver", "runs"),
    [
        ("12.8", (12, 0), True),  # minor versions of one major version go together
        ("12.4", (12, 4), True),
        ("12.8", (13, 0), True),
        ("12.4", (11, 8), False),
        ("13.0", (12, 9), False),
        ("13.1", (13, 0), True),
        ("14.0", (13, 0), False),
    ],
)
def test_the_driver_that_a_build_needs(built, driver, runs):
    assert (driver_problem("this build", built, Driver("1.2", driver), "…") is None) == runs


def test_a_driver_that_is_too_old():
    driver = Driver("550.54.14", (12, 4))
    assert driver_problem("this build", "13.0", driver, "build") == (
        "this build has CUDA 13.0 and needs a driver of 580 or later; here is 550.54.14 (CUDA 12.4). "
        "Update the driver, or build"
    )
    assert "needs a driver of 525 or later" in str(
        driver_problem("torch", "12.6", Driver("470.1", (11, 4)), "")
    )
    assert driver_problem("this build", "13.0", Driver(), "") is None


def problem_of(gpu, driver, cuda="12.8"):
    return gpu_problem("this build", "a GPU", gpu, parse_codes(BUILD), cuda, driver, build_for(gpu))


def test_a_gpu_without_code():
    found = problem_of((7, 5), Driver("580.1", (13, 0)))
    assert (
        found is not None and "no code for a GPU (sm_75), but for sm_80, sm_90a, sm_100, compute_100" in found
    )
    assert "SPEECHLM_CUDA_ARCHS=75 SPEECHLM_CUDA=ON pip install" in found


def test_ptx_needs_a_driver_of_its_own_cuda():
    """Minor versions go together for machine code alone."""
    old, new = Driver("550.54.14", (12, 4)), Driver("570.1", (12, 8))
    assert problem_of((9, 0), old) is None
    assert problem_of((12, 0), new) is None
    assert "cannot compile PTX of a CUDA newer than its own" in str(problem_of((12, 0), old))
    assert "update the driver to CUDA 12.8" in str(problem_of((12, 0), old))
