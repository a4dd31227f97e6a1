# SPDX-License-Identifier: GPL-3.0-or-later
# make train | test | lint | docs | setup | clean. `make train` uses every GPU it finds, or two CPU processes.

PYTHON ?= python3
RUN_DIR ?= runs/lm
PROCESSES ?= 2
TRAIN_ARGS ?=
PYTEST_ARGS ?=
# Tests at a time; those of one file stay together, because they share what takes long.
TEST_WORKERS ?= 2

# Everything below runs the environment's `python`. The launcher is called as a module: in an environment on top of a
# system DeepSpeed, the `deepspeed` script is the system's and would start the system's interpreter.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PYTHON

# A free port, so that two runs on one machine do not meet.
PORT = $$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
LAUNCH = python -m deepspeed.launcher.runner --quiet --master_port $(PORT)
TRAIN_CPU = DS_ACCELERATOR=cpu $(LAUNCH) --num_gpus $(PROCESSES) examples/train_lm.py \
	--deepspeed_config ds_configs/cpu_zero1.json --context 128 --steps 500 --warmup_steps 20 --eval_every 100
TRAIN_GPU = $(LAUNCH) examples/train_lm.py --deepspeed_config ds_configs/zero1_bf16.json \
	--num_layers 8 --hidden_size 512 --num_heads 8 --mlp_size 1536 --expert_size 768 --context 512 \
	--steps 1000 --warmup_steps 50 --eval_every 200

.PHONY: help setup train test lint docs clean

help:
	@sed -n 2p Makefile

setup:
	@./setup_env.sh

train: setup
	@if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(TRAIN_GPU) --run_dir $(RUN_DIR) $(TRAIN_ARGS); \
	else \
		$(TRAIN_CPU) --run_dir $(RUN_DIR) $(TRAIN_ARGS); \
	fi

lint: setup
	ruff check . --extend-exclude runs  # DeepSpeed puts scripts of its own beside every checkpoint

test: lint
	python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

docs: setup
	NO_MKDOCS_2_WARNING=1 python -m mkdocs build  # strict: mkdocs.yml

clean:
	rm -rf .venv build dist runs site *.egg-info .benchmarks .pytest_cache .ruff_cache .hypothesis
