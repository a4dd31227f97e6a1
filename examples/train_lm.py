# SPDX-License-Identifier: GPL-3.0-or-later
"""Train a byte-level Mixture-of-Experts language model with DeepSpeed, on GPUs or CPUs.

    deepspeed --num_gpus 2 examples/train_lm.py --deepspeed_config ds_configs/cpu_zero1.json

Reads the Python standard library's sources unless --data names a file or folder. Leaves in --run_dir: `metrics.json`,
`run.png` (loss curves, load of every expert), `sample.txt` (generated text) and `checkpoints/`, from which --resume
goes on exactly where the run stopped. Losses are in nats per byte.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
import hjson
import torch
from deepspeed.accelerator import get_accelerator
from lm.data import Corpus, held_out_batches, load_corpus, train_batches
from lm.launch import start_deepspeed, stop
from lm.layers import cross_entropy
from lm.model import ByteLM, LMConfig, parameter_counts, parameter_groups
from lm.plots import plot_run
from lm.progress import Progress
from lm.sample import generate
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import flashfusemoe_ds as ffmoe


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a byte-level MoE language model.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    model = parser.add_argument_group("model")
    model.add_argument("--num_layers", type=int, default=4, help="transformer layers; the first one has a dense MLP")
    model.add_argument("--hidden_size", type=int, default=128)
    model.add_argument("--num_heads", type=int, default=4)
    model.add_argument("--mlp_size", type=int, default=384, help="intermediate size of the dense MLP")
    model.add_argument("--num_experts", type=int, default=8, help="experts of each MoE layer")
    model.add_argument("--expert_size", type=int, default=192, help="intermediate size of one expert")
    model.add_argument("--top_k", type=int, default=2, help="experts that each byte visits")
    model.add_argument("--context", type=int, default=256, help="bytes that the model sees at once")
    model.add_argument("--ep_size", type=int, help="ranks that share one set of experts; default: as many as possible")

    training = parser.add_argument_group("training")
    training.add_argument("--data", help="text file or folder; default: the Python standard library")
    training.add_argument("--steps", type=int, default=400, help="optimizer steps of the whole run, resumed or not")
    training.add_argument("--warmup_steps", type=int, default=40)
    training.add_argument("--min_lr_ratio", type=float, default=0.05, help="learning rate at the end / at the top")
    training.add_argument("--aux_loss_coeff", type=float, default=0.01, help="weight of the load-balancing loss")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--log_every", type=int, default=10, help="steps")
    training.add_argument("--eval_every", type=int, default=100, help="steps")
    training.add_argument("--eval_batches", type=int, default=8, help="micro-batches per rank and evaluation")

    run = parser.add_argument_group("run")
    run.add_argument("--run_dir", type=Path, default=Path("runs/lm"), help="metrics, picture and sample go here")
    run.add_argument("--save_dir", type=Path, help="checkpoints go here; default: RUN_DIR/checkpoints")
    run.add_argument("--save_every", type=int, default=500, help="steps; a checkpoint is also saved at the end")
    run.add_argument("--resume", action="store_true", help="continue from the latest checkpoint in SAVE_DIR")
    run.add_argument("--prompt", default="def ", help="the sample's first bytes")
    run.add_argument("--sample_bytes", type=int, default=400)
    run.add_argument("--temperature", type=float, default=0.8)
    run.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    deepspeed.add_config_arguments(parser)
    args = parser.parse_args()

    if args.deepspeed_config is None:
        parser.error("--deepspeed_config is required, for example ds_configs/cpu_zero1.json")
    for name in ("steps", "context", "log_every", "eval_every", "eval_batches", "save_every", "temperature"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name} {getattr(args, name)}: must be positive")
    if not args.prompt:
        parser.error("--prompt '': must hold at least one byte")
    args.save_dir = args.save_dir or args.run_dir / "checkpoints"
    return args


def model_config(args: argparse.Namespace, world_size: int) -> LMConfig:
    # By default the largest expert-parallel group that divides both the experts and the ranks.
    ep_size = args.ep_size if args.ep_size is not None else math.gcd(args.num_experts, world_size)
    if ep_size < 1 or world_size % ep_size:
        divisors = [n for n in range(1, world_size + 1) if world_size % n == 0 and args.num_experts % n == 0]
        raise ValueError(f"ep_size={ep_size}: must divide the {world_size} processes, so be one of {divisors}")
    return LMConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_heads=args.num_heads,
        mlp_size=args.mlp_size,
        num_experts=args.num_experts,
        expert_size=args.expert_size,
        top_k=args.top_k,
        ep_size=ep_size,
        context=args.context,
    )


def warmup_then_cosine(args: argparse.Namespace) -> Callable[[Optimizer], LambdaLR] | None:
    """The schedule over --steps, times the config's learning rate; None if the config brings its own scheduler."""
    with open(args.deepspeed_config) as file:
        if "scheduler" in hjson.load(file):
            return None

    def ratio(step: int) -> float:
        if step < args.warmup_steps:
            return (step + 1) / args.warmup_steps
        done = min(1.0, (step - args.warmup_steps) / max(1, args.steps - args.warmup_steps))
        return args.min_lr_ratio + (1 - args.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))

    return lambda optimizer: LambdaLR(optimizer, ratio)


class Trainer:
    """One run: the engine, the data and the history that ends up in metrics.json."""

    def __init__(self, args: argparse.Namespace, cfg: LMConfig, corpus: Corpus) -> None:
        self.args, self.cfg, self.corpus = args, cfg, corpus
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(args.seed)
        model = ByteLM(cfg)
        self.parameters = parameter_counts(model)
        self.engine, *_ = ffmoe.initialize(
            args=args, model=model, model_parameters=parameter_groups(model), lr_scheduler=warmup_then_cosine(args)
        )
        self.device = self.engine.device
        self.batch = self.engine.train_micro_batch_size_per_gpu()
        self.step = 0
        self.seconds = 0.0
        self.history: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}

    def train(self) -> Tensor:
        """All steps that are left; returns the experts' load, [L, E] shares, of the final evaluation."""
        args = self.args
        progress = Progress(self.step, args.steps, enabled=self.rank == 0)
        loss_sum = torch.zeros((), device=self.device)
        counts_LE: Tensor | None = None
        started, logged_step = time.perf_counter(), self.step
        seconds_before, tick = self.seconds, started
        load_LE: Tensor | None = None
        while self.step < args.steps:
            loss, step_counts_LE = self.train_step()
            loss_sum += loss
            counts_LE = step_counts_LE if counts_LE is None else counts_LE + step_counts_LE
            progress.advance()
            # The first step is logged too: the curve then starts where training did.
            if self.step == 1 or self.step % args.log_every == 0 or self.step == args.steps:
                mean_loss = self.mean_over_ranks(loss_sum / (self.step - logged_step))
                total_LE = self.sum_over_ranks(counts_LE)
                progress.report(self.log(mean_loss, total_LE, self.step - logged_step, time.perf_counter() - tick))
                loss_sum.zero_()
                counts_LE, logged_step = None, self.step
                tick = time.perf_counter()
            if self.step % args.eval_every == 0 or self.step == args.steps:
                load_LE = self.evaluate()
                point = self.history["eval"][-1]
                progress.say(
                    f"step {self.step:>5}: held-out text {point['loss']:.3f} nats per byte "
                    f"= {point['bits_per_byte']:.3f} bits per byte"
                )
                tick = time.perf_counter()
            self.seconds = seconds_before + time.perf_counter() - started
            if self.step % args.save_every == 0 or self.step == args.steps:
                self.save()
                tick = time.perf_counter()
        progress.close()
        return self.evaluate(record=False) if load_LE is None else load_LE

    def train_step(self) -> tuple[Tensor, Tensor]:
        """One optimizer step; returns this rank's mean loss and its routes per expert, [L, E]."""
        accumulate = self.engine.gradient_accumulation_steps()
        key = (self.args.seed, self.step, self.rank)
        losses: list[Tensor] = []
        counts: list[Tensor] = []
        for window_BS in train_batches(self.corpus.train, self.cfg.context, self.batch, accumulate, key):
            window_BS = window_BS.to(self.device)
            output = self.engine(window_BS[:, :-1])
            loss = cross_entropy(output.logits_BSV, window_BS)
            self.engine.backward(loss + self.args.aux_loss_coeff * output.l_aux)
            self.engine.step()
            losses.append(loss.detach())
            counts.append(output.counts_LE)
        self.step += 1
        return torch.stack(losses).mean(), torch.stack(counts).sum(0)

    @torch.no_grad()
    def evaluate(self, record: bool = True) -> Tensor:
        """Loss over the held-out windows of all ranks, into the history; returns the load, [L, E] shares."""
        self.engine.eval()
        losses: list[Tensor] = []
        counts: list[Tensor] = []
        windows = held_out_batches(
            self.corpus.held_out, self.cfg.context, self.batch, self.args.eval_batches, self.rank, self.world_size
        )
        for window_BS in windows:
            window_BS = window_BS.to(self.device)
            output = self.engine(window_BS[:, :-1])
            losses.append(cross_entropy(output.logits_BSV, window_BS))
            counts.append(output.counts_LE)
        self.engine.train()
        loss = self.mean_over_ranks(torch.stack(losses).mean())
        if record:
            self.history["eval"].append({"step": self.step, "loss": loss, "bits_per_byte": loss / math.log(2)})
        total_LE = self.sum_over_ranks(torch.stack(counts).sum(0)).double()
        return total_LE / total_LE.sum(dim=1, keepdim=True)

    def log(self, loss: float, counts_LE: Tensor, steps: int, seconds: float) -> dict[str, Any]:
        tokens = steps * self.engine.train_batch_size() * self.cfg.context
        load_LE = counts_LE.double() / counts_LE.double().mean(dim=1, keepdim=True)
        point = {
            "step": self.step,
            "loss": loss,
            "lr": self.engine.get_lr()[0],
            "tokens_per_second": tokens / seconds,
            "load_max_over_mean": load_LE.max(dim=1).values.mean().item(),
        }
        self.history["train"].append(point)
        return point

    def save(self) -> None:
        state = {"step": self.step, "seconds": self.seconds, "history": self.history}
        self.engine.save_checkpoint(str(self.args.save_dir), tag=f"step_{self.step}", client_state=state)

    def resume(self) -> None:
        if not (self.args.save_dir / "latest").is_file():
            raise ValueError(f"save_dir={str(self.args.save_dir)!r}: holds no checkpoint to resume from")
        _, state = self.engine.load_checkpoint(str(self.args.save_dir))
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]

    def sample(self) -> str:
        self.engine.eval()
        args = self.args
        text = generate(
            self.engine, args.prompt, args.sample_bytes, self.cfg.context, self.device, args.temperature, args.seed
        )
        self.engine.train()
        return text

    def metrics(self, load_LE: Tensor) -> dict[str, Any]:
        """Everything about the finished run that the picture and a later comparison need."""
        return {
            "model": asdict(self.cfg),
            "parameters": self.parameters,
            "data": {
                "name": self.corpus.name,
                "train_bytes": len(self.corpus.train),
                "held_out_bytes": len(self.corpus.held_out),
            },
            "run": {
                "world_size": self.world_size,
                "device": get_accelerator().device_name().upper().replace("CUDA", "GPU"),
                "dtype": str(next(self.engine.module.parameters()).dtype).removeprefix("torch."),
                "zero_stage": self.engine.zero_optimization_stage(),
                "train_batch_size": self.engine.train_batch_size(),
                "train_seconds": self.seconds,
                "torch": torch.__version__,
                "deepspeed": deepspeed.__version__,
                "args": {name: str(v) if isinstance(v, Path) else v for name, v in vars(self.args).items()},
                "deepspeed_config": self.engine.config,
            },
            "final": self.history["eval"][-1],
            "expert_load": load_LE.tolist(),
            "history": self.history,
        }

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        value = value.to(self.device, copy=True)
        dist.all_reduce(value)
        return value

    def mean_over_ranks(self, value: Tensor) -> float:
        return self.sum_over_ranks(value).item() / self.world_size


def write_results(run_dir: Path, metrics: dict[str, Any], sample: str) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    (run_dir / "sample.txt").write_text(sample + "\n")
    plot_run(metrics, run_dir / "run.png")
    first, final = metrics["history"]["train"][0], metrics["final"]
    print(f"\n--- generated text ---\n{sample}\n--- end of generated text ---\n")
    print(
        f"{first['loss']:.3f} nats per byte at step {first['step']}, {final['loss']:.3f} on held-out text at step "
        f"{final['step']} ({final['bits_per_byte']:.3f} bits per byte); "
        f"{metrics['run']['train_seconds']:.0f} s of training"
    )
    print(f"wrote metrics.json, run.png and sample.txt to {run_dir}")


def main() -> None:
    args = parse_args()
    start_deepspeed()
    cfg = model_config(args, dist.get_world_size())
    trainer = Trainer(args, cfg, load_corpus(args.data, args.context))
    if args.resume:
        trainer.resume()
    if trainer.rank == 0:
        print(
            f"{trainer.parameters['total']:,} parameters ({trainer.parameters['active']:,} active per byte), "
            f"{cfg.num_experts} experts in each of {cfg.num_layers - 1} MoE layers, EP={cfg.ep_size}, "
            f"{trainer.world_size} processes; {len(trainer.corpus.train):,} bytes of {trainer.corpus.name}",
            flush=True,
        )
    load_LE = trainer.train()
    sample = trainer.sample()
    if trainer.rank == 0:
        write_results(args.run_dir, trainer.metrics(load_LE), sample)
    stop()


if __name__ == "__main__":
    main()
