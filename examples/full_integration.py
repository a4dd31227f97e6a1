# SPDX-License-Identifier: GPL-3.0-or-later
"""A whole training script around the MoE layer: plain PyTorch, expert parallelism, torch.compile, DeepSpeed.

    python examples/full_integration.py
    python examples/full_integration.py --compile
    torchrun --nproc_per_node=2 examples/full_integration.py --ep_size 2
    deepspeed --num_gpus 2 examples/full_integration.py --ep_size 2 --deepspeed_config ds_configs/cpu_zero1.json

Read it from the bottom: `main`, then the two ways to make a training step, then the model. Losses are in nats per
byte. Shape suffixes: B sequences, S bytes per sequence, D hidden size, V = 256 byte values.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from lm.data import SMALL_TEXT, load_corpus, train_batches
from lm.launch import start_deepspeed, start_torch, stop
from lm.layers import VOCAB, CausalAttention, SwiGLU, cross_entropy, rope_tables
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

import flashfusemoe_ds as ffmoe
from flashfusemoe_ds import MoELayer, OverlappedGradSync, get_dense_params

MAX_GRAD_NORM = 1.0


# --- the model -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """x + attention(norm(x)), then x + moe(norm(x))."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(args.hidden_size, eps=1e-5)
        self.attention = CausalAttention(args.hidden_size, args.num_heads)
        self.moe_norm = nn.RMSNorm(args.hidden_size, eps=1e-5)
        self.moe = self.make_moe(args)

    @staticmethod
    def make_moe(args: argparse.Namespace) -> nn.Module:
        if args.deepspeed_config is None:
            return MoELayer(
                d_model=args.hidden_size,
                ffn_dim=2 * args.expert_size,  # gate and up stacked
                num_experts=args.num_experts,
                top_k=args.top_k,
                activation="swiglu",
                aux_loss_coeff=args.aux_loss_coeff,
            )
        # The layer whose experts DeepSpeed's engine recognises: it reduces, shards and saves them as experts.
        return ffmoe.MoE(
            hidden_size=args.hidden_size,
            expert=SwiGLU(args.hidden_size, args.expert_size),
            num_experts=args.num_experts,
            ep_size=args.ep_size,
            k=args.top_k,
            drop_tokens=False,
            top2_2nd_expert_sampling=False,
        )

    def forward(self, x_BSD: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Also returns the layer's auxiliary loss: MoELayer's is weighted already, MoE's is not."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rope)
        y_BSD, losses, *_ = self.moe(self.moe_norm(x_BSD))
        return x_BSD + y_BSD, sum(losses.values()) if isinstance(losses, dict) else losses


class LanguageModel(nn.Module):
    """Next-byte prediction: int64 [B, S + 1] -> cross-entropy, and the blocks' auxiliary losses added up."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.head_dim = args.hidden_size // args.num_heads
        self.embedding = nn.Embedding(VOCAB, args.hidden_size)
        self.blocks = nn.ModuleList(Block(args) for _ in range(args.num_layers))
        self.norm = nn.RMSNorm(args.hidden_size, eps=1e-5)
        self.head = nn.Linear(args.hidden_size, VOCAB, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, window_BS: Tensor) -> tuple[Tensor, Tensor]:
        x_BSD = self.embedding(window_BS[:, :-1])
        rope = rope_tables(x_BSD.shape[1], self.head_dim, 10_000.0, x_BSD.device)
        aux_loss = x_BSD.new_zeros(())
        for block in self.blocks:
            x_BSD, block_aux_loss = block(x_BSD, rope)
            aux_loss = aux_loss + block_aux_loss
        return cross_entropy(self.head(self.norm(x_BSD)).float(), window_BS), aux_loss

    @property
    def expert_params(self) -> list[nn.Parameter]:
        return [param for block in self.blocks for param in block.moe.expert_params]


# --- a training step without an engine -----------------------------------------------------------------------------


class Ranks(NamedTuple):
    """How this process works with the others; `syncs` is empty where there are none."""

    syncs: Sequence[OverlappedGradSync] = ()
    ep_group: dist.ProcessGroup | None = None


def spread_experts(model: LanguageModel, args: argparse.Namespace, device: torch.device) -> Ranks:
    """Each rank keeps its share of every layer's experts; gradients are averaged while the backward still runs.

    The ranks form a grid: those of a row share one set of experts, those of a column hold the same ones.
    """
    if not dist.is_initialized():
        return Ranks()
    world = dist.get_world_size()
    mesh = init_device_mesh(device.type, (world // args.ep_size, args.ep_size), mesh_dim_names=("same", "ep"))
    for block in model.blocks:
        block.moe.shard_experts(mesh.get_group("ep"), ep_backend=args.ep_backend)
    syncs = (
        OverlappedGradSync(get_dense_params(model), dist.group.WORLD),
        # A row's tokens are summed already; what is left are the other rows, and the mean over all ranks.
        OverlappedGradSync(model.expert_params[::-1], mesh.get_group("same"), divisor=world),
    )
    return Ranks(syncs, mesh.get_group("ep"))


def clip_gradients(model: LanguageModel, ep_group: dist.ProcessGroup | None) -> None:
    """By the norm over all experts, of which this rank holds a part."""
    experts = model.expert_params
    held = {id(param) for param in experts}
    dense_norm = get_total_norm([p.grad for p in model.parameters() if id(p) not in held])
    squared = get_total_norm([param.grad for param in experts]).square()
    if ep_group is not None:
        dist.all_reduce(squared, group=ep_group)
    clip_grads_with_norm_(model.parameters(), MAX_GRAD_NORM, (dense_norm.square() + squared).sqrt())


def adamw(model: LanguageModel, args: argparse.Namespace) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)]


def plain_step(
    args: argparse.Namespace, make_optimizers: Callable[[LanguageModel, argparse.Namespace], list[Optimizer]] = adamw
) -> Callable[[Tensor], Tensor]:
    """One optimizer step in plain PyTorch: window int64 [B, S + 1] -> this rank's cross-entropy."""
    device = start_torch()
    torch.manual_seed(args.seed)  # every rank starts from the same whole model
    model = LanguageModel(args).to(device)
    ranks = spread_experts(model, args, device)
    optimizers = make_optimizers(model, args)  # after the experts were spread
    forward = torch.compile(model, backend=args.compile_backend) if args.compile else model

    def step(window_BS: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            loss, aux_loss = forward(window_BS.to(device))
        (loss + aux_loss).backward()
        for sync in ranks.syncs:
            sync.finish()
        clip_gradients(model, ranks.ep_group)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    return step


# --- a training step with DeepSpeed's engine -----------------------------------------------------------------------


def engine_step(args: argparse.Namespace) -> Callable[[Tensor], Tensor]:
    """The same with an engine: reduction, clipping, precision and optimizer are the JSON file's."""
    start_deepspeed()
    torch.manual_seed(args.seed)
    model = LanguageModel(args)
    engine, *_ = ffmoe.initialize(model=model, model_parameters=model.parameters(), config=args.deepspeed_config)
    args.batch_size = engine.train_micro_batch_size_per_gpu()
    if args.compile:
        engine.compile(backend=args.compile_backend)

    def step(window_BS: Tensor) -> Tensor:
        loss, aux_loss = engine(window_BS.to(engine.device))
        engine.backward(loss + args.aux_loss_coeff * aux_loss)
        engine.step()
        return loss.detach()

    return step


# --- the run -------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train a byte-level MoE language model.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    model = parser.add_argument_group("model")
    model.add_argument("--num_layers", type=int, default=3)
    model.add_argument("--hidden_size", type=int, default=64)
    model.add_argument("--num_heads", type=int, default=4)
    model.add_argument("--num_experts", type=int, default=8)
    model.add_argument("--expert_size", type=int, default=96, help="intermediate size of one expert")
    model.add_argument("--top_k", type=int, default=2, help="experts that each byte visits")
    model.add_argument("--aux_loss_coeff", type=float, default=0.01, help="weight of the load-balancing loss")

    training = parser.add_argument_group("training")
    training.add_argument("--data", default=SMALL_TEXT, help="text file or folder")
    training.add_argument("--context", type=int, default=64, help="bytes that the model sees at once")
    training.add_argument("--batch_size", type=int, default=8, help="windows per process; with DeepSpeed the JSON's")
    training.add_argument("--steps", type=int, default=40)
    training.add_argument("--lr", type=float, default=3e-3, help="with DeepSpeed the JSON's")
    training.add_argument("--bf16", action="store_true", help="autocast to bfloat16; with DeepSpeed the JSON's")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--log_every", type=int, default=10, help="steps")

    how = parser.add_argument_group("how it runs")
    how.add_argument("--ep_size", type=int, default=1, help="ranks that share one set of experts")
    how.add_argument("--ep_backend", default="nccl", help="transport between them; with DeepSpeed the JSON's")
    how.add_argument("--compile", action="store_true", help="torch.compile the model")
    how.add_argument("--compile_backend", default="inductor", help="for example aot_eager, without a C++ compiler")
    how.add_argument("--deepspeed_config", help="train with DeepSpeed's engine and this JSON file")
    how.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    return parser


def check(args: argparse.Namespace) -> None:
    """Before any rank waits for another."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    valid = [n for n in range(1, world + 1) if world % n == 0 and args.num_experts % n == 0]
    if args.ep_size not in valid:
        raise ValueError(
            f"ep_size={args.ep_size}: must divide the {world} processes and num_experts={args.num_experts}, "
            f"so be one of {valid}"
        )


def train(args: argparse.Namespace, step: Callable[[Tensor], Tensor]) -> None:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    corpus = load_corpus(args.data, args.context)
    for i in range(args.steps):
        (window_BS,) = train_batches(corpus.train, args.context, args.batch_size, 1, (args.seed, i, rank))
        loss = step(window_BS)
        if i % args.log_every == 0 or i == args.steps - 1:
            if world > 1:
                dist.all_reduce(loss)
            if rank == 0:
                print(f"step {i + 1:>4}  loss {loss.item() / world:.4f}", flush=True)
    stop()


def main() -> None:
    args = parser().parse_args()
    check(args)
    train(args, plain_step(args) if args.deepspeed_config is None else engine_step(args))


if __name__ == "__main__":
    main()
