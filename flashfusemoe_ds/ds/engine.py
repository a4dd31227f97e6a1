# SPDX-License-Identifier: GPL-3.0-or-later
"""The ways into a DeepSpeed engine: `initialize`, deepspeed.initialize's twin, and `attach` for an existing engine."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.moe.layer import MoE as StockMoE
from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config
from deepspeed.utils import log_dist, logger
from deepspeed.utils.bwc import bwc_pipeline_parallel_world_size
from torch import nn

from flashfusemoe_ds.config import SECTION, FlashFuseMoEConfig
from flashfusemoe_ds.dispatch.nccl import NcclDispatcher
from flashfusemoe_ds.dispatch.select import check_ep_backend, close_dispatcher
from flashfusemoe_ds.ds.autoep import autoep_enabled, check_autoep, fuse_autoep
from flashfusemoe_ds.ds.checkpoint import guard_checkpoints
from flashfusemoe_ds.ds.engine_overlap import overlap_gradients
from flashfusemoe_ds.ds.expert_load import check_expert_load, flush_expert_load, observe_expert_load, wants_expert_load
from flashfusemoe_ds.ds.grad_norm import use_exact_grad_norm
from flashfusemoe_ds.ds.moe import MoE
from flashfusemoe_ds.ds.overflow_check import check_overflow_at_once
from flashfusemoe_ds.ds.replace import as_lists, is_replaceable, remap_groups, remap_optimizer, replace_moe
from flashfusemoe_ds.ds.stage0_overlap import BUCKET_NUMEL
from flashfusemoe_ds.ds.tensor_parallel import tensor_parallel_size
from flashfusemoe_ds.kernels.select import check_gemm_backend
from flashfusemoe_ds.nn.moe_layer import MoELayer


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Callable | None = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int | None = None,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable | None = None,
    config: str | dict[str, Any] | None = None,
    mesh_param: Any = None,
    config_params: str | dict[str, Any] | None = None,
) -> tuple[Any, Any, Any, Any]:
    """deepspeed.initialize with the config's "flashfusemoe" section put into effect.

    Arguments and the returned (engine, optimizer, dataloader, lr_scheduler) are deepspeed.initialize's. Before it
    runs, the section is checked, stock MoE layers become fused ones (`replace_moe`) with `model_parameters` or a
    client optimizer carried over, and, at ZeRO stages 1 and 2, overlap_comm and a reduce_bucket_size that leaves
    something to overlap are set where the config leaves them out.

    Raises:
        ValueError, ImportError: the section is wrong or cannot be met on this machine; before any collective.
    """
    if model is None:
        raise ValueError("initialize needs a model")
    from_args = getattr(args, "deepspeed_config", None)
    ds_config = _resolve_config(from_args, config if config is not None else config_params)
    section = FlashFuseMoEConfig.from_ds_config(ds_config)
    check_section(section)
    check_autoep(model, ds_config, section)

    model_parameters = None if model_parameters is None else as_lists(model_parameters)
    if section.replace_moe:
        replace_moe(model)
    model_parameters = remap_groups(model_parameters)
    if isinstance(optimizer, torch.optim.Optimizer):
        remap_optimizer(optimizer)
    _refuse_sharded_layers(model)
    check_expert_load(model, ds_config, section)
    layers = [m for m in model.modules() if isinstance(m, MoE)]
    if not layers and not autoep_enabled(ds_config) and not wants_expert_load(section):
        logger.warning(f"{SECTION}: the model has no deepspeed.moe or flashfusemoe_ds MoE layer; nothing to do")
    world_size = _world_size(mpu)
    for layer in layers:
        if world_size is not None:
            layer.check_world(world_size, tensor_parallel_size(mpu))
        layer.configure(section)

    port = {} if distributed_port is None else {"distributed_port": distributed_port}
    # DeepSpeed refuses a config given twice, and writes the local rank into the caller's own args object.
    if from_args:
        args.deepspeed_config = None
    try:
        engine, *rest = deepspeed.initialize(
            args=args,
            model=model,
            optimizer=optimizer,
            model_parameters=model_parameters,
            training_data=training_data,
            lr_scheduler=lr_scheduler,
            mpu=mpu,
            dist_init_required=dist_init_required,
            collate_fn=collate_fn,
            config=_with_overlap(ds_config, section),
            mesh_param=mesh_param,
            **port,
        )
    finally:
        if from_args:
            args.deepspeed_config = from_args
    return (attach(engine), *rest)


def attach(engine: Any) -> Any:
    """Puts the "flashfusemoe" section of an existing engine's config into effect, and guards its checkpoints.

    For code that must call deepspeed.initialize itself. Layers must be fused by then (import MoE from this package, or
    call replace_moe(model) before deepspeed.initialize): an optimizer cannot follow parameters replaced after it.

    Returns:
        The engine.

    Raises:
        ValueError: the section asks for replace_moe, and stock MoE layers are left in the engine's model; or it
            asks for expert load or moving biases where this engine cannot have them (see `ds.expert_load`).
    """
    section = FlashFuseMoEConfig.from_ds_config(engine.config)
    check_section(section)
    check_autoep(engine.module, engine.config, section)
    fuse_autoep(engine, section)
    stock = [n for n, m in engine.module.named_modules() if isinstance(m, StockMoE) and is_replaceable(m)]
    if stock and section.replace_moe and SECTION in engine.config:
        raise ValueError(
            f"{SECTION}.replace_moe is true, but the engine was built over stock MoE layers ({', '.join(stock)}); "
            "call flashfusemoe_ds.initialize, or replace_moe(model) before deepspeed.initialize"
        )
    layers = [m for m in engine.module.modules() if isinstance(m, MoE)]
    for layer in layers:
        layer.configure(section)
    _name_transports(engine.module)
    ours = layers or engine.has_moe_layers or SECTION in engine.config
    if ours and not getattr(engine, "_flashfusemoe_attached", False):
        engine._flashfusemoe_attached = True
        if layers:
            guard_checkpoints(engine)
        if section.exact_grad_norm:
            use_exact_grad_norm(engine)
        check_overflow_at_once(engine.optimizer)
        reduced = overlap_gradients(engine, section.overlap_dense_grads)
        observe_expert_load(engine, section)
        log_dist(_summary(section, layers, reduced), ranks=[0])
    return engine


def close(model: Any) -> None:
    """Frees the buffers of the transports that a model's layers hold, as DeepEP wants it before the process ends, and
    writes the expert load that `log_expert_load` has not written yet.

    Collective: call it on every rank, when no step runs any more and before torch.distributed is shut down.

    Args:
        model: an engine, or any module.
    """
    flush_expert_load(model)
    for module in getattr(model, "module", model).modules():
        dispatcher = getattr(module, "dispatcher", None)
        if dispatcher is not None:
            close_dispatcher(dispatcher)


def _name_transports(model: nn.Module) -> None:
    """Tells each layer's own transport the layer's name, for its messages; one that layers share names none."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "dispatcher", None), NcclDispatcher):
            module.dispatcher.layer = name


def check_section(section: FlashFuseMoEConfig) -> None:
    """Refuses what this machine cannot do: ImportError for a missing package, ValueError otherwise."""
    check_ep_backend(section.ep_backend)
    check_gemm_backend(section.gemm_backend)


def _resolve_config(from_args: str | None, config: str | dict[str, Any] | None) -> dict[str, Any]:
    """The config as a dict, by deepspeed.initialize's own rules."""
    if from_args is not None and config is not None:
        raise ValueError(f"the config was passed twice, as config= and --deepspeed_config {from_args}; keep one")
    if from_args is None and config is None:
        raise ValueError("no DeepSpeed config: pass config=, or --deepspeed_config on the command line")
    return load_ds_config(from_args if config is None else config)


def _refuse_sharded_layers(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, MoELayer) and module.ep_group is not None:
            raise ValueError(
                f"{name} is a MoELayer after shard_experts, whose experts DeepSpeed's engine would neither reduce nor "
                "save as such; under an engine use flashfusemoe_ds.MoE with ep_size"
            )


def _world_size(mpu: Any) -> int | None:
    """Ranks per pipeline stage, known from most launchers before torch.distributed is; None if not yet known."""
    # torchrun and the deepspeed launcher, Open MPI, MPICH.
    names = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    world = next((int(os.environ[name]) for name in names if os.environ.get(name)), None)
    if dist.is_initialized():
        world = dist.get_world_size()
    return None if world is None else world // (1 if mpu is None else bwc_pipeline_parallel_world_size(mpu))


def _with_overlap(ds_config: dict[str, Any], section: FlashFuseMoEConfig) -> dict[str, Any]:
    """At ZeRO stages 1 and 2, unless the user decided: overlap_comm on, which DeepSpeed leaves off, and buckets of
    fewer than its 5e8 elements, of which a backward seldom fills one before its end."""
    zero = ds_config.get("zero_optimization")
    # Where the user accumulates gradients alone, DeepSpeed asserts that stage 1 does not overlap.
    stages = (1, 2) if ds_config.get("managed_gradient_accumulation", True) else (2,)
    if section.overlap_dense_grads and isinstance(zero, dict) and zero.get("stage") in stages:
        ours = {"overlap_comm": True, "reduce_bucket_size": BUCKET_NUMEL}
        ds_config = {**ds_config, "zero_optimization": {**ours, **zero}}
    return ds_config


def _summary(section: FlashFuseMoEConfig, layers: list[MoE], reduced: str) -> str:
    """The line of the log. Of AutoEP's layers `fuse_autoep` has said its own."""
    if not layers:
        return f"{SECTION}: gradients are reduced {reduced}"
    fused = sum(hasattr(layer.deepspeed_moe.experts, "layout") for layer in layers)
    sizes = sorted({layer.ep_size for layer in layers})
    taken = sorted({layer.deepspeed_moe.dispatcher.name for layer in layers})
    return (
        f"{SECTION}: {len(layers)} MoE layers, {fused} with fused experts, ep_size {', '.join(map(str, sizes))}, "
        f"ep_backend {section.ep_backend} (taken: {', '.join(taken) or 'none'}); gradients are reduced {reduced}"
    )
