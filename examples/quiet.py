"""A Trainer without output: the examples print their own results."""

import lightning


def quiet_trainer(
    folder: str, *callbacks: lightning.Callback, epochs: int | None = None, steps: int = -1, validate: bool = True
) -> lightning.Trainer:
    """On the CPU, without a logger or checkpoints.

    Args:
        folder: Folder for the compressed model and its report.
        callbacks: Callbacks of the Trainer.
        epochs: Number of epochs; None: see ``steps``.
        steps: Number of optimizer steps; -1: not limited.
        validate: Whether to validate during training.
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
