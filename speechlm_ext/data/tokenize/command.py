"""``speechlm tokenize``: from manifests to a token folder, restartable and in parts.

The rows of all manifests are cut into shards of ``rows_per_shard``. A shard appears under its name only when it is
whole and carries a hash of what it was made from; a restart makes the shards that are missing or whose rows changed.
Part ``i/N`` makes every N-th shard, so N machines with one shared folder (or folders copied together) make exactly
what one machine makes. The index is written last, by whichever run finds all shards there.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from speechlm_ext.audio.files import says_conversions, take_conversions
from speechlm_ext.data.manifest import Rejected, Utterance, read_manifest, scan_manifest
from speechlm_ext.data.recordings import RecordingPool
from speechlm_ext.data.tokenize.encode import Encoder
from speechlm_ext.data.tokenize.fit import FOLDER, CodecFit, FitSettings, SSLFit, TextFit, get_tokenizers
from speechlm_ext.data.tokens.shards import INDEX, read_head, shard_name, write_index, write_shard
from speechlm_ext.errors import ConfigError, LayoutMismatchError, ManifestError, ShardError
from speechlm_ext.layout import FILE_NAME, TokenLayout
from speechlm_ext.tasks import load_tasks
from speechlm_ext.utils.files.io import atomic_write_text
from speechlm_ext.utils.files.json_text import json_line
from speechlm_ext.utils.options import as_list, take_old_name

REJECTED = "rejected.jsonl"


@dataclass(frozen=True)
class TokenizeConfig:
    """Turn manifests into a token folder: fit tokenizers, encode, write shards and an index.

    ``speechlm tokenize --manifest data/train.jsonl --output_dir tokens/train``; then the same tokenizers for another
    split: ``speechlm tokenize --manifest data/test.jsonl --output_dir tokens/test --tokenizers
    tokens/train/tokenizers``.
    """

    manifest: list[str] | str
    """A manifest (JSON lines) or a list of them; each is a data set named after its file, unless its lines name one."""
    output_dir: str = ""
    """The token folder to write; needed."""
    tokenizers: str | None = None
    """Folder with existing tokenizers; without it they are fitted on the manifests."""
    text: TextFit = field(default_factory=TextFit)
    """Text tokenizer to fit."""
    ssl: SSLFit = field(default_factory=SSLFit)
    """SSL units to fit."""
    codec: CodecFit = field(default_factory=CodecFit)
    """Codec to fit."""
    fit_minutes: float = 30.0
    """Minutes of recordings, drawn at random, that SSL units and codec are fitted on."""
    delays: list[int] | int | None = None
    """Frames by which each stream is delayed; default 0, 1, 2, … Training can choose others (``data.delays``)."""
    task_file: str | None = None
    """YAML file with task templates of your own; their ids become part of the layout."""
    skip_bad: bool = False
    """Go on past bad items; they are listed in ``rejected.jsonl`` and counted."""
    resample: bool = True
    """Convert recordings of another sampling rate, which is said once; ``false`` makes them bad items."""
    num_workers: int | None = None
    """Processes; default one per core."""
    rows_per_shard: int = 1000
    """Utterances in a shard."""
    shard: str | None = None
    """``i/N``: make only every N-th shard, beginning with the i-th (from 0)."""
    stage: Literal["all", "fit", "merge"] = "all"
    """``fit`` only fits the tokenizers, ``merge`` only writes the index over the shards of all parts."""
    seed: int = 0
    """Seed of the fits."""
    out: str | None = None
    """Old name of ``output_dir``."""

    def __post_init__(self) -> None:
        take_old_name(self, "out", "output_dir", needed="the token folder to write")


@dataclass(frozen=True)
class TokenizeResult:
    """What was done."""

    out: Path
    layout: TokenLayout
    complete: bool
    """Whether the folder is finished and has its index."""
    num_utterances: int
    num_rejected: int
    shards_made: int
    shards_kept: int
    """Shards that a former run had made."""


@says_conversions()
def run_tokenize(cfg: TokenizeConfig) -> TokenizeResult:
    """Tokenize as ``cfg`` says; see :class:`TokenizeConfig`.

    Raises:
        SpeechLMError: a setting or, without ``skip_bad``, the first bad item; the message names it.
    """
    part, parts = _parse_shard(cfg.shard)
    if cfg.rows_per_shard < 1:
        raise ConfigError(f"rows_per_shard must be >= 1, got {cfg.rows_per_shard}.")
    out = Path(cfg.output_dir)
    utterances, rejected = _read_manifests(cfg)
    settings = FitSettings(cfg.text, cfg.ssl, cfg.codec, cfg.fit_minutes, cfg.resample, cfg.seed)
    may_fit = parts == 1 and cfg.stage != "merge"
    tokenizers = get_tokenizers(
        out, cfg.tokenizers, settings, utterances, skip_bad=cfg.skip_bad, may_fit=may_fit
    )
    if cfg.stage != "fit":
        take_conversions()  # the same recordings are read again and counted then
    layout = _with_tasks(
        tokenizers.make_layout(delays=None if cfg.delays is None else as_list(cfg.delays)), cfg.task_file
    )
    if (out / FILE_NAME).is_file():
        difference = layout.first_difference(TokenLayout.load(out))
        if difference is not None:
            raise LayoutMismatchError(
                f"{out} already holds tokens of another layout ({difference}). Choose another output_dir."
            )
    layout.save(out)
    if cfg.stage == "fit":
        print(f"fitted {', '.join(tokenizers.fingerprints())}: {out / FOLDER}, layout {layout}")
        return TokenizeResult(out, layout, False, 0, len(rejected), 0, 0)

    size = cfg.rows_per_shard
    groups = [utterances[i : i + size] for i in range(0, len(utterances), size)]
    hashes = [_inputs_sha256(group, layout, cfg) for group in groups]
    todo: list[int] = []
    if cfg.stage == "all":
        todo = [n for n in range(part, len(groups), parts) if not _is_done(out, n, hashes[n], layout, cfg)]
        mine = len(range(part, len(groups), parts))
        if todo:
            (out / INDEX).unlink(missing_ok=True)
            _encode_shards(cfg, out, layout, groups, hashes, todo)
        made, kept = len(todo), mine - len(todo)
    else:
        made, kept = 0, len(groups)
    result = _finish(cfg, out, layout, hashes, rejected, made, kept)
    _print_summary(result, len(groups))
    return result


def _encode_shards(
    cfg: TokenizeConfig,
    out: Path,
    layout: TokenLayout,
    groups: Sequence[Sequence[Utterance]],
    hashes: Sequence[str],
    todo: Sequence[int],
) -> None:
    total = sum(len(groups[n]) for n in todo)
    pool = RecordingPool(
        partial(Encoder.load, out / FOLDER, cfg.resample),
        skip_bad=cfg.skip_bad,
        num_workers=cfg.num_workers,
        num_items=total,
    )
    with pool, tqdm(total=total, unit="utt", desc="tokenize", disable=None) as bar:
        for number in todo:
            rows, rejected = [], []
            for item in pool(groups[number]):
                if isinstance(item, Rejected):
                    rejected.append(asdict(item))
                else:
                    rows.append(item)
                bar.update()
            write_shard(out / shard_name(number), rows, layout, hashes[number], rejected)


def _finish(
    cfg: TokenizeConfig,
    out: Path,
    layout: TokenLayout,
    hashes: Sequence[str],
    rejected: Sequence[Rejected],
    made: int,
    kept: int,
) -> TokenizeResult:
    """Write ``rejected.jsonl`` and the index when all shards are there."""
    heads = [read_head(out / shard_name(n)) for n in range(len(hashes))]
    missing = [n for n, head in enumerate(heads) if head is None or head.inputs_sha256 != hashes[n]]
    bad = [asdict(r) for r in rejected] + [r for head in heads if head is not None for r in head.rejected]
    if missing:
        if cfg.stage == "merge":
            raise ShardError(
                f"{out}: {len(missing)} of {len(hashes)} shards are not there yet or were made from other rows, the "
                f"first is {shard_name(missing[0])}. Run the parts that make them, then merge again."
            )
        done = sum(h.rows for n, h in enumerate(heads) if h is not None and n not in missing)
        return TokenizeResult(out, layout, False, done, len(bad), made, kept)
    if not any(head.rows for head in heads if head is not None):
        raise ManifestError(f"every one of {len(bad)} items is bad, the first: {bad[0]['reason']}")
    if bad or (out / REJECTED).exists():
        atomic_write_text(out / REJECTED, "".join(map(json_line, bad)))
    if made or not (out / INDEX).is_file() or cfg.stage == "merge":
        # Shards of a former, longer manifest would only confuse whoever looks into the folder.
        for path in out.glob("shard-*.parquet"):
            number = path.stem.removeprefix("shard-")
            if number.isdecimal() and int(number) >= len(hashes):
                path.unlink()
        write_index(out, layout, len(hashes), {"num_rejected": len(bad)})
    total = sum(head.rows for head in heads if head is not None)
    return TokenizeResult(out, layout, True, total, len(bad), made, kept)


def _read_manifests(cfg: TokenizeConfig) -> tuple[list[Utterance], list[Rejected]]:
    manifests = as_list(cfg.manifest)
    if not manifests:
        raise ConfigError("no manifest was given; name at least one with --manifest.")
    utterances: list[Utterance] = []
    rejected: list[Rejected] = []
    seen: dict[tuple[str, str], Utterance] = {}
    for path in manifests:
        scan = scan_manifest(path)
        if not cfg.skip_bad and scan.rejected:
            read_manifest(path)  # raises, naming the first
        rejected += scan.rejected
        if scan.unknown_keys:
            keys = ", ".join(f"{key!r} ({count} x)" for key, count in scan.unknown_keys.most_common(8))
            print(f"{path}: keys that mean nothing here were ignored: {keys}")
        for utterance in scan.utterances:
            first = seen.setdefault((utterance.dataset, utterance.id), utterance)
            if first is utterance:
                utterances.append(utterance)
                continue
            reason = (
                f"id {utterance.id!r} of data set {utterance.dataset!r} stands already at {first.manifest}:"
                f"{first.line}. Ids must be unique in a data set. Rename one, or give the lines another 'dataset'."
            )
            if not cfg.skip_bad:
                raise ManifestError(f"{utterance.manifest}:{utterance.line}: {reason}")
            rejected.append(Rejected(utterance.id, utterance.manifest, utterance.line, reason))
    if not utterances:
        raise ManifestError(f"every one of {len(rejected)} lines is bad, the first: {rejected[0].reason}")
    return utterances, rejected


def _with_tasks(layout: TokenLayout, task_file: str | None) -> TokenLayout:
    """Add the special tokens of the user's tasks."""
    if task_file is None:
        return layout
    special = dict(layout.special) | {f"task:{t.name}": t.id for t in load_tasks(task_file).values()}
    return replace(layout, special=tuple(sorted(special.items(), key=lambda item: item[1])))


def _inputs_sha256(group: Sequence[Utterance], layout: TokenLayout, cfg: TokenizeConfig) -> str:
    """Hash of what a shard is made from: its rows, the layout (with the tokenizers), and whether to resample."""
    rows = [
        [
            u.id,
            u.dataset,
            u.speaker,
            u.lang,
            u.text,
            u.start,
            u.duration,
            u.audio and [u.audio.name, _size(u.audio)],
        ]
        for u in group
    ]
    return hashlib.sha256(json.dumps([layout.sha256, cfg.resample, rows]).encode()).hexdigest()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _is_done(out: Path, number: int, sha256: str, layout: TokenLayout, cfg: TokenizeConfig) -> bool:
    """Whether a former run has made this shard from the same rows; what it skipped must be allowed now, too."""
    head = read_head(out / shard_name(number))
    if head is None or head.inputs_sha256 != sha256 or head.layout_sha256 != layout.sha256:
        return False
    return cfg.skip_bad or not head.rejected


def _parse_shard(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 1
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise ConfigError(f"shard must be i/N with 0 <= i < N, e.g. 0/4, got {text!r}.")
    return int(match[1]), int(match[2])


def _print_summary(result: TokenizeResult, num_shards: int) -> None:
    shards = f"{result.shards_made} shards made, {result.shards_kept} kept"
    if not result.complete:
        print(
            f"{result.out}: {shards}; other parts of the {num_shards} are not there yet, so there is no index so far."
        )
    else:
        print(f"{result.out}: {result.num_utterances} utterances, {shards}, layout {result.layout}")
    if result.num_rejected:
        where = f", see {result.out / REJECTED}" if result.complete else ""
        print(f"{result.num_rejected} bad items were left out{where}")
