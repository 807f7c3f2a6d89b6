"""The number of terms in the loss of a transformers model that was given `labels`. Imports no transformers itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

_SHIFTED, _PLAIN = "ForCausalLMLoss", "ForMaskedLMLoss"  # position n predicts label n + 1, or its own


class Counter:
    """Counts the labels that models' own loss functions are means over, as they are called.

    So the count is right whichever labels a model makes of its arguments. A model that computes its loss in another way
    is not counted.
    """

    def __init__(self) -> None:
        self._terms: Tensor | None = None
        self._num_calls = 0

    def attach(self, model: Any, loss_function: Callable[..., Tensor]) -> None:
        """Has the calls of a model's loss function counted."""
        is_shifted = loss_function.__name__ == _SHIFTED

        def counted(
            logits: Any, labels: Any, vocab_size: Any, num_items_in_batch: Any = None, ignore_index: int = -100,
            **settings: Any,
        ) -> Tensor:  # fmt: skip
            targets = settings.get("shift_labels") if is_shifted else labels
            if targets is None:
                targets = labels[..., 1:]
            self._num_calls += 1
            # With a number of items of the caller's own it is no mean over these labels.
            self._terms = (targets != ignore_index).sum() if num_items_in_batch is None else None
            return loss_function(logits, labels, vocab_size, num_items_in_batch, ignore_index, **settings)

        counted.counter = self  # type: ignore[attr-defined]
        model.loss_function = counted

    def take(self) -> Tensor | None:
        """Returns the number of terms (0-d) of the one loss that was computed since the last call."""
        terms, num_calls = self._terms, self._num_calls
        self._terms, self._num_calls = None, 0
        return terms if num_calls == 1 else None


def count_terms(module: nn.Module) -> Counter | None:
    """Has the terms of the loss of transformers models counted; None where a module holds none of them."""
    models, losses = sys.modules.get("transformers.modeling_utils"), sys.modules.get("transformers.loss.loss_utils")
    if models is None or losses is None:
        return None
    counter: Counter | None = None
    for model in module.modules():
        if not isinstance(model, models.PreTrainedModel) or not hasattr(type(model), "loss_function"):
            continue
        if (given := vars(model).get("_loss_function")) is not None:  # another engine's, or the user's own
            counter = counter or getattr(given, "counter", None)
            continue
        # What transformers itself would take.
        found = losses.LOSS_MAPPING.get(getattr(model, "loss_type", None), losses.ForCausalLMLoss)
        if getattr(found, "__name__", None) in (_SHIFTED, _PLAIN) and type(model).loss_function.fset is not None:
            counter = counter or Counter()
            counter.attach(model, found)
    return counter


def is_model_output(output: Any) -> bool:
    """Says whether an output is of a class that transformers defines, or derives from one."""
    return any(each.__module__.startswith("transformers.") for each in type(output).__mro__)
