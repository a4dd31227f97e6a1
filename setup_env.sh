#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-3.0-or-later
# Make .venv with torch, DeepSpeed, this package (editable) and the development tools. A second run does nothing.
#   PYTHON=python3.12 ./setup_env.sh     another interpreter than python3
set -euo pipefail
cd "$(dirname "$0")"
# The Makefile puts the environment first on PATH; it must not be made from itself.
PATH=${PATH//"$PWD/.venv/bin:"/}

PYTHON=${PYTHON:-python3}
VENV=.venv
STAMP=$VENV/.stamp
TORCH_MIN=2.10 # setup.py's bound
TORCH_CPU=2.13.0
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
# A plain install of DeepSpeed; its C++ and CUDA extensions compile on first use, where one is used at all.
export DS_BUILD_OPS=0

say() { echo "setup: $*"; }

# Run quietly; on failure show everything the command said.
quietly() {
    local log status=0
    log=$(mktemp)
    "$@" >"$log" 2>&1 </dev/null || status=$?
    [ "$status" -eq 0 ] || { cat "$log" >&2; say "failed: $*" >&2; }
    rm -f "$log"
    return "$status"
}

# Does this interpreter's torch see a GPU, and is it new enough?
has_cuda_torch() {
    "$PYTHON" - "$TORCH_MIN" 2>/dev/null <<'PY'
import sys
import torch
version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
wanted = tuple(int(part) for part in sys.argv[1].split("."))
sys.exit(not (torch.cuda.is_available() and version >= wanted))
PY
}

has_nvidia_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

fingerprint() { { "$PYTHON" -VV; pwd; cat setup.py pyproject.toml setup_env.sh; } | cksum; }

make_venv() {
    rm -rf "$VENV"
    quietly "$PYTHON" -m venv "$VENV" || { say "on Debian and Ubuntu: apt install python3-venv"; exit 1; }
    quietly "$VENV/bin/pip" install "setuptools>=77.0.3,<82" wheel ninja packaging # torch 2.11 asks for less than 82
}

# Let .venv see the packages of $PYTHON. Not --system-site-packages: if $PYTHON is itself of an environment, that would
# show the packages of the interpreter below it.
see_packages_of_python() {
    local site
    site=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$PYTHON" -c 'import sys; print("\n".join(p for p in sys.path if p.endswith(("site-packages", "dist-packages"))))' \
        >"$site/packages_of_python.pth"
}

install_cpu_torch() {
    # Unpinned, pip takes the CUDA build and gigabytes of libraries with it, on a machine without a GPU.
    if ! "$VENV/bin/pip" install -q "torch==$TORCH_CPU+cpu" >/dev/null 2>&1 </dev/null; then
        say "your package index has no CPU build of torch, taking it from $TORCH_CPU_INDEX"
        quietly "$VENV/bin/pip" install "torch==$TORCH_CPU" --index-url "$TORCH_CPU_INDEX"
    fi
}

install_package() {
    # --no-build-isolation: DeepSpeed's source package imports torch while it builds, and an isolated build would fetch
    # one of its own. The constraint keeps the torch that is there.
    local constraint=$VENV/torch-constraint.txt
    "$VENV/bin/python" -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' >"$constraint"
    quietly "$VENV/bin/pip" install --no-build-isolation -c "$constraint" -e ".[dev]"
}

command -v "$PYTHON" >/dev/null || { say "no $PYTHON on PATH; set PYTHON to an interpreter, 3.10 or newer" >&2; exit 1; }
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    say "$("$PYTHON" -V) is too old; set PYTHON to an interpreter, 3.10 or newer" >&2
    exit 1
}
want=$(fingerprint)
[ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$want" ] && exit 0

if has_cuda_torch; then
    say "making $VENV on top of $PYTHON, whose torch sees a GPU"
    make_venv
    see_packages_of_python
elif has_nvidia_gpu; then
    say "making $VENV with torch for NVIDIA GPUs (a download of some gigabytes)"
    make_venv
    quietly "$VENV/bin/pip" install "torch>=$TORCH_MIN"
else
    say "making $VENV with torch for CPUs"
    make_venv
    install_cpu_torch
fi
say "installing DeepSpeed, this package and the development tools"
install_package
echo "$want" >"$STAMP"
say "done, $("$VENV/bin/python" -c 'import torch, deepspeed; print("torch", torch.__version__, "deepspeed", deepspeed.__version__)' 2>/dev/null | tail -1)"
