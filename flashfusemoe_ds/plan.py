# SPDX-License-Identifier: GPL-3.0-or-later
"""Memory per GPU and bytes on the wire of a training run, before it is run (docs/planning.md):

    python -m flashfusemoe_ds.plan --config ds.json --model path/to/config.json --gpus 8 --ep_size 1 2 4 8 \
        --sequence_length 4096 --skew 1 1.5 --memory 140

Needs no GPU. This is the command: its arguments, and the model that they name. plan_config.py reads the config,
plan_numbers.py makes the plans, plan_text.py prints them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from flashfusemoe_ds.plan_config import Training, read_training
from flashfusemoe_ds.plan_model import Subject, from_factory, from_shape, from_transformers
from flashfusemoe_ds.plan_numbers import BACKENDS, GRADS_GBPS, Rates, make_plan, valid_ep_sizes
from flashfusemoe_ds.plan_text import fitting, render
from flashfusemoe_ds.planning import MoEShape


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m flashfusemoe_ds.plan", description="Memory per GPU and bytes on the wire, before a run."
    )
    parser.add_argument("--config", type=Path, required=True, help="the DeepSpeed JSON config")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="a Transformers config.json or its folder, or package.module:factory")
    what.add_argument("--shape", help="T,D,F,E,K of a gated MoE layer, for a quick answer")
    parser.add_argument("--layers", type=int, default=1, help="of --shape (default: 1)")
    parser.add_argument("--gpus", type=int, required=True, help="data-parallel ranks")
    parser.add_argument("--ep_size", type=int, nargs="+", help="default: expert_parallel.autoep_size, or all that can")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, help="default: the config's ep_backend")
    parser.add_argument("--sequence_length", type=int, help="tokens of a text; times the micro batch, those of a GPU")
    parser.add_argument("--tokens", type=int, help="tokens per GPU and micro batch, instead of --sequence_length")
    parser.add_argument("--skew", type=float, nargs="+", default=[1.0],
                        help="routes of the busiest rank over the mean (default: 1)")  # fmt: skip
    parser.add_argument("--memory", type=float, help="GiB of a GPU: say what does not fit")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="of a Transformers model")
    parser.add_argument("--optimizer", help="the client's, where the config has none")
    parser.add_argument("--exchange_gbps", type=float, help="GB/s of dispatch and combine (default: by backend)")
    parser.add_argument("--exchange_us", type=float, nargs=4,
                        metavar=("DISPATCH", "COMBINE", "REDISPATCH", "COMBINE_GRADS"),
                        help="microseconds of each exchange beside its bytes (default: by backend)")  # fmt: skip
    parser.add_argument("--grads_gbps", type=float, default=GRADS_GBPS, help="GB/s of gradients (default: 210)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser.parse_args(arguments)


def read_subject(args: argparse.Namespace, training: Training) -> Subject:
    """The model that the arguments name, with its micro batch."""
    for name in ("gpus", "layers", "tokens", "sequence_length", "memory", "exchange_gbps", "grads_gbps"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} is {value}; it must be positive")
    if any(not 0 <= us < math.inf for us in args.exchange_us or ()):
        raise ValueError(f"--exchange_us is {' '.join(map(str, args.exchange_us))}; all must be 0 or more")
    if any(not 1 <= skew < math.inf for skew in args.skew):
        raise ValueError(f"--skew is {' '.join(map(str, args.skew))}; a maximum over a mean is 1 or more")
    if args.tokens is not None and args.sequence_length is not None:
        raise ValueError("--tokens and --sequence_length are both given; keep one")
    length, tokens = args.sequence_length, args.tokens
    if length is not None:
        tokens = training.micro_batch * length
    if args.shape is not None:
        if tokens is not None or args.gradient_checkpointing:
            raise ValueError("--shape has its own T and nothing to checkpoint; leave out --tokens, --sequence_length "
                             "and --gradient_checkpointing")  # fmt: skip
        return _from_numbers(args.shape, args.layers, training.dtype)
    path = Path(args.model)
    if not path.exists():
        if args.gradient_checkpointing:
            raise ValueError("--gradient_checkpointing is for Transformers configs; a factory's model has its own")
        return from_factory(args.model, training.dtype, tokens)
    if tokens is None:
        raise ValueError("--sequence_length (or --tokens) is missing: nobody else knows how long the texts are")
    if tokens % training.micro_batch:
        raise ValueError(
            f"--tokens is {tokens}; train_micro_batch_size_per_gpu ({training.micro_batch}) must divide it"
        )
    batch = training.micro_batch
    return from_transformers(
        path, training.dtype, batch, tokens // batch, args.gradient_checkpointing, training.autoep
    )


def _from_numbers(text: str, layers: int, dtype: torch.dtype) -> Subject:
    try:
        T, D, F, E, K = (int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--shape is {text!r}; it must be five numbers T,D,F,E,K") from None
    if min(T, D, F, E, K) < 1 or K > E:
        raise ValueError(f"--shape is {text!r}; all must be positive, and K at most E")
    return from_shape(MoEShape(D, F, 2 * F, E, K), T, layers, dtype)


def run(args: argparse.Namespace) -> str:
    """The command's output.

    Raises:
        ValueError, ImportError, OSError: in words for whoever typed it.
    """
    try:
        config = json.loads(args.config.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"--config {args.config} is no JSON: {error}") from None
    if not isinstance(config, Mapping):
        raise ValueError(f"--config {args.config} holds {type(config).__name__}; it must be a JSON object")
    training = read_training(config, args.optimizer)
    subject = read_subject(args, training)
    sizes = args.ep_size or ([training.autoep_size] if training.autoep_size else valid_ep_sizes(subject, args.gpus))
    own = training.section.ep_backend
    backends = args.backend or (list(BACKENDS) if own == "hybrid" else [own])
    fixed = None if args.exchange_us is None else tuple(args.exchange_us)
    rates = Rates(args.exchange_gbps, fixed, args.grads_gbps)
    plans = [
        make_plan(subject, training, args.gpus, n, backend, skew, rates, args.gradient_checkpointing)
        for n in sizes
        for backend in (backends[:1] if n == 1 else backends)
        for skew in (args.skew[:1] if n == 1 else args.skew)
    ]
    if args.json:
        return json.dumps([{**asdict(plan), "peak": plan.memory.peak} for plan in plans], indent=1)
    text = render(plans, training, subject, args.gpus, args.memory)
    if args.memory is None:
        return text
    advice = fitting(subject, training, args.gpus, plans, backends[0], args.memory, args.gradient_checkpointing)
    return text if advice is None else f"{text}\n{advice}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 with a line on stderr that says what is wrong."""
    args = parse_args(arguments)
    try:
        print(run(args))
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
