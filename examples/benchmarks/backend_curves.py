# SPDX-License-Identifier: GPL-3.0-or-later
"""Train one model with one transport after another, and compare the loss curves.

    torchrun --nproc_per_node 2 examples/benchmarks/backend_curves.py --out runs/curves

The byte-level model of examples/train_lm.py at EP = number of processes, under DeepSpeed's engine at ZeRO 1, with
equal weights and equal text for all curves. `--curves` names transports (`ep_backend`), or `ep1`: every process holds
all experts, and nothing is exchanged. One that cannot run here is left out, with the reason. The same name twice shows
whether a run repeats itself.

What the layer computes does not depend on the transport: rows arrive in one order everywhere, and between two ranks a
sum of two has but one order. So with PyTorch's deterministic algorithms curves of two processes can be equal to the
last bit. With more ranks transports add rows in different orders, and `ep1` rounds once where the others round twice;
`--tolerance` says how far a step's loss may be from the first curve's. Training is in bfloat16 on GPUs, because DeepEP
carries nothing else, and in float32 on CPUs, where only nccl (over gloo) and ep1 run.

Prints a Markdown table and leaves `curves.json` and `curves.png` in --out. Exits with 1 where a loss is further off.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from lm.data import Corpus, load_corpus
from lm.model import ByteLM, LMConfig, parameter_counts, parameter_groups
from lm.small import train
from machine import describe
from step import command, quiet_libraries, say
from step_engines import check_backend, join, world_size
from torch import nn

import flashfusemoe_ds as ffmoe
from flashfusemoe_ds.config import SECTION
from flashfusemoe_ds.dispatch.select import EP_BACKENDS

FORMAT = 1
EP1 = "ep1"
SHOWN = 10  # steps in the table


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare the loss curves of transports.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--curves", nargs="+", choices=(*EP_BACKENDS, EP1), default=["nccl", "symm_mem", "deep_ep"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tolerance", type=float, default=0.02, help="nats per byte, of any step's loss")
    parser.add_argument("--batch", type=int, default=8, help="windows per process")
    parser.add_argument("--context", type=int, default=256, help="bytes of a window")
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--hidden_size", type=int, default=256, help="DeepEP takes multiples of 256")
    parser.add_argument("--num_experts", type=int, default=8)
    parser.add_argument("--top_k", type=int, default=2)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--data", help="text file or folder; the Python standard library if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for curves.json and curves.png")
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # the deepspeed launcher's
    args = parser.parse_args(argv)
    for name in ("steps", "batch", "context"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name} {getattr(args, name)}: must be positive")
    if args.tolerance < 0:
        parser.error(f"--tolerance {args.tolerance}: must not be negative")
    try:
        args.model = LMConfig(
            num_layers=args.num_layers,
            hidden_size=args.hidden_size,
            num_heads=4,
            mlp_size=3 * args.hidden_size,
            num_experts=args.num_experts,
            expert_size=3 * args.hidden_size // 2,
            top_k=args.top_k,
            ep_size=world_size(),
            context=args.context,
        )
    except ValueError as error:
        parser.error(str(error))
    return args


def make_model(cfg: LMConfig, seed: int, rank: int) -> ByteLM:
    """A model whose expert e has the same weights on whichever rank it lives."""
    torch.manual_seed(seed)
    whole = ByteLM(replace(cfg, ep_size=1))
    if cfg.ep_size == 1:
        return whole
    model, local = ByteLM(cfg), cfg.num_experts // cfg.ep_size
    own = slice(rank % cfg.ep_size * local, (rank % cfg.ep_size + 1) * local)
    with torch.no_grad():
        for param, of_all in zip(model.parameters(), whole.parameters(), strict=True):
            param.copy_(of_all[own] if is_moe_param(param) else of_all)
    return model


def ds_config(backend: str, args: argparse.Namespace, bf16: bool) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": args.batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": bf16},
        "optimizer": {
            "type": "AdamW",
            "params": {"torch_adam": True, "lr": args.learning_rate, "betas": [0.9, 0.95], "weight_decay": 0.1},
        },
        "zero_optimization": {"stage": 1},
        SECTION: {"ep_backend": backend},
        "steps_per_print": 1_000_000_000,
    }


def curve(name: str, args: argparse.Namespace, corpus: Corpus, device: torch.device) -> list[float]:
    """The mean loss of all ranks at every step, nats per byte. Collective.

    Raises:
        ValueError, ImportError: the transport cannot run here; on every rank alike.
    """
    backend, cfg = ("nccl", replace(args.model, ep_size=1)) if name == EP1 else (name, args.model)
    check_backend(backend)
    model: nn.Module = make_model(cfg, args.seed, dist.get_rank())
    engine, *_ = ffmoe.initialize(
        model=model, model_parameters=parameter_groups(model), config=ds_config(backend, args, device.type == "cuda")
    )
    try:
        return train(engine, corpus, range(args.steps), args.seed)
    finally:
        ffmoe.close(engine)
        engine.destroy()
        gc.collect()


def be_deterministic(device: torch.device) -> None:
    """Before the first product on a GPU."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False


def numbered(names: Iterable[str]) -> list[str]:
    """Names of their own for those that come again."""
    seen: dict[str, int] = {}
    titles = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        titles.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return titles


def differences(curves: dict[str, list[float]]) -> dict[str, float]:
    """The largest distance of each curve from the first one, over all steps; infinite where a loss is no number."""
    first = next(iter(curves.values()))
    largest = {}
    for name, losses in curves.items():
        apart = [abs(a - b) for a, b in zip(losses, first, strict=True)]
        largest[name] = max(apart) if all(d == d for d in apart) else float("inf")
    return largest


def table(curves: dict[str, list[float]]) -> str:
    """A column per curve, a row for some steps, and the largest difference of all steps."""
    steps = len(next(iter(curves.values())))
    shown = sorted({0, steps - 1, *(round(i * (steps - 1) / (SHOWN - 1)) for i in range(SHOWN))})
    lines = ["| step | " + " | ".join(curves) + " |", "|" + "---|" * (1 + len(curves))]
    lines += [
        f"| {step + 1} | " + " | ".join(f"{losses[step]:.6f}" for losses in curves.values()) + " |" for step in shown
    ]
    apart = ["0, bit-equal" if d == 0 else f"{d:.2e}" for d in differences(curves).values()]
    lines.append("| largest difference | " + " | ".join(["", *apart[1:]]) + " |")
    return "\n".join(lines)


def draw(outcome: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")  # training machines have no display
    import matplotlib.pyplot as plt

    curves: dict[str, list[float]] = outcome["curves"]
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained", width_ratios=(1.4, 1))
    for i, (name, losses) in enumerate(curves.items()):
        # Wide below narrow, so that curves on top of each other are all seen.
        left.plot(range(1, 1 + len(losses)), losses, lw=5 - 4 * i / max(1, len(curves) - 1), label=name, alpha=0.8)
    left.set(xlabel="optimizer step", ylabel="cross-entropy (nats per byte)", title="Loss")
    left.legend(frameon=False)
    first, *others = curves
    for i, name in enumerate(others, start=1):
        apart = [abs(a - b) for a, b in zip(curves[name], curves[first], strict=True)]
        right.plot(range(1, 1 + len(apart)), apart, lw=1.2, color=f"C{i}", label=name)
    right.axhline(outcome["settings"]["tolerance"], color="gray", ls=":", lw=1, label="tolerance")
    right.set_ylim(bottom=-0.04 * right.get_ylim()[1])  # a distance of zero stands above the axis
    right.set(xlabel="optimizer step", ylabel="nats per byte", title=f"Distance from {first}")
    right.legend(frameon=False)
    machine = outcome["machine"]
    fig.suptitle(f"{outcome['world_size']} x {machine['device']}, {outcome['dtype']}", fontsize=11)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    quiet_libraries()
    device = join()
    be_deterministic(device)
    corpus = load_corpus(args.data, args.context)
    curves: dict[str, list[float]] = {}
    refused: dict[str, str] = {}
    for name, title in zip(args.curves, numbered(args.curves), strict=True):
        start = time.monotonic()
        try:
            with contextlib.redirect_stdout(sys.stderr):  # what libraries print is no part of a table
                curves[title] = curve(name, args, corpus, device)
        except (ValueError, ImportError) as error:
            refused[title] = str(error)
            say(f"{title}: cannot run here: {error}")
        else:
            say(f"{title}: {args.steps} steps, {time.monotonic() - start:.1f} s")
    settings = ("curves", "steps", "tolerance", "batch", "learning_rate", "data", "seed")
    outcome = {
        "format": FORMAT,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command(),
        "machine": describe(device),
        "world_size": dist.get_world_size(),
        "dtype": "bfloat16" if device.type == "cuda" else "float32",
        "model": asdict(args.model),
        "parameters": parameter_counts(make_model(args.model, args.seed, dist.get_rank())),
        "settings": {name: getattr(args, name) for name in settings},
        "curves": curves,
        "refused": refused,
        "differences": differences(curves) if curves else {},
    }
    equal = all(d <= args.tolerance for d in outcome["differences"].values())
    if dist.get_rank() == 0:
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "curves.json").write_text(json.dumps(outcome, indent=1) + "\n")
            if curves and importlib.util.find_spec("matplotlib"):
                draw(outcome, args.out / "curves.png")
        if curves:
            print(table(curves), flush=True)
            print(f"\n{'within' if equal else 'BEYOND'} the tolerance of {args.tolerance:g} nats per byte", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return 0 if curves and equal else 1


if __name__ == "__main__":
    sys.exit(main())
