"""Features of a frozen backbone: computed once, served only where they are right, trained on."""

import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from augmentation import NUM_TURNS, FlipsAndQuarterTurns, turn
from dataset import DatasetBuilder, create_dataloaders
from imaging.batches import to_float
from learning import features
from learning.features import FeatureLoader, cache_features
from models import BACKBONES, get_model, load_model
from predict import predict
from tests.samples import small_backbone, training_flags
from train_models import main
from training import evaluate, make_optimizer, train, warmup_cosine

COUNTS = {"a": 24, "b": 16, "c": 12}


@pytest.fixture
def folder(make_images):
    return make_images(COUNTS)


def make_loaders(folder, image_size=32, batch_size=8, **options):
    splits, _ = DatasetBuilder(folder, image_size=image_size).build()
    return create_dataloaders(splits, batch_size=batch_size, device="cpu", **options)


@pytest.fixture(autouse=True)
def small_head(monkeypatch):
    """`small_head` is a model, whose backbone is much faster than a ResNet."""
    monkeypatch.setitem(BACKBONES, "small", small_backbone())


def head_model(seed=0, name="small_head"):
    options = {"layers": 18, "weights": None, "image_size": 32, "dropout_rate": 0.2, "seed": seed}
    return get_model(name, 3, **options)


def run(model, loaders, num_steps=6, **options):
    optimizer = make_optimizer(model, 1e-2)
    arguments = {"eval_every": 3, "scheduler": warmup_cosine(optimizer, num_steps)} | options
    return train(model, loaders["train"], loaders["valid"], 3, num_steps, optimizer, **arguments)


def same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def feature_files(folder):
    return sorted((folder.parent / "processed").glob("*/features-*.npy"))


def leftovers(folder):
    found = (folder.parent / "processed").rglob("*features*")
    return [path for path in found if path not in feature_files(folder)]


@pytest.fixture
def computed(monkeypatch):
    """How many images features have been computed of, a number a batch and view."""
    counts = []

    def compute(model, images, *others):
        counts.append(len(images))
        return compute_features(model, images, *others)

    compute_features = features.compute_features
    monkeypatch.setattr(features, "compute_features", compute)
    return counts


# ---------------------------------------------------------------------------- the features


def test_a_view_has_the_features_of_the_image_turned(folder):
    loaders, model = make_loaders(folder), head_model(name="resnet_head")
    cached = cache_features(model, loaders, precision="fp32")["train"].features
    dataset = loaders["train"].dataset
    images = to_float(torch.from_numpy(dataset.gather(np.arange(5))))
    views = [np.rot90(images, k, (2, 3)) for k in (0, 2, 1, 3)]
    views = [view for each in views for view in (each, each[:, :, :, ::-1])]
    assert cached.shape == (len(dataset), NUM_TURNS, 512)
    for number, view in enumerate(views):
        with torch.no_grad():
            expected = model.features(torch.from_numpy(view.copy()))
        assert torch.allclose(cached[:5, number], expected, atol=1e-5), number
    assert not torch.allclose(cached[:5, 0], cached[:5, 1], atol=1e-4)


def test_the_eight_views_are_all_there_are():
    image = torch.arange(9.0).view(1, 1, 3, 3)
    views = {tuple(turn(image, view).flatten().tolist()) for view in range(NUM_TURNS)}
    assert len(views) == NUM_TURNS
    turned_again = {
        tuple(turn(turn(image, first), second).flatten().tolist())
        for first in range(NUM_TURNS)
        for second in range(NUM_TURNS)
    }
    assert turned_again == views
    drawn = torch.arange(NUM_TURNS)
    found, _ = FlipsAndQuarterTurns().apply(image.expand(NUM_TURNS, -1, -1, -1), drawn, drawn)
    assert all(torch.equal(found[k : k + 1], turn(image, k)) for k in range(NUM_TURNS))


def test_validation_and_training_without_augmentation_have_the_image_as_it_is(folder):
    loaders, model = make_loaders(folder, augmentation=False), head_model()
    cached = cache_features(model, loaders, precision="fp32")
    assert cached["train"].features.shape[1] == cached["valid"].features.shape[1] == 1
    assert cached["test"] is loaders["test"]
    expected = evaluate(model, loaders["valid"], precision="fp32")
    found = evaluate(model, cached["valid"], precision="fp32")
    assert np.array_equal(found.labels, expected.labels)
    assert np.allclose(found.probabilities, expected.probabilities, atol=1e-6)


@pytest.mark.parametrize("balanced", [False, True])
def test_training_on_cached_features_is_training_on_images_in_the_same_views(
    folder, tmp_path, balanced
):
    # Live, the same policy draws the same views, so that all but rounding is the same.
    live = make_loaders(folder, augmentation="flips_and_quarter_turns", balanced=balanced)
    loaders = make_loaders(folder, balanced=balanced)
    options = {"precision": "fp32", "class_weights": [1.0, 2.0, 3.0], "accumulate": 2}
    expected, history = run(head_model(), live, **options)
    model = head_model()
    cached = cache_features(model, loaders, precision="fp32")
    found, history_of_cached = run(model, cached, save_path=tmp_path / "m", **options)
    expected, found = expected.state_dict(), found.state_dict()
    assert all(torch.allclose(expected[k], found[k], atol=1e-4) for k in expected)
    for name in set(history) - {"images_per_second"}:
        assert np.allclose(history[name], history_of_cached[name], atol=1e-3), name
    _, info = load_model(tmp_path / "m/model.pth")
    assert info.image_size == 32 and info.classes == ["a", "b", "c"]


def test_the_batches_of_two_ranks_are_those_of_one(folder):
    model = head_model()
    one = cache_features(model, make_loaders(folder, batch_size=8))["train"]
    parts = [
        FeatureLoader(make_loaders(folder, batch_size=4, rank=rank, world_size=2)["train"],
                      one.features)
        for rank in range(2)
    ]  # fmt: skip
    (inputs, labels), *of_ranks = (next(each.batches(start=3)) for each in (one, *parts))
    assert torch.equal(torch.cat([own["features"] for own, _ in of_ranks]), inputs["features"])
    assert torch.equal(torch.cat([own for _, own in of_ranks]), labels)


def test_bf16_is_computed_and_kept_apart_from_fp32(folder):
    model, loaders = head_model(), make_loaders(folder)
    fp32 = cache_features(model, loaders, precision="fp32")["valid"].features
    bf16 = cache_features(model, loaders, precision="bf16")["valid"].features
    assert torch.equal(bf16, bf16.bfloat16().float()) and not torch.equal(fp32, bf16)
    assert torch.allclose(fp32, bf16, rtol=0.1, atol=0.1)


def test_only_a_frozen_backbone_has_features_to_keep(folder):
    model = get_model("resnet_scratch", 3, layers=18, image_size=32)
    with pytest.raises(ValueError, match="only a frozen backbone has features that stay the same"):
        cache_features(model, make_loaders(folder))
    assert feature_files(folder) == []


def test_a_model_of_ones_own_must_take_features(folder, monkeypatch):
    model = head_model()
    monkeypatch.setattr(model, "forward", lambda images: None, raising=False)
    with pytest.raises(ValueError, match="BackboneClassifier.forward does not take features"):
        cache_features(model, make_loaders(folder))


def test_further_inputs_stay_beside_the_features(folder):
    splits, _ = DatasetBuilder(folder, image_size=32).build()
    for split in splits.values():
        split.add_input("age", torch.arange(len(split)))
    loaders = cache_features(head_model(), create_dataloaders(splits, batch_size=8, device="cpu"))
    inputs, labels = next(loaders["train"].batches())
    assert inputs.keys() == {"features", "age"}
    assert torch.equal(labels, torch.from_numpy(splits["train"].labels)[inputs["age"]])
    first, _ = next(iter(loaders["valid"]))
    assert torch.equal(first["features"], loaders["valid"].features[:8, 0])


# ---------------------------------------------------------------------------- on the disk


def test_weights_are_the_same_whether_features_are_computed_or_read(folder, computed):
    models = [head_model(name="resnet_head"), head_model(name="resnet_head")]
    first, _ = run(models[0], cache_features(models[0], make_loaders(folder)))
    assert sum(computed) > 0
    before = {path: path.stat().st_mtime_ns for path in feature_files(folder)}
    computed.clear()
    second, _ = run(models[1], cache_features(models[1], make_loaders(folder)))
    assert computed == [] and same_weights(first, second)
    assert {path: path.stat().st_mtime_ns for path in feature_files(folder)} == before
    assert len(before) == 2 and leftovers(folder) == []


def test_whatever_features_depend_on_makes_others(folder, computed, monkeypatch):
    def is_computed(model=None, precision="fp32", **options):
        computed.clear()
        cache_features(model or head_model(), make_loaders(folder, **options), precision=precision)
        return len(computed) > 0

    assert is_computed() and not is_computed()
    assert is_computed(image_size=40) and not is_computed()
    assert is_computed(batch_size=4)
    assert is_computed(augmentation=False)
    assert is_computed(precision="bf16")
    other = head_model()
    with torch.no_grad():
        other.backbone[1].running_var[0] += 1e-3
    assert is_computed(model=other)
    assert not is_computed(model=head_model(seed=0))
    other = head_model()
    with torch.no_grad():  # training changes the head, on which no feature depends
        other.head[0].weight.mul_(2)
    assert not is_computed(model=other)
    other.backbone[2] = nn.LeakyReLU(0.1)
    assert is_computed(model=other)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert is_computed() and not is_computed()
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(torch, "__version__", "0.0.0")
    assert is_computed() and not is_computed()
    monkeypatch.setattr(features, "_name_of_processor", lambda: "another")
    assert is_computed() and not is_computed()


def test_features_of_images_that_have_changed_are_not_served(folder, computed):
    model = head_model()
    before = cache_features(model, make_loaders(folder))["valid"]
    path = folder / before.dataset.metadata["path"][0]
    Image.fromarray(np.full((40, 40, 3), 200, np.uint8)).save(path)
    computed.clear()
    after = cache_features(model, make_loaders(folder))["valid"]
    assert computed != []
    row = after.dataset.metadata["path"].tolist().index(path.relative_to(folder).as_posix())
    assert not torch.allclose(before.features[0], after.features[row])
    assert len(feature_files(folder)) == 2  # those of the former images are gone


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_is_interrupted_leaves_nothing_half(folder, monkeypatch, error):
    model, compute_features, calls = head_model(), features.compute_features, []

    def compute(*arguments):
        calls.append(1)
        if len(calls) == 11:
            raise error
        return compute_features(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(features, "compute_features", compute)
        with pytest.raises(type(error) if isinstance(error, OSError) else error) as raised:
            cache_features(model, make_loaders(folder))
    assert feature_files(folder) == leftovers(folder) == []
    if isinstance(error, OSError):
        assert "--cache_dir" in str(raised.value) and "features-" in str(raised.value)
    assert len(cache_features(model, make_loaders(folder))["train"].features) > 0


def test_a_file_that_is_cut_short_or_empty_is_written_anew(folder, computed):
    model = head_model()
    expected = cache_features(model, make_loaders(folder))["valid"].features.clone()
    for path in feature_files(folder):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    computed.clear()
    found = cache_features(model, make_loaders(folder))["valid"].features
    assert torch.equal(found, expected) and computed != []
    for path in feature_files(folder):
        path.write_bytes(b"")
    assert torch.equal(cache_features(model, make_loaders(folder))["valid"].features, expected)


def test_features_are_read_from_a_folder_that_cannot_be_written_to(
    folder, without_the_rights_of_root
):
    model = head_model()
    cache_features(model, make_loaders(folder))
    cache = feature_files(folder)[0].parent
    cache.chmod(0o555)
    try:
        with without_the_rights_of_root():
            cache_features(model, make_loaders(folder))
            with pytest.raises(PermissionError, match="choose another folder with --cache_dir"):
                cache_features(head_model(seed=1), make_loaders(folder))
    finally:
        cache.chmod(0o755)


def test_too_many_features_are_computed_at_each_step(folder, monkeypatch):
    model, loaders = head_model(), make_loaders(folder)
    size = features.size_of_features(model, loaders)
    train_size, valid_size = len(loaders["train"].dataset), len(loaders["valid"].dataset)
    assert size == (8 * train_size + valid_size) * 8 * 4
    monkeypatch.setattr(features, "MAX_BYTES", size - 1)
    with pytest.warns(UserWarning, match="the features of small_head would take 0.0 GB"):
        assert cache_features(model, loaders) == loaders
    assert feature_files(folder) == []
    monkeypatch.setattr(features, "MAX_BYTES", size)
    with warnings.catch_warnings(action="error"):
        assert isinstance(cache_features(model, loaders)["train"], FeatureLoader)


# ---------------------------------------------------------------------------- resuming


class Stopped(Exception):
    pass


def stopped_after(loader, num_batches):
    """Has the loader stop the training when it is asked for one batch more."""
    batches = loader.batches

    def some(start=0):
        for number, batch in enumerate(batches(start)):
            if number == num_batches:
                raise Stopped
            yield batch

    loader.batches = some


def test_a_resumed_run_has_the_weights_of_an_uninterrupted_one(folder, tmp_path):
    model = head_model()
    whole, _ = run(model, cache_features(model, make_loaders(folder)), num_steps=7)
    model = head_model()
    loaders = cache_features(model, make_loaders(folder))
    stopped_after(loaders["train"], 4)
    options = {"num_steps": 7, "save_path": tmp_path / "m", "checkpoint_every": 2}
    with pytest.raises(Stopped):
        run(model, loaders, **options)
    for path in feature_files(folder):
        path.unlink()  # and they are computed again
    model = head_model()
    loaders = cache_features(model, make_loaders(folder))
    resumed, history = run(model, loaders, resume=True, **options)
    assert same_weights(whole, resumed) and history["step"] == [3, 6, 7]


@pytest.mark.parametrize("is_cached", [False, True])
def test_a_run_is_resumed_only_with_features_as_before(folder, tmp_path, is_cached):
    def loaders(model, is_cached):
        made = make_loaders(folder, augmentation=False)
        return cache_features(model, made) if is_cached else made

    model = head_model()
    run(model, loaders(model, is_cached), save_path=tmp_path / "m")
    model = head_model()
    with pytest.raises(ValueError, match="belongs to another run: cached_features is "):
        run(model, loaders(model, not is_cached), save_path=tmp_path / "m", resume=True)


# ---------------------------------------------------------------------------- the command


@pytest.fixture
def arguments(folder, tmp_path):
    flags = training_flags(folder, tmp_path / "out", layers=18, weights="none", num_steps=4)
    return [*flags, "--models", "resnet_head", "--precision", "fp32"]


def test_the_command_trains_on_them_and_its_model_predicts_as_it_was_tested(
    arguments, folder, tmp_path, no_figures, capfd
):
    assert main([*arguments, "--cached_features"]) == 0
    assert len(feature_files(folder)) == 2
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["settings"]["cached_features"] is True
    assert config["runs"]["resnet_head"]["features"] == "cached"
    tested = pd.read_csv(tmp_path / "out/resnet_head/predictions.csv")
    images = [folder / path for path in tested["path"]]
    predicted = predict(tmp_path / "out/resnet_head", images, precision="fp32", device="cpu")
    assert (predicted["class"] == tested["predicted_class"]).all()
    probabilities = predicted.filter(like="prob_").to_numpy()
    assert np.allclose(probabilities, tested.filter(like="prob_"), atol=1e-5)
    assert main([*arguments, "--cached_features"]) == 0  # already finished
    assert "already finished" in capfd.readouterr().out
    assert main(arguments) == 2
    message = "cached_features is False, but was True"
    assert message in capfd.readouterr().err


def test_the_command_says_that_features_are_too_large_and_trains_without(
    arguments, folder, tmp_path, monkeypatch, no_figures, capfd
):
    monkeypatch.setattr(features, "MAX_BYTES", 1000)
    assert main([*arguments, "--cached_features"]) == 0
    (warning,) = [line for line in capfd.readouterr().err.splitlines() if "features" in line]
    assert warning.startswith("train_models.py: warning: the features of resnet_head would take")
    assert feature_files(folder) == []
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["runs"]["resnet_head"]["features"] == "live"


def test_without_a_frozen_backbone_the_flag_is_said_to_have_no_effect(
    arguments, folder, no_figures, capfd
):
    words = [*arguments, "--models", "simple_cnn", "--cached_features"]
    assert main(words) == 0
    said = "train_models.py: warning: --cached_features has no effect with --models simple_cnn"
    assert said in capfd.readouterr().err
    assert feature_files(folder) == []


def test_two_processes_wait_for_one_that_computes_the_features(
    arguments, folder, start_processes, tmp_path, no_figures
):
    root = Path(__file__).parents[2]
    words = [*arguments, "--cached_features", "--batch_size", "4", "--dropout_rate", "0"]
    both = start_processes(root / "train_models.py", *words)
    (printed, errors), _ = (each.communicate(timeout=240) for each in both)
    assert [each.returncode for each in both] == [0, 0], errors
    assert printed.count("Everything is in") == 1 and len(feature_files(folder)) == 2
    one = [*words, "--batch_size", "8", "--save_dir", str(tmp_path / "one")]
    assert main(one) == 0
    expected, found = (
        load_model(tmp_path / name / "resnet_head/model.pth")[0].state_dict()
        for name in ("one", "out")
    )
    assert all(torch.allclose(expected[key], found[key], atol=1e-4) for key in expected)
