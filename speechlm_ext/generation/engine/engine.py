"""The decode loop: requests join, share each step of the model, and leave when they are done.

Active requests are side by side in slots ``0`` to ``n - 1`` of one sampler state and one key/value cache. A step is one
forward of n rows, one product for all streams' logits, and one call of the sampler, which also advances each request's
state machine. With a frame transformer the streams of a row are sampled one after the other: each has a product and a
call of the sampler, and each but the first a small forward that reads the token of the stream before. The last slot
moves into that of a request that ends, and a new request can follow at once: its prompt is prefilled, packed with
others', up to its last row, which the next step feeds.

``rows.py`` describes the rows. Axes: n active requests, S streams, R rows, P prompt frames, T content frames.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from speechlm_ext.errors import GenerationError
from speechlm_ext.generation.engine import sampler_state as states
from speechlm_ext.generation.engine.capture import GraphCapture
from speechlm_ext.generation.engine.graphs import HeadCalls, StepGraphs
from speechlm_ext.generation.engine.memory import free_bytes, rows_at_start
from speechlm_ext.generation.engine.rows import Decoded, read_decoded
from speechlm_ext.generation.engine.slots import DecodeJob, Slot, SlotTable, make_slots, prefill
from speechlm_ext.model.lm import SpeechLMModel
from speechlm_ext.ops import SampledStep, multistream_sample
from speechlm_ext.ops.multistream_sample.decode_state import Progress


class Engine:
    """Decodes up to ``num_slots`` rows at a time; see the module.

    Args:
        model: a :class:`SpeechLMModel` in eval mode; its device is used.
        num_slots: maximum number of rows of a step. A request takes one, with guidance two.
        poll_interval: decode steps between completion checks. A check synchronizes with the GPU; until then finished
            requests emit padding. Default 1 on the CPU, 8 on a GPU.
        cuda_graphs: replay captured steps; default on a GPU.
        batch_invariant: a request has the same bits alone and among any others. Each prompt is then prefilled in a
            forward of its own, and on a GPU every step has ``num_slots`` rows; for the backbones with fused layers
            (``model/backbone/layer_families.py``). False packs prompts, and pads steps to a power of two at most.
    """

    def __init__(
        self,
        model: SpeechLMModel,
        num_slots: int = 16,
        poll_interval: int | None = None,
        cuda_graphs: bool | None = None,
        batch_invariant: bool = True,
    ) -> None:
        if num_slots < 1:
            raise GenerationError(f"the engine needs at least 1 slot, got {num_slots}.")
        self.model, self.layout, self.num_slots = model, model.layout, num_slots
        self.device = next(model.parameters()).device
        self.poll_interval = poll_interval or (1 if self.device.type == "cpu" else 8)
        self.batch_invariant = batch_invariant
        self._slots = SlotTable(model.layout, num_slots, self.device)
        self._calls_for: dict[frozenset[str], HeadCalls] = {}
        self._cache = model.new_cache(num_slots, 64)
        for number in range(num_slots):
            self._cache.release(number)
        on_gpu = self.device.type == "cuda"
        # The number of rows decides which kernel a library takes for a product, so on a GPU it is always the same.
        self._fewest_rows = num_slots if on_gpu and batch_invariant else 1
        self._graphs: StepGraphs | None = None
        if on_gpu if cuda_graphs is None else cuda_graphs:
            capture = GraphCapture(self.device) if on_gpu else None
            self._graphs = StepGraphs(self._step, self._cache, num_slots, capture, self._fewest_rows)
        self._frame_cache = model.new_frame_cache(num_slots) if model.frame is not None else None
        self._row_BS = torch.zeros(num_slots, self.layout.num_streams, dtype=torch.int64, device=self.device)
        if on_gpu:
            self._allocate_cache()

    @torch.inference_mode()
    def _allocate_cache(self) -> None:
        """Allocate the cache's rows up front; see ``memory.py``."""
        # A row of a slot without a request allocates every layer, of whatever size the backbone's are.
        self.model.step_hidden(self._row_BS[:1], self._cache)
        free = free_bytes(self.device)
        rows = rows_at_start(self._cache.row_bytes, self.num_slots, self.model.max_positions, free)
        self._cache.reserve(rows)

    @property
    def active(self) -> list[Slot]:
        """The slots in use."""
        return self._slots.active

    @property
    def num_free(self) -> int:
        """Number of free slots."""
        return self.num_slots - len(self.active)

    # ---- in -----------------------------------------------------------------------------------------------------
    @torch.inference_mode()
    def admit(self, jobs: Sequence[DecodeJob], num_cached: int = 0, prepare: bool = True) -> None:
        """Prefill requests and let them join the next step.

        Equal prompts, the tries of one request, are prefilled once while one of them is being decoded.

        Args:
            num_cached: leading prompt rows of the first job that its slot has in the cache already (earlier turns of a
                dialogue); they are not prefilled again.
            prepare: on a GPU, if no other request is being decoded, first capture the steps that these can reach
                (``graphs.py``), so that no later step takes longer than others.
        """
        new = [slot for job in jobs for slot in make_slots(job, self.layout)]
        if len(new) > self.num_free:
            raise GenerationError(f"{len(new)} slots are needed and {self.num_free} are free.")
        start_time, first = time.perf_counter(), len(self.active)
        for job in jobs:
            job.start_time = start_time
        before, columns = list(self.active), self._slots.columns
        graphs = self._graphs
        # Rows that are decoded before the next completion check count as well.
        max_rows = max(slot.max_rows(self.layout.max_delay) for slot in new) + self.poll_interval
        longest = max(len(slot.prefix_RS) for slot in new) - min(self.layout.delays) + self.layout.max_delay
        # The state is replaced if it must grow, which costs all graphs: with them it has as many rows as the cache.
        state_rows = (
            max(max_rows, self._cache.num_rows) if graphs is not None and graphs.captures else max_rows
        )
        is_moved = self._slots.add(new, state_rows)
        if self._slots.columns is not columns:
            self._head, self._calls_for = self.model.scope_head(self._slots.columns.ranges), {}
            self._head.reserve(self.num_slots)
        if graphs is not None and is_moved:
            graphs.forget()  # they hold addresses
        numbered = dict(enumerate(new, first))
        for number in numbered:
            self._cache.restore(number, num_cached if number == first else 0)
        self._cache.reserve(longest + max_rows)  # now, not in the middle of a stream
        if graphs is not None and graphs.captures and prepare and not before:
            self._prepare(graphs)
        for number, slot in numbered.items():
            self._row_BS[number] = torch.from_numpy(slot.prefix_RS[-1])
        prefill(self.model, self._cache, numbered, before, num_cached, each_alone=self.batch_invariant)

    def _prepare(self, graphs: StepGraphs) -> None:
        """Capture the steps that the active requests, which are all new, can reach."""
        fewest = min(slot.job.prompt.num_slots for slot in self.active)
        # Preparing runs steps. They advance the sampler, whose history the real ones overwrite, and write the cache's
        # row behind those of an earlier turn.
        progress = self._slots.state.progress.clone()
        graphs.prepare(range(fewest, len(self.active) + 1), self._calls())
        self._slots.state.progress.copy_(progress)

    # ---- steps --------------------------------------------------------------------------------------------------
    @torch.inference_mode()
    def step(self, may_capture: bool = False) -> SampledStep:
        """Decode one row of every active request; :meth:`collect` returns those that are done.

        The tensors may have more rows than there are requests, and the next step may overwrite them.

        Args:
            may_capture: a step of a new size may be captured as a CUDA graph, which takes the time of several steps;
                not while somebody listens.
        """
        if self._graphs is None:
            return self._step(max(len(self.active), self._fewest_rows), self._calls())
        return self._graphs.step(len(self.active), self._calls(), may_capture)

    def _step(self, n: int, calls: HeadCalls) -> SampledStep:
        """A step of the first n slots, without a synchronization."""
        hidden_nD = self.model.step_hidden(self._row_BS[:n], self._cache)
        state = states.slots(self._slots.state, n)
        logits_nC = self._head(hidden_nD, calls[0])
        if len(calls) == 1:
            sampled = multistream_sample(logits_nC, state)
        else:
            sampled = multistream_sample(logits_nC, state, streams=(0, 1))
            assert self._frame_cache is not None
            for s in range(1, len(calls)):
                token_n = sampled.tokens[:, s - 1]
                stream_nD = self.model.stream_hidden(hidden_nD, token_n, s, self._frame_cache)
                logits_nC = self._head(stream_nD, calls[s])
                # The last call also pads the streams without content.
                end = s + 1 if s + 1 < len(calls) else state.num_streams
                sampled = multistream_sample(logits_nC, state, streams=(s, end), partial=sampled)
        self._row_BS[:n] = sampled.tokens
        return sampled

    def _calls(self) -> HeadCalls:
        """The calls of the head that active requests need, and the products that each of them reads."""
        modalities = frozenset[str]().union(*(slot.modalities for slot in self.active))
        if modalities not in self._calls_for:
            ranges = self._slots.columns.ranges_of(modalities)
            used = self._head.used_by(ranges)
            if self._frame_cache is None:
                self._calls_for[modalities] = (None if used is None else tuple(used),)
            else:
                # Streams after the last one with content, all but the first for text, are not computed.
                count = max(s for s, parts in enumerate(ranges) if parts) + 1
                self._calls_for[modalities] = tuple(
                    tuple(u and of == s for u, of in zip(used, self._head.streams, strict=True))
                    for s in range(count)
                )
        return self._calls_for[modalities]

    @torch.inference_mode()
    def rows(self, key: Any, first: int = 0) -> np.ndarray:
        """A copy of a request's decoded rows from row ``first`` on, int64 ``[R, S]``; synchronizes with a GPU."""
        for number, slot in enumerate(self.active):
            if slot.job.key == key and slot.leader is None:
                state = self._slots.state
                return state.history[number, first : int(state.row[number])].cpu().numpy().copy()
        raise GenerationError(f"request {key!r} is not being decoded.")

    # ---- out ----------------------------------------------------------------------------------------------------
    @torch.inference_mode()
    def collect(self) -> list[tuple[DecodeJob, Decoded]]:
        """Remove the requests that are done and return them."""
        state = self._slots.state
        progress = state.progress[: len(self.active)].tolist()
        done = {number: row for number, row in enumerate(progress) if row[Progress.DONE]}
        out = []
        for number, row in done.items():
            slot, has_failed = self.active[number], bool(row[Progress.FAILED])
            if slot.leader is None:
                rows = state.history[number, : row[Progress.ROW]].cpu().numpy()
                scores = state.history_logprob[number, : row[Progress.ROW]].float().cpu().numpy()
                decoded = read_decoded(slot.job.prompt, slot.forced_RS, rows, scores, self.layout, has_failed)
                out.append((slot.job, decoded))
        self._remove(list(done))
        return out

    @torch.inference_mode()
    def cancel(self, key: Any) -> None:
        """Drop a request and free its slots. Unknown keys are ignored."""
        self._remove([number for number, slot in enumerate(self.active) if slot.job.key == key])

    def _remove(self, numbers: Sequence[int]) -> None:
        """Free slots. Their keys and values stay, finite or not: no row reads beyond its own request's."""
        for number in sorted(numbers, reverse=True):
            last = self._slots.remove(number)
            if number != last:
                self._cache.move(last, number)
                self._row_BS[number] = self._row_BS[last]
            self._cache.release(last)
        if numbers:
            self._slots.link()

    def run(self, jobs: Iterable[DecodeJob]) -> Iterator[tuple[DecodeJob, Decoded]]:
        """Decode jobs, taken one by one when there is room, and yield each as it ends."""
        source, waiting = iter(jobs), None
        while True:
            free, joining = self.num_free, list[DecodeJob]()
            while free > 0:
                waiting = waiting or next(source, None)
                if waiting is None:
                    break
                if waiting.prompt.num_slots > self.num_slots:
                    raise GenerationError(
                        "guidance needs two rows of a batch; use a batch size of at least 2."
                    )
                if waiting.prompt.num_slots > free:
                    break
                free -= waiting.prompt.num_slots
                joining.append(waiting)
                waiting = None
            if joining:
                self.admit(joining, prepare=False)
            if not self.active:
                return
            for _ in range(self.poll_interval):
                self.step(may_capture=True)
            yield from self.collect()
