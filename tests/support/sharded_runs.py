"""Models that two ranks shard with FSDP2, and the same run on one rank; both see the same rows in each step."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, Dataset

from lightning_compress import before_sharding

COLUMNS = [f"self_attn.{name}_proj" for name in "qkv"] + ["mlp.gate_proj", "mlp.up_proj"]
ROWS_OF = ["self_attn.o_proj", "mlp.down_proj"]
STEPS, ROWS, TOKENS, VOCABULARY = 20, 4, 16, 64


@contextmanager
def group_of_one() -> Iterator[None]:
    """A process group of this process alone: parameters become DTensors whose shards hold all values."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def llama(layers: int = 2, hidden: int = 32) -> nn.Module:
    """A small Llama with equal weights on every rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=TOKENS,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


class Tokens(Dataset[dict[str, torch.Tensor]]):
    """Batch after batch of token ids; a rank gets every ``ranks``-th row of each."""

    def __init__(self, rank: int, ranks: int, batches: int = STEPS):
        self.rank, self.ranks, self.batches = rank, ranks, batches

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index >= self.batches:
            raise IndexError(index)
        rows = torch.randint(0, VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(index))
        return {"input_ids": rows[self.rank :: self.ranks]}


class Language(LightningModule):
    """A causal language model, built in configure_model and sharded there where there are ranks."""

    def __init__(self, announces: bool = True, layers: int = 2, hidden: int = 32):
        super().__init__()
        self.model: nn.Module | None = None
        self.announces, self.layers, self.hidden = announces, layers, hidden
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if self.model is not None:
            return
        self.model = llama(self.layers, self.hidden)
        if self.announces:
            before_sharding(self)
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh, columns = self.device_mesh["data_parallel"], self.device_mesh["tensor_parallel"]
            for block in self.model.model.layers if columns.size() > 1 else ():
                split = dict.fromkeys(COLUMNS, ColwiseParallel()) | dict.fromkeys(ROWS_OF, RowwiseParallel())
                parallelize_module(block, columns, split)
            for block in self.model.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch, labels=batch["input_ids"]).loss
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.model(**batch, labels=batch["input_ids"]).loss, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def _loader(self, batches: int) -> DataLoader[dict[str, torch.Tensor]]:
        share = {"num_replicas": 1, "rank": 0}  # ranks that share a row of the mesh see the same rows
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            share = self.trainer.strategy.distributed_sampler_kwargs
        return DataLoader(Tokens(share["rank"], share["num_replicas"], batches), batch_size=None)

    def train_dataloader(self) -> DataLoader[dict[str, torch.Tensor]]:
        return self._loader(STEPS)

    def val_dataloader(self) -> DataLoader[dict[str, torch.Tensor]]:
        return self._loader(2)

    def calibration_dataloader(self) -> DataLoader[dict[str, torch.Tensor]]:
        return DataLoader(Tokens(0, 1, 4), batch_size=None)  # the same on every rank


class Losses(Callback):
    """The mean loss of each step over ranks."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, *args: object) -> None:
        loss = outputs["loss"].detach().clone()
        self.values.append(float(trainer.strategy.reduce(loss, reduce_op="mean")))


def trainer(folder, *callbacks: Callback, ranks: int = 1, columns: int = 1, **arguments) -> Trainer:
    """A quiet Trainer on the CPU; ``columns`` ranks share each layer (tensor parallelism)."""
    defaults = {"max_epochs": 1, "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    parallel = {
        "strategy": ModelParallelStrategy(data_parallel_size=ranks // columns, tensor_parallel_size=columns),
        "devices": ranks,
    }
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=list(callbacks),
        use_distributed_sampler=False,
        enable_checkpointing=any(type(callback).__name__ == "ModelCheckpoint" for callback in callbacks),
        **defaults | ({"devices": 1} if ranks == 1 else parallel) | arguments,
    )
