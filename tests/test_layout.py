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
    "storage.files", "storage.progress", "storage.tensors", "storage.weights",
    "imaging.lesions", "imaging.classes", "imaging.decode", "imaging.heatmaps",
    "imaging.synthetic", "imaging.audit", "imaging.prepare", "imaging.tables", "imaging.labels",
    "imaging.folders", "imaging.medmnist", "imaging.published", "imaging.layouts",
    "imaging.sources", "imaging.splits", "imaging.cache", "imaging.batches",
    "augmentation", "dataset",
    "evaluation.metrics", "evaluation.intervals", "evaluation.calibration", "evaluation.screening",
    "evaluation.subgroups", "evaluation.merging", "evaluation",
    "storage.model_file", "learning.backbones", "models",
    "learning.allocator", "learning.processes", "learning.hardware", "learning.distributed",
    "learning.losses", "learning.features", "learning.checkpoints",
    "training", "visualizations",
    "inference.options", "inference.files", "inference.feature_maps", "inference.explain",
    "inference.ensemble", "inference.features", "inference.export",
    "experiment.console", "experiment.run_folder", "experiment.settings",
    "experiment.prediction_settings",
    "experiment.run_files", "experiment.verdict", "experiment.report",
    "experiment.checks", "experiment.images", "experiment.results", "experiment.external",
    "experiment.stages", "experiment.pipeline",
    "train_models", "predict",
)  # fmt: skip
# What users import, by the module that they import it from.
PUBLIC = {
    "dataset": """
        DEFAULT_SPLITS DatasetBuilder EVALUATION_BATCHES IMAGE_SUFFIXES LesionDataset
        LesionLoader MAX_REPETITIONS METADATA_COLUMNS MAX_REPEATS MOST_REPEATS Preprocessor
        SECONDS_OF_PROBING SHARE_OF_GPU_FOR_IMAGES SPLIT_FOLDERS STEM_COLUMNS
        UNSUPPORTED_SUFFIXES UnreadableImageError balanced_frequencies center_crop
        check_seed create_dataloaders derive_seed find_images fingerprint group_images
        has_folder_of_split join_table k_fold_splits normalize prepare_image read_image
        read_table resize stratified_split to_float
    """,
    "models": """
        ClassificationHead FinetunedHeadResNet FinetunedResNet IMAGENET_MEAN IMAGENET_STD
        LARGEST_IMAGE LesionClassifier ModelInfo RESNETS ResNetFromScratch SimpleCNN
        count_parameters evaluation_mode get_model imagenet_weights is_pretrained
        load_model
    """,
    "training": """
        Evaluation NonFiniteLossError PRECISIONS SECONDS_BETWEEN_CHECKPOINTS
        SECONDS_BETWEEN_EXCHANGES SECONDS_OF_ONE_SIGNAL choose_device compute_metrics
        evaluate logger make_optimizer name_of_precision resolve_precision train
        warmup_cosine
    """,
    "augmentation": """
        NOISE_TABLE_SIZE Views add_noise_to_batch adjust_batch_brightness
        adjust_batch_contrast apply_views augment_batch draw_views flip_batch_horizontally
        flip_batch_vertically rotate_batch
    """,
    "visualizations": """
        overlay_heatmap plot_augmentations plot_class_distribution plot_class_metrics
        plot_confusion_matrix plot_gradcams plot_learning_curves plot_mistakes
        plot_model_comparison plot_pairs plot_reliability plot_roc_pr_curves plot_samples
    """,
    "train_models": """
        DEMO_SETTINGS MODEL_NAMES NOT_RESULTS OF_AUDIT PROGRAM Settings command main
        parse_arguments run
    """,
    "predict": """
        AIM BATCHES_AHEAD Ensemble MOST_ROWS_PRINTED NUM_VIEWS ONNX_PACKAGES PROGRAM Paths
        SMALLEST_MAP Settings WIDEST_PATH WITHOUT_EFFECT export_onnx find_files gradcam
        main parse_arguments predict predict_batches run
    """,
    "evaluation": """
        AGE_BANDS AIMS Calibration HEADLINES MALIGNANT MAX_COUNTS_AT_ONCE MOST_SUBGROUPS
        NUM_BINS NUM_RESAMPLES SMALLEST_SUBGROUP Z assess choose_thresholds compare
        compute_intervals compute_metrics compute_subgroups counted_as evaluate_predictions
        effective_sample_size fit_calibration left_out_of_screening match_classes
        most_confident_mistakes reliability screen screening_targets screening_warnings
        typical_examples why_screening_is_off wilson_interval
    """,
}


def find_modules():
    found = {path.stem: path for path in ROOT.glob("*.py")}
    for package in PACKAGES:
        for path in (ROOT / package).glob("*.py"):
            name = package if path.stem == "__init__" else f"{package}.{path.stem}"
            if path.stem != "__init__" or path.read_text():
                found[name] = path
    return found


MODULES = find_modules()


def imported(path):
    """The modules of the project that a file imports, wherever in the file it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in inside if name in MODULES)
            if node.module in MODULES and not all(name in MODULES for name in inside):
                yield node.module


def test_the_root_holds_the_seven_modules_that_people_use():
    assert {path.stem for path in ROOT.glob("*.py")} == ROOT_MODULES


def test_every_module_has_its_place_in_the_order():
    assert sorted(MODULES) == sorted(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_from_those_before_it(name):
    before = ORDER[: ORDER.index(name)]
    assert [other for other in imported(MODULES[name]) if other not in before] == []


@pytest.mark.parametrize("name", ORDER)
def test_no_module_imports_a_private_name_of_another(name):
    private = [
        alias.name
        for node in ast.walk(ast.parse(MODULES[name].read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name.startswith("_")
    ]
    assert private == []


def functions(node, within=""):
    """The functions below a node of the syntax tree, by name, such as `Class.method`."""
    for child in ast.iter_child_nodes(node):
        name = within
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            name = f"{within}.{child.name}".lstrip(".")
        if isinstance(child, ast.FunctionDef):
            yield name, child
        yield from functions(child, name)


@pytest.mark.parametrize("name", ORDER)
def test_no_function_is_longer_than_60_lines(name):
    found = functions(ast.parse(MODULES[name].read_text()))
    assert [each for each, node in found if node.end_lineno - node.lineno >= 60] == []


@pytest.mark.parametrize("name", ORDER)
def test_no_function_has_more_than_8_parameters_but_those_that_users_call(name):
    def count(arguments):
        given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        return len([each for each in given if each.arg not in ("self", "cls")])

    public = PUBLIC.get(name, "").split()
    tree = ast.parse(MODULES[name].read_text())
    found = [each for each, node in functions(tree) if count(node.args) > 8]
    assert [each for each in found if each.removesuffix(".__init__") not in public] == []


@pytest.mark.parametrize("name", ORDER)
def test_no_module_has_more_than_500_lines_but_the_one_of_the_figures(name):
    assert name == "visualizations" or len(MODULES[name].read_text().splitlines()) <= 500


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_stay_where_users_import_them_from(module):
    imported_module = importlib.import_module(module)
    assert [name for name in PUBLIC[module].split() if not hasattr(imported_module, name)] == []
