# SPDX-License-Identifier: GPL-3.0-or-later
"""The layer benchmark at toy size on a CPU: what it prints and leaves, its routings and reference, its messages."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

TOY = ["--device", "cpu", "--shape", "64,32,16,4,2", "--dtype", "float32", "--rounds", "2"]


@pytest.fixture
def bench(load: Callable[[str], ModuleType]) -> ModuleType:
    """layer.py as a module. Its neighbours can be imported by their plain names, too."""
    return load("layer")


def columns(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]


def test_table_json_and_picture(bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*TOY, "--gemm_backend", "reference", "--out", str(tmp_path / "run")]) == 0
    printed = columns(capsys.readouterr().out)
    titles = [row[0].strip("*") for row in printed[2:]]
    assert titles == [
        "flashfusemoe_ds",
        "flashfusemoe_ds, gemm_backend=reference",
        "flashfusemoe_ds, recompute_activations",
        "torch._grouped_mm, eager",
    ]
    header = printed[0]
    for name in ("fwd ms", "fwd+bwd ms", "x floor", "host ms"):
        assert all(float(row[header.index(name)]) > 0 for row in printed[2:]), name

    outcome = json.loads((tmp_path / "run" / "layer.json").read_text())
    assert outcome["machine"]["device"] == "CPU" and outcome["machine"]["versions"]["torch"] == torch.__version__
    (result,) = outcome["results"]
    assert result["shape"] == {"name": "64-32-16-4-2", "T": 64, "D": 32, "F": 16, "E": 4, "K": 2}
    assert result["step_flops"] == 18 * 64 * 2 * 32 * 16
    assert len(result["floor"]["step_ms"]) == 2
    for row in result["layers"]:
        assert row["status"] == "ok", row
        assert len(row["forward_ms"]) == len(row["step_ms"]) == len(row["host_ms"]) == 2
        assert max(row["error_output"], row["error_input_grad"]) < 1e-5

    assert "### 64-32-16-4-2" in (tmp_path / "run" / "layer.md").read_text()
    picture = tmp_path / "run" / "layer.png"
    if importlib.util.find_spec("matplotlib"):
        assert picture.read_bytes()[:4] == b"\x89PNG"
    else:
        assert not picture.exists()

    # The same file twice is one table; the file of another shape is another.
    other = {**outcome, "results": [{**result, "shape": {**result["shape"], "name": "other"}}]}
    (tmp_path / "other.json").write_text(json.dumps(other))
    merged = [str(tmp_path / "run" / "layer.json")] * 2 + [str(tmp_path / "other.json")]
    assert bench.main(["--merge", *merged, "--out", str(tmp_path / "merged"), "--no_chart"]) == 0
    page = (tmp_path / "merged" / "layer.md").read_text()
    assert page.count("### ") == 2 and page.count("torch._grouped_mm, eager") == 2


def test_a_broken_a_missing_and_a_wrong_layer_keep_their_rows(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = importlib.import_module("layers")

    def failing(bench: object) -> None:
        raise RuntimeError("no kernel for this shape")

    def missing(bench: object) -> None:
        import a_package_that_nobody_has  # noqa: F401

    def wrong(bench: object) -> object:
        right = layers.grouped_mm(bench)
        return layers.Layer(lambda x: 1.05 * right.run(x), right.parameters)

    rows = {f.__name__: layers.Entry(f.__name__, f, cuda_only=False) for f in (failing, missing, wrong)}
    monkeypatch.setattr(layers, "REGISTRY", {"ours": layers.REGISTRY["ours"], **rows})
    assert bench.main([*TOY, "--layers", "ours,failing,missing,wrong", "--out", str(tmp_path), "--no_chart"]) == 0
    found = {row["key"]: row for row in json.loads((tmp_path / "layer.json").read_text())["results"][0]["layers"]}
    assert {key: row["status"] for key, row in found.items()} == {
        "ours": "ok", "failing": "failed", "missing": "missing", "wrong": "wrong",
    }  # fmt: skip
    assert 0.04 < found["wrong"]["error_output"] < 0.06
    page = capsys.readouterr().out
    assert "wrong WRONG" in page and "no kernel for this shape" in page and "a_package_that_nobody_has" in page


def test_a_process_that_is_stopped_costs_one_row(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*TOY, "--layers", "grouped_mm", "--isolate", "--isolate_seconds", "0.5"]) == 0
    assert "torch._grouped_mm, eager: failed: its process was stopped after 0.5 s" in capsys.readouterr().out


@pytest.mark.parametrize("routing", ["balanced", "zipf", "onehot"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_steer_the_router(bench: ModuleType, routing: str, dtype: torch.dtype) -> None:
    make = importlib.import_module("routing")
    shape = importlib.import_module("shapes").Shape("toy", T=512, D=64, F=16, E=16, K=3)
    generator = torch.Generator().manual_seed(0)
    gate_ED = make.make_gate(shape, dtype, generator)
    x_TD, idx_TK = make.make_input(shape, gate_ED, routing, generator)
    assert x_TD.dtype is dtype and 0.8 < x_TD.float().std() < 1.2
    logits_TE = x_TD.float() @ gate_ED.float().T
    top = logits_TE.sort(dim=1, descending=True)
    assert torch.equal(top[1][:, :3].sort(1)[0], idx_TK.sort(1)[0])
    assert (top[0][:, 2] - top[0][:, 3]).min() > 0.4
    load_E = idx_TK.flatten().bincount(minlength=16).sort(descending=True)[0]
    assert load_E.sum() == 512 * 3
    if routing == "onehot":
        assert load_E[:3].tolist() == [512] * 3
    elif routing == "zipf":
        assert load_E[0] > 2.5 * load_E[4] > 0
    else:
        assert load_E[0] < 1.5 * load_E[-1]


def test_reference_against_autograd(bench: ModuleType) -> None:
    """The expert-by-expert gradients against those of one differentiable expression."""
    from flashfusemoe_ds.kernels import reference as truth

    shapes, weights, make, reference = map(importlib.import_module, ("shapes", "weights", "routing", "reference"))
    shape = shapes.Shape("toy", T=40, D=16, F=8, E=6, K=2)
    generator = torch.Generator().manual_seed(0)
    w = weights.Weights.random(shape, torch.float32, generator)
    x_TD, _ = make.make_input(shape, w.gate, "zipf", generator)
    dout_TD = torch.randn(x_TD.shape, generator=generator)
    out, dx = reference.reference(x_TD, dout_TD, w, shape.K)
    x = x_TD.double().requires_grad_()
    logits_TK, idx_TK = (x @ w.gate.double().T).topk(shape.K, dim=1)
    expected = truth.experts(x, idx_TK, logits_TK.softmax(1), w.gate_up.double(), w.down.double(), "swiglu")
    expected.backward(dout_TD.double())
    torch.testing.assert_close(out, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dx, x.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "huge"], "shape 'huge': must be one of seed, qwen3, mixtral, dsv3, or five numbers T,D,F,E,K"),
        (["--shape", "64,32,16,4,8"], "K is 8, more than the 4 experts"),
        (["--shape", "64,8,16,16,2"], "E is 16, more than D=8"),
        (["--layers", "ours,theirs"], "unknown theirs; valid: ours, "),
        (["--rounds", "0"], "--rounds 0: must be positive"),
        (["--device", "cuda"], "PyTorch finds no GPU"),
    ],
)
def test_mistakes_are_said(
    bench: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as stopped:
        bench.main([*TOY, *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_merge_says_which_file_is_no_result(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text("{}")
    assert bench.main(["--merge", str(tmp_path / "a.json")]) == 2
    assert "a.json: is not a result of this benchmark" in capsys.readouterr().err
