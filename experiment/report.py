"""The results of a run as one HTML page that needs no network and no file beside it.

    python -c "from experiment.report import write_report; write_report('models')"

What is said is worked out here, as headings, texts, tables and figures; how it looks is in the
template at the end. Jinja2 escapes all that comes out of files: class names, paths, the command.
"""

import base64
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined
from PIL import Image

from evaluation import counted_as, why_screening_is_off
from experiment.console import format_duration
from imaging.audit import KINDS, MIN_DISTINCT_IMAGES, summarise, unavoidable_errors
from imaging.lesions import is_melanoma
from storage.files import read_csv, split_names, write_text

DASH = "–"
PIXELS_AN_INCH = 140  # at which figures are shown, so that letters are as large in all
STRONG_SHORTCUT = 0.75  # a ROC AUC of a column alone that a reader should hear of at once
LARGEST_PNG = 400_000  # bytes; more is a figure of photographs, a tenth as large as JPEG

_FIGURES_OF_ALL_CLASSES = {
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "top_2_accuracy": "Class decided for, or the most probable of the others",
    "precision": "Precision, weighted by class",
    "recall": "Recall, weighted by class",
    "f1": "F1, weighted by class",
    "macro_precision": "Precision, plain mean of the classes",
    "macro_recall": "Recall, plain mean of the classes",
    "macro_f1": "F1, plain mean of the classes",
    "macro_roc_auc": "ROC AUC, plain mean of the classes",
    "macro_average_precision": "Average precision, plain mean of the classes",
    "cohen_kappa": "Cohen's kappa",
    "matthews_corrcoef": "Matthews' correlation coefficient",
    "log_loss": "Log loss",
    "brier_score": "Brier score",
}
_SENSITIVITY = ("sensitivity", "specificity")
_FIGURES_OF_CALIBRATION = {
    "expected_calibration_error": "Expected calibration error",
    "maximum_calibration_error": "Maximum calibration error",
    "log_loss": "Log loss",
    "brier_score": "Brier score",
}


@dataclass(frozen=True)
class Table:
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]  # the first cell of each is its heading


@dataclass(frozen=True)
class Figure:
    caption: str
    alt: str
    source: str  # a data URI
    width: int
    height: int


@dataclass(frozen=True)
class Points:
    points: Sequence[tuple[str, str]]  # what it is about, and what there is to say


@dataclass(frozen=True)
class Code:
    code: str


@dataclass(frozen=True)
class Folded:
    summary: str
    blocks: "Sequence[Block]"


Block = str | Table | Figure | Points | Code | Folded


@dataclass(frozen=True)
class Section:
    heading: str
    parts: Mapping[str, Sequence[Block]]  # by sub-heading, none for ""


@dataclass(frozen=True)
class Run:
    """What was found in `save_dir`; empty or None where it is not there."""

    save_dir: Path
    models: Sequence[dict[str, Any]]  # `metrics.json` of each and its `folder`, the best first
    behind: Mapping[str, dict[str, float]]  # by model, the row of comparison.csv
    others: Sequence[str]  # models in the folder that were not compared with these
    config: dict[str, Any]
    splits: pd.DataFrame | None
    findings: pd.DataFrame | None


def write_report(save_dir: str | Path, *, title: str | None = None) -> Path:
    """Writes `report.html` into `save_dir` from what a run left there, and gives its path.

    The page is one file, images inside. It shows the models in `comparison.csv`, or without that
    all that have a `metrics.json`; any other file, or key in one, that is not there is left out.
    Raises ValueError when no model has a `metrics.json`, or a file cannot be understood.
    """
    run = _read_run(Path(save_dir))
    sections = [_comparison(run), _limits(run), *map(_about_model, run.models), _what_was_run(run)]
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(
        _TEMPLATE
    )
    text = page.render(
        title=title or "Skin lesion classification",
        origin=_origin(run),
        verdict=_verdict(run),
        style=_STYLE,
        sections=sections,
    )
    path = run.save_dir / "report.html"
    # File names that are not UTF-8 come as lone surrogates, which no file can hold.
    write_text(path, text.encode("utf-8", "backslashreplace").decode("utf-8"))
    return path


# ---------------------------------------------------------------------------- reading


def _read_run(save_dir: Path) -> Run:
    found = [
        {"model": path.parent.name} | _read_json(path) | {"folder": path.parent}
        for path in sorted(save_dir.glob("*/metrics.json"))
    ]
    if not found:
        raise ValueError(f"{save_dir}: no model in it has a metrics.json; train one first")
    comparison = _read_numbers(save_dir / "comparison.csv")
    rows = [] if comparison is None else comparison.to_dict("records")
    behind = {row["model"]: row for row in rows}
    compared = [metrics for metrics in found if metrics["model"] in behind] or found
    return Run(
        save_dir=save_dir,
        models=sorted(compared, key=lambda m: -(_test(m, "balanced_accuracy") or 0)),
        behind=behind,
        others=[metrics["model"] for metrics in found if metrics not in compared],
        config=_read_json(save_dir / "config.json"),
        splits=_read_table(save_dir / "splits.csv"),
        findings=_read_findings(save_dir / "audit.csv"),
    )


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


def _read_table(path: Path) -> pd.DataFrame | None:
    return read_csv(path) if path.exists() else None


def _read_numbers(path: Path) -> pd.DataFrame | None:
    """A table of which all columns but `model` are numbers."""
    table = _read_table(path)
    if table is None:
        return None
    numbers = table.columns.drop("model", errors="ignore")
    try:
        return table.assign(**{name: pd.to_numeric(table[name]) for name in numbers})
    except ValueError as error:
        raise ValueError(f"{path}: not a table of numbers ({error})") from error


def _read_findings(path: Path) -> pd.DataFrame | None:
    table = _read_table(path)
    if table is None:
        return None
    table["kind"] = pd.Categorical(table["kind"], categories=list(KINDS))
    for name in ("images", "classes"):
        table[name] = table[name].map(split_names)
    return table


# ---------------------------------------------------------------------------- words and numbers


def _test(metrics: dict[str, Any], name: str) -> Any:
    return metrics.get("test", {}).get(name)


def _number(value: float | None) -> str:
    return DASH if value is None else _with_minus(f"{value:z.3f}")


def _with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    """Two digits: no interval on hundreds of images would tell a third."""
    if value is None:
        return DASH
    if interval is None:
        return _with_minus(f"{value:z.2f}")
    return _with_minus(f"{value:z.2f} ({interval[0]:z.2f} to {interval[1]:z.2f})")


def _with_minus(text: str) -> str:
    return text.replace("-", "−")


def _headline(metrics: dict[str, Any], name: str) -> str:
    return _with_interval(_test(metrics, name), metrics.get("test_intervals", {}).get(name))


def _of_class(metrics: dict[str, Any], class_name: str, name: str) -> str:
    figures = (_test(metrics, "per_class") or {}).get(class_name, {})
    intervals = metrics.get("test_intervals", {}).get("per_class", {}).get(class_name, {})
    return _with_interval(figures.get(name), intervals.get(name))


def _supports(metrics: dict[str, Any]) -> dict[str, int]:
    """The number of test images of each class."""
    per_class = _test(metrics, "per_class") or {}
    return {name: figures.get("support", 0) for name, figures in per_class.items()}


def _count(number: int, singular: str, plural: str | None = None) -> str:
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def _duration(seconds: float | None) -> str:
    return DASH if seconds is None else format_duration(seconds)


def _whole(number: int | None) -> str:
    return DASH if number is None else f"{number:,}"


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or DASH
    return DASH if value is None else str(value)


def _worded(name: str) -> str:
    return name.replace("_", " ")


# ---------------------------------------------------------------------------- above all


def _verdict(run: Run) -> str:
    best = run.models[0]
    reached = _headline(best, "balanced_accuracy")
    if len(run.models) > 1:
        verdict = f"Of {len(run.models)} models, {best['model']} is best by balanced accuracy, "
    else:
        verdict = f"{best['model']} has a balanced accuracy of "
    clauses = [
        _recall_in_words(best, name) for name in best.get("classes", []) if is_melanoma(name)
    ]
    return f"{'; '.join([verdict + reached, *clauses])}."


def _recall_in_words(metrics: dict[str, Any], class_name: str) -> str:
    recall = _of_class(metrics, class_name, "recall")
    if recall == DASH:
        return f"no test image shows {class_name}"
    return f"its recall of {class_name} is {recall}"


def _origin(run: Run) -> str:
    images = sum(_supports(run.models[0]).values())
    words = [f"{_count(images, 'test image')}"] if images else []
    if run.config.get("settings", {}).get("data_dir"):
        words.append(f"data: {run.config['settings']['data_dir']}")
    if run.config.get("started"):
        words.append(f"started {run.config['started'][:16].replace('T', ' ')}")
    return " · ".join(words)


def _comparison(run: Run) -> Section:
    def of_all(name: str) -> list[str]:
        return [_headline(metrics, name) for metrics in run.models]

    names = [metrics["model"] for metrics in run.models]
    columns = {"model": names, "balanced accuracy": of_all("balanced_accuracy")}
    if any("behind_best" in gap for gap in run.behind.values()):
        columns["behind the best"] = [_behind(run, name) for name in names]
    columns["weighted precision"] = of_all("precision")
    columns["weighted recall (accuracy)"] = of_all("recall")
    times = [metrics.get("training_time") for metrics in run.models]
    if any(time is not None for time in times):
        columns["training time"] = list(map(_duration, times))
    columns["parameters"] = [_whole(metrics.get("parameters")) for metrics in run.models]
    caption = "On the test split, the best model first; in brackets the 95 % interval"
    table = Table(caption, list(columns), list(zip(*columns.values(), strict=True)))
    shown = map(" ".join, zip(names, columns["balanced accuracy"], strict=True))
    figure = _figure(
        run.save_dir / "comparison.png",
        "The models side by side, with 95 % intervals",
        f"Bars for each model. Balanced accuracy: {'; '.join(shown)}.",
    )
    differing = "Not all models were trained with the same settings: see “Command and settings”."
    notes = [*_gaps_in_words(run), *([differing] if _settings_by_model(run) else [])]
    return Section("Comparison", {"": [table, *notes, *figure]})


def _behind(run: Run, model: str) -> str:
    if model == run.models[0]["model"]:
        return "best"
    gap = run.behind.get(model, {})
    return _with_interval(gap.get("behind_best"), _interval_of_gap(gap))


def _interval_of_gap(gap: Mapping[str, float]) -> tuple[float, float] | None:
    names = ("behind_best_low", "behind_best_high")
    return tuple(gap[name] for name in names) if set(names) <= set(gap) else None


def _gaps_in_words(run: Run) -> list[str]:
    """Which models the test images do not tell from the best one, if that was measured."""
    rivals = [metrics["model"] for metrics in run.models[1:]]
    intervals = {name: _interval_of_gap(run.behind.get(name, {})) for name in rivals}
    if not rivals or None in intervals.values():
        return []
    equals = [name for name, (low, _) in intervals.items() if low <= 0]
    if not equals:
        return ["No interval of what another model is behind the best one includes 0."]
    text = "from the best model: the interval of what it is behind includes 0."
    return [f"These images do not tell {' or '.join(equals)} {text}"]


# ---------------------------------------------------------------------------- the limits


def _limits(run: Run) -> Section:
    """What a reader must know before believing the figures."""
    points = [
        *_about_test_size(run),
        *_about_labels(run),
        *_about_leakage(run),
        *_about_shortcuts(run),
    ]
    if len(run.models) > 1:
        text = "The best model was picked on the same images that it is measured on here, which "
        points.append(("Picked on the test images.", text + "flatters it a little."))
    text = (
        "Patients, cameras and clinics other than those in this data may give other results; the "
        "intervals say nothing of that."
    )
    points.append(("One source of images.", text))
    text = (
        "These are results of research software. Nothing here is approved or fit for deciding what "
        "a lesion is or what to do about it."
    )
    points.append(("No diagnostic device.", text))
    return Section("Before you believe it", {"": [Points(points)]})


def _about_test_size(run: Run) -> list[tuple[str, str]]:
    supports = _supports(run.models[0])
    if not supports:
        return []
    images, classes = sum(supports.values()), len(supports)
    text = f"{_count(images, 'image')} of {_count(classes, 'class', 'classes')}"
    if run.splits is not None and len(run.splits) > images:
        text += f", of {len(run.splits):,} in all"
    text += ". Other images of the same kind would give other figures, as the intervals say."
    groups = _number_of_test_groups(run.splits)
    if groups is not None and groups < images:
        text += (
            f" Images that belong together, {groups:,} groups here, count as one observation in "
            "them: the bootstrap draws them together, and Wilson's intervals, of single classes "
            "and of sensitivity and specificity, are for the effective number of groups."
        )
    points = [("Test split.", text)]
    few = {name: n for name, n in supports.items() if n < MIN_DISTINCT_IMAGES}
    if few:
        named = ", ".join(f"{name} ({n})" for name, n in few.items())
        text = (
            f"{named}: fewer than {MIN_DISTINCT_IMAGES} each, too few to say anything of the class."
        )
        points.append(("Classes with too few test images.", text))
    return points


def _number_of_test_groups(splits: pd.DataFrame | None) -> int | None:
    if splits is None or not {"split", "group"} <= set(splits):
        return None
    return splits.loc[splits["split"] == "test", "group"].nunique()


def _about_labels(run: Run) -> list[tuple[str, str]]:
    contradictions = _number_of(run.findings, "contradiction")
    if contradictions == 0:
        return []
    text = f"{_count(contradictions, 'picture')} in the data under several classes"
    if run.config.get("settings", {}).get("label_conflicts") == "drop":
        return [("Contradictory labels.", f"{text}; left out of training and test.")]
    text += ", of which one label each must be wrong."
    if run.splits is not None and {"split", "class", "content_hash"} <= set(run.splits):
        wrong = unavoidable_errors(run.splits[run.splits["split"] == "test"])
        if wrong:
            text += f" At least {_count(wrong, 'test image')} will be called wrong by any model."
    return [("Contradictory labels.", text)]


def _about_leakage(run: Run) -> list[tuple[str, str]]:
    points = []
    splits = pd.DataFrame() if run.splits is None else run.splits
    if {"split", "group"} <= set(splits) and splits["split"].nunique() > 1:
        divided = int((splits.groupby("group")["split"].nunique() > 1).sum())
        text = "No picture, nor anything else that belongs together, is in two splits."
        given = _number_of(run.findings, "leakage")
        if divided:
            text = f"{_count(divided, 'group')} of images that belong together are in several "
            text += "splits: what was learnt by heart counts as recognised."
        elif given:
            text += f" {_count(given, 'picture')} in several of the splits the data came with."
        points.append(("Leakage.", text))
    groups, pairs = (
        _number_of(run.findings, "identical"),
        _number_of(run.findings, "near-duplicate"),
    )
    if groups or pairs:
        text = (
            f"{_count(groups, 'group')} of identical files and {_count(pairs, 'pair')} of others "
        )
        text += "that show the same picture. The intervals draw them together."
        points.append(("Identical pictures.", text))
    return points


def _about_shortcuts(run: Run) -> list[tuple[str, str]]:
    points = []
    for column, found in run.models[0].get("subgroups", {}).items():
        for target, within in found.get("screening", {}).items():
            area = within["roc_auc_of_column"]
            if area >= STRONG_SHORTCUT:
                text = (
                    f"{target.capitalize()} against the rest by {_worded(column)} alone, without a "
                    f"look at the picture, has a ROC AUC of {area:.2f}. A model may have learnt "
                    "that instead of the lesion; how it does within each is under its subgroups."
                )
                points.append(("A shortcut.", text))
    return points


def _number_of(findings: pd.DataFrame | None, kind: str) -> int:
    return 0 if findings is None else int((findings["kind"] == kind).sum())


# ---------------------------------------------------------------------------- a model


def _about_model(metrics: dict[str, Any]) -> Section:
    parts = {
        "By class": _by_class(metrics),
        "Screening": _screening(metrics),
        "Calibration": _calibration(metrics),
        "Subgroups": _subgroups(metrics),
        "Pictures": _pictures(metrics),
        "Training": _training(metrics),
    }
    return Section(
        metrics["model"], {heading: blocks for heading, blocks in parts.items() if blocks}
    )


def _by_class(metrics: dict[str, Any]) -> list[Block]:
    folder, per_class = metrics["folder"], _test(metrics, "per_class") or {}
    return [
        *_table_of_classes(metrics),
        *_figure(
            folder / "class_metrics.png",
            "Recall and precision of each class, with 95 % intervals",
            f"A point and an interval for each class: {_range(per_class, 'recall')}; "
            f"{_range(per_class, 'precision')}.",
        ),
        *_figure(
            folder / "confusion_matrix.png",
            "Confusion matrix: true classes in rows, predicted ones in columns",
            _confusion_in_words(metrics),
        ),
        *_figure(
            folder / "roc_pr_curves.png",
            "ROC and precision-recall curves, each class against the rest",
            f"A line for each class in two panels: {_range(per_class, 'roc_auc')}; "
            f"{_range(per_class, 'average_precision')}.",
        ),
        *_table_over_classes(metrics),
    ]


def _table_of_classes(metrics: dict[str, Any]) -> list[Table]:
    per_class = _test(metrics, "per_class")
    if not per_class:
        return []
    without_interval = {
        "specificity": "specificity",
        "f1": "F1",
        "roc_auc": "ROC AUC",
        "average_precision": "average precision",
    }
    rows = [
        [name, _whole(figures.get("support"))]
        + [_of_class(metrics, name, figure) for figure in ("recall", "precision")]
        + [_number(figures.get(figure)) for figure in without_interval]
        for name, figures in per_class.items()
    ]
    columns = ["class", "test images", "recall (sensitivity)", "precision"]
    columns += without_interval.values()
    return [Table(f"{metrics['model']}: each class against the rest", columns, rows)]


def _table_over_classes(metrics: dict[str, Any]) -> list[Folded]:
    intervals, rows = metrics.get("test_intervals", {}), []
    for name, words in _FIGURES_OF_ALL_CLASSES.items():
        if name in intervals:
            rows.append([words, _headline(metrics, name)])
        elif name in metrics.get("test", {}):
            rows.append([words, _number(_test(metrics, name))])
    table = Table(f"{metrics['model']}: figures over all classes", ["figure", "value"], rows)
    return [Folded("Figures over all classes", [table])] if rows else []


def _range(per_class: dict[str, dict[str, Any]], name: str) -> str:
    known = {c: figures[name] for c, figures in per_class.items() if figures.get(name) is not None}
    words = _worded(name).replace("roc auc", "ROC AUC")
    if not known:
        return f"{words} not measured"
    low, high = min(known, key=known.get), max(known, key=known.get)
    return f"{words} from {known[low]:.2f} ({low}) to {known[high]:.2f} ({high})"


def _confusion_in_words(metrics: dict[str, Any]) -> str:
    counts, classes = np.array(_test(metrics, "confusion_matrix") or []), metrics.get("classes", [])
    if counts.shape != (len(classes), len(classes)) or not counts.any():
        return "Numbers of images of each true class that were called each class."
    words = f"{np.trace(counts):,} of {_count(int(counts.sum()), 'image')} called right."
    mistakes = counts - np.diag(np.diag(counts))
    if mistakes.any():
        true, called = np.unravel_index(mistakes.argmax(), mistakes.shape)
        times = _count(int(mistakes.max()), "image")
        words += f" Commonest mistake: {times} of {classes[true]} called {classes[called]}."
    return words


def _screening(metrics: dict[str, Any]) -> list[Block]:
    if "screening" not in metrics:
        return []
    targets = metrics["screening"]
    counted = metrics.get("counted_as") or counted_as(metrics.get("classes", []))
    reason = why_screening_is_off(counted)
    if not targets and reason is not None:
        return [f"Screening is off: {reason}.", *_counted_in_words(counted)]
    if not targets:
        text = "Screening could not be measured: the validation or the test images are all of one "
        return [f"{text}kind.", *_counted_in_words(counted)]
    text = (
        "Thresholds were chosen on the validation images to reach the aim there, and are applied "
        "to the test images. An image is flagged when its calibrated probability is the threshold "
        "or more."
    )
    tables = (_screening_table(name, target, metrics["model"]) for name, target in targets.items())
    return [text, *_counted_in_words(counted), *tables]


def _counted_in_words(counted: dict[str, list[str]]) -> list[str]:
    """Which classes count as what, and which are left out."""
    if not any(counted.values()):
        return []
    named = {f"as {kind}": counted[kind] for kind in ("malignant", "benign")}
    words = [f"{how}: {', '.join(names)}" for how, names in named.items() if names]
    sentences = [f"Counted {'; '.join(words)}."] if words else []
    if counted["unknown"]:
        sentences.append(
            "Not known whether malignant or benign, and left out of the screening figures: "
            f"{', '.join(counted['unknown'])}."
        )
    return [" ".join(sentences)]


def _screening_table(name: str, target: dict[str, Any], model: str) -> Table:
    classes = target.get("classes", [])
    named = name if classes in ([], [name]) else f"{name} ({', '.join(classes)})"
    area = _with_interval(target.get("roc_auc"), target.get("roc_auc_interval"))
    sizes = f"{_whole(target.get('positives'))} against {_whole(target.get('negatives'))}"
    rows = [
        [point["aim"], f"{point['threshold']:.3g}"]
        + [_with_interval(point.get(n), point.get(f"{n}_interval")) for n in _SENSITIVITY]
        for point in target.get("points", [])
    ]
    return Table(
        f"{model}: {named} against the rest, {sizes} test images, ROC AUC {area}",
        ["aim on validation", "threshold", *(f"{n} on test" for n in _SENSITIVITY)],
        rows,
    )


def _calibration(metrics: dict[str, Any]) -> list[Block]:
    calibration = metrics.get("calibration", {})
    before, after = calibration.get("before", {}), calibration.get("after", {})
    blocks: list[Block] = []
    if "temperature" in calibration:
        blocks.append(
            "How far probabilities can be taken at their word. A temperature of "
            f"{calibration['temperature']:.3g} and a bias for each class, fitted on the validation "
            "images, turn the model's probabilities into the calibrated ones that users are given. "
            "What the model decides for stays the class of its own highest probability; the "
            "calibration errors are of the probability of that class."
        )
    rows = [
        [words, _number(before.get(name)), _number(after.get(name))]
        for name, words in _FIGURES_OF_CALIBRATION.items()
        if name in before or name in after
    ]
    if rows:
        caption = f"{metrics['model']}: on the test split, lower is better"
        blocks.append(Table(caption, ["figure", "before", "after"], rows))
    errors = [_number(side.get("expected_calibration_error")) for side in (before, after)]
    blocks += _figure(
        metrics["folder"] / "reliability.png",
        "Reliability: how often decisions are right, over the probability of the class decided for",
        f"Accuracy over confidence. Expected calibration error {errors[0]} before calibration, "
        f"{errors[1]} after.",
    )
    biases = [[name, _number(bias)] for name, bias in calibration.get("bias", {}).items()]
    if biases:
        caption = "What is added to the logarithm of each probability"
        blocks.append(Folded("The bias of each class", [Table(caption, ["class", "bias"], biases)]))
    return blocks


def _subgroups(metrics: dict[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    for column, found in metrics.get("subgroups", {}).items():
        caption = f"{metrics['model']}: by {_worded(column)}"
        columns = [_worded(column), "test images", "balanced accuracy", "accuracy"]
        rows = [_row_of_group(value, group) for value, group in found["groups"].items()]
        blocks += [Table(caption, columns, rows), _gap(found)]
        for target, within in found.get("screening", {}).items():
            blocks += _screening_within(column, target, within, metrics["model"])
    return blocks


def _screening_within(column: str, target: str, within: dict[str, Any], model: str) -> list[Block]:
    rows = [
        [
            value,
            _whole(found["positives"]),
            _whole(found["negatives"]),
            _with_interval(found["roc_auc"], found["roc_auc_interval"]),
        ]
        for value, found in within["groups"].items()
    ]
    caption = f"{model}: {target} against the rest, within each {_worded(column)} that has both"
    columns = [_worded(column), target, "the rest", "ROC AUC"]
    text = (
        f"{target.capitalize()} against the rest by {_worded(column)} alone, without a look at the "
        f"picture: ROC AUC {within['roc_auc_of_column']:.2f}."
    )
    return [text, *([Table(caption, columns, rows)] if rows else [])]


def _row_of_group(value: str, group: dict[str, Any]) -> list[str]:
    figures = ("balanced_accuracy", "accuracy")
    return [
        value,
        f"{group['images']:,}{', too few to say' if group.get('is_too_small') else ''}",
        *(_with_interval(group.get(n), group.get(f"{n}_interval")) for n in figures),
    ]


def _gap(found: dict[str, Any]) -> str:
    gap = found.get("widest_gap")
    if gap is None:
        return "Too few groups are large enough for a gap between them to be measured."
    difference = _with_interval(gap["difference"], gap.get("interval"))
    text = (
        f"Widest gap in {_worded(gap['figure'])} between groups large enough: {difference}, "
        f"highest in “{gap['highest']}”, lowest in “{gap['lowest']}”."
    )
    large = [group for group in found["groups"].values() if not group.get("is_too_small")]
    if len(large) > 2:
        text += " The interval allows for these two having been picked as the furthest apart."
    return text


def _pictures(metrics: dict[str, Any]) -> list[Block]:
    name, folder = metrics["model"], metrics["folder"]
    mistakes = _figure(
        folder / "mistakes.png",
        "The test images on which the model was surest and wrong",
        f"Photographs of the most confident mistakes of {name}, each with its true and its "
        "predicted class and the probability given to that.",
    )
    gradcam = _figure(
        folder / "gradcam.png",
        "What the model looked at (Grad-CAM): bright colours counted most for the predicted class",
        "Test images beside the same images overlaid with what counted for the decision of "
        f"{name}, right and wrong ones, each with its true and its predicted class.",
    )
    return [*mistakes, *gradcam]


def _training(metrics: dict[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    if metrics.get("training_time") is not None:
        blocks.append(f"{_duration(metrics['training_time'])} of training.")
    if metrics.get("parameters") is not None:
        trained = _whole(metrics.get("trainable_parameters"))
        blocks.append(f"{_whole(metrics['parameters'])} parameters, of which {trained} trained.")
    alt = "Losses, precision, recall and learning rate over the training steps."
    history = _read_numbers(metrics["folder"] / "history.csv")
    ranks = ["valid_balanced_accuracy", "valid_loss"]
    if history is not None and {"step", *ranks} <= set(history) and len(history):
        best = history.sort_values(ranks, ascending=[True, False], na_position="first").iloc[-1]
        alt += (
            f" Best balanced accuracy on validation: {best[ranks[0]]:.2f} at step "
            f"{best['step']:,.0f} of {history['step'].max():,}."
        )
    return blocks + _figure(metrics["folder"] / "learning_curves.png", "Learning curves", alt)


# ---------------------------------------------------------------------------- what was run


def _what_was_run(run: Run) -> Section:
    parts = {
        "Command and settings": _about_settings(run),
        "Data": _about_data(run),
        "Audit of the images": _about_audit(run),
        "Versions and hardware": _about_machine(run),
    }
    filled = {heading: blocks for heading, blocks in parts.items() if blocks}
    if run.others:
        text = "Also in this folder, from other runs, and not part of this report: "
        filled = {"": [f"{text}{', '.join(run.others)}."]} | filled
    return Section("What was run", filled)


def _about_settings(run: Run) -> list[Block]:
    settings, command = run.config.get("settings", {}), run.config.get("command")
    blocks: list[Block] = [Code(command)] if command else []
    named = run.config.get("not_default")
    if named is None:
        # The command names those settings alone that are not the defaults; the data has none.
        words = shlex.split(command or "")
        named = {word[2:].removeprefix("no-") for word in words if word.startswith("--")}
        named.add("data_dir")
    rows = {True: [], False: []}
    for name, value in settings.items():
        rows[name in named].append([name, _setting(value)])
    columns = ["setting", "value"]
    if rows[True]:
        blocks.append(Table("Settings that differ from the defaults", columns, rows[True]))
    if rows[False]:
        table = Table("Settings left at their defaults", columns, rows[False])
        blocks.append(Folded("Settings left at their defaults", [table]))
    return blocks + _settings_by_model(run)


def _settings_by_model(run: Run) -> list[Table]:
    """The settings in which the models differ, as trained by several commands; none where none."""
    runs = run.config.get("runs", {})
    models = [metrics["model"] for metrics in run.models if metrics["model"] in runs]
    told = [runs[model] for model in models]
    rows = [
        [name, *(_setting(record.get(name)) for record in told)]
        for name in dict.fromkeys(name for record in told for name in record)
        if len({json.dumps(record.get(name)) for record in told}) > 1
    ]
    caption = "Settings that are not the same for all models"
    return [Table(caption, ["setting", *models], rows)] if rows else []


def _about_data(run: Run) -> list[Block]:
    counted, in_words = _images_of_each_class(run.splits)
    drawn = _figure(run.save_dir / "class_distribution.png", "Images of each class", in_words)
    examples = [
        *_figure(
            run.save_dir / "samples.png",
            "Training images as the models get them",
            "Photographs of lesions, a few of each class, with the names of the classes.",
        ),
        *_figure(
            run.save_dir / "augmentations.png",
            "One training image and random views of it",
            "A photograph of a lesion and views of it, turned, mirrored, cropped and recoloured.",
        ),
    ]
    folded = [Folded("Examples of the images", examples)] if examples else []
    return [*counted, *drawn, *folded]


def _images_of_each_class(splits: pd.DataFrame | None) -> tuple[list[Table], str]:
    """The counts as a table, and in a few words."""
    if splits is None or not {"class", "split"} <= set(splits) or len(splits) == 0:
        return [], "Numbers of images of each class."
    counts = pd.crosstab(splits["class"], splits["split"])
    order = ["train", "valid", "test"]
    counts = counts[sorted(counts, key=lambda name: order.index(name) if name in order else 3)]
    numbers = [[name, *row, sum(row)] for name, *row in counts.itertuples()]
    numbers.append(["all classes", *counts.sum(), len(splits)])
    rows = [[name, *(f"{number:,}" for number in row)] for name, *row in numbers]
    totals = counts.sum(axis=1)
    in_words = (
        f"Numbers of images of each class. The smallest is {totals.idxmin()} with "
        f"{totals.min():,}, the largest {totals.idxmax()} with {totals.max():,}."
    )
    return [Table("Images of each class in each split", ["class", *counts, "all"], rows)], in_words


def _about_audit(run: Run) -> list[Block]:
    if run.findings is None:
        return []
    lines = [line.partition(": ") for line in summarise(run.findings).splitlines()]
    points = Points([(what + colon.rstrip(), rest) for what, colon, rest in lines])
    figure = _figure(
        run.save_dir / "audit.png",
        "Pairs of files that the audit found",
        f"Pairs of photographs that show the same lesion, with their paths and classes: "
        f"{_number_of(run.findings, 'contradiction')} contradictions, "
        f"{_number_of(run.findings, 'leakage')} leaks, "
        f"{_number_of(run.findings, 'near-duplicate')} near-duplicates were found in all.",
    )
    return [points, *([Folded("Pairs to look at", figure)] if figure else [])]


def _about_machine(run: Run) -> list[Block]:
    rows = [[name, version] for name, version in run.config.get("versions", {}).items()]
    for key, words in {"machine": "machine", "gpu": "GPU", "threads": "threads"}.items():
        if key in run.config:
            rows.append([words, "none" if run.config[key] is None else str(run.config[key])])
    precisions = {metrics["precision"] for metrics in run.models if "precision" in metrics}
    if precisions:
        rows.append(["floating-point precision", ", ".join(sorted(precisions))])
    told = run.config.get("runs", {}).get(run.models[0]["model"], {})
    if "processes" in told:
        rows.append(["processes", str(told["processes"])])
    return [Table("Packages, machine and processes", ["what", "which"], rows)] if rows else []


# ---------------------------------------------------------------------------- the page


def _figure(path: Path, caption: str, alt: str) -> list[Figure]:
    """The figure, embedded, or none where there is no file."""
    if not path.exists():
        return []
    data, kind = path.read_bytes(), "png"
    with Image.open(path) as image:
        width, height = image.size
        if len(data) > LARGEST_PNG:
            buffer, kind = io.BytesIO(), "jpeg"
            image.convert("RGB").save(buffer, "JPEG", quality=88)
            data = buffer.getvalue()
        scale = PIXELS_AN_INCH / image.info.get("dpi", [PIXELS_AN_INCH])[0]
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return [Figure(caption, alt, source, round(width * scale), round(height * scale))]


_STYLE = """
:root {
  color-scheme: light dark;
  --page: #fff; --text: #1d2329; --quiet: #59636e; --line: #d5dae0; --soft: #f4f6f8;
  --accent: #0b5a9c;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #15191e; --text: #e3e7eb; --quiet: #a2abb5; --line: #38414b; --soft: #1e242b;
    --accent: #82bdf2;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 66rem;
  background: var(--page); color: var(--text);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere;
}
p, li { max-width: 46rem; }
h1, h2, h3 { line-height: 1.25; margin: 0; }
h1 { font-size: 1.75rem; }
h2 { font-size: 1.4rem; margin-top: 3.5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.1rem; margin-top: 2.25rem; }
a { color: var(--accent); }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
.skip { position: absolute; left: 1rem; top: -4rem; padding: .5rem 1rem; background: var(--page); }
.skip:focus { top: .5rem; }
.origin { color: var(--quiet); margin: .25rem 0 0; }
.verdict { font-size: 1.2rem; margin: 1rem 0 1.5rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 0; padding: 0; }
nav li { list-style: none; }
ul.points { padding-left: 1.2rem; }
ul.points li { margin: .5rem 0; }
.scroll { overflow-x: auto; margin: 1rem 0; overflow-wrap: break-word; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .4rem; color: var(--quiet); }
caption span { display: inline-block; position: sticky; left: 0; max-width: calc(100vw - 2rem); }
th, td { padding: .35rem .75rem; text-align: right; vertical-align: top; }
tbody > tr > * { border-bottom: 1px solid var(--line); }
td { white-space: nowrap; }
thead th { vertical-align: bottom; background: var(--soft); }
tbody th { font-weight: 400; min-width: 8rem; max-width: min(16rem, 40vw); }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
thead th:first-child { background: var(--soft); }
table.words td, table.words th { text-align: left; white-space: normal; }
figure { margin: 1.5rem 0; }
figcaption { color: var(--quiet); font-size: .9rem; margin-bottom: .4rem; max-width: 46rem; }
img { display: block; max-width: 100%; height: auto; background: #fff; }
@media screen and (prefers-color-scheme: dark) { img { padding: .5rem; border-radius: .4rem; } }
pre { background: var(--soft); padding: .75rem 1rem; white-space: pre-wrap; font-size: .85rem; }
details { margin: 1rem 0; }
summary { cursor: pointer; color: var(--accent); width: fit-content; }
footer { margin-top: 4rem; color: var(--quiet); font-size: .9rem; }
@media screen and (max-width: 30rem) { th, td { padding: .35rem .45rem; } }
@media print {
  body { padding: 0; max-width: none; font-size: 10pt; }
  nav, .skip { display: none; }
  h2, h3, caption, figcaption { break-after: avoid; }
  .scroll, figure, tr, li { break-inside: avoid; }
  img { max-height: 21cm; width: auto; }
  .scroll { overflow: visible; }
  table { font-size: 7pt; }
  th, td { padding: .15rem .35rem; }
  th:first-child { position: static; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""

_TEMPLATE = """
{%- macro show(block) %}
{% if block is string %}
<p>{{ block }}</p>
{% elif block.rows is defined %}
<div class="scroll" role="region" tabindex="0" aria-label="{{ block.caption }}">
<table{% if block.columns | length == 2 %} class="words"{% endif %}>
<caption><span>{{ block.caption }}</span></caption>
<thead><tr>
{% for name in block.columns %}
<th scope="col">{{ name }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in block.rows %}
<tr>{% for cell in row %}
{% if loop.first %}<th scope="row">{{ cell }}</th>{% else %}<td>{{ cell }}</td>{% endif %}
{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% elif block.source is defined %}
<figure><figcaption>{{ block.caption }}</figcaption>
<img src="{{ block.source }}" alt="{{ block.alt }}"
 width="{{ block.width }}" height="{{ block.height }}">
</figure>
{% elif block.points is defined %}
<ul class="points">
{% for what, text in block.points %}
<li><strong>{{ what }}</strong> {{ text }}</li>
{% endfor %}
</ul>
{% elif block.code is defined %}
<pre><code>{{ block.code }}</code></pre>
{% else %}
<details><summary>{{ block.summary }}</summary>
{% for inner in block.blocks %}{{ show(inner) }}{% endfor %}
</details>
{% endif %}
{% endmacro -%}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<link rel="icon" href="data:,">
<style>{{ style | safe }}</style>
</head>
<body>
<a class="skip" href="#section-1">Skip to the results</a>
<header>
<h1>{{ title }}</h1>
{% if origin %}
<p class="origin">{{ origin }}</p>
{% endif %}
<p class="verdict">{{ verdict }}</p>
</header>
<nav aria-label="Sections"><ul>
{% for section in sections %}
<li><a href="#section-{{ loop.index }}">{{ section.heading }}</a></li>
{% endfor %}
</ul></nav>
<main>
{% for section in sections %}
{% set number = loop.index %}
<section aria-labelledby="section-{{ number }}">
<h2 id="section-{{ number }}" tabindex="-1">{{ section.heading }}</h2>
{% for heading, blocks in section.parts.items() %}
{% if heading %}
<h3>{{ heading }}</h3>
{% endif %}
{% for block in blocks %}
{{ show(block) }}
{% endfor %}
{% endfor %}
</section>
{% endfor %}
</main>
<footer><p>Research software, not for diagnosis.</p></footer>
</body>
</html>
"""
