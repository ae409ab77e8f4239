"""The four classifiers: what they are made of, where weights come from, and back from disk."""

import urllib.error
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dataset import DatasetBuilder, create_dataloaders
from evaluation import Calibration, group_by_malignancy
from inference.explain import gradcam
from models import (
    BACKBONES,
    MODELS,
    Backbone,
    FinetunedHeadResNet,
    FinetunedResNet,
    ModelInfo,
    ResNetFromScratch,
    SimpleCNN,
    check_model_name,
    count_parameters,
    get_model,
    imagenet_weights,
    is_pretrained,
    load_model,
)
from storage.tensors import save_tensors
from training import make_optimizer, train

NAMES = ["simple_cnn", "resnet_scratch", "resnet_head", "resnet_finetuned"]
SCRATCH, PRETRAINED = NAMES[:2], NAMES[2:]
URL_18 = "https://download.pytorch.org/models/resnet18-f37072fd.pth"
FILE_18 = "resnet18-f37072fd.pth"

each_model = pytest.mark.parametrize("name", NAMES)
each_pretrained_model = pytest.mark.parametrize("name", PRETRAINED)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture(autouse=True)
def downloads(monkeypatch, tmp_path):
    """Every download asked for; none is made, and torch's own cache of weights stays unseen."""
    asked = []

    def refuse(url, *arguments, **keywords):
        asked.append(url)
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    return asked


def small_model(name="resnet_finetuned", num_classes=3, **arguments):
    defaults = {"layers": 18, "weights": None, "image_size": 32, "seed": 0}
    return get_model(name, num_classes, **{**defaults, **arguments})


def images(count=2, size=32, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def copy_of(state_dict):
    return {name: tensor.clone() for name, tensor in state_dict.items()}


def is_same(state_dict, other):
    return state_dict.keys() == other.keys() and all(
        torch.equal(tensor, other[name]) for name, tensor in state_dict.items()
    )


def train_steps(model, count=3):
    """AdamW with weight decay over all parameters, on random images."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    model.train()
    for step in range(count):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images(4, seed=step)), torch.tensor([0, 1, 2, 0]))
        loss.backward()
        optimizer.step()


def torchvision_resnet18():
    """A torchvision ResNet with random weights and batch-norm statistics of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = torchvision.models.resnet18(weights=None)
        model.train()(images())
    return model


def backbone_of(model):
    return model.backbone.state_dict()


def without_fc(state_dict):
    return {name: tensor for name, tensor in state_dict.items() if not name.startswith("fc.")}


@pytest.fixture(scope="module")
def resnet18():
    return torchvision_resnet18().state_dict()


@pytest.fixture
def imagenet_file(tmp_path, resnet18):
    """A file of ResNet-18 weights where torchvision would have put its download."""
    path = tmp_path / "torch_home" / "hub" / "checkpoints" / FILE_18
    path.parent.mkdir(parents=True)
    torch.save(resnet18, path)
    return path


# What they are made of


@pytest.mark.parametrize(
    ("name", "parameters", "trainable"),
    [
        ("simple_cnn", 3_365_065, 3_365_065),
        ("resnet_scratch", 24_066_633, 24_066_633),
        ("resnet_head", 24_066_633, 558_601),
        ("resnet_finetuned", 24_066_633, 24_066_633),
    ],
)
def test_the_parameters_for_nine_classes_are_as_many_as_published(name, parameters, trainable):
    with torch.device("meta"):
        model = get_model(name, 9, weights=None)
    assert count_parameters(model) == parameters
    assert count_parameters(model, trainable_only=True) == trainable


@pytest.mark.parametrize(
    ("layers", "blocks", "features"),
    [(18, [2, 2, 2, 2], 512), (34, [3, 4, 6, 3], 512), (50, [3, 4, 6, 3], 2048)],
)
@pytest.mark.parametrize("name", NAMES[1:])
def test_a_resnet_has_the_depth_asked_for(name, layers, blocks, features):
    with torch.device("meta"):
        model = get_model(name, 4, layers=layers, weights=None)
        assert model.features(torch.rand(2, 3, 32, 32)).shape == (2, features)
    stages = [getattr(model.backbone, f"layer{i}") for i in range(1, 5)]
    assert [len(stage) for stage in stages] == blocks


@pytest.mark.parametrize(
    ("name", "layers"),
    [*((name, 18) for name in NAMES), ("resnet_scratch", 34), ("resnet_head", 50)],
)
def test_logits_are_float32_one_row_an_image_one_column_a_class(name, layers):
    model = small_model(name, num_classes=5, layers=layers).eval()
    logits = model(images(3))
    assert logits.shape == (3, 5)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()


@each_model
def test_the_head_is_dense_256_dense_128_dense_classes_with_dropout_between(name):
    model = small_model(name, num_classes=7, dropout_rate=0.3)
    dense = [layer for layer in model.head.modules() if isinstance(layer, nn.Linear)]
    dropouts = [layer for layer in model.head.modules() if isinstance(layer, nn.Dropout)]
    assert [layer.out_features for layer in dense] == [256, 128, 7]
    assert [layer.p for layer in dropouts] == [0.3, 0.3]
    assert all(layer.p == 0.7 for layer in SimpleCNN(3).modules() if isinstance(layer, nn.Dropout))


@each_model
def test_dropout_acts_in_training_alone(name):
    model = small_model(name)
    model.backbone.eval()  # for batch norm gives other features in training
    features = model.features(images())
    assert not torch.equal(model.head(features), model.head(features))
    model.eval()
    assert torch.equal(model(images()), model(images()))


@each_model
def test_the_name_gives_the_class_that_bears_it(name):
    expected = {
        "simple_cnn": SimpleCNN,
        "resnet_scratch": ResNetFromScratch,
        "resnet_head": FinetunedHeadResNet,
        "resnet_finetuned": FinetunedResNet,
    }
    assert list(MODELS) == NAMES
    assert type(small_model(name)) is expected[name]
    assert is_pretrained(name) == (name in PRETRAINED)


@each_model
def test_images_are_normalised_to_imagenets_mean_and_deviation_before_the_backbone(name):
    model = small_model(name).eval()
    seen = []
    model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(images())
    of_torchvision = torchvision.models.ResNet50_Weights.DEFAULT.transforms()
    normalise = torchvision.transforms.Normalize(of_torchvision.mean, of_torchvision.std)
    assert torch.allclose(seen[0], normalise(images()), atol=1e-6)


@each_model
def test_the_mean_and_deviation_are_neither_trained_nor_saved(name):
    model = small_model(name)
    saved = {key.split(".")[0] for key in model.state_dict()}
    trained = {key.split(".")[0] for key, _ in model.named_parameters()}
    assert saved == trained == {"backbone", "head"}


@pytest.mark.parametrize(("image_size", "features"), [(11, 64), (64, 1024), (224, 12544)])
def test_the_dense_layer_of_simple_cnn_follows_the_image_size(image_size, features):
    model = get_model("simple_cnn", 3, image_size=image_size)
    assert model(images(2, image_size)).shape == (2, 3)
    assert count_parameters(model.backbone) == 2_432 + 51_264 + 256 * features + 256


@settings(deadline=None, max_examples=40)
@given(st.integers(11, 100))
def test_simple_cnn_works_at_any_image_size_from_11_up(image_size):
    model = get_model("simple_cnn", 3, image_size=image_size)
    assert model(images(1, image_size)).shape == (1, 3)


@pytest.mark.parametrize("image_size", [10, 1, 0, -224])
def test_an_image_size_too_small_for_simple_cnn_is_refused(image_size):
    with pytest.raises(ValueError, match="at least 11"):
        get_model("simple_cnn", 3, image_size=image_size)


@each_model
def test_the_config_rebuilds_the_model(name):
    model = small_model(name, num_classes=4, dropout_rate=0.25)
    rebuilt = get_model(**model.config)
    assert rebuilt.config == model.config
    assert str(rebuilt) == str(model)
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt.eval()(images()), model.eval()(images()))


# Precision


@each_model
def test_logits_stay_float32_under_bf16_autocast(name):
    model = small_model(name).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images()).dtype == torch.float32


def test_images_whose_logits_would_tie_in_bf16_are_told_apart_under_autocast():
    model = small_model("simple_cnn").eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(images(64))[:, 0]
    assert len(logits.unique()) == 64
    assert len(logits.bfloat16().unique()) < 64


@each_model
def test_the_head_runs_in_float32_forwards_and_backwards_under_autocast(name):
    model = small_model(name, image_size=16)
    seen = []
    for layer in model.head:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = nn.functional.cross_entropy(model(images(2, 16)), torch.tensor([0, 1]))
    loss.backward()
    assert seen == [torch.float32] * 7
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.head.parameters())


@needs_cuda
@each_model
def test_logits_stay_float32_under_bf16_autocast_on_the_gpu(name):
    model = small_model(name).eval().cuda()
    with torch.autocast("cuda", torch.bfloat16):
        logits = model(images().cuda())
    assert (logits.dtype, logits.device.type) == (torch.float32, "cuda")


# The frozen backbone


def test_a_frozen_backbone_is_bit_identical_after_training(resnet18):
    model = small_model("resnet_head")
    model.backbone.load_state_dict(without_fc(resnet18))
    backbone, head = copy_of(backbone_of(model)), copy_of(model.head.state_dict())
    train_steps(model)
    assert is_same(backbone_of(model), backbone)  # batch-norm statistics included
    changed = [not torch.equal(model.head.state_dict()[name], head[name]) for name in head]
    assert len(changed) == 6
    assert all(changed)


def test_a_frozen_backbone_stays_in_evaluation_mode_while_the_head_trains():
    model = small_model("resnet_head")
    for mode in (True, False, True):
        assert model.train(mode) is model
        assert not any(module.training for module in model.backbone.modules())
        assert all(module.training == mode for module in model.head.modules())
    assert model.training


def test_no_gradient_reaches_a_frozen_backbone():
    model = small_model("resnet_head")
    assert not model.features(images()).requires_grad
    model(images()).sum().backward()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert all(parameter.grad is not None for parameter in model.head.parameters())


def test_the_features_of_a_frozen_backbone_do_not_depend_on_the_rest_of_the_batch():
    model = small_model("resnet_head").train()
    alone, together = model.features(images(4)[:1]), model.features(images(4))[:1]
    assert torch.allclose(alone, together, atol=1e-5)


@pytest.mark.parametrize("name", ["simple_cnn", "resnet_scratch", "resnet_finetuned"])
def test_the_other_models_train_whole(name):
    model = small_model(name)
    before = copy_of(model.state_dict())
    train_steps(model, 1)
    unchanged = [
        key for key, value in model.state_dict().items() if torch.equal(value, before[key])
    ]
    assert unchanged == []  # batch-norm statistics included


# Random weights


@each_model
def test_the_same_seed_gives_the_same_weights_whatever_was_drawn_before(name):
    torch.manual_seed(1)
    model = small_model(name, seed=3)
    torch.manual_seed(2)
    assert is_same(small_model(name, seed=3).state_dict(), model.state_dict())
    assert not is_same(small_model(name, seed=4).state_dict(), model.state_dict())


@each_model
def test_building_with_a_seed_leaves_the_global_random_state_as_it_was(name):
    before = torch.get_rng_state()
    small_model(name, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_failure_to_build_leaves_the_global_random_state_as_it_was(tmp_path):
    before = torch.get_rng_state()
    with pytest.raises(FileNotFoundError):
        small_model("resnet_finetuned", weights=tmp_path / "none.pth")
    assert torch.equal(torch.get_rng_state(), before)


def test_models_of_one_seed_do_not_share_their_random_weights():
    scratch, finetuned = small_model("resnet_scratch"), small_model("resnet_finetuned")
    assert not torch.equal(scratch.backbone.conv1.weight, finetuned.backbone.conv1.weight)
    assert not torch.equal(scratch.head[0].weight, finetuned.head[0].weight)


def test_without_a_seed_weights_come_from_the_global_random_state():
    torch.manual_seed(1)
    first, second = (small_model("simple_cnn", seed=None) for _ in range(2))
    torch.manual_seed(1)
    again = small_model("simple_cnn", seed=None)
    assert is_same(first.state_dict(), again.state_dict())
    assert not is_same(first.state_dict(), second.state_dict())


# Pretrained weights


@each_pretrained_model
def test_imagenet_weights_come_from_the_file_that_torchvision_downloads(
    name, imagenet_file, resnet18, downloads
):
    model = small_model(name, weights="imagenet")
    assert is_same(backbone_of(model), without_fc(resnet18))
    assert downloads == []


@each_pretrained_model
@pytest.mark.parametrize("kind", [str, Path])
def test_weights_come_from_the_file_that_is_given(name, kind, tmp_path, resnet18, downloads):
    path = tmp_path / "my weights.pth"
    torch.save(resnet18, path)
    model = small_model(name, weights=kind(path))
    assert is_same(backbone_of(model), without_fc(resnet18))
    assert downloads == []


def test_the_features_of_a_pretrained_model_are_those_of_torchvision(imagenet_file):
    reference = torchvision_resnet18().eval()
    reference.fc = nn.Identity()
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    expected = reference((images() - mean) / std)
    model = small_model(weights="imagenet").eval()
    assert torch.allclose(model.features(images()), expected, atol=1e-4)


def test_the_head_of_a_pretrained_model_depends_on_the_seed_alone(imagenet_file):
    heads = [small_model(weights="imagenet", seed=seed).head.state_dict() for seed in (3, 3, 4)]
    assert is_same(heads[0], heads[1])
    assert not is_same(heads[0], heads[2])


@each_pretrained_model
def test_without_weights_or_network_the_error_says_which_file_to_put_where(
    name, tmp_path, downloads
):
    with pytest.raises(FileNotFoundError) as caught:
        small_model(name, weights="imagenet")
    message = str(caught.value)
    assert URL_18 in message
    assert str(tmp_path / "torch_home" / "hub" / "checkpoints" / FILE_18) in message
    assert "--weights none" in message
    assert "no network" in message
    assert "\n" not in message
    assert downloads == [URL_18]


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.HTTPError(URL_18, 403, "Forbidden", None, None),
        TimeoutError("timed out"),
        PermissionError(13, "Permission denied"),
        RuntimeError('invalid hash value (expected "f37072fd", got "00000000")'),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_download_that_fails_in_any_way_is_a_file_not_found_error(monkeypatch, error):
    """torch.hub gives the RuntimeError for a download that was cut short or is another file."""

    def fail(*arguments, **keywords):
        raise error

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(FileNotFoundError, match="--weights none"):
        small_model(weights="imagenet")


def test_weights_are_downloaded_once_and_checked_against_their_hash(monkeypatch, resnet18):
    asked = []

    def download(url, destination, hash_prefix=None, progress=True):
        asked.append((url, hash_prefix))
        torch.save(resnet18, destination)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        model = small_model(weights="imagenet")
        assert is_same(backbone_of(model), without_fc(resnet18))
    assert asked == [(URL_18, "f37072fd")]


def test_the_weights_can_be_looked_for_without_a_download(tmp_path, downloads, resnet18):
    with pytest.raises(FileNotFoundError, match=FILE_18):
        imagenet_weights(18, download=False)
    assert downloads == []
    path = tmp_path / "torch_home" / "hub" / "checkpoints" / FILE_18
    path.parent.mkdir(parents=True)
    path.touch()
    assert imagenet_weights(18, download=False) == path


@pytest.mark.parametrize("name", SCRATCH)
def test_a_model_that_starts_from_random_weights_takes_no_notice_of_imagenet(
    name, imagenet_file, downloads
):
    model = small_model(name, weights="imagenet")
    assert is_same(model.state_dict(), small_model(name, weights=None).state_dict())
    assert downloads == []


@pytest.mark.parametrize("name", SCRATCH)
@pytest.mark.parametrize("kind", [str, Path])
def test_a_model_that_starts_from_random_weights_refuses_a_file_of_weights(
    name, kind, imagenet_file
):
    with pytest.raises(ValueError, match=f"{name} starts from random weights"):
        small_model(name, weights=kind(imagenet_file))


@pytest.mark.parametrize(("layers", "of_the_file"), [(18, 34), (34, 18), (50, 18)])
def test_weights_of_another_depth_are_an_error_that_names_the_file(layers, of_the_file, tmp_path):
    path = tmp_path / "other.pth"
    other = getattr(torchvision.models, f"resnet{of_the_file}")(weights=None)
    torch.save(other.state_dict(), path)
    with pytest.raises(ValueError, match=f"resnet{layers}") as caught:
        small_model(layers=layers, weights=path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "contents",
    [{}, [torch.zeros(2)], torch.zeros(2), {1: torch.zeros(2)}, {"state_dict": {}}, None],
    ids=["empty", "list", "tensor", "numbered", "nested", "none"],
)
def test_a_file_that_is_no_state_dict_of_a_resnet_is_an_error_that_names_it(tmp_path, contents):
    path = tmp_path / "other.pth"
    torch.save(contents, path)
    with pytest.raises(ValueError) as caught:
        small_model(weights=path)
    assert str(path) in str(caught.value)


def test_weights_that_are_not_there_are_a_file_not_found_error_that_names_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        small_model(weights=tmp_path / "none.pth")


# The table of backbones


@pytest.fixture
def toy(monkeypatch):
    """A backbone of two layers as an entry of the table, added from outside."""

    def build():
        layers = [nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(8, 6)), 6

    entry = Backbone(build, feature_maps=(("1", 4),), mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0))
    monkeypatch.setitem(BACKBONES, "toy", entry)
    return entry


@pytest.mark.parametrize("start", ["scratch", "head", "finetuned"])
def test_a_backbone_added_to_the_table_is_trained_saved_loaded_and_explained(
    toy, start, make_images, tmp_path
):
    splits, _ = DatasetBuilder(make_images({"a": 12, "b": 10, "c": 10}), image_size=16).build()
    loaders = create_dataloaders(splits, batch_size=8, device="cpu")
    model = get_model(f"toy_{start}", 3, weights=None, seed=0)
    before = copy_of(backbone_of(model))
    data = (loaders["train"], loaders["valid"], 3)
    model, _ = train(model, *data, 3, make_optimizer(model), eval_every=2, save_path=tmp_path)
    assert is_same(backbone_of(model), before) == (start == "head")

    loaded, info = load_model(tmp_path / "model.pth")
    assert info.config == model.config == get_model(**model.config).config
    assert is_same(loaded.state_dict(), model.state_dict())
    assert torch.allclose(loaded(images()), model(images()), atol=1e-6)
    assert torch.equal(loaded.mean.flatten(), torch.tensor(toy.mean))
    assert torch.equal(loaded.std.flatten(), torch.tensor(toy.std))
    assert model.backbone[:2](images()).shape == (2, 8, 8, 8)
    heatmaps = gradcam(loaded, images(), [0, 1])
    assert heatmaps.shape == (2, 32, 32) and np.isfinite(heatmaps).all()
    assert (np.ptp(heatmaps, axis=(1, 2)) > 0.1).any()


def test_weights_of_a_backbone_in_the_table_come_from_a_file_without_its_classifier(toy, tmp_path):
    weights = toy.build()[0].state_dict()
    save_tensors(tmp_path / "toy.pth", weights | {"fc.weight": torch.zeros(2, 6)})
    model = get_model("toy_finetuned", 3, weights=tmp_path / "toy.pth")
    assert is_same(backbone_of(model), weights)
    with pytest.raises(ValueError, match=r"not the weights of a resnet18 \("):
        get_model("resnet18_finetuned", 3, weights=tmp_path / "toy.pth")
    with pytest.raises(FileNotFoundError, match="toy has no default weights"):
        get_model("toy_finetuned", 3)
    with pytest.raises(ValueError, match="toy_scratch starts from random weights"):
        get_model("toy_scratch", 3, weights=tmp_path / "toy.pth")


def test_the_resnets_of_the_table_are_those_of_the_four_models(imagenet_file):
    for start, name in zip(["scratch", "head", "finetuned"], NAMES[1:], strict=True):
        ours, theirs = (small_model(n, weights="imagenet") for n in (f"resnet18_{start}", name))
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert count_parameters(ours, True) == count_parameters(theirs, True)
        ours.load_state_dict(theirs.state_dict())
        assert torch.equal(ours.eval()(images()), theirs.eval()(images()))
        assert is_pretrained(f"resnet18_{start}") == is_pretrained(name)


def test_names_of_models_can_be_checked_without_building_one(toy):
    for name in (*NAMES, "resnet34_head", "toy_scratch"):
        check_model_name(name)
    for name in ("toy", "toy_", "resnet_18", "", "simple_cnn_scratch"):
        with pytest.raises(ValueError, match=f"unknown model '{name}'; "):
            check_model_name(name)


def test_the_feature_maps_of_a_backbone_that_names_none_are_searched_for(toy, monkeypatch):
    model = get_model("toy_scratch", 3, seed=0)
    monkeypatch.setitem(BACKBONES, "toy", Backbone(toy.build, mean=toy.mean, std=toy.std))
    other = get_model("toy_scratch", 3, seed=0)
    assert np.array_equal(gradcam(other, images(), [0, 1]), gradcam(model, images(), [0, 1]))


def test_a_model_without_feature_maps_says_so_when_asked_for_them(monkeypatch):
    def build():
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 6)), 6

    monkeypatch.setitem(BACKBONES, "toy", Backbone(build))
    with pytest.raises(ValueError, match="feature maps"):
        gradcam(get_model("toy_scratch", 3), images(), [0, 1])


# What is refused


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"name": "resnet_scratched"}, "'resnet_scratched'; did you mean resnet_scratch"),
        ({"name": "resnet51_head"}, "unknown model 'resnet51_head'.* resnet50_head"),
        ({"name": "resnet18_frozen"}, "unknown model 'resnet18_frozen'"),
        ({"num_classes": 1}, "at least 2, not 1"),
        ({"num_classes": 0}, "at least 2, not 0"),
        ({"layers": 101}, "18, 34 or 50"),
        ({"dropout_rate": 1.0}, "dropout_rate must be .*, not 1.0"),
        ({"dropout_rate": -0.1}, "dropout_rate must be .*, not -0.1"),
        ({"dropout_rate": float("nan")}, "dropout_rate must be .*, not nan"),
    ],
    ids=str,
)
def test_arguments_without_sense_are_refused_with_the_ones_that_have(arguments, word):
    with pytest.raises(ValueError, match=word):
        small_model(**arguments)


# Back from disk


def contents_of(model, **changes):
    """What training writes to `model.pth`, with changes."""
    contents = {
        "config": model.config,
        "classes": ["melanoma", "nevus", "vascular lesion"],
        "image_size": 32,
        "preprocessors": "",
        "metrics": {"accuracy": 0.5, "per_class": {"nevus": {"recall": None}}},
        "state_dict": model.state_dict(),
    }
    return {**contents, **changes}


def assert_refused(path):
    """Loading is a ValueError of one line that names the file; gives the line."""
    with pytest.raises(ValueError) as caught:
        load_model(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@each_model
def test_a_loaded_model_gives_the_logits_of_the_one_that_was_saved(name, tmp_path, downloads):
    model = small_model(name, seed=5)
    train_steps(model, 1)
    contents = contents_of(model)
    save_tensors(tmp_path / "model.pth", contents)

    loaded, info = load_model(tmp_path / "model.pth")
    assert type(loaded) is type(model)
    assert not any(module.training for module in loaded.modules())
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    assert is_same(loaded.state_dict(), model.state_dict())
    assert torch.equal(loaded(images()), model.eval()(images()))
    assert loaded.config == model.config
    assert downloads == []
    del contents["state_dict"]
    assert {name: info[name] for name in contents} == contents


def test_a_model_from_pretrained_weights_is_loaded_without_them(tmp_path, imagenet_file, downloads):
    model = small_model("resnet_head", weights="imagenet")
    save_tensors(tmp_path / "model.pth", contents_of(model))
    imagenet_file.unlink()
    loaded, _ = load_model(str(tmp_path / "model.pth"))
    assert is_same(loaded.state_dict(), model.state_dict())
    assert count_parameters(loaded, trainable_only=True) == count_parameters(model.head)
    assert downloads == []


@pytest.mark.parametrize("weights", ["imagenet", "elsewhere.pth"])
def test_a_model_file_makes_no_other_file_be_read_or_downloaded(tmp_path, downloads, weights):
    path, model = tmp_path / "model.pth", small_model()
    save_tensors(path, contents_of(model, config={**model.config, "weights": weights}))
    loaded, _ = load_model(path)
    assert is_same(loaded.state_dict(), model.state_dict())
    assert downloads == []


def test_what_earlier_versions_left_out_of_the_file_has_no_effect(tmp_path):
    contents = contents_of(small_model("simple_cnn"))
    del contents["preprocessors"], contents["metrics"]
    save_tensors(tmp_path / "model.pth", contents)
    _, info = load_model(tmp_path / "model.pth")
    assert (info.preprocessors, info.precision, info.metrics) == ("", "", {})
    assert (info.temperature, info.bias) == (1.0, [0.0, 0.0, 0.0])
    assert info.thresholds == {}
    counted = group_by_malignancy(info.classes)  # what is not in the file is as by default
    assert info.malignant_classes == counted["malignant"]
    assert info.unknown_classes == counted["unknown"]
    assert info.calibration == Calibration(1.0, (0.0, 0.0, 0.0))


def test_what_a_model_file_says_can_be_read_as_attributes_and_as_a_mapping(tmp_path):
    contents = contents_of(small_model("simple_cnn"), temperature=1.5, bias=[0.1, 0.0, -0.1])
    save_tensors(tmp_path / "model.pth", contents)
    _, info = load_model(tmp_path / "model.pth")
    assert info["classes"] == info.classes == contents["classes"]
    assert info.get("bias") == [0.1, 0.0, -0.1] and info.get("colour", "red") == "red"
    assert "thresholds" in info and "state_dict" not in info and "others" not in info
    assert dict(info) == info and len(info) == len(list(info)) == len({**info})
    assert info.calibration == Calibration(1.5, (0.1, 0.0, -0.1))
    with pytest.raises(KeyError):
        info["colour"]
    with pytest.raises(FrozenInstanceError):
        info.temperature = 2.0


def test_what_training_writes_is_what_loading_gives(tmp_path):
    info = ModelInfo(
        config=small_model("simple_cnn").config, classes=["a", "b", "c"], image_size=32,
        preprocessors="f00d", precision="bf16", metrics={"loss": 1.0}, temperature=0.5,
        bias=[1.0, 0.0, -1.0], thresholds={"a": {"sensitivity 95%": 0.25}},
        malignant_classes=["a"], others={"later": [1, 2]},
    )  # fmt: skip
    contents = {**info, "state_dict": small_model("simple_cnn").state_dict()}
    save_tensors(tmp_path / "model.pth", contents)
    assert load_model(tmp_path / "model.pth")[1] == info


def test_what_later_versions_add_to_the_file_is_given_too(tmp_path):
    path, model = tmp_path / "model.pth", small_model("simple_cnn")
    save_tensors(path, contents_of(model, temperature=1.5, calibrated_on=[0.1, 0.2]))
    _, info = load_model(path)
    assert (info["temperature"], info["calibrated_on"]) == (1.5, [0.1, 0.2])


@pytest.mark.parametrize("key", ["config", "classes", "image_size", "state_dict"])
def test_a_file_without_a_key_is_an_error_that_names_file_and_key(tmp_path, key):
    contents = contents_of(small_model("simple_cnn"))
    del contents[key]
    save_tensors(tmp_path / "model.pth", contents)
    assert key in assert_refused(tmp_path / "model.pth")


@pytest.mark.parametrize("contents", [[1, 2], torch.zeros(3), "text", None, {}, {1: 2}], ids=repr)
def test_a_file_that_is_no_saved_model_is_an_error_that_names_it(tmp_path, contents):
    save_tensors(tmp_path / "model.pth", contents)
    assert_refused(tmp_path / "model.pth")


@pytest.mark.parametrize(
    "change",
    [
        {"num_classes": 4},
        {"num_classes": 1},
        {"num_classes": "three"},
        {"image_size": 64},
        {"image_size": 5},
        {"name": "resnet_scratch"},
        {"name": "vgg"},
        {"name": None},
        {"dropout_rate": 2.0},
        {"layers": 7},
        {"layers": None},
        {"colour": "red"},
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_its_weights_is_an_error_that_names_the_file(tmp_path, change):
    model = small_model("simple_cnn")
    config = {**model.config, **change}
    save_tensors(tmp_path / "model.pth", contents_of(model, config=config))
    assert_refused(tmp_path / "model.pth")


@pytest.mark.parametrize("config", [None, [], "simple_cnn", {}, {1: 2}], ids=repr)
def test_a_config_that_is_none_is_an_error_that_names_the_file(tmp_path, config):
    save_tensors(tmp_path / "model.pth", contents_of(small_model("simple_cnn"), config=config))
    assert_refused(tmp_path / "model.pth")


@pytest.mark.parametrize("state_dict", [None, [], {}, {"head.0.weight": 1}, {1: 2}], ids=repr)
def test_weights_that_are_none_are_an_error_that_names_the_file(tmp_path, state_dict):
    contents = contents_of(small_model("simple_cnn"), state_dict=state_dict)
    save_tensors(tmp_path / "model.pth", contents)
    assert_refused(tmp_path / "model.pth")


def test_weights_of_other_shapes_are_an_error_that_names_the_file(tmp_path):
    model = small_model("simple_cnn")
    weights = model.state_dict()
    weights["head.6.weight"] = weights["head.6.weight"].T
    save_tensors(tmp_path / "model.pth", contents_of(model, state_dict=weights))
    assert_refused(tmp_path / "model.pth")


@pytest.mark.parametrize("count", [2, 4])
def test_a_file_must_name_as_many_classes_as_its_model_tells_apart(tmp_path, count):
    classes = [f"class {label}" for label in range(count)]
    save_tensors(tmp_path / "model.pth", contents_of(small_model("simple_cnn"), classes=classes))
    assert_refused(tmp_path / "model.pth")


def test_a_file_cut_short_and_none_at_all_are_told_apart(tmp_path):
    path = tmp_path / "model.pth"
    with pytest.raises(FileNotFoundError, match=r"model\.pth"):
        load_model(path)
    save_tensors(path, contents_of(small_model("simple_cnn")))
    path.write_bytes(path.read_bytes()[:-1000])
    assert_refused(path)
