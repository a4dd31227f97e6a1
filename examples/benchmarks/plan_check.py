# SPDX-License-Identifier: GPL-3.0-or-later
"""Hold `flashfusemoe_ds.plan` against a run: memory and exchange of a Transformers model, planned and measured.

    deepspeed --num_gpus 2 examples/benchmarks/plan_check.py --size qwen3 --ep_size 1 2 --stage 1 2
    deepspeed --num_gpus 2 examples/benchmarks/plan_check.py --size qwen3 --backend symm_mem --calibrate

Trains a model of Qwen3-30B-A3B's shape, cut to a few layers, under AutoEP, and prints a Markdown table on rank 0. What
is allocated after a step is parameters and optimizer; peaks are those of forward and backward, and of the optimizer's
step. The plan gets the load that the router really made.

The exchange that is measured is that of a step: the operations that each layer asked of its transport and the experts
that its router chose, each operation timed alone (exchange_cost.py). The plan has what operations cost on this machine
from batches of its own, half, once and twice as large, and has to know how many there are and what they weigh.
`--calibrate` measures these costs alone, with all ranks as one group, and prints them as options of the plan.

`--size toy` runs on CPUs, where there is no memory to read.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import exchange_cost
import torch
import torch.distributed as dist
import transformers
from exchange_cost import Operation, Sample, calibration, fit, flags, operations, section, times_table
from step_engines import join
from torch import Tensor

import flashfusemoe_ds
from flashfusemoe_ds.dispatch.base import Combined, Dispatcher, Pending
from flashfusemoe_ds.ds.autoep import FusedAutoEPMoELayer
from flashfusemoe_ds.plan_config import read_training
from flashfusemoe_ds.plan_model import from_transformers
from flashfusemoe_ds.plan_numbers import BACKENDS, Plan, Rates, make_plan
from flashfusemoe_ds.plan_text import GIB
from flashfusemoe_ds.planning import MoEShape
from flashfusemoe_ds.types import Dispatched

SIZES: dict[str, dict[str, int]] = {
    "qwen3": {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
              "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
              "vocab_size": 151936},
    "toy": {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 8,
            "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
            "vocab_size": 64},
}  # fmt: skip
BATCHES = {"qwen3": (2, 4096), "toy": (2, 16)}


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
    parser.add_argument("--num_sms", type=int, help="of symm_mem and deep_ep (default: theirs)")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--calibrate", action="store_true", help="measure what an exchange costs here, and no more")
    parser.add_argument("--local_rank", type=int, default=-1, help="the launcher's")
    return parser.parse_args(argv)


def model_config(size: str, layers: int) -> Any:
    return transformers.Qwen3MoeConfig(
        **SIZES[size], num_hidden_layers=layers, norm_topk_prob=True, use_cache=False, bos_token_id=0, eos_token_id=0
    )


def moe_shape(size: str) -> MoEShape:
    sizes = SIZES[size]
    width = sizes["moe_intermediate_size"]
    return MoEShape(sizes["hidden_size"], width, 2 * width, sizes["num_experts"], sizes["num_experts_per_tok"])


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def ds_config(args: argparse.Namespace, stage: int, ep_size: int, device: torch.device) -> dict[str, Any]:
    batch, length = BATCHES[args.size]
    cuda = device.type == "cuda"
    fused = {"fused": True} if cuda else {}
    return {
        "train_micro_batch_size_per_gpu": batch,
        "bf16": {"enabled": cuda},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True, **fused}},
        "zero_optimization": {"stage": stage},
        "expert_parallel": {"enabled": True, "autoep_size": ep_size},
        "flashfusemoe": section(args.backend, batch * length, args.num_sms),
        "steps_per_print": 1_000_000_000,
    }


class Recorder:
    """A layer's transport, which notes what is asked of it.

    Attributes:
        counts: of operations, by the names of planning.Exchanges.
        idx_TK: the experts of the last dispatch.
    """

    def __init__(self, transport: Dispatcher) -> None:
        self.transport, self.name, self.ep_size = transport, transport.name, transport.ep_size
        self.counts: Counter[str] = Counter()
        self.idx_TK: Tensor | None = None

    def start_dispatch(self, x_TD: Tensor, idx_TK: Tensor, weight_TK: Tensor) -> Pending[Dispatched]:
        self.counts["dispatch"] += 1
        self.idx_TK = idx_TK.detach()
        return self.transport.start_dispatch(x_TD, idx_TK, weight_TK)

    def start_redispatch(self, x_TD: Tensor, handle: Any) -> Pending[Tensor]:
        self.counts["redispatch"] += 1
        return self.transport.start_redispatch(x_TD, handle)

    def start_combine(self, y_RD: Tensor, handle: Any, weight_RK: Tensor | None = None) -> Combined:
        self.counts["combine" if weight_RK is None else "combine_grads"] += 1
        return self.transport.start_combine(y_RD, handle, weight_RK)


class Case:
    """One engine, trained for a few steps."""

    def __init__(self, args: argparse.Namespace, stage: int, ep_size: int, device: torch.device) -> None:
        self.name = f"EP {ep_size}, ZeRO {stage}"
        self.args, self.device, self.ep_size = args, device, ep_size
        self.config = ds_config(args, stage, ep_size, device)
        self.batch, self.length = BATCHES[args.size]
        self.before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        torch.manual_seed(0)
        with device:
            model = transformers.AutoModelForCausalLM.from_config(
                model_config(args.size, args.layers), dtype=dtype_on(device)
            )
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.engine, *_ = flashfusemoe_ds.initialize(
            model=model, model_parameters=list(model.parameters()), config=self.config
        )
        self.layers = [m for m in self.engine.module.modules() if isinstance(m, FusedAutoEPMoELayer)]

    def measured_memory(self) -> list[float | None]:
        """GiB after a step, at most in forward and backward, at most in the optimizer's step: the largest rank's."""
        found: list[float] = []
        for _ in range(3):
            found = [self._allocated()]
            self._forward_backward()
            found.append(self._peak())
            self.engine.step()
            found.append(self._peak())
        if self.device.type != "cuda":
            return [None, None, None]
        largest = torch.tensor(found, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return (largest / GIB).tolist()

    def _forward_backward(self) -> None:
        vocabulary = SIZES[self.args.size]["vocab_size"]
        generator = torch.Generator().manual_seed(dist.get_rank())
        ids = torch.randint(vocabulary, (self.batch, self.length), generator=generator).to(self.device)
        self.engine.backward(self.engine(input_ids=ids, labels=ids).loss)

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

    @contextmanager
    def _recorded(self) -> Iterator[list[Recorder]]:
        """What the layers ask of their transports meanwhile."""
        recorders = [Recorder(layer.dispatcher) for layer in self.layers]
        for layer, recorder in zip(self.layers, recorders, strict=True):
            layer.dispatcher = layer.experts.dispatcher = recorder
        try:
            yield recorders
        finally:
            for layer, recorder in zip(self.layers, recorders, strict=True):
                layer.dispatcher = layer.experts.dispatcher = recorder.transport

    def exchange_lines(self) -> tuple[list[Line], str]:
        """Of all layers' exchanges in a step, none of them beside anything else; and what they cost here."""
        for layer in self.layers:
            layer.tokens_per_expert.zero_()
        with self._recorded() as recorders:
            self._forward_backward()
        self.engine.step()
        skew, shape, dtype = self.skew(), moe_shape(self.args.size), dtype_on(self.device)
        group, tokens = self.layers[0].ep_group, self.batch * self.length
        of_step = [
            (recorder.counts[operation.name], operation)
            for recorder in recorders
            for operation in operations(recorder.transport, group, shape, dtype, recorder.idx_TK)
        ]
        with calibration(self.args.backend, self.args.num_sms, group, shape, dtype, tokens, self.device) as others:
            ms = exchange_cost.slowest_ms([*others, *(operation for _, operation in of_step)], self.device)
        samples = as_samples(others, ms[: len(others)])
        cost = fit(samples)
        ms_of_step = ms[len(others) :]
        megabytes = sum(count * operation.bytes for count, operation in of_step) / 1e6
        measured = sum(count * each for (count, _), each in zip(of_step, ms_of_step, strict=True))
        here, usual = (self.plan(skew, rates).wire for rates in (Rates(cost.gbps, cost.fixed_us), None))
        what = f"exchange per step (skew {skew:.3f})"
        lines = [
            Line(self.name, what, "MB", here.exchange / 1e6, megabytes),
            Line(self.name, f"{what}, calibrated here", "ms", here.exchange_ms + here.exchange_fixed_ms, measured),
            Line(self.name, f"{what}, the plan's own costs", "ms", usual.exchange_ms + usual.exchange_fixed_ms,
                 measured),
        ]  # fmt: skip
        text = f"{self.name}, us of one exchange; three batches by which it was calibrated, then a step's layers:\n\n"
        text += times_table(samples + as_samples([operation for _, operation in of_step], ms_of_step))
        return lines, f"{text}\n\ncalibrated here: {flags(cost)}"

    def plan(self, skew: float, rates: Rates | None = None) -> Plan:
        training = read_training(self.config)
        with tempfile.TemporaryDirectory() as folder:
            model_config(self.args.size, self.args.layers).save_pretrained(folder)
            subject = from_transformers(
                Path(folder), training.dtype, self.batch, self.length, self.args.gradient_checkpointing, autoep=True
            )
        return make_plan(
            subject, training, dist.get_world_size(), self.ep_size, self.args.backend, skew,
            rates or Rates(), self.args.gradient_checkpointing,
        )  # fmt: skip

    def lines(self) -> tuple[list[Line], str]:
        """Collective. Comparisons, and what was found out for them."""
        memory, skew = self.measured_memory(), self.skew()
        plan = self.plan(skew)
        planned = (plan.memory.after_init, plan.memory.backward_peak, plan.memory.step_peak)
        names = ("after a step", "peak in backward", "peak in step")
        lines = [
            Line(self.name, f"{what} (skew {skew:.3f})", "GiB", size / GIB, seen)
            for what, size, seen in zip(names, planned, memory, strict=True)
        ]
        if self.ep_size == 1:
            return lines, ""
        exchange, found = self.exchange_lines()
        return lines + exchange, found

    def close(self) -> None:
        flashfusemoe_ds.close(self.engine)
        self.engine.destroy()
        del self.engine, self.layers
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def as_samples(found: list[Operation], ms: list[float]) -> list[Sample]:
    return [Sample(each.name, each.bytes, taken) for each, taken in zip(found, ms, strict=True)]


def calibrate(args: argparse.Namespace, device: torch.device) -> str:
    """What an exchange between all ranks costs. Collective."""
    batch, length = BATCHES[args.size]
    shape, dtype, tokens = moe_shape(args.size), dtype_on(device), batch * length
    with calibration(args.backend, args.num_sms, dist.group.WORLD, shape, dtype, tokens, device) as found:
        samples = as_samples(found, exchange_cost.slowest_ms(found, device))
    return f"us of one exchange:\n\n{times_table(samples)}\n\n{flags(fit(samples))}"


def compare(args: argparse.Namespace, device: torch.device) -> str:
    """Every engine that the arguments name, planned and measured. Collective."""
    lines: list[Line] = []
    texts: list[str] = []
    for ep_size in args.ep_size:
        for stage in args.stage:
            case = Case(args, stage, ep_size, device)
            of_case, text = case.lines()
            lines += of_case
            texts += [text] if text else []
            case.close()
    return "\n\n".join([table(lines), *texts])


def table(lines: list[Line]) -> str:
    rows = ["| case | what | unit | planned | measured | planned / measured |", "|---|---|---|---|---|---|"]
    for line in lines:
        seen, ratio = "not here", ""
        if line.measured is not None:
            seen, ratio = f"{line.measured:.4g}", f"{line.planned / line.measured:.3f}"
        rows.append(f"| {line.case} | {line.what} | {line.unit} | {line.planned:.4g} | {seen} | {ratio} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    device = join()
    if device.type == "cpu" and args.size != "toy":
        raise ValueError(f"--size is {args.size!r}, which needs GPUs; valid on CPUs: 'toy'")
    text = report(args, device)
    if dist.get_rank() == 0:
        print(text, flush=True)
    dist.destroy_process_group()
    return 0


def report(args: argparse.Namespace, device: torch.device) -> str:
    """What is printed. Collective.

    Raises:
        ValueError: there is nothing to exchange.
    """
    world = dist.get_world_size()
    if args.calibrate and world == 1:
        raise ValueError("--calibrate measures an exchange between ranks, and there is one; start two or more")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    what = args.size if args.calibrate else f"{args.size}, {args.layers} layers"
    found = calibrate(args, device) if args.calibrate else compare(args, device)
    return f"{world} x {where}, {what}, {args.backend}, {versions}\n\n{found}"


if __name__ == "__main__":
    sys.exit(main())
