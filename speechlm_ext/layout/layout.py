"""TokenLayout: the meaning of every token id, as versioned data with a hash.

A layout says how many streams there are and how far each is delayed, which ids each stream may carry,
which ids belong to each modality, the names of the special ids, and the tokenizers that made the ids. It is
stored in every token folder, checkpoint and export, and compared at each hand-over. Order is explicit
in lists, never the order of keys in a file, so re-saving a file cannot move the vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

from speechlm_ext.errors import LayoutError, LayoutMismatchError
from speechlm_ext.layout.parts import BASE_SPECIAL, NUM_SPECIAL, Interval, Stream, merge_ranges
from speechlm_ext.tasks import TaskTemplate, builtin_tasks
from speechlm_ext.utils.files.io import atomic_write_json
from speechlm_ext.utils.files.json_shape import SHA256, build, check_shape
from speechlm_ext.utils.files.json_text import read_json
from speechlm_ext.utils.files.run_folders import LAYOUT_NAME as FILE_NAME

VERSION = 1


@dataclass(frozen=True)
class TokenLayout:
    """Ids, streams and special tokens of one family of models; see the module's text."""

    name: str
    """A short name for people, e.g. ``ssl200+codec8x256+text1000``."""
    streams: tuple[Stream, ...]
    """The ``S`` streams in order; stream 0 carries special tokens and all single-stream content."""
    intervals: tuple[Interval, ...]
    """Every modality's ids; they start with ``special`` and are contiguous."""
    special: tuple[tuple[str, int], ...]
    """Names of the special ids: ``pad``, ``sos_eos``, ``modality:…``, ``task:…``, roles."""
    tokenizers: tuple[tuple[str, str], ...] = ()
    """``(modality, sha256)`` of each tokenizer whose ids these are."""
    version: int = field(default=VERSION)

    def __post_init__(self) -> None:
        expected = 0
        for interval in self.intervals:
            if interval.start != expected or interval.end <= interval.start:
                raise LayoutError(
                    f"layout {self.name!r}: interval {interval.name!r} is [{interval.start}, {interval.end}) but "
                    f"must start at {expected} and hold at least one id; intervals are contiguous."
                )
            expected = interval.end
        names = [i.name for i in self.intervals]
        if len(set(names)) != len(names) or not names or names[0] != "special":
            raise LayoutError(
                f"layout {self.name!r}: intervals must be unique and begin with 'special', got {names}."
            )
        if not self.streams:
            raise LayoutError(f"layout {self.name!r}: at least one stream is needed, got none.")
        for stream in self.streams:
            missing = [c for c in stream.carries if c not in names]
            if stream.delay < 0 or missing or not stream.carries:
                raise LayoutError(
                    f"layout {self.name!r}: stream {stream.name!r} needs a delay >= 0 and known intervals, got delay "
                    f"{stream.delay}, intervals {stream.carries} (unknown: {missing})."
                )
        ids = [i for _, i in self.special]
        if len(set(ids)) != len(ids) or min(ids) < 0 or max(ids) >= self.intervals[0].end:
            raise LayoutError(
                f"layout {self.name!r}: special ids must be unique and inside the 'special' interval."
            )

    # ---- construction -------------------------------------------------------------------------------------------
    @classmethod
    def build(
        cls,
        *,
        ssl: int | None = None,
        codec: Sequence[int] = (),
        text: int | None = None,
        g2p: int | None = None,
        delays: Sequence[int] | None = None,
        name: str | None = None,
        tokenizers: Mapping[str, str] | None = None,
        tasks: Mapping[str, TaskTemplate] | None = None,
    ) -> TokenLayout:
        """Lay out ``special | ssl | codec | text | g2p`` in the order of the published OpusLM checkpoints.

        With both ``ssl`` and ``codec`` a speech frame is codec_ssl: the SSL unit in stream 0 and codebook k in
        stream k + 1. With ``codec`` alone codebook k is in stream k. Without codec there is one stream.

        Args:
            ssl, text, g2p: vocabulary sizes; None leaves the modality out.
            codec: size of each codebook; empty leaves the modality out.
            delays: frames by which each stream is shifted; default 0, 1, 2, …
            tokenizers: sha256 fingerprint of each modality's tokenizer.
            tasks: task templates whose ids are special tokens; default the shipped ones.

        Raises:
            LayoutError: sizes or delays that do not fit together.
        """
        sizes: list[tuple[str, int]] = [("special", NUM_SPECIAL)]
        sizes += [("ssl", ssl)] if ssl is not None else []
        sizes += [(f"codec{k}", size) for k, size in enumerate(codec)]
        sizes += [("text_bpe", text)] if text is not None else []
        sizes += [("g2p", g2p)] if g2p is not None else []
        start, intervals = 0, []
        for label, size in sizes:
            intervals.append(Interval(label, start, start + size))
            start += size
        single = tuple(label for label, _ in sizes if not label.startswith("codec"))
        codebooks = [f"codec{k}" for k in range(len(codec))]
        names = ["ssl"] * (ssl is not None) + codebooks or ["text"]
        delays = tuple(range(len(names))) if delays is None else tuple(int(d) for d in delays)
        if len(delays) != len(names):
            raise LayoutError(f"expected {len(names)} delays, one per stream, got {len(delays)}: {delays}.")
        streams: list[Stream] = []
        for label, delay in zip(names, delays, strict=True):
            carries = () if streams else single
            streams.append(Stream(label, delay, carries + ((label,) if label in codebooks else ())))
        special = dict(BASE_SPECIAL)
        for task in (builtin_tasks() if tasks is None else tasks).values():
            special[f"task:{task.name}"] = task.id
        parts = {"ssl": ssl, "codec": f"{len(codec)}x{codec[0]}" if codec else None, "text": text}
        default = "+".join(f"{label}{size}" for label, size in parts.items() if size is not None)
        return cls(
            name=name or default or "special",
            streams=tuple(streams),
            intervals=tuple(intervals),
            special=tuple(sorted(special.items(), key=lambda item: item[1])),
            tokenizers=tuple(sorted((tokenizers or {}).items())),
        )

    def with_delays(self, delays: Sequence[int]) -> TokenLayout:
        """The same ids under other delays: another stream layout. Raises :class:`LayoutError` for another number."""
        if len(delays) != self.num_streams:
            raise LayoutError(
                f"layout {self} has {self.num_streams} streams, so it takes as many delays; got {list(delays)}."
            )
        pairs = zip(self.streams, delays, strict=True)
        return replace(self, streams=tuple(replace(stream, delay=int(d)) for stream, d in pairs))

    # ---- properties and look-ups ----------------------------------------------------------------------------------
    @property
    def num_streams(self) -> int:
        """``S``."""
        return len(self.streams)

    @property
    def vocab_size(self) -> int:
        """``V``: one more than the largest id."""
        return self.intervals[-1].end

    @cached_property
    def delays(self) -> tuple[int, ...]:
        """Frames by which each stream is shifted."""
        return tuple(s.delay for s in self.streams)

    @property
    def max_delay(self) -> int:
        """Largest delay in frames."""
        return max(self.delays)

    @cached_property
    def _special(self) -> dict[str, int]:
        return dict(self.special)

    @property
    def pad_id(self) -> int:
        """Id of an empty cell; its embedding is exactly zero."""
        return self._special["pad"]

    @property
    def sos_eos_id(self) -> int:
        """Id that begins a sequence and ends a target."""
        return self._special["sos_eos"]

    def special_id(self, name: str) -> int:
        """Id of a special token by name. Raises :class:`LayoutError` if the layout has no such token."""
        if name not in self._special:
            raise LayoutError(
                f"layout {self.name!r} has no special token {name!r}; it has {sorted(self._special)}."
            )
        return self._special[name]

    def marker_id(self, modality: str) -> int:
        """Id that opens content of ``modality``."""
        return self.special_id(f"modality:{modality}")

    def task_id(self, task: str) -> int:
        """Id that names ``task``."""
        return self.special_id(f"task:{task}")

    def has(self, modality: str) -> bool:
        """Whether content of ``modality`` can be written in this layout."""
        names = self._spans
        if modality == "codec_ssl":
            return "ssl" in names and "codec0" in names
        if modality == "codec":
            return "codec0" in names and "ssl" not in names
        if modality == "spk":
            return "codec0" in names
        return modality in names

    def interval(self, name: str) -> tuple[int, int]:
        """``(start, end)`` of an interval; ``codec`` is all codebooks together. Raises :class:`LayoutError`."""
        span = self._spans.get(name)
        if span is not None:
            return span
        raise LayoutError(f"layout {self.name!r} has no {name!r}; it has {[i.name for i in self.intervals]}.")

    @cached_property
    def _spans(self) -> dict[str, tuple[int, int]]:
        # Looked up for every part of every sample, so kept instead of searched.
        spans = {i.name: (i.start, i.end) for i in self.intervals}
        parts = [i for i in self.intervals if i.name.startswith("codec")]
        return spans | ({"codec": (parts[0].start, parts[-1].end)} if parts else {})

    @cached_property
    def num_codebooks(self) -> int:
        """Number of codec codebooks."""
        return sum(i.name.startswith("codec") for i in self.intervals)

    def content_ranges(self, modality: str) -> tuple[tuple[int, int] | None, ...]:
        """Per stream, the id range ``(start, end)`` that content of ``modality`` occupies; None where it is pad.

        Column j of the raw content goes to the j-th stream that is not None; raw id r becomes ``start + r``.

        Raises:
            LayoutError: the layout cannot hold this modality.
        """
        if not self.has(modality):
            raise LayoutError(
                f"layout {self.name!r} cannot hold {modality!r} content; it has {[i.name for i in self.intervals]} in "
                f"{self.num_streams} streams. Choose tasks over the modalities it was built for."
            )
        if modality in ("codec", "codec_ssl", "spk"):
            first = [self.interval("ssl")] if self.has("codec_ssl") else []
            return tuple(first + [self.interval(f"codec{k}") for k in range(self.num_codebooks)])
        return (self.interval(modality),) + (None,) * (self.num_streams - 1)

    def stream0_contents(self) -> list[tuple[int, int]]:
        """The interval of each modality that stream 0 can carry, special tokens left out."""
        return [self.interval(name) for name in self.streams[0].carries if name != "special"]

    def scopes(self, preset: str = "own") -> list[Any]:
        """Per stream, the intervals of ids over which its softmax runs.

        ``full``: the whole vocabulary for every stream. ``codec``: the whole vocabulary for stream 0 and all
        codebooks for the others. ``own``: for each stream only the intervals that it can carry. ``modality``: a list
        of such scopes, one for each kind of row: for the n-th of :meth:`stream0_contents` stream 0 runs over that
        modality and the special tokens alone, and last, for rows of no known modality, over all it can carry.

        Raises:
            LayoutError: an unknown preset.
        """
        everything = [(0, self.vocab_size)]
        if preset == "full":
            return [everything for _ in self.streams]
        if preset == "codec":
            return [everything] + [[self.interval("codec")] for _ in self.streams[1:]]
        if preset == "own":
            return [merge_ranges([self.interval(c) for c in stream.carries]) for stream in self.streams]
        if preset == "modality":
            own, special = self.scopes("own"), self.interval("special")
            return [[merge_ranges([special, content]), *own[1:]] for content in self.stream0_contents()] + [
                own
            ]
        raise LayoutError(f"scope preset must be 'full', 'codec', 'own' or 'modality', got {preset!r}.")

    # ---- files, hash, comparison --------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """Plain data, in a fixed order."""
        return json.loads(json.dumps(asdict(self)))

    @cached_property
    def sha256(self) -> str:
        """Hash over everything that ids depend on (the ``name`` is for people and left out)."""
        data = {k: v for k, v in self.to_dict().items() if k != "name"}
        return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def __str__(self) -> str:
        return f"{self.name}@{self.sha256[:8]}"

    def save(self, folder: str | Path) -> Path:
        """Write ``token_layout.json`` into ``folder`` atomically and return its path."""
        path = Path(folder) / FILE_NAME
        atomic_write_json(path, {**self.to_dict(), "sha256": self.sha256})
        return path

    @classmethod
    def load(cls, path: str | Path) -> TokenLayout:
        """Read a layout from a file, or from the folder that holds ``token_layout.json``.

        Raises:
            LayoutError: missing, malformed, of another version, or changed after it was written.
        """
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        try:
            data = read_json(path, LayoutError, _NO_LAYOUT)
        except FileNotFoundError:
            raise LayoutError(
                f"no {FILE_NAME} at {path}; is this a token folder, checkpoint or model folder?"
            ) from None
        version = data.get("version") if isinstance(data, dict) else None
        if isinstance(version, int) and version != VERSION:
            raise LayoutError(f"{path}: layout version {version} is not {VERSION}; use the release it needs.")
        try:
            check_shape(data, dict)
            sha256 = data.pop("sha256", None)
            check_shape(sha256, SHA256, "sha256")
            layout = build(cls, data)
        except ValueError as problem:
            raise LayoutError(f"{path}: not a token layout: {problem}; {_WAY_OUT}") from None
        if layout.sha256 != sha256:
            raise LayoutError(
                f"{path}: content does not match its own sha256; it was edited or damaged after writing, {_WAY_OUT}"
            )
        return layout

    def first_difference(self, other: TokenLayout) -> str | None:
        """Name the first thing in which two layouts differ, or None when ids mean the same in both."""
        if self.sha256 == other.sha256:
            return None
        for label, mine, theirs in (
            ("number of streams", self.num_streams, other.num_streams),
            ("delays", self.delays, other.delays),
            ("vocabulary size", self.vocab_size, other.vocab_size),
        ):
            if mine != theirs:
                return f"{label}: {mine} against {theirs}"
        for label in ("intervals", "streams", "special", "tokenizers"):
            mine, theirs = getattr(self, label), getattr(other, label)
            for a, b in zip_longest(mine, theirs):
                if None in (a, b):
                    return f"{label}: {len(mine)} against {len(theirs)}; {_show(a or b)} is in only one"
                if a != b:
                    return f"{label}: {_show(a)} against {_show(b)}"
        return f"version: {self.version} against {other.version}"

    def require_same(self, other: TokenLayout, mine: str, theirs: str) -> None:
        """Refuse another layout.

        Args:
            mine, theirs: owner of each layout, for the message (e.g. ``"checkpoint runs/a"``).

        Raises:
            LayoutMismatchError: they differ; the message names the first difference.
        """
        difference = self.first_difference(other)
        if difference is not None:
            raise LayoutMismatchError(
                f"{mine} has token layout {self}, but {theirs} has {other}: {difference}. Their ids mean different "
                f"things. Tokenize again with the same tokenizers, or use the model that belongs to these tokens."
            )


_WAY_OUT = "copy the file again from where it was written."
_NO_LAYOUT = f"so it is not a token layout: {_WAY_OUT}"


def _show(item: Any) -> str:
    return "=".join(str(part)[:16] for part in item) if isinstance(item, tuple) else str(item)
