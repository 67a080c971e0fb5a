"""One technique in the words of both libraries: what `compress` takes here, and the recipe of llm-compressor.

Each takes the fields of a Job (measured_run.py). Where a default differs, the peer's stands on both sides: min-max
scales for AWQ and rounding, static order of columns for GPTQ. Imports are inside: each library has an environment of
its own.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from measured_run import Job

__all__ = ["PRUNERS", "QUANTIZERS", "of_peer", "ours"]

STRENGTH = 0.8  # of SmoothQuant
RECOVERY = {"recovery_epochs": 2, "recovery_rate": 3e-3}

# Rows of the tables of accuracy (bench_demo.py, bench_weights.py): fields of Job
QUANTIZERS: dict[str, dict[str, Any]] = {
    "RTN": {"technique": "rtn"},
    "GPTQ, minmax": {"technique": "gptq", "scale_search": "minmax"},
    "GPTQ": {"technique": "gptq"},
    "AWQ": {"technique": "awq"},
    "AWQ + GPTQ": {"technique": "awq+gptq"},
    "rotation + GPTQ": {"technique": "spinquant+gptq"},
    "AutoRound": {"technique": "autoround"},
    "AutoRound from RTN": {"technique": "autoround from rtn"},
}
PRUNERS: dict[str, dict[str, Any]] = {
    f"{name} {what}": {"technique": technique, **fields}
    for name, technique in (("Wanda", "wanda"), ("SparseGPT", "sparsegpt"))
    for what, fields in (
        ("50 %", {"sparsity": 0.5}),
        ("2:4", {"mask": "2:4"}),
        ("70 %", {"sparsity": 0.7}),
        ("50 %, OWL", {"sparsity": 0.5, "owl": True}),
        ("70 %, OWL", {"sparsity": 0.7, "owl": True}),
    )
}


def ours(job: "Job") -> list[Any]:
    """The modifiers, in order."""
    import lightning_compress as lc

    grid = job.grid

    def rtn() -> Any:
        return lc.QuantizationModifier(**grid)

    def gptq(**more: Any) -> Any:
        return lc.GPTQModifier(**grid, actorder="static", scale_search=job.scale_search, **more)

    def tune(**more: Any) -> Any:
        return lc.TuneModifier(epochs=job.epochs, lr=job.lr, **more)

    make: dict[str, Callable[[], list[Any]]] = {
        "rtn": lambda: [rtn()],
        "gptq": lambda: [gptq()],
        "gptq+tune": lambda: [gptq(), tune()],
        "gptq by loss": lambda: [gptq(objective="loss")],
        "gptq by loss+tune": lambda: [gptq(objective="loss"), tune()],
        "gptq for dense": lambda: [gptq(target="dense")],
        "gptq for dense+tune": lambda: [gptq(target="dense"), tune()],
        "gptq for dense by loss": lambda: [gptq(target="dense", objective="loss")],
        "gptq for dense by loss+tune": lambda: [gptq(target="dense", objective="loss"), tune()],
        "allocate+gptq": lambda: _allocated(job),
        "allocate+gptq by loss": lambda: _allocated(job, objective="loss"),
        "allocate+gptq+tune": lambda: [*_allocated(job), tune()],
        "allocate+gptq for dense": lambda: _allocated(job, target="dense"),
        "allocate+gptq for dense+tune": lambda: [*_allocated(job, target="dense"), tune()],
        "awq": lambda: [lc.AWQModifier(**grid)],
        "awq+gptq": lambda: [lc.AWQModifier(**grid, quantize=False), gptq()],
        "smoothquant+gptq w8a8": lambda: [
            lc.SmoothQuantModifier(smoothing_strength=STRENGTH, ignore=job.ignore),
            lc.GPTQModifier(scheme="W8A8", ignore=job.ignore),
        ],
        "sparsegpt": lambda: [_pruner(lc.SparseGPTModifier, job)],
        "wanda": lambda: [_pruner(lc.WandaPruningModifier, job)],
        "sparsegpt for dense": lambda: [_pruner(lc.SparseGPTModifier, job, target="dense")],
        "sparsegpt recovered": lambda: [_pruner(lc.SparseGPTModifier, job, **RECOVERY)],
        "sparsegpt for dense+tune": lambda: [
            _pruner(lc.SparseGPTModifier, job, target="dense"),
            tune(sparse_weights=True),
        ],
        "sparsegpt for dense recovered": lambda: [_pruner(lc.SparseGPTModifier, job, target="dense", **RECOVERY)],
        "sparsegpt+tune": lambda: [_pruner(lc.SparseGPTModifier, job), tune(sparse_weights=True)],
        "sparsegpt for dense recovered+tune": lambda: [
            _pruner(lc.SparseGPTModifier, job, target="dense", **RECOVERY),
            tune(sparse_weights=True),
        ],
        "spinquant+rtn": lambda: [lc.SpinQuantModifier(rotations=["R1", "R2"], seed=job.subset), rtn()],
        "spinquant+gptq": lambda: [lc.SpinQuantModifier(rotations=["R1", "R2"], seed=job.subset), gptq()],
        "quip+rtn": lambda: [lc.QuIPModifier(allow_online=True, seed=job.subset), rtn()],
        "autoround": lambda: [lc.AutoRoundModifier(**grid, scale_search=job.scale_search, iters=job.iters)],
        "autoround from rtn": lambda: [lc.AutoRoundModifier(**grid, init="rtn", scale_search="minmax")],
    }
    return make[job.technique]()


def _allocated(job: "Job", **more: Any) -> list[Any]:
    """GPTQ of schemes that are chosen within the bits of the job's scheme everywhere; scales are float32."""
    import lightning_compress as lc

    sizes = {2: (64, 32), 3: (192, 64, 32), 4: (192, 64, 32), 5: (64,), 6: (64,), 8: (192,)}
    candidates = [f"W{bits}A16 g{size}" for bits in sizes for size in sizes[bits] if size in job.groups]
    allocate = lc.AllocateModifier(bits=job.bits + 32 / job.group, candidates=candidates)
    gptq = {"actorder": "static", "scale_search": job.scale_search, "ignore": job.ignore}
    return [allocate, lc.GPTQModifier(scheme="allocated", **gptq, **more)]


def _pruner(modifier: Any, job: "Job", **more: Any) -> Any:
    owl = {"sparsity_profile": "owl"} if job.owl else {}
    return modifier(sparsity=job.sparsity, mask_structure=job.mask, ignore=job.ignore, **owl, **more)


def of_peer(job: "Job") -> list[Any]:
    """The recipe of llm-compressor 0.14."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform import AWQModifier, QuIPModifier, SmoothQuantModifier, SpinQuantModifier

    grid = job.grid | ({"targets": ["Linear"]} if job.scheme else {})
    pruned: dict[str, Any] = {
        "sparsity": job.sparsity,
        "mask_structure": {"unstructured": "0:0"}.get(job.mask, job.mask),
        "targets": ["Linear"],
        "ignore": ["re:.*lm_head"],
    }
    make: dict[str, Callable[[], list[Any]]] = {
        "rtn": lambda: [QuantizationModifier(**grid)],
        "gptq": lambda: [GPTQModifier(**grid, actorder="static")],
        "awq": lambda: [AWQModifier(), QuantizationModifier(**grid)],
        "awq+gptq": lambda: [AWQModifier(), GPTQModifier(**grid, actorder="static")],
        "smoothquant+gptq w8a8": lambda: [
            SmoothQuantModifier(smoothing_strength=STRENGTH),
            GPTQModifier(targets=["Linear"], scheme="W8A8", ignore=job.ignore),
        ],
        "sparsegpt": lambda: [SparseGPTModifier(**pruned)],
        "wanda": lambda: [WandaPruningModifier(**pruned)],
        "spinquant+rtn": lambda: [
            # its deterministic Hadamard knows powers of two only; 576 is none
            SpinQuantModifier(rotations=["R1", "R2"], transform_type="random-hadamard"),
            QuantizationModifier(**grid),
        ],
        "quip+rtn": lambda: [
            QuIPModifier(
                targets="Linear", rotations=["v", "u"], transform_type="hadamard", transform_block_size=job.group
            ),
            QuantizationModifier(**grid),
        ],
    }
    if "awq" in job.technique:
        from llmcompressor.pipelines.cache import IntermediatesCache

        # 0.14.0.1 pins memory unconditionally, and without a GPU that is an error: it would not run here at all
        IntermediatesCache._pin_intermediate = lambda self, x: x
    return make[job.technique]()
