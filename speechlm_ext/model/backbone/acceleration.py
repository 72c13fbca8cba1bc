"""Faster norms, rotary positions and gates for a backbone that is trained, and the choice among them.

* ``packed``: this package's ``ops/packed_layer`` (CPU, float32).
* ``liger``: Liger's Triton kernels, where ``liger_kernel`` is installed and the model is on a GPU. Its loss and its
  embedding are not used: ours serve several streams.
* ``compile``: ``torch.compile`` of every layer, in one graph before its attention and one behind it.
* ``eager``: transformers' layers as they are.

``packed`` and ``liger`` replace the ``forward`` of single modules of one body, never a class, and stay where they give
what the module itself gives: hidden states and gradients of a few rows are compared, part by part, before a run starts.

Axes: N packed positions, D hidden, H heads, E head size, I width inside the feed-forward part.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from speechlm_ext.errors import ConfigError
from speechlm_ext.model.attention.kernels import Packing, attention_context, choose_attention
from speechlm_ext.ops.common.native import native
from speechlm_ext.ops.packed_layer import packed_rms_norm, packed_rotary, packed_swiglu

logger = logging.getLogger("speechlm_ext")

Acceleration = Literal["auto", "packed", "liger", "compile", "eager"]
ACCELERATIONS: tuple[str, ...] = get_args(Acceleration)
#: Largest difference from the body's own result, as a share of the largest value.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.1, torch.float16: 0.02}
#: Sequences of the rows that are compared.
_PROOF_LENGTHS = (5, 3)
_ROTARY = "apply_rotary_pos_emb"


@dataclass(frozen=True)
class Kernels:
    """One library's kernels, for tensors ``[..., D]``; each raises for tensors that it cannot take."""

    name: str
    norm: Callable[[Tensor, Tensor, float], Tensor]
    """Of ``x [..., D]``, ``weight [D]`` and eps."""
    rotary: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """Of queries and keys ``[1, H, N, E]`` and tables ``[1, N, E]``."""
    swiglu: Callable[[Tensor, Tensor], Tensor]
    """Of gate and up ``[..., I]``."""
    takes: Callable[[Tensor], bool]
    """Whether they take a tensor; the module computes it otherwise."""


# ---- the choice -----------------------------------------------------------------------------------------------------
def choose_acceleration(
    device: torch.device | str, dtype: torch.dtype, asked: str = "auto"
) -> tuple[str, str]:
    """What a training run's backbone is accelerated with on ``device``, and the reason.

    Args:
        dtype: of the activations.
        asked: one of :data:`ACCELERATIONS`.

    Raises:
        ConfigError: ``asked`` cannot be had here.
    """
    device_type = torch.device(device).type
    if asked not in ACCELERATIONS:
        raise ConfigError(f"acceleration must be one of {', '.join(ACCELERATIONS)}; got {asked!r}.")
    obstacles = {
        "packed": _no_packed(device_type, dtype),
        "liger": _no_liger(device_type),
        "compile": _no_compile(device_type),
        "eager": None,
    }
    if asked != "auto":
        if (obstacle := obstacles[asked]) is not None:
            raise ConfigError(f"acceleration {asked!r} is not possible: {obstacle}. Leave it at 'auto'.")
        return asked, "as asked"
    if device_type == "cuda":
        if obstacles["liger"] is None:
            return "liger", "liger_kernel is installed"
        if obstacles["compile"] is None:
            return "compile", f"{obstacles['liger']}; torch can compile the layers"
        return "eager", f"{obstacles['liger']}; {obstacles['compile']}"
    # On the CPU a compiled layer gains less than the package's own kernels, and compiles for most of a minute.
    if obstacles["packed"] is None:
        return "packed", "float32 on the CPU"
    return "eager", f"{obstacles['packed']}"


def _no_packed(device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cpu" or dtype != torch.float32:
        return f"the package's own kernels take float32 on the CPU, not {str(dtype)[6:]} on {device_type}"
    if native.simd_available() == ["generic"]:
        return "this processor has no AVX2"
    return None


def _no_liger(device_type: str) -> str | None:
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger_kernel is not installed (pip install 'speechlm_ext[liger]')"
    if importlib.util.find_spec("triton") is None:
        return "liger_kernel needs triton, which is not installed"
    return (
        None if device_type == "cuda" else f"Liger's kernels run on a GPU, and the model is on {device_type}"
    )


def _no_compile(device_type: str) -> str | None:
    if device_type == "cuda":
        return (
            None
            if importlib.util.find_spec("triton")
            else "torch.compile needs triton, which is not installed"
        )
    return (
        None
        if shutil.which("g++") or shutil.which("clang++")
        else "torch.compile needs g++ or clang++ on PATH"
    )


# ---- applying it ----------------------------------------------------------------------------------------------------
def accelerate(body: nn.Module, choice: str) -> str:
    """Accelerate a body in place; returns what it runs with, for the log.

    Args:
        body: on its device, with its weights; not yet wrapped or partitioned by an engine.
        choice: from :func:`choose_acceleration`.

    Returns:
        ``"eager"``, ``"compiled layers"``, or e.g. ``"packed norm, rotary, gate"``. Parts that differ from the body's
        own are left out and logged.
    """
    if choice == "compile":
        for layer in _layers(body):
            layer.forward = torch.compile(layer.forward, dynamic=True)  # type: ignore[method-assign]
        return "compiled layers"
    if choice == "eager":
        return "eager"
    parts = apply_kernels(body, packed_kernels() if choice == "packed" else liger_kernels())
    return f"{choice} {', '.join(parts)}" if parts else "eager"


def apply_kernels(body: nn.Module, kernels: Kernels) -> list[str]:
    """Replace what ``kernels`` can compute; returns the parts that give what the body gave."""
    kept, expected = [], _results(body)
    for part, replace in {"norm": _replace_norm, "rotary": _replace_rotary, "gate": _replace_gate}.items():
        replaced = [module for module in body.modules() if replace(module, kernels)]
        if not replaced:
            continue
        problem = _difference(body, expected)
        if problem is None:
            kept.append(part)
            continue
        for module in replaced:
            del module.forward
        logger.info("acceleration: %s's %s is left out: %s", kernels.name, part, problem)
    return kept


def _replace_norm(module: nn.Module, kernels: Kernels) -> bool:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not type(module).__name__.endswith("RMSNorm") or weight is None or weight.dim() != 1 or eps is None:
        return False
    own = module.forward

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if not kernels.takes(hidden_states):
            return own(hidden_states)
        return kernels.norm(hidden_states, self.weight, self.variance_epsilon)

    module.forward = MethodType(forward, module)  # type: ignore[method-assign]
    return True


def _replace_gate(module: nn.Module, kernels: Kernels) -> bool:
    linears = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    is_gate = all(isinstance(linear, nn.Linear) for linear in linears)
    if not is_gate or type(getattr(module, "act_fn", None)).__name__ not in ("SiLU", "SiLUActivation"):
        return False
    own = module.forward

    def forward(self: Any, x: Tensor) -> Tensor:
        if not kernels.takes(x):
            return own(x)
        return self.down_proj(kernels.swiglu(self.gate_proj(x), self.up_proj(x)))

    module.forward = MethodType(forward, module)  # type: ignore[method-assign]
    return True


def _replace_rotary(module: nn.Module, kernels: Kernels) -> bool:
    """The module's own forward, with another function under the name of transformers' rotary embedding."""
    own = type(module).forward
    if not isinstance(own, FunctionType) or _ROTARY not in own.__code__.co_names:
        return False
    plain = own.__globals__[_ROTARY]

    def rotary(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        fits = q.dim() == 4 and q.shape[0] == 1 and cos.shape[-1] == q.shape[-1]
        if more or options or not fits or not kernels.takes(q):
            return plain(q, k, cos, sin, *more, **options)
        return kernels.rotary(q, k, cos, sin)

    changed = FunctionType(
        own.__code__, {**own.__globals__, _ROTARY: rotary}, own.__name__, own.__defaults__, own.__closure__
    )
    changed.__kwdefaults__ = own.__kwdefaults__
    module.forward = MethodType(changed, module)  # type: ignore[method-assign]
    return True


def _layers(body: nn.Module) -> Iterator[nn.Module]:
    """The decoder layers: the elements of the body's longest list of modules."""
    lists = [module for module in body.children() if isinstance(module, nn.ModuleList)]
    yield from max(lists, key=len, default=())


# ---- the proof ------------------------------------------------------------------------------------------------------
def _results(body: nn.Module) -> list[Tensor]:
    """Hidden states of a few random rows, and the gradients of the rows and of every parameter."""
    parameter = next(body.parameters())
    device, dtype = parameter.device, parameter.dtype
    generator = torch.Generator().manual_seed(0)
    D, N = body.config.hidden_size, sum(_PROOF_LENGTHS)
    rows = torch.randn(1, N, D, generator=generator).to(device, dtype).requires_grad_()
    grad = torch.randn(1, N, D, generator=generator).to(device, dtype)
    position = torch.cat([torch.arange(n) for n in _PROOF_LENGTHS])[None].to(device)
    bounds = [0, _PROOF_LENGTHS[0], N]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    packing = Packing.build(cu_seqlens, choose_attention(device, dtype)[0], bounds)
    parameters = [p for p in body.parameters() if p.requires_grad]
    with torch.enable_grad(), attention_context(packing=packing):
        out = body(
            inputs_embeds=rows, position_ids=position, use_cache=False, packing=packing
        ).last_hidden_state
        grads = torch.autograd.grad(out, [rows, *parameters], grad, materialize_grads=True)
    return [out.detach(), *grads]


def _difference(body: nn.Module, expected: list[Tensor]) -> str | None:
    """How the body's results differ from ``expected``; None where they do not."""
    try:
        found = _results(body)
    except (
        RuntimeError,
        ValueError,
        TypeError,
        ImportError,
    ) as error:  # a kernel that cannot take the body's tensors
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    limit = TOLERANCE[expected[0].dtype]
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        gap, largest = float((ours - theirs).abs().max()), float(theirs.abs().max())
        if not gap <= limit * largest:
            what = "hidden states" if number == 0 else "gradients"
            return (
                f"its {what} differ from the backbone's own by {gap / max(largest, 1e-30):.1e} of the largest"
            )
    return None


# ---- the kernels ----------------------------------------------------------------------------------------------------
def packed_kernels() -> Kernels:
    """This package's, for float32 on the CPU."""

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return packed_rms_norm(x.reshape(-1, x.shape[-1]), weight, eps).view(x.shape)

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (packed_rotary(x[0].transpose(0, 1), cos[0], sin[0]).transpose(0, 1)[None] for x in (q, k))
        return q, k

    def swiglu(gate: Tensor, up: Tensor) -> Tensor:
        width = gate.shape[-1]
        return packed_swiglu(gate.reshape(-1, width), up.reshape(-1, width)).view(gate.shape)

    return Kernels(
        "packed", norm, rotary, swiglu, lambda x: x.device.type == "cpu" and x.dtype == torch.float32
    )


def liger_kernels() -> Kernels:
    """Liger's, for a GPU."""
    from liger_kernel.transformers.functional import liger_rms_norm, liger_rope, liger_swiglu

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # Not in place: a norm's gradient may belong to a tensor that others still read.
        return liger_rms_norm(x, weight, eps, 0.0, "llama", False)

    return Kernels("liger", norm, liger_rope, liger_swiglu, lambda x: x.numel() > 0)
