"""The shim: right kernels give right values, and planted faults are found at their line, in any order of threads."""

from __future__ import annotations

import math
import re
import subprocess

import numpy as np
import pytest

from python_tests import cuda_on_cpu

SOURCES = sorted((cuda_on_cpu.HERE / "selftest").glob("*.cu"))
BLOCK = 96

RIGHT = {
    "block_sum": [float(sum(i % 7 for i in range(1000) if i // BLOCK % 3 == block)) for block in range(3)],
    "copy_async": [float(v) for v in range(BLOCK - 1, -1, -1) for _ in range(4)],
    "warp_exchange": [float(v ^ 1) for v in range(BLOCK)],
    "count": [float(sum(range(BLOCK)))],
    "vote_and_reduce": [float(BLOCK // 2), 1.0, float(sum(range(32))), 31.0, float(np.float32(0x55555555))],
    "shuffles": [
        float(
            (lane - 3 if lane >= 3 else lane)
            + 100 * (lane + 5 if lane < 27 else lane)
            + 10000 * (lane // 8 * 8 + 2)
        )
        for lane in (i % 32 for i in range(BLOCK))
    ],
    # Bits 0, 3, …, 30; min of signed -20…11 and of the same bits unsigned; and, or, xor of 1 << lane % 8 | 256, where
    # the last lane gives none to the xor.
    "warp_values": [float(np.float32(0x49249249)), 1.0, -20.0, 0.0, 31.0, 256.0, 511.0, 256.0 + 128.0],
    "atomics": [-55.0, 55.0, -float(sum(range(BLOCK))), float((BLOCK - 1) ** 2), 1.0, 1.0]
    + [float(np.float32(0xFFFFFFFF)), float(np.float32(0xFFFF0000))]
    + [
        float(sum(1 << b for b in range(5) if len(range(b, BLOCK, 5)) % 2)),
        float(BLOCK),
        -BLOCK / 2,
        BLOCK / 2,
    ],
    "cached_access": [float(i * i + (BLOCK - 1 - i) ** 2) for i in range(BLOCK)],
    "three_dimensions": [float(v) for v in range(4 * 3 * 2 * 2 * 3 * 2)],
    "cub": [2.0, 3.0, 0.0, 1.0, 0.0, 5.0, 9.0, 12.0],
    "sixteen_bits": [1.0, 1.0 + 2**-7, 1.0, 1.0 + 2**-10, math.inf, 2.0**-24],
    "last_block": [2.0 * 6] * BLOCK + [0.0],
    "chain": [7.0],
    "exchange_by_global": [float(v) for v in range(BLOCK - 1, -1, -1)],
    "count_over_blocks": [6.0 * sum(range(BLOCK))],
    "wide_offsets": [1.0] * BLOCK,
    "dynamic_with_attribute": [1.0] * BLOCK,
}
#: Pattern of the message.
WRONG = {
    "missing_barrier": "read of shared memory that no thread|race on shared memory",
    "missing_second_barrier": "race on shared memory",
    "missing_syncwarp": "read of shared memory that no thread|race on shared memory",
    "wrong_mask": "missing 0xffff0000",
    "mask_without_caller": "lane 0 calls it with a mask that does not name it",
    "reads_missing_lane": "reads lane 20, which mask 0xffff does not name",
    "overrun": "shared-memory overrun: tile, byte 384 of 384",
    "dynamic_overrun": "shared-memory overrun: dynamic shared memory, byte 380 of 380",
    "shared_race": "race on shared memory: written here and by",
    "atomic_against_plain": "race on shared memory",
    "unwritten_shared": "read of shared memory that no thread",
    "divergent_barriers": "divergent block barriers",
    "barrier_after_exit": "after .* of 96 threads have left|the block cannot go on: .*block barrier",
    "collective_after_exit": "missing 0xc0000000",
    "misaligned": "misaligned float4",
    "async_without_wait": "read of shared memory that no thread",
    "out_of_bounds": "of global memory that belong to no argument",
    # Between blocks.
    "blocks_overlap": "race on global memory: written here and by thread .* of block",
    "reads_after_arrival": "race on global memory: .* with no fence, atomic operation and fence between",
    "missing_first_fence": "race on global memory: .* with no fence, atomic operation and fence between",
    "missing_last_fence": "race on global memory: .* with no fence, atomic operation and fence between",
    "fence_of_one_thread": "race on global memory: .* with no fence, atomic operation and fence between",
    "plain_flag": "race on global memory",
    "plain_read_of_counter": "race on global memory",
    "exchange_without_barrier": "race on global memory: .* of the same block, with no barrier between",
    "waits_for_all_blocks": "waits for another block",
    # Of a thread.
    "misaligned_vector": "misaligned access of 16 bytes",
    "misaligned_pair": "misaligned access of 8 bytes",
    "misaligned_shared": "misaligned access of 16 bytes",
    "overflow_of_int": "signed overflow of a product",
    "overflow_of_index": "a product of 32-bit indices is .* more than 32 bits",
    "shift_by_all_bits": "shift by",
    "into_the_next_array": "index 96 outside an array",
    "unset_index": "of global memory that belong to no argument",
    # Of a launch.
    "large_arrays": "too much shared memory: with second 49156 bytes of arrays",
    "large_parameters": "4104 bytes of parameters",
    "too_many_threads": "a block of 32 x 33 x 1 threads",
    "tall_grid": "a grid of 1 x 65536 x 1",
    "dynamic_without_attribute": "50176 bytes of dynamic shared memory",
}
#: Faults that only a test of the results finds.
WRONG_VALUES = {"forgets_the_last", "lost_update", "unset_value"}


@pytest.fixture(scope="module")
def shim():
    return cuda_on_cpu.load()


def planted_lines(name: str) -> set[tuple[str, int]]:
    return {
        (source.name, number)
        for source in SOURCES
        for number, line in enumerate(source.read_text().splitlines(), 1)
        if re.search(rf"PLANTED {name}\b", line)
    }


def test_every_kernel_has_an_expectation(shim):
    assert set(shim.selftest_names()) == set(RIGHT) | set(WRONG) | WRONG_VALUES


@pytest.mark.parametrize("seed", cuda_on_cpu.SEEDS)
@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels(shim, name, seed):
    shim.set_seed(seed)
    np.testing.assert_array_equal(shim.selftest(name), RIGHT[name])


@pytest.mark.parametrize("seed", cuda_on_cpu.SEEDS)
@pytest.mark.parametrize("name", WRONG)
def test_planted_faults(shim, name, seed):
    shim.set_seed(seed)
    with pytest.raises(RuntimeError, match=WRONG[name]) as caught:
        shim.selftest(name)
    lines = planted_lines(name)
    assert lines
    named = {(file, int(n)) for file, n in re.findall(r"(\w+\.cu):(\d+)", str(caught.value))}
    assert named & lines, f"{caught.value}\ndoes not name one of the lines {sorted(lines)}"


@pytest.mark.parametrize("seed", cuda_on_cpu.SEEDS)
def test_unwritten_output_is_poisoned(shim, seed):
    shim.set_seed(seed)
    out = shim.selftest("forgets_the_last")
    assert out[:-1] == [1.0] * 99 and math.isnan(out[-1])


@pytest.mark.parametrize("seed", cuda_on_cpu.SEEDS)
def test_unset_variable_has_a_value_that_no_test_expects(shim, seed):
    shim.set_seed(seed)
    out = shim.selftest("unset_value")
    assert out[:3] + out[4:] == [1.0] * (BLOCK - 1)
    assert out[3] == np.frombuffer(b"\xfe" * 4, np.int32)[0]


def test_blocks_interleave_at_atomic_operations(shim):
    """64 blocks add 1 by two atomic operations each: one after the other they would give 64."""
    counts = set()
    for seed in cuda_on_cpu.SEEDS:
        shim.set_seed(seed)
        counts |= set(shim.selftest("lost_update"))
    assert min(counts) < 64 and len(counts) > 2, counts


def test_a_seed_gives_one_order_and_another_another(shim):
    def message(seed):
        shim.set_seed(seed)
        with pytest.raises(RuntimeError) as caught:
            shim.selftest("shared_race")
        return str(caught.value)

    assert message(3) == message(3)
    assert len({message(seed) for seed in cuda_on_cpu.SEEDS}) > 4


def test_kernels_and_shim_under_address_and_undefined_sanitizers(monkeypatch):
    folder = cuda_on_cpu.BUILD.with_name("cuda-on-cpu-asan")
    cuda_on_cpu.build(folder, "programs", SHIM_SANITIZE="address,undefined")
    # The fibers of a kernel that ended with a fault are dropped, with the memory that they hold.
    monkeypatch.setenv("ASAN_OPTIONS", "detect_leaks=0")
    done = subprocess.run([str(folder / "selftest"), *RIGHT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n") == len(RIGHT) * len(cuda_on_cpu.SEEDS)
    done = subprocess.run([str(folder / "op_tests")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"[1-9]\d* passed, 0 failed", done.stdout)
    # The sanitizer really looks: it sees the overrun without the hooks.
    done = subprocess.run([str(folder / "selftest"), "overrun"], capture_output=True, text=True)
    assert done.returncode != 0 and re.search("AddressSanitizer|index 96 out of bounds", done.stderr)
