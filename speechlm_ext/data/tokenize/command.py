"""``speechlm tokenize``: from manifests to a token folder, restartable and in parts.

Manifests are read, tokenizers are fitted or loaded, and the utterances are encoded into shards of ``rows_per_shard``.
Part ``i/N`` makes every N-th shard, so N machines with one shared folder (or folders copied together) make exactly
the shards of one machine. The run that finds all shards writes the index, last.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from speechlm_ext.audio.waveform import says_conversions, take_conversions
from speechlm_ext.data.manifest import read_manifests
from speechlm_ext.data.tokenize.fit import FOLDER, get_tokenizers
from speechlm_ext.data.tokenize.settings import TokenizeConfig
from speechlm_ext.data.tokenize.shards import REJECTED, ShardWriter, TokenizeResult
from speechlm_ext.errors import LayoutMismatchError
from speechlm_ext.layout import FILE_NAME, TokenLayout
from speechlm_ext.tasks import load_tasks
from speechlm_ext.tokenizers import TokenizerSet
from speechlm_ext.utils.options import as_list


@says_conversions()
def run_tokenize(cfg: TokenizeConfig) -> TokenizeResult:
    """Make a token folder, or this machine's part of one; see :class:`TokenizeConfig`.

    Raises:
        SpeechLMError: a setting or, without ``skip_bad``, the first bad item; the message names it.
    """
    out = Path(cfg.output_dir)
    manifest = read_manifests(as_list(cfg.manifest), skip_bad=cfg.skip_bad)
    if manifest.unknown_keys:
        keys = ", ".join(f"{key!r} ({count} x)" for key, count in manifest.unknown_keys.most_common(8))
        print(f"unknown keys of the manifests are ignored: {keys}")
    tokenizers = get_tokenizers(cfg, manifest.utterances)
    layout = _make_layout(cfg, tokenizers)
    if cfg.stage == "fit":
        print(f"fitted {', '.join(tokenizers.fingerprints())}: {out / FOLDER}, layout {layout}")
        return TokenizeResult(out, layout, False, 0, len(manifest.rejected), 0, 0)
    take_conversions()  # the recordings of the fit are read again and counted then
    shards = ShardWriter(out, layout, manifest.utterances, cfg.rows_per_shard, cfg.resample, cfg.skip_bad)
    part, num_parts = cfg.part
    merge = cfg.stage == "merge"
    mine = range(part, len(shards.groups), num_parts)
    todo = [] if merge else [n for n in mine if not shards.is_done(n)]
    shards.encode(todo, cfg.num_workers)
    num_kept = len(shards.groups) if merge else len(mine) - len(todo)
    result = shards.finish(manifest.rejected, num_made=len(todo), num_kept=num_kept, merge=merge)
    _print_summary(result, len(shards.groups))
    return result


def _make_layout(cfg: TokenizeConfig, tokenizers: TokenizerSet) -> TokenLayout:
    """The folder's layout, with the special tokens of the user's tasks, written into it."""
    out = Path(cfg.output_dir)
    layout = tokenizers.make_layout(delays=None if cfg.delays is None else as_list(cfg.delays))
    if cfg.task_file is not None:
        special = dict(layout.special) | {f"task:{t.name}": t.id for t in load_tasks(cfg.task_file).values()}
        layout = replace(layout, special=tuple(sorted(special.items(), key=lambda item: item[1])))
    if (out / FILE_NAME).is_file():
        difference = layout.first_difference(TokenLayout.load(out))
        if difference is not None:
            raise LayoutMismatchError(
                f"{out} already holds tokens of another layout ({difference}). Choose another output_dir."
            )
    layout.save(out)
    return layout


def _print_summary(result: TokenizeResult, num_shards: int) -> None:
    shards = f"{result.shards_made} shards made, {result.shards_kept} kept"
    if not result.complete:
        print(
            f"{result.out}: {shards} of {num_shards}; the others are not there yet, so there is no index so far."
        )
    else:
        print(f"{result.out}: {result.num_utterances} utterances, {shards}, layout {result.layout}")
    if result.num_rejected:
        where = f", see {result.out / REJECTED}" if result.complete else ""
        print(f"{result.num_rejected} bad items were left out{where}")
