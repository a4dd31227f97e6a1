# SPDX-License-Identifier: GPL-3.0-or-later
"""What is timed: a layer called eagerly, or replayed from a CUDA graph, over one input buffer that all rows share."""

from __future__ import annotations

from typing import Protocol

import torch
from layers import Layer
from torch import Tensor


class Timed(Protocol):
    """`forward` and `step` issue the work and wait for nothing that the layer itself does not wait for."""

    def forward(self) -> None: ...

    def step(self) -> None: ...

    def drop_gradients(self) -> None: ...


class Eager:
    """A layer as a training step calls it; its gradients are dropped before each step, so none is added up."""

    def __init__(self, layer: Layer, x_TD: Tensor, dout_TD: Tensor) -> None:
        self.layer, self.x_TD, self.dout_TD = layer, x_TD, dout_TD

    def forward(self) -> Tensor:
        """The output; what the backward needs lives as long as it does."""
        return self.layer.run(self.x_TD)

    def step(self) -> Tensor:
        self.drop_gradients()
        out_TD = self.forward()
        out_TD.backward(self.dout_TD)
        return out_TD

    def drop_gradients(self) -> None:
        self.x_TD.grad = None
        for parameter in self.layer.parameters:
            parameter.grad = None

    def result(self) -> tuple[Tensor, Tensor]:
        """Output and input gradient of one step."""
        out_TD = self.step()
        return out_TD.detach(), self.x_TD.grad


class Graphed:
    """The same layer, captured: one graph for the forward, one for the step. Gradients are buffers of the graph."""

    def __init__(self, eager: Eager) -> None:
        self.eager = eager
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compile, tune and allocate outside of the capture
                eager.step()
        torch.cuda.current_stream().wait_stream(stream)
        eager.drop_gradients()
        self.forward_graph, self.step_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward_graph):
            eager.forward()
        with torch.cuda.graph(self.step_graph):
            self.out_TD = eager.step().detach()
        self.dx_TD = eager.x_TD.grad
        eager.drop_gradients()

    def forward(self) -> None:
        self.forward_graph.replay()

    def step(self) -> None:
        self.step_graph.replay()

    def drop_gradients(self) -> None:
        """Nothing accumulates: a replay writes them anew."""

    def result(self) -> tuple[Tensor, Tensor]:
        self.step()
        return self.out_TD, self.dx_TD
