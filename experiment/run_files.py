"""Reads the files of a run, those of earlier versions too."""

import json
import shlex
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evaluation import best_evaluation, group_by_malignancy
from experiment.run_folder import TRAINING_PRECISION
from imaging.audit import KINDS, MIN_DISTINCT_IMAGES, unavoidable_errors
from imaging.lesions import is_melanoma
from storage.files import read_csv, split_names

MIN_SHORTCUT_AUC = 0.75  # ROC AUC of a column alone from which the report warns of it


class Model:
    """The files of one model; empty or None for those that are missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics = {"model": folder.name} | _read_json(folder / "metrics.json")
        self.name: str = self.metrics["model"]
        self.gap: Mapping[str, float] = {}  # its row of comparison.csv
        self.settings: Mapping[str, Any] = {}  # with which it was trained
        self.test: dict[str, Any] = self.metrics.get("test", {})
        self.intervals: dict[str, Any] = self.metrics.get("test_intervals", {})
        self.classes: list[str] = self.metrics.get("classes", [])
        self.per_class: dict[str, dict[str, Any]] = self.test.get("per_class") or {}
        self.subgroups: dict[str, Any] = self.metrics.get("subgroups", {})
        self.supports = {name: found.get("support", 0) for name, found in self.per_class.items()}
        self.num_images = sum(self.supports.values())
        self.melanomas = [name for name in self.classes if is_melanoma(name)]

    @property
    def label(self) -> str:
        """The name, with a note where it promises pretrained weights that were not used."""
        promises_weights = self.name.endswith(("_head", "_finetuned"))
        if promises_weights and self.settings.get("weights") == "none":
            return f"{self.name} (not pretrained)"
        return self.name

    @property
    def never_predicted(self) -> list[str]:
        """The classes that have test images and were predicted for none."""
        counts = np.array(self.test.get("confusion_matrix") or np.empty((0, 0)))
        if counts.shape != (len(self.classes), len(self.classes)):
            return []
        named = zip(self.classes, counts.sum(axis=0), strict=True)
        return [name for name, count in named if count == 0 and self.supports.get(name)]

    @property
    def gap_interval(self) -> tuple[float, float] | None:
        """The interval of how far the model is behind the best one."""
        low, high = self.gap.get("gap_to_best_low"), self.gap.get("gap_to_best_high")
        return None if low is None or high is None else (low, high)

    @property
    def small_classes(self) -> list[str]:
        """The classes with too few test images, and how many they have."""
        return [f"{name} ({n})" for name, n in self.supports.items() if n < MIN_DISTINCT_IMAGES]

    @property
    def shortcuts(self) -> list[tuple[str, str, float]]:
        """Columns that predict a screening target by themselves: column, target, ROC AUC."""
        areas = [
            (column, target, within["roc_auc_of_column"])
            for column, found in self.subgroups.items()
            for target, within in found.get("screening", {}).items()
        ]
        return [found for found in areas if found[2] >= MIN_SHORTCUT_AUC]

    @property
    def counted_as(self) -> dict[str, list[str]]:
        """Which classes count as malignant and which as benign."""
        return self.metrics.get("counted_as") or group_by_malignancy(self.classes)

    @property
    def mistakes(self) -> pd.DataFrame:
        """The most confident mistakes: `path`, `true_class`, `predicted_class`, `probability`."""
        path, columns = self.folder / "predictions.csv", ["path", "true_class", "predicted_class"]
        table = _read_table(path)
        if not set(columns) <= set(table):
            return pd.DataFrame()
        wrong = table[table["true_class"] != table["predicted_class"]]
        try:
            confidence = [
                float(row[f"prob_{row['predicted_class']}"]) for _, row in wrong.iterrows()
            ]
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path}: not a table of predictions ({error})") from error
        found = wrong[columns].assign(probability=confidence)
        return found.sort_values("probability", ascending=False, kind="stable").head(12)

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


class Run:
    """The files of a run; empty or None for those that are missing.

    Its models are those in `comparison.csv`, or without that all that have a `metrics.json`. Raises
    ValueError when no model has one, or a file cannot be understood.
    """

    def __init__(self, folder: Path) -> None:
        found = [Model(path.parent) for path in sorted(folder.glob("*/metrics.json"))]
        if not found:
            raise ValueError(f"{folder}: no model has a metrics.json; train one first")
        table = _read_numbers(folder / "comparison.csv")
        rows = {row["model"]: row for row in table.to_dict("records")}
        for model in found:
            # Runs of earlier versions call the gap `behind_best`.
            row = rows.get(model.name, {})
            model.gap = {str(n).replace("behind_best", "gap_to_best"): row[n] for n in row}
        compared = [model for model in found if model.name in rows] or found
        audit = folder / "audit.csv"
        self.folder = folder
        self.models = sorted(compared, key=lambda m: -(m.test.get("balanced_accuracy") or 0))
        self.others = [model.name for model in found if model not in compared]
        self.config = _read_json(folder / "config.json")
        for model in self.models:
            model.settings = self.config.get("runs", {}).get(model.name, {})
        self.splits = _read_table(folder / "splits.csv")
        self.findings = read_findings(audit) if audit.exists() else None

    @property
    def is_synthetic(self) -> bool:
        """Whether the images are drawn ones."""
        return bool(self.config.get("is_synthetic"))

    @property
    def drops_contradictions(self) -> bool:
        """Whether images with several labels were left out."""
        return self.config.get("settings", {}).get("label_conflicts") == "drop"

    @property
    def equals_of_best(self) -> list[str] | None:
        """The models that are not clearly worse than the best one; None where not measured."""
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
        """The number of test images that any model misclassifies: equal files of other classes."""
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

    @property
    def chosen_settings(self) -> dict[str, Any]:
        """The settings that differ from the defaults."""
        chosen = self.config.get("not_default")
        if chosen is None:
            # The command names those settings alone that are not the defaults; the data has none.
            words = shlex.split(self.config.get("command") or "")
            chosen = {word[2:].removeprefix("no-") for word in words if word.startswith("--")}
            chosen.add("data_dir")
        settings = self.config.get("settings", {})
        return {name: value for name, value in settings.items() if name in chosen}

    @property
    def default_settings(self) -> dict[str, Any]:
        """The settings left at their defaults."""
        chosen, settings = self.chosen_settings, self.config.get("settings", {})
        return {name: value for name, value in settings.items() if name not in chosen}

    @property
    def settings_by_model(self) -> dict[str, dict[str, Any]]:
        """The settings that each model was trained with, where they are known."""
        return {model.name: dict(model.settings) for model in self.models if model.settings}

    @property
    def differing_settings(self) -> dict[str, list[Any]]:
        """The settings in which the models differ, as trained by several commands: their values."""
        of_models = list(self.settings_by_model.values())
        names = dict.fromkeys(name for settings in of_models for name in settings)
        names.pop(TRAINING_PRECISION, None)  # follows from the model
        values = {name: [settings.get(name) for settings in of_models] for name in names}
        return {name: of for name, of in values.items() if len(set(map(json.dumps, of))) > 1}

    @property
    def environment(self) -> dict[str, str]:
        """Packages with their versions, machine and processes."""
        found = dict(self.config.get("versions", {}))
        for key, words in {"machine": "machine", "gpu": "GPU", "threads": "threads"}.items():
            if key in self.config:
                found[words] = "none" if self.config[key] is None else str(self.config[key])
        precisions = {m.metrics["precision"] for m in self.models if "precision" in m.metrics}
        if precisions:
            found["floating-point precision"] = ", ".join(sorted(precisions))
        processes = self.settings_by_model.get(self.models[0].name, {}).get("processes")
        return found if processes is None else found | {"processes": str(processes)}

    def num_found(self, kind: str) -> int:
        """Returns the number of findings of one kind in the audit."""
        return 0 if self.findings is None else int((self.findings["kind"] == kind).sum())


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
        raise ValueError(f"{path}: not a valid JSON file ({error})") from error
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
