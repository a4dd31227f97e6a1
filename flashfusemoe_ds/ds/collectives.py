# SPDX-License-Identifier: GPL-3.0-or-later
"""deepspeed.comm for the transports, by the short way where nobody listens.

deepspeed.comm's functions are torch.distributed's behind a logger's decorator, a backend object and a look at every
argument. That costs the host two thirds of torch.distributed's own Python once more, seven times in a layer's step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from deepspeed.comm import comm as deepspeed_comm
from deepspeed.comm.torch import TorchBackend
from torch import Tensor


class Collectives:
    """What `NcclDispatcher` asks of a module of collectives."""

    @staticmethod
    def get_world_size(group: Any = None) -> int:
        return deepspeed_comm.get_world_size(group=group)

    @staticmethod
    def all_to_all_single(output: Tensor, tensor: Tensor, **options: Any) -> torch.distributed.Work | None:
        """deepspeed.comm.all_to_all_single; options are `output_split_sizes`, `input_split_sizes`, `group` and
        `async_op`."""
        if _passed_on(tensor):
            return torch.distributed.all_to_all_single(output, tensor, **options)
        return deepspeed_comm.all_to_all_single(output, tensor, **options)


def _passed_on(tensor: Tensor) -> bool:
    """Whether deepspeed.comm would do no more than pass the call on to torch.distributed. Asked at every call: its
    logger may be switched on at any time."""
    return (
        not deepspeed_comm.comms_logger.enabled
        and type(deepspeed_comm.cdb) is TorchBackend
        and tensor.device.type in ("cpu", "cuda")  # on others it goes by way of the host
    )
