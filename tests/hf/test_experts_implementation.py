# SPDX-License-Identifier: GPL-3.0-or-later
"""experts_implementation="flashfusemoe" beside Transformers' own eager code: values, gradients, what it refuses."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", minversion="5.7")

from transformers.activations import ACT2CLS  # noqa: E402

import flashfusemoe_ds as ffmoe  # noqa: E402
from flashfusemoe_ds.hf import experts as hf_experts  # noqa: E402
from flashfusemoe_ds.hf.transposed import TransposedProducts  # noqa: E402
from flashfusemoe_ds.kernels.products import ExpertProducts  # noqa: E402
from tests.hf.models import batch, build  # noqa: E402

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
NAMES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss"]
E, D, F, K, T = 5, 16, 24, 2, 13
# The kernels' layout; transposed; and transposed, with biases, interleaved gates and an activation of its own.
LAYOUTS = ["MixtralExperts", "AriaExperts", "GptOssExperts"]


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Registers the implementation; the activations that our experts stage was called with."""
    seen: list[str] = []
    stage = hf_experts.experts

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(args[5].name)
        return stage(*args, **kwargs)

    monkeypatch.setattr(hf_experts, "experts", counted)
    ffmoe.register_experts_implementation()
    yield seen
    ffmoe.register_experts_implementation()  # a test may have changed the settings


def outcome(model: nn.Module) -> dict[str, Tensor]:
    """Logits, loss and every gradient."""
    result = model(**batch())
    result.loss.backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return {"logits": result.logits.detach(), "loss": result.loss.detach(), **grads}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", NAMES)
def test_models_equal_eager(name: str, calls: list[str]) -> None:
    expected = outcome(build(name, "eager"))
    assert not calls
    experts_grads = [grad for path, grad in expected.items() if "experts" in path]
    assert len(experts_grads) >= 2 and all(grad.abs().max() > 1e-3 for grad in experts_grads)
    assert_equal(outcome(build(name, "flashfusemoe")), expected)
    assert len(calls) == (1 if name == "deepseek_v3" else 2)
    assert set(calls) == {"GptOssExperts's own" if name == "gpt_oss" else "swiglu"}


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_gradient_checkpointing_and_recompute(name: str) -> None:
    expected = outcome(build(name, "eager"))
    model = build(name, "flashfusemoe").train()
    model.gradient_checkpointing_enable()
    assert_equal(outcome(model), expected)
    ffmoe.register_experts_implementation(recompute_activations=True, gemm_backend="reference")
    assert_equal(outcome(build(name, "flashfusemoe")), expected)


def test_recompute_keeps_less() -> None:
    def kept() -> int:
        sizes: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        module = experts_module(class_named("MixtralExperts"), "flashfusemoe")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            module(*inputs())
        return sum(sizes.values())

    everything = kept()
    ffmoe.register_experts_implementation(recompute_activations=True)
    assert everything - kept() == T * K * 2 * F * 4  # H


# ---- experts modules, one by one


def experts_classes() -> list[type[nn.Module]]:
    """Every class under `use_experts_implementation` in the installed Transformers."""
    found = []
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        names = re.findall(r"^@use_experts_implementation(?:\(.*\))?\nclass (\w+)", path.read_text(), re.MULTILINE)
        if names:
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            found += [getattr(module, name) for name in names]
    return found


def class_named(name: str) -> type[nn.Module]:
    found = [cls for cls in experts_classes() if cls.__name__ == name]
    if not found:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return found[0]


def experts_module(cls: type[nn.Module], implementation: str, hidden_act: str = "silu") -> nn.Module:
    """An experts module by itself: a config with everything that any of them asks for."""
    num_experts = dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], E)
    sizes = {"hidden_size": D, "moe_hidden_size": D, "intermediate_size": F, "moe_intermediate_size": F}
    activations = {"hidden_act": hidden_act, "hidden_activation": "gelu_pytorch_tanh", "mlp_hidden_act": "relu2"}
    others = {"moe_latent_size": None, "swiglu_limit": 0.7, "swiglu_alpha": 1.702, "post_norm_eps": 1e-6}
    config = SimpleNamespace(
        **num_experts, **sizes, **activations, **others, _experts_implementation=implementation, dtype=torch.float32
    )
    torch.manual_seed(0)
    module = cls(config)
    for param in module.parameters():
        nn.init.normal_(param, 0, 0.5)
    return module


def inputs(num_tokens: int = T, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, ids and weights; the last expert gets no row."""
    generator = torch.Generator().manual_seed(1)
    idx_TK = torch.rand(num_tokens, E - 1, generator=generator).topk(K, dim=1).indices
    x_TD = torch.randn(num_tokens, D, generator=generator).to(dtype)
    return x_TD.requires_grad_(), idx_TK, torch.rand(num_tokens, K, generator=generator).to(dtype).requires_grad_()


def module_outcome(module: nn.Module, x_TD: Tensor, idx_TK: Tensor, weight_TK: Tensor) -> list[Tensor]:
    """The output, and the gradients of rows, weights and parameters."""
    y_TD = module(x_TD, idx_TK, weight_TK)
    wanted = [t for t in (x_TD, weight_TK, *module.parameters()) if t.requires_grad]
    dy_TD = torch.linspace(-1, 1, y_TD.numel()).sin().view(y_TD.shape).to(y_TD)
    grads = torch.autograd.grad(y_TD, wanted, dy_TD, allow_unused=True, materialize_grads=True)
    return [y_TD.detach(), *grads]


def compare(cls: type[nn.Module], operands: tuple[Tensor, Tensor, Tensor], hidden_act: str = "silu") -> None:
    expected = module_outcome(experts_module(cls, "eager", hidden_act), *operands)
    actual = module_outcome(experts_module(cls, "flashfusemoe", hidden_act), *operands)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5 * float(e.abs().max()) if e.numel() else 0, msg=str(cls))


def test_every_experts_class_equals_eager_or_is_refused(calls: list[str]) -> None:
    classes = experts_classes()
    assert len(classes) > 30  # 35 in 5.7, 63 in 5.22
    refused, operands = [], inputs()
    for cls in classes:
        try:
            compare(cls, operands)
        except ValueError as error:
            refused.append((cls.__name__, str(error)))
    assert [name for name, _ in refused] == [n for n in ("MuseSparkExperts",) if n in {c.__name__ for c in classes}]
    assert all("choose another experts_implementation" in text for _, text in refused)
    assert len(calls) == len(classes) - len(refused)


@pytest.mark.parametrize("hidden_act", ACT2CLS)
def test_every_activation_equals_eager_or_is_refused(hidden_act: str, calls: list[str]) -> None:
    fused = {
        "silu": "swiglu",
        "swish": "swiglu",
        "gelu": "geglu",
        "gelu_python": "geglu",
        "gelu_pytorch_tanh": "geglu_tanh",
        "gelu_python_tanh": "geglu_tanh",
        "gelu_new": "geglu_tanh",
        "relu": "reglu",
        "relu2": "relu_squared",
    }
    cls = class_named("MixtralExperts")
    if hidden_act in ("prelu", "xielu"):
        with pytest.raises(ValueError, match="trainable parameters of its own"):
            experts_module(cls, "flashfusemoe", hidden_act)(*inputs())
        return
    compare(cls, inputs(), hidden_act)
    assert calls == [fused.get(hidden_act, "MixtralExperts's own")]


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_rows_and_routes_to_nobody(name: str) -> None:
    cls = class_named(name)
    module = experts_module(cls, "flashfusemoe")
    x_TD, idx_TK, weight_TK = inputs()
    elsewhere_TK = idx_TK.clone()
    elsewhere_TK[::3, 0] = E  # as Transformers' own expert parallelism marks them
    nothing_TK = torch.where(elsewhere_TK == E, 0.0, weight_TK).detach().requires_grad_()
    y_TD, dx_TD, dweight_TK, *dparams = module_outcome(module, x_TD, elsewhere_TK, weight_TK)
    expected = module_outcome(experts_module(cls, "eager"), x_TD, elsewhere_TK.clamp(max=E - 1), nothing_TK)
    expected[2].masked_fill_(elsewhere_TK == E, 0.0)
    for a, e in zip((y_TD, dx_TD, dweight_TK, *dparams), expected, strict=True):
        torch.testing.assert_close(a, e, **TOLERANCE)
    empty = module_outcome(module, *inputs(num_tokens=0))
    assert empty[0].shape == (0, D) and all(not grad.any() for grad in empty)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_16_bits_are_no_worse_than_eager(name: str, dtype: torch.dtype, device: str) -> None:
    cls = class_named(name)
    rounded = [t.detach().to(dtype) if t.is_floating_point() else t for t in inputs()]
    params = [param.detach().to(dtype) for param in experts_module(cls, "eager").parameters()]

    def run(implementation: str, compute: torch.dtype) -> list[Tensor]:
        module = experts_module(cls, implementation).to(device, compute)
        for param, value in zip(module.parameters(), params, strict=True):
            param.data.copy_(value)
        x_TD, idx_TK, weight_TK = (t.to(device) for t in rounded)
        x_TD, weight_TK = (t.to(compute).requires_grad_() for t in (x_TD, weight_TK))
        return module_outcome(module, x_TD, idx_TK, weight_TK)

    exact = run("eager", torch.float64)
    for ours, eager, truth in zip(run("flashfusemoe", dtype), run("eager", dtype), exact, strict=True):
        assert ours.dtype is dtype
        assert (ours - truth).norm() <= 1.1 * (eager - truth).norm() + 1e-4 * truth.norm()


@pytest.mark.parametrize("name", LAYOUTS)
def test_float64(name: str) -> None:
    cls, operands = class_named(name), inputs(dtype=torch.float64)
    expected = module_outcome(experts_module(cls, "eager").double(), *operands)
    for a, e in zip(module_outcome(experts_module(cls, "flashfusemoe").double(), *operands), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def test_autocast_and_mixed_dtypes() -> None:
    module = experts_module(class_named("MixtralExperts"), "flashfusemoe")
    x_TD, idx_TK, weight_TK = inputs()
    exact_TD = module(x_TD, idx_TK, weight_TK)
    with torch.autocast("cpu", torch.bfloat16):
        cast_TD = module(x_TD, idx_TK, weight_TK)
    assert cast_TD.dtype is torch.float32 and not torch.equal(cast_TD, exact_TD)
    torch.testing.assert_close(cast_TD, exact_TD, rtol=0.05, atol=0.05 * float(exact_TD.detach().abs().max()))
    half = module.bfloat16()(x_TD, idx_TK, weight_TK)  # rows and weights float32, parameters bfloat16
    assert half.dtype is torch.float32
    torch.testing.assert_close(half, exact_TD, rtol=0.05, atol=0.05 * float(exact_TD.detach().abs().max()))


# ---- what a user does with a model


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_save_pretrained_is_plain(name: str, tmp_path: Path) -> None:
    model = build(name, "flashfusemoe").eval()
    model.save_pretrained(tmp_path)
    assert not any("flashfusemoe" in path.read_text() for path in tmp_path.glob("*.json"))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="flashfusemoe")
    assert ours.config._experts_implementation == "flashfusemoe"
    with torch.no_grad():
        logits = model(**batch()).logits
        torch.testing.assert_close(plain(**batch()).logits, logits, **TOLERANCE)
        torch.testing.assert_close(ours(**batch()).logits, logits, rtol=0, atol=0)


def test_frozen_experts() -> None:
    outcomes = []
    for implementation in ("eager", "flashfusemoe"):
        model = build("qwen2_moe", implementation)
        for path, param in model.named_parameters():
            param.requires_grad_(".experts." not in path)
        outcomes.append(outcome(model))
        assert all(p.grad is None for path, p in model.named_parameters() if ".experts." in path)
    assert_equal(outcomes[1], outcomes[0])


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_generate(name: str, calls: list[str]) -> None:
    prompt = batch()["input_ids"]
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = build(name, "eager").eval().generate(prompt, **settings)
    model = build(name, "flashfusemoe").eval()
    assert torch.equal(model.generate(prompt, **settings), expected)
    assert len(calls) == 5 * sum(hasattr(layer.mlp, "experts") for layer in model.model.layers)


@pytest.mark.parametrize(("name", "one_graph"), [("qwen3_moe", True), ("gpt_oss", False)])
def test_compile(name: str, one_graph: bool) -> None:
    """With Dynamo and AOT autograd, where tracing fails if it does; Inductor's code is not what is in doubt."""
    expected = outcome(build(name, "eager"))
    torch.compiler.reset()
    model = build(name, "flashfusemoe")
    for layer in model.model.layers:
        layer.mlp.experts.compile(backend="aot_eager", fullgraph=one_graph)
    assert_equal(outcome(model), expected)


# ---- what is refused


def test_refusals() -> None:
    mixtral, gpt_oss = class_named("MixtralExperts"), class_named("GptOssExperts")
    with pytest.raises(ValueError, match=r"gemm_backend is 'cutlass'.*valid: triton, grouped_mm, reference"):
        ffmoe.register_experts_implementation(gemm_backend="cutlass")
    with pytest.raises(ValueError, match=rf"input has shape \({T}, {D - 1}\); expected \[\*, {D}\]"):
        x_TD, *rest = inputs()
        experts_module(mixtral, "flashfusemoe")(x_TD[:, 1:], *rest)
    with pytest.raises(ValueError, match=rf"ids of experts \({T}, 1\) and their weights \({T}, {K}\); expected"):
        experts_module(mixtral, "flashfusemoe")(x_TD, rest[0][:, :1], rest[1])
    module = experts_module(mixtral, "flashfusemoe")
    module.down_proj.data = module.down_proj.data.double()
    with pytest.raises(ValueError, match=r"torch.float32, torch.float64.*one floating-point dtype"):
        module(*inputs())
    module = experts_module(mixtral, "flashfusemoe")
    module.scale = nn.Parameter(torch.ones(E))
    with pytest.raises(ValueError, match="parameters scale, which 'flashfusemoe' does not know"):
        module(*inputs())
    ffmoe.register_experts_implementation(gemm_backend="triton")
    with pytest.raises(ValueError, match="GptOssExperts has transposed parameters; valid here: 'grouped_mm'"):
        experts_module(gpt_oss, "flashfusemoe")(*inputs())


def test_transposed_products_have_the_whole_protocol() -> None:
    wanted = {
        name: f for name, f in vars(ExpertProducts).items() if inspect.isfunction(f) and not name.startswith("_")
    }
    assert {"yielding", "up", "down", "dgated", "dx", "dw_down", "dw_up"} == wanted.keys()
    for name, function in wanted.items():
        own, of_protocol = (inspect.signature(f).parameters for f in (getattr(TransposedProducts, name), function))
        assert [p.kind for p in own.values()] == [p.kind for p in of_protocol.values()], name


def test_without_transformers() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import flashfusemoe_ds\n"
        "try: flashfusemoe_ds.register_experts_implementation\n"
        "except ImportError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "needs transformers >= 5.7" in run.stdout and 'pip install "flashfusemoe_ds[hf]"' in run.stdout
