import os
import pickle
import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

import dataset
from dataset import DatasetBuilder, create_dataloaders, find_images, to_float
from imaging import batches
from imaging.batches import DeviceDataset
from imaging.synthetic import CLASSES, draw_lesion
from tests.samples import build, shown

# ---------------------------------------------------------------------------- splits


def test_any_names_and_fractions_work(make_images):
    root = make_images({"a": 8, "b": 8})
    splits, metadata = build(root, splits={"fit": 0.5, "check": 0.5})
    assert {name: len(split) for name, split in splits.items()} == {"fit": 8, "check": 8}
    assert set(metadata["split"]) == {"fit", "check"}


def test_identical_files_stay_together_whatever_their_class(make_images):
    root = make_images({"Train/a": 20, "Train/b": 20, "Test/b": 10})
    for i in range(10):
        shutil.copy(root / f"Train/a/{i:04d}.png", root / f"Test/b/copy{i}.png")
    _, metadata = build(root)
    assert metadata["picture"].nunique() == 50
    assert metadata.groupby("content_hash")["split"].nunique().max() == 1
    assert metadata.groupby("group")["split"].nunique().max() == 1


def save_lesions(root, counts, seed=0):
    rng = np.random.default_rng(seed)
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True)
        for i in range(count):
            lesion = draw_lesion(CLASSES[i % len(CLASSES)], rng, 96)
            lesion.save(root / folder / f"{i:04d}.jpg", quality=90)
    return root


def turn_and_save_again(source, target):
    with Image.open(source) as image:
        image.transpose(Image.Transpose.ROTATE_90).resize((80, 80)).save(target, quality=90)


@pytest.mark.parametrize("flag", ["splits_csv", "metadata_csv"])
def test_the_audit_finds_leakage_between_the_splits_of_a_table(tmp_path, flag):
    root = save_lesions(tmp_path / "raw", {"a": 12, "b": 12})
    shutil.copy(root / "a/0003.jpg", root / "a/copy.jpg")
    paths = find_images(root)["path"]
    splits = pd.DataFrame({"path": paths, "split": "train"})
    splits.loc[splits["path"] == "a/copy.jpg", "split"] = "test"
    table = write(tmp_path / "table.csv", splits)
    findings = DatasetBuilder(root, image_size=16, **{flag: table}).audit()
    assert findings["kind"].tolist() == ["leakage", "identical"]
    assert DatasetBuilder(root, image_size=16).audit()["kind"].tolist() == ["identical"]


def test_with_splits_by_folders_the_audit_looks_at_the_folders(tmp_path):
    root = save_lesions(tmp_path / "raw", {"Train/a": 12, "Train/b": 12, "Test/a": 10})
    shutil.copy(root / "Train/a/0003.jpg", root / "Test/a/copy.jpg")
    splits = find_images(root)[["path"]].assign(split="train")
    table = write(tmp_path / "table.csv", splits)
    options = {"image_size": 16, "metadata_csv": table}
    by_folders = DatasetBuilder(root, split_by="folders", **options).audit()
    assert by_folders["kind"].tolist() == ["leakage", "identical"]
    assert DatasetBuilder(root, **options).audit()["kind"].tolist() == ["identical"]


def test_splits_do_not_depend_on_the_order_of_the_file_system(make_images, monkeypatch):
    root = make_images({"Train/a": 20, "Test/a": 7, "Train/b": 13})
    _, expected = build(root)
    names = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: sorted(names(path), reverse=True))
    _, metadata = build(root)
    assert metadata.equals(expected)


def test_a_class_of_one_image_is_trained_on_and_warned_of(make_images):
    root = make_images({"a": 10, "b": 10, "lonely": 1})
    with pytest.warns(UserWarning, match=r"lonely \(1 images\) is not in valid, test"):
        _, metadata = build(root)
    assert metadata.loc[metadata["class"] == "lonely", "split"].tolist() == ["train"]


# ---------------------------------------------------------------------------- tables


def write(path, table):
    pd.DataFrame(table).to_csv(path, index=False)
    return path


def with_conflicts(make_images):
    root = make_images({"Train/a": 20, "Train/b": 20, "Test/a": 4, "Test/b": 8})
    for i in range(6):
        shutil.copy(root / f"Train/a/{i:04d}.png", root / f"Test/b/copy{i}.png")
    shutil.copy(root / "Train/a/0010.png", root / "Train/a/again.png")  # no contradiction
    return root


def test_contradictory_labels_are_kept_dropped_or_an_error(make_images):
    root = with_conflicts(make_images)
    assert len(build(root)[1]) == 59
    _, dropped = build(root, label_conflicts="drop")
    assert len(dropped) == 47
    assert dropped.groupby("picture")["class"].nunique().max() == 1
    assert "Train/a/again.png" in set(dropped["path"])
    with pytest.raises(ValueError, match=r"12 images .* such as .*Train/a/0000\.png"):
        build(root, label_conflicts="error")


def test_images_keep_their_pixels_when_others_are_left_out(make_images):
    root = with_conflicts(make_images)
    whole, _ = build(root)
    part, metadata = build(root, label_conflicts="drop")
    for path in metadata["path"]:
        assert np.array_equal(shown(whole, path), shown(part, path))


def test_splits_by_folders_take_validation_out_of_train_and_report_leakage(make_images):
    root = with_conflicts(make_images)
    with pytest.warns(UserWarning, match=r"leakage: 6 groups .* 12 images"):
        splits, metadata = build(root, split_by="folders")
    of_test = metadata["source_split"] == "Test"
    assert (metadata["split"][of_test] == "test").all()
    assert set(metadata["split"][~of_test]) == {"train", "valid"}
    assert len(splits["valid"]) == pytest.approx(41 * 0.2 / 0.9, abs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(root, split_by="folders", label_conflicts="drop")


def test_a_validation_folder_is_taken_as_it_is(make_images):
    root = make_images({f"{s}/{c}": 3 for s in ("train", "VAL", "Test") for c in "ab"})
    splits, metadata = build(root, split_by="folders")
    assert {name: len(split) for name, split in splits.items()} == dict.fromkeys(splits, 6)
    assert (metadata["split"] == metadata["source_split"].str.lower().replace("val", "valid")).all()
    with pytest.raises(ValueError, match="is not in a folder named Train"):
        build(make_images({"a": 3, "b": 3}, name="plain"), split_by="folders")
    untested = make_images({"Train/a": 3, "Train/b": 3}, name="untested")
    with pytest.raises(ValueError, match="no folder for the test split"):
        build(untested, split_by="folders")


def test_an_earlier_table_of_splits_gives_the_same_splits(make_images, tmp_path):
    root = make_images({"a": 20, "b": 20})
    _, first = build(root)
    path = write(tmp_path / "splits.csv", first.sample(frac=1, random_state=0))
    splits, again = build(root, splits_csv=path, seed=7)
    assert again["split"].tolist() == first["split"].tolist()
    assert list(splits) == ["train", "valid", "test"]
    (root / "a/0000.png").unlink()
    with pytest.warns(UserWarning, match="39 of its 40 rows used, .*; 1 rows match no image"):
        build(root, splits_csv=path)


# ---------------------------------------------------------------------------- data sets, loaders


@pytest.fixture
def splits(make_images):
    return build(make_images({"a": 40, "b": 20, "c": 10}))[0]


def test_an_item_is_a_float_image_and_a_label(splits):
    train = splits["train"]
    image, label = train[3]
    assert image.shape == (3, 16, 16) and image.dtype == torch.float32
    stored = torch.from_numpy(train.gather([3])[0])
    assert torch.equal(image, stored.permute(2, 0, 1) / 255)
    assert label == train.labels[3] == train.classes.index(train.metadata["class"][3])


def test_a_copy_in_another_process_opens_the_array_again(splits):
    train = splits["train"]
    train[0]
    assert len(pickle.dumps(train)) < train.gather(np.arange(len(train))).nbytes
    assert torch.equal(pickle.loads(pickle.dumps(train))[5][0], train[5][0])
    alone, helped = (DataLoader(train, batch_size=8, num_workers=n) for n in (0, 1))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(alone, helped, strict=True))


def test_an_epoch_shows_each_image_once(splits):
    loaders = create_dataloaders(splits, batch_size=16, device="cpu", augmentation=False)
    train = splits["train"]
    batches = list(loaders["train"])
    assert [len(labels) for _, labels in batches] == [16, 16, 16, 1]
    assert len(loaders["train"]) == 4
    expected = sorted(train[i][0].sum().item() for i in range(len(train)))
    assert sorted(torch.cat([x for x, _ in batches]).sum((1, 2, 3)).tolist()) == pytest.approx(
        expected, rel=1e-5
    )
    valid = torch.cat([labels for _, labels in loaders["valid"]])
    assert valid.tolist() == splits["valid"].labels.tolist()  # in order


def take(stream, count):
    return [next(stream) for _ in range(count)]


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("balanced", [False, True])
def test_batch_k_depends_on_the_seed_and_k_alone(splits, balanced):
    def loader(**options):
        return create_dataloaders(splits, 8, device="cpu", balanced=balanced, **options)["train"]

    first = take(loader().batches(), 20)
    assert {images.shape for images, _ in first} == {(8, 3, 16, 16)}
    used = loader()
    list(used)  # an epoch before changes nothing
    assert same(take(used.batches(start=13), 7), first[13:])
    assert same(take(loader(num_workers=2).batches(), 6), first[:6])
    assert not same(take(loader(seed=7).batches(), 20), first)
    images = torch.cat([images for images, _ in first])
    assert len(torch.unique(images.flatten(1), dim=0)) == len(images)  # every view is its own


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_cut_the_batches_that_one_would_have(splits, balanced, world_size):
    def streams(batch_size, **place):
        options = {"device": "cpu", "balanced": balanced} | place
        loader = create_dataloaders(splits, batch_size, **options)["train"]
        return take(loader.batches(start=2), 8)

    whole = streams(4 * world_size)
    parts = [streams(4, rank=rank, world_size=world_size) for rank in range(world_size)]
    joined = [
        tuple(map(torch.cat, zip(*pieces, strict=True))) for pieces in zip(*parts, strict=True)
    ]
    assert all(torch.equal(a[1], b[1]) for a, b in zip(whole, joined, strict=True))
    # Views and all: nothing but the mean of an image may be added up in another order.
    assert all(torch.allclose(a[0], b[0], atol=1e-6) for a, b in zip(whole, joined, strict=True))


@given(world_size=st.integers(1, 9), batch_size=st.integers(1, 9))
@settings(
    max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
def test_each_image_of_an_epoch_goes_to_exactly_one_process(splits, world_size, batch_size):
    options = {"device": "cpu", "world_size": world_size}
    loaders = [
        create_dataloaders(splits, batch_size, rank=rank, **options) for rank in range(world_size)
    ]
    for name, split in splits.items():
        batches = [list(loader[name]) for loader in loaders]
        assert [len(loader[name]) for loader in loaders] == [len(part) for part in batches]
        labels = [labels for part in batches for _, labels in part]
        assert sorted(torch.cat(labels).tolist()) == sorted(split.labels.tolist())
    # What is not shuffled comes in order, so that the results can be put together again.
    images = torch.cat(
        [images for part in (list(o["valid"]) for o in loaders) for images, _ in part]
    )
    valid = splits["valid"]
    assert torch.equal(images, torch.stack([valid[i][0] for i in range(len(valid))]))


def test_images_that_lie_on_the_device_are_those_in_the_array(splits):
    train, indices = splits["train"], np.array([5, 0, 48, 5])
    (images, labels) = DeviceDataset(train, torch.device("cpu")).gather_batch(indices)
    assert np.array_equal(images["images"], train.gather(indices))
    assert np.array_equal(labels, train.labels[indices])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("share", [0.0, 0.25])
def test_batches_on_the_gpu_are_those_on_the_cpu(splits, monkeypatch, share):
    monkeypatch.setattr(batches, "MAX_GPU_FRACTION", share)  # 0: from pinned memory
    streams = [create_dataloaders(splits, 8, device=d)["train"].batches() for d in ("cpu", "cuda")]
    for (images, labels), (on_gpu, labels_on_gpu) in zip(
        *(take(s, 6) for s in streams), strict=True
    ):
        assert on_gpu.device.type == labels_on_gpu.device.type == "cuda"
        assert torch.equal(labels, labels_on_gpu.cpu())
        assert torch.allclose(images, on_gpu.cpu(), atol=1e-4)


def test_loaders_leave_the_global_random_state_alone(splits):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    loaders = create_dataloaders(splits, 8, device="cpu", balanced=True, num_workers=1)
    take(loaders["train"].batches(), 3)
    list(loaders["train"])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_only_the_training_split_is_augmented(splits):
    loaders = create_dataloaders(splits, 1, device="cpu")
    for number, (image, _) in enumerate(loaders["valid"]):
        assert torch.equal(image[0], splits["valid"][number][0])
    originals = {splits["train"][i][0].numpy().tobytes() for i in range(len(splits["train"]))}
    assert not any(image.numpy().tobytes() in originals for image, _ in loaders["train"])


def test_a_split_without_images_is_named(make_images):
    with pytest.warns(UserWarning, match="some splits lack a class"):
        splits, _ = build(make_images({"a": 1, "b": 1}))
    with pytest.raises(ValueError, match="none are left for valid, test"):
        create_dataloaders(splits)


@pytest.fixture
def with_ages(splits):
    """Splits with an input beside the images, from which each image's row can be told."""
    for split in splits.values():
        numbers = torch.arange(len(split), dtype=torch.float32)
        split.add_input("age", torch.stack([numbers, split.image_size * numbers], dim=1))
    return splits


@pytest.mark.parametrize("place", ["this process", "workers", "device memory"])
def test_a_further_input_comes_in_a_dict_beside_its_images(with_ages, monkeypatch, place):
    if place == "device memory":
        monkeypatch.setattr(dataset, "fits_in_gpu_memory", lambda dataset, device: True)
    options = {"device": "cpu", "num_workers": int(place == "workers"), "augmentation": False}
    loaders = create_dataloaders(with_ages, 8, **options)
    epoch, stream = list(loaders["valid"]), take(loaders["train"].batches(), 9)
    for name, found in (("valid", epoch), ("train", stream)):
        split = with_ages[name]
        for inputs, labels in found:
            assert list(inputs) == ["images", "age"]
            rows = inputs["age"][:, 0].long()
            assert torch.equal(inputs["age"], split.extra_inputs["age"][rows])
            assert torch.equal(inputs["images"], to_float(torch.from_numpy(split.gather(rows))))
            assert torch.equal(labels, torch.from_numpy(split.labels)[rows])
    assert torch.cat([inputs["age"][:, 0] for inputs, _ in epoch]).tolist() == list(range(14))


def test_a_further_input_changes_neither_images_nor_order(make_images):
    root = make_images({"a": 12, "b": 12})
    plain, extended = build(root)[0], build(root)[0]
    extended["train"].add_input("age", torch.zeros(len(extended["train"])))
    streams = [create_dataloaders(s, 8, device="cpu")["train"].batches() for s in (plain, extended)]
    alone, with_age = (take(stream, 6) for stream in streams)
    assert same(alone, [(inputs["images"], labels) for inputs, labels in with_age])


def test_an_item_of_a_data_set_with_a_further_input_is_a_dict_and_a_label(with_ages):
    train = with_ages["train"]
    inputs, label = train[3]
    assert inputs["images"].shape == (3, 16, 16) and label == train.labels[3]
    assert inputs["age"].tolist() == [3, 48]
    inputs, labels = next(iter(DataLoader(train, batch_size=4)))
    assert inputs["age"].shape == (4, 2) and labels.tolist() == train.labels[:4].tolist()


def test_an_input_that_does_not_fit_the_images_is_refused(splits):
    with pytest.raises(ValueError, match="input age has 3 rows for 49 images"):
        splits["train"].add_input("age", torch.zeros(3))
    with pytest.raises(ValueError, match="cannot be called images"):
        splits["train"].add_input("images", torch.zeros(49))


@pytest.mark.parametrize(
    "splits",
    [{"train": 0.7, "test": 0.2}, {"train": 1.2, "test": -0.2}, {}, {"train": float("nan")}],
)
def test_fractions_that_do_not_make_splits_are_refused(make_images, splits):
    with pytest.raises(ValueError, match="splits"):
        build(make_images({"a": 3, "b": 3}), splits=splits)


def test_near_duplicates_stay_together_and_have_one_number(tmp_path):
    root = save_lesions(tmp_path / "raw", {"a": 20, "b": 20})
    for i in range(10):
        turn_and_save_again(root / f"a/{i:04d}.jpg", root / f"a/turned {i}.jpg")
        turn_and_save_again(root / f"b/{i:04d}.jpg", root / f"a/contradicting {i}.jpg")
    _, metadata = build(root)
    assert metadata["picture"].nunique() == 40
    assert metadata["content_hash"].nunique() == 60
    assert metadata.groupby("picture")["split"].nunique().max() == 1
    _, metadata = build(root, label_conflicts="drop")
    assert len(metadata) == 40
    assert not metadata["path"].str.contains("contradicting").any()


def test_the_audit_finds_copies_wrong_labels_leakage_and_broken_files(tmp_path):
    root = save_lesions(tmp_path / "raw", {"Train/a": 14, "Train/b": 12, "Test/a": 10})
    turn_and_save_again(root / "Train/b/0003.jpg", root / "Train/a/turned.jpg")
    shutil.copy(root / "Train/a/0001.jpg", root / "Test/a/copy.jpg")
    (root / "Test/a/broken.jpg").write_bytes(b"GIF89a")
    Image.new("RGB", (20, 90), "red").save(root / "Train/b/red.png")
    builder = DatasetBuilder(root, image_size=16)
    findings = builder.audit()
    named = [(row.kind, row.images) for row in findings.itertuples()]
    turned = ("Train/a/turned.jpg", "Train/b/0003.jpg")
    copied = ("Test/a/copy.jpg", "Train/a/0001.jpg")
    assert named == [
        ("unreadable", ("Test/a/broken.jpg",)),
        ("contradiction", turned),
        ("leakage", copied),
        ("identical", copied),
        ("near-duplicate", turned),
        ("tiny", ("Train/b/red.png",)),
        ("flat", ("Train/b/red.png",)),
    ]
    assert builder.audit().equals(findings)  # from the array that is there


def test_metadata_has_a_row_for_each_image_with_all_columns(make_images):
    root = make_images({"Train/b": 5, "Train/a": 5})
    Image.new("RGB", (30, 20)).save(root / "Train/a/oblong.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, metadata = build(root)
    assert metadata.columns.tolist() == [
        "path", "class", "label", "source_split", "width", "height", "content_hash", "picture",
        "group", "split",
    ]  # fmt: skip
    assert metadata.groupby("class")["label"].unique().map(list).to_dict() == {"a": [0], "b": [1]}
    oblong = metadata.set_index("path").loc["Train/a/oblong.png"]
    assert (oblong["width"], oblong["height"]) == (30, 20)


def test_contradictory_options_are_refused(tmp_path):
    for options, message in [
        ({"split_by": "folders", "splits_csv": "x.csv"}, "not both"),
        ({"label_column": "dx"}, "label_column needs the table"),
        ({"split_by": "chance"}, "split_by must be .* not 'chance'"),
        ({"label_conflicts": "ignore"}, "label_conflicts must be .* not 'ignore'"),
    ]:
        with pytest.raises(ValueError, match=message):
            DatasetBuilder(tmp_path, **options)


def test_invalid_arguments_of_loaders_are_named(splits):
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        create_dataloaders(splits, batch_size=0)
    with pytest.raises(ValueError, match="num_workers must be at least 0, not -1"):
        create_dataloaders(splits, num_workers=-1)
    with pytest.raises(ValueError, match="seed must be at least 0"):
        create_dataloaders(splits, seed=-1)
    with pytest.raises(ValueError, match="rank must be at least 0"):
        create_dataloaders(splits, rank=2, world_size=2)
