# SPDX-License-Identifier: GPL-3.0-or-later
"""Time whole training steps of a Hugging Face model under AutoEP: its own MoE layers against ours, ZeRO 0 to 3.

    python examples/benchmarks/autoep_step.py --num_layers 4 --out runs/autoep
    deepspeed --num_gpus 2 examples/benchmarks/autoep_step.py --num_layers 8 --stage 1 3 --out runs/autoep2

The model is Transformers' own Qwen3MoeForCausalLM with the config of Qwen3-30B-A3B (128 experts of 768, top-8, width
2048), cut in layers to what fits, with random weights and words. This is where ZeRO stage 3 is timed: DeepSpeed's own
`MoE`, which [step.py](step.py) trains, does not know it, and AutoEP does.

Every contender is a DeepSpeed engine with an `expert_parallel` section and the same optimizer (torch's fused AdamW,
which needs no compiler); ours has a `flashfusemoe` section too, and is made by `flashfusemoe_ds.initialize`. They
start from equal weights and see equal words. By default all of a stage are in memory together and take turns in blocks
of steps; with `--apart` one follows the other, so that a larger model fits.

    stock          AutoEP with its fastest settings on Hopper: native grouped products, combine_impl
                   "fused_weighted_sum", and between ranks async_split_plan
    stock_gate_up  the same with gate_up_impl "fused"
    stock_default  AutoEP with the settings it comes with
    ours           flashfusemoe_ds.initialize and its defaults

Measured for each:

step time     --accumulation times forward and backward, then the optimizer; from the end of the step before to its own
              end on the device, steps of a block following one another without a pause, the first of a block left
              out. The slowest rank counts. Forward and backward are also timed by themselves, because the optimizer's
              time grows with all parameters and falls with --accumulation.
peak memory   Most allocated in the warm-up steps, less what the other engines hold; of all ranks the most.
MoE layers    From a profile of --profile_steps steps, on GPUs: time during which at least one kernel that a MoE layer
              launched runs (its router and its exchange included, the gradients' collectives not), and its share of
              the time in which any kernel runs. All else is the same in every contender, and bounds what a faster
              layer brings. Slowest rank, median over steps.

Few layers leave the embedding and the output layer with a larger part of the step than the whole model gives them;
`--vocab_size` cuts both. Leaves `autoep_step.md` and `autoep_step.json` (every sample, losses, the machine and all
versions) in --out; `--trace` keeps rank 0's Chrome traces too. Toy sizes run without a GPU:

    deepspeed --num_gpus 2 examples/benchmarks/autoep_step.py --size toy --stage 1 3 --rounds 2 --steps 2
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import deepspeed
import torch
import torch.distributed as dist
from autoep_report import document, model_line, table
from autoep_trace import MoEPhases, moe_times
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from device_trace import OPTIMIZER, num_steps
from machine import describe
from step import DTYPES, command, quiet_libraries, say
from step_arguments import add_timing_arguments, check_timing_arguments
from step_engines import check_backend, group_names, join, world_size
from timed_steps import TimedSteps, between_ms, now, take_turns
from torch import Tensor, nn
from torch.profiler import record_function

import flashfusemoe_ds
from flashfusemoe_ds.config import SECTION

FORMAT = 1
NUM_BATCHES = 8  # then they come again

# Qwen/Qwen3-30B-A3B's config.json, but for the number of layers (it has 48).
QWEN3_30B_A3B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "router_aux_loss_coef": 0.001,
    "use_cache": False,
}
SIZES: dict[str, dict[str, Any]] = {
    "qwen3_30b_a3b": QWEN3_30B_A3B,
    "toy": {
        **QWEN3_30B_A3B,
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
}
CONTEXTS = {"qwen3_30b_a3b": 4096, "toy": 16}


@dataclass(frozen=True)
class Contender:
    """One way to train the model. `autoep` goes into the `expert_parallel` section, on GPUs only: AutoEP's fused
    kernels need one."""

    title: str
    ours: bool
    initialize: Callable[..., tuple[Any, ...]]
    autoep: dict[str, Any]


_FASTEST = {"disable_triton_grouped_mm": True, "combine_impl": "fused_weighted_sum", "async_split_plan": True}
CONTENDERS = {
    "stock": Contender("AutoEP", False, deepspeed.initialize, _FASTEST),
    "stock_gate_up": Contender(
        "AutoEP, gate_up fused", False, deepspeed.initialize, {**_FASTEST, "gate_up_impl": "fused"}
    ),
    "stock_default": Contender("AutoEP, as it comes", False, deepspeed.initialize, {}),
    "ours": Contender("flashfusemoe_ds", True, flashfusemoe_ds.initialize, {}),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time training steps under AutoEP, stock's layers and ours.")
    what = parser.add_argument_group("what to time")
    what.add_argument("--stage", nargs="+", type=int, choices=range(4), default=[1], help="ZeRO stages (default: 1)")
    what.add_argument(
        "--layers", nargs="+", choices=CONTENDERS, default=["stock", "ours"], help="contenders (default: stock ours)"
    )
    what.add_argument("--size", choices=SIZES, default="qwen3_30b_a3b", help="the model's, or one for a CPU")
    what.add_argument("--num_layers", type=int, help="of 48 (default: 4)")
    what.add_argument("--vocab_size", type=int, help="of 151936 (default: all)")
    what.add_argument("--autoep_size", type=int, help="ranks that share one set of experts (default: all that can)")
    what.add_argument("--batch", type=int, default=1, help="sequences per process and forward (default: 1)")
    what.add_argument("--context", type=int, help="tokens per sequence (default: 4096)")
    what.add_argument("--accumulation", type=int, default=1, help="forwards and backwards of a step (default: 1)")
    what.add_argument("--checkpointing", action="store_true", help="recompute activations, layer by layer")
    what.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on GPUs, float32 on CPUs")
    what.add_argument(
        "--bf16_states", action="store_true", help="master weights and optimizer states in bf16: 10 bytes a parameter"
    )
    what.add_argument("--ep_backend", default="nccl", help="our transport between expert-parallel ranks")
    what.add_argument("--learning_rate", type=float, default=3e-4)
    what.add_argument("--gradient_clipping", type=float, default=1.0, help="0 is none")
    what.add_argument("--seed", type=int, default=0)

    how = parser.add_argument_group("how")
    how.add_argument("--apart", action="store_true", help="one engine in memory at a time; no turns")
    add_timing_arguments(
        how,
        "engine",
        steps=4,
        profile_steps=2,
        files="autoep_step.md and autoep_step.json",
        trace="keep Chrome traces; needs --out",
    )
    args = parser.parse_args(argv)

    args.context = CONTEXTS[args.size] if args.context is None else args.context
    positive = ("num_layers", "vocab_size", "autoep_size", "batch", "context", "accumulation")
    check_timing_arguments(parser, args, positive)
    args.dtype = args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    args.stages, args.keys = list(dict.fromkeys(args.stage)), list(dict.fromkeys(args.layers))
    if args.bf16_states and (args.dtype != "bfloat16" or 0 in args.stages):
        parser.error("--bf16_states: needs --dtype bfloat16 and a --stage of 1, 2 or 3")
    given = {"num_hidden_layers": args.num_layers, "vocab_size": args.vocab_size}
    args.model = {**SIZES[args.size], **{name: value for name, value in given.items() if value is not None}}
    ranks, experts = world_size(), args.model["num_experts"]
    args.autoep_size = args.autoep_size or math.gcd(experts, ranks)
    if experts % args.autoep_size or ranks % args.autoep_size:
        parser.error(f"--autoep_size {args.autoep_size}: must divide the {experts} experts and the {ranks} processes")
    try:
        check_backend(args.ep_backend)
        check_transformers()
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    return args


def check_transformers() -> None:
    """ImportError without Transformers, which is not among the package's requirements."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError('this needs transformers: pip install "flashfusemoe_ds[hf]"') from error


def make_model(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """The same weights for every contender and on every rank."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(args.seed)
    with device:
        model = AutoModelForCausalLM.from_config(
            Qwen3MoeConfig(**args.model), dtype=DTYPES[args.dtype], attn_implementation="sdpa"
        )
    if args.checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


def ds_config(key: str, stage: int, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    contender, cuda = CONTENDERS[key], device.type == "cuda"
    adamw = {"torch_adam": True, "lr": args.learning_rate, "betas": [0.9, 0.95], "weight_decay": 0.1}
    bf16 = {"enabled": args.dtype == "bfloat16"}
    if args.bf16_states:
        bf16 |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    config = {
        "train_micro_batch_size_per_gpu": args.batch,
        "gradient_accumulation_steps": args.accumulation,
        "gradient_clipping": args.gradient_clipping,
        "bf16": bf16,
        "optimizer": {"type": "AdamW", "params": {**adamw, **({"fused": True} if cuda else {})}},
        "zero_optimization": {"stage": stage, **({"overlap_comm": True} if stage else {})},
        "expert_parallel": {"enabled": True, "autoep_size": args.autoep_size, **(contender.autoep if cuda else {})},
        "steps_per_print": 1_000_000_000,
    }
    return {**config, SECTION: {"ep_backend": args.ep_backend}} if contender.ours else config


def random_batches(args: argparse.Namespace, rank: int, device: torch.device) -> Tensor:
    """int64 [NUM_BATCHES, A, B, S], the words of a step's A forwards: uniform; other ones on every rank."""
    generator = torch.Generator().manual_seed(1_000_003 * args.seed + rank)
    size = (NUM_BATCHES, args.accumulation, args.batch, args.context)
    return torch.randint(args.model["vocab_size"], size, generator=generator).to(device)


class Run:
    """One engine at one stage, and the steps that were timed of it."""

    def __init__(self, key: str, stage: int, args: argparse.Namespace, batches: Tensor) -> None:
        self.key, self.stage, self.device = key, stage, batches.device
        gc.collect()
        held_before = torch.cuda.memory_allocated() if batches.is_cuda else 0
        model = make_model(args, self.device)
        self.parameters = parameter_counts(model, args.model)
        self.engine = CONTENDERS[key].initialize(
            model=model,
            model_parameters=list(model.parameters()),
            config=ds_config(key, stage, args, self.device),
        )[0]
        self.moe_layers = [m for m in self.engine.module.modules() if isinstance(m, AutoEPMoELayer)]
        self.timed = TimedSteps(self._step, batches, held_before)
        self.forward_backward: list[tuple[Any, Any]] = []  # its start and end, of each step
        self.moe: list[dict[str, float]] = []

    def _step(self, words_ABS: Tensor) -> Tensor:
        start, losses = now(self.device), []
        for number, words_BS in enumerate(words_ABS, start=1):
            loss = self.engine(input_ids=words_BS, labels=words_BS).loss
            self.engine.backward(loss)
            losses.append(loss.detach())
            if number == len(words_ABS):
                self.forward_backward.append((start, now(self.device)))
            with record_function(OPTIMIZER):
                self.engine.step()
        return torch.stack(losses).mean()

    def profile(self, steps: int, keep: Path | None) -> None:
        """Profiles steps; the trace stays at `keep`, gzipped, if given."""
        with MoEPhases().of(self.engine.module):
            self.timed.profile(steps, group_names(), keep)
        kernels = self.timed.kernels
        self.moe = [moe_times(kernels, step) for step in range(1, num_steps(kernels))]

    def row(self, args: argparse.Namespace) -> dict[str, Any]:
        """JSON-ready, all ranks' samples as the slowest's. Collective."""
        # After the warm-up come blocks, the first step of each untimed.
        block = 1 + args.steps
        marks = self.forward_backward[args.warmup :][: args.rounds * block]
        own_ms = [between_ms(*pair) for number, pair in enumerate(marks) if number % block]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (own_ms, self.moe))
        forward_backward_ms, moe = zip(*everyone, strict=True)
        load_LE = torch.stack([layer.tokens_per_expert for layer in self.moe_layers]).float()
        dist.all_reduce(load_LE)
        contender = CONTENDERS[self.key]
        return {
            "stage": self.stage,
            "key": self.key,
            "title": contender.title,
            "ours": contender.ours,
            "layer": type(self.moe_layers[0]).__name__,
            "optimizer": _optimizer_name(self.engine),
            **self.timed.gathered(),
            "forward_backward_ms": [max(of_ranks) for of_ranks in zip(*forward_backward_ms, strict=True)],
            # Of each profiled step the rank with the slowest MoE layers.
            "moe": [max(ranks, key=lambda times: times["moe"]) for ranks in zip(*moe, strict=True)],
            "max_over_mean_load": (load_LE.max(1).values / load_LE.mean(1)).tolist(),
        }

    def close(self) -> None:
        """Gives the engine's memory back."""
        self.engine.destroy()
        del self.engine, self.moe_layers, self.timed
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _optimizer_name(engine: Any) -> str:
    """As in "DeepSpeedZeroOptimizer(AdamW, fused)"."""
    outer, inner = engine.optimizer, getattr(engine.optimizer, "optimizer", None)
    if inner is None:
        return type(outer).__name__
    fused = ", fused" if inner.defaults.get("fused") else ""
    return f"{type(outer).__name__}({type(inner).__name__}{fused})"


def parameter_counts(model: nn.Module, config: dict[str, Any]) -> dict[str, int]:
    """Of a plain Transformers model: all parameters, and those that one token's forward pass touches."""
    total = sum(param.numel() for param in model.parameters())
    experts = sum(param.numel() for name, param in model.named_parameters() if ".experts." in name)
    return {
        "total": total,
        "active": total - experts + experts * config["num_experts_per_tok"] // config["num_experts"],
    }


def run_stage(stage: int, args: argparse.Namespace, batches: Tensor) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The rows of all contenders at one stage, and the model's parameters."""
    rows: list[dict[str, Any]] = []
    for keys in ([key] for key in args.keys) if args.apart else [args.keys]:
        runs = [_ready(key, stage, args, batches) for key in keys]
        take_turns([run.timed for run in runs], args.rounds, args.steps)
        if batches.is_cuda and args.profile_steps:
            for run in runs:
                keep = args.trace and dist.get_rank() == 0
                run.profile(args.profile_steps, args.out / f"autoep_zero{stage}_{run.key}.json.gz" if keep else None)
        rows += [run.row(args) for run in runs]
        parameters = runs[0].parameters
        for run in runs:
            run.close()
    return rows, parameters


def _ready(key: str, stage: int, args: argparse.Namespace, batches: Tensor) -> Run:
    start = time.monotonic()
    run = Run(key, stage, args, batches)
    run.timed.warm_up(args.warmup)
    say(f"ZeRO {stage}, {CONTENDERS[key].title}: ready after {time.monotonic() - start:.1f} s")
    return run


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    quiet_libraries()
    device = join()
    rank = dist.get_rank()
    batches = random_batches(args, rank, device)
    settings = (
        "autoep_size", "batch", "context", "accumulation", "checkpointing", "dtype", "bf16_states", "ep_backend",
        "learning_rate", "gradient_clipping", "seed", "apart", "warmup", "rounds", "steps", "profile_steps",
    )  # fmt: skip
    outcome: dict[str, Any] = {
        "format": FORMAT,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command(),
        "machine": describe(device),
        "world_size": dist.get_world_size(),
        "model": args.model,
        "tokens_per_step": dist.get_world_size() * args.batch * args.context * args.accumulation,
        "settings": {name: getattr(args, name) for name in settings},
        "rows": [],
    }
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    for stage in args.stages:
        rows, outcome["parameters"] = run_stage(stage, args, batches)
        outcome["rows"] += rows
        # After each stage, so that a later failure loses nothing.
        if rank == 0 and args.out is not None:
            (args.out / "autoep_step.json").write_text(json.dumps(outcome, indent=1) + "\n")
            (args.out / "autoep_step.md").write_text(document(outcome))
    if rank == 0:
        print(f"{model_line(outcome)}\n\n{table(outcome)}", flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
