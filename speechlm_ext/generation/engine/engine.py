"""The decode loop: requests come, share each step of the model, and leave when they are done.

Active requests stand side by side in slots ``0`` to ``n - 1`` of one sampler state and one key/value cache, so a step
is one forward of n rows, one product for all streams' logits, and one call of the sampler, which also walks every
request's state machine. With a frame transformer the streams of a row come one after the other: behind the forward
stand a product and a call of the sampler for each, and a small forward before each but the first, which reads what the
stream before it said. A request that ends gives its slot to the last one, and a new one can take the place behind at
once: its prompt is prefilled, packed with that of others, up to its last row, the one that the next step feeds.

The form of rows is told in ``rows.py``. Axes: n active requests, S streams, R rows, P prompt frames.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from speechlm_ext.errors import GenerationError
from speechlm_ext.generation.engine import sampler_state as states
from speechlm_ext.generation.engine.graphs import Calls, StepGraphs
from speechlm_ext.generation.engine.rows import Decoded, forced_rows, given_rows, prefix_rows, read_decoded
from speechlm_ext.generation.requests.prompt import Prompt
from speechlm_ext.model.lm import SpeechLMModel
from speechlm_ext.ops import DecodeState, SampledStep, multistream_sample

#: Rows that one prefill forward may have, which bounds its memory.
PREFILL_ROWS = 8192


@dataclass(eq=False)
class Work:
    """A prompt on its way through the engine."""

    key: Any
    prompt: Prompt
    teacher: np.ndarray | None = None
    """The target's content int64 ``[T, S]`` to force instead of choosing."""


@dataclass(eq=False)
class _Slot:
    work: Work
    forced_RS: np.ndarray
    modalities: frozenset[str]
    leader: _Slot | None = None
    """Of an unconditional row: the request that it guides, whose tokens it follows."""
    prefix: bytes = b""
    """The rows that it was prefilled with, for others that begin alike."""


class Engine:
    """Decodes up to ``num_slots`` rows at a time; see the module.

    Args:
        model: a :class:`SpeechLMModel` in eval mode; its device is used.
        num_slots: most rows of a step. A request takes one, with guidance two.
        poll: steps between two looks at which requests are done. Each look waits for a GPU, and a request that is done
            goes on with fill until then; default 1 on the CPU, 8 on a GPU.
        cuda_graphs: replay captured steps; default on a GPU.
    """

    def __init__(
        self,
        model: SpeechLMModel,
        num_slots: int = 16,
        poll: int | None = None,
        cuda_graphs: bool | None = None,
    ) -> None:
        if num_slots < 1:
            raise GenerationError(f"the engine needs at least 1 slot, got {num_slots}.")
        self.model, self.layout, self.num_slots = model, model.layout, num_slots
        self.device = next(model.parameters()).device
        self.poll = poll if poll is not None else (1 if self.device.type == "cpu" else 8)
        on_gpu = self.device.type == "cuda"
        self.active: list[_Slot] = []
        self.steps = 0
        self._columns = states.Columns(self.layout, [])
        self._state: DecodeState | None = None
        self._calls_for: dict[frozenset[str], Calls] = {}
        self._cache = model.new_cache(num_slots, 64)
        uses_graphs = on_gpu if cuda_graphs is None else cuda_graphs
        self._graphs = StepGraphs(self._step, self._cache, num_slots) if uses_graphs else None
        self._frame_cache = model.new_frame_cache(num_slots) if model.frame is not None else None
        self._row_BS = torch.zeros(num_slots, self.layout.num_streams, dtype=torch.int64, device=self.device)

    @property
    def num_free(self) -> int:
        """Slots that no request holds."""
        return self.num_slots - len(self.active)

    @staticmethod
    def slots_of(prompt: Prompt) -> int:
        """Slots that a request takes."""
        return 1 if prompt.unconditional_PS is None else 2

    # ---- in -----------------------------------------------------------------------------------------------------
    @torch.inference_mode()
    def admit(self, works: Sequence[Work], held: int = 0) -> None:
        """Take in requests: prefill them and let them join the next step.

        Equal prompts, the tries at one request, are prefilled once as long as one of them is being decoded.

        Args:
            held: rows of the first one's prompt that the slot it gets still has from the request before, and that are
                not prefilled again: the turns of a dialogue so far.

        Raises:
            GenerationError: there are not enough free slots, or forced content that the target cannot have.
        """
        new: list[_Slot] = []
        frames: list[np.ndarray] = []
        for work in works:
            p = work.prompt
            given = given_rows(p.frames_PS, self.layout)
            forced = given if work.teacher is None else forced_rows(p, work.teacher, self.layout)
            slot = _Slot(work, forced, frozenset(s.modality for s in p.segments))
            new.append(slot)
            frames.append(p.frames_PS)
            if p.unconditional_PS is not None:
                new.append(_Slot(work, forced, slot.modalities, leader=slot))
                frames.append(p.unconditional_PS)
        if len(new) > self.num_free:
            raise GenerationError(f"{len(new)} slots are needed and {self.num_free} are free.")
        first = len(self.active)
        self.active += new
        self._make_room(new)
        part = states.new_state(
            [slot.work.prompt for slot in new], self._columns, [s.forced_RS for s in new], self.device
        )
        for row in range(len(new)):
            states.put(self._require_state(), first + row, part, row)
        self._link()
        for number in range(first, len(self.active)):
            self._cache.restore(number, held if number == first else 0)
        if self.device.type == "cpu":  # memory that is never written costs nothing there
            self._cache.reserve(max(map(len, frames)) + self.layout.max_delay + self._rows(new))
        rows = [prefix_rows(f, self.layout) for f in frames]
        self._prefill(first, rows, [held, *[0] * (len(rows) - 1)])

    def _make_room(self, new: Sequence[_Slot]) -> None:
        """Columns for new modalities, and longer rows, where the present ones do not do."""
        before = self._state
        modalities = self._columns.modalities.union(*(slot.modalities for slot in new))
        if modalities != self._columns.modalities:
            self._columns = states.Columns(self.layout, modalities)
            self._head, self._calls_for = self.model.scope_head(self._columns.ranges), {}
            self._head.reserve(self.num_slots)
            fresh = states.new_state(
                [slot.work.prompt for slot in self.active],
                self._columns,
                [slot.forced_RS[:0] for slot in self.active],
                self.device,
            )
            old, self._state = self._state, states.resized(fresh, self.num_slots, 1, 0, 0)
            self._state.progress[:, 4] = 1
            if old is not None:  # what is under way keeps everything but its columns
                self._state = states.resized(self._state, self.num_slots, *states.sizes(old))
                scope = self._state.choice[..., :2].clone()
                for name in states.ROWS:
                    held = getattr(old, name)
                    getattr(self._state, name)[states.corner(held)] = held
                self._state.choice[..., :2] = scope
        most = (
            max(len(s.work.prompt.segments) for s in new),
            max(len(s.forced_RS) for s in new),
            self._rows(new),
        )
        self._state = states.resized(self._require_state(), self.num_slots, *most)
        if self._graphs is not None and self._state is not before:
            self._graphs.forget()  # they hold addresses

    def _rows(self, new: Sequence[_Slot]) -> int:
        """Most rows that a request can take, with those that pass before somebody looks."""
        tail = self.layout.max_delay + 2
        longest = [
            max(len(slot.forced_RS), sum(s.max_new + tail for s in slot.work.prompt.segments)) for slot in new
        ]
        return max(longest) + self.poll

    def _require_state(self) -> DecodeState:
        assert self._state is not None
        return self._state

    def _link(self) -> None:
        """Tell the sampler which row of the logits each slot reads, and which one guides it."""
        request = self._require_state().request
        request[: len(self.active), 2] = torch.arange(len(self.active), device=self.device)
        request[: len(self.active), 3] = -1
        for number, slot in enumerate(self.active):
            if slot.leader is not None:
                leader = self.active.index(slot.leader)
                for row in (number, leader):
                    request[row, 2], request[row, 3] = leader, number

    def _prefill(self, first: int, rows: list[np.ndarray], held: list[int]) -> None:
        """Fill the slots from ``first`` on with all but the last of their rows, less those that they hold."""
        pending: list[tuple[int, np.ndarray]] = []
        copies: dict[bytes, tuple[int, list[int]]] = {}
        present = {slot.prefix: number for number, slot in enumerate(self.active[:first])}
        for number, rows_RS in enumerate(rows):
            slot = first + number
            self._row_BS[slot] = torch.from_numpy(rows_RS[-1])
            key = self.active[slot].prefix = rows_RS.tobytes()
            rows_RS = rows_RS[held[number] :]
            if len(rows_RS) <= 1:
                continue
            if held[number] == 0 and key in present:
                self._cache.copy(present[key], [slot], len(rows_RS) - 1)
            elif key in copies:
                copies[key][1].append(slot)
            else:
                copies[key] = slot, []
                pending.append((slot, rows_RS[:-1]))
        while pending:
            count, total = 0, 0
            while count < len(pending) and (count == 0 or total + len(pending[count][1]) <= PREFILL_ROWS):
                total += len(pending[count][1])
                count += 1
            batch, pending = pending[:count], pending[count:]
            ids_NS = torch.from_numpy(np.concatenate([r for _, r in batch])).to(self.device)
            self.model.prefill(ids_NS, self._cache, [s for s, _ in batch], [len(r) for _, r in batch])
        for source, others in copies.values():
            self._cache.copy(source, others)

    # ---- on -----------------------------------------------------------------------------------------------------
    @torch.inference_mode()
    def step(self) -> SampledStep:
        """One row for every active request; :meth:`collect` says what came to its end.

        The results may have more rows than there are requests, and the next step may write over them.
        """
        self.steps += 1
        if self._graphs is None:
            return self._step(len(self.active), None, self._calls())
        return self._graphs.step(len(self.active), self._calls())

    def _step(self, n: int, num_keys: int | None, calls: Calls) -> SampledStep:
        """The work of a step for the first n slots: nothing in it waits for a GPU."""
        hidden_nD = self.model.step_hidden(self._row_BS[:n], self._cache, num_keys)
        state = states.slots(self._require_state(), n)
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
                # The last call also takes the streams in which nobody has content: fill.
                last = s + 1 if s + 1 < len(calls) else state.num_streams
                sampled = multistream_sample(logits_nC, state, streams=(s, last), partial=sampled)
        self._row_BS[:n] = sampled.tokens
        return sampled

    def _calls(self) -> Calls:
        """The calls of the head that active requests need, and which of its products each of them reads."""
        modalities = frozenset[str]().union(*(slot.modalities for slot in self.active))
        if modalities not in self._calls_for:
            ranges = self._columns.ranges_of(modalities)
            used = self._head.used_by(ranges)
            if self._frame_cache is None:
                self._calls_for[modalities] = (None if used is None else tuple(used),)
            else:
                # Streams behind the last one with content, all but the first for text, are not computed.
                count = max(s for s, parts in enumerate(ranges) if parts) + 1
                self._calls_for[modalities] = tuple(
                    tuple(u and of == s for u, of in zip(used, self._head.streams, strict=True))
                    for s in range(count)
                )
        return self._calls_for[modalities]

    @torch.inference_mode()
    def rows(self, key: Any, first: int = 0) -> np.ndarray:
        """The rows of a request so far, without its prompt's and from row ``first`` on; waits for a GPU.

        Returns:
            int64 ``[R, S]``, a copy.

        Raises:
            GenerationError: no such request is being decoded.
        """
        state = self._require_state()
        for number, slot in enumerate(self.active):
            if slot.work.key == key and slot.leader is None:
                return state.history[number, first : int(state.progress[number, 2])].cpu().numpy().copy()
        raise GenerationError(f"request {key!r} is not being decoded.")

    # ---- out ----------------------------------------------------------------------------------------------------
    @torch.inference_mode()
    def collect(self) -> list[tuple[Work, Decoded]]:
        """Take out the requests that are done; their slots are free."""
        state = self._require_state()
        progress = state.progress[: len(self.active)].tolist()
        done = [number for number, row in enumerate(progress) if row[4]]
        out = []
        for number in done:
            slot, (_, _, count, _, _, failed, _) = self.active[number], progress[number]
            if slot.leader is None:
                rows = state.history[number, :count].cpu().numpy()
                scores = state.history_logprob[number, :count].float().cpu().numpy()
                decoded = read_decoded(
                    slot.work.prompt, slot.forced_RS, rows, scores, self.layout, bool(failed)
                )
                out.append((slot.work, decoded))
        # Rows that are given do not fail, whatever the model makes of them.
        is_given = [self.active[number].work.teacher is not None for number in done]
        self._remove(done, [bool(progress[n][5]) or given for n, given in zip(done, is_given, strict=True)])
        return out

    @torch.inference_mode()
    def cancel(self, key: Any) -> None:
        """Forget a request at once; its slot is free. Unknown keys are ignored."""
        numbers = [number for number, slot in enumerate(self.active) if slot.work.key == key]
        if numbers:
            self._remove(numbers, [True] * len(numbers))

    def _remove(self, numbers: Sequence[int], suspect: Sequence[bool]) -> None:
        """Free slots; ``suspect``: those whose keys and values may not be finite."""
        state = self._require_state()
        for number, is_suspect in sorted(zip(numbers, suspect, strict=True), reverse=True):
            if is_suspect:
                self._cache.clear(number)
            last = len(self.active) - 1
            if number != last:
                self._cache.truncate(number, 0)
                self._cache.copy(last, [number])
                for name in states.ROWS:
                    getattr(state, name)[number] = getattr(state, name)[last]
                self._row_BS[number] = self._row_BS[last]
                self.active[number] = self.active[last]
                if self.active[number].work.teacher is not None:  # see collect
                    self._cache.clear(last)
            self._cache.truncate(last, 0)
            state.progress[last, 4] = 1
            self.active.pop()
        if numbers:
            self._link()

    def run(self, works: Iterable[Work]) -> Iterator[tuple[Work, Decoded]]:
        """Decode requests as slots allow and yield each as it ends.

        Args:
            works: taken one by one when there is room, so they may be made lazily.
        """
        source, waiting = iter(works), list[Work]()
        while True:
            free, joining = self.num_free, []
            while free > 0:
                work = waiting.pop() if waiting else next(source, None)
                if work is None:
                    break
                if self.slots_of(work.prompt) > free:
                    if self.slots_of(work.prompt) > self.num_slots:
                        raise GenerationError(
                            "guidance needs two rows of a batch; use a batch size of at least 2."
                        )
                    waiting.append(work)
                    break
                free -= self.slots_of(work.prompt)
                joining.append(work)
            if joining:
                self.admit(joining)
            if not self.active:
                return
            for _ in range(self.poll):
                self.step()
            yield from self.collect()


def decode(
    model: SpeechLMModel,
    prompts: Sequence[Prompt],
    teacher: Sequence[np.ndarray] | None = None,
    num_slots: int | None = None,
) -> list[Decoded]:
    """Decode prompts and return what came of each, in order.

    Args:
        model: a :class:`SpeechLMModel` in eval mode.
        prompts: any tasks and lengths together.
        teacher: for each prompt the content int64 ``[T, S]`` (layout ids) to force instead of choosing; the result's
            ``logprob_TS`` and ``end_logprob`` then are those of the given content.
        num_slots: rows decoded at once; default all.

    Returns:
        One :class:`Decoded` per prompt. A request whose logits are not finite is ``failed``; the others go on.
    """
    if not prompts:
        return []
    given: Sequence[np.ndarray | None] = [None] * len(prompts) if teacher is None else teacher
    engine = Engine(model, num_slots or sum(Engine.slots_of(p) for p in prompts))
    works = (Work(number, p, t) for number, (p, t) in enumerate(zip(prompts, given, strict=True)))
    out: list[Decoded | None] = [None] * len(prompts)
    for work, decoded in engine.run(works):
        out[work.key] = decoded
    return [d for d in out if d is not None]
