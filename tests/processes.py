"""Several processes with torch.distributed (gloo) in a test. One server imports torch; each process is its fork."""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.tensor", "torch.distributed.checkpoint", "ncmi_kernels"]
)


def _main(rank: int, size: int, store: str, result: Connection, function: Any, args: Any) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=timedelta(seconds=60)
        )
        result.send((True, function(*args)))
    except BaseException:
        result.send((False, traceback.format_exc()))
    finally:
        result.close()
        # No destroy_process_group: it may wait for processes that have failed.
        os._exit(0)


def run(size: int, function: Callable[..., Any], *args: Any, enough: int | None = None) -> list[Any]:
    """What `function(*args)` returns in each of `size` processes of one group, by rank; None for one that was killed.

    Waits for `enough` of them, or all. An exception in one of them fails the test with its traceback.
    """
    with tempfile.TemporaryDirectory() as directory:
        store = str(Path(directory) / "store")
        pipes = [FORKS.Pipe(duplex=False) for _ in range(size)]
        processes = [
            FORKS.Process(target=_main, args=(rank, size, store, pipe[1], function, args), daemon=True)
            for rank, pipe in enumerate(pipes)
        ]
        for process, (_, sending) in zip(processes, pipes, strict=True):
            process.start()
            sending.close()
        results: list[Any] = [None] * size
        failed = []
        waiting = {receiving: rank for rank, (receiving, _) in enumerate(pipes)}
        deadline = time.monotonic() + 150
        try:
            while len(waiting) > size - (enough or size):
                ready = wait(waiting, timeout=max(0, deadline - time.monotonic()))
                assert ready, f"ranks {sorted(waiting.values())} did not end"
                for receiving in ready:
                    rank = waiting.pop(receiving)
                    try:
                        good, value = receiving.recv()
                    except EOFError:  # killed
                        continue
                    if good:
                        results[rank] = value
                    else:
                        failed.append(f"rank {rank} of {size}:\n{value}")
        finally:
            for process in processes:
                process.kill()
                process.join()
        assert not failed, "\n".join(failed)
        return results
