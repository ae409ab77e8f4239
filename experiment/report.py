"""The results of a run as one HTML page that needs no network and no file beside it.

    python -c "from experiment.report import write_report; write_report('models')"

What the page says, each sentence, table and figure, is in `report.html.j2`, and how it looks in
`report.css`; here numbers and images are made ready for the page.
Jinja2 escapes all that comes out of files: class names, paths, the command.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from evaluation import format_percent, screening_unavailable_reason
from experiment.console import format_duration
from experiment.run_files import Model, Run
from experiment.verdict import judge
from imaging.audit import MIN_DISTINCT_IMAGES, summarise
from storage.files import write_text

DASH = "–"
PIXELS_PER_INCH = 140  # of figures on the page, so that letters are of one size in all
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
        answers=judge(run),
    )
    path = run.folder / "report.html"
    # File names that are not UTF-8 come as lone surrogates, which no file can hold.
    write_text(path, text.encode("utf-8", "backslashreplace").decode("utf-8"))
    return path


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
        "model": [model.label for model in models],
        "balanced accuracy": [_headline(model, "balanced_accuracy") for model in models],
    }
    if any("gap_to_best" in model.gap for model in models):
        gaps = [_with_interval(m.gap.get("gap_to_best"), m.gap_interval) for m in models[1:]]
        columns["gap to the first"] = [DASH, *gaps]
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
    format_percent,
)
_PAGES.globals |= {"DASH": DASH, "MIN_DISTINCT_IMAGES": MIN_DISTINCT_IMAGES, "zip": zip} | _by_name(
    *(_comparison_columns, _confusion_in_words, _headline, _of_class, _range_over_classes),
    *(summarise, screening_unavailable_reason),
)
