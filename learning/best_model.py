"""What `train` does by default with a model that is the best so far: it writes `model.pth`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from evaluation import (
    Evaluation,
    choose_thresholds,
    fit_calibration,
    group_by_malignancy,
    screening_scores,
)
from learning.checkpoints import Batches
from models import ModelInfo

# Takes the model, its evaluation on the validation images and the metrics of that.
OnBest = Callable[[nn.Module, Evaluation, dict[str, Any]], None]


def model_writer(
    folder: Path,
    valid_loader: Batches,
    class_names: Sequence[str],
    malignant_classes: Sequence[str],
    *,
    priors_shifted: bool,
    precision: str,
) -> OnBest:
    """Returns a function that writes `model.pth`, with all that is needed to use the model.

    The evaluation gives the calibration, and the thresholds for what is screened for.
    `priors_shifted` is whether training saw the classes in other proportions than there are.
    Raises ValueError for a malignant class that is not among the classes.
    """
    counted = group_by_malignancy(class_names, malignant_classes)
    dataset = getattr(valid_loader, "dataset", None)

    def write(model: nn.Module, evaluation: Evaluation, metrics: dict[str, Any]) -> None:
        y_true, y_prob = evaluation.labels, evaluation.probabilities
        calibration = fit_calibration(y_true, y_prob, priors_shifted=priors_shifted)
        scores = screening_scores(
            y_true, calibration.apply(y_prob), class_names, counted["malignant"], counted["unknown"]
        )
        config = getattr(model, "config", None)
        config = config if isinstance(config, dict) else {}
        info = ModelInfo(
            config=config,
            classes=list(class_names),
            image_size=getattr(dataset, "image_size", config.get("image_size", 0)),
            preprocessors=getattr(dataset, "preprocessors", ""),
            precision=precision,
            metrics=metrics,
            temperature=calibration.temperature,
            bias=list(calibration.bias),
            thresholds={name: choose_thresholds(*scores[name]) for name in scores},
            malignant_classes=counted["malignant"],
            unknown_classes=counted["unknown"],
        )
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        info.save(folder / "model.pth", weights)

    return write
