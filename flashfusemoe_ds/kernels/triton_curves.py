# SPDX-License-Identifier: GPL-3.0-or-later
"""The experts' activations inside Triton kernels: f(g) and f'(g), elementwise in float32, twins of activation.py.

`curve` and `curve_and_slope` call builtins of triton.language alone, no other @jit function, so that a Gluon kernel
can take the same source: `gluon.jit(curve.fn)`. CURVE_OF maps an activation's name to the constexpr that they take;
a gated activation is f(gate) * up, which is left to the caller.
"""

from __future__ import annotations

import triton
import triton.language as tl

# activation.py's name -> CURVE. Gated and plain ones share curves.
CURVE_OF = {
    "swiglu": "silu",
    "geglu": "gelu",
    "geglu_tanh": "gelu_tanh",
    "reglu": "relu",
    "relu_squared": "relu_squared",
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "relu": "relu",
}


@triton.jit
def curve(g, CURVE: tl.constexpr):
    """f(g), float32 in and out, any shape. A NaN stays one."""
    if CURVE == "silu":
        value = g / (1.0 + tl.exp(-g))
    elif CURVE == "gelu":
        value = g * (0.5 + 0.5 * tl.erf(g * 0.7071067811865476))
    elif CURVE == "gelu_tanh":
        # 0.5 (1 + tanh u) = sigmoid(2u). The clamps change nothing that float32 can hold next to 1: beyond 20 the
        # sigmoid is 0 or 1, and exp(80) is finite where exp(-2u) would not be. tl.where, unlike tl.maximum, keeps NaN.
        g = tl.where(g < -20.0, -20.0, g)
        near = tl.minimum(g, 20.0)
        u2 = near * (1.5957691216057308 + 0.07135481627260025 * near * near)
        value = g / (1.0 + tl.exp(tl.minimum(-u2, 80.0)))
    elif CURVE == "relu":
        value = tl.where(g <= 0.0, 0.0, g)
    else:
        tl.static_assert(CURVE == "relu_squared", "unknown CURVE")
        value = tl.where(g <= 0.0, 0.0, g * g)
    return value


@triton.jit
def curve_and_slope(g, CURVE: tl.constexpr):
    """f(g) and f'(g), float32 in and out, any shape."""
    if CURVE == "silu":
        s = 1.0 / (1.0 + tl.exp(-g))
        value = g * s
        slope = s + value * (1.0 - s)
    elif CURVE == "gelu":
        cdf = 0.5 + 0.5 * tl.erf(g * 0.7071067811865476)
        value = g * cdf
        slope = cdf + g * (tl.exp(-0.5 * g * g) * 0.3989422804014327)
    elif CURVE == "gelu_tanh":
        g = tl.where(g < -20.0, -20.0, g)
        near = tl.minimum(g, 20.0)
        square = near * near
        u2 = near * (1.5957691216057308 + 0.07135481627260025 * square)
        e = tl.exp(tl.minimum(-u2, 80.0))
        s = 1.0 / (1.0 + e)
        value = g * s
        # 1 - s = e s without cancellation; the bracket is d(2u)/dg.
        slope = s + value * (e * s) * (1.5957691216057308 + 0.21406444881780076 * square)
    elif CURVE == "relu":
        value = tl.where(g <= 0.0, 0.0, g)
        slope = tl.where(g > 0.0, 1.0, 0.0)
    else:
        tl.static_assert(CURVE == "relu_squared", "unknown CURVE")
        positive = tl.where(g <= 0.0, 0.0, g)
        value = positive * positive
        slope = 2.0 * positive
    return value, slope
