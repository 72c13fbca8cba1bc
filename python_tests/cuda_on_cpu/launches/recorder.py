"""Counts launches and host syncs, on a GPU or on simulated CUDA tensors.

The unit is one request to the GPU as Python makes it: an aten op that computes or copies (a few of them, such as sort,
are several kernels), a kernel of this package, a CUB call, a memset. Views and allocations are none. A sync is what
``torch.cuda.set_sync_debug_mode`` reports: the host waits until all earlier work is done.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Ops that allocate, or only change how a tensor is described.
_NO_WORK = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_", "_unsafe_view",
    "_sparse_coo_tensor_unsafe", "_sparse_coo_tensor_with_dims_and_tensors", "_coalesced_", "_pin_memory",
    "is_pinned", "is_coalesced", "sparse_dim", "dense_dim", "_nnz", "is_same_size", "_version", "record_stream",
}  # fmt: skip
#: Ops whose result has a size, or a value on the host, that the GPU computes.
_SYNCS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive",
    "bincount", "_coalesce", "segment_reduce",
}  # fmt: skip
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
_CUDA_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


@dataclass
class Counts:
    """Launches and syncs by name."""

    aten: Counter[str] = field(default_factory=Counter)
    """Launches of torch: op -> number."""
    own: Counter[str] = field(default_factory=Counter)
    """Launches of this package's C++: "file: kernel" -> number."""
    syncs: Counter[str] = field(default_factory=Counter)
    """Syncs: op -> number."""

    @property
    def launches(self) -> int:
        """Number of launches."""
        return self.aten.total() + self.own.total()


class Recorder(TorchDispatchMode):
    """Records into ``counts`` while it is entered; the ops run where their tensors are."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "speechlm_ext" and _has_cuda(args, kwargs):
            with self:  # its Python entry, whose ops are counted in turn
                return func.redispatch(_CUDA_KEYS, *args, **kwargs)
        # Below autograd some ops arrive before torch has taken them apart.
        if _has_kernel(func, "CompositeImplicitAutograd") and not (
            _has_kernel(func, "CPU") or _has_kernel(func, "CUDA")
        ):
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = self.execute(func, args, kwargs)
        self._record(func, args, kwargs, out)
        return out

    def execute(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The op's result."""
        return func(*args, **kwargs)

    def _record(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        name = func.overloadpacket.__name__
        if not (_has_cuda(args, kwargs) or _has_cuda(out)) or name in _NO_WORK:
            return
        if name in ("_to_copy", "copy_") and (way := _transfer(name, args, out)):
            self._add(way, is_sync=not _argument("non_blocking", 2, args, kwargs))
            return
        if name == "lift_fresh":
            # torch.tensor(values, device="cuda"): its copy is made where no mode sees it.
            self._add("copy host to device", is_sync=True)
            return
        if any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            return
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        is_sync = name in _SYNCS or (name == "repeat_interleave" and kwargs.get("output_size") is None)
        if results and not is_sync and all(t.numel() == 0 for t in results):
            return
        self._add(name, is_sync)
        if name in _INDEXED:
            self._record_hidden(name, args, kwargs)

    def _record_hidden(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What indexing does where no mode sees it: copies from the host, and the places of a mask."""
        indices = [index for index in args[1] if index is not None]
        masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
        value = args[2] if name != "index" else None
        is_number = value is not None and value.dim() == 0 and not value.is_cuda
        if is_number and len(masks) == len(indices) and not _argument("accumulate", 3, args, kwargs):
            return  # x[mask] = 0 is a masked_fill
        for tensor in [*indices, *([value] if is_number else [])]:
            if not tensor.is_cuda:
                self._add("copy host to device", is_sync=True)
        for _ in masks:
            self._add("nonzero of a mask", is_sync=True)

    def _add(self, name: str, is_sync: bool) -> None:
        self.counts.aten[name] += 1
        if is_sync:
            self.counts.syncs[name] += 1


def _has_kernel(func: OpOverload, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


def _argument(name: str, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return kwargs.get(name, args[position] if len(args) > position else None)


def _has_cuda(*trees: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.is_cuda for tree in trees for leaf in tree_leaves(tree))


def _transfer(name: str, args: tuple[Any, ...], out: Any) -> str:
    """The copy between host and device that an op is, or ""."""
    to, source = (out, args[0]) if name == "_to_copy" else (args[0], args[1])
    if to.is_cuda == source.is_cuda:
        return ""
    return "copy host to device" if to.is_cuda else "copy device to host"
