"""The results of a run as one HTML page that needs no network and no file beside it.

    python -c "from experiment.report import write_report; write_report('models')"

What the page says is in `report.html.j2`, how it looks in `report.css`; here are its tables and the
wording of numbers. Jinja2 escapes all that comes out of files: class names, paths, the command.
"""

import base64
import io
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from evaluation import why_screening_is_off
from experiment.console import format_duration
from experiment.run_files import Model, Run, read_run
from imaging.audit import MIN_DISTINCT_IMAGES, summarise
from storage.files import write_text

DASH = "–"
PIXELS_PER_INCH = 140  # at which figures are shown, so that letters are as large in all
MAX_PNG_SIZE = 400_000  # bytes; more is a figure of photographs, a tenth as large as JPEG

_HERE = Path(__file__).parent
_OVERALL = {
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "top_2_accuracy": "Top-2 accuracy",
    "precision": "Precision, weighted mean of the classes",
    "recall": "Recall, weighted mean of the classes",
    "f1": "F1, weighted mean of the classes",
    "macro_precision": "Precision, unweighted mean of the classes",
    "macro_recall": "Recall, unweighted mean of the classes",
    "macro_f1": "F1, unweighted mean of the classes",
    "macro_roc_auc": "ROC AUC, unweighted mean of the classes",
    "macro_average_precision": "Average precision, unweighted mean of the classes",
    "cohen_kappa": "Cohen's kappa",
    "matthews_corrcoef": "Matthews' correlation coefficient",
    "log_loss": "Log loss",
    "brier_score": "Brier score",
}
_CALIBRATION = {
    "expected_calibration_error": "Expected calibration error",
    "maximum_calibration_error": "Maximum calibration error",
    "log_loss": "Log loss",
    "brier_score": "Brier score",
}
_BY_CLASS = {
    "specificity": "specificity",
    "f1": "F1",
    "roc_auc": "ROC AUC",
    "average_precision": "average precision",
}


def write_report(save_dir: str | Path, *, title: str | None = None) -> Path:
    """Writes `report.html` into `save_dir` from what a run left there, and returns its path.

    The page is one file, images inside. It shows the models in `comparison.csv`, or without that
    all that have a `metrics.json`; any other file, or key in one, that is not there is left out.
    Raises ValueError when no model has a `metrics.json`, or a file cannot be understood.
    """
    run = read_run(Path(save_dir))
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


class Table(NamedTuple):
    """A table of the page; the first cell of each row is its heading."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


# ---------------------------------------------------------------------------- numbers and words


def _rounded(value: float | None, digits: str = "z.3f") -> str:
    return DASH if value is None else f"{value:{digits}}".replace("-", "−")


def _with_interval(value: float | None, interval: Sequence[float] | None = None) -> str:
    """Two digits: no interval on hundreds of images would tell a third."""
    text = _rounded(value, "z.2f")
    if value is None or interval is None:
        return text
    return f"{text} ({_rounded(interval[0], 'z.2f')} to {_rounded(interval[1], 'z.2f')})"


def _headline(model: Model, name: str) -> str:
    """A figure over all classes of the test split."""
    return _with_interval(model.test.get(name), model.intervals.get(name))


def _of_class(model: Model, class_name: str, name: str) -> str:
    intervals = model.intervals.get("per_class", {}).get(class_name, {})
    return _with_interval(model.per_class.get(class_name, {}).get(name), intervals.get(name))


def _beside_interval(found: Mapping[str, Any], name: str) -> str:
    return _with_interval(found.get(name), found.get(f"{name}_interval"))


def _whole(number: float | None) -> str:
    return DASH if number is None else f"{number:,.0f}"


def _count(number: int, singular: str, plural: str | None = None) -> str:
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def _duration(seconds: float | None) -> str:
    return DASH if seconds is None else format_duration(seconds)


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


# ---------------------------------------------------------------------------- tables


def _comparison_table(run: Run) -> Table:
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
        columns["training time"] = [_duration(time) for time in times]
    columns["parameters"] = [_whole(model.metrics.get("parameters")) for model in models]
    caption = "On the test split, the best model first, with the 95 % interval in brackets"
    return Table(caption, list(columns), list(zip(*columns.values(), strict=True)))


def _class_table(model: Model) -> Table:
    rows = [
        [
            name,
            _whole(found.get("support")),
            _of_class(model, name, "recall"),
            _of_class(model, name, "precision"),
            *(_rounded(found.get(figure)) for figure in _BY_CLASS),
        ]
        for name, found in model.per_class.items()
    ]
    columns = ["class", "test images", "recall (sensitivity)", "precision", *_BY_CLASS.values()]
    return Table(f"{model.name}: each class against the rest", columns, rows)


def _overall_table(model: Model) -> Table:
    rows = [
        [words, _headline(model, name) if name in model.intervals else _rounded(model.test[name])]
        for name, words in _OVERALL.items()
        if name in model.intervals or name in model.test
    ]
    return Table(f"{model.name}: metrics over all classes", ["metric", "value"], rows)


def _screening_table(model: Model, name: str, target: Mapping[str, Any]) -> Table:
    classes = target.get("classes", [])
    named = name if classes in ([], [name]) else f"{name} ({', '.join(classes)})"
    sizes = f"{_whole(target.get('positives'))} against {_whole(target.get('negatives'))}"
    area = _beside_interval(target, "roc_auc")
    rows = [
        [
            point["aim"],
            f"{point['threshold']:.3g}",
            _beside_interval(point, "sensitivity"),
            _beside_interval(point, "specificity"),
        ]
        for point in target.get("points", [])
    ]
    caption = f"{model.name}: {named} against the rest, {sizes} test images, ROC AUC {area}"
    columns = ["aim on validation", "threshold", "sensitivity on test", "specificity on test"]
    return Table(caption, columns, rows)


def _calibration_table(model: Model) -> Table:
    calibration = model.metrics.get("calibration", {})
    before, after = calibration.get("before", {}), calibration.get("after", {})
    rows = [
        [words, _rounded(before.get(name)), _rounded(after.get(name))]
        for name, words in _CALIBRATION.items()
        if name in before or name in after
    ]
    caption = f"{model.name}: on the test split, lower is better"
    return Table(caption, ["metric", "before", "after"], rows)


def _bias_table(model: Model) -> Table:
    biases = model.metrics.get("calibration", {}).get("bias", {})
    rows = [[name, _rounded(bias)] for name, bias in biases.items()]
    return Table("Added to the logarithm of each probability", ["class", "bias"], rows)


def _subgroup_table(model: Model, column: str, found: Mapping[str, Any]) -> Table:
    rows = [
        [
            value,
            f"{group['images']:,}{' (too few)' if group.get('is_too_small') else ''}",
            _beside_interval(group, "balanced_accuracy"),
            _beside_interval(group, "accuracy"),
        ]
        for value, group in found["groups"].items()
    ]
    columns = [_worded(column), "test images", "balanced accuracy", "accuracy"]
    return Table(f"{model.name}: by {_worded(column)}", columns, rows)


def _subgroup_screening_table(
    model: Model, column: str, target: str, within: Mapping[str, Any]
) -> Table:
    rows = [
        [
            value,
            _whole(found["positives"]),
            _whole(found["negatives"]),
            _beside_interval(found, "roc_auc"),
        ]
        for value, found in within["groups"].items()
    ]
    caption = f"{target} against the rest, within each {_worded(column)} that has both"
    columns = [_worded(column), target, "the rest", "ROC AUC"]
    return Table(f"{model.name}: {caption}", columns, rows)


def _settings_table(run: Run, is_default: bool) -> Table:
    named = run.config.get("not_default")
    if named is None:
        # The command names those settings alone that are not the defaults; the data has none.
        words = shlex.split(run.config.get("command") or "")
        named = {word[2:].removeprefix("no-") for word in words if word.startswith("--")}
        named.add("data_dir")
    rows = [
        [name, _setting(value)]
        for name, value in run.config.get("settings", {}).items()
        if (name not in named) == is_default
    ]
    how = "left at their defaults" if is_default else "that differ from the defaults"
    return Table(f"Settings {how}", ["setting", "value"], rows)


def _settings_by_model(run: Run) -> Table:
    """The settings in which the models differ, as trained by several commands."""
    runs = run.config.get("runs", {})
    settings = {model.name: runs[model.name] for model in run.models if model.name in runs}
    rows = [
        [name, *(_setting(values.get(name)) for values in settings.values())]
        for name in dict.fromkeys(name for values in settings.values() for name in values)
        if len({json.dumps(values.get(name)) for values in settings.values()}) > 1
    ]
    caption = "Settings that are not the same for all models"
    return Table(caption, ["setting", *settings], rows)


def _data_table(counts: pd.DataFrame) -> Table:
    numbers = [[name, *row, sum(row)] for name, *row in counts.itertuples()]
    if numbers:
        numbers.append(["all classes", *counts.sum(), counts.to_numpy().sum()])
    rows = [[name, *map(_whole, row)] for name, *row in numbers]
    return Table("Images of each class in each split", ["class", *counts, "all"], rows)


def _machine_table(run: Run) -> Table:
    rows = [[name, version] for name, version in run.config.get("versions", {}).items()]
    for key, words in {"machine": "machine", "gpu": "GPU", "threads": "threads"}.items():
        if key in run.config:
            rows.append([words, "none" if run.config[key] is None else str(run.config[key])])
    precisions = {m.metrics["precision"] for m in run.models if "precision" in m.metrics}
    if precisions:
        rows.append(["floating-point precision", ", ".join(sorted(precisions))])
    told = run.config.get("runs", {}).get(run.models[0].name, {})
    if "processes" in told:
        rows.append(["processes", str(told["processes"])])
    return Table("Packages, machine and processes", ["what", "which"], rows)


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
    _count, _duration, _embed, _one_line, _rounded, _whole, _with_interval, _worded
)
_PAGES.globals |= {"DASH": DASH, "MIN_IMAGES": MIN_DISTINCT_IMAGES} | _by_name(
    _bias_table,
    _calibration_table,
    _class_table,
    _comparison_table,
    _confusion_in_words,
    _data_table,
    _headline,
    _machine_table,
    _of_class,
    _overall_table,
    _range_over_classes,
    _screening_table,
    _settings_by_model,
    _settings_table,
    _subgroup_screening_table,
    _subgroup_table,
    summarise,
    why_screening_is_off,
)
