# SPDX-License-Identifier: GPL-3.0-or-later
"""`python -m flashfusemoe_ds.report`: complete on any machine, whatever is missing or broken."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from flashfusemoe_ds import report
from flashfusemoe_ds.config import FlashFuseMoEConfig
from flashfusemoe_ds.dispatch.select import EP_BACKENDS, why_not

DTYPES = ("bfloat16", "float16", "float32")
GEMM_BACKENDS = (*(f"{name} ({dtype})" for name in ("triton", "grouped_mm") for dtype in DTYPES), "reference")

TOPOLOGY = """\
\tGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID
GPU0\t X \tNV18\tSYS\tPIX\t0-31\t0\t\tN/A
GPU1\tNV18\t X \tNODE\tSYS\t0-31\t0\t\tN/A
GPU2\tSYS\tNODE\t X \tSYS\t0-31\t0\t\tN/A
NIC0\tPIX\tSYS\tSYS\t X

Legend:

  X    = Self
"""

NVLINKS = """\
GPU 0: NVIDIA H200 (UUID: GPU-8580fdbb-7129-d1a6-ac22-19690e1a379b)
\t Link 0: 26.562 GB/s
\t Link 1: <inactive>
GPU 1: NVIDIA H200 (UUID: GPU-80ce8d71-0c41-7f3d-e93d-8def9e391cbc)
\t Link 0: <inactive>
"""


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", "flashfusemoe_ds.report", *arguments]
    root = Path(__file__).parent.parent
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, cwd=root).stdout


def test_json_lists_every_backend_with_a_reason() -> None:
    found = json.loads(run("--json"))
    assert set(found) == {"versions", "cpu", "gpus", "links", "backends"}
    rows = {(row["setting"], row["value"]): row for row in found["backends"]}
    assert set(rows) == {("ep_backend", name) for name in EP_BACKENDS} | {("gemm_backend", n) for n in GEMM_BACKENDS}
    assert all(row["reason"] for row in rows.values())
    for name in EP_BACKENDS:
        assert rows["ep_backend", name]["usable"] == (why_not(name) is None)
    named = {row["name"]: row["version"] for row in found["versions"]}
    assert {"flashfusemoe_ds", "python", "torch", "NCCL", "deepspeed", "transformers", "triton"} <= set(named)
    assert named["deepspeed"][0].isdigit()


def test_text_is_aligned_and_complete() -> None:
    text = run()
    assert all(title in text for title in ("Versions", "Devices", "Backends"))
    rows = [line for line in text.splitlines() if "_backend " in line]
    assert len(rows) == len(EP_BACKENDS) + len(GEMM_BACKENDS)
    values = [line.split()[1] for line in rows]
    assert len({line.index(value) for line, value in zip(rows, values, strict=True)}) == 1
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_every_value_of_the_config_is_reported() -> None:
    reported = {(row.setting, row.value.split()[0]) for row in report.find_backends()}
    for setting in ("ep_backend", "gemm_backend"):
        schema = FlashFuseMoEConfig.model_json_schema()["properties"][setting]
        names = schema.get("enum") or next(part["enum"] for part in schema["anyOf"] if "enum" in part)
        assert {(setting, name) for name in names} <= reported


def test_a_missing_package_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # import raises ModuleNotFoundError
    monkeypatch.setattr(report.metadata, "version", _raise_not_found)
    versions = {row.name: row.version for row in report.find_versions()}
    assert versions["deepspeed"] == versions["triton"] == versions["deep_ep"] == "not installed"


def test_without_triton_its_backend_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashfusemoe_ds.kernels.triton_products", None)
    rows = [row for row in report.find_backends() if row.value.startswith("triton")]
    assert len(rows) == len(DTYPES)
    assert all(not row.usable and "triton cannot be imported" in row.reason for row in rows)


def _raise_not_found(name: str) -> str:
    raise report.metadata.PackageNotFoundError(name)


def test_a_package_that_does_not_load_is_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "deep_ep.py").write_text("raise ImportError('libfoo.so:\\nundefined symbol: bar')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "deep_ep", raising=False)
    versions = {row.name: row.version for row in report.find_versions()}
    assert "its import fails (ImportError: libfoo.so: undefined symbol: bar)" in versions["deep_ep"]


def test_a_check_that_raises_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = types.ModuleType("deep_ep")
    broken.__spec__ = None  # importlib.util.find_spec raises ValueError on it
    monkeypatch.setitem(sys.modules, "deep_ep", broken)
    rows = {row.value: row for row in report.find_backends()}
    assert not rows["deep_ep"].usable and "the check failed (ValueError" in rows["deep_ep"].reason
    assert report.render(report.make_report())


def test_broken_metadata_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> str:
        raise KeyError(name)

    monkeypatch.setattr(report.metadata, "version", fail)
    versions = {row.name: row.version for row in report.find_versions()}
    assert versions["transformers"] == "unknown (KeyError: 'transformers')"


def test_nvidia_smi_is_understood() -> None:
    paths = report.parse_topology(TOPOLOGY)
    assert paths[0, 1] == paths[1, 0] == "NV18"
    assert paths[0, 2] == "SYS" and paths[2, 1] == "NODE"
    assert len(paths) == 6
    assert report.parse_nvlink(NVLINKS) == {0}
    assert report.parse_topology("") == {} and report.parse_nvlink("") == set()


def test_links_are_printed_as_a_matrix() -> None:
    gpus = [report.Gpu(i, "NVIDIA H200", "9.0", 140.0) for i in range(2)]
    links = [report.Link(0, 1, True, "NV18"), report.Link(1, 0, False, None)]
    text = report.render(report.Report([], report.Cpu("cpu", 1, None), gpus, links, []))
    assert "NV18" in text and "? (no peer access)" in text and "memory unknown" in text
