"""The layout: which modules there are, and that each imports only from those above it."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("storage", "imaging", "evaluation", "learning", "inference", "experiment")
ROOT_MODULES = {
    "augmentation", "dataset", "models", "predict", "train_models", "training", "visualizations",
}  # fmt: skip
# From bottom to top, as in ARCHITECTURE.md; a package stands for its modules in the order given.
ORDER = (
    "storage.files", "storage.tensors",
    "imaging.lesions", "imaging.decode", "imaging.synthetic", "imaging.audit", "imaging.prepare",
    "imaging.sources", "imaging.splits", "imaging.cache",
    "augmentation", "dataset",
    "evaluation.metrics", "evaluation.intervals", "evaluation.calibration", "evaluation.screening",
    "evaluation.subgroups", "evaluation",
    "models",
    "learning.allocator", "learning.hardware", "learning.distributed", "learning.checkpoints",
    "training", "visualizations",
    "inference.explain", "inference.ensemble", "inference.export",
    "experiment.console", "experiment.run_folder", "experiment.settings", "experiment.report",
    "experiment.results", "experiment.pipeline",
    "train_models", "predict",
)  # fmt: skip
# What users import, by the module that they import it from.
PUBLIC = {
    "dataset": """DEFAULT_SPLITS IMAGE_SUFFIXES METADATA_COLUMNS DatasetBuilder LesionDataset
        LesionLoader UnreadableImageError balanced_frequencies center_crop create_dataloaders
        find_images fingerprint group_images join_table k_fold_splits normalize prepare_image
        read_image read_table resize stratified_split to_float""",
    "models": """ClassificationHead FinetunedHeadResNet FinetunedResNet LesionClassifier ModelInfo
        ResNetFromScratch SimpleCNN count_parameters get_model imagenet_weights is_pretrained
        load_model""",
    "training": """Evaluation NonFiniteLossError PRECISIONS choose_device compute_metrics evaluate
        make_optimizer name_of_precision resolve_precision train warmup_cosine""",
    "evaluation": """Calibration HEADLINES MALIGNANT assess choose_thresholds compare
        compute_intervals compute_metrics compute_subgroups counted_as effective_sample_size
        fit_calibration match_classes most_confident_mistakes reliability screen screening_targets
        typical_examples wilson_interval""",
    "predict": "Ensemble export_onnx find_files gradcam main predict predict_batches",
    "train_models": "Settings command main parse_arguments run",
    "augmentation": "Views apply_views draw_views",
    "visualizations": "plot_confusion_matrix plot_learning_curves plot_model_comparison",
}


def modules():
    found = {path.stem: path for path in ROOT.glob("*.py")}
    for package in PACKAGES:
        for path in (ROOT / package).glob("*.py"):
            name = package if path.stem == "__init__" else f"{package}.{path.stem}"
            if path.stem != "__init__" or path.read_text():
                found[name] = path
    return found


def imported(path):
    """The modules of the project that a file imports, wherever in the file it does."""
    known = modules()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in inside if name in known)
            if node.module in known and not all(name in known for name in inside):
                yield node.module


def test_the_root_holds_the_seven_modules_that_people_use():
    assert {path.stem for path in ROOT.glob("*.py")} == ROOT_MODULES


def test_every_module_has_its_place_in_the_order():
    assert sorted(modules()) == sorted(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_from_those_before_it(name):
    before = ORDER[: ORDER.index(name)]
    assert [other for other in imported(modules()[name]) if other not in before] == []


@pytest.mark.parametrize("name", ORDER)
def test_no_module_imports_a_private_name_of_another(name):
    private = [
        alias.name
        for node in ast.walk(ast.parse(modules()[name].read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name.startswith("_")
    ]
    assert private == []


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_stay_where_users_import_them_from(module):
    imported_module = importlib.import_module(module)
    assert [name for name in PUBLIC[module].split() if not hasattr(imported_module, name)] == []
