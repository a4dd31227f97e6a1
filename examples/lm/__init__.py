# SPDX-License-Identifier: GPL-3.0-or-later
"""Parts of the byte-level language model example; `examples/train_lm.py` puts them together."""
