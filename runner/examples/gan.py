"""A GAN of handwritten digits: generator, discriminator, their feeders, and a report with sample images.

Source: the non-saturating loss of Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import Dataset

from runner.examples.digits import SIZE, require


class Generator(nn.Module):
    """Draws images from noise.

    Args:
        noise: numbers of noise per image.
        width: channels of the first convolution; the second has half as many. An even number.
    """

    def __init__(self, noise: int = 32, width: int = 64) -> None:
        super().__init__()
        self.noise = noise
        self.layers = nn.Sequential(
            nn.Linear(noise, width * 4),
            nn.Unflatten(1, (width, 2, 2)),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, width // 2, 4, stride=2, padding=1),
            nn.BatchNorm2d(width // 2),
            nn.ReLU(),
            nn.ConvTranspose2d(width // 2, 1, 4, stride=2, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, count: int) -> Tensor:
        """Returns images, float32 [count, 1, 8, 8] from 0 to 1, of noise from torch's global generator."""
        noise = torch.randn(count, self.noise)
        images: Tensor = self.layers(noise.to(next(self.parameters()).device))
        return images


class Discriminator(nn.Module):
    """Scores images: the log-odds that an image is real.

    Args:
        width: channels of the first convolution; the second has twice as many.
        dropout: dropout probability of the last layer's inputs, 0 to 1.
    """

    def __init__(self, width: int = 32, dropout: float = 0.3) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(2 * width * (SIZE // 4) ** 2, 1),
        )

    def forward(self, image: Tensor) -> Tensor:
        """Returns the scores of images: [batch, 1, 8, 8] to [batch]."""
        scores: Tensor = self.layers(image)
        return scores.flatten()


def feed_discriminator(
    discriminator: Discriminator, batch: Mapping[str, Tensor], engines: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """Returns the discriminator's loss on real and generated images, and its accuracy on each, 0 to 1."""
    with torch.no_grad():
        generated = engines["generator"](len(batch["image"]))
    real_scores, generated_scores = discriminator(batch["image"]), discriminator(generated)
    return {
        "loss": (softplus(-real_scores) + softplus(generated_scores)).mean(),
        "accuracy_real": (real_scores > 0).float().mean(),
        "accuracy_generated": (generated_scores <= 0).float().mean(),
    }


def feed_generator(
    generator: Generator, batch: Mapping[str, Tensor], engines: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """Returns the generator's loss: how far the discriminator is from taking its images for real ones."""
    scores = engines["discriminator"](generator(len(batch["image"])))
    return {"loss": softplus(-scores).mean()}


class GeneratedImages:
    """A report of the generator: a picture of its images, and their distance from the real ones.

    Args:
        rows: rows of images in the picture, each with as many images.
    Raises:
        ImportError: matplotlib is not installed.
    """

    def __init__(self, rows: int = 8) -> None:
        require("matplotlib", find_only=True)
        self.rows = rows

    def __call__(self, module: nn.Module, dataset: Dataset[dict[str, Tensor]]) -> dict[str, Any]:
        """Returns `samples`, a figure, and `frechet_distance`; nothing for the discriminator."""
        if not isinstance(module, Generator):
            return {}
        real = torch.stack([dataset[index]["image"] for index in range(len(dataset))])  # type: ignore[arg-type]
        generated = module(max(len(real), self.rows**2)).detach().cpu()
        return {
            "samples": draw(generated[: self.rows**2], self.rows),
            "frechet_distance": frechet_distance(real.flatten(1), generated[: len(real)].flatten(1)),
        }


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Returns the Fréchet distance of two sets of vectors, [count, size] each, taken as Gaussians.

    It is that of the FID, on pixels instead of a network's features. 0 if means and covariances are equal.
    """
    one, other = one.double(), other.double()
    covariance, other_covariance = one.T.cov(), other.T.cov()
    # The eigenvalues of the product of two covariances are those of a symmetric matrix: real, and 0 or more.
    root = _symmetric_root(covariance)
    eigenvalues = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp(min=0)
    distance = (one.mean(0) - other.mean(0)).square().sum() + covariance.trace() + other_covariance.trace()
    return float(distance - 2 * eigenvalues.sqrt().sum())


def _symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def draw(images: Tensor, columns: int) -> Any:
    """Draws `images` [count, 1, height, width] as a grid in a matplotlib figure."""
    rows = -(-len(images) // columns)
    figure = require("matplotlib.figure").Figure(figsize=(0.6 * columns, 0.6 * rows), dpi=120, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, image in zip(axes, images, strict=False):
        axis.imshow(image[0].numpy(), cmap="gray_r", vmin=0, vmax=1)
    for axis in figure.axes:
        axis.axis("off")
    return figure
