"""What the kernels' host code leaves behind on two devices, and what it says when the machine cannot run it."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

import speechlm_ext as sx
from python_tests import cuda_on_cpu
from speechlm_ext.doctor.driver import OLDEST_DRIVER
from speechlm_ext.ops.common.native import OpError

INSUFFICIENT_DRIVER, NO_KERNEL_IMAGE, ILLEGAL_ADDRESS, DRIVER_MISMATCH = 35, 209, 700, 803
LIBRARY_IS_TOO_NEW = 222


@pytest.fixture
def shim() -> Iterator[ModuleType]:
    shim = cuda_on_cpu.load()
    shim.reset_machine()
    with cuda_on_cpu.kernels_on_cpu(shim):
        yield shim
    shim.reset_machine()


def embed() -> torch.Tensor:
    return sx.ops.multistream_embed(torch.tensor([[1, 2], [3, 0]]), torch.eye(5))


def in_new_thread(call: Callable[[], Any]) -> Any:
    """What ``call`` returns in a thread that has used no device yet."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("before", [[], [0], [1]], ids=["nothing", "another device", "the tensors' device"])
@pytest.mark.parametrize("device", [0, 1])
def test_an_op_leaves_the_current_device_as_it_was(shim, device, before):
    """Another runtime, torch's, has made ``before`` current: afterwards it is, and no other device has a context."""
    shim.machine().tensors_on = device
    shim.make_context(device)  # the tensors' memory

    def call() -> list[int]:
        for current in before:
            shim.make_context(current)
            shim.make_current(current)
        assert torch.equal(embed(), torch.eye(5)[[1, 3]] + torch.tensor([[0, 0, 1.0, 0, 0], [0] * 5]))
        return shim.context_stack()

    assert in_new_thread(call) == before
    assert set(shim.machine().launched_on) == {device}
    assert shim.machine().contexts == sorted({device, *before})


def test_every_op_of_a_step_runs_on_its_tensors_device(shim):
    shim.machine().tensors_on = 1
    shim.make_context(1)
    ids = torch.randint(1, 9, (40, 3))

    def call() -> list[int]:
        batch = sx.ops.delay_pack([ids], delays=[0, 1, 2], pad_ids=[0, 0, 0])
        assert torch.equal(sx.ops.delay_unpack(batch.ids, batch.cu_seqlens, delays=[0, 1, 2])[0], ids)
        sx.ops.scatter_sum_rows(torch.randn(40, 8), ids, 9)
        table = torch.randn(9, 8, requires_grad=True)
        sx.ops.multistream_embed(ids, table).sum().backward()
        sx.ops.kmeans_assign(torch.randn(50, 16), torch.randn(7, 16))
        return shim.context_stack()

    assert in_new_thread(call) == []
    assert set(shim.machine().launched_on) == {1} and len(shim.machine().launched_on) > 10
    assert shim.machine().contexts == [1]


def test_a_fault_leaves_the_current_device_as_it_was(shim):
    shim.machine().tensors_on = 1
    shim.make_context(1)
    shim.make_context(0)

    def call() -> list[int]:
        shim.make_current(0)
        shim.machine().next_error = ILLEGAL_ADDRESS
        with pytest.raises(RuntimeError):
            embed()
        return shim.context_stack()

    assert in_new_thread(call) == [0]


def test_a_driver_that_is_too_old_is_named_with_the_remedy(shim):
    shim.machine().next_error, shim.machine().driver_version = INSUFFICIENT_DRIVER, 12040
    with pytest.raises(OpError) as error:
        embed()
    text = str(error.value)
    assert "this build has CUDA 13.0 and needs an NVIDIA driver of 580 or later" in text
    assert "the driver here supports CUDA up to 12.4" in text
    assert "CUDACXX=" in text and "SPEECHLM_CUDA=ON pip install" in text and "speechlm doctor" in text


@pytest.mark.parametrize(("major", "oldest"), OLDEST_DRIVER.items())
def test_ops_and_doctor_name_the_same_driver(shim, major, oldest):
    shim.machine().next_error, shim.machine().runtime_version = INSUFFICIENT_DRIVER, 1000 * major
    with pytest.raises(
        OpError, match=rf"has CUDA {major}\.0 and needs an NVIDIA driver of {oldest} or later"
    ):
        embed()


def test_no_driver(shim):
    shim.machine().next_error, shim.machine().driver_version = INSUFFICIENT_DRIVER, 0
    with pytest.raises(OpError, match="no driver was found here"):
        embed()


@pytest.mark.parametrize("status", [NO_KERNEL_IMAGE, LIBRARY_IS_TOO_NEW])
def test_a_gpu_without_kernels_is_named_with_the_compiled_ones(shim, status):
    shim.machine().next_error, shim.machine().capability = status, (7, 5)
    with pytest.raises(OpError) as error:
        embed()
    text = str(error.value)
    assert "compiled for 80-real;90a-real;100-real;100-virtual, and this GPU is sm_75" in text
    assert "SPEECHLM_CUDA_ARCHS=75 SPEECHLM_CUDA=ON pip install" in text


def test_a_driver_of_two_versions(shim):
    shim.machine().next_error = DRIVER_MISMATCH
    with pytest.raises(OpError, match="of different versions.*reboot"):
        embed()


def test_a_kernel_fault_may_be_anothers(shim):
    shim.machine().next_error = ILLEGAL_ADDRESS
    with pytest.raises(RuntimeError) as error:
        embed()
    assert not isinstance(error.value, ValueError)
    assert "(maybe from earlier work on this device; rerun with CUDA_LAUNCH_BLOCKING=1)" in str(error.value)


def test_an_invalid_launch_is_ours(shim):
    shim.machine().next_error = 1
    with pytest.raises(RuntimeError) as error:
        embed()
    assert "earlier work" not in str(error.value)


def test_a_stream_that_is_too_wide_for_the_gpu_says_so(shim):
    """A million columns with a history: 155 KB of shared memory, where an sm_86 has 99."""
    shim.machine().shared_bytes = 99 << 10
    ids = torch.arange(1 << 20)
    state = sx.ops.DecodeState.new(
        1, scope_ids=[ids], delays=[0], pad_ids=[0], eos_id=(1 << 20) - 1, num_rows=4, repetition_window=4
    )
    with pytest.raises(OpError) as error:
        sx.ops.multistream_sample(torch.zeros(1, 1 << 20), state)
    text = str(error.value)
    assert "a stream of 1048576 columns needs" in text and "this GPU has 101376 for a block" in text
    assert "give the stream fewer columns" in text


ON_A_SECOND_GPU = """
import ctypes, threading
import torch
import speechlm_ext as sx

def has_context(device):
    flags, active = ctypes.c_uint(), ctypes.c_int()
    state = ctypes.CDLL("libcuda.so.1").cuDevicePrimaryCtxGetState
    assert state(device, ctypes.byref(flags), ctypes.byref(active)) == 0
    return bool(active.value)

with torch.cuda.device(1):
    table, ids = torch.eye(5, device="cuda:1"), torch.tensor([[1, 2], [3, 0]], device="cuda:1")
before = has_context(0)
found = {}

def in_thread(name, start):
    def call():
        start()
        out = sx.ops.multistream_embed(ids, table)
        torch.cuda.synchronize(1)
        found[name] = torch.cuda.current_device(), out.sum().item()
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()

in_thread("current", lambda: torch.cuda.set_device(1))
in_thread("new", lambda: None)
print(before, has_context(0), found["current"], found["new"])
"""


@pytest.mark.cuda
def test_a_second_gpu_from_new_threads():
    """The current device stays what it was, and the first GPU gets no context."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    done = subprocess.run([sys.executable, "-c", ON_A_SECOND_GPU], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(maxsplit=2) == ["False", "False", "(1, 3.0) (0, 3.0)\n"]
