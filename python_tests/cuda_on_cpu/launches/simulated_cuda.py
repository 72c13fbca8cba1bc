"""Tensors that are on ``cuda:0`` for Python code, with values on the CPU: the code path of a GPU without one.

torch's FakeTensorMode has no values, and code that reads a count on the host needs them. Kernels of this package run
by ``python_tests.cuda_on_cpu``. The code of torch in C++ takes the CPU's path, which is the same ops but for attention
(one op on either). A simulation changes the process (torch takes CUDA to be initialized), so it has one of its own.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves, tree_map

from python_tests import cuda_on_cpu
from python_tests.cuda_on_cpu.launches import cuda_only
from python_tests.cuda_on_cpu.launches.recorder import Recorder

DEVICE = torch.device("cuda", 0)
_CPU = torch.device("cpu")


class CudaTensor(Tensor):
    """A tensor on the simulated device; ``values`` is the CPU's tensor."""

    values: Tensor
    leaves_device = False
    """Whether the op that runs copies to the host. Others name the CPU too, the device that the tensor has in C++."""
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, values: Tensor) -> CudaTensor:
        out = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            values.stride(),
            values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
        )
        out.values = values
        return out

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def to(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        # In C++ the tensor is on the CPU already.
        copy = kwargs.pop("copy", False)
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        dtype = self.dtype if dtype is None else dtype
        if device is not None and device.type == "cpu":
            options = {"dtype": dtype, "device": _CPU, "non_blocking": non_blocking}
            with mock.patch.object(CudaTensor, "leaves_device", True):
                return torch.ops.aten._to_copy.default(self, **options)
        return super().to(dtype, copy=copy, memory_format=memory_format or torch.preserve_format)

    def cpu(self, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
        return self.to("cpu")

    def tolist(self) -> Any:
        return self.to("cpu").tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def data_ptr(self) -> int:
        raise RuntimeError("the address of a simulated CUDA tensor is needed by native code only")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"CudaTensor({self.values})"

    @classmethod
    def __torch_dispatch__(cls, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} of a simulated CUDA tensor outside the simulation")


def _values(tree: Any) -> Any:
    """``tree`` with the values of simulated CUDA tensors in their places."""
    return tree_map(lambda x: _value(x) if isinstance(x, CudaTensor) else x, tree)


def _value(x: CudaTensor) -> Tensor:
    if (x.shape, x.dtype) != (x.values.shape, x.values.dtype):
        raise RuntimeError(
            f"a simulated CUDA tensor {list(x.shape)} {x.dtype} holds {list(x.values.shape)} {x.values.dtype}: "
            "x.data = … and x.resize_ cannot be simulated"
        )
    return x.values


class SimulatedRecorder(Recorder):
    """A recorder that also executes the ops of simulated CUDA tensors, on the CPU."""

    def execute(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func.overloadpacket.__name__
        if name == "is_pinned":
            return False
        if name == "_pin_memory":
            return args[0].clone()
        leaves = tree_leaves((args, kwargs))
        takes_cuda = any(isinstance(x, CudaTensor) for x in leaves)
        device = kwargs.get("device")
        is_cuda = (takes_cuda and not CudaTensor.leaves_device) or (
            device is not None and torch.device(device).type == "cuda"
        )
        if not takes_cuda and not is_cuda:
            return func(*args, **kwargs)
        if takes_cuda and name not in ("_to_copy", "copy_"):
            _check_devices(func, leaves)
        if name == "where":
            # A number becomes a tensor on the device that its partner has in C++.
            numbers = [x for x in args if isinstance(x, Tensor) and not isinstance(x, CudaTensor)]
            self.counts.aten.update(["scalar_tensor"] * len(numbers))
        options = dict(kwargs)
        if device is not None:
            options["device"] = _CPU
        if name == "_to_copy":
            out = _copied(_values(args[0]), options)
        else:
            out = cuda_only.OPS.get(func, func)(*_values(args), **_values(options))
        written = [r.alias_info is not None and r.alias_info.is_write for r in func._schema.returns]
        if written and all(written):
            return _written_arguments(func, args, kwargs)
        if not is_cuda:
            return out
        return tree_map(lambda x: CudaTensor(x) if isinstance(x, Tensor) else x, out)


def _copied(values: Tensor, options: dict[str, Any]) -> Tensor:
    options.pop("non_blocking", None)
    return torch.ops.aten._to_copy.default(values, **options)


def _check_devices(func: OpOverload, leaves: list[Any]) -> None:
    """Refuse what a GPU refuses: tensors of two devices, except numbers and indices on the host."""
    if "index" in func.overloadpacket.__name__:
        return
    for x in leaves:
        if isinstance(x, Tensor) and not isinstance(x, CudaTensor) and x.dim() > 0:
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device, but found cuda:0 and a {list(x.shape)} on cpu"
            )


def _written_arguments(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments that an in-place op returns."""
    found = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs[argument.name]
            found.append(value)
    return found[0] if len(found) == 1 else tuple(found)


class _Native:
    """The kernels of this package for simulated CUDA tensors; their launches go into the recorder's counts."""

    def __init__(self, shim: Any, kernels: Any, recorder: Recorder) -> None:
        self._shim, self._kernels, self._recorder = shim, kernels, recorder

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._kernels, name)
        if not callable(function):
            return function

        def call(*arguments: Any) -> Any:
            self._shim.take_events()
            with torch.utils._python_dispatch._disable_current_modes():
                out = function(*_values(arguments))
            for event, count in self._shim.take_events().items():
                if event.endswith("Synchronize"):
                    self._recorder.counts.syncs[event] += count
                else:
                    self._recorder.counts.own[event] += count
            return out

        return call


@contextlib.contextmanager
def simulated_cuda(is_capturing: bool = False) -> Iterator[SimulatedRecorder]:
    """Inside, ``cuda:0`` can be used; yields the recorder of everything that runs there.

    Args:
        is_capturing: what ``torch.cuda.is_current_stream_capturing()`` returns.
    """
    shim, recorder = cuda_on_cpu.load(), SimulatedRecorder()
    stream = SimpleNamespace(cuda_stream=0)
    with contextlib.ExitStack() as stack:
        stack.enter_context(cuda_on_cpu.kernels_on_cpu(shim))
        torch.use_deterministic_algorithms(False)  # it fills new memory, which a user's process does not
        for module in list(sys.modules.values()):
            kernels = getattr(module, "native", None)
            if getattr(module, "__name__", "").startswith("speechlm_ext.ops.") and isinstance(
                kernels, cuda_on_cpu._Native
            ):
                stack.enter_context(mock.patch.object(module, "native", _Native(shim, kernels, recorder)))
        replaced: dict[str, Callable[..., Any]] = {
            "_lazy_init": lambda: None,
            "current_stream": lambda device=None: stream,
            "current_device": lambda: DEVICE.index,
            "current_blas_handle": lambda: 0,
            "get_device_properties": lambda device=None: SimpleNamespace(
                multi_processor_count=132, total_memory=80 << 30
            ),
            "is_current_stream_capturing": lambda: is_capturing,
            "mem_get_info": lambda device=None: (1 << 30, 1 << 30),
            "memory_reserved": lambda device=None: 0,
            "memory_allocated": lambda device=None: 0,
        }
        for name, function in replaced.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        # Wrapped tensors cannot be viewed in inference mode; without gradients the ops are the same.
        no_grad = lambda mode: torch.no_grad() if mode else contextlib.nullcontext()  # noqa: E731
        stack.enter_context(mock.patch.object(torch._C, "_InferenceMode", no_grad))
        future = torch.__future__
        stack.callback(
            future.set_overwrite_module_params_on_conversion,
            future.get_overwrite_module_params_on_conversion(),
        )
        future.set_overwrite_module_params_on_conversion(
            True
        )  # new parameters, as x.data = … cannot be simulated
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor makes it on the CPU and copies it
        stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        stack.enter_context(recorder)
        yield recorder
