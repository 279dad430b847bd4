"""A small convolutional network for images of a few pixels, where the model zoo has nothing small enough."""

from __future__ import annotations

from torch import Tensor, nn

from everbatch.errors import check

__all__ = ["SmallConv"]


class SmallConv(nn.Module):
    """Two 3x3 convolutions with ReLU, 2x2 max-pooling, a hidden layer, a linear head.

    Args:
        in_chans: channels of the images.
        num_classes: width of the head.
        image_size: side of the images in pixels, >= 4.
        width: channels of the first convolution; the second has twice as many.
    """

    def __init__(self, in_chans: int, num_classes: int, image_size: int, width: int = 32) -> None:
        super().__init__()
        check(image_size >= 4, "SmallConv", f"image_size={image_size}", "be at least 4")
        self.features = nn.Sequential(
            nn.Conv2d(in_chans, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2 * width * (image_size // 2) ** 2, 4 * width), nn.ReLU(),
        )
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_chans, image_size, image_size) to logits (n, num_classes)."""
        return self.head(self.features(x))  # type: ignore[no-any-return]
