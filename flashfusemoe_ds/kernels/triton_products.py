# SPDX-License-Identifier: GPL-3.0-or-later
"""`TritonProducts`: the experts' six products in portable Triton, from compute capability 8.0 on.

The kernels are in triton_rows.py (tiles of sorted routes) and triton_weights.py (sums over an expert's routes). This
file chooses tiles and launches: `TILES` holds one `Tiles` per product and generation of GPU, `choose_tiles` fits it to
an operand's width. Launchers are plain functions of tensors and ints: no host synchronisation, no shape that depends
on data, so they capture into CUDA graphs.

Without a GPU the kernels run in Triton's interpreter, where TRITON_INTERPRET=1 is set before triton is imported.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from flashfusemoe_ds.kernels import triton_rows, triton_weights
from flashfusemoe_ds.kernels.activation import Activation
from flashfusemoe_ds.kernels.launch import Descriptor, launch
from flashfusemoe_ds.kernels.order import TILE_ROWS, ExpertOrder
from flashfusemoe_ds.kernels.products import UpWeights, like_weights, stacked
from flashfusemoe_ds.kernels.sizes import cdiv, next_power_of_2
from flashfusemoe_ds.kernels.triton_curves import CURVE_OF

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FIRST_CAPABILITY = (8, 0)
WAVES = 8  # of `yielding` products


@dataclass(frozen=True)
class Tiles:
    """How one product is cut and run.

    Attributes:
        bm, bn, bk: the tile of the result, and the step along the summed dimension. For a gated up-projection bn
            counts columns of A: it computes twice as many of H.
        warps, stages: warps of a program, and depth of its software pipeline.
        group: row tiles that share their pass over the columns (see triton_rows.locate).
        sub: slices of dgated's epilogue.
        per_sm: programs per multiprocessor.
        tma: weights, and ungathered rows, through the tensor memory accelerator.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    group: int = 16
    sub: int = 1
    per_sm: int = 1
    tma: bool = False


# Ada and consumer Ampere have 99 KiB of shared memory a program, and every 16-bit entry fits that. Two accumulators
# of 64 columns, not one of 128, in "up": the gate and the up half of a column meet in one thread.
PORTABLE = {
    "up": Tiles(128, 64, 32, warps=8, stages=4, per_sm=2),
    "up_plain": Tiles(128, 128, 32, warps=8, stages=4, per_sm=2),
    "down": Tiles(128, 128, 32, warps=8, stages=4),
    "dgated": Tiles(64, 128, 32, warps=4, stages=4, group=32, sub=2, per_sm=2),
    "dx": Tiles(128, 128, 32, warps=8, stages=4),
    "dw_down": Tiles(128, 128, 32, warps=8, stages=4, per_sm=2),
    "dw_up": Tiles(128, 128, 32, warps=8, stages=4, per_sm=2),
}

# Measured on an H200 with sketches of these kernels. "dgated": 64 x 128 with two programs per multiprocessor hides one
# program's epilogue under the other's products, and wins up to a hidden size of 2048 (1.21 against 1.25 ms); at 4096
# the loop is long enough that the larger tile wins (5.23 against 5.59 ms).
HOPPER = {
    "up": Tiles(128, 128, 64, warps=8, stages=4, sub=4, tma=True),
    "up_plain": Tiles(128, 256, 64, warps=8, stages=4, sub=4, tma=True),
    "down": Tiles(128, 256, 64, warps=8, stages=3, tma=True),
    "dgated": Tiles(64, 128, 64, warps=4, stages=4, group=32, sub=2, per_sm=2, tma=True),
    "dgated_deep": Tiles(128, 128, 64, warps=8, stages=4, sub=4, tma=True),
    "dx": Tiles(128, 256, 64, warps=8, stages=3, tma=True),
    "dw_down": Tiles(128, 256, 64, warps=8, stages=3),
    "dw_up": Tiles(128, 256, 64, warps=8, stages=3),
}

# float32 multiplies on the ordinary units ("ieee", 1e-6 and not TF32's 1e-3), with operands in registers: small tiles.
FLOAT32 = {
    "up": Tiles(64, 64, 16, warps=8, stages=2, per_sm=2),
    "up_plain": Tiles(64, 64, 16, warps=4, stages=2, per_sm=2),
    "down": Tiles(64, 64, 16, warps=4, stages=2, per_sm=2),
    "dgated": Tiles(64, 64, 16, warps=4, stages=2, per_sm=2),
    "dx": Tiles(64, 64, 16, warps=4, stages=2, per_sm=2),
    "dw_down": Tiles(64, 64, 16, warps=4, stages=2, per_sm=2),
    "dw_up": Tiles(64, 64, 16, warps=4, stages=2, per_sm=2),
}


def choose_tiles(product: str, capability: tuple[int, int], dtype: torch.dtype, depth: int, width: int) -> Tiles:
    """The tiles of one product ("up", "up_plain", "down", "dgated", "dx", "dw_down", "dw_up").

    Args:
        capability: of the GPU; (0, 0) for the interpreter.
        depth: length of the summed dimension; for the weight gradients, rows of the result.
        width: columns of the result.
    """
    if dtype is torch.float32:
        tiles = FLOAT32[product]
    elif capability[0] == 9:
        tiles = HOPPER["dgated_deep" if product == "dgated" and depth >= 4096 else product]
    else:
        tiles = PORTABLE[product]
    if width < tiles.bn:
        # No narrower than 32: half of it, dgated's slice, is the least that Triton multiplies or splits well.
        tiles = replace(tiles, bn=max(32, next_power_of_2(width)), sub=min(tiles.sub, 2))
    return tiles


@functools.cache
def _properties(device: torch.device) -> tuple[tuple[int, int], int]:
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


def interpreted() -> bool:
    """Whether triton was imported with TRITON_INTERPRET=1."""
    return not isinstance(triton_rows.up_kernel, triton.runtime.JITFunction)


def _operands(use_tma: bool, *operands: tuple[Tensor, tuple[int, ...]]) -> tuple[bool, list[Tensor | Descriptor]]:
    """Whether TMA can read all of (tensor, block) and was asked to, and the tensors or else their descriptors."""
    tensors = [t.contiguous() for t, _ in operands]
    # What the hardware asks of a base address and of every stride but the last.
    use_tma = use_tma and all(t.data_ptr() % 16 == 0 and t.shape[-1] * t.itemsize % 16 == 0 for t in tensors)
    if not use_tma:
        return False, tensors
    blocks = [block for _, block in operands]
    return True, [Descriptor(t, block) for t, block in zip(tensors, blocks, strict=True)]


def _row_options(tiles: Tiles) -> dict[str, int]:
    blocks = {"BM": tiles.bm, "BN": tiles.bn, "BK": tiles.bk, "GROUP": tiles.group, "MAP": TILE_ROWS}
    return {**blocks, "num_warps": tiles.warps, "num_stages": tiles.stages}


@dataclass(frozen=True)
class TritonProducts:
    """The six products on one kind of GPU; see ExpertProducts for what each returns.

    Attributes:
        capability: compute capability, which chooses the tiles; (0, 0) for the interpreter.
        num_sms: multiprocessors, which size the grids.
        waves: programs of a weight gradient that run one after another on each multiprocessor. In one wave, those that
            find a multiprocessor taken by another kernel start when the others are through.
    """

    capability: tuple[int, int]
    num_sms: int
    name: str = "triton"
    waves: int = 1

    @staticmethod
    def why_not(dtype: torch.dtype, device: torch.device) -> str | None:
        """None if usable, else the reason, in words."""
        if dtype not in DTYPES:
            return f"the triton backend does not take {dtype}"
        if device.type == "cuda":
            capability, _ = _properties(device)
            if capability < FIRST_CAPABILITY:
                return f"the triton backend needs compute capability 8.0, not {capability[0]}.{capability[1]}"
            return None
        if not interpreted():
            return f"the triton backend needs a CUDA GPU, not {device.type} (or TRITON_INTERPRET=1, to try it out)"
        if dtype is not torch.float32:
            return f"Triton's interpreter multiplies float32 alone correctly, not {dtype}"
        return None

    @classmethod
    def on(cls, device: torch.device) -> TritonProducts:
        """The products for a device on which `why_not` found nothing."""
        return cls(*_properties(device)) if device.type == "cuda" else cls((0, 0), 2)

    def yielding(self) -> TritonProducts:
        return replace(self, waves=WAVES)

    # --- rows ----------------------------------------------------------------------------------------------------

    def up(
        self,
        x_RD: Tensor,
        order: ExpertOrder,
        w_up: UpWeights,
        b_up_eH: Tensor | None,
        weight_RK: Tensor,
        activation: Activation,
    ) -> tuple[Tensor, Tensor]:
        w_up_eHD = stacked(w_up)
        _, up_width, d = w_up_eHD.shape
        f = up_width // 2 if activation.gated else up_width
        h_NH, a_NF = x_RD.new_empty(order.num_routes, up_width), x_RD.new_empty(order.num_routes, f)
        tiles = choose_tiles("up" if activation.gated else "up_plain", self.capability, x_RD.dtype, d, f)
        use_tma, (w,) = _operands(tiles.tma, (w_up_eHD, (1, tiles.bn, tiles.bk)))
        launch(
            triton_rows.up_kernel,
            self._row_grid(order, tiles, f),
            x_RD.contiguous(),
            w,
            None if b_up_eH is None else b_up_eH.contiguous(),
            weight_RK.reshape(-1),
            order.row_N,
            order.route_N,
            order.tiles_M4,
            order.num_tiles_1,
            h_NH,
            a_NF,
            D=d,
            F=f,
            GATED=activation.gated,
            CURVE=CURVE_OF[activation.name],
            BIAS=b_up_eH is not None,
            USE_TMA=use_tma,
            SUB=tiles.sub,
            **_row_options(tiles),
        )
        return h_NH, a_NF

    def down(
        self,
        a_NF: Tensor,
        order: ExpertOrder,
        w_down_eDF: Tensor,
        b_down_eD: Tensor | None,
        weight_RK: Tensor,
    ) -> Tensor:
        return self._project("down", a_NF, order, w_down_eDF, b_down_eD, weight_RK)

    def dx(self, dh_NH: Tensor, order: ExpertOrder, w_up: UpWeights) -> Tensor:
        return self._project("dx", dh_NH, order, stacked(w_up), None, None)

    def _project(
        self,
        product: str,
        a_NK: Tensor,
        order: ExpertOrder,
        weights: Tensor,
        bias: Tensor | None,
        weight_RK: Tensor | None,
    ) -> Tensor:
        forward = product == "down"
        depth = a_NK.shape[1]
        width = weights.shape[1] if forward else weights.shape[2]
        y_NO = a_NK.new_empty(order.num_routes, width)
        if not order.num_routes:
            return y_NO  # a descriptor of no rows is refused
        tiles = choose_tiles(product, self.capability, a_NK.dtype, depth, width)
        block = (1, tiles.bn, tiles.bk) if forward else (1, tiles.bk, tiles.bn)
        use_tma, (a, w) = _operands(tiles.tma, (a_NK, (tiles.bm, tiles.bk)), (weights, block))
        launch(
            triton_rows.project_kernel,
            self._row_grid(order, tiles, width),
            a,
            w,
            None if bias is None else bias.contiguous(),
            None if bias is None else weight_RK.reshape(-1),
            order.route_N,
            order.tiles_M4,
            order.num_tiles_1,
            y_NO,
            order.num_routes,
            K=depth,
            O=width,
            FORWARD=forward,
            BIAS=bias is not None,
            USE_TMA=use_tma,
            **_row_options(tiles),
        )
        return y_NO

    def dgated(
        self,
        dout_RD: Tensor,
        order: ExpertOrder,
        w_down_eDF: Tensor,
        b_down_eD: Tensor | None,
        h_NH: Tensor,
        weight_RK: Tensor,
        activation: Activation,
        *,
        overwrite_h: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, d, f = w_down_eDF.shape
        dout_RD, h_NH = dout_RD.contiguous(), h_NH.contiguous()
        tiles = choose_tiles("dgated", self.capability, h_NH.dtype, d, f)
        use_tma, (w,) = _operands(tiles.tma, (w_down_eDF, (1, tiles.bk, tiles.bn)))
        dh_NH = h_NH if overwrite_h else torch.empty_like(h_NH)
        a_NF = h_NH.new_empty(order.num_routes, f)
        num_blocks = cdiv(f, tiles.bn)
        num_partials = num_blocks + (b_down_eD is not None)
        ds_PN = h_NH.new_empty(num_partials, order.num_routes, dtype=torch.float32)
        launch(
            triton_rows.dgated_kernel,
            self._row_grid(order, tiles, f),
            dout_RD,
            w,
            h_NH,
            weight_RK.reshape(-1),
            order.row_N,
            order.route_N,
            order.tiles_M4,
            order.num_tiles_1,
            dh_NH,
            a_NF,
            ds_PN,
            order.num_routes,
            D=d,
            F=f,
            GATED=activation.gated,
            CURVE=CURVE_OF[activation.name],
            IN_PLACE=overwrite_h,
            USE_TMA=use_tma,
            SUB=tiles.sub,
            **_row_options(tiles),
        )
        if b_down_eD is not None:
            self._bias_dot(dout_RD, order, b_down_eD, ds_PN[num_blocks])
        return dh_NH, a_NF, ds_PN

    def _bias_dot(self, dout_RD: Tensor, order: ExpertOrder, b_down_eD: Tensor, ds_N: Tensor) -> None:
        """Writes dY . b_down of each route's expert to ds_N [N], float32: the down bias's share of dS.

        A pass of its own over dY: in dgated's loop it would pull every block of dY into registers.
        """
        tiles = Tiles(32, 1, 128, warps=4, stages=3, per_sm=8)
        launch(
            triton_rows.bias_dot_kernel,
            self._row_grid(order, tiles, 1),
            dout_RD,
            b_down_eD.contiguous(),
            order.row_N,
            order.tiles_M4,
            order.num_tiles_1,
            ds_N,
            D=dout_RD.shape[1],
            MAP=TILE_ROWS,
            BM=tiles.bm,
            BK=tiles.bk,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )

    def _row_grid(self, order: ExpertOrder, tiles: Tiles, width: int) -> tuple[int]:
        """As many programs as fit the GPU at once, or as the most tiles there can be."""
        most = order.max_tiles * (TILE_ROWS // tiles.bm) * cdiv(width, tiles.bn)
        return (min(most, self.num_sms * tiles.per_sm),)

    # --- sums over rows ------------------------------------------------------------------------------------------

    def dw_down(self, dout_RD: Tensor, order: ExpertOrder, a_NF: Tensor) -> Tensor:
        return self._weight_grad("dw_down", dout_RD, a_NF, order)

    def dw_up(self, dh_NH: Tensor, order: ExpertOrder, x_RD: Tensor, w_up: UpWeights) -> UpWeights:
        return like_weights(self._weight_grad("dw_up", dh_NH, x_RD, order), w_up)

    def _weight_grad(self, product: str, left: Tensor, right: Tensor, order: ExpertOrder) -> Tensor:
        num_experts, m, n = order.ends_e.numel(), left.shape[1], right.shape[1]
        out_eMN = left.new_empty(num_experts, m, n)
        tiles = choose_tiles(product, self.capability, left.dtype, m, n)
        num_tiles = num_experts * cdiv(m, tiles.bm) * cdiv(n, tiles.bn)
        launch(
            triton_weights.weight_grad_kernel,
            (min(num_tiles, self.num_sms * tiles.per_sm * self.waves),),
            left.contiguous(),
            right.contiguous(),
            order.row_N,
            order.by_size_e3,
            out_eMN,
            num_experts,
            M=m,
            N=n,
            GATHER_L=product == "dw_down",
            GROUP=tiles.group,
            BM=tiles.bm,
            BN=tiles.bn,
            BK=tiles.bk,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        return out_eMN


def segment_sum(rows: Tensor, order: ExpertOrder, dtype: torch.dtype, weight_RK: Tensor | None = None) -> Tensor:
    """See kernels.segment_sum.segment_sum, which chooses between this and PyTorch."""
    num_experts, width = order.ends_e.numel(), rows.shape[1]
    out_eW = rows.new_empty(num_experts, width, dtype=dtype)
    # 64 columns are 128 bytes of a row in bf16, one line; narrower programs would be more, but read lines twice.
    block_rows = block_columns = 64
    launch(
        triton_weights.segment_sum_kernel,
        (cdiv(width, block_columns), num_experts),
        rows.contiguous(),
        None if weight_RK is None else weight_RK.reshape(-1),
        order.row_N,
        order.route_N,
        order.ends_e,
        out_eW,
        WIDTH=width,
        GATHER=weight_RK is not None,
        BR=block_rows,
        BW=block_columns,
        num_warps=4,
        num_stages=4,
    )
    return out_eW
