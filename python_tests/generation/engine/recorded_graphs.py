"""CUDA graphs on the CPU: a capture records a call's operators and undoes what they wrote; a replay runs them again.

As on a GPU, a capture changes nothing, Python runs once, numbers that the host read are fixed, and outputs are
overwritten by every replay.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from speechlm_ext.generation.engine.capture import GraphCapture
from speechlm_ext.generation.engine.engine import Engine
from speechlm_ext.generation.engine.graphs import StepGraphs


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_flatten(tree)[0] if isinstance(x, Tensor)]


class _Recorder(TorchDispatchMode):
    """Records operators; keeps the old contents of memory that they write and did not allocate themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.saved: dict[int, tuple[Any, Any]] = {}
        self._allocated: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in _tensors(given.get(argument.name)):
                    storage = tensor.untyped_storage()
                    place = storage.data_ptr()
                    if place not in self._allocated and place not in self.saved:
                        self.saved[place] = storage, storage.clone()
        out = func(*args, **kwargs)
        known = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            if tensor.untyped_storage().data_ptr() not in known:
                self._allocated.add(tensor.untyped_storage().data_ptr())
        self.calls.append((func, args, kwargs, out))
        return out


class RecordedGraph:
    """In place of ``torch.cuda.CUDAGraph``; ``log`` has the arguments of every capture, and a word for each replay."""

    log: list[Any] = []

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        self.log.append((pool, capture_error_mode))
        self._recorder = _Recorder()
        self._recorder.__enter__()

    def capture_end(self) -> None:
        self._recorder.__exit__(None, None, None)
        for storage, old in self._recorder.saved.values():
            storage.copy_(old)

    def replay(self) -> None:
        self.log.append("replay")
        for func, args, kwargs, out in self._recorder.calls:
            known = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
            for old, new in zip(_tensors(out), _tensors(func(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() not in known:
                    old.copy_(new)


class _Stream:
    def __init__(self, device: Any = None) -> None:
        pass

    def wait_stream(self, other: _Stream) -> None:
        pass


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """torch.cuda's graphs and streams are those of this file; returns the log of captures and replays."""
    RecordedGraph.log = []
    pools = iter(range(10**6))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: _Stream())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    return RecordedGraph.log


def captures(log: list[Any]) -> list[Any]:
    """The captures in a log: (pool, mode)."""
    return [entry for entry in log if entry != "replay"]


def make_engine(model: Any, num_slots: int, poll_interval: int = 1) -> Engine:
    """An engine on the CPU that captures its steps, as on a GPU."""
    engine = Engine(model, num_slots, poll_interval, cuda_graphs=True)
    capture = GraphCapture(torch.device("cpu"))
    engine._graphs = StepGraphs(engine._step, engine._cache, num_slots, capture)
    return engine
