"""Knowledge distillation: a feeder that trains a classifier on the logits of a teacher and on the labels.

Source: Hinton et al. 2015, https://arxiv.org/abs/1503.02531.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runner.examples.digits import DigitsNet


class Distillation:
    """Trains a student on the teacher's probabilities of all classes, and on the labels.

    An evaluation measures the student alone: it needs no teacher, and its loss is that of `DigitsNet`.

    Args:
        temperature: divides the logits of both; above 1, the teacher's unlikely classes count for more.
        weight: share of the teacher in the loss, 0 to 1; with 0 the student is trained alone.
        teacher: name of the teacher's engine.
    """

    def __init__(self, temperature: float = 4.0, weight: float = 0.9, teacher: str = "teacher") -> None:
        if not temperature > 0 or not 0 <= weight <= 1:
            raise ValueError(
                f"Distillation: temperature is above 0 and weight from 0 to 1, not {temperature} and {weight}"
            )
        self.temperature = temperature
        self.weight = weight
        self.teacher = teacher

    def __call__(
        self, student: DigitsNet, batch: Mapping[str, Tensor], engines: Mapping[str, nn.Module]
    ) -> dict[str, Tensor]:
        """Returns `loss`, the mean over the batch, and the student's `accuracy`, 0 to 1."""
        image, label = batch["image"], batch["label"]
        logits = student.logits(image)
        accuracy = (logits.argmax(1) == label).float().mean()
        loss = F.cross_entropy(logits, label)
        if student.training and self.weight:
            loss = (1 - self.weight) * loss + self.weight * self._distance(logits, engines[self.teacher], image)
        return {"loss": loss, "accuracy": accuracy}

    def _distance(self, logits: Tensor, teacher: nn.Module, image: Tensor) -> Tensor:
        """Returns the divergence from the teacher's probabilities in nats, times the squared temperature.

        The factor keeps the gradients of the order of those of the labels' loss.
        """
        assert isinstance(teacher, DigitsNet)
        with torch.no_grad():
            target = teacher.logits(image)
        one, other = (values.div(self.temperature).log_softmax(1) for values in (logits, target))
        return F.kl_div(one, other, reduction="batchmean", log_target=True) * self.temperature**2
