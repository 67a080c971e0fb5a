"""Round one module to nearest, write the weight, attach the record: RTN, and the fallback of GPTQ."""

import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor, nn

from lightning_compress.layers.finite import check_finite
from lightning_compress.layers.matrix import as_matrix, is_embedding, write_matrix
from lightning_compress.ops.group_quant import group_round
from lightning_compress.quant.embeddings import sharers
from lightning_compress.quant.fake_quant import round_weight
from lightning_compress.quant.formats import global_scale_of, has_global_scale
from lightning_compress.quant.observers import Observer
from lightning_compress.quant.record import Quantized
from lightning_compress.quant.scales import group_columns, has_one_pass, minmax, search
from lightning_compress.quant.shared_scales import GlobalScales
from lightning_compress.quant.weight_metrics import weight_error, weight_facts

__all__ = ["DEAD_INPUT", "check_dense", "find_scales", "has_one_pass", "input_scales", "round_embeddings",
           "round_in_one_pass", "round_module"]  # fmt: skip

DEAD_INPUT = "its input was 0 throughout calibration: no data chose its scales"
MSE_POWER = 2.4  # of the GPTQ code: punishes the few large errors more than p = 2


def round_module(
    name: str,
    module: nn.Module,
    scheme: QuantizationScheme,
    scale_search: str,
    observer: Observer | None = None,
    global_scale: Tensor | None = None,
    importance_PC: Tensor | None = None,
    keep_latent: bool = False,
    H_PGgg: Tensor | None = None,
) -> dict[str, Any]:
    """Quantize a module's weight to nearest; returns facts for the ledger, ``error`` being that of the weight.

    Args:
        name: For messages.
        module: Its weight is dense.
        scheme: The grids.
        scale_search: ``mse``; ``imatrix`` with ``importance_PC``; ``hessian`` with ``H_PGgg``; anything else for
            ``minmax``. For an embedding ``imatrix`` and ``hessian`` are least squares (quant/embeddings.py).
        observer: Observer of static activations.
        global_scale: g of NVFP4, where it is shared with other modules; by default that of this weight alone.
        importance_PC: E[x^2] of the input columns, by partition, float32.
        keep_latent: Keep the dense weight in the record.
        H_PGgg: E[x x^T] of each group of g input columns that share a scale, by partition, float32.
    """
    start = time.perf_counter()
    check_dense(name, module)
    with torch.inference_mode(False), torch.no_grad():
        W_RC = as_matrix(module)
        if has_global_scale(scheme.weights) and global_scale is None:
            global_scale = global_scale_of(*W_RC.aminmax())
        weighed, Q_RC = {"imatrix": importance_PC, "hessian": H_PGgg}.get(scale_search), None
        if is_embedding(module) and scale_search in ("imatrix", "hessian"):
            scale, zero_point = find_scales(W_RC, scheme.weights, "hessian", global_scale=global_scale)
        elif weighed is not None:
            scale, zero_point = _weighted_scales(W_RC, scheme.weights, weighed.to(W_RC.device), global_scale)
        elif scale_search == "mse":
            scale, zero_point = find_scales(W_RC, scheme.weights, "mse", global_scale=global_scale)
        elif W_RC.is_cuda and has_one_pass(W_RC, scheme.weights):
            Q_RC, scale, zero_point = round_in_one_pass(W_RC, scheme.weights)
        else:
            scale, zero_point = find_scales(W_RC, scheme.weights, "minmax", global_scale=global_scale)
        if Q_RC is None:
            Q_RC = round_weight(W_RC, scale, zero_point, scheme.weights)
        input_grid = input_scales(observer, W_RC)
        latent = W_RC.clone() if keep_latent else None
        quantized = Quantized(scheme, scale, zero_point, latent=latent, global_scale=global_scale, **input_grid)
        error = weight_error(W_RC, Q_RC)
        facts = {**weight_facts(W_RC, Q_RC, quantized, error), "error": error}
        write_matrix(module, Q_RC)
        quantized.attach(module)
        return {**facts, "seconds": time.perf_counter() - start}


def round_in_one_pass(W_RC: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor, Tensor | None]:
    """Q, scale and zero point of min-max scales: bit for bit ``minmax`` and ``round_weight``, one kernel on a GPU."""
    group = group_columns(args, W_RC.shape[1])
    return group_round(W_RC, group, args.num_bits, args.symmetric, args.type == "float")


def round_embeddings(
    names: Collection[str],
    modules: Mapping[str, nn.Module],
    schemes: dict[str, QuantizationScheme],
    scale_search: str,
    global_scales: GlobalScales,
    keep_latent: bool = False,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Quantize embeddings to nearest, each table once; gives their names, and facts for the ledger.

    Schemes of rounded modules are removed from ``schemes``; other arguments are as for :func:`round_module`.
    """
    for name in [n for n in names if n in schemes and is_embedding(modules[n])]:
        if name not in schemes:  # rounded together with another one
            continue
        shared, others = global_scales.of(name), sharers(name, {n: modules[n] for n in schemes})
        facts = round_module(
            name, modules[name], schemes.pop(name), scale_search, global_scale=shared, keep_latent=keep_latent
        )
        found_by = "least squares" if scale_search in ("imatrix", "hessian") else scale_search
        yield name, {"flag": f"an embedding: rounded to nearest, scales by {found_by}", **facts}
        record = Quantized.of(modules[name])
        assert record is not None
        for other in others:
            del schemes[other]
            record.attach(modules[other])
            yield other, {"flag": f"looks its rows up in the table of {name}"}


def find_scales(
    W_RC: Tensor,
    args: QuantizationArgs,
    how: Literal["minmax", "mse", "hessian"],
    importance_C: Tensor | None = None,
    global_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of a weight; ``hessian`` weighs errors by ``importance_C``, the diagonal of H (None: 1)."""
    if how == "minmax":
        return minmax(W_RC, args, global_scale)
    weighed = (None, MSE_POWER) if how == "mse" else (importance_C, 2.0)
    return search(W_RC, args, *weighed, global_scale)


def _weighted_scales(
    W_RC: Tensor, args: QuantizationArgs, weighing_P: Tensor, global_scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Each partition of a grouped convolution weighs errors by its own inputs: by h [C], or by H [G, g, g]."""
    P = 1 if args.strategy in ("tensor", "block") else len(weighing_P)
    weighings = weighing_P if P > 1 else weighing_P.mean(0, keepdim=True)
    how = "importance_C" if weighing_P.ndim == 2 else "H_Ggg"
    pieces = zip(W_RC.chunk(P), weighings, strict=True)
    grids = [search(W, args, global_scale=global_scale, **{how: weighing}) for W, weighing in pieces]
    zeros = [zero for _, zero in grids if zero is not None]
    return torch.cat([scale for scale, _ in grids]), torch.cat(zeros) if zeros else None


def input_scales(observer: Observer | None, W_RC: Tensor) -> dict[str, Any]:
    """What static activations add to a record, by the names of its fields; nothing without an observer.

    On the device of the weight, so that no forward pass copies it there.
    """
    if observer is None:
        return {}
    if observer.args.dynamic:  # "local": of NVFP4 the global scale alone is static
        return {"input_global_scale": observer.global_scale().to(W_RC.device)}
    scale, zero_point = observer.value(W_RC.dtype)
    zero_point = None if zero_point is None else zero_point.to(W_RC.device)
    return {"input_scale": scale.to(W_RC.device), "input_zero_point": zero_point}


def check_dense(name: str, module: nn.Module) -> None:
    """ValueError when another modifier of the recipe was here before, or when the weight holds NaN or Inf."""
    if Quantized.of(module) is not None:
        raise ValueError(
            f"two modifiers of the recipe quantize {name!r}; give them different targets, or let one of them ignore it"
        )
    check_finite({name: module})
