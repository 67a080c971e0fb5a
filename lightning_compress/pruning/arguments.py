"""Arguments of modifiers that prune on calibration data: targets, sparsity, structure."""

from typing import Literal

from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from lightning_compress.layers.matching import Names, match_rank, select_weights, warn_of_left_out
from lightning_compress.layers.matrix import SUPPORTED, as_matrix, check_weights_work, is_supported, parameter_of
from lightning_compress.layers.tied_weights import check_unshared
from lightning_compress.pruning.masks import check_columns, check_structure, n_of_m

__all__ = ["PruningArguments", "share_of_zeros", "zeros_stay"]

PRUNED = 1 / 3  # share of zeros from which a weight counts as pruned


class PruningArguments(BaseModel):
    """Mixin of modifiers.

    Args:
        targets: Class names, dotted names or ``re:`` patterns of the modules to prune; they are part of ``sparsity``
            where that is a mapping.
        ignore: Class names, dotted names or ``re:`` patterns of modules that are left out.
        sparsity: Share of weights that become zero, in [0, 1), or a mapping of targets to shares, the best match
            counting. None: 0.5, or with N:M the sparsity of the pattern. Weights that are zero already count, and stay
            zero.
        mask_structure: ``unstructured``, or ``N:M``: of every M consecutive columns N are kept.
        sparsity_profile: ``owl``: blocks with many outliers keep more weights. ``loss``: each target loses what raises
            the loss least, by the gradients of a backward pass over the data, with labels drawn from the model's
            logits; ``output`` and ``training_step`` are other losses, as for ``objective``. All targets together have
            the share ``sparsity``, and it takes one more pass over the data. None: all targets alike.
        owl_m: Factor M of ``owl``: scores above M times the mean of their block are outliers.
        owl_lmbda: Half of the largest difference between the sparsities of two blocks, with ``owl``; of two targets
            with another profile.
        refit_iterations: Iterations of conjugate gradients that refit the remaining weights; 0: none.
        dampening_frac: Share of the mean diagonal of H that is added to its diagonal.
        share_inputs: One H for modules that receive the same tensor (query, key, value; gate, up).
    """

    targets: Names = ["Linear"]
    ignore: Names = []
    sparsity: float | dict[str, float] | None = None
    mask_structure: str = "unstructured"
    sparsity_profile: Literal["owl", "loss", "output", "training_step"] | None = None
    owl_m: float = Field(default=5.0, gt=0)
    owl_lmbda: float = Field(default=0.08, ge=0)
    refit_iterations: int = Field(default=10, ge=0)
    dampening_frac: float = Field(default=0.01, ge=0)
    share_inputs: bool = True

    @model_validator(mode="after")
    def _sparsity_is_possible(self) -> "PruningArguments":
        if self.mask_structure != "unstructured" and self.pattern is None:
            raise ValueError(f"mask_structure={self.mask_structure!r}, expected 'unstructured', or 'N:M' such as '2:4'")
        check_structure(self.mask_structure)
        if isinstance(self.sparsity, dict):
            if self.targets not in (["Linear"], "Linear"):
                raise ValueError("targets and sparsity as a mapping exclude each other: the mapping names the targets")
            if not self.sparsity:
                raise ValueError("sparsity={} names no targets; expected such as {'Linear': 0.5}")
        for value in self.sparsity.values() if isinstance(self.sparsity, dict) else [self.sparsity]:
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"sparsity={value} must lie in [0, 1): the share of weights that become zero")
            check_structure(self.mask_structure, value)
        return self

    @model_validator(mode="after")
    def _profile_is_possible(self) -> "PruningArguments":
        profile, fields = self.sparsity_profile, type(self).model_fields
        without = {None: ("owl_lmbda", "owl_m"), "owl": ()}.get(profile, ("owl_m",))
        if names := [name for name in without if getattr(self, name) != fields[name].default]:
            raise ValueError(f"{', '.join(names)} without sparsity_profile='owl' would do nothing")
        if profile is None:
            return self
        if self.pattern is not None or isinstance(self.sparsity, dict):
            other = f"mask_structure={self.mask_structure!r}" if self.pattern is not None else "sparsity as a mapping"
            what = "block" if profile == "owl" else "target"
            raise ValueError(f"sparsity_profile={profile!r} finds a sparsity for each {what}; {other} gives it already")
        mean, factor = self.mean_sparsity, 2 if profile == "owl" else 1
        reach = factor * self.owl_lmbda
        if not 0 <= mean - reach <= mean + reach < 1:
            raise ValueError(
                f"with owl_lmbda={self.owl_lmbda:g} {'blocks' if profile == 'owl' else 'targets'} may have sparsities "
                f"from {mean - reach:g} to {mean + reach:g}, outside of [0, 1); give at most "
                f"{max(0.0, min(mean, 0.99 - mean)) / factor:.3g}"
            )
        return self

    @property
    def pattern(self) -> tuple[int, int] | None:
        """(N, M), or None when unstructured."""
        return n_of_m(self.mask_structure)

    def find(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules to prune, by dotted name.

        Raises:
            ValueError: Nothing matches, a weight is not a matrix, another module shares it, or M does not divide its
                columns. The message names the modules.
        """
        named = list(self.sparsity) if isinstance(self.sparsity, dict) else self.targets
        field = "sparsity" if isinstance(self.sparsity, dict) else "targets"
        modules = select_weights(model, named, self.ignore, field=field)
        check_weights_work(modules, "prune")
        if other := [f"{name} ({type(m).__name__})" for name, m in modules.items() if not is_supported(m)]:
            raise ValueError(
                f"cannot prune {', '.join(other[:5])}: expected {SUPPORTED}, "
                f"with a plain weight (neither fake-quantized while training nor LoRA); add them to ignore"
            )
        check_columns({name: as_matrix(module).shape[1] for name, module in modules.items()}, self.mask_structure)
        check_unshared(model, modules, {name: parameter_of(module) for name, module in modules.items()})
        warn_of_left_out(model, modules, named, self.ignore)
        return modules

    def sparsity_of(self, name: str, module: nn.Module) -> float:
        """The share of weights that one module loses."""
        if self.pattern is not None:
            n, m = self.pattern
            return (m - n) / m
        if isinstance(self.sparsity, dict):
            return max((match_rank(name, module, target), share) for target, share in self.sparsity.items())[1]
        return self.mean_sparsity

    @property
    def mean_sparsity(self) -> float:
        """The share that unstructured targets lose by default."""
        assert not isinstance(self.sparsity, dict)
        return 0.5 if self.sparsity is None else self.sparsity


def share_of_zeros(W_RC: Tensor) -> float:
    """Share of entries that are exactly zero."""
    return (W_RC.numel() - int(W_RC.count_nonzero())) / max(1, W_RC.numel())


def zeros_stay(W_RC: Tensor, preserve_zeros: bool | None) -> bool:
    """Whether a quantizer keeps zeros; ``preserve_zeros=None``: where at least a third of the weights are zero."""
    return share_of_zeros(W_RC) >= PRUNED if preserve_zeros is None else preserve_zeros
