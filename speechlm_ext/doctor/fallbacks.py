"""What does not run on this machine, and what runs slower than it could: a line for each, with its cost and remedy."""

from __future__ import annotations

import functools
from typing import Any

from speechlm_ext.doctor.driver import Driver, Gpu, find_driver
from speechlm_ext.doctor.fit import BUILD, build_for, code_for, driver_problem, gpu_problem, parse_codes


@functools.cache
def this_driver() -> Driver:
    """The driver of this machine."""
    return find_driver()


def _build_info() -> dict[str, Any]:
    from speechlm_ext.ops.common.native import native

    return dict(native.build_info())


def visible_gpus() -> list[Gpu]:
    """The GPUs that torch sees, else those that the driver lists."""
    import torch

    if not torch.cuda.is_available():
        return list(this_driver().gpus)
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [Gpu(device.name, (device.major, device.minor)) for device in found]


def find_problems() -> list[str]:
    """Why the GPUs of this machine cannot be used, with the remedy; empty without a GPU."""
    import torch

    from speechlm_ext.ops.common import matmul

    info, driver, gpus = _build_info(), this_driver(), visible_gpus()
    found: list[str | None] = []
    if cuda := info["cuda_version"]:
        remedy = (
            f"build with an nvcc of its CUDA version in the source folder: `CUDACXX=/path/to/nvcc {BUILD}`"
        )
        problem = driver_problem("this build", cuda, driver, remedy)
        codes = parse_codes(info["cuda_archs"].split(";"))
        found += [problem] if problem else [
            gpu_problem("this build", gpu.name, gpu.capability, codes, cuda, driver, build_for(gpu.capability))
            for gpu in gpus
        ]  # fmt: skip
    elif gpus:
        found.append(
            f"this machine has a GPU ({gpus[0].name}) but the build has no CUDA kernels: put nvcc (12.4 or later) on "
            f"PATH and run in the source folder `{BUILD}`"
        )
    if torch.version.cuda is None and gpus:
        found.append(
            f"this machine has a GPU ({gpus[0].name}) but torch is a CPU build: pip install torch gets one with CUDA"
        )
    if torch.version.cuda is not None:
        remedy = "install a torch for another CUDA version (https://pytorch.org/get-started/locally)"
        problem = driver_problem("torch", torch.version.cuda, driver, remedy)
        codes = parse_codes(torch.cuda.get_arch_list())  # empty where torch sees no GPU
        found += [problem] if problem else [
            gpu_problem("torch", gpu.name, gpu.capability, codes, torch.version.cuda, driver, remedy)
            for gpu in gpus
            if codes
        ]  # fmt: skip
        if torch.cuda.is_available() and not matmul.GIVES_FLOAT32:
            found.append(
                f"the loss in bfloat16 on a GPU needs torch {matmul.FIRST_TORCH}; here is {torch.__version__}"
            )
    return list(dict.fromkeys(problem for problem in found if problem))


def find_fallbacks() -> list[str]:
    """Choices that cost speed, each with its reason and what it costs."""
    import torch

    from speechlm_ext.ops.common.native import OPENMP_RUNTIME, native

    found: list[str] = []
    if torch.cuda.is_available():
        found += _gpu_fallbacks()
    else:
        found.append(f"everything runs on the CPU: {_why_no_gpu()}")
    if not OPENMP_RUNTIME:
        found.append("native CPU kernels run on one thread: torch brings no OpenMP runtime")
    sets = native.simd_available()
    if sets == ["generic"]:
        found.append("native CPU kernels run without vector instructions: this processor has no AVX2")
    if "amx" not in sets:
        found.append(
            "kmeans_assign on the CPU multiplies 16-bit integers: this processor has no tile unit (AMX), with which it "
            "takes a third of the time (docs/ops/kmeans_assign.md)"
        )
    return found


def _gpu_fallbacks() -> list[str]:
    import torch

    from speechlm_ext.model.attention.kernels import choose_attention
    from speechlm_ext.model.backbone.acceleration import choose_acceleration
    from speechlm_ext.ops.common import matmul

    found, info = [], _build_info()
    codes = parse_codes(info["cuda_archs"].split(";")) if info["cuda_archs"] else []
    for gpu in visible_gpus():
        code = code_for(gpu.capability, codes)
        if code is not None and code.is_ptx:
            found.append(
                f"the driver compiles the kernels for {gpu.name} from PTX of {code.name}, each at its first use; "
                f"it keeps the results in ~/.nv/ComputeCache. To have them ready: {build_for(gpu.capability)}"
            )
    kernel, why = choose_attention(torch.device("cuda"), torch.bfloat16)
    if kernel == "sdpa":
        found.append(f"attention in bfloat16 pads sequences to groups of similar length (SDPA): {why}")
    choice, why = choose_acceleration("cuda", torch.bfloat16)
    if choice == "compile":
        found.append(f"training compiles the backbone's layers first, for a minute or so: {why}")
    elif choice == "eager":
        found.append(
            "training runs transformers' own norms, rotary positions and gates, in many passes over memory: "
            + why
        )
    if not matmul.GIVES_FLOAT32:
        found.append(
            f"kmeans_assign multiplies in float32 on the GPU: torch {torch.__version__} has no 16-bit product with "
            f"float32 sums; {matmul.FIRST_TORCH} has"
        )
    elif not matmul.ADDS_IN_FLOAT32:
        found.append(
            "the loss adds its weight gradient through a float32 copy for each chunk of rows but the first: torch "
            f"{torch.__version__} cannot add 16-bit products to float32 in place; 2.12 can"
        )
    return list(dict.fromkeys(found))


def _why_no_gpu() -> str:
    import torch

    driver = this_driver()
    if torch.version.cuda is None:
        has = (
            f", and this machine has a driver, {driver}; pip install torch gets one with CUDA"
            if driver.cuda
            else ""
        )
        return f"torch is a CPU build{has}"
    return (
        f"torch sees no CUDA device; the driver is {driver}" if driver.cuda else "no NVIDIA driver was found"
    )
