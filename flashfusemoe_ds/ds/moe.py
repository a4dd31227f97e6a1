# SPDX-License-Identifier: GPL-3.0-or-later
"""The drop-in: deepspeed.moe.layer.MoE with the same constructor, forward and 3-tuple, on our stages.

Every class here subclasses its stock namesake, because engine, ZeRO, checkpoints, profiler and timers look for those
by isinstance and by attribute (deepspeed/runtime/engine.py, _configure_distributed_model and _save_moe_checkpoint).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from deepspeed.moe.layer import MoE as StockMoE
from deepspeed.moe.sharded_moe import (
    FIRST_ALLTOALL_TIMER,
    MOE_TIMER,
    SECOND_ALLTOALL_TIMER,
    TOPK_GATE_TIMER,
)
from deepspeed.moe.sharded_moe import MOELayer as StockMOELayer
from deepspeed.moe.sharded_moe import TopKGate as StockTopKGate
from deepspeed.profiling.flops_profiler import profiler as flops_profiler
from deepspeed.utils import groups, logger
from torch import Tensor, nn

from flashfusemoe_ds.config import FlashFuseMoEConfig
from flashfusemoe_ds.dispatch.base import Dispatcher, Geometry, combine, dispatch
from flashfusemoe_ds.dispatch.select import make_dispatcher
from flashfusemoe_ds.ds.collectives import Collectives
from flashfusemoe_ds.ds.expert_layout import recognise
from flashfusemoe_ds.ds.fused_experts import FusedExperts
from flashfusemoe_ds.ds.tensor_parallel import (
    ReplicatedTokens,
    check_tokens,
    ranks_per_stage,
    replicated_tokens,
    tensor_parallel_size,
)
from flashfusemoe_ds.nn.checks import check_coefficient, check_hidden, check_positive
from flashfusemoe_ds.nn.deepspeed_gating import NOISE_POLICIES, DeepSpeedGating, gate_and_route, jitter
from flashfusemoe_ds.nn.experts import ModuleExperts
from flashfusemoe_ds.nn.parallel_experts import LateGradient, through_experts
from flashfusemoe_ds.types import Dispatched, Routing


class FusedTopKGate(StockTopKGate):
    """DeepSpeed's gate, returning a `Routing` and l_aux."""

    gating_backend = "triton"

    def forward(self, input: Tensor, used_token: Tensor | None = None) -> tuple[Routing, Tensor]:
        """[T, D] -> routing over all E experts, and the scalar load-balancing loss."""
        if self.wall_clock_breakdown:
            self.timers(TOPK_GATE_TIMER).start()
        jittered = self.noisy_gate_policy == "Jitter" and self.training
        x_TD = jitter(input.float()) if jittered else input
        gating = DeepSpeedGating(
            k=self.k,
            capacity_factor=self.capacity_factor if self.training else self.eval_capacity_factor,
            min_capacity=self.min_capacity,
            drop_tokens=self.drop_tokens,
            use_rts=self.use_rts,
            top2_2nd_expert_sampling=self.top2_2nd_expert_sampling,
            rsample=self.noisy_gate_policy == "RSample" and self.training,
        )
        routed = gate_and_route(x_TD, self.wg.weight, gating, used_token, fused=self.gating_backend == "triton")
        if self.wall_clock_breakdown:
            self.timers(TOPK_GATE_TIMER).stop()
            self.gate_time = self.timers(TOPK_GATE_TIMER).elapsed(reset=False)
        return routed


class FusedMOELayer(StockMOELayer):
    """Gate, dispatch, experts, combine. `experts` is a FusedExperts, or a ModuleExperts for experts of other kinds."""

    dispatcher: Dispatcher
    config: FlashFuseMoEConfig
    replicated: ReplicatedTokens | None  # under an mpu with tensor parallelism
    unchecked: bool  # no forward has compared the ranks of that group yet

    @classmethod
    def convert(
        cls, layer: StockMOELayer, tied: Collection[int], experts: nn.Module | None, copies: bool, expert_tp: bool
    ) -> None:
        """Turns a stock layer into one of this class in place; see `MoE.convert`.

        Args:
            copies: whether the experts are copies of one module, so that looking at one will do.
            expert_tp: whether the experts may be tensor-parallel.
        """
        layer.__class__ = cls
        layer.gate.__class__ = FusedTopKGate
        layer.use_tutel = False
        layer.config = FlashFuseMoEConfig()
        layer.share_tokens(None)
        layer.experts = experts if experts is not None else layer._fuse(tied, copies, expert_tp)
        layer._bind()

    def _fuse(self, tied: Collection[int], copies: bool, expert_tp: bool) -> FusedExperts | ModuleExperts:
        modules = list(self.experts.deepspeed_experts)
        if any(id(p) in tied for m in modules for p in m.parameters()):
            layout, reason = None, "their parameters are tied to others"
        elif expert_tp:
            # They may begin to talk to each other only once there are process groups: too late to be seen here.
            layout, reason = None, "enable_expert_tensor_parallelism leaves exchanges between their ranks to them"
        else:
            layout, reason = recognise(modules[:1] if copies else modules, self.gate.wg.in_features)
        if layout is None:
            logger.warning_once(f"experts of class {type(modules[0]).__name__} run one by one, not fused: {reason}")
        experts = ModuleExperts(modules) if layout is None else FusedExperts(modules, layout)
        return experts.train(self.experts.training)

    def configure(self, config: FlashFuseMoEConfig) -> None:
        """Takes the section's settings; safe at any time between steps, on every rank alike."""
        self.config = config
        self.gate.gating_backend = config.gating_backend
        if isinstance(self.experts, FusedExperts):
            self.experts.gemm_backend = config.gemm_backend
            self.experts.recompute_activations = config.recompute_activations
            self.experts.recompute_dispatch = config.recompute_dispatch
        self._bind()

    def _set_ep_group(self, ep_group) -> None:
        # Unlike stock, a second deepspeed.initialize on the same module may set the group anew.
        self.ep_group = self.gate.ep_group = ep_group
        self._bind()

    def share_tokens(self, replicated: ReplicatedTokens | None) -> None:
        """Takes the tensor-parallel group whose ranks will call this layer with the same tokens."""
        self.replicated, self.unchecked = replicated, replicated is not None

    def _bind(self) -> None:
        """Chooses the transport for the group at hand; the identity while there is none."""
        gate = self.gate
        dtype = next((p.dtype for p in self.experts.parameters()), torch.get_default_dtype())
        geometry = Geometry(self.num_local_experts * self.ep_size, gate.wg.in_features, gate.k, dtype)
        self.dispatcher = make_dispatcher(self.config, self.ep_group, geometry, comm=Collectives)

    def forward(self, hidden_states: Tensor, used_token: Tensor | None = None) -> Tensor:
        """[*, D] -> [*, D]; leaves l_aux and exp_counts (int64 [E], before drops) as attributes, as stock does."""
        if self.ep_size > 1 and self.ep_group is None:
            raise ValueError(
                f"ep_size is {self.ep_size}, but the layer has no expert-parallel group yet: run the model through "
                "initialize(), or call set_deepspeed_parallelism() after deepspeed.init_distributed()"
            )
        d_model = self.gate.wg.in_features
        check_hidden("MoE", hidden_states, d_model, self.gate.wg.weight)
        x_TD = hidden_states.reshape(-1, d_model)
        if used_token is not None and used_token.numel() != x_TD.shape[0]:
            raise ValueError(f"used_token has {used_token.numel()} entries; the input has {x_TD.shape[0]} tokens")

        rows_TD = self.experts.prepare(x_TD)
        if self.replicated is not None:
            rows_TD = _outside_graphs(self.replicated.own, rows_TD)
        parallel, overlap, late = self.dispatcher.ep_size > 1, self.config.overlap, None
        fused = isinstance(self.experts, FusedExperts)
        if parallel and fused and not torch.compiler.is_compiling() and overlap.input_grad and overlap.router_grad:
            late = LateGradient()
            rows_TD = late.mark(rows_TD)

        self._start(MOE_TIMER)
        routing, self.l_aux = self.gate(x_TD, used_token)
        self.exp_counts = routing.counts_E
        if self.replicated is not None:
            y_TD = _outside_graphs(self._on_own_tokens, x_TD, rows_TD, routing, late)
        elif parallel:
            y_TD = _outside_graphs(self._through_experts, rows_TD, routing, late)
        else:
            y_TD = self._through_experts(rows_TD, routing, late)
        self._stop(MOE_TIMER, "time_moe")
        return y_TD.reshape(hidden_states.shape)

    def _on_own_tokens(self, x_TD: Tensor, own: Tensor, routing: Routing, late: LateGradient | None) -> Tensor:
        """This rank's share of the tokens through the experts, and the other ranks' outputs beside it."""
        if self.unchecked:
            check_tokens(self.replicated, x_TD, routing)
        y = self._through_experts(own, self.replicated.own_routing(routing), late)
        self.unchecked = False
        return self.replicated.whole(y, x_TD.shape[0])

    def _through_experts(self, rows_TD: Tensor, routing: Routing, late: LateGradient | None) -> Tensor:
        """Dispatch, experts, combine: one after another where something is to be done between them."""
        on_all = self.replicated is not None and self.replicated.experts_on_all
        if not (on_all or self.wall_clock_breakdown or flops_profiler.module_flop_count):
            return through_experts(
                rows_TD, routing, self.experts, self.dispatcher, self.config.overlap, late=late
            )[0]  # fmt: skip
        self._start(FIRST_ALLTOALL_TIMER)
        sent = dispatch(self.dispatcher, rows_TD, routing)
        self._stop(FIRST_ALLTOALL_TIMER, "time_falltoall")
        if on_all:
            y_RD = self.replicated.on_all_tokens(self._run_experts, sent, check=self.unchecked)
        else:
            y_RD = self._run_experts(sent)
        self._start(SECOND_ALLTOALL_TIMER)
        y_TD = combine(self.dispatcher, y_RD, sent.handle)
        self._stop(SECOND_ALLTOALL_TIMER, "time_salltoall")
        return y_TD

    def _run_experts(self, sent: Dispatched) -> Tensor:
        if flops_profiler.module_flop_count:
            self._count_flops(sent.num_routes)
        return self.experts(sent)

    def _start(self, timer: str) -> None:
        if self.wall_clock_breakdown:
            self.timers(timer).start()

    def _stop(self, timer: str, attribute: str) -> None:
        if self.wall_clock_breakdown:
            self.timers(timer).stop()
            setattr(self, attribute, self.timers(timer).elapsed(reset=False))

    def _count_flops(self, num_routes: int) -> None:
        """DeepSpeed's profiler counts by patching torch functions, which sees nothing of fused experts."""
        flops = self.experts.flops(num_routes)
        flops_profiler.module_flop_count[-1].append(("fused_experts", flops))
        flops_profiler.module_mac_count[-1].append(("fused_experts", flops // 2))


def _outside_graphs(fn: Callable[..., Any], *args: Any) -> Any:
    """fn(*args), which exchanges something between ranks: never part of a graph that torch.compile makes."""
    if torch.compiler.is_compiling():
        from flashfusemoe_ds.nn import compiled  # not at the top: it loads torch's compiler

        return compiled.outside_graphs(fn, *args)
    return fn(*args)


class MoE(StockMoE):
    """deepspeed.moe.layer.MoE, fused: the same arguments and defaults, outputs, losses and gradients.

    Differences that a user can see: nothing is padded to a capacity, so experts compute only real tokens;
    drop_tokens=False needs no agreement on a capacity between ranks; top-1 accepts fewer tokens than min_capacity, and
    a mask of used tokens of any dtype; `use_tutel` is ignored with a note. `named_parameters` lists stacked experts.

    The arguments are those of deepspeed.moe.layer.MoE 0.19.8. `expert` may be any module; MLPs that
    `ds.expert_layout.recognise` can verify are fused.

    Raises:
        ValueError: ep_size does not divide num_experts, k exceeds num_experts, an unknown noisy_gate_policy.
    """

    def __init__(
        self,
        hidden_size: int,
        expert: nn.Module,
        num_experts: int = 1,
        ep_size: int = 1,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 4,
        use_residual: bool = False,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        use_tutel: bool = False,
        enable_expert_tensor_parallelism: bool = False,
        top2_2nd_expert_sampling: bool = True,
    ) -> None:
        sizes = {"hidden_size": hidden_size, "num_experts": num_experts, "ep_size": ep_size, "k": k}
        for name, value in sizes.items():
            check_positive(name, value)
        if not isinstance(expert, nn.Module):
            raise ValueError(f"expert is {expert!r}; it must be a torch.nn.Module")
        if num_experts % ep_size:
            raise ValueError(f"ep_size is {ep_size}; it must divide num_experts ({num_experts})")
        if k > num_experts:
            raise ValueError(f"k is {k}; valid: 1 to num_experts ({num_experts})")
        for name, value in (
            ("capacity_factor", capacity_factor),
            ("eval_capacity_factor", eval_capacity_factor),
            ("min_capacity", min_capacity),
        ):
            check_coefficient(name, value)
        if noisy_gate_policy not in NOISE_POLICIES:
            raise ValueError(f"noisy_gate_policy is {noisy_gate_policy!r}; valid: None, 'Jitter', 'RSample'")
        if use_tutel:
            logger.warning_once("use_tutel is ignored: dispatch and experts are flashfusemoe_ds's own")
        super().__init__(
            hidden_size=hidden_size,
            expert=expert,
            num_experts=num_experts,
            ep_size=ep_size,
            k=k,
            capacity_factor=capacity_factor,
            eval_capacity_factor=eval_capacity_factor,
            min_capacity=min_capacity,
            use_residual=use_residual,
            noisy_gate_policy=noisy_gate_policy,
            drop_tokens=drop_tokens,
            use_rts=use_rts,
            use_tutel=False,
            enable_expert_tensor_parallelism=enable_expert_tensor_parallelism,
            top2_2nd_expert_sampling=top2_2nd_expert_sampling,
        )
        # Stock just made the experts as copies of the one given, so recognising one recognises all.
        expert_tp = enable_expert_tensor_parallelism
        FusedMOELayer.convert(self.deepspeed_moe, tied=(), experts=None, copies=True, expert_tp=expert_tp)

    @classmethod
    def convert(cls, layer: StockMoE, *, tied: Collection[int] = (), experts: nn.Module | None = None) -> None:
        """Turns a stock layer into a fused one in place: weights, hooks, flags and identity stay.

        Args:
            tied: ids of parameters that other modules hold too; experts with such ones are not fused.
            experts: an already converted container, where two layers share theirs.
        """
        layer.__class__ = cls
        expert_tp = layer.enable_expert_tensor_parallelism
        FusedMOELayer.convert(layer.deepspeed_moe, tied, experts, copies=False, expert_tp=expert_tp)

    def configure(self, config: FlashFuseMoEConfig) -> None:
        """Takes the "flashfusemoe" section's settings; ValueError or ImportError if they cannot be met here."""
        self.deepspeed_moe.configure(config)

    def check_world(self, world_size: int, tensor_parallel: int = 1) -> None:
        """ValueError unless the experts can be spread over the ranks of a pipeline stage.

        Args:
            world_size: ranks per pipeline stage.
            tensor_parallel: the mpu's tensor-parallel size; counts where the experts are tensor-parallel too.
        """
        what = f"there are {world_size} ranks per pipeline stage"
        if self.enable_expert_tensor_parallelism and tensor_parallel > 1:
            what += f", in tensor-parallel groups of {tensor_parallel} under enable_expert_tensor_parallelism"
            world_size //= tensor_parallel
        if world_size % self.ep_size:
            valid = [n for n in range(1, world_size + 1) if world_size % n == 0 and self.num_experts % n == 0]
            raise ValueError(
                f"ep_size is {self.ep_size}, but {what}; ep_size must divide "
                f"both them and num_experts ({self.num_experts}). Valid here: {', '.join(map(str, valid))}"
            )

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """The engine's construction-time callback: joins the expert-parallel group of deepspeed.utils.groups, and the
        tensor-parallel one of the mpu.

        Raises:
            ValueError: ep_size does not divide the ranks, or the existing groups are of another layout.
        """
        self.check_world(ranks_per_stage(groups.mpu), tensor_parallel_size(groups.mpu))
        super().set_deepspeed_parallelism(use_data_before_expert_parallel_)
        self.deepspeed_moe.share_tokens(
            replicated_tokens(groups.mpu, self.expert_group_name, self.enable_expert_tensor_parallelism)
        )
        for name, param in self.deepspeed_moe.experts.named_parameters():
            # Again, because copy.deepcopy of a model loses attributes of parameters.
            param.allreduce, param.group_name = False, self.expert_group_name
            if name.endswith("_bias") and isinstance(self.deepspeed_moe.experts, FusedExperts):
                # DeepSpeed's Muon tags every parameter with two or more dimensions; a stacked bias is still a bias.
                param.use_muon = False

    def _create_process_groups(self, use_data_before_expert_parallel_: bool = False) -> None:
        missing = self.expert_group_name not in groups._get_expert_parallel_group_dict()
        if missing and self.enable_expert_tensor_parallelism and tensor_parallel_size(groups.mpu) == 1:
            # The same groups as stock's; but of the Ulysses mpu stock asks a data-parallel size that it has not.
            groups._create_expert_and_data_parallel(
                self.ep_size, use_data_before_expert_parallel_=use_data_before_expert_parallel_
            )
        super()._create_process_groups(use_data_before_expert_parallel_)
