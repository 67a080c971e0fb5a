"""Generated noisy images of eight shapes for the examples; nothing is downloaded."""

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

SIZE = 16
CLASSES = 8
Loader = DataLoader[tuple[Tensor, ...]]


class Shapes(lightning.LightningDataModule):
    """Discs, rings, squares, frames, crosses and bars of random place, size and brightness, in noise.

    Args:
        train_images: Number of training images.
        val_images: Number of validation images.
        batch_size: Images per batch.
        noise: Standard deviation of the noise; a shape is 0.5 to 1 brighter than its background.
    """

    def __init__(
        self, train_images: int = 4000, val_images: int = 2000, batch_size: int = 64, noise: float = 0.3
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.train_set = TensorDataset(*draw(train_images, noise, seed=0))
        self.val_set = TensorDataset(*draw(val_images, noise, seed=1))

    def train_dataloader(self) -> Loader:
        return DataLoader(self.train_set, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> Loader:
        return DataLoader(self.val_set, 500)


def draw(count: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Images, float32 [count, 1, 16, 16], and their classes, int64 [count], equally many of each class."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, generator=generator)

    place = torch.arange(SIZE) - (SIZE - 1) / 2
    y, x = place[:, None] - uniform(-3, 3), place[None, :] - uniform(-3, 3)
    radius, width = uniform(3.0, 5.5), 1.2
    round_, square = (x.square() + y.square()).sqrt(), torch.maximum(x.abs(), y.abs())
    inside = square <= radius
    shapes = torch.stack(
        [
            round_ <= radius,
            (round_ - radius).abs() <= width,
            inside,
            (square - radius).abs() <= width,
            inside & (torch.minimum(x.abs(), y.abs()) <= width),
            inside & ((x.abs() - y.abs()).abs() <= width),
            inside & (torch.remainder(y, 4) < 2),
            inside & (torch.remainder(x, 4) < 2),
        ]
    )
    labels = torch.arange(count) % CLASSES
    drawn = shapes[labels, torch.arange(count)] * uniform(0.5, 1.0)
    images = drawn + noise * torch.randn(drawn.shape, generator=generator)
    return images[:, None], labels
