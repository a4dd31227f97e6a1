# SPDX-License-Identifier: GPL-3.0-or-later
"""Time the exchange between expert-parallel ranks by itself: dispatch, redispatch and combine of every transport.

    torchrun --nproc_per_node 2 examples/benchmarks/transport.py --backends nccl symm_mem deep_ep

Prints a Markdown table on rank 0. Each sample starts with all ranks' streams meeting, and counts for the slowest rank;
a row is the median of its samples. Before it is timed, a transport must bring every token home as often as ranks
computed it. `symm_mem no host` is symm_mem with a capacity_factor; `in a graph` it is a replayed CUDA graph, per
exchange.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist
from exchange_cost import time_calls
from torch import Tensor

from flashfusemoe_ds.config import FlashFuseMoEConfig
from flashfusemoe_ds.dispatch.base import Dispatcher, Geometry
from flashfusemoe_ds.dispatch.select import close_dispatcher, make_dispatcher

BACKENDS = ("nccl", "deep_ep", "symm_mem", "symm_mem no host")
IN_GRAPH = 10  # exchanges of one graph
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Row:
    """One line of the table, times in microseconds."""

    name: str
    dispatch: float
    redispatch: float
    combine: float
    combine_weights: float


@dataclass(frozen=True)
class Data:
    x_TD: Tensor
    idx_TK: Tensor
    weight_TK: Tensor
    copies_T: Tensor  # ranks that compute each token


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time dispatch, redispatch and combine of every transport.")
    parser.add_argument("--backends", nargs="+", default=["nccl", "symm_mem", "symm_mem no host"], choices=BACKENDS)
    parser.add_argument("--T", type=int, default=4096, help="tokens per rank (default: 4096)")
    parser.add_argument("--D", type=int, default=2048, help="hidden size (default: 2048)")
    parser.add_argument("--E", type=int, default=64, help="experts (default: 64)")
    parser.add_argument("--K", type=int, default=8, help="experts per token (default: 8)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--num_sms", type=int, nargs="+", default=[24], help="of deep_ep and symm_mem (default: 24)")
    parser.add_argument("--capacity_factor", type=float, default=1.5, help="of symm_mem no host (default: 1.5)")
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--link", type=float, default=389.0, help="GB/s that a copy to a peer reaches (default: 389)")
    return parser.parse_args()


def make_data(args: argparse.Namespace, rank: int, world: int) -> Data:
    g = torch.Generator("cuda").manual_seed(rank)
    idx_TK = torch.rand(args.T, args.E, generator=g, device="cuda").topk(args.K, dim=1)[1]
    owner_TK = idx_TK // (args.E // world)
    copies_T = sum((owner_TK == p).any(1).float() for p in range(world))
    x_TD = torch.randn(args.T, args.D, generator=g, device="cuda").to(DTYPES[args.dtype])
    return Data(x_TD, idx_TK, torch.rand(args.T, args.K, generator=g, device="cuda"), copies_T)


def make(backend: str, num_sms: int, args: argparse.Namespace) -> Dispatcher:
    settings: dict[str, object] = {"num_sms": num_sms, "max_tokens_per_rank": args.T}
    if backend == "symm_mem no host":
        settings["capacity_factor"] = args.capacity_factor
    name = backend.split()[0]
    section = {"ep_backend": name} if name == "nccl" else {"ep_backend": name, name: settings}
    geometry = Geometry(args.E, args.D, args.K, DTYPES[args.dtype])
    return make_dispatcher(FlashFuseMoEConfig.from_section(section), dist.group.WORLD, geometry)


def slowest_us(work: Callable[[], object], samples: int, per_sample: int = 1) -> float:
    """Median over samples of the slowest rank's time."""
    (ms,) = time_calls([work], torch.device("cuda"), samples)
    return 1e3 * ms / per_sample


def check(dispatcher: Dispatcher, data: Data) -> None:
    """Raises if the tokens do not come home as they must, or the weights not at all."""
    sent = dispatcher.start_dispatch(data.x_TD, data.idx_TK, data.weight_TK).wait()
    again = dispatcher.start_redispatch(data.x_TD, sent.handle).wait()
    kept = torch.where(sent.idx_RK >= 0, sent.weight_RK, 0)
    home = dispatcher.start_combine(again, sent.handle, kept)
    rows, weights = home.rows.wait(), home.weights.wait()
    expected = (data.x_TD.float() * data.copies_T.unsqueeze(1)).to(data.x_TD.dtype)
    torch.testing.assert_close(rows, expected)
    torch.testing.assert_close(weights, data.weight_TK)


def time_eager(name: str, dispatcher: Dispatcher, data: Data, samples: int) -> Row:
    def send() -> object:
        return dispatcher.start_dispatch(data.x_TD, data.idx_TK, data.weight_TK).wait()

    sent = send()
    y_RD, weight_RK = sent.x_RD.clone(), torch.where(sent.idx_RK >= 0, sent.weight_RK, 0)

    def combine_both() -> None:
        home = dispatcher.start_combine(y_RD, sent.handle, weight_RK)
        home.weights.wait(), home.rows.wait()

    return Row(
        name,
        slowest_us(send, samples),
        slowest_us(lambda: dispatcher.start_redispatch(data.x_TD, sent.handle).wait(), samples),
        slowest_us(lambda: dispatcher.start_combine(y_RD, sent.handle).rows.wait(), samples),
        slowest_us(combine_both, samples),
    )


def time_graphs(name: str, dispatcher: Dispatcher, data: Data, samples: int) -> Row:
    """Like `time_eager`, without the time that the host takes to launch."""
    sent = dispatcher.start_dispatch(data.x_TD, data.idx_TK, data.weight_TK).wait()
    y_RD, weight_RK = sent.x_RD.clone(), torch.where(sent.idx_RK >= 0, sent.weight_RK, 0)

    def timed(exchange: Callable[[], object]) -> float:
        exchange()
        torch.cuda.synchronize()
        dist.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(IN_GRAPH):
                exchange()
        return slowest_us(graph.replay, samples, IN_GRAPH)

    return Row(
        f"{name}, in a graph",
        timed(lambda: dispatcher.start_dispatch(data.x_TD, data.idx_TK, data.weight_TK).wait()),
        timed(lambda: dispatcher.start_redispatch(data.x_TD, sent.handle).wait()),
        timed(lambda: dispatcher.start_combine(y_RD, sent.handle).rows.wait()),
        timed(lambda: dispatcher.start_combine(y_RD, sent.handle, weight_RK).rows.wait()),
    )


def wire_bytes(data: Data, rank: int, args: argparse.Namespace, world: int) -> float:
    """Most bytes of rows that one rank takes in from others in one exchange."""
    owner_TK = data.idx_TK // (args.E // world)
    sent_P = torch.stack([(owner_TK == p).any(1).sum() if p != rank else owner_TK.new_zeros(()) for p in range(world)])
    dist.all_reduce(sent_P)
    return float(sent_P.max()) * data.x_TD.shape[1] * data.x_TD.element_size()


def table(rows: list[Row], wire: float, link: float) -> str:
    """Markdown. Wire: the share of dispatch + combine that the rows alone would take at the link's speed."""
    lines = [
        "| us | dispatch | redispatch | combine | combine with weights | dispatch + combine | wire |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        both = row.dispatch + row.combine
        share = 2 * wire / (link * 1e3) / both
        numbers = (row.dispatch, row.redispatch, row.combine, row.combine_weights, both)
        lines.append(f"| {row.name} | {' | '.join(f'{n:.0f}' for n in numbers)} | {share:.0%} |")
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    rank, world = dist.get_rank(), dist.get_world_size()
    data = make_data(args, rank, world)
    rows = []
    for backend in args.backends:
        for num_sms in args.num_sms[:1] if backend == "nccl" else args.num_sms:
            name = backend if backend == "nccl" else f"{backend}, {num_sms} SMs"
            try:
                dispatcher = make(backend, num_sms, args)
            except (ValueError, ImportError) as error:  # on every rank alike
                if rank == 0:
                    print(f"{name}: {error}", file=sys.stderr)
                continue
            check(dispatcher, data)
            rows.append(time_eager(name, dispatcher, data, args.samples))
            if backend == "symm_mem no host":
                rows.append(time_graphs(name, dispatcher, data, args.samples))
            close_dispatcher(dispatcher)
    wire = wire_bytes(data, rank, args, world)
    if rank == 0:
        print(
            f"{world} x {torch.cuda.get_device_name()}, T={args.T}, D={args.D}, E={args.E}, K={args.K}, {args.dtype}"
        )
        print(f"{wire / 2**20:.1f} MiB per exchange and rank over the wire; link {args.link:g} GB/s\n")
        print(table(rows, wire, args.link))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
