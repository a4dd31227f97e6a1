# SPDX-License-Identifier: GPL-3.0-or-later
"""Fine-tune a Qwen3-MoE model with Transformers' Trainer over DeepSpeed.

    deepspeed --num_gpus 2 examples/finetune_qwen3_moe/train.py --deepspeed ds_configs/trainer_zero2.json

Without --model it makes a tiny one with random weights, which reads bytes. TrainingArguments' arguments all work.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for lm, beside this folder

from lm.data import SMALL_TEXT, load_corpus
from lm.launch import start_deepspeed
from lm.layers import VOCAB

import flashfusemoe_ds as ffmoe

DEFAULTS = {
    "output_dir": "runs/qwen3_moe",
    "logging_steps": 5,
    "save_strategy": "no",
    "report_to": "none",
    # Where there is no GPU and this is not said, the Trainer takes every process for the only one.
    "use_cpu": not torch.cuda.is_available(),
}
DEFAULTS_OF_THE_TINY_MODEL = {"learning_rate": 3e-3, "max_steps": 30}


@dataclass
class ExampleArguments:
    model: str | None = field(
        default=None, metadata={"help": "folder or name of a model; default: a tiny, random one"}
    )
    text: str = field(default=SMALL_TEXT, metadata={"help": "file or folder to train on"})
    text_bytes: int = field(default=1_000_000, metadata={"help": "how much of the text to read"})
    context: int = field(default=128, metadata={"help": "tokens that the model sees at once"})
    experts: str = field(default="flashfusemoe", metadata={"help": "Transformers' own are eager and grouped_mm"})


class Attach(TrainerCallback):
    """Gives the layers that an "expert_parallel" section makes to this package; otherwise there is nothing to do."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        ffmoe.attach(self.trainer.model_wrapped)


def parse_args() -> tuple[ExampleArguments, TrainingArguments]:
    parser = HfArgumentParser((ExampleArguments, TrainingArguments), description="Fine-tune a Qwen3-MoE model.")
    named = any(argument.split("=")[0] == "--model" for argument in sys.argv)
    parser.set_defaults(**DEFAULTS, **({} if named else DEFAULTS_OF_THE_TINY_MODEL))
    return parser.parse_args_into_dataclasses()


def build_model(path: str | None, experts: str) -> PreTrainedModel:
    ffmoe.register_experts_implementation()
    if path is not None:
        return AutoModelForCausalLM.from_pretrained(path, experts_implementation=experts)
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=VOCAB,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        moe_intermediate_size=48,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
    )
    return AutoModelForCausalLM.from_config(config, experts_implementation=experts)


def rows_of_text(args: ExampleArguments) -> list[dict[str, Tensor]]:
    """The text cut into rows of `context` tokens: the model's own, or bytes for the tiny model."""
    bytes_N = load_corpus(args.text, args.context).train[: args.text_bytes]
    if args.model is None:
        ids_N = bytes_N.long()
    else:
        text = bytes(bytes_N.tolist()).decode(errors="replace")
        ids_N = torch.tensor(AutoTokenizer.from_pretrained(args.model)(text)["input_ids"])
    rows_RS = ids_N[: len(ids_N) // args.context * args.context].view(-1, args.context)
    return [{"input_ids": row_S, "labels": row_S} for row_S in rows_RS]


def main() -> None:
    start_deepspeed()
    args, training = parse_args()
    torch.manual_seed(training.seed)
    model = build_model(args.model, args.experts)
    trainer = Trainer(model, training, train_dataset=rows_of_text(args))
    trainer.add_callback(Attach(trainer))
    trainer.train()
    trainer.save_model()  # plain Transformers loads it


if __name__ == "__main__":
    main()
