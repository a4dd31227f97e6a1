# SPDX-License-Identifier: GPL-3.0-or-later
"""Which part of a profiled step is AutoEP's MoE layers': its annotations, and the time of its kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from device_trace import BACKWARD, FORWARD, OPTIMIZER, Kernel, Role
from intervals import length
from torch import Tensor, nn
from torch.profiler import record_function


class MoEPhases:
    """Annotates a profile with the MoE layers' parts of a step, so that each kernel tells whether a layer launched it.

    A layer's forward is FORWARD, its backward, from the gradient of its output to that of its input, BACKWARD; they do
    not overlap, as device_trace demands. Where a decoder layer is computed again inside the backward of its own MoE
    layer (activation checkpointing), the backward pauses.
    """

    def __init__(self) -> None:
        self._phase: str | None = None
        self._annotation: Any = None
        self._paused = False

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Annotates while it is open."""
        handles = []
        for module in model.modules():
            if isinstance(module, AutoEPMoELayer):
                handles.append(module.register_forward_pre_hook(lambda *_: self._begin(FORWARD)))
                # Also where the forward is cut short by an exception, as checkpointing ends its second forward.
                handles.append(module.register_forward_hook(self._after_forward, always_call=True))
            elif any(isinstance(child, AutoEPMoELayer) for child in module.children()):
                handles.append(module.register_forward_pre_hook(lambda *_: self._pause()))
                handles.append(module.register_forward_hook(lambda *_: self._resume(), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, phase: str) -> None:
        self._end()
        self._phase, self._annotation = phase, record_function(phase)
        self._annotation.__enter__()

    def _end(self) -> None:
        if self._annotation is not None:
            self._annotation.__exit__(None, None, None)
        self._phase = self._annotation = None

    def _after_forward(self, _layer: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        self._end()
        y = output[0] if isinstance(output, tuple) else output
        if y is not None and y.requires_grad and inputs[0].requires_grad:
            y.register_hook(lambda _: self._begin(BACKWARD))
            inputs[0].register_hook(lambda _: self._end())

    def _pause(self) -> None:
        if self._phase == BACKWARD:
            self._end()
            self._paused = True

    def _resume(self) -> None:
        if self._paused:
            self._begin(BACKWARD)
            self._paused = False


def moe_times(kernels: list[Kernel], step: int) -> dict[str, float]:
    """ms of a step in which a kernel runs that was launched in: a MoE layer's "forward", "backward", either ("moe"),
    the "optimizer", anywhere ("all"). Gradients' collectives are in the last one alone."""
    gradients = (Role.DENSE, Role.EXPERTS, Role.PARAMETERS)

    def busy(*phases: str) -> float:
        return length(k.interval for k in kernels if k.step == step and k.phase in phases and k.role not in gradients)

    return {
        "forward": busy(FORWARD),
        "backward": busy(BACKWARD),
        "moe": busy(FORWARD, BACKWARD),
        "optimizer": busy(OPTIMIZER),
        "all": length(k.interval for k in kernels if k.step == step),
    }
