"""Losses by name."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

# Float32 logits (B, C) and labels, int64 (B,) or float (B, C), to the mean loss.
Criterion = Callable[[Tensor, Tensor], Tensor]

# Each entry makes a loss of the class weights, float32 (C,), or None where there are none.
LOSSES: dict[str, Callable[[Tensor | None], Criterion]] = {
    "cross_entropy": lambda class_weights: nn.CrossEntropyLoss(weight=class_weights),
}


def make_criterion(
    criterion: str | Criterion,
    num_classes: int,
    class_weights: Sequence[float] | None,
    device: torch.device,
) -> Criterion:
    """Returns the loss of this name, one of `LOSSES`, on the device; a callable as it is.

    Raises ValueError for an unknown name, for class weights that are not `num_classes` numbers
    above 0, and for class weights beside a callable.
    """
    weights = None
    if class_weights is not None:
        weights = torch.as_tensor(class_weights, dtype=torch.float32, device=device)
        if weights.shape != (num_classes,) or not (weights.isfinite() & (weights > 0)).all():
            raise ValueError(f"class_weights must be {num_classes} numbers greater than 0")
    if callable(criterion):
        if weights is not None:
            raise ValueError("class_weights cannot be used with a criterion that is a function")
        return criterion.to(device) if isinstance(criterion, nn.Module) else criterion
    if criterion not in LOSSES:
        raise ValueError(f"unknown criterion {criterion!r}; the losses are {', '.join(LOSSES)}")
    return LOSSES[criterion](weights)


def describe_criterion(criterion: str | Criterion) -> str | None:
    """Returns the name of a loss for a checkpoint, None for the default one."""
    if isinstance(criterion, str):
        return None if criterion == "cross_entropy" else criterion
    is_module = isinstance(criterion, nn.Module)
    return repr(criterion) if is_module else getattr(criterion, "__qualname__", "a function")
