"""A Trainer that says nothing: the examples print their own numbers."""

import lightning


def quiet_trainer(
    folder: str, *callbacks: lightning.Callback, epochs: int | None = None, steps: int = -1, validate: bool = True
) -> lightning.Trainer:
    """On the CPU, without a logger or checkpoints.

    Args:
        folder: Where compression leaves the model and its report.
        callbacks: Of the Trainer.
        epochs: How long to train, or
        steps: how long in optimizer steps.
        validate: Whether to validate while training.
    """
    return lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        max_steps=steps,
        callbacks=list(callbacks),
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=None if validate else 0,
    )
