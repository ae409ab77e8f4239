"""The stages of a run, and how much work each is, for an estimate of the time left."""

import contextlib
import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from augmentation import NUM_TURNS
from dataset import LesionLoader
from experiment.settings import Settings
from learning.features import are_cacheable
from models import get_model
from storage.progress import Stage

CACHED, LIVE = "cached", "live"  # features of a frozen backbone: computed once, or at each step
# Seconds per unit of work of a kind before a stage of it has been measured.
GUESSES = {"figures": 10.0, "report": 10.0, "head": 0.002}


def make_stages(
    settings: Settings,
    is_finished: Mapping[str, bool],
    num_images: Mapping[str, int],
    num_processes: int = 1,
    features: Mapping[str, str] = MappingProxyType({}),
) -> list[Stage]:
    """Returns the stages of a run: three of each model that is not finished, and the report.

    `num_images` are those of each split, `features` as from `choose_features`; a model whose
    features are cached has a stage more. Training and evaluating are of one kind, and their work is
    in images through a model, weighted by its multiplications. That of a head on cached features is
    of another kind, in steps.
    """
    costs = _relative_costs([name for name in settings.models if not is_finished[name]], settings)
    stages = []
    images_per_step = settings.batch_size * settings.accumulate * num_processes
    num_evaluations = -(-settings.num_steps // settings.eval_every)
    for number, name in enumerate(settings.models, 1):
        if is_finished[name]:
            continue
        subject = f"{name} ({number} of {len(settings.models)})"
        # The backward pass takes twice the operations of the forward pass; a frozen backbone has
        # none.
        passes = 1 if name.endswith("_head") else 3
        training = passes * settings.num_steps * images_per_step
        training += num_evaluations * num_images["valid"]
        trained = [Stage(subject, "training", "model", costs[name] * training)]
        if features.get(name) == CACHED:
            passes = num_images["train"] * (NUM_TURNS if settings.augmentation else 1)
            computed = costs[name] * (passes + num_images["valid"])
            trained = [
                Stage(subject, "computing features", "model", computed),
                Stage(subject, "training", "head", settings.num_steps * settings.accumulate),
            ]
        stages += [
            *trained,
            Stage(subject, "evaluating", "model", costs[name] * num_images["test"]),
            Stage(subject, "metrics and figures", "figures"),
        ]
    return [*stages, Stage("", "comparison and report", "report")]


def choose_features(settings: Settings, loaders: Mapping[str, LesionLoader]) -> dict[str, str]:
    """Returns for each model with a frozen backbone whether its features are CACHED or LIVE.

    It is empty without --cached_features.
    """
    chosen = {}
    for name in settings.models if settings.cached_features else ():
        if name.endswith("_head"):
            with torch.device("meta"):
                size = {"layers": settings.layers, "image_size": settings.image_size}
                model = get_model(name, 2, weights=None, seed=0, **size)
            chosen[name] = CACHED if are_cacheable(model, loaders) else LIVE
    return chosen


def _relative_costs(names: Sequence[str], settings: Settings) -> dict[str, float]:
    """Returns by model how many times as much work an image is as for the others."""
    if len(names) < 2:
        return dict.fromkeys(names, 1.0)
    known = {}
    for name in names:
        # A backbone of the user's may do what needs real numbers, and counts as the mean of the
        # others then.
        with contextlib.suppress(NotImplementedError, RuntimeError):
            known[name] = float(count_operations(name, settings.layers, settings.image_size))
    mean = sum(known.values()) / len(known) if known else 1.0
    return {name: known.get(name, mean) for name in names}


@functools.cache
def count_operations(name: str, layers: int, image_size: int) -> int:
    """Returns the multiplications of one image in the convolutions and dense layers of a backbone.

    Nothing is computed: the model is built without memory for its weights.
    """
    total = 0

    def add(module: nn.Module, inputs: object, output: Tensor) -> None:
        nonlocal total
        weight = next(module.parameters())
        total += output.numel() * weight[0].numel()

    with torch.device("meta"):
        model = get_model(name, 2, layers=layers, weights=None, image_size=image_size, seed=0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(add)
    with torch.no_grad():
        model.eval().features(torch.empty(1, 3, image_size, image_size, device="meta"))
    return total
