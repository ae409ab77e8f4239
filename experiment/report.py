"""The results of a run as one HTML page that needs no network and no file beside it.

    python -c "from experiment.report import write_report; write_report('models')"

What the page says, each sentence, table and figure, is in `report.html.j2`, and how it looks in
`report.css`; here the files of a run are read, and numbers and images made ready for the page.
Jinja2 escapes all that comes out of files: class names, paths, the command.
"""

import base64
import io
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from evaluation import best_evaluation, group_by_malignancy, screening_unavailable_reason
from experiment.console import format_duration
from imaging.audit import KINDS, MIN_DISTINCT_IMAGES, summarise, unavoidable_errors
from imaging.lesions import is_melanoma
from storage.files import read_csv, split_names, write_text

DASH = "–"
PIXELS_PER_INCH = 140  # of figures on the page, so that letters are of one size in all
MIN_SHORTCUT_AUC = 0.75  # ROC AUC of a column alone from which the report warns of it
MAX_PNG_SIZE = 400_000  # bytes; more is a figure of photographs, a tenth as large as JPEG

_HERE = Path(__file__).parent


def write_report(save_dir: str | Path, *, title: str | None = None) -> Path:
    """Writes `report.html` into `save_dir` from the files of a run, and returns its path.

    The page is one file, images inside. It shows the models in `comparison.csv`, or without that
    all that have a `metrics.json`; any other file, or key in one, may be missing.
    Raises ValueError when no model has a `metrics.json`, or a file cannot be understood.
    """
    run = Run(Path(save_dir))
    text = _PAGES.get_template("report.html.j2").render(
        title=title or "Skin lesion classification",
        style=(_HERE / "report.css").read_text(encoding="utf-8"),
        run=run,
        best=run.models[0],
    )
    path = run.folder / "report.html"
    # File names that are not UTF-8 come as lone surrogates, which no file can hold.
    write_text(path, text.encode("utf-8", "backslashreplace").decode("utf-8"))
    return path


# ---------------------------------------------------------------------------- the files of a run


class Model:
    """The files of one model; empty or None for those that are missing."""

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
            raise ValueError(f"{folder}: no model in it has a metrics.json; train one first")
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
        self.splits = _read_table(folder / "splits.csv")
        self.findings = read_findings(audit) if audit.exists() else None

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
        runs = self.config.get("runs", {})
        return {model.name: runs[model.name] for model in self.models if model.name in runs}

    @property
    def differing_settings(self) -> dict[str, list[Any]]:
        """The settings in which the models differ, as trained by several commands: their values."""
        of_models = list(self.settings_by_model.values())
        names = dict.fromkeys(name for settings in of_models for name in settings)
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


# ---------------------------------------------------------------------------- numbers and images


def _rounded(value: float | None, digits: str = "z.3f") -> str:
    return DASH if value is None else f"{value:{digits}}".replace("-", "−")


def _with_interval(value: float | None, interval: Sequence[float] | None = None) -> str:
    """Two digits, as intervals on hundreds of images are too wide for a third."""
    text = _rounded(value, "z.2f")
    if value is None or interval is None:
        return text
    return f"{text} ({_rounded(interval[0], 'z.2f')} to {_rounded(interval[1], 'z.2f')})"


def _headline(model: Model, name: str) -> str:
    """A metric over all classes of the test split."""
    return _with_interval(model.test.get(name), model.intervals.get(name))


def _of_class(model: Model, class_name: str, name: str) -> str:
    intervals = model.intervals.get("per_class", {}).get(class_name, {})
    return _with_interval(model.per_class.get(class_name, {}).get(name), intervals.get(name))


def _estimate(found: Mapping[str, Any], name: str) -> str:
    return _with_interval(found.get(name), found.get(f"{name}_interval"))


def _whole(number: float | None) -> str:
    return DASH if number is None else f"{number:,.0f}"


def _count(number: int, singular: str, plural: str | None = None) -> str:
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or DASH
    return DASH if value is None else str(value)


def _worded(name: str) -> str:
    return name.replace("_", " ")


def _one_line(text: Markup) -> Markup:
    return Markup(" ").join(text.split())


def _range_over_classes(model: Model, name: str) -> str:
    known = {c: found[name] for c, found in model.per_class.items() if found.get(name) is not None}
    words = _worded(name).replace("roc auc", "ROC AUC")
    if not known:
        return f"{words} not measured"
    low, high = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
    return f"{words} from {known[low]:.2f} ({low}) to {known[high]:.2f} ({high})"


def _confusion_in_words(model: Model) -> str:
    counts, classes = np.array(model.test.get("confusion_matrix") or []), model.classes
    if counts.shape != (len(classes), len(classes)) or not counts.any():
        return "Numbers of images of each true class and each predicted class."
    words = f"{np.trace(counts):,} of {_count(int(counts.sum()), 'image')} predicted correctly."
    mistakes = counts - np.diag(np.diag(counts))
    if mistakes.any():
        true, predicted = np.unravel_index(mistakes.argmax(), mistakes.shape)
        times = _count(int(mistakes.max()), "image")
        words += (
            f" Most frequent mistake: {times} of {classes[true]} predicted as {classes[predicted]}."
        )
    return words


def _embed(path: Path) -> dict[str, Any] | None:
    """Returns an image's `src` and size for the page, or None where there is no file."""
    if not path.exists():
        return None
    data, kind = path.read_bytes(), "png"
    with Image.open(path) as image:
        width, height = image.size
        if len(data) > MAX_PNG_SIZE:
            buffer, kind = io.BytesIO(), "jpeg"
            image.convert("RGB").save(buffer, "JPEG", quality=88)
            data = buffer.getvalue()
        scale = PIXELS_PER_INCH / image.info.get("dpi", [PIXELS_PER_INCH])[0]
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return {"source": source, "width": round(width * scale), "height": round(height * scale)}


def _comparison_columns(run: Run) -> dict[str, list[str]]:
    """The models side by side, by heading."""
    models = run.models
    columns = {
        "model": [model.name for model in models],
        "balanced accuracy": [_headline(model, "balanced_accuracy") for model in models],
    }
    if any("gap_to_best" in model.gap for model in models):
        gaps = [_with_interval(m.gap.get("gap_to_best"), m.gap_interval) for m in models[1:]]
        columns["gap to the best"] = ["best", *gaps]
    columns["weighted precision"] = [_headline(model, "precision") for model in models]
    columns["weighted recall (accuracy)"] = [_headline(model, "recall") for model in models]
    times = [model.metrics.get("training_time") for model in models]
    if any(time is not None for time in times):
        columns["training time"] = [DASH if t is None else format_duration(t) for t in times]
    columns["parameters"] = [_whole(model.metrics.get("parameters")) for model in models]
    return columns


def _by_name(*functions: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {function.__name__.removeprefix("_"): function for function in functions}


_PAGES = Environment(
    loader=FileSystemLoader(_HERE),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    extensions=["jinja2.ext.do"],
)
_PAGES.filters |= _by_name(
    *(_count, _embed, _estimate, _one_line, _rounded, _setting, _whole, _with_interval, _worded),
    format_duration,
)
_PAGES.globals |= {"DASH": DASH, "MIN_DISTINCT_IMAGES": MIN_DISTINCT_IMAGES, "zip": zip} | _by_name(
    *(_comparison_columns, _confusion_in_words, _headline, _of_class, _range_over_classes),
    *(summarise, screening_unavailable_reason),
)
