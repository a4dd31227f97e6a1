# SPDX-License-Identifier: GPL-3.0-or-later
"""Hold `flashfusemoe_ds.plan` against a run: memory and exchange of a Transformers model, planned and measured.

    deepspeed --num_gpus 2 examples/benchmarks/plan_check.py --size qwen3 --ep_size 1 2 --stage 1 2

Trains a model of Qwen3-30B-A3B's shape, cut to a few layers, under AutoEP, and prints a Markdown table on rank 0. What
is allocated after a step is parameters and optimizer; peaks are those of forward and backward, and of the optimizer's
step. The plan gets the load that the router really made. `--size toy` runs on CPUs, where there is no memory to read.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist
import transformers
from step_engines import join

import flashfusemoe_ds
from flashfusemoe_ds.ds.autoep import FusedAutoEPMoELayer
from flashfusemoe_ds.plan import BACKENDS, GIB, Plan, Rates, make_plan, read_training
from flashfusemoe_ds.plan_model import from_transformers

SIZES: dict[str, dict[str, int]] = {
    "qwen3": {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
              "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
              "vocab_size": 151936},
    "toy": {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 8,
            "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
            "vocab_size": 64},
}  # fmt: skip
BATCHES = {"qwen3": (2, 4096), "toy": (2, 16)}
SAMPLES = 20


class Line(NamedTuple):
    """One comparison; measured is None where it cannot be."""

    case: str
    what: str
    unit: str
    planned: float
    measured: float | None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Planned and measured memory and exchange.")
    parser.add_argument("--size", choices=SIZES, default="qwen3")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--ep_size", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--stage", type=int, nargs="+", default=[1, 2], choices=(0, 1, 2))
    parser.add_argument("--backend", choices=BACKENDS, default="nccl")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--exchange_gbps", type=float, help="of the plan (default: the plan's own)")
    parser.add_argument("--local_rank", type=int, default=-1, help="the launcher's")
    return parser.parse_args(argv)


def model_config(size: str, layers: int) -> Any:
    return transformers.Qwen3MoeConfig(
        **SIZES[size], num_hidden_layers=layers, norm_topk_prob=True, use_cache=False, bos_token_id=0, eos_token_id=0
    )


def ds_config(args: argparse.Namespace, stage: int, ep_size: int, device: torch.device) -> dict[str, Any]:
    batch, length = BATCHES[args.size]
    cuda = device.type == "cuda"
    fused = {"fused": True} if cuda else {}
    section: dict[str, Any] = {"ep_backend": args.backend}
    if args.backend != "nccl":
        section[args.backend] = {"max_tokens_per_rank": batch * length}
    return {
        "train_micro_batch_size_per_gpu": batch,
        "bf16": {"enabled": cuda},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True, **fused}},
        "zero_optimization": {"stage": stage},
        "expert_parallel": {"enabled": True, "autoep_size": ep_size},
        "flashfusemoe": section,
        "steps_per_print": 1_000_000_000,
    }


class Case:
    """One engine, trained for a few steps."""

    def __init__(self, args: argparse.Namespace, stage: int, ep_size: int, device: torch.device) -> None:
        self.name = f"EP {ep_size}, ZeRO {stage}"
        self.args, self.device, self.ep_size = args, device, ep_size
        self.config = ds_config(args, stage, ep_size, device)
        self.batch, self.length = BATCHES[args.size]
        self.before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with device:
            model = transformers.AutoModelForCausalLM.from_config(model_config(args.size, args.layers), dtype=dtype)
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.engine, *_ = flashfusemoe_ds.initialize(
            model=model, model_parameters=list(model.parameters()), config=self.config
        )
        self.layers = [m for m in self.engine.module.modules() if isinstance(m, FusedAutoEPMoELayer)]

    def measured_memory(self) -> list[float | None]:
        """GiB after a step, at most in forward and backward, at most in the optimizer's step: the largest rank's."""
        vocabulary = SIZES[self.args.size]["vocab_size"]
        generator = torch.Generator().manual_seed(dist.get_rank())
        ids = torch.randint(vocabulary, (self.batch, self.length), generator=generator).to(self.device)
        found: list[float] = []
        for _ in range(3):
            found = [self._allocated()]
            loss = self.engine(input_ids=ids, labels=ids).loss
            self.engine.backward(loss)
            del loss
            found.append(self._peak())
            self.engine.step()
            found.append(self._peak())
        if self.device.type != "cuda":
            return [None, None, None]
        largest = torch.tensor(found, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return (largest / GIB).tolist()

    def _allocated(self) -> float:
        if self.device.type != "cuda":
            return 0.0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return float(torch.cuda.memory_allocated() - self.before)

    def _peak(self) -> float:
        """Since the last call."""
        if self.device.type != "cuda":
            return 0.0
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - self.before
        torch.cuda.reset_peak_memory_stats()
        return float(peak)

    def skew(self) -> float:
        """Routes of the busiest rank over the mean, on average over layers."""
        counts_LE = torch.stack([layer.tokens_per_expert for layer in self.layers]).float()
        dist.all_reduce(counts_LE)
        ranks_LP = counts_LE.view(len(self.layers), self.ep_size, -1).sum(2)
        return max(1.0, (ranks_LP.max(1).values / ranks_LP.mean(1)).mean().item())

    def exchange_ms(self) -> float:
        """Of all layers' exchanges in a step, none of them beside anything else, uniform routes."""
        sizes, layer = SIZES[self.args.size], self.layers[0]
        dtype = layer.experts.w2.dtype
        generator = torch.Generator(self.device).manual_seed(dist.get_rank())
        tokens, experts, top_k = self.batch * self.length, sizes["num_experts"], sizes["num_experts_per_tok"]
        idx_TK = torch.rand(tokens, experts, generator=generator, device=self.device).topk(top_k, dim=1)[1]
        x_TD = torch.zeros(tokens, sizes["hidden_size"], dtype=dtype, device=self.device)
        weight_TK = torch.ones(tokens, top_k, device=self.device)
        transport = layer.dispatcher
        sent = transport.start_dispatch(x_TD, idx_TK, weight_TK).wait()
        y_RD, weight_RK = sent.x_RD.clone(), torch.where(sent.idx_RK >= 0, sent.weight_RK, 0)

        def grads_home() -> None:
            home = transport.start_combine(y_RD, sent.handle, weight_RK)
            home.weights.wait(), home.rows.wait()

        calls: list[Callable[[], object]] = [
            lambda: transport.start_dispatch(x_TD, idx_TK, weight_TK).wait(),
            lambda: transport.start_combine(y_RD, sent.handle).rows.wait(),
            lambda: transport.start_redispatch(x_TD, sent.handle).wait(),
            grads_home,
        ]
        times = [slowest_ms(call, self.device) for call in calls]
        again = times[0] + times[1] if self.args.gradient_checkpointing else 0.0
        return len(self.layers) * (sum(times) + again)

    def plan(self, skew: float) -> Plan:
        training = read_training(self.config)
        with tempfile.TemporaryDirectory() as folder:
            model_config(self.args.size, self.args.layers).save_pretrained(folder)
            subject = from_transformers(
                Path(folder), training.dtype, self.batch, self.length, self.args.gradient_checkpointing, autoep=True
            )
        return make_plan(
            subject, training, dist.get_world_size(), self.ep_size, self.args.backend, skew,
            Rates(self.args.exchange_gbps), self.args.gradient_checkpointing,
        )  # fmt: skip

    def lines(self) -> list[Line]:
        """Collective."""
        memory, skew = self.measured_memory(), self.skew()
        plan = self.plan(skew)
        planned = (plan.memory.after_init, plan.memory.backward_peak, plan.memory.step_peak)
        names = ("after a step", "peak in backward", "peak in step")
        lines = [
            Line(self.name, f"{what} (skew {skew:.3f})", "GiB", size / GIB, seen)
            for what, size, seen in zip(names, planned, memory, strict=True)
        ]
        if self.ep_size > 1:
            # The exchange that is timed has uniform routes.
            planned_ms = self.plan(1.0).wire.exchange_ms
            lines.append(Line(self.name, "exchange per step", "ms", planned_ms, self.exchange_ms()))
        return lines

    def close(self) -> None:
        flashfusemoe_ds.close(self.engine)
        self.engine.destroy()
        del self.engine, self.layers
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def slowest_ms(work: Callable[[], object], device: torch.device) -> float:
    """Median over samples of the slowest rank's time."""
    times = []
    token = torch.zeros(1, device=device)
    cuda = device.type == "cuda"
    for _ in range(3 + SAMPLES):
        if cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            torch.cuda._sleep(500_000)  # for the host to get ahead
        dist.all_reduce(token)  # the ranks leave it together
        if cuda:
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            began = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - began))
    slowest = torch.tensor(times[3:], device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return median(slowest.tolist())


def table(lines: list[Line]) -> str:
    rows = ["| case | what | unit | planned | measured | planned / measured |", "|---|---|---|---|---|---|"]
    for line in lines:
        seen, ratio = "not here", ""
        if line.measured is not None:
            seen, ratio = f"{line.measured:.2f}", f"{line.planned / line.measured:.3f}"
        rows.append(f"| {line.case} | {line.what} | {line.unit} | {line.planned:.2f} | {seen} | {ratio} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    device = join()
    if device.type == "cpu" and args.size != "toy":
        raise ValueError(f"--size is {args.size!r}, which needs GPUs; valid on CPUs: 'toy'")
    lines: list[Line] = []
    for ep_size in args.ep_size:
        for stage in args.stage:
            case = Case(args, stage, ep_size, device)
            lines += case.lines()
            case.close()
    if dist.get_rank() == 0:
        where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        print(f"{dist.get_world_size()} x {where}, {args.size}, {args.layers} layers, {args.backend}, {versions}\n")
        print(table(lines), flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
