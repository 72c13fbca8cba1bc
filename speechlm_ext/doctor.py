"""``speechlm doctor``: what is installed, what is compiled, what will run and why, and what to install for more.

Each finding is computed alone, so that one broken package does not hide the rest of the report.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import sys
from dataclasses import dataclass
from typing import Any

#: Extra -> {module to import: what it is for}.
EXTRAS: dict[str, dict[str, str]] = {
    "train": {
        "deepspeed": "training",
        "tensorboard": "training curves in TensorBoard",
        "peft": "LoRA",
        "liger_kernel": "fused RMSNorm, RoPE and SwiGLU on a GPU",
    },
    "flash": {"flash_attn": "the fastest attention for packed rows on a GPU"},
    "eval": {
        "jiwer": "WER and CER",
        "langcodes": "language tags in evaluation",
        "num2words": "numbers as words in WER and CER",
        "whisper_normalizer": "Whisper's text normaliser",
        "sklearn": "K-Means baselines and plots",
        "faster_whisper": "judging generated speech with an independent recogniser",
        "matplotlib": "plots in reports",
    },
    "serve": {"fastapi": "the server", "uvicorn": "the server"},
    "ray": {"ray": "tokenizing on more than one machine"},
    "demo": {"av": "decoding the demo's G.722 recordings"},
}

_VERSIONS = ("torch", "numpy", "transformers", "pyarrow", "safetensors", "sentencepiece", "deepspeed")


@dataclass(frozen=True)
class DoctorConfig:
    """Report on this installation: versions, compiled kernels, devices, choices, missing extras."""

    json: bool = False
    """Print one JSON object instead of text."""


def _guard(function: Any) -> Any:
    """The function's result, or ``{"error": …}``: a report must not die of what it reports on."""
    try:
        return function()
    except Exception as error:  # noqa: BLE001 - any failure of a third-party import is a finding
        return {"error": f"{type(error).__name__}: {error}"}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "speechlm_ext": _version("speechlm_ext"),
        "python": platform.python_version(),
    }
    found.update({name: _version(name) for name in _VERSIONS})
    return found


def _native() -> dict[str, Any]:
    from speechlm_ext.ops.common.native import OPENMP_RUNTIME, native

    info = native.build_info()
    return {
        "commit": info["commit"] or None,
        "compiler": info["compiler"],
        "cuda": info["cuda_version"] or None,
        "cuda_archs": info["cuda_archs"].split(";") if info["cuda_archs"] else [],
        "openmp_runtime": OPENMP_RUNTIME or None,
        "file": native.__file__,
    }


def _cpu() -> dict[str, Any]:
    import torch

    from speechlm_ext.ops.common.native import native

    return {
        "machine": platform.machine(),
        "features": native.cpu_features(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _cuda() -> dict[str, Any]:
    import torch

    devices = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        devices.append(
            {
                "name": properties.name,
                "capability": f"sm_{properties.major}{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return {"torch_cuda": torch.version.cuda, "available": torch.cuda.is_available(), "devices": devices}


def _attention() -> dict[str, dict[str, str]]:
    import torch

    from speechlm_ext.model.attention.kernels import choose_attention

    cases = [("cpu", torch.float32)]
    if torch.cuda.is_available():
        cases = [("cuda", torch.bfloat16), ("cuda", torch.float32), *cases]
    chosen = {}
    for device, dtype in cases:
        name, reason = choose_attention(torch.device(device), dtype)
        chosen[f"{device} {str(dtype).removeprefix('torch.')}"] = {"kernel": name, "why": reason}
    return chosen


def _fallbacks() -> list[str]:
    """Choices that cost speed, each with its reason and the way out."""
    import torch

    from speechlm_ext.ops.common.native import OPENMP_RUNTIME, native

    found: list[str] = []
    has_device = torch.cuda.is_available()
    has_kernels = bool(native.build_info()["cuda_version"])
    if has_device and not has_kernels:
        found.append(
            "a CUDA device is here but this build has no CUDA kernels: put nvcc (12.4 or later) on PATH and run "
            "`SPEECHLM_CUDA=ON pip install --force-reinstall --no-deps .`"
        )
    if not has_device:
        why = "torch is a CPU build" if torch.version.cuda is None else "torch sees no CUDA device"
        found.append(f"everything runs on the CPU: {why}")
    if not OPENMP_RUNTIME:
        found.append("native CPU kernels run on one thread: no OpenMP runtime was found in torch")
    return found


def _missing_extras() -> dict[str, dict[str, Any]]:
    missing = {}
    for extra, modules in EXTRAS.items():
        absent = {m: use for m, use in modules.items() if importlib.util.find_spec(m) is None}
        if absent:
            missing[extra] = {"missing": absent, "install": f"pip install 'speechlm_ext[{extra}]'"}
    return missing


def collect() -> dict[str, Any]:
    """Everything that ``speechlm doctor`` reports, as plain data."""
    return {
        "versions": _guard(_versions),
        "native": _guard(_native),
        "cpu": _guard(_cpu),
        "cuda": _guard(_cuda),
        "attention": _guard(_attention),
        "fallbacks": _guard(_fallbacks),
        "missing_extras": _guard(_missing_extras),
    }


def run_doctor(cfg: DoctorConfig) -> int:
    """Print the report. Returns 0, or 1 when the compiled module cannot be used."""
    report = collect()
    print(json.dumps(report, indent=2) if cfg.json else format_report(report))
    sys.stdout.flush()
    return 1 if "error" in report["native"] else 0


def format_report(report: dict[str, Any]) -> str:
    """The report as text for people."""
    lines: list[str] = []

    def section(title: str, value: Any, write: Any) -> None:
        lines.append(title)
        if isinstance(value, dict) and "error" in value:
            lines.append(f"  could not be found out: {value['error']}")
        else:
            write(value)
        lines.append("")

    def write_versions(value: dict[str, str | None]) -> None:
        lines.extend(f"  {name:<14} {version or 'not installed'}" for name, version in value.items())

    def write_native(value: dict[str, Any]) -> None:
        lines.append(f"  module         {value['file']}")
        lines.append(f"  commit         {value['commit'] or 'unknown'}, compiled by {value['compiler']}")
        archs = (
            f"CUDA {value['cuda']} for {', '.join(value['cuda_archs'])}" if value["cuda"] else "none compiled"
        )
        lines.append(f"  CUDA kernels   {archs}")
        lines.append(f"  OpenMP         {value['openmp_runtime'] or 'none: one thread'}")

    def write_cpu(value: dict[str, Any]) -> None:
        lines.append(f"  {value['machine']}: {', '.join(value['features']) or 'no special instruction sets'}")
        lines.append(f"  torch uses {value['torch_capability']} and {value['threads']} threads")

    def write_cuda(value: dict[str, Any]) -> None:
        if not value["devices"]:
            built = (
                f"torch is built for CUDA {value['torch_cuda']}"
                if value["torch_cuda"]
                else "torch is a CPU build"
            )
            lines.append(f"  none ({built})")
        for i, device in enumerate(value["devices"]):
            lines.append(f"  {i}: {device['name']}, {device['capability']}, {device['memory_gib']} GiB")

    def write_attention(value: dict[str, dict[str, str]]) -> None:
        lines.extend(f"  {case:<14} {choice['kernel']}: {choice['why']}" for case, choice in value.items())

    def write_missing(value: dict[str, dict[str, Any]]) -> None:
        if not value:
            lines.append("  none")
        for entry in value.values():
            for module, use in entry["missing"].items():
                lines.append(f"  {module:<18} for {use}")
            lines.append(f"    -> {entry['install']}")

    section("Versions", report["versions"], write_versions)
    section("Compiled module", report["native"], write_native)
    section("CPU", report["cpu"], write_cpu)
    section("CUDA devices", report["cuda"], write_cuda)
    section("Attention", report["attention"], write_attention)
    section("Fallbacks in use", report["fallbacks"], lambda v: lines.extend(f"  - {item}" for item in v))
    section("Missing extras", report["missing_extras"], write_missing)
    return "\n".join(lines).rstrip()
