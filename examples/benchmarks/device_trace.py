# SPDX-License-Identifier: GPL-3.0-or-later
"""What a GPU did in profiled training steps: every kernel with its time, stream, role, step and phase.

Read from the Chrome trace that torch.profiler exports.

Exposed communication of a role (dense gradients, say) in a step is the time during which at least one kernel of a
collective of that role runs on this GPU, and no compute kernel does:

    | union of the role's kernels, launched in the step  \\  union of all compute kernels |

- A collective's kernel runs from its launch until its last byte is there, so waiting for a slower rank counts. How
  much that is takes the other ranks' traces to tell: waiting.py.
- Compute kernels are those on the model's stream, the one with most kernel time outside of collectives. What runs on
  other streams, such as the packing of gradient buckets, hides nothing, and neither do copies and fills.
- Gaps between compute kernels, when the host does not keep up, hide nothing. The profiler slows the host, so this
  time is, if anything, longer than in a step that is not profiled.
- While the GPU waits for the experts' exchange, gradients that travel beside it count as exposed, although they delay
  nothing; how much remains without such time is given as well.

A collective's role follows from its operation and its process group, which the trace names: reductions of at least
`MIN_GRADIENT` elements over the data-parallel group are dense gradients, over the expert-data-parallel group experts'
gradients; smaller ones are norms, flags and capacities. A kernel belongs to the step and phase in which the host
launched it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from intervals import Interval, length, subtract, union

# Annotations of the training loop, for torch.profiler.record_function.
STEP, FORWARD, BACKWARD, OPTIMIZER = "train step", "train forward", "train backward", "train optimizer"

MIN_GRADIENT = 256
_LAUNCHES = ("cuda_runtime", "cuda_driver")
# flashfusemoe_ds's exchange through peer memory, and DeepEP: no collectives by name.
_PEER_KERNELS = (
    "stage_dispatch_kernel", "plan_kernel", "fetch_dispatch_kernel", "stage_rows_kernel", "fetch_rows_kernel",
    "sum_home_kernel",
)  # fmt: skip
_DEEP_EP = "deep_ep"


class Role(str, Enum):
    """What a kernel is for."""

    COMPUTE = "compute"
    DENSE = "dense gradients"
    EXPERTS = "experts' gradients"
    EXCHANGE = "experts' exchange"
    PARAMETERS = "ZeRO's parameters"
    OTHER = "other communication"
    COPY = "copies and fills"


COMMUNICATION = (Role.DENSE, Role.EXPERTS, Role.EXCHANGE, Role.PARAMETERS, Role.OTHER)


@dataclass(frozen=True)
class Groups:
    """Names of the process groups, as the trace has them, and the number of ranks that share an expert."""

    dense: frozenset[str]
    experts: frozenset[str]
    expert_ranks: int


@dataclass(frozen=True)
class Collective:
    """What a trace tells of a collective: its operation, the name of its process group and the number of ranks there,
    and the elements of this rank's input."""

    operation: str
    group: str
    ranks: int
    elements: int


@dataclass(frozen=True)
class Kernel:
    """One kernel, copy or fill. Times in ms on the trace's clock; `step` and `phase` are where it was launched;
    `collective` is None where it is none, or the trace does not tell."""

    name: str
    start: float
    end: float
    stream: int
    role: Role
    step: int | None
    phase: str | None
    collective: Collective | None = None

    @property
    def interval(self) -> Interval:
        return self.start, self.end


def read_kernels(trace: dict[str, Any], groups: Groups) -> list[Kernel]:
    """Everything that ran on the device, by start.

    Args:
        trace: a Chrome trace of one process that used one device.

    Raises:
        ValueError: a collective's kernel has no process group, and its name is not enough to tell its role.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    launched_at: dict[Any, float] = {}
    called_at: dict[Any, float] = {}  # by "External id" of the host's operation
    collectives: dict[Any, dict[str, Any]] = {}  # the same, of record_param_comms
    steps: list[Interval] = []
    phases: list[tuple[float, float, str]] = []
    on_device: list[tuple[dict[str, Any], bool]] = []
    for event in events:
        category, args = event.get("cat"), event.get("args", {})
        start, end = event["ts"] / 1e3, (event["ts"] + event["dur"]) / 1e3
        if category in _LAUNCHES and "correlation" in args:
            launched_at[args["correlation"]] = start
        elif category == "cpu_op" and "External id" in args:
            called_at[args["External id"]] = start
            if event["name"] == "record_param_comms":
                collectives[args["External id"]] = args
        elif category == "user_annotation" and event["name"] == STEP:
            steps.append((start, end))
        elif category == "user_annotation" and event["name"] in (FORWARD, BACKWARD, OPTIMIZER):
            phases.append((start, end, event["name"]))
        elif category in ("kernel", "gpu_memcpy", "gpu_memset"):
            on_device.append((event, category == "kernel"))
    steps.sort()
    phases.sort()

    kernels = []
    for event, is_kernel in on_device:
        args = event.get("args", {})
        role, collective = Role.COPY, None
        if is_kernel:
            metadata = args if "Collective name" in args else collectives.get(args.get("External id"), {})
            role, collective = _role(event["name"], metadata, groups), _collective(event["name"], metadata)
        launch = launched_at.get(args.get("correlation"), called_at.get(args.get("External id")))
        step = None if launch is None else _find(steps, launch)
        phase = None if launch is None else _find(phases, launch)
        start = event["ts"] / 1e3
        kernels.append(
            Kernel(
                event["name"],
                start,
                start + event["dur"] / 1e3,
                args.get("stream", 0),
                role,
                step,
                None if phase is None else phases[phase][2],
                collective,
            )
        )
    return sorted(kernels, key=lambda kernel: kernel.start)


def compute_intervals(kernels: Iterable[Kernel]) -> list[Interval]:
    """When a compute kernel runs on the model's stream."""
    by_stream: dict[int, list[Interval]] = defaultdict(list)
    for kernel in kernels:
        if kernel.role is Role.COMPUTE:
            by_stream[kernel.stream].append(kernel.interval)
    return union(max(by_stream.values(), key=length, default=[]))


def communication(kernels: list[Kernel], step: int) -> dict[str, tuple[float, float, float]]:
    """Role -> ms of a step: in which its collectives run; the exposed part; the part of that in which no collective of
    another role runs either, so that the GPU waits for nothing else."""
    compute = compute_intervals(kernels)
    out = {}
    for role in COMMUNICATION:
        own = [k.interval for k in kernels if k.role is role and k.step == step]
        others = [k.interval for k in kernels if k.role in COMMUNICATION and k.role is not role]
        bare = subtract(own, compute)
        out[role.value] = (length(own), length(bare), length(subtract(bare, others)))
    return out


def num_steps(kernels: Iterable[Kernel]) -> int:
    return 1 + max((k.step for k in kernels if k.step is not None), default=-1)


def _role(name: str, metadata: dict[str, Any], groups: Groups) -> Role:
    if any(kernel in name for kernel in _PEER_KERNELS) or _DEEP_EP in name:
        return Role.EXCHANGE
    if not name.startswith("nccl"):
        return Role.COMPUTE
    if not metadata:
        return _role_by_name(name, groups)
    collective, group = str(metadata["Collective name"]), _group(metadata)
    if "all_to_all" in collective or collective in ("send", "recv"):
        return Role.EXCHANGE
    if "reduce" in collective:
        if int(metadata.get("In msg nelems", 0)) < MIN_GRADIENT:
            return Role.OTHER
        return Role.DENSE if group in groups.dense else Role.EXPERTS if group in groups.experts else Role.OTHER
    if "gather" in collective or "broadcast" in collective:
        return Role.PARAMETERS if group in groups.dense | groups.experts else Role.OTHER
    return Role.OTHER


def _collective(name: str, metadata: dict[str, Any]) -> Collective | None:
    if not name.startswith("nccl") or not metadata or not _group(metadata) or "Group size" not in metadata:
        return None
    return Collective(
        str(metadata["Collective name"]),
        _group(metadata),
        int(metadata["Group size"]),
        int(metadata.get("In msg nelems", 0)),
    )


def _group(metadata: dict[str, Any]) -> str:
    return str(metadata.get("Process Group Name", "")).strip('"')


def _role_by_name(name: str, groups: Groups) -> Role:
    """Of a kernel like ncclDevKernel_AllReduce_Sum_bf16_RING_LL whose process group the trace does not tell. Sums of a
    few numbers then count as gradients."""
    if "SendRecv" in name or "AllToAll" in name:
        return Role.EXCHANGE
    if "AllGather" in name or "Broadcast" in name:
        return Role.PARAMETERS
    if "Reduce" in name and "_Sum_" in name:
        if groups.expert_ranks > 1:
            raise ValueError(f"the trace names no process group for {name}: dense gradients or experts' gradients?")
        return Role.DENSE
    return Role.OTHER


def _find(windows: list[Any], moment: float) -> int | None:
    """Index of the one that holds this moment; they are in order and do not overlap."""
    at = bisect_right(windows, moment, key=lambda window: window[0]) - 1
    return at if at >= 0 and moment <= windows[at][1] else None
