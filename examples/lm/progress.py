# SPDX-License-Identifier: GPL-3.0-or-later
"""Progress on rank 0: a bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


class Progress:
    """`advance` after every step, `report` when there are numbers to show; silent unless `enabled`."""

    def __init__(self, first_step: int, last_step: int, enabled: bool) -> None:
        self.enabled = enabled
        self.last_step = last_step
        self.bar: tqdm | None = None
        if enabled and sys.stdout.isatty():
            self.bar = tqdm(total=last_step, initial=first_step, unit="step", file=sys.stdout, dynamic_ncols=True)

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def report(self, point: dict[str, Any]) -> None:
        """Training numbers of the steps since the last report."""
        numbers = (
            f"loss {point['loss']:.3f}  {point['tokens_per_second']:,.0f} tokens/s  "
            f"load max/mean {point['load_max_over_mean']:.2f}"
        )
        if self.bar is not None:
            self.bar.set_postfix_str(numbers)
        else:
            self.say(f"step {point['step']:>5}/{self.last_step}  {numbers}  lr {point['lr']:.1e}")

    def say(self, line: str) -> None:
        if not self.enabled:
            return
        if self.bar is not None:
            self.bar.write(line, file=sys.stdout)
        else:
            print(line, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
