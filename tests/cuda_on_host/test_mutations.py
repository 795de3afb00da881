"""What the other tests here measure, broken on purpose: each of them fails."""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.cuda_on_host import test_kernels, test_sizes, test_streams
from tests.cuda_on_host.host import Host, serving
from tests.cuda_on_host.library import broken, build

PASSED, FAILED, ELSE = 0, 1, 2


def outcome(library: Path, test: Callable[[Host], None]) -> int:
    """Of a test in a process of its own, which may be killed: an index may lead anywhere."""
    child = os.fork()
    if child == 0:
        status = ELSE
        try:
            faulthandler.disable()
            signal.alarm(120)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            with serving(library) as host:
                test(host)
            status = PASSED
        except (AssertionError, RuntimeError, pytest.fail.Exception):
            status = FAILED
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return FAILED if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)


def updates(host: Host) -> None:
    test_kernels.test_updates(host, "adamw_direction_", torch.float32)


def moments(host: Host) -> None:
    test_kernels.test_updates(host, "adamw_direction_8bit_", torch.float32)


def codes(host: Host) -> None:
    test_kernels.test_storage(host, "quantize_blockwise_", torch.float32)


def lists(host: Host) -> None:
    test_kernels.test_lists(host, "adamw_direction_", 70)


def norms(host: Host) -> None:
    for how in ("rows", "columns"):
        test_kernels.test_matrices(host, "column_norms", torch.float32, how)


def coordinates(host: Host) -> None:
    test_kernels.test_matrices(host, "coordinate_add_", torch.float32, "rows")


def tall(host: Host) -> None:
    with pytest.MonkeyPatch.context() as patch:
        make = test_sizes.of_rows
        test_sizes.test_more_rows_than_a_grid_has(host, "coordinate_add_", make, False, patch)


def tables(host: Host) -> None:
    test_streams.test_tables_need_not_outlive_the_call(host, "stochastic_round_")


def streams(host: Host) -> None:
    test = test_streams.test_each_op_runs_on_the_device_of_its_tensors_and_its_current_stream
    test(host, "moment_")


def failures(host: Host) -> None:
    test_streams.test_a_launch_that_fails_raises(host, "moment_")


def stale(host: Host) -> None:
    test_streams.test_an_error_that_another_library_left_is_left_to_it(host, "moment_")


def applies(host: Host) -> None:
    test_sizes.test_applies_beyond_2_31(host, "apply_scaled")


THREAD = "int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;"
BROKEN = {
    "a tail too long": ("update.cu", "i < n; i += step", "i <= n; i += step", updates),
    "a tail too short": ("update.cu", "i < n; i += step", "i < n - 1; i += step", updates),
    "no barrier after the maps": ("block.cu", "__syncthreads();", "", moments),
    "no barrier after the sums": ("matrix.cu", "__syncthreads();", "", norms),
    "a barrier that some miss": (
        "matrix.cu",
        "sums[threadIdx.y][threadIdx.x] = sum;",
        "if (j >= a.cols) return;\n  sums[threadIdx.y][threadIdx.x] = sum;",
        norms,
    ),
    "half a warp": ("block.cu", "int offset = 16;", "int offset = 8;", codes),
    "lanes that have left": (
        "matrix.cu",
        "if (j >= a.cols) return;",
        "if (j >= a.cols || threadIdx.x >= a.rows) return;",
        norms,
    ),
    "a short list": ("update.cu", "from += LRO_LIST", "from += LRO_LIST + 1", lists),
    "bisection": ("matrix.cu", "k = middle + 1;", "k = middle + 2;", coordinates),
    "one row for each block": (
        "matrix.cu",
        "o < outer; o += gridDim.y",
        "o < outer; o = outer",
        tall,
    ),
    "32 bits in an update": (
        "update.cu",
        THREAD,
        THREAD.replace("int64_t i", "int i"),
        test_sizes.test_rows_of_moments_beyond_2_31,
    ),
    "32 bits in an apply": ("matrix.cu", "int64_t at = i *", "int at = i *", applies),
    "32 bits in a block": (
        "block.cu",
        "begin = row * cols + at;",
        "begin = (int)(row * cols + at);",
        test_sizes.test_8bit_moments_beyond_2_31,
    ),
    "an error that is dropped": (
        "common.cuh",
        "return LRO_CUDA_ERROR + (int)error",
        "return 0",
        failures,
    ),
    "an error that is left": ("common.cuh", "  cudaGetLastError();\n", "", failures),
    "the error of another": (
        "common.cuh",
        "if (error == cudaSuccess)",
        "error = cudaGetLastError();\n  if (error == cudaSuccess)",
        stale,
    ),
    "no stream": (
        "common.cuh",
        "args, 0, (cudaStream_t)stream",
        "args, 0, stream ? nullptr : nullptr",
        streams,
    ),
    "a table of the host": (
        "update.cu",
        "list.value[k] = a->values[from + k];",
        "list.value[k] = (const float*)(a->values + from + k);",
        tables,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_found(what: str, cache: Path, library: Path, tmp_path: Path) -> None:
    file, old, new, test = BROKEN[what]
    sources = broken(tmp_path, file, old, new)
    assert outcome(library, test) == PASSED
    assert outcome(build(cache, sources), test) == FAILED
