"""Grad-CAM and the overlays that show it."""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import dataset
import models
from imaging.heatmaps import FIGURE_SIDE
from inference.explain import describe_prediction, gradcam
from models import MODELS
from predict import predict
from tests.samples import CLASSES, small_model


def test_gradcam_is_the_paper_s_formula_where_it_can_be_done_by_hand():
    # With average pooling and one dense layer W behind it, dy_c/dA_k is W_ck over the number of
    # positions, everywhere in the map.
    model = small_model(name="resnet_finetuned")
    model.head = nn.Linear(512, len(CLASSES))
    nn.init.uniform_(model.head.weight, -1, 2)
    images, labels = torch.rand(4, 3, 128, 160), [0, 1, 2, 1]
    stages = nn.Sequential(*list(model.backbone.children())[:-2])
    with torch.no_grad():
        maps = stages((images - model.mean) / model.std).numpy()
    assert maps.shape == (4, 512, 4, 5)
    weights = model.head.weight.detach().numpy()[labels] / 20
    expected = np.maximum((weights[:, :, None, None] * maps).sum(axis=1), 0)
    expected = F.interpolate(
        torch.from_numpy(expected)[:, None], (128, 160), mode="bilinear", align_corners=False
    )[:, 0].numpy()
    assert (expected.max(axis=(1, 2)) > 0).all()
    expected /= expected.max(axis=(1, 2), keepdims=True)
    heatmaps = gradcam(model, images, labels)
    assert heatmaps.dtype == np.float32 and heatmaps.shape == (4, 128, 160)
    assert np.allclose(heatmaps, expected, atol=1e-5)


@pytest.mark.parametrize("size", [16, 32, 48])
def test_gradcam_of_small_images_still_tells_places_apart(size):
    model = small_model(name="resnet_finetuned")
    images = torch.rand(8, 3, size, size, generator=torch.Generator().manual_seed(0))
    heatmaps = gradcam(model, images, np.arange(8) % len(CLASSES))
    is_empty = heatmaps.max(axis=(1, 2)) == 0  # no region raises the output for the class
    assert not is_empty.all()
    assert (np.ptp(heatmaps[~is_empty], axis=(1, 2)) > 0.1).all()


def test_gradcam_of_the_simple_cnn_explains_the_last_convolution():
    model, images, labels = small_model(), torch.rand(3, 3, 32, 32), torch.tensor([2, 0, 1])
    maps = model.backbone[:5]((images - model.mean) / model.std)
    maps.retain_grad()
    logits = model.head(model.backbone[5:](maps))
    assert torch.allclose(logits, model(images))
    logits[torch.arange(3), labels].sum().backward()
    weights = maps.grad.mean(dim=(2, 3))
    expected = torch.einsum("nk,nkij->nij", weights, maps).clamp_min(0).detach()
    expected = F.interpolate(expected[:, None], (32, 32), mode="bilinear")[:, 0].numpy()
    highest = expected.max(axis=(1, 2), keepdims=True)
    assert (highest > 0).any()
    expected = np.divide(expected, highest, where=highest > 0, out=np.zeros_like(expected))
    assert np.allclose(gradcam(model, images, labels), expected, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_gradcam_leaves_every_kind_of_model_as_it_was(name):
    model, images = small_model(name=name), torch.rand(4, 3, 32, 32)
    model.train()
    model.head[2].eval()  # not all modules in the same mode
    for parameter in list(model.parameters())[-2:]:
        parameter.grad = torch.ones_like(parameter)
    modes = [module.training for module in model.modules()]
    needs = [parameter.requires_grad for parameter in model.parameters()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.inference_mode():
        heatmaps = gradcam(model, images, [0, 1, 2, 0])
    assert heatmaps.dtype == np.float32 and heatmaps.shape == (4, 32, 32)
    assert heatmaps.min() >= 0 and heatmaps.max() == 1
    for heatmap in heatmaps:
        assert heatmap.max() in (0, 1)
    assert modes == [module.training for module in model.modules()]
    assert needs == [parameter.requires_grad for parameter in model.parameters()]
    grads = [parameter.grad for parameter in model.parameters()]
    assert all(grad is None for grad in grads[:-2]) and all((g == 1).all() for g in grads[-2:])
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    again = gradcam(model, images[1:2].numpy(), [1])
    assert np.allclose(again, heatmaps[1:2], atol=1e-4)  # an image's map is its own
    model(images).sum().backward()  # nothing is left in the model that would cut its graph
    first = next(model.parameters())
    assert (first.grad is not None) == first.requires_grad


def test_gradcam_takes_the_feature_maps_of_a_backbone_from_elsewhere(monkeypatch):
    def build():
        layers = nn.Conv2d(3, 4, 3, stride=4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        return nn.Sequential(*layers), 4

    entry = models.Backbone(build=build, feature_maps=(("0", 4),))
    monkeypatch.setitem(models.BACKBONES, "toy", entry)
    model = small_model(name="toy_scratch")
    model.head = nn.Linear(4, len(CLASSES))
    nn.init.uniform_(model.head.weight, -1, 2)
    images, labels = torch.rand(2, 3, 32, 32), [0, 1]
    maps = model.backbone[0]((images - model.mean) / model.std).detach()
    expected = torch.einsum("nk,nkij->nij", model.head.weight.detach()[labels], maps).relu()
    expected = F.interpolate(expected[:, None], (32, 32), mode="bilinear")[:, 0]
    highest = expected.amax(dim=(1, 2), keepdim=True)
    assert (highest > 0).all()
    assert np.allclose(gradcam(model, images, labels), expected / highest, atol=1e-5)


def test_a_map_in_which_nothing_speaks_for_the_class_stays_zero():
    model = small_model(name="resnet_scratch")
    nn.init.zeros_(model.head[-1].weight)
    assert (gradcam(model, torch.rand(2, 3, 32, 32), [0, 1]) == 0).all()


@pytest.mark.parametrize("labels", [[0], [0, 3], [-1, 0]])
def test_gradcam_of_labels_that_do_not_fit_is_an_error(labels):
    with pytest.raises(ValueError, match="2 numbers from 0 to 2"):
        gradcam(small_model(), torch.rand(2, 3, 32, 32), labels)


def test_overlays_have_names_of_their_own_and_stay_in_their_folder(
    images, tmp_path, save_model, monkeypatch
):
    picture = (images / "a/0000.png").read_bytes()
    odd = tmp_path / "odd"
    odd.mkdir()
    names = ["..png", "-x.png", "new\nline.png", os.fsdecode(b"\xff.png"), "☃" * 80 + ".png"]
    for name in [*names, "same.png", "same.bmp"]:
        (odd / name).write_bytes(picture)
    monkeypatch.chdir(images)
    given = [*(odd / name for name in names), odd, "a", "b", "../odd/same.png"]
    before = sorted(tmp_path.rglob("*"))
    table = predict(save_model(), given, gradcam=tmp_path / "cam" / "new", device="cpu")
    overlays = sorted((tmp_path / "cam" / "new").iterdir())
    assert len(overlays) == len(table) == len(set(table["path"])) == 15
    for overlay in overlays:
        assert overlay.name.isprintable() and overlay.suffix == ".png"
        with Image.open(overlay) as image:
            assert image.width > 2 * FIGURE_SIDE and image.height > FIGURE_SIDE
            assert image.mode == "RGB"
    assert [path.name for path in overlays if path.name.startswith("0000-")]
    made = {tmp_path / "model.pth", tmp_path / "cam", tmp_path / "cam" / "new", *overlays}
    assert set(tmp_path.rglob("*")) - set(before) == made


def test_an_overlay_shows_the_file_s_own_pixels_beside_the_map_of_the_decided_class(
    make_images, tmp_path, save_model
):
    folder = make_images({"a": 1}, size=900)
    model = save_model(model=small_model(2))
    table = predict(model, folder, gradcam=tmp_path / "cam", device="cpu")
    (path,) = (tmp_path / "cam").iterdir()
    figure = np.asarray(Image.open(path))
    image = dataset.prepare_image(folder / "a/0000.png", FIGURE_SIDE)  # what is cropped is the same
    top, left = find_image(figure, image)
    overlay = figure[top : top + FIGURE_SIDE, left + FIGURE_SIDE + 1 :]
    seen = dataset.prepare_image(folder / "a/0000.png", 32)
    pixels = dataset.to_float(torch.from_numpy(seen.copy())[None])
    label = CLASSES.index(table["class"][0])
    heatmap = gradcam(small_model(2), pixels, [label])[0]
    heatmap = np.kron(heatmap, np.ones((16, 16)))
    overlay = overlay[:, np.argmax((overlay != 255).any(axis=(0, 2))) :][:, :FIGURE_SIDE]
    changed = np.abs(overlay.astype(int) - image).mean(axis=2)
    assert np.corrcoef(changed.ravel(), heatmap.ravel())[0, 1] > 0.7
    is_far_from_zero = F.max_pool2d(torch.tensor(heatmap)[None], 65, 1, 32)[0].numpy() == 0
    assert (changed[is_far_from_zero] == 0).all()


def test_an_overlay_shows_what_the_preprocessors_made_of_the_image(images, tmp_path, save_model):
    def invert(image):
        return 255 - image

    model = save_model(preprocessors=dataset.fingerprint([invert]))
    file = images / "a/0001.png"
    predict(model, file, gradcam=tmp_path / "cam", preprocessors=[invert], device="cpu")
    (path,) = (tmp_path / "cam").iterdir()
    shown = dataset.prepare_image(file, FIGURE_SIDE, [invert])
    assert find_image(np.asarray(Image.open(path)), shown)


def find_image(figure, image):
    """The corner at which the figure shows the image."""
    for top, left in np.argwhere((figure == image[0, 0]).all(axis=2)):
        shown = figure[top : top + len(image), left : left + len(image)]
        if shown.shape == image.shape and (shown == image).all():
            return top, left
    raise ValueError("the figure does not show the image")


ROW = {
    "path": "a/x.png", "class": "nevus", "probability": 0.1234, "most_probable": "nevus",
    "prob_nevus": 0.1234, "prob_mel": 0.5, "flag_malignant": True, "flag_mel": False,
}  # fmt: skip


def test_a_prediction_is_described_by_class_flags_and_file():
    assert describe_prediction(ROW) == ["nevus, probability 0.123", "flagged: malignant", "x.png"]
    other = ROW | {"most_probable": "mel", "flag_mel": True}
    first, flags, _ = describe_prediction(other)
    assert first == "nevus, probability 0.123 (more probable: mel, 0.500)"
    assert flags == "flagged: malignant, mel"
    assert describe_prediction(ROW | {"flag_malignant": False})[1] == "no flags"
    without = {name: value for name, value in ROW.items() if not name.startswith("flag_")}
    assert len(describe_prediction(without)) == 2
    odd = describe_prediction(
        without | {"class": "a\nb", "most_probable": "a\nb", "path": "\udcff"}
    )
    assert odd == ["'a\\nb', probability 0.123", "'\\udcff'"]


def test_overlays_of_an_ensemble_are_drawn_where_one_model_finds_nothing(
    images, tmp_path, save_model
):
    nothing = small_model()
    nn.init.zeros_(nothing.head[-1].weight)
    for name, model in (("nothing", nothing), ("something", small_model(2))):
        save_model(f"{name}.pth", model)
        folder = tmp_path / name
        predict(tmp_path / f"{name}.pth", images / "a/0001.png", gradcam=folder, device="cpu")
    figures = [next((tmp_path / n).iterdir()) for n in ("nothing", "something")]
    both = [tmp_path / "nothing.pth", tmp_path / "something.pth"]
    predict(both, images / "a/0001.png", gradcam=tmp_path / "both", device="cpu")
    figures.append(next((tmp_path / "both").iterdir()))
    has_scale = [
        len(np.unique(np.asarray(Image.open(f))[100:500, -70], axis=0)) > 9 for f in figures
    ]
    assert has_scale == [False, True, True]


def test_overlays_do_not_go_where_they_would_be_taken_for_images(images, tmp_path, save_model):
    with pytest.raises(ValueError, match="is inside .*; choose another folder"):
        predict(save_model(), images, gradcam=images / "cam")
    assert not (images / "cam").exists()
    with pytest.raises(ValueError, match="model.pth is a file"):
        predict(save_model(), images, gradcam=tmp_path / "model.pth")
