"""Answers the questions that come before any table: what do the results of a run support?

A number that looks good may be due to chance, to faults of the data or to synthetic images. The
console and the top of the report show these answers first.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from evaluation import format_percent
from experiment.run_files import Model, Run

MAX_HALF_WIDTH = 0.05  # of the interval of balanced accuracy in a test split that is large enough


@dataclass(frozen=True)
class Answer:
    """Answers a question; `is_good` is None for an answer that is neither good nor bad."""

    question: str
    text: str
    is_good: bool | None


def judge(run: Run) -> list[Answer]:
    """Returns the answers about the data and about the model of the highest balanced accuracy."""
    model = run.models[0]
    return [
        *_are_data_sound(run),
        *_is_test_split_large_enough(model),
        *_is_one_the_best(run),
        *_is_better_than_chance(model),
        *_is_melanoma_found(model),
        *_are_thresholds_reached(model),
        *_did_calibration_help(model),
    ]


def format_verdict(run: Run) -> str:
    """Returns the answers as lines of text, under a heading."""
    answers = judge(run)
    width = max((len(answer.question) for answer in answers), default=0)
    lines = [f"{answer.question:{width}}  {answer.text}" for answer in answers]
    return "\n".join(["", f"What the results of {run.models[0].label} support:", *lines])


def _is_one_the_best(run: Run) -> Iterator[Answer]:
    question, best, equals = "Is one model the best?", run.models[0].label, run.equals_of_best
    if equals:
        text = f"not shown: {best} is ahead, but the test images cannot tell it from "
        yield Answer(question, text + " or ".join(equals), None)
    elif equals is not None:
        yield Answer(question, f"yes: {best}; all others are behind it beyond chance", True)


def _is_better_than_chance(model: Model) -> Iterator[Answer]:
    present = [name for name, count in model.supports.items() if count]
    interval = model.intervals.get("balanced_accuracy")
    if not present or interval is None:
        return
    chance, largest = 1 / len(present), max(present, key=model.supports.__getitem__)
    share = model.supports[largest] / model.num_images
    is_better = interval[0] > chance
    text = (
        f"{'yes' if is_better else 'not shown'}: balanced accuracy "
        f"{model.test['balanced_accuracy']:.2f} ({interval[0]:.2f} to {interval[1]:.2f}), "
        f"chance {chance:.2f}"
    )
    low, high = model.intervals.get("accuracy", (1.0, 1.0))
    if low <= share:
        relation = "worse than" if high < share else "not shown to be better than"
        text += (
            f"; accuracy {model.test['accuracy']:.2f} ({low:.2f} to {high:.2f}), {relation} "
            f"{share:.2f} for always predicting {largest}"
        )
    yield Answer("Better than chance?", text, is_better)
    if model.never_predicted:
        text = f"no: it never predicts {', '.join(model.never_predicted)}"
        yield Answer("Are all classes predicted?", text, False)


def _is_melanoma_found(model: Model) -> Iterator[Answer]:
    for name in model.melanomas:
        found = model.per_class.get(name, {})
        count, recall = found.get("support", 0), found.get("recall")
        interval = model.intervals.get("per_class", {}).get(name, {}).get("recall")
        if not count or recall is None:
            yield Answer(f"Is {name} found?", f"not measured: no test image shows {name}", False)
        elif interval is not None:
            text = (
                f"{round(recall * count)} of {count}: sensitivity {recall:.2f} "
                f"({interval[0]:.2f} to {interval[1]:.2f}), precision {found['precision']:.2f}"
            )
            yield Answer(f"Is {name} found?", text, recall >= 0.95)


def _are_thresholds_reached(model: Model) -> Iterator[Answer]:
    for target, found in model.metrics.get("screening", {}).items():
        for point in found.get("points", []):
            if point["aim"] != "sensitivity 95%":  # that of the flags of predict.py
                continue
            shares = [point["sensitivity"], *point["sensitivity_interval"], point["specificity"]]
            reached, low, high, specificity = map(format_percent, shares)
            text = (
                f"aimed at 95 % sensitivity, reached {reached} ({low} to {high}); specificity "
                f"{specificity}"
            )
            is_reached = round(point["sensitivity"], 2) >= 0.95  # as it is shown
            yield Answer(f"Does the threshold for {target} hold?", text, is_reached)


def _are_data_sound(run: Run) -> Iterator[Answer]:
    question, faults = "Are the data sound?", []
    if run.is_synthetic:
        faults.append("synthetic images, which say nothing about skin")
    num_contradictions = run.num_found("contradiction")
    if num_contradictions and not run.drops_contradictions:
        faults.append(f"images with several labels: {num_contradictions:,}")
    if run.num_divided_groups:
        faults.append(f"groups of images divided between splits: {run.num_divided_groups:,}")
    for column, target, area in run.models[0].shortcuts:
        faults.append(f"{column} alone predicts {target} with a ROC AUC of {area:.2f}")
    if faults:
        yield Answer(question, f"no: {'; '.join(faults)}", False)
    elif run.findings is not None and run.num_divided_groups == 0:
        text = "yes: no contradictory labels found, no group of images in two splits"
        yield Answer(question, text, True)


def _is_test_split_large_enough(model: Model) -> Iterator[Answer]:
    interval = model.intervals.get("balanced_accuracy")
    if interval is None:
        return
    half_width = (interval[1] - interval[0]) / 2
    is_large = half_width <= MAX_HALF_WIDTH and not model.small_classes
    text = (
        f"{'yes' if is_large else 'no'}: {model.num_images:,} images, balanced accuracy is known "
        f"to ±{half_width:.2f}"
    )
    if model.small_classes:
        text += f"; too few of {', '.join(model.small_classes)}"
    yield Answer("Is the test split large enough?", text, is_large)


def _did_calibration_help(model: Model) -> Iterator[Answer]:
    calibration, name = model.metrics.get("calibration", {}), "expected_calibration_error"
    before, after = (calibration.get(when, {}).get(name) for when in ("before", "after"))
    if before is not None and after is not None and after > before:
        text = f"no: it raised the expected calibration error from {before:.3f} to {after:.3f}"
        yield Answer("Did calibration help?", text, False)
