# SPDX-License-Identifier: GPL-3.0-or-later
"""Run a function on several ranks of one machine, and fail loudly: never a hang, never a process left behind."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import logging
import multiprocessing as mp
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# What most ranks import sooner or later. A module that is not installed is left out.
_PRELOADED = (
    "tests.distributed",
    "pytest",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # torch's compiler, which every engine's optimizer imports
    "flashfusemoe_ds.ds.engine",
    "transformers.models.mixtral.modeling_mixtral",  # what all of Transformers' models import
)

# After one rank failed, the others usually fail too, because gloo notices a closed socket. They get this many seconds
# to report their own traceback.
_GRACE_S = 5.0


def run_ranks(
    world_size: int,
    fn: Callable[..., Any],
    *args: Any,
    timeout: float = 240.0,
    init: bool = True,
    accelerator: str = "cpu",
) -> list[Any]:
    """Call `fn(rank, world_size, *args)` on `world_size` ranks and return their results in rank order.

    Args:
        fn: a top-level function; its arguments and its result travel through pickle.
        timeout: seconds for the whole call, process start included.
        init: call deepspeed.init_distributed first (gloo on "cpu", nccl on "cuda").
        accelerator: "cpu", or "cuda" for one GPU per rank.

    Raises:
        RuntimeError: a rank raised or died; the text has every rank's traceback and the end of its output.
        TimeoutError: some ranks never answered; the text names them and shows where they stood.
    """
    with tempfile.TemporaryDirectory(prefix="run_ranks_") as folder, _accelerator(accelerator):
        context = _context(accelerator)
        ranks: list[mp.process.BaseProcess] = []
        pipes: list[Connection] = []
        try:
            for rank in range(world_size):
                receive, send = context.Pipe(duplex=False)
                process = context.Process(
                    target=_rank_main,
                    args=(rank, world_size, fn, args, init, accelerator, folder, timeout, send),
                    name=f"rank{rank}",
                    daemon=True,
                )
                process.start()
                send.close()  # else the pipe never reports end of file when the rank dies
                ranks.append(process)
                pipes.append(receive)
            replies, late = _collect(pipes, timeout)
            if late:
                _ask_for_stacks([ranks[rank] for rank in late])
        finally:
            _end(ranks)
            for pipe in pipes:
                pipe.close()
        return _results(replies, late, ranks, Path(folder), timeout)


def _context(accelerator: str) -> Any:
    if accelerator != "cpu":
        return mp.get_context("spawn")  # CUDA does not survive a fork
    # Imported once, in the server that the ranks are forked from: 0.1 s a rank instead of 8 s.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    return context


@contextlib.contextmanager
def _accelerator(name: str) -> Iterator[None]:
    """DeepSpeed reads DS_ACCELERATOR while it is imported, so children must be born with it."""
    before = os.environ.get("DS_ACCELERATOR")
    os.environ["DS_ACCELERATOR"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["DS_ACCELERATOR"]
        else:
            os.environ["DS_ACCELERATOR"] = before


def _rank_main(
    rank: int,
    world_size: int,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    init: bool,
    accelerator: str,
    folder: str,
    timeout: float,
    send: Connection,
) -> None:
    _redirect_output(_log_path(Path(folder), rank))
    try:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_SIZE=str(world_size),
            LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT="0",
            DS_ACCELERATOR=accelerator,
        )
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        import torch

        torch.set_num_threads(1)
        quiet_deepspeed()
        if init:
            import deepspeed

            # On CPUs DeepSpeed compiles a shared-memory all-reduce first, and fails where there is no C++ compiler.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            if accelerator == "cuda":
                torch.cuda.set_device(rank)
            deepspeed.init_distributed(
                dist_backend="gloo" if accelerator == "cpu" else "nccl",
                auto_mpi_discovery=False,
                verbose=False,
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout),
            )
        payload = pickle.dumps(("ok", fn(rank, world_size, *args)))
    except BaseException:  # a failed rank reports, whatever the failure was
        payload = pickle.dumps(("error", traceback.format_exc()))
    # Plain pickle: torch's own reducers would pass tensors as file descriptors, which end with this process.
    with contextlib.suppress(BrokenPipeError):
        send.send_bytes(payload)
    sys.stdout.flush()
    sys.stderr.flush()
    # Tearing gloo down in order needs every rank alive, which is not certain here; the kernel closes the sockets.
    os._exit(0)


def quiet_deepspeed() -> None:
    """Only DeepSpeed's errors; its warnings are one line per engine and rank."""
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.ERROR)
    for handler in logger.handlers:
        handler.setLevel(logging.ERROR)


def _redirect_output(path: Path) -> None:
    file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.close(file)
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), line_buffering=True)
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), line_buffering=True)
    faulthandler.enable(sys.stderr)
    faulthandler.register(signal.SIGUSR1, sys.stderr, all_threads=False)


def _log_path(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.log"


def _collect(pipes: list[Connection], timeout: float) -> tuple[dict[int, tuple[str, Any]], list[int]]:
    """Replies by rank, and the ranks that had sent none when time was up."""
    deadline = time.monotonic() + timeout
    replies: dict[int, tuple[str, Any]] = {}
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                replies[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                replies[rank] = ("died", None)
            if replies[rank][0] != "ok":
                deadline = min(deadline, time.monotonic() + _GRACE_S)
    return replies, sorted(waiting.values())


def _ask_for_stacks(ranks: list[mp.process.BaseProcess]) -> None:
    for process in ranks:
        if process.is_alive():
            os.kill(process.pid, signal.SIGUSR1)  # faulthandler writes the Python stack to the rank's log
    time.sleep(0.5)


def _end(ranks: list[mp.process.BaseProcess]) -> None:
    for process in ranks:
        process.join(timeout=0.5)
        if process.is_alive():
            process.terminate()
    for process in ranks:
        process.join(timeout=3.0)
        if process.is_alive():
            process.kill()
            process.join()


def _results(
    replies: dict[int, tuple[str, Any]],
    late: list[int],
    ranks: list[mp.process.BaseProcess],
    folder: Path,
    timeout: float,
) -> list[Any]:
    failed = [rank for rank, (kind, _) in sorted(replies.items()) if kind != "ok"]
    if not failed and not late:
        return [replies[rank][1] for rank in range(len(ranks))]
    parts = []
    for rank in failed:
        kind, text = replies[rank]
        if kind == "died":
            text = f"died without a word, exit code {ranks[rank].exitcode}"
        parts.append(f"--- rank {rank}:\n{text}{_log_tail(folder, rank)}")
    for rank in late:
        parts.append(f"--- rank {rank} was still running:{_log_tail(folder, rank)}")
    if failed:
        raise RuntimeError(f"rank(s) {failed} of {len(ranks)} failed\n" + "\n".join(parts))
    raise TimeoutError(f"rank(s) {late} of {len(ranks)} still running after {timeout:g} s\n" + "\n".join(parts))


def _log_tail(folder: Path, rank: int, lines: int = 30) -> str:
    path = _log_path(folder, rank)
    text = path.read_text(errors="replace").strip() if path.exists() else ""
    return "\n[output]\n" + "\n".join(text.splitlines()[-lines:]) if text else ""
