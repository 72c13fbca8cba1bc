"""The ops beside their rivals, row after row in one process: ``python -m benchmarks.gpu_check.kernels --rows 1p7b_8k``.

Shapes, inputs and checks are those of ``benchmarks/ops``; inputs are made on the device, and rivals that torch compiles
first are left out (``SPEECHLM_BENCH_RIVALS=all`` brings them back). Each row is announced before it begins, so that the
check that started this process can end one that hangs and go on with the next.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable

import torch

from benchmarks.common.emit import emit
from benchmarks.common.harness import Case, measure
from benchmarks.gpu_check.rows import FIRST_ROWS, OTHER_ROWS, name_of
from benchmarks.ops import (
    bench_decode_layer,
    bench_delay_pack,
    bench_kmeans_assign,
    bench_multistream_embed,
    bench_multistream_loss,
    bench_multistream_sample,
)
from speechlm_ext.utils.console import make_output_safe

MAKERS: dict[str, Callable[..., Case]] = {
    "decode_attention": bench_decode_layer.make_attention_case,
    "decode_rows": bench_decode_layer.make_rows_case,
    "delay_pack": bench_delay_pack.make_case,
    "kmeans_assign": bench_kmeans_assign.make_case,
    "kmeans_chunks": bench_kmeans_assign.make_chunks_case,
    "kmeans_lloyd": bench_kmeans_assign.make_lloyd_case,
    "multistream_embed": bench_multistream_embed.make_case,
    "multistream_loss": bench_multistream_loss.make_case,
    "multistream_sample": bench_multistream_sample.make_case,
}


def run_row(name: str, device: str, seconds: float) -> bool:
    """Measure one row and hand it over; False if the device is broken, so that no other row can run here."""
    emit({"begin": name})
    begun = time.monotonic()
    op, *words = name.split()
    try:
        row = measure(MAKERS[op](*words, device), seconds, is_strict=False)
        emit({"name": name, "took": round(time.monotonic() - begun, 1), **row})
    except Exception as error:  # noqa: BLE001 - a broken row must not hide the others
        emit({"name": name, "error": f"{type(error).__name__}: {error}"[:500]})
    if device == "cpu":
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        print(f"the device is broken after {name}: {error}", file=sys.stderr)
        return False
    return True


def main() -> int:
    """Measure the rows that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    every = [name_of(row) for row in (*FIRST_ROWS, *OTHER_ROWS)]
    parser.add_argument("--rows", nargs="+", default=every, help='"op shape ..." each; default: all')
    parser.add_argument("--row-seconds", type=float, default=8, help="after this time a row begins no round")
    arguments = parser.parse_args()
    os.environ.setdefault("SPEECHLM_BENCH_RIVALS", "eager")
    return 0 if all(run_row(name, arguments.device, arguments.row_seconds) for name in arguments.rows) else 3


if __name__ == "__main__":
    make_output_safe()
    sys.exit(main())
