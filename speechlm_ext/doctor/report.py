"""The report of ``speechlm doctor``: versions, compiled kernels, driver, choices, problems, and missing packages.

Each section is computed alone, so that one broken package does not hide the rest of the report.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from speechlm_ext.doctor.driver import version_text
from speechlm_ext.doctor.fallbacks import find_fallbacks, find_problems, this_driver
from speechlm_ext.doctor.fit import code_for, parse_codes
from speechlm_ext.utils.machine import package_versions

#: Extra -> {module to import: its use}.
EXTRAS: dict[str, dict[str, str]] = {
    "train": {"deepspeed": "training", "tensorboard": "training curves in TensorBoard"},
    "flash": {"flash_attn": "the fastest attention for packed rows on a GPU"},
    "liger": {"liger_kernel": "norms, rotary positions and gates of the backbone in training on a GPU"},
    "eval": {
        "jiwer": "WER and CER",
        "langcodes": "language tags in evaluation",
        "num2words": "numbers as words in WER and CER",
        "sklearn": "importing K-Means models of scikit-learn",
        "faster_whisper": "transcribing generated speech with an independent ASR model",
        "matplotlib": "plots",
    },
    "demo": {"av": "decoding the demo's G.722 recordings", "jinja2": "the demo's report"},
}

_VERSIONS = (
    "speechlm_ext", "torch", "numpy", "transformers", "pyarrow", "safetensors", "sentencepiece", "deepspeed",
    "flash-attn",
)  # fmt: skip


@dataclass(frozen=True)
class DoctorConfig:
    """Report on this installation: versions, compiled kernels, driver and GPUs, what does not run or falls back,
    missing extras. The exit code is 1 if the compiled module cannot be used, or not on a GPU of this machine."""

    json: bool = False
    """Print one JSON object instead of text."""


def _versions() -> dict[str, str | None]:
    return {"python": platform.python_version(), **package_versions(_VERSIONS)}


def _native() -> dict[str, Any]:
    from speechlm_ext.ops.common.native import OPENMP_RUNTIME, native

    info = native.build_info()
    return {
        "version": info["version"],
        "variant": info["variant"],
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
        "features": native.simd_available(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _driver() -> dict[str, Any]:
    driver = this_driver()
    return {
        "number": driver.number,
        "cuda": driver.cuda and version_text(driver.cuda),
        "gpus": [f"{gpu.name} (sm_{gpu.capability[0]}{gpu.capability[1]})" for gpu in driver.gpus],
    }


def _cuda() -> dict[str, Any]:
    import torch

    from speechlm_ext.ops.common.native import native

    archs = native.build_info()["cuda_archs"]
    codes = parse_codes(archs.split(";")) if archs else []
    devices = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        code = code_for((device.major, device.minor), codes)
        devices.append(
            {
                "name": device.name,
                "capability": f"sm_{device.major}{device.minor}",
                "memory_gib": round(device.total_memory / 2**30, 1),
                "kernels": None if code is None else code.name,
            }
        )
    available = torch.cuda.is_available()
    return {
        "torch_cuda": torch.version.cuda,
        "torch_archs": torch.cuda.get_arch_list(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if available else None,
        "available": available,
        "devices": devices,
    }


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


def _missing_extras() -> dict[str, dict[str, Any]]:
    missing = {}
    for extra, modules in EXTRAS.items():
        absent = {m: use for m, use in modules.items() if importlib.util.find_spec(m) is None}
        if absent:
            missing[extra] = {"missing": absent, "install": f"pip install 'speechlm_ext[{extra}]'"}
    return missing


#: Key in the JSON report -> title and content of a section.
SECTIONS: dict[str, tuple[str, Callable[[], Any]]] = {
    "versions": ("Versions", _versions),
    "native": ("Compiled module", _native),
    "cpu": ("CPU", _cpu),
    "driver": ("NVIDIA driver", _driver),
    "cuda": ("CUDA devices", _cuda),
    "attention": ("Attention", _attention),
    "problems": ("Problems", find_problems),
    "fallbacks": ("Fallbacks in use", find_fallbacks),
    "missing_extras": ("Missing extras", _missing_extras),
}


def collect() -> dict[str, Any]:
    """Everything that ``speechlm doctor`` reports, as plain data; ``{"error": …}`` for a section that fails."""
    report = {}
    for key, (_, find) in SECTIONS.items():
        try:
            report[key] = find()
        except Exception as error:  # noqa: BLE001 - any failure of a third-party import is a finding
            report[key] = {"error": f"{type(error).__name__}: {error}"}
    return report


def run_doctor(cfg: DoctorConfig) -> int:
    """Print the report. Returns 0, or 1 when the compiled module cannot be used, or not on a GPU of this machine."""
    report = collect()
    print(json.dumps(report, indent=2) if cfg.json else format_report(report))
    sys.stdout.flush()
    return 1 if "error" in report["native"] or report["problems"] else 0


def format_report(report: dict[str, Any]) -> str:
    """The report as text for people, a block per section."""
    return "\n\n".join("\n".join([SECTIONS[key][0], *_lines(value)]) for key, value in report.items())


def _lines(value: Any, indent: str = "  ") -> list[str]:
    """Plain data as indented lines: a mapping as names and values, a list as its items."""
    if not value:
        return [f"{indent}none"]
    pairs = list(value.items()) if isinstance(value, dict) else [("-", item) for item in value]
    width = max(len(name) for name, _ in pairs)
    lines = []
    for name, item in pairs:
        if isinstance(item, dict) or (isinstance(item, list) and item and isinstance(item[0], dict)):
            lines += [f"{indent}{name}", *_lines(item, indent + "  ")]
        else:
            text = ", ".join(map(str, item)) if isinstance(item, list) else str(item)
            lines.append(f"{indent}{name:<{width}}  {'none' if item is None or text == '' else text}")
    return lines
