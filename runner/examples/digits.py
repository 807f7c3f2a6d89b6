"""Handwritten digits: a dataset, a small CNN, and a report with a figure of its worst mistakes.

scikit-learn and matplotlib, both extras, are imported only where they are used.
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
MAX_PIXEL = 16.0


class Digits(Dataset[dict[str, Tensor]]):
    """scikit-learn's 1,797 handwritten digits, 8 by 8 pixels.

    The validation split is every `validation_every`-th sample in the order of their labels, so each digit has the
    same share in both splits, and a sample's split never changes.

    Args:
        split: "train" or "validation".
        validation_every: one sample out of `validation_every` is for validation, at least 2.
        augment: shifts each image by up to one pixel in each direction, drawn from torch's global generator.
        max_samples: takes the first samples of the split only; None takes all.

    Raises:
        ValueError: an argument is out of range.
        ImportError: scikit-learn is not installed.
    """

    def __init__(
        self, split: str = "train", validation_every: int = 5, augment: bool = False, max_samples: int | None = None
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"Digits: split is one of {', '.join(SPLITS)}, not {split!r}")
        if validation_every < 2:
            raise ValueError(f"Digits: validation_every is at least 2, not {validation_every}")
        if max_samples is not None and max_samples < 1:
            raise ValueError(f"Digits: max_samples is at least 1, not {max_samples}")
        pixels, labels = require("sklearn.datasets").load_digits(return_X_y=True)
        all_labels = torch.as_tensor(labels, dtype=torch.int64)
        is_validation = torch.zeros(len(all_labels), dtype=torch.bool)
        is_validation[all_labels.argsort(stable=True)[::validation_every]] = True
        is_in_split = is_validation if split == "validation" else ~is_validation
        self.augment = augment
        self.indices = is_in_split.nonzero().flatten()[:max_samples]
        self.labels = all_labels[self.indices]
        images = torch.as_tensor(pixels, dtype=torch.float32)[self.indices] / MAX_PIXEL
        self.images = images.view(-1, 1, SIZE, SIZE)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Returns one sample: `image`, float32 [1, 8, 8] from 0 to 1, and `label`, int64 []."""
        image = self.images[index]
        if self.augment:
            image = shift_by_a_pixel(image)
        return {"image": image, "label": self.labels[index]}


def shift_by_a_pixel(image: Tensor) -> Tensor:
    """Shifts `image` [1, height, width] by -1, 0 or 1 pixel in each direction; new pixels are 0."""
    down, right = torch.randint(3, (2,)).tolist()
    height, width = image.shape[-2:]
    return F.pad(image, (1, 1, 1, 1))[:, down : down + height, right : right + width]


class DigitsNet(nn.Module):
    """Three convolutions and a linear classifier, for 8 by 8 images.

    Args:
        width: channels of the first convolution; the later ones have twice as many.
        dropout: dropout probability of the classifier's inputs, 0 to 1.
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
        """Returns `loss` in nats and `accuracy`, 0 to 1, for `image` [batch, 1, 8, 8] and `label` [batch]."""
        logits = self.logits(image)
        accuracy = (logits.argmax(1) == label).float().mean()
        return {"loss": F.cross_entropy(logits, label), "accuracy": accuracy}

    def logits(self, image: Tensor) -> Tensor:
        """Returns the logits of the digits: [batch, 1, 8, 8] to float32 [batch, 10]."""
        return self.head(self.dropout(self.features(image))).float()


class HardestMistakes:
    """A report with a figure of the samples that the model classifies worst, wrong predictions first.

    Args:
        count: number of samples to show.
        columns: number of samples in a row.

    Raises:
        ValueError: an argument is below 1.
        ImportError: matplotlib is not installed.
    """

    def __init__(self, count: int = 16, columns: int = 8) -> None:
        if min(count, columns) < 1:
            raise ValueError(f"HardestMistakes: count and columns are at least 1, not {count}, {columns}")
        require("matplotlib", find_only=True)
        self.count = count
        self.columns = columns

    def __call__(self, module: DigitsNet, dataset: Digits) -> dict[str, Any]:
        """Returns `num_mistakes`, a float, and `hardest_mistakes`, a matplotlib figure.

        Raises:
            ImportError: matplotlib is not installed.
        """
        samples = [dataset[index] for index in range(len(dataset))]
        images = torch.stack([sample["image"] for sample in samples])
        labels = torch.stack([sample["label"] for sample in samples])
        device = next(module.parameters()).device
        probabilities = module.logits(images.to(device)).softmax(1).cpu()
        order = margins(probabilities, labels).argsort(stable=True)[: self.count]
        num_mistakes = float((probabilities.argmax(1) != labels).sum())
        figure = draw(images[order], labels[order], probabilities[order], self.columns)
        return {"num_mistakes": num_mistakes, "hardest_mistakes": figure}


def margins(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Returns each sample's margin: [samples, classes] and [samples] to [samples], from -1 to 1.

    The margin is the probability of the true label minus that of the most likely other label. It is negative for a
    wrong prediction.
    """
    true = probabilities.gather(1, labels[:, None]).squeeze(1)
    others = probabilities.scatter(1, labels[:, None], -1.0)
    return true - others.amax(1)


def draw(images: Tensor, labels: Tensor, probabilities: Tensor, columns: int) -> Figure:
    """Draws a grid of `images` [samples, 1, height, width], each titled with its label and the model's prediction."""
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    size = (1.3 * columns, 1.65 * rows)
    figure: Figure = require("matplotlib.figure").Figure(figsize=size, dpi=120, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.axis("off")
    for axis, image, label, distribution in zip(axes, images, labels.tolist(), probabilities, strict=False):
        prediction = int(distribution.argmax())
        color = "black" if prediction == label else "crimson"
        axis.imshow(image[0].numpy(), cmap="gray_r", vmin=0, vmax=1)
        title = f"{label}, read as {prediction}\n{distribution[prediction]:.0%} sure"
        axis.set_title(title, fontsize=8, color=color)
    return figure


def require(name: str, find_only: bool = False) -> Any:
    """Imports the module `name` and returns it; with `find_only`, only checks that it is installed.

    Raises:
        ImportError: the module is not installed; the message names the extra that installs it.
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
