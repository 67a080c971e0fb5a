"""Scales and zero points of a weight: from its extremes, or by a search for the least error.

    s, z = extremes of the group                 symmetric: s = max|w| / ((qmax - qmin) / 2), so int4 divides by 7.5
    f*   = argmin_f  sum_j h_j |w_j - Q(w_j; f s, z)|^p        over shrink factors f, per row and group

Formats whose scales have a format of their own (quant/formats.py) choose among the scales that can be stored near those
of the extremes, with the same error.

With h = 1, p = 2.4 this is the search of the GPTQ code ("mse"). With h = diag(H), H = E[x x^T], p = 2 it is the error
of the layer's output when errors do not correlate ("hessian"); there the last step is exact: for codes c,
f = sum h w c / sum h c^2. With the whole H_gg of a group, e H_gg e^T with e = w - Q(w), it is the error of the output
from this group when nothing compensates it, as when rounding to nearest. Weights must be rounded with these scales as
they are returned, in the dtype that stores them.

Shapes: R rows, C columns, G groups of g columns in a row. With blocks of b rows and g columns a scale is
[R / b, C / g], both rounded up.
"""

from itertools import pairwise

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor
from torch.nn.functional import pad

from lightning_compress.ops.availability import KERNEL_DTYPES, kernel_runs
from lightning_compress.ops.scale_search import reference, scale_search, scale_sweep
from lightning_compress.quant.formats import global_scale_of, has_global_scale, is_microscaled
from lightning_compress.quant.scale_descent import descend
from lightning_compress.quant.scale_errors import FormErrors, GridErrors, Summed, Tall, integer_range

__all__ = ["expand", "group_columns", "has_one_pass", "integer_range", "minmax", "search"]

CHUNK = 1 << 17  # weights of the rows of one matrix-vector product; the last bits of its sums depend on their number
BLOCK = 2  # chunks whose errors are computed at a time, 1 MB, about the L2; more ran no faster
TOGETHER = 16  # chunks that are searched together: of each of them only a few rows need the last factors
CUDA_CHUNK = 1 << 26  # there each piece costs hundreds of launches


def group_columns(args: QuantizationArgs, columns: int) -> int:
    """g: columns that share one scale within a row."""
    if args.strategy == QuantizationStrategy.BLOCK:
        return args.block_structure[1]
    if args.strategy in (QuantizationStrategy.GROUP, QuantizationStrategy.TENSOR_GROUP):
        return args.group_size
    return columns


def has_one_pass(W_RC: Tensor, args: QuantizationArgs) -> bool:
    """Whether ops/group_quant and ops/scale_search take this weight: integers or plain FP8, by group or by row."""
    rows_or_groups = args.strategy in (QuantizationStrategy.GROUP, QuantizationStrategy.CHANNEL)
    plain = (args.type == "int" and args.num_bits > 1) or (args.type == "float" and args.num_bits == 8)
    return rows_or_groups and plain and W_RC.dtype in KERNEL_DTYPES and not is_microscaled(args)


def expand(scale: Tensor, rows: int, args: QuantizationArgs) -> Tensor:
    """Scales or zero points as [R, G], whatever the strategy; scales of that shape stay as they are."""
    if args.strategy == QuantizationStrategy.BLOCK and len(scale) != rows:
        return scale.repeat_interleave(args.block_structure[0], 0)[:rows]
    return scale.expand(rows, 1) if scale.ndim == 1 else scale


def minmax(W_RC: Tensor, args: QuantizationArgs, global_scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point from the extremes, exactly as ``compressed_tensors.calculate_qparams`` gives them.

    ``global_scale`` is g of NVFP4, float32 [1]; by default it is computed from the extremes of W.

    Returns:
        The scale in the dtype of W (microscaled formats: float32), and the zero point as int8 or None (symmetric):
        [R, G], [R, 1], [1], or one for each block.
    """
    if is_microscaled(args):
        W_RC = W_RC.float()
    if args.strategy == QuantizationStrategy.BLOCK:
        low, high = _blocked(W_RC, args).permute(0, 2, 1, 3).flatten(2).aminmax(dim=-1)
    else:
        grouped = W_RC.reshape(1, -1) if args.strategy == QuantizationStrategy.TENSOR else W_RC
        blocks = grouped.unflatten(-1, (-1, group_columns(args, grouped.shape[-1])))
        low, high = blocks.amin(-1), blocks.amax(-1)  # aminmax(dim=-1) takes nine times as long (torch 2.13, CPU)
    if has_global_scale(args):
        global_scale = global_scale_of(low.amin(), high.amax()) if global_scale is None else global_scale
        scale, _ = calculate_qparams(low, high, args, global_scale=global_scale)
        return scale / global_scale, None
    scale, zero = calculate_qparams(low, high, args)
    if args.strategy == QuantizationStrategy.TENSOR:
        scale, zero = scale.reshape(1), zero.reshape(1)
        low, high = low.reshape(1), high.reshape(1)
    # all weights zero: min / scale is 0 / 0 there, and the cast of NaN to int8 is undefined
    return scale, None if args.symmetric else zero.where((low != 0) | (high != 0), torch.zeros_like(zero))


def _blocked(W_RC: Tensor, args: QuantizationArgs) -> Tensor:
    """[R / b, b, C / g, g], zeros filling up the last blocks."""
    b, g = args.block_structure
    R, C = W_RC.shape
    return pad(W_RC, (0, -C % g, 0, -R % b)).unflatten(1, (-1, g)).unflatten(0, (-1, b))


def search(
    W_RC: Tensor,
    args: QuantizationArgs,
    importance_C: Tensor | None = None,
    power: float = 2.0,
    global_scale: Tensor | None = None,
    H_Ggg: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point that minimize ``sum_j h_j |error_j|^power``, or ``error H error^T``, over shrunken ranges.

    Args:
        W_RC: The weight, any floating dtype.
        args: The grid.
        importance_C: h, at least 0, float32; None for h = 1.
        power: p.
        global_scale: As for :func:`minmax`.
        H_Ggg: In place of h and p the second moment of each group's inputs, float32 [G, g, g], both triangles; where a
            scale spans the row (channel, tensor) G = 1.

    Returns:
        As :func:`minmax`. A scale that the search would round to zero stays at its min-max value.
    """
    R, C = W_RC.shape
    importance_C = torch.ones(C, device=W_RC.device, dtype=torch.float32) if importance_C is None else importance_C
    if H_Ggg is None and has_one_pass(W_RC, args) and _kernel_runs(W_RC):
        g = group_columns(args, C)
        return scale_search(W_RC, importance_C.float(), g, args.num_bits, args.symmetric, args.type == "float", power)
    if is_microscaled(args):
        return _sweep(W_RC, args, importance_C, power, global_scale, H_Ggg), None
    if args.strategy == QuantizationStrategy.BLOCK:
        if H_Ggg is not None:
            return _search_blocks_by_form(W_RC, args, H_Ggg), None
        return _search_blocks(W_RC, args, importance_C, power)
    g = group_columns(args, C)
    G = C // g
    scale, zero = minmax(W_RC, args)
    scale_RG = expand(scale, R, args)
    z_GR = None if zero is None else expand(zero, R, args).t().float().contiguous()
    factor_GR = torch.ones(G, R, device=W_RC.device, dtype=torch.float32)
    shift_GR = torch.zeros_like(factor_GR)
    of_tensor = args.strategy == QuantizationStrategy.TENSOR  # one factor for all rows
    rows, block, pieces = _pieces(R, G, g, W_RC.is_cuda, alone=of_tensor or W_RC.is_cuda)
    scratch = W_RC.new_empty((2, block * rows * g), dtype=torch.float32)
    memory = torch.empty((max(map(_size, pieces)), g), dtype=torch.float32, device=W_RC.device)

    def grid_errors(piece: tuple[slice, slice]) -> GridErrors:
        # [groups, rows, g]: one importance for all rows of a slice, so that a weighted sum is one matrix-vector product
        W_GRg, scale_GR1 = W_RC.view(R, G, g).transpose(0, 1)[piece], scale_RG.t()[piece][:, :, None]
        t_Rg = torch.empty_like(memory) if of_tensor else memory
        t_GRg = torch.div(W_GRg, scale_GR1, out=t_Rg[: _size(piece)].view(W_GRg.shape))
        times = max(1, t_GRg.shape[1] // rows)
        t_GRg = t_GRg.view(len(t_GRg) * times, -1, g)
        z = None if z_GR is None else z_GR[piece].reshape(t_GRg.shape[:2])
        if H_Ggg is not None:
            return FormErrors(t_GRg, z, _repeated(H_Ggg[piece[0]], times), args, block, scratch)
        h_Gg = _repeated(importance_C.view(G, g)[piece[0]], times)
        return GridErrors(t_GRg, z, h_Gg, power, args, block, scratch)

    if of_tensor:
        factor, shift = descend(Summed([grid_errors(piece) for piece in pieces]))
    else:
        for piece in pieces:
            best_f, best_shift = descend(grid_errors(piece))
            factor_GR[piece], shift_GR[piece] = best_f.view_as(factor_GR[piece]), best_shift.view_as(factor_GR[piece])
        factor, shift = factor_GR.t(), shift_GR.t()
    best = (scale.float() * factor).to(scale.dtype).contiguous()
    best = best.where((best > 0) & best.isfinite(), scale)
    return best, None if zero is None else zero + shift.to(zero.dtype)


def _pieces(R: int, G: int, g: int, on_cuda: bool, alone: bool) -> tuple[int, int, list[tuple[slice, slice]]]:
    """Rows of one product, groups of that many rows that are computed at a time, and pieces: groups and rows each.

    A piece has a multiple of the rows of one product, each as if it were a group of its own, or the rows that are left.

    Args:
        R: Rows.
        G: Groups.
        g: Columns of a group.
        on_cuda: The device.
        alone: Chunks are not searched together.
    """
    chunk, together = CUDA_CHUNK if on_cuda else CHUNK, 1 if alone else TOGETHER
    rows = min(R, max(1, chunk // g))
    groups = max(1, chunk // (rows * g))
    block, groups = min(BLOCK, together) * groups, together * groups
    times = max(1, groups // min(groups, G))
    complete = R - R % rows
    ends = [*range(0, complete, times * rows), complete, R]
    columns = [slice(i, min(i + groups, G)) for i in range(0, G, groups)]
    return rows, block, [(c, slice(low, high)) for c in columns for low, high in pairwise(ends) if low < high]


def _size(piece: tuple[slice, slice]) -> int:
    """The rows of all its groups."""
    groups, rows = piece
    return (groups.stop - groups.start) * (rows.stop - rows.start)


def _repeated(v_G: Tensor, times: int) -> Tensor:
    """One after the other, each so many times."""
    return v_G[:, None].expand(-1, times, *v_G.shape[1:]).flatten(0, 1)


def _sweep(
    W_RC: Tensor,
    args: QuantizationArgs,
    importance_C: Tensor,
    power: float,
    global_scale: Tensor | None,
    H_Ggg: Tensor | None,
) -> Tensor:
    """Of the scales that can be stored near those from the extremes, the one with the least error, [R, G]."""
    C = W_RC.shape[1]
    if has_global_scale(args) and global_scale is None:
        global_scale = global_scale_of(*W_RC.aminmax())
    scale_RG, _ = minmax(W_RC, args, global_scale)
    if H_Ggg is None and _kernel_runs(W_RC):
        return scale_sweep(W_RC, scale_RG, importance_C.float(), args.num_bits, global_scale, power)

    step = max(1, (CUDA_CHUNK if W_RC.is_cuda else CHUNK) // C)
    pieces = zip(W_RC.split(step), scale_RG.split(step), strict=True)
    if H_Ggg is None:
        every = importance_C, args.num_bits, global_scale, power
        return torch.cat([reference.scale_sweep(W, scale, *every) for W, scale in pieces])
    H = H_Ggg

    def by_form(e_RGg: Tensor) -> Tensor:
        return torch.linalg.vecdot((e_RGg.transpose(0, 1) @ H).transpose(0, 1), e_RGg)

    return torch.cat([reference.sweep(W, scale, args.num_bits, global_scale, by_form) for W, scale in pieces])


def _kernel_runs(W_RC: Tensor) -> bool:
    """Whether this weight is on a GPU that runs the kernels of ops/scale_search, for grids that they take."""
    instead = "scales are searched by hundreds of kernels of torch"
    return W_RC.is_cuda and W_RC.numel() > 0 and W_RC.dtype in KERNEL_DTYPES and kernel_runs(W_RC.device, instead)


def _search_blocks(
    W_RC: Tensor, args: QuantizationArgs, importance_C: Tensor, power: float
) -> tuple[Tensor, Tensor | None]:
    """One column of blocks at a time: each block becomes one row, with the importance of its columns.

    Where a kernel runs, all at once: each row of blocks becomes one row, and each block a group of its columns.
    """
    b, g = args.block_structure
    importance_C = pad(importance_C, (0, -len(importance_C) % g))
    if _kernel_runs(W_RC):
        grouped = {"strategy": QuantizationStrategy.GROUP, "group_size": b * g, "block_structure": None}
        rows = _blocked(W_RC, args).permute(0, 2, 1, 3).flatten(1)
        every = importance_C.view(-1, 1, g).expand(-1, b, -1).flatten()
        return search(rows, args.model_copy(update=grouped), every, power)
    within = args.model_copy(update={"strategy": QuantizationStrategy.CHANNEL, "block_structure": None})
    pieces = zip(_blocked(W_RC, args).unbind(2), importance_C.split(g), strict=True)
    grids = [search(piece.flatten(1), within, h_g.repeat(b), power) for piece, h_g in pieces]
    zeros = [zero for _, zero in grids if zero is not None]
    return torch.cat([scale for scale, _ in grids], 1), torch.cat(zeros, 1) if zeros else None


def _search_blocks_by_form(W_RC: Tensor, args: QuantizationArgs, H_Ggg: Tensor) -> Tensor:
    """Columns of blocks, on a CPU one at a time, rows each with their own error; grids of floats, no zero points."""
    assert args.symmetric
    b, g = args.block_structure
    within = args.model_copy(update={"strategy": QuantizationStrategy.CHANNEL, "block_structure": None})
    at_once = max(1, CUDA_CHUNK // (len(W_RC) * g)) if W_RC.is_cuda else 1
    scales = []
    for piece, H in zip(_blocked(W_RC, args).split(at_once, 2), H_Ggg.split(at_once), strict=True):
        blocks = piece.permute(2, 0, 1, 3).contiguous()  # [columns of blocks, R / b, b, g]
        scale, _ = minmax(blocks.flatten(0, 1).flatten(1), within)
        t_GRg = (blocks / scale.view(len(blocks), -1, 1, 1)).float().flatten(1, 2)
        factor, _ = descend(Tall(FormErrors(t_GRg, None, H, within), b))
        better = (scale.float() * factor[:, None]).to(scale.dtype)
        scales.append(better.where((better > 0) & better.isfinite(), scale).view(len(blocks), -1).t())
    return torch.cat(scales, 1)
