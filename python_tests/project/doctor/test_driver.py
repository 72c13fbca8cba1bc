"""The driver, asked through its own libraries: small ones made here in place of NVIDIA's."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from speechlm_ext.doctor.driver import Driver, Gpu, find_driver, parse_version

CUDA = "int cuDriverGetVersion(int* version) { *version = %d; return %d; }"
NVML = """
#include <string.h>
int nvmlInit_v2(void) { return %d; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char* text, unsigned size) { strncpy(text, "550.54.14", size); return 0; }
int nvmlDeviceGetCount_v2(unsigned* count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** device) { *device = (void*)(long)(index + 1); return 0; }
int nvmlDeviceGetName(void* device, char* text, unsigned size) {
  strncpy(text, device == (void*)1 ? "NVIDIA H100" : "Tesla T4", size);
  return 0;
}
int nvmlDeviceGetCudaComputeCapability(void* device, int* major, int* minor) {
  *major = device == (void*)1 ? 9 : 7;
  *minor = device == (void*)1 ? 0 : 5;
  return 0;
}
"""
PROC = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version:  gcc 12.2.0\n"


class Machine:
    """Libraries by name in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.proc = folder / "version"

    def compile(self, name: str, source: str) -> None:
        (self.folder / "source.c").write_text(source)
        command = ["cc", "-shared", "-fPIC", "-o", str(self.folder / name), str(self.folder / "source.c")]
        subprocess.run(command, check=True)

    def load(self, name: str) -> ctypes.CDLL:
        return ctypes.CDLL(str(self.folder / name))

    def find(self) -> Driver:
        return find_driver(self.load, self.proc)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    return Machine(tmp_path)


def test_a_driver_with_everything(machine):
    machine.compile("libcuda.so.1", CUDA % (12040, 0))
    machine.compile("libnvidia-ml.so.1", NVML % 0)
    machine.proc.write_text(PROC)
    gpus = (Gpu("NVIDIA H100", (9, 0)), Gpu("Tesla T4", (7, 5)))
    assert machine.find() == Driver("550.54.14", (12, 4), gpus)
    assert str(machine.find()) == "550.54.14 (CUDA 12.4)"


def test_a_container_without_nvml(machine):
    machine.compile("libcuda.so.1", CUDA % (13000, 0))
    machine.proc.write_text(PROC)
    assert machine.find() == Driver("580.65.06", (13, 0))


def test_nvml_that_does_not_answer(machine):
    machine.compile("libnvidia-ml.so.1", NVML % 9)
    machine.proc.write_text(PROC)
    assert machine.find() == Driver("580.65.06", None)


def test_the_toolkits_stub_is_no_driver(machine):
    machine.compile("libcuda.so.1", CUDA % (0, 34))
    assert machine.find() == Driver()


def test_no_driver(machine):
    assert machine.find() == Driver()


def test_versions():
    assert parse_version("12.4") == (12, 4) and parse_version("13.0.1") == (13, 0)
