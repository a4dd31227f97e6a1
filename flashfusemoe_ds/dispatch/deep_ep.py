# SPDX-License-Identifier: GPL-3.0-or-later
"""Expert parallelism through DeepEP (github.com/deepseek-ai/DeepEP): NVLink within a host, RDMA between hosts.

DeepEP's compact layout is this package's own contract (base.py): one row per (token, rank), weights transported and
never multiplied in, combine a plain sum over ranks. So a transport is its dispatch, its replay from a handle, and its
combine; the two classes below hide what differs between its releases. The class is found by name, never by version:

    1.x  Buffer          fixed-size NVLink buffers; NVSHMEM, and so RDMA, with more than 8 ranks
    2.x  ElasticBuffer   buffers sized for max_tokens_per_rank; NCCL's device API, kernels compiled at run time

Everything is launched on DeepEP's own stream and waited for by an event. Only a new dispatch stops the host, in its
start, until all ranks' counts are there. Tensors that both streams use are recorded on both by DeepEP.

Rows come ordered by source rank, then by token, whatever the timing: `Buffer` orders them so, `ElasticBuffer` if told
to. What was saved of one dispatch fits the handle of another with the same tokens and routes, as recomputation needs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor

from flashfusemoe_ds.config import DeepEPConfig
from flashfusemoe_ds.dispatch.base import Combined, Geometry, Pending
from flashfusemoe_ds.dispatch.timeout import group_timeout_s
from flashfusemoe_ds.types import Dispatched

MIN_NCCL = (2, 30, 4)  # ElasticBuffer's; its own check, at import, has the text of a failed comparison of files


class DeepEPDispatcher:
    """DeepEP's transport of one expert-parallel group, shared by all layers of one geometry.

    Making one is collective: it allocates and exchanges the buffers. So is `close`.

    Args:
        group: the process group; its rank p owns experts [p * e, (p + 1) * e).
        geometry: of every call. `geometry_refusal` must have found nothing against it, on every rank.
        settings: the section `deep_ep`.
    """

    name = "deep_ep"

    def __init__(self, group: torch.distributed.ProcessGroup, geometry: Geometry, settings: DeepEPConfig) -> None:
        self.group, self.geometry = group, geometry
        self.ep_size = torch.distributed.get_world_size(group)
        # DeepEP borrows the group's NCCL communicator, which does not exist before the group's first collective.
        _meet(group)
        with self._named("set-up"):
            module = _import()
            self._buffer = _which(module)(module, group, geometry, settings)
        # Releases that can be built with 32-bit ids say so.
        self._idx_dtype = getattr(module, "topk_idx_t", torch.int64)

    def start_dispatch(self, x_TD: Tensor, idx_TK: Tensor, weight_TK: Tensor) -> Pending[Dispatched]:
        self._check(x_TD)
        with self._named("dispatch"):
            sent = self._buffer.dispatch(x_TD, idx_TK.to(self._idx_dtype).contiguous(), weight_TK.contiguous())

        def arrive() -> Dispatched:
            _wait(sent.event, sent.x_RD, sent.idx_RK, sent.weight_RK)
            return Dispatched(sent.x_RD, sent.idx_RK.long(), sent.weight_RK, sent.num_routes, sent.handle)

        return Pending(arrive)

    def start_redispatch(self, x_TD: Tensor, handle: Any) -> Pending[Tensor]:
        self._check(x_TD)
        with self._named("replayed dispatch"):
            x_RD, event = self._buffer.redispatch(x_TD, handle)

        def arrive() -> Tensor:
            _wait(event, x_RD)
            return x_RD

        return Pending(arrive)

    def start_combine(self, y_RD: Tensor, handle: Any, weight_RK: Tensor | None = None) -> Combined:
        self._check(y_RD)
        with self._named("combine"):
            y_TD, weight_TK, event = self._buffer.combine(
                y_RD, handle, None if weight_RK is None else weight_RK.contiguous()
            )

        def arrive(rows: Tensor) -> Tensor:
            _wait(event, rows)
            return rows

        weights = None if weight_TK is None else Pending(lambda: arrive(weight_TK))
        return Combined(Pending(lambda: arrive(y_TD)), weights)

    def close(self) -> None:
        """Frees the buffers, once no layer needs them: collective, in the same order on every rank. Idempotent.

        A transport that was not closed keeps them until the process ends; DeepEP then prints a line about it.
        """
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            # DeepEP's own barrier ends the process if a rank is late; this one waits as long as the group allows.
            _meet(self.group)
            with self._named("close"):
                buffer.buffer.destroy()

    def _check(self, rows: Tensor) -> None:
        if self._buffer is None:
            raise ValueError("ep_backend deep_ep: the transport was closed, and a layer still uses it")
        if rows.dtype != self.geometry.dtype:
            raise ValueError(
                f"ep_backend deep_ep was set up for rows of {self.geometry.dtype} and got {rows.dtype}; "
                "it carries no other dtype"
            )
        assert rows.shape[1] == self.geometry.hidden_size and rows.is_contiguous()

    @contextlib.contextmanager
    def _named(self, operation: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            rank, ranks = torch.distributed.get_rank(), torch.distributed.get_process_group_ranks(self.group)
            raise RuntimeError(
                f"ep_backend deep_ep: {operation} failed on rank {rank} of the expert-parallel group of ranks "
                f"{ranks}. If it timed out, another of them has died, is late, or has not called the layers in the "
                f"same order ({error})"
            ) from error


# --- what differs between DeepEP's releases ----------------------------------------------------------------------


class _Sent(NamedTuple):
    """A dispatch under way. The tensors may be read once the current stream waits for the event."""

    x_RD: Tensor
    idx_RK: Tensor
    weight_RK: Tensor
    num_routes: int
    handle: Any
    event: Any


class _Buffer1:
    """DeepEP 1.x."""

    min_nccl = None

    def __init__(
        self, module: ModuleType, group: torch.distributed.ProcessGroup, geometry: Geometry, settings: DeepEPConfig
    ) -> None:
        ep_size = torch.distributed.get_world_size(group)
        self.num_experts = geometry.num_experts
        self.dispatch_config, self.combine_config = self._configs(module, ep_size, settings)
        nvl_bytes, rdma_bytes = self._sizes(module, ep_size, geometry, settings)
        self.buffer = module.Buffer(
            group, nvl_bytes, rdma_bytes, num_qps_per_rank=max(24, settings.num_sms), explicitly_destroy=True
        )

    def dispatch(self, x_TD: Tensor, idx_TK: Tensor, weight_TK: Tensor) -> _Sent:
        per_rank, per_host, per_expert, goes_TP, _ = self.buffer.get_dispatch_layout(idx_TK, self.num_experts)
        *sent, counts, handle, event = self.buffer.dispatch(
            x_TD,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_host,
            is_token_in_rank=goes_TP,
            num_tokens_per_expert=per_expert,
            topk_idx=idx_TK,
            topk_weights=weight_TK,
            config=self.dispatch_config,
            async_finish=True,
        )
        return _Sent(*sent, sum(counts), handle, event)

    def redispatch(self, x_TD: Tensor, handle: Any) -> tuple[Tensor, Any]:
        x_RD, *_, event = self.buffer.dispatch(x_TD, handle=handle, config=self.dispatch_config, async_finish=True)
        return x_RD, event

    def combine(self, y_RD: Tensor, handle: Any, weight_RK: Tensor | None) -> tuple[Tensor, Tensor | None, Any]:
        return self.buffer.combine(y_RD, handle, topk_weights=weight_RK, config=self.combine_config, async_finish=True)

    @staticmethod
    def _configs(module: ModuleType, ep_size: int, settings: DeepEPConfig) -> tuple[Any, Any]:
        """Chunk sizes for `num_sms`, passed with every call: a handle only fits calls of the same number, and the
        class attribute from which DeepEP would take it is anybody's."""
        before = module.Buffer.num_sms
        module.Buffer.set_num_sms(settings.num_sms)
        try:
            return module.Buffer.get_dispatch_config(ep_size), module.Buffer.get_combine_config(ep_size)
        finally:
            module.Buffer.set_num_sms(before)

    @classmethod
    def _sizes(cls, module: ModuleType, ep_size: int, geometry: Geometry, settings: DeepEPConfig) -> tuple[int, int]:
        """Bytes of the NVLink buffer and of the RDMA buffer."""
        row, configs = geometry.hidden_size * geometry.dtype.itemsize, cls._configs(module, ep_size, settings)
        nvl = max(config.get_nvl_buffer_size_hint(row, ep_size) for config in configs)
        # One host needs none, and DeepEP asserts that it gets none.
        rdma = 0 if ep_size <= 8 else max(config.get_rdma_buffer_size_hint(row, ep_size) for config in configs)
        return nvl, rdma

    @classmethod
    def refusal(cls, module: ModuleType, ep_size: int, geometry: Geometry, settings: DeepEPConfig) -> str | None:
        hidden, local = geometry.hidden_size, geometry.num_experts // ep_size
        # Within a host it asserts multiples of 16 alone. But its combine has lanes without a 16-byte piece pass by the
        # warp's barriers (read in 1.2.1's source), and a model of hidden size 128 got NaN gradients (two H200s).
        if hidden % 256:
            return f"hidden size {hidden}: DeepEP 1.x takes multiples of 256"
        if ep_size <= 8 and hidden > 8176:
            return f"hidden size {hidden}: DeepEP 1.x takes up to 8176 within a host"
        if ep_size <= 8 and local > 128:
            return f"{local} experts per rank: DeepEP 1.x takes up to 128 within a host"
        try:
            cls._sizes(module, ep_size, geometry, settings)
        except Exception as error:  # an assertion in Python for a size it does not know, one in C++ without NVSHMEM
            return f"ep_size {ep_size}: DeepEP 1.x takes 2, 4, 8 and some multiples of 8 ({_one_line(error)})"
        return None


class _Buffer2:
    """DeepEP 2.x.

    Each rank has one expert more than the layer, with no tokens. A rank with more tokens than fit sends each rank one
    row for that expert instead of its own rows; the counts, which every host reads anyway, then say so everywhere.
    """

    min_nccl = MIN_NCCL

    def __init__(
        self, module: ModuleType, group: torch.distributed.ProcessGroup, geometry: Geometry, settings: DeepEPConfig
    ) -> None:
        self.ep_size = torch.distributed.get_world_size(group)
        self.num_local_experts = geometry.num_experts // self.ep_size
        self.max_tokens, self.num_sms = settings.max_tokens_per_rank, settings.num_sms
        try:
            self.buffer = module.ElasticBuffer(
                group,
                num_max_tokens_per_rank=self.max_tokens,
                hidden=geometry.hidden_size,
                num_topk=geometry.top_k,
                deterministic=True,
                explicitly_destroy=True,
                **_timeouts(group),
            )
        except RuntimeError as error:
            if "GIN is unavailable" not in str(error):  # a property of the communicator: all ranks are told alike
                raise
            raise ValueError(
                "ep_backend deep_ep: NCCL has no GIN here, with which DeepEP 2.x reaches other hosts by RDMA; if all "
                "ranks are on one host, start them with EP_DISABLE_GIN=1 in their environment"
            ) from error

    def dispatch(self, x_TD: Tensor, idx_TK: Tensor, weight_TK: Tensor) -> _Sent:
        num_tokens = x_TD.shape[0]
        if num_tokens > self.max_tokens:
            idx_TK = self._alarms(idx_TK)
            # The weights, which nobody multiplies by, say how many tokens there were.
            x_TD, weight_TK = x_TD[: idx_TK.shape[0]], torch.full_like(weight_TK[: idx_TK.shape[0]], num_tokens)
        else:
            idx_TK = self._beside_spare(idx_TK)
        x_RD, idx_RK, weight_RK, handle, event = self.buffer.dispatch(
            x_TD,
            topk_idx=idx_TK,
            topk_weights=weight_TK,
            num_experts=(self.num_local_experts + 1) * self.ep_size,
            num_max_tokens_per_rank=self.max_tokens,
            num_sms=self.num_sms,
            async_with_compute_stream=True,
            do_cpu_sync=True,
        )
        *counts, alarms = handle.num_recv_tokens_per_expert_list
        if alarms:
            _wait(event, idx_RK, weight_RK)
            most = int(weight_RK[idx_RK == self.num_local_experts].max())
            raise ValueError(
                f"flashfusemoe.deep_ep.max_tokens_per_rank is {self.max_tokens}, and in this call {alarms} of the "
                f"{self.ep_size} ranks have more tokens, up to {most}; set it to at least that"
            )
        return _Sent(x_RD, idx_RK, weight_RK, sum(counts), handle, event)

    def redispatch(self, x_TD: Tensor, handle: Any) -> tuple[Tensor, Any]:
        x_RD, *_, event = self.buffer.dispatch(
            x_TD, handle=handle, num_sms=handle.num_sms, do_expand=handle.do_expand, async_with_compute_stream=True
        )
        return x_RD, event

    def combine(self, y_RD: Tensor, handle: Any, weight_RK: Tensor | None) -> tuple[Tensor, Tensor | None, Any]:
        return self.buffer.combine(
            y_RD, handle, topk_weights=weight_RK, num_sms=handle.num_sms, async_with_compute_stream=True
        )

    def _beside_spare(self, idx_TK: Tensor) -> Tensor:
        """Expert p * e + i, of the layer, is p * (e + 1) + i of the buffer; -1 stays."""
        e = self.num_local_experts
        return idx_TK.mul(e + 1).div_(e, rounding_mode="floor").clamp_(min=-1)

    def _alarms(self, idx_TK: Tensor) -> Tensor:
        """As few rows as hold every rank's spare expert, [ceil(P / K), K]."""
        e, top_k = self.num_local_experts, idx_TK.shape[1]
        spare = torch.arange(self.ep_size, dtype=idx_TK.dtype, device=idx_TK.device) * (e + 1) + e
        return torch.nn.functional.pad(spare, (0, -self.ep_size % top_k), value=-1).view(-1, top_k)

    @classmethod
    def refusal(cls, module: ModuleType, ep_size: int, geometry: Geometry, settings: DeepEPConfig) -> str | None:
        hidden, local = geometry.hidden_size, geometry.num_experts // ep_size
        if hidden % 256:
            return f"hidden size {hidden}: DeepEP 2.x takes multiples of 256"
        if local > 255 or geometry.num_experts + ep_size > 2048:
            return (
                f"{geometry.num_experts} experts, {local} per rank: DeepEP 2.x takes up to 255 per rank, and with one "
                "more per rank up to 2048 in all"
            )
        if settings.max_tokens_per_rank * geometry.top_k < ep_size:
            return f"deep_ep.max_tokens_per_rank is {settings.max_tokens_per_rank}, less than ep_size / top_k"
        return None


# --- what can be used --------------------------------------------------------------------------------------------


def machine_refusal() -> str | None:
    """Why DeepEP cannot be used by this process; None if it can. No collective."""
    reason = _gpu_refusal()
    if reason is not None:
        return reason
    try:
        buffer = _which(_import())
    except Exception as error:  # a broken installation may raise anything
        return f"package deep_ep does not import ({_one_line(error)}){_nccl_is()}"
    if buffer is None:
        return "package deep_ep has neither Buffer nor ElasticBuffer; install one from github.com/deepseek-ai/DeepEP"
    nccl = loaded_nccl_version()
    if buffer.min_nccl is not None and nccl is not None and nccl < buffer.min_nccl:
        return f"DeepEP 2.x needs NCCL {_dotted(buffer.min_nccl)} or newer{_nccl_is()}"
    if torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory:
        return (
            "deterministic algorithms are on, and torch would fill new buffers beside DeepEP's stream; "
            "set torch.utils.deterministic.fill_uninitialized_memory = False"
        )
    return None


def geometry_refusal(ep_size: int, geometry: Geometry, settings: DeepEPConfig) -> str | None:
    """Why DeepEP cannot carry such rows; None if it can. Needs a machine without a refusal. No collective."""
    if geometry.num_experts % ep_size:
        return f"ep_size is {ep_size}; it must divide num_experts ({geometry.num_experts})"
    if geometry.dtype != torch.bfloat16:
        return f"rows of {str(geometry.dtype).removeprefix('torch.')}: DeepEP adds up bfloat16 alone"
    if geometry.top_k > 32:
        return f"top_k {geometry.top_k}: DeepEP takes up to 32"
    if torch.cuda.is_available():
        sms = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
        if settings.num_sms > sms:
            return f"deep_ep.num_sms is {settings.num_sms}; this GPU has {sms}"
    module = _import()
    return _which(module).refusal(module, ep_size, geometry, settings)


def class_in_package() -> str:
    """The class that is used, on a machine without a refusal."""
    return "ElasticBuffer" if _which(_import()) is _Buffer2 else "Buffer"


def loaded_nccl_version() -> tuple[int, int, int] | None:
    """Version of the NCCL library in this process, None without one. `torch.cuda.nccl.version()` is that of the
    headers torch was compiled with, which stays when another library is loaded."""
    code = ctypes.c_int()
    try:
        ctypes.CDLL("libnccl.so.2", mode=os.RTLD_NOLOAD | os.RTLD_LAZY).ncclGetVersion(ctypes.byref(code))
    except (OSError, AttributeError):  # not loaded, or linked into torch
        return None
    return code.value // 10000, code.value % 10000 // 100, code.value % 100


def _import() -> ModuleType:
    import deep_ep  # not at the top: it is optional, and its import looks for compilers and libraries

    return deep_ep


def _which(module: ModuleType) -> type[_Buffer1] | type[_Buffer2] | None:
    """2.x has Buffer too, for old callers."""
    if hasattr(module, "ElasticBuffer"):
        return _Buffer2
    return _Buffer1 if hasattr(module, "Buffer") else None


def _gpu_refusal() -> str | None:
    if not torch.cuda.is_available():
        return "it needs CUDA GPUs, and torch sees none"
    if not torch.distributed.is_nccl_available():
        return "it needs NCCL, and this torch has none"
    return None


# --- small things ------------------------------------------------------------------------------------------------


def _wait(event: Any, *tensors: Tensor) -> None:
    """Makes the current stream wait. DeepEP knows the stream of the start; this one may be another."""
    event.current_stream_wait()
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


def _meet(group: torch.distributed.ProcessGroup) -> None:
    """A barrier that is sure to use the GPUs' backend, which a group may have beside one for the CPU."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    torch.distributed.all_reduce(torch.zeros(1, device=device), group=group)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timeouts(group: torch.distributed.ProcessGroup) -> dict[str, int]:
    """ElasticBuffer's patience from the group's; the host, which can say what happened, gives up before the GPU."""
    seconds = group_timeout_s(group, torch.device("cuda"))
    if seconds is None:  # DeepEP's own
        return {}
    return {"num_cpu_timeout_secs": max(1, int(0.9 * seconds)), "num_gpu_timeout_secs": max(2, int(seconds))}


def _nccl_is() -> str:
    nccl = loaded_nccl_version()
    return "" if nccl is None else f"; the NCCL library in this process is {_dotted(nccl)}"


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
