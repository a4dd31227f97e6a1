# SPDX-License-Identifier: GPL-3.0-or-later
"""Package metadata. Lint and test settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "flashfusemoe_ds" / "__init__.py").read_text()).group(1)

PLOT = ["matplotlib>=3.7", "tqdm>=4.60"]
# Where AutoEP of deepspeed 0.19.8 trains what Transformers trains: docs/autoep.md.
HF = ["transformers>=5.6,<5.23"]
TRAINER = ["accelerate>=1.1", "peft>=0.21"]
# The site: docs/. MkDocs 2 takes no plugins, and Material for MkDocs ends with it.
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10", "mkdocstrings[python]>=0.28,<2"]
TEST = ["pytest>=7", "pytest-timeout>=2", "pytest-xdist>=3", "hypothesis>=6", "ruff>=0.6"]

setup(
    name="flashfusemoe_ds",
    version=VERSION,
    description="A fused Mixture-of-Experts layer for DeepSpeed: change one import or add one JSON section.",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="GPL-3.0-or-later",
    license_files=["LICENSE"],
    packages=find_packages(include=["flashfusemoe_ds", "flashfusemoe_ds.*"]),
    package_data={"flashfusemoe_ds": ["py.typed"]},
    python_requires=">=3.10",
    # pydantic comes with deepspeed, whose own config models are built on it.
    install_requires=["torch>=2.10", "triton>=3.6; platform_system == 'Linux'", "deepspeed>=0.19.8"],
    extras_require={"hf": HF, "examples": PLOT, "docs": DOCS, "dev": HF + TRAINER + PLOT + TEST + DOCS},
)
