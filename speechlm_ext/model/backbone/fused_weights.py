"""Several projections as one product, without a second copy of their weights.

The weights of q, k and v become views of one tensor, one after the other. Nothing else changes: they are the modules'
own parameters under their own names, so ``state_dict``, files, gradients and optimizers work as before, and a weight
that is changed in place is changed for both. What gives a parameter other memory (``.to``, an engine that moves weights
into its own buffers) ends the fusion; :class:`FusedLinear` notices.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class FusedLinear:
    """The joint weight ``[N, K]`` and bias ``[N]`` of linears that take the same input."""

    linears: tuple[nn.Linear, ...]
    weight: Tensor
    bias: Tensor | None

    def is_current(self) -> bool:
        """Whether the linears' parameters still are the memory of the joint tensors."""
        return _is_view(self.weight, [x.weight for x in self.linears]) and (
            self.bias is None or _is_view(self.bias, [x.bias for x in self.linears])
        )


#: Joint tensors that were made here, by the address of their memory.
_joined: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


def fuse_linears(linears: Sequence[nn.Linear]) -> FusedLinear | None:
    """Join linears; None where their weights cannot share memory: they belong to something that expects them where they
    are (a flat buffer of an optimizer, partitions of ZeRO-3, another module)."""
    weight = _fuse([x.weight for x in linears])
    biases = [x.bias for x in linears]
    if weight is None or (any(b is None for b in biases) and not all(b is None for b in biases)):
        return None
    bias = None if biases[0] is None else _fuse(biases)
    if biases[0] is not None and bias is None:
        return None
    return FusedLinear(tuple(linears), weight, bias)


def _fuse(parameters: Sequence[Tensor]) -> Tensor | None:
    first = parameters[0]
    if not all(_is_plain(p) and p.dtype == first.dtype and p.device == first.device for p in parameters):
        return None
    if len(parameters) == 1:
        return first.detach()
    rows = sum(len(p) for p in parameters)
    if _is_adjacent(parameters):  # as after an earlier fusion, or in a flat buffer
        size = (rows, *first.shape[1:])
        return first.detach().as_strided(size, first.stride())
    if not all(_is_free(p) for p in parameters):
        return None
    # Parameters must not become tensors of inference mode, which could not be trained any more.
    with torch.inference_mode(False), torch.no_grad():
        joint = torch.cat([p.detach() for p in parameters])
        for p, part in zip(parameters, joint.split([len(p) for p in parameters]), strict=True):
            p.data = part
    _joined[joint.untyped_storage().data_ptr()] = joint
    return joint


def _is_free(p: Tensor) -> bool:
    """Whether nothing else can expect a parameter to be where it is."""
    storage = p.untyped_storage()
    return storage.nbytes() == p.numel() * p.element_size() or storage.data_ptr() in _joined


def _is_plain(p: Tensor) -> bool:
    # ZeRO-3 leaves an empty tensor with ``ds_id`` behind; tensors of meta or inference mode cannot be moved.
    return not hasattr(p, "ds_id") and p.is_contiguous() and not p.is_meta and not p.is_inference()


def _is_adjacent(parameters: Sequence[Tensor]) -> bool:
    storage = parameters[0].untyped_storage().data_ptr()
    end = parameters[0].data_ptr()
    for p in parameters:
        if p.untyped_storage().data_ptr() != storage or p.data_ptr() != end:
            return False
        end += p.numel() * p.element_size()
    return True


def _is_view(joint: Tensor, parameters: Sequence[Tensor]) -> bool:
    place, size = joint.data_ptr(), joint.element_size()
    for p in parameters:
        if p.data_ptr() != place or p.dtype != joint.dtype:
            return False
        place += p.numel() * size
    return True
