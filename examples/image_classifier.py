"""A small convolutional network as a LightningModule, and its accuracy."""

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvNet(nn.Module):
    """Three convolutions with BatchNorm and one linear layer; images [B, 1, H, W] to logits [B, classes].

    Args:
        width: Channels of the first convolution; the others have twice and four times as many.
        classes: Number of classes.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.stage1 = stage(1, width)
        self.stage2 = stage(width, 2 * width)
        self.stage3 = stage(2 * width, 4 * width)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stage3(self.stage2(self.stage1(images)))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


def stage(inputs: int, outputs: int) -> nn.Sequential:
    """A convolution that halves height and width."""
    convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class ImageClassifier(lightning.LightningModule):
    """Trains and measures a classifier; logs ``val/accuracy`` in per cent.

    Args:
        model: Images to logits.
        lr: Peak learning rate of AdamW; it decays to zero by a cosine.
    """

    def __init__(self, model: nn.Module, lr: float = 3e-3) -> None:
        super().__init__()
        self.model = model
        self.lr = lr

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        right = (self(images).argmax(1) == labels).float().mean()
        self.log("val/accuracy", 100 * right, batch_size=len(labels), prog_bar=True)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
