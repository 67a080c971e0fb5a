"""Where the training loaders of every rank stand, so that a run that is resumed within an epoch trains each batch once.

Lightning stores the states of the loaders of rank 0 for all ranks, and loads them before samplers know the number of
their epoch. Of loaders without a length it has fetched one batch more than was trained; here it is stored, too.
"""

from typing import Any

from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_compress.team import Team

__all__ = ["collect_all", "has_state", "load", "order_is_stored"]

PLAIN = (Tensor, bool, int, float, str, bytes, type(None))


def has_state(loader: object) -> bool:
    """Whether a run can be resumed within an epoch of this loader, batch by batch."""
    return isinstance(loader, _Stateful) and order_is_stored(loader)


def order_is_stored(loader: object) -> bool:
    """False where Lightning has wrapped a random sampler for several ranks: its generator is in no state."""
    sampler = getattr(loader, "sampler", None)
    return not (isinstance(sampler, DistributedSamplerWrapper) and hasattr(sampler.dataset._sampler, "generator"))


def collect_all(trainer: Trainer) -> list[dict[str, Any]]:
    """By rank: the states of its training loaders and the batches that were fetched ahead; every rank calls this.

    Empty where no loader has a state.
    """
    loop = trainer.fit_loop
    states = [] if loop._combined_loader is None else loop._combined_loader._state_dicts()
    if not states:
        return []
    ahead = getattr(loop._data_fetcher, "batches", [])
    plain = all(isinstance(leaf, PLAIN) for leaf in tree_leaves(ahead))
    return Team.present().gather({"states": states, "ahead": list(ahead) if plain else None})


def load(trainer: Trainer, ranks: list[dict[str, Any]], *, begun: bool) -> None:
    """Let the loaders of this rank go on where they stood, as :func:`collect_all` says; called in on_train_start.

    ``begun``: the epoch goes on. Else it is over, and iterators of the next one are not made here.
    """
    loop, team = trainer.fit_loop, Team.present()
    loaders, fetcher = loop._combined_loader, loop._data_fetcher
    if loaders is None or fetcher is None:
        return
    if len(ranks) != team.size:
        rank_zero_warn(
            f"the checkpoint holds the states of the loaders of {len(ranks)} processes, and this run has {team.size}: "
            f"what is left of this epoch is not what an unbroken run would train on; resume with {len(ranks)} processes"
        )
        return
    for loader in loaders.flattened:
        _set_sampler_epoch(loader, loop.epoch_progress.current.processed)
    loaders._load_state_dicts(ranks[team.rank]["states"])
    if not begun:
        loaders._state_dicts()  # torchdata's loader makes its iterator now, and draws no random number for it later
        return
    ahead = ranks[team.rank]["ahead"]
    if ahead is None:
        rank_zero_warn(
            "one batch of this epoch is left out: it was fetched when the checkpoint was saved, and not stored, since "
            "it does not consist of tensors and plain values; give the data set a length, or let it return those"
        )
    if not ahead:
        iter(fetcher)
        return
    fetches, fetcher.prefetch_batches = fetcher.prefetch_batches, 0
    iter(fetcher)
    fetcher.prefetch_batches, fetcher.batches = fetches, list(ahead)
