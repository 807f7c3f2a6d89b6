"""Owns the handwritten digits: data, a small net and a figure of its mistakes.

Imports torch only; scikit-learn and matplotlib, both extras, where they are used.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPLITS = ("train", "validation")
SIZE = 8
NUM_CLASSES = 10
BRIGHTEST = 16.0


class Digits(Dataset[dict[str, Tensor]]):
    """scikit-learn's 1,797 handwritten digits, 8 by 8 pixels.

    The validation split is every `validation_every`-th sample of those sorted by label, so each digit has the
    same share in both splits, and a sample's split never changes.

    Args:
        split: "train" or "validation".
        validation_every: one sample in so many goes to validation, at least 2.
        augment: shift each image by up to a pixel each way, drawn from torch's global generator.

    Raises:
        ValueError: an argument is out of range.
        ImportError: scikit-learn is not installed.
    """

    def __init__(self, split: str = "train", validation_every: int = 5, augment: bool = False) -> None:
        if split not in SPLITS:
            raise ValueError(f"Digits: split is one of {', '.join(SPLITS)}, not {split!r}")
        if validation_every < 2:
            raise ValueError(f"Digits: validation_every is at least 2, not {validation_every}")
        pixels, labels = require("sklearn.datasets").load_digits(return_X_y=True)
        all_labels = torch.as_tensor(labels, dtype=torch.int64)
        held_out = torch.zeros(len(all_labels), dtype=torch.bool)
        held_out[all_labels.argsort(stable=True)[::validation_every]] = True
        chosen = held_out if split == "validation" else ~held_out
        self.augment = augment
        self.indices = chosen.nonzero().flatten()
        self.labels = all_labels[chosen]
        images = torch.as_tensor(pixels, dtype=torch.float32)[chosen] / BRIGHTEST
        self.images = images.view(-1, 1, SIZE, SIZE)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One sample: `image`, float32 [1, 8, 8] from 0 to 1, and `label`, int64 []."""
        image = self.images[index]
        if self.augment:
            image = shift_by_a_pixel(image)
        return {"image": image, "label": self.labels[index]}


def shift_by_a_pixel(image: Tensor) -> Tensor:
    """`image` [1, height, width] moved by -1, 0 or 1 pixel each way, black where nothing moved in."""
    down, right = torch.randint(3, (2,)).tolist()
    height, width = image.shape[-2:]
    return F.pad(image, (1, 1, 1, 1))[:, down : down + height, right : right + width]


class DigitsNet(nn.Module):
    """Three convolutions and a linear classifier, for 8 by 8 images.

    Args:
        width: channels of the first convolution; the later ones have twice as many.
        dropout: share of the classifier's inputs that training drops, 0 to 1.
    """

    def __init__(self, width: int = 32, dropout: float = 0.2) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * width * (SIZE // 4) ** 2, NUM_CLASSES)

    def forward(self, image: Tensor, label: Tensor) -> dict[str, Tensor]:
        """`loss` in nats and `accuracy`, 0 to 1, for `image` [batch, 1, 8, 8] and `label` [batch]."""
        logits = self.logits(image)
        accuracy = (logits.argmax(1) == label).float().mean()
        return {"loss": F.cross_entropy(logits, label), "accuracy": accuracy}

    def logits(self, image: Tensor) -> Tensor:
        """Scores of each digit: [batch, 1, 8, 8] to float32 [batch, 10]."""
        logits: Tensor = self.head(self.dropout(self.features(image)))
        return logits.float()


class HardestMistakes:
    """A report with a figure of the samples that the model reads worst, the wrong ones first.

    Args:
        count: samples to show.
        columns: samples in a row.
    """

    def __init__(self, count: int = 16, columns: int = 8) -> None:
        if min(count, columns) < 1:
            raise ValueError(f"HardestMistakes: count and columns are at least 1, not {count}, {columns}")
        require("matplotlib", find_only=True)
        self.count = count
        self.columns = columns

    def __call__(self, module: DigitsNet, dataset: Digits) -> dict[str, Any]:
        """`num_mistakes`, a float, and `hardest_mistakes`, a matplotlib figure.

        Raises:
            ImportError: matplotlib is not installed.
        """
        samples = [dataset[index] for index in range(len(dataset))]
        images = torch.stack([sample["image"] for sample in samples])
        labels = torch.stack([sample["label"] for sample in samples])
        device = next(module.parameters()).device
        chances = module.logits(images.to(device)).softmax(1).cpu()
        order = margins(chances, labels).argsort(stable=True)[: self.count]
        num_mistakes = float((chances.argmax(1) != labels).sum())
        figure = draw(images[order], labels[order], chances[order], self.columns)
        return {"num_mistakes": num_mistakes, "hardest_mistakes": figure}


def margins(chances: Tensor, labels: Tensor) -> Tensor:
    """Chance of the true label less that of the likeliest other, below 0 where the model is wrong: [samples]."""
    true = chances.gather(1, labels[:, None]).squeeze(1)
    others = chances.scatter(1, labels[:, None], -1.0)
    return true - others.amax(1)


def draw(images: Tensor, labels: Tensor, chances: Tensor, columns: int) -> Figure:
    """A grid of `images` [samples, 1, height, width], each titled with its true label and the model's reading."""
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    size = (1.3 * columns, 1.65 * rows)
    figure: Figure = require("matplotlib.figure").Figure(figsize=size, dpi=120, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.axis("off")
    for axis, image, label, chance in zip(axes, images, labels.tolist(), chances, strict=False):
        guess = int(chance.argmax())
        color = "black" if guess == label else "crimson"
        axis.imshow(image[0].numpy(), cmap="gray_r", vmin=0, vmax=1)
        axis.set_title(f"{label}, read as {guess}\n{chance[guess]:.0%} sure", fontsize=8, color=color)
    return figure


def require(name: str, find_only: bool = False) -> Any:
    """The module `name`; with `find_only`, it is looked for and not imported.

    Raises:
        ImportError: it is not installed; the message names the extra that brings it.
    """
    try:
        if find_only and importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(name)
        return None if find_only else importlib.import_module(name)
    except (ModuleNotFoundError, ValueError) as error:
        raise ImportError(
            f"the digits example needs {name.partition('.')[0]}, which is not installed: "
            'pip install "exact-runner[digits]"'
        ) from error
