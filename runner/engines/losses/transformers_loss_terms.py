"""Counts the terms in the loss of a transformers model called with `labels`.

The module never imports transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

# Loss functions: in the first, position n predicts label n + 1; in the second, label n.
_CAUSAL_LOSS, _MASKED_LOSS = "ForCausalLMLoss", "ForMaskedLMLoss"


class TermCounter:
    """Counts the labels in the mean of a model's own loss, at each call.

    The count is right whichever labels a model derives from its arguments. A model that computes its loss in another
    way is not counted.
    """

    def __init__(self) -> None:
        self._terms: Tensor | None = None
        self._num_calls = 0

    def attach(self, model: Any, loss_function: Callable[..., Tensor]) -> None:
        """Wraps a model's loss function to count its terms."""
        is_causal = loss_function.__name__ == _CAUSAL_LOSS

        def counted(
            logits: Any, labels: Any, vocab_size: Any, num_items_in_batch: Any = None, ignore_index: int = -100,
            **settings: Any,
        ) -> Tensor:  # fmt: skip
            targets = settings.get("shift_labels") if is_causal else labels
            if targets is None:
                targets = labels[..., 1:]
            self._num_calls += 1
            # If the caller passes a number of items, the loss is not a mean over these labels.
            self._terms = (targets != ignore_index).sum() if num_items_in_batch is None else None
            return loss_function(logits, labels, vocab_size, num_items_in_batch, ignore_index, **settings)

        counted.counter = self  # type: ignore[attr-defined]
        model.loss_function = counted

    def take(self) -> Tensor | None:
        """Returns the number of terms (0-d) of the loss since the last call.

        None if there was not exactly one.
        """
        terms, num_calls = self._terms, self._num_calls
        self._terms, self._num_calls = None, 0
        return terms if num_calls == 1 else None


def count_terms(module: nn.Module) -> TermCounter | None:
    """Attaches a counter to the transformers models in a module.

    Returns None if there are none.
    """
    models, losses = sys.modules.get("transformers.modeling_utils"), sys.modules.get("transformers.loss.loss_utils")
    if models is None or losses is None:
        return None
    counter: TermCounter | None = None
    for model in module.modules():
        if not isinstance(model, models.PreTrainedModel) or not hasattr(type(model), "loss_function"):
            continue
        # Set already: by the counter of another engine, or by the user.
        if (loss_function := vars(model).get("_loss_function")) is not None:
            counter = counter or getattr(loss_function, "counter", None)
            continue
        # The function that transformers itself would choose.
        loss_function = losses.LOSS_MAPPING.get(getattr(model, "loss_type", None), losses.ForCausalLMLoss)
        is_settable = type(model).loss_function.fset is not None
        if getattr(loss_function, "__name__", None) in (_CAUSAL_LOSS, _MASKED_LOSS) and is_settable:
            counter = counter or TermCounter()
            counter.attach(model, loss_function)
    return counter


def is_model_output(output: Any) -> bool:
    """Returns whether an output is an instance of a class that transformers defines."""
    return any(base.__module__.startswith("transformers.") for base in type(output).__mro__)
