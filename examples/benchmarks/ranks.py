# SPDX-License-Identifier: GPL-3.0-or-later
"""The processes that time a layer together: they start samples together, count the slowest, and fail together.

What they say to each other here goes through a gloo group of its own, never through the layers' exchange: it works
while a GPU waits for one that never comes. Every message can be "I failed", so a rank that fails in one place is heard
by the others wherever they are, and all give up the same piece of work.
"""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist


class Failure(NamedTuple):
    """Why a layer has no numbers: a row's status and reason."""

    status: str
    reason: str


class Failed(RuntimeError):
    """Raised on every rank when one of them has failed; `of` has each rank's failure, None where there is none."""

    def __init__(self, of: list[Failure | None]) -> None:
        super().__init__("a rank failed")
        self.of = of


class NoAnswer(RuntimeError):
    """Another rank has died, or is stuck where it cannot answer."""


class Ranks:
    """This process and those it times with; without a group, this process alone.

    Args:
        control: a gloo group of all of them, for these messages.
        exchange: the group that layers use, to see after a failure whether it still works.
    """

    def __init__(self, control: dist.ProcessGroup | None = None, exchange: dist.ProcessGroup | None = None) -> None:
        self._control, self._exchange = control, exchange
        self.rank = 0 if control is None else dist.get_rank(control)
        self.world = 1 if control is None else dist.get_world_size(control)

    def largest(self, value: float) -> float:
        """Of all ranks' values.

        Raises:
            Failed: another rank called `fail`.
            NoAnswer: another rank did not call anything within the control group's timeout.
        """
        return self._say(value, None)

    def any(self, flag: bool) -> bool:
        return self.largest(float(flag)) > 0

    def meet(self) -> None:
        """Returns when all ranks are here."""
        self.largest(0.0)

    def fail(self, failure: Failure) -> NoReturn:
        """Raises Failed on every rank: here, and in what the others call next."""
        self._say(0.0, failure)
        raise AssertionError("unreachable")

    def _say(self, value: float, failure: Failure | None) -> float:
        if self._control is None:
            if failure is not None:
                raise Failed([failure])
            return value
        try:
            said = torch.tensor([value, float(failure is not None)], dtype=torch.float64)
            dist.all_reduce(said, dist.ReduceOp.MAX, group=self._control)
            of: list[Failure | None] = [None] * self.world
            if said[1]:
                dist.all_gather_object(of, failure, group=self._control)
        except RuntimeError as error:
            raise NoAnswer(f"a rank did not answer: {error}") from error
        if said[1]:
            raise Failed(of)
        return said[0].item()

    def exchange_works(self, device: torch.device) -> bool:
        """Whether the layers' group can still be used. Collective."""
        if self._exchange is None:
            return True
        try:
            token = torch.ones(1, device=device)
            dist.all_reduce(token, group=self._exchange)
            return token.item() == self.world
        except RuntimeError:
            return False


ALONE = Ranks()
