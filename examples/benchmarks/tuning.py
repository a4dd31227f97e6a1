# SPDX-License-Identifier: GPL-3.0-or-later
"""Autotuning of rivals within a time that a comparison can spend.

Left alone, Liger tries up to 40 configurations for each of its seven kernels and SonicMoE up to 22 for each of its six
products, compiling one after the other, for every shape: minutes each. `short` gives their own autotuners a short list
with the tiles that their authors publish for Hopper and those next to them. `off` takes the configuration that each
falls back to by itself, `full` leaves their lists as they are. Liger's candidates are compiled side by side.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import ModuleType
from typing import Any

import torch

LEVELS = ("off", "short", "full")

# BLOCK_N, BLOCK_K, warps, stages. The row tile is fixed at 64. First: what LIGER_FUSED_MOE_AUTOTUNE=0 takes.
LIGER_GEMM = ((128, 64, 8, 2), (128, 64, 4, 3), (128, 64, 4, 4), (128, 64, 8, 3), (128, 32, 4, 4), (64, 64, 4, 4))
# BLOCK_M, BLOCK_N, BLOCK_K, warps
LIGER_DW = ((64, 128, 32, 8), (64, 128, 32, 4), (128, 64, 32, 4), (128, 128, 32, 8), (128, 128, 32, 4))
# BLOCK_H, BLOCK_K, warps
LIGER_GATHER = ((128, 4, 4), (256, 8, 4), (512, 8, 4), (512, 2, 4))
LIGER_KERNELS = {
    "_fused_up_proj_swiglu_kernel": "gemm",
    "_fused_down_proj_kernel": "gemm",
    "_moe_bwd_down_proj_kernel": "gemm",
    "_moe_bwd_dX_expanded_kernel": "gemm",
    "_moe_bwd_dW1_kernel": "dw",
    "_moe_bwd_dW2_kernel": "dw",
    "_token_gather_weighted_sum_kernel": "gather",
}

# tile_m, tile_n, ping-pong. First: quack's default_config for Hopper.
SONIC_TILES = {
    "gemm_gated_tuned": ((128, 192, True), (128, 256, False), (256, 128, False), (128, 128, True), (192, 128, True)),
    "gemm_dgated_tuned": ((128, 192, True), (128, 128, True), (128, 160, True), (256, 128, False), (192, 128, True)),
    "gemm_tuned": ((128, 192, True), (128, 256, False), (256, 128, False), (256, 192, False), (128, 160, True)),
}


def check_level(level: str) -> None:
    if level not in LEVELS:
        raise ValueError(f"tune {level!r}: must be one of {', '.join(LEVELS)}")


def _liger_configs(kind: str, level: str) -> list[Any]:
    from triton import Config

    if kind == "gemm":
        configs = [Config({"BLOCK_N": n, "BLOCK_K": k}, num_warps=w, num_stages=s) for n, k, w, s in LIGER_GEMM]
    elif kind == "dw":
        configs = [
            Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=w, num_stages=2) for m, n, k, w in LIGER_DW
        ]
    else:
        configs = [Config({"BLOCK_H": h, "BLOCK_K": k}, num_warps=w, num_stages=4) for h, k, w in LIGER_GATHER]
    return configs[:1] if level == "off" else configs


def _compile_side_by_side(tuner: Any, configs: list[Any], nargs: dict[str, Any], **kwargs: Any) -> list[Any]:
    """A hook of Triton's autotuner for pruning, which prunes nothing: it has all candidates compiled at once."""
    from triton.runtime._async_compile import AsyncCompileMode

    kwargs.pop("warmup", None)
    with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool, ignore_errors=True):
        for config in configs:
            tuner.fn.warmup(*nargs.values(), **kwargs, **config.all_kwargs())
    return configs


def tune_liger(kernels: ModuleType, level: str) -> str:
    """Sets the lists of liger_kernel.ops.fused_moe_kernels' autotuners; returns the row's note."""
    from triton.testing import do_bench

    check_level(level)
    for name, kind in LIGER_KERNELS.items():
        tuner = getattr(kernels, name)
        if level != "full":
            tuner.configs = _liger_configs(kind, level)
        tuner.do_bench = partial(do_bench, warmup=5, rep=25)
        if torch.cuda.is_available():
            tuner.early_config_prune = partial(_compile_side_by_side, tuner)
    if level == "off":
        return "autotuning off (LIGER_FUSED_MOE_AUTOTUNE=0)"
    if level == "full":
        return "its own autotuning"
    return f"autotuned over {len(LIGER_GEMM)} tiles a product, {len(LIGER_DW)} a weight gradient"


def tune_sonic(interface: ModuleType, level: str, device: torch.device) -> str:
    """Sets the lists of quack.gemm_interface's autotuners; returns the row's note. Hopper alone gets a short list."""
    from quack.autotuner import AutotuneConfig
    from quack.gemm_config import GemmConfig

    check_level(level)
    capability = torch.cuda.get_device_capability(device)[0]
    if level == "full" or (level == "short" and capability != 9):
        return "its own autotuning"
    for name, tiles in SONIC_TILES.items():
        if level == "off":
            configs = [interface.default_config(device)]
        else:
            configs = [
                GemmConfig(tile_m=m, tile_n=n, pingpong=p, cluster_m=2, cluster_n=1, is_dynamic_persistent=False)
                for m, n, p in tiles
            ]
        getattr(interface, name).configs = [AutotuneConfig(config=config) for config in configs]
    if level == "off":
        return "autotuning off, default tiles"
    return f"autotuned over {len(SONIC_TILES['gemm_tuned'])} Hopper tiles a product"
