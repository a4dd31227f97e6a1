# SPDX-License-Identifier: GPL-3.0-or-later
"""What this machine has and which backends run on it: `python -m flashfusemoe_ds.report [--json]`.

Every entry is found on its own: a package that is missing or broken becomes a line of the report, never its end.
CUDA is first touched when the report is made, not when this module is imported.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed

import flashfusemoe_ds
from flashfusemoe_ds.dispatch.deep_ep import class_in_package, loaded_nccl_version
from flashfusemoe_ds.dispatch.select import EP_BACKENDS, resolve_hybrid, why_not
from flashfusemoe_ds.kernels.grouped_gemm import TorchGroupedGemm
from flashfusemoe_ds.kernels.select import why_not_hopper, why_not_triton

# Compiled against one torch or one driver, so that an installed one may still not load.
COMPILED_PACKAGES = ("triton", "deep_ep")
PURE_PACKAGES = ("deepspeed", "transformers")
GEMM_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Version:
    """A package or library, and its version or why there is none."""

    name: str
    version: str


@dataclass(frozen=True)
class Cpu:
    """The host: processor name, cores this process may use, memory in GiB (None if unknown)."""

    name: str
    cores: int
    memory_gib: float | None


@dataclass(frozen=True)
class Gpu:
    """One CUDA device, by torch's index; memory in GiB."""

    index: int
    name: str
    compute_capability: str
    memory_gib: float


@dataclass(frozen=True)
class Link:
    """From one GPU to another: peer access, and nvidia-smi's name of the path ("NV18", "SYS"; None if unknown)."""

    source: int
    target: int
    peer_access: bool
    path: str | None


@dataclass(frozen=True)
class Backend:
    """One value of a setting of the "flashfusemoe" section: whether it can be used here, and why (not)."""

    setting: str
    value: str
    usable: bool
    reason: str


@dataclass(frozen=True)
class Report:
    versions: list[Version]
    cpu: Cpu
    gpus: list[Gpu]
    links: list[Link]
    backends: list[Backend]


def make_report() -> Report:
    gpus = find_gpus()
    return Report(find_versions(), find_cpu(), gpus, find_links(len(gpus)), find_backends())


# --- versions ----------------------------------------------------------------------------------------------------


def find_versions() -> list[Version]:
    return [
        Version("flashfusemoe_ds", flashfusemoe_ds.__version__),
        Version("python", platform.python_version()),
        Version("torch", torch.__version__),
        Version("CUDA of torch", torch.version.cuda or "none: this torch was built for CPUs"),
        Version("NCCL", _or_error(_nccl_version)),
        *(Version(name, _or_error(_package_version, name)) for name in PURE_PACKAGES),
        *(Version(name, _or_error(_compiled_version, name)) for name in COMPILED_PACKAGES),
    ]


def _or_error(find: Callable[..., str], *args: object) -> str:
    try:
        return find(*args)
    except Exception as error:  # a broken installation may raise anything
        return f"unknown ({_one_line(error)})"


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _package_version(name: str) -> str:
    try:
        return metadata.version(name) or "unknown"
    except metadata.PackageNotFoundError:
        return "not installed"


def _compiled_version(name: str) -> str:
    """Imports the package: that is the only way to see whether its library loads."""
    version = _package_version(name)
    try:
        module = importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            return version if version == "not installed" else f"{version}, but there is no module {name}"
        return f"{version}, but its import fails ({_one_line(error)})"
    return version if version != "not installed" else str(getattr(module, "__version__", "unknown"))


def _nccl_version() -> str:
    if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        return "not in this torch"
    loaded = loaded_nccl_version()
    if loaded is None:
        return ".".join(map(str, torch.cuda.nccl.version())) + " (torch's headers)"
    return ".".join(map(str, loaded))


# --- hardware ----------------------------------------------------------------------------------------------------


def find_cpu() -> Cpu:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
        name = found[1].strip() if found else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError, AttributeError):
        memory = None
    return Cpu(name, cores, memory)


def find_gpus() -> list[Gpu]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [Gpu(i, p.name, f"{p.major}.{p.minor}", p.total_memory / 2**30) for i, p in enumerate(properties)]


def find_links(num_gpus: int) -> list[Link]:
    if num_gpus < 2:
        return []
    physical = _physical_indices(num_gpus)
    topology = parse_topology(_nvidia_smi("topo", "-m"))
    with_nvlink = parse_nvlink(_nvidia_smi("nvlink", "-s"))
    links = []
    for i in range(num_gpus):
        for j in range(num_gpus):
            if i == j:
                continue
            pair = (physical.get(i), physical.get(j))
            path = topology.get(pair)
            if path is None and with_nvlink.issuperset(pair):
                path = "NVLink"
            links.append(Link(i, j, torch.cuda.can_device_access_peer(i, j), path))
    return links


def _nvidia_smi(*arguments: str) -> str:
    """Its output; "" where it is absent, fails or hangs."""
    try:
        done = subprocess.run(("nvidia-smi", *arguments), capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)


def _physical_indices(num_gpus: int) -> dict[int, int]:
    """torch's index -> nvidia-smi's, which does not know CUDA_VISIBLE_DEVICES. Matched by UUID."""
    listed = dict(re.findall(r"^GPU (\d+):.*\(UUID: GPU-([0-9a-f-]+)\)", _nvidia_smi("-L"), re.MULTILINE))
    by_uuid = {uuid: int(index) for index, uuid in listed.items()}
    found = {}
    for i in range(num_gpus):
        uuid = str(getattr(torch.cuda.get_device_properties(i), "uuid", "")).removeprefix("GPU-")
        if uuid in by_uuid:
            found[i] = by_uuid[uuid]
    return found


def parse_topology(text: str) -> dict[tuple[int, int], str]:
    """`nvidia-smi topo -m` -> the path between each pair of GPUs, by nvidia-smi's indices."""
    paths: dict[tuple[int, int], str] = {}
    columns: list[str] = []
    for line in text.splitlines():
        cells = line.split()
        if not columns:
            columns = [cell for cell in cells if re.fullmatch(r"GPU\d+", cell)]
        elif cells and re.fullmatch(r"GPU\d+", cells[0]):
            for column, path in zip(columns, cells[1:], strict=False):
                if path != "X":
                    paths[int(cells[0][3:]), int(column[3:])] = path
    return paths


def parse_nvlink(text: str) -> set[int]:
    """`nvidia-smi nvlink -s` -> the GPUs that have an active NVLink, by nvidia-smi's indices."""
    active: set[int] = set()
    gpu = -1
    for line in text.splitlines():
        header = re.match(r"GPU (\d+):", line)
        if header:
            gpu = int(header[1])
        elif re.search(r"Link \d+: [\d.]+ GB/s", line):
            active.add(gpu)
    return active


# --- backends ----------------------------------------------------------------------------------------------------


def find_backends() -> list[Backend]:
    return [*(_ep_backend(name) for name in EP_BACKENDS), *_gemm_backends()]


def _ep_backend(name: str) -> Backend:
    try:
        reason = why_not(name)
        if reason is None:
            return Backend("ep_backend", name, True, _what_it_uses(name))
    except Exception as error:  # find_spec raises on a half-installed package
        reason = f"the check failed ({_one_line(error)})"
    return Backend("ep_backend", name, False, reason)


def _what_it_uses(name: str) -> str:
    if name == "hybrid":
        chosen, why = resolve_hybrid()
        return f"takes {chosen} ({why})"
    if name == "deep_ep":
        return f"{class_in_package()} of package deep_ep, where a layer's sizes fit it"
    if name == "symm_mem":
        return "Triton kernels over PyTorch's symmetric memory, where a group's ranks are on one host"
    libraries = (("nccl", torch.distributed.is_nccl_available()), ("gloo", torch.distributed.is_gloo_available()))
    return f"all-to-all of torch.distributed, which has {' and '.join(n for n, there in libraries if there) or 'none'}"


def _gemm_backends() -> list[Backend]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name in ("triton", "grouped_mm"):
        for dtype in GEMM_DTYPES:
            reason = _or_error(_why_not_gemm, name, dtype, device)
            usable_how = _triton_kernels(dtype, device) if name == "triton" else f"torch._grouped_mm on {device.type}"
            value = f"{name} ({str(dtype).removeprefix('torch.')})"
            rows.append(Backend("gemm_backend", value, not reason, reason or usable_how))
    rows.append(Backend("gemm_backend", "reference", True, "one product per expert; any dtype and device"))
    return rows


def _triton_kernels(dtype: torch.dtype, device: torch.device) -> str:
    """Which of the package's kernels the triton backend takes."""
    if dtype is torch.float32:
        return "portable kernels: the Hopper kernels take 16-bit operands"
    reason = why_not_hopper(device)
    return f"portable kernels: of the Hopper kernels, {reason}" if reason else "Hopper kernels"


def _why_not_gemm(name: str, dtype: torch.dtype, device: torch.device) -> str:
    """Empty if usable."""
    if name == "triton":
        return why_not_triton(dtype, device) or ""
    if not hasattr(torch, "_grouped_mm"):
        return "this torch has no torch._grouped_mm"
    return TorchGroupedGemm.why_not(dtype, device, (), 1) or ""


# --- output ------------------------------------------------------------------------------------------------------


def render(report: Report) -> str:
    """The report as aligned plain text."""
    cpu = report.cpu
    memory = "memory unknown" if cpu.memory_gib is None else f"{cpu.memory_gib:.0f} GiB"
    devices = [("cpu", cpu.name, f"{cpu.cores} cores", memory)]
    devices += [
        (f"cuda:{g.index}", g.name, f"compute capability {g.compute_capability}", f"{g.memory_gib:.0f} GiB")
        for g in report.gpus
    ]
    if not report.gpus:
        devices.append(("cuda", "no GPU that torch can use", "", ""))
    sections = [
        ("Versions", [(v.name, v.version) for v in report.versions]),
        ("Devices", devices),
        ("Backends", [(b.setting, b.value, "yes" if b.usable else "no", b.reason) for b in report.backends]),
    ]
    if report.links:
        sections.insert(2, ("GPU links (NV#: that many NVLinks; PIX to SYS: PCIe, near to far)", _matrix(report)))
    return "\n\n".join(f"{title}\n{_align(rows)}" for title, rows in sections)


def _matrix(report: Report) -> list[tuple[str, ...]]:
    cells = {
        (link.source, link.target): (link.path or "?") + ("" if link.peer_access else " (no peer access)")
        for link in report.links
    }
    indices = [g.index for g in report.gpus]
    header = ("", *(f"cuda:{j}" for j in indices))
    return [header, *((f"cuda:{i}", *("-" if i == j else cells[i, j] for j in indices)) for i in indices)]


def _align(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"  {line}".rstrip() for line in lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m flashfusemoe_ds.report", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    args = parser.parse_args(arguments)
    report = make_report()
    print(json.dumps(asdict(report), indent=2) if args.json else render(report))


if __name__ == "__main__":
    main()
