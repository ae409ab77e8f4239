"""What a run left in its folder, read for its report: models, settings, splits, audit."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from evaluation import best_evaluation, counted_as
from imaging.audit import KINDS, MIN_DISTINCT_IMAGES, unavoidable_errors
from imaging.lesions import is_melanoma
from storage.files import read_csv, split_names

MIN_SHORTCUT_AUC = 0.75  # ROC AUC of a column alone that a reader should hear of at once


class Model:
    """What a model left in its folder; empty or None where it is not there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics = {"model": folder.name} | _read_json(folder / "metrics.json")
        self.name: str = self.metrics["model"]
        self.gap: Mapping[str, float] = {}  # its row of comparison.csv
        self.test: dict[str, Any] = self.metrics.get("test", {})
        self.intervals: dict[str, Any] = self.metrics.get("test_intervals", {})
        self.classes: list[str] = self.metrics.get("classes", [])
        self.per_class: dict[str, dict[str, Any]] = self.test.get("per_class") or {}
        self.subgroups: dict[str, Any] = self.metrics.get("subgroups", {})
        self.supports = {name: found.get("support", 0) for name, found in self.per_class.items()}
        self.num_images = sum(self.supports.values())
        self.melanomas = [name for name in self.classes if is_melanoma(name)]

    @property
    def gap_interval(self) -> tuple[float, float] | None:
        """The interval of how far the model is behind the best one."""
        names = ("gap_to_best_low", "gap_to_best_high")
        return (self.gap[names[0]], self.gap[names[1]]) if set(names) <= set(self.gap) else None

    @property
    def small_classes(self) -> list[str]:
        """The classes with too few test images, and how many they have."""
        few = [(name, n) for name, n in self.supports.items() if n < MIN_DISTINCT_IMAGES]
        return [f"{name} ({n})" for name, n in few]

    @property
    def shortcuts(self) -> list[tuple[str, str, float]]:
        """Columns that tell a screening target by themselves: column, target, ROC AUC."""
        areas = [
            (column, target, within["roc_auc_of_column"])
            for column, found in self.subgroups.items()
            for target, within in found.get("screening", {}).items()
        ]
        return [found for found in areas if found[2] >= MIN_SHORTCUT_AUC]

    @property
    def counted_as(self) -> dict[str, list[str]]:
        """Which classes count as malignant and which as benign."""
        return self.metrics.get("counted_as") or counted_as(self.classes)

    @property
    def best_step(self) -> dict[str, float] | None:
        """The best evaluation on the validation images, and the last step."""
        history = _read_numbers(self.folder / "history.csv")
        if not {"step", "valid_balanced_accuracy", "valid_loss"} <= set(history):
            return None
        number = best_evaluation(history.to_dict("list"))
        if number is None:
            return None
        best = history.iloc[number]
        accuracy = best["valid_balanced_accuracy"]
        return {"accuracy": accuracy, "step": best["step"], "last": history["step"].max()}


@dataclass(frozen=True)
class Run:
    """What a run left in its folder; empty or None where it is not there."""

    folder: Path
    models: Sequence[Model]  # the best first
    others: Sequence[str]  # models in the folder that were not compared with these
    config: Mapping[str, Any]
    splits: pd.DataFrame
    findings: pd.DataFrame | None

    @property
    def equals_of_best(self) -> list[str] | None:
        """The models that the test images do not tell from the best; None where not measured."""
        intervals = {model.name: model.gap_interval for model in self.models[1:]}
        if not intervals or None in intervals.values():
            return None
        return [name for name, ends in intervals.items() if ends and ends[0] <= 0]

    @property
    def num_test_groups(self) -> int:
        """The number of groups of images that belong together in the test split."""
        if not {"split", "group"} <= set(self.splits):
            return 0
        return self.splits.loc[self.splits["split"] == "test", "group"].nunique()

    @property
    def num_divided_groups(self) -> int | None:
        """The number of groups that are in several splits; None where there is one split."""
        if not {"split", "group"} <= set(self.splits) or self.splits["split"].nunique() < 2:
            return None
        return int((self.splits.groupby("group")["split"].nunique() > 1).sum())

    @property
    def num_unavoidable_errors(self) -> int:
        """The number of test images that any model calls wrong, as equal files differ in class."""
        if not {"split", "class", "content_hash"} <= set(self.splits):
            return 0
        return unavoidable_errors(self.splits[self.splits["split"] == "test"])

    @cached_property
    def class_counts(self) -> pd.DataFrame:
        """The number of images of each class, a row, in each split, a column."""
        if not {"class", "split"} <= set(self.splits):
            return pd.DataFrame()
        counts = pd.crosstab(self.splits["class"], self.splits["split"])
        order = ["train", "valid", "test"]
        return counts[sorted(counts, key=lambda name: order.index(name) if name in order else 3)]

    def num_found(self, kind: str) -> int:
        """Returns the number of findings of one kind in the audit."""
        return 0 if self.findings is None else int((self.findings["kind"] == kind).sum())


def read_run(folder: Path) -> Run:
    """Reads the files of a run.

    Its models are those in `comparison.csv`, or without that all that have a `metrics.json`. Raises
    ValueError when no model has one, or a file cannot be understood.
    """
    found = [Model(path.parent) for path in sorted(folder.glob("*/metrics.json"))]
    if not found:
        raise ValueError(f"{folder}: no model in it has a metrics.json; train one first")
    rows = {
        row["model"]: row for row in _read_numbers(folder / "comparison.csv").to_dict("records")
    }
    for model in found:
        # Runs of earlier versions call the gap `behind_best`.
        row = rows.get(model.name, {})
        model.gap = {str(n).replace("behind_best", "gap_to_best"): row[n] for n in row}
    compared = [model for model in found if model.name in rows] or found
    audit = folder / "audit.csv"
    return Run(
        folder=folder,
        models=sorted(compared, key=lambda model: -(model.test.get("balanced_accuracy") or 0)),
        others=[model.name for model in found if model not in compared],
        config=_read_json(folder / "config.json"),
        splits=_read_table(folder / "splits.csv"),
        findings=read_findings(audit) if audit.exists() else None,
    )


def read_findings(path: Path) -> pd.DataFrame:
    """Reads the findings of an audit from `audit.csv`."""
    table = _read_table(path)
    table["kind"] = pd.Categorical(table["kind"], categories=list(KINDS))
    for name in ("images", "classes"):
        table[name] = table[name].map(split_names)
    return table


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{path}: not a JSON object")
    return contents


def _read_table(path: Path) -> pd.DataFrame:
    return read_csv(path) if path.exists() else pd.DataFrame()


def _read_numbers(path: Path) -> pd.DataFrame:
    """Reads a table of which all columns but `model` are numbers."""
    table = _read_table(path)
    numbers = table.columns.drop("model", errors="ignore")
    try:
        return table.assign(**{name: pd.to_numeric(table[name]) for name in numbers})
    except ValueError as error:
        raise ValueError(f"{path}: not a table of numbers ({error})") from error
