import contextlib
import csv
import functools
import math
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from augmentation import POLICIES
from dataset import DatasetBuilder, LesionLoader, create_dataloaders
from evaluation import best_evaluation, choose_thresholds
from learning.losses import LOSSES
from models import BACKBONES, get_model, load_model
from tests.samples import small_backbone
from training import (
    evaluate,
    make_optimizer,
    resolve_precision,
    train,
    warmup_cosine,
)

HISTORY = [
    "step", "learning_rate", "train_loss", "valid_loss", "valid_precision", "valid_recall",
    "valid_f1", "valid_balanced_accuracy", "images_per_second",
]  # fmt: skip


@pytest.fixture
def loaders(make_images):
    splits, _ = DatasetBuilder(make_images({"a": 24, "b": 16, "c": 12}), image_size=32).build()
    return create_dataloaders(splits, batch_size=8, device="cpu")


def run(loaders, num_steps=6, name="simple_cnn", learning_rate=1e-3, model=None, **options):
    """Trains a small model as the driver does; `options` are those of `train`."""
    if model is None:
        model = get_model(name, 3, layers=18, weights=None, image_size=32, seed=0)
    optimizer = make_optimizer(model, learning_rate)
    scheduler = warmup_cosine(optimizer, num_steps)
    arguments = {"eval_every": 3} | options
    return train(
        model, loaders["train"], loaders["valid"], 3, num_steps, optimizer, scheduler, **arguments
    )


def same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# ---------------------------------------------------------------------------- screening


def test_thresholds_are_chosen_on_the_images_that_are_known(make_images, tmp_path, monkeypatch):
    chosen = []

    def choose(is_positive, score):
        chosen.append((np.nansum(is_positive), np.isfinite(is_positive).sum()))
        return choose_thresholds(is_positive, score)

    monkeypatch.setattr("learning.checkpoints.choose_thresholds", choose)
    root = make_images({"mel": 20, "nv": 15, "UNK": 30})
    splits, _ = DatasetBuilder(root, image_size=32).build()
    loaders = create_dataloaders(splits, batch_size=8, device="cpu")
    run(loaders, num_steps=2, save_path=tmp_path / "m")
    _, info = load_model(tmp_path / "m/model.pth")
    assert (info["malignant_classes"], info["unknown_classes"]) == (["mel"], ["UNK"])
    assert set(info["thresholds"]) == {"malignant", "melanoma"}
    counts = splits["valid"].metadata["class"].value_counts()
    assert set(chosen) == {(counts["mel"], counts["mel"] + counts["nv"])}


def test_a_malignant_class_that_there_is_not_ends_the_training_before_its_first_step(
    loaders, tmp_path
):
    with pytest.raises(ValueError, match="unknown class bb; did you mean b"):
        run(loaders, save_path=tmp_path / "m", malignant_classes=["a", "bb"])
    assert not (tmp_path / "m").exists()


# ---------------------------------------------------------------------------- schedule, optimizer


def rates(num_steps, warmup_fraction=0.2, peak=1e-3):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = warmup_cosine(optimizer, num_steps, warmup_fraction)
    found = []
    for _ in range(num_steps + 2):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_the_rate_warms_up_to_the_peak_and_falls_to_a_hundredth():
    found = rates(2000)
    assert found[0] == pytest.approx(1e-4)
    assert found[200] == pytest.approx(5.5e-4)
    assert found[400] == pytest.approx(1e-3)
    assert found[400 + 1599 // 2] == pytest.approx(5.05e-4, rel=1e-3)
    assert found[1999] == found[2001] == pytest.approx(1e-5)


@given(st.integers(1, 60), st.floats(0, 1))
def test_any_schedule_rises_once_and_falls_once_within_its_bounds(num_steps, warmup_fraction):
    found = rates(num_steps, warmup_fraction)
    warmup_steps = round(num_steps * warmup_fraction)
    assert all(1e-5 * (1 - 1e-9) <= rate <= 1e-3 * (1 + 1e-9) for rate in found)
    assert found[:warmup_steps] == sorted(found[:warmup_steps])
    assert found[warmup_steps:] == sorted(found[warmup_steps:], reverse=True)
    if warmup_steps < num_steps:
        assert found[warmup_steps] == pytest.approx(1e-3)
    if num_steps - 1 > warmup_steps:
        assert found[-1] == pytest.approx(1e-5)


def test_no_bias_and_no_normalisation_weight_is_decayed():
    model = get_model("resnet_scratch", 3, layers=18)
    optimizer = make_optimizer(model, weight_decay=0.5)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            plain = name == "bias" or isinstance(module, nn.BatchNorm2d)
            assert decay[id(parameter)] == (0.0 if plain else 0.5), f"{module_name}.{name}"


def test_frozen_parameters_are_not_in_the_optimizer():
    model = get_model("resnet_head", 3, layers=18, weights=None)
    held = {id(p) for group in make_optimizer(model).param_groups for p in group["params"]}
    assert held == {id(p) for p in model.head.parameters()}


@pytest.mark.parametrize(
    "mistake",
    [
        lambda p: make_optimizer(nn.Linear(2, 2), learning_rate=0),
        lambda p: make_optimizer(nn.Linear(2, 2), learning_rate=math.nan),
        lambda p: make_optimizer(nn.Linear(2, 2), weight_decay=-1),
        lambda p: make_optimizer(nn.ReLU()),
        lambda p: warmup_cosine(p, 0),
        lambda p: warmup_cosine(p, 10, 1.5),
        lambda p: resolve_precision("fp8", torch.device("cpu")),
        lambda p: resolve_precision("fp16", torch.device("cpu")),
    ],
)
def test_values_that_cannot_be_are_refused(mistake):
    with pytest.raises(ValueError, match="must be|no trainable|needs"):
        mistake(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1))


# ---------------------------------------------------------------------------- evaluate


def test_evaluate_sees_every_image_once_and_in_order(loaders):
    model = get_model("simple_cnn", 3, image_size=32).train()
    found = evaluate(model, loaders["valid"], precision="fp32")
    valid = loaders["valid"].dataset
    assert found.labels.tolist() == valid.labels.tolist()
    assert model.training  # as it was before
    images = torch.stack([valid[i][0] for i in range(len(valid))])
    with torch.no_grad():
        logits = model.eval()(images)
    expected = logits.double().softmax(1).numpy()
    assert found.probabilities.dtype == np.float64
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-6)
    loss = nn.functional.cross_entropy(logits, torch.from_numpy(valid.labels)).item()
    assert found.loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="no public name for these")
@pytest.mark.parametrize(
    ("bf16", "amx", "expected"),
    [
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
        (False, False, torch.float32),
    ],
)
def test_the_precision_is_what_the_cpu_computes_in(monkeypatch, bf16, amx, expected):
    capabilities = {"avx512_bf16": bf16, "amx_tile": amx}
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities)
    assert resolve_precision("auto", torch.device("cpu")) is expected


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)],
)
def test_the_precision_is_what_the_gpu_computes_in(monkeypatch, capability, expected):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert resolve_precision("auto", torch.device("cuda")) is expected
    assert resolve_precision("fp16", torch.device("cuda")) is torch.float16


def test_other_devices_compute_in_fp32():
    assert resolve_precision("auto", torch.device("mps")) is torch.float32


def test_bf16_gives_the_probabilities_of_fp32_nearly(loaders):
    model = get_model("resnet_scratch", 3, layers=18, seed=1)
    exact = evaluate(model, loaders["valid"], precision="fp32")
    fast = evaluate(model, loaders["valid"], precision="bf16")
    np.testing.assert_allclose(fast.probabilities, exact.probabilities, atol=0.02)
    assert not np.array_equal(fast.probabilities, exact.probabilities)


class FailsOnThird(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = get_model("simple_cnn", 3, image_size=32)
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("the third batch")
        return self.inner(images)


@pytest.mark.parametrize("fault", ["none", "loader", "model", "empty"])
def test_evaluate_leaves_each_module_in_its_mode_whatever_happens(loaders, fault):
    def broken():
        yield next(iter(loaders["valid"]))
        raise OSError("the disk is gone")

    batches = {
        "none": loaders["valid"],
        "loader": broken(),
        "model": [*loaders["valid"]] * 3,
        "empty": [],
    }
    model = FailsOnThird().train()
    model.inner.backbone.eval()  # as whoever freezes batch norm does
    before = [module.training for module in model.modules()]
    raises = pytest.raises((OSError, RuntimeError, ValueError))
    with contextlib.nullcontext() if fault == "none" else raises:
        evaluate(model, batches[fault])
    assert [module.training for module in model.modules()] == before
    assert set(before) == {True, False}


# ---------------------------------------------------------------------------- train


def test_training_learns_and_leaves_the_best_weights(loaders, tmp_path, auto_precision):
    model, history = run(loaders, 60, learning_rate=3e-3, eval_every=20, save_path=tmp_path / "m")
    assert history["step"] == [20, 40, 60]
    assert list(history) == HISTORY
    assert history["train_loss"][-1] < history["train_loss"][0]
    assert max(history["valid_balanced_accuracy"]) > 0.9
    assert not model.training
    saved, info = load_model(tmp_path / "m/model.pth")
    assert same_weights(model, saved)
    best = int(np.argmax(history["valid_balanced_accuracy"]))
    assert info["metrics"]["balanced_accuracy"] == history["valid_balanced_accuracy"][best]
    assert info["classes"] == ["a", "b", "c"]
    assert (info["image_size"], info["preprocessors"]) == (32, "")
    assert info["precision"] == auto_precision
    found = evaluate(saved, loaders["valid"])
    assert found.loss == pytest.approx(info["metrics"]["loss"], rel=1e-6)
    with open(tmp_path / "m/history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["valid_loss"]) for row in rows] == history["valid_loss"]


@pytest.mark.parametrize(("num_steps", "steps"), [(7, [3, 6, 7]), (6, [3, 6]), (2, [2])])
def test_evaluation_comes_every_so_often_and_at_the_end_but_not_twice(loaders, num_steps, steps):
    assert run(loaders, num_steps)[1]["step"] == steps


def test_the_history_has_the_rate_of_the_last_step(loaders):
    _, history = run(loaders, 10, eval_every=2)
    expected = rates(10)
    assert history["learning_rate"] == pytest.approx([expected[s - 1] for s in history["step"]])


@pytest.mark.parametrize(
    ("name", "precision"),
    [("simple_cnn", "fp32"), ("simple_cnn", "bf16"), ("small_scratch", "fp32")],
)
def test_the_same_seed_ends_in_identical_weights(loaders, name, precision, monkeypatch):
    monkeypatch.setitem(BACKBONES, "small", small_backbone())
    options = {"name": name, "precision": precision}
    torch.manual_seed(1)
    first, _ = run(loaders, **options)
    torch.manual_seed(2)
    again, _ = run(loaders, **options)
    other, _ = run(loaders, **options, seed=7)  # other dropout
    assert same_weights(first, again)
    assert not same_weights(first, other)


def test_training_leaves_the_global_random_state_alone(loaders):
    before = torch.get_rng_state()
    run(loaders)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_frozen_backbone_is_bit_identical_after_training(loaders, auto_precision):
    model = get_model("resnet_head", 3, layers=18, weights=None, seed=0)
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    head = model.head[0].weight.clone()
    run(loaders, model=model)
    after = model.backbone.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not torch.equal(model.head[0].weight, head)


def test_nothing_is_written_without_a_save_path(loaders, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run(loaders)
    assert not list((tmp_path / "here").iterdir())


def test_training_stops_early_when_nothing_gets_better(loaders):
    _, history = run(loaders, 40, learning_rate=1e-12, eval_every=2, early_stopping_patience=3)
    best = int(np.argmax(history["valid_balanced_accuracy"]))
    assert len(history["step"]) < 20
    losses, best_loss = history["valid_loss"], history["valid_loss"][best]
    assert all(loss >= best_loss for loss in losses[-3:])


def test_class_weights_turn_the_model_towards_a_class(loaders, auto_precision):
    options = {"learning_rate": 1e-2, "num_steps": 15}
    shares = []
    for weights in ([1, 1, 1], [1e-3, 1e-3, 1]):
        model, _ = run(loaders, class_weights=weights, **options)
        shares.append(evaluate(model, loaders["train"]).probabilities[:, 2].mean())
    assert shares[1] > shares[0] + 0.2
    with pytest.raises(ValueError, match="class_weights must be 3"):
        run(loaders, class_weights=[1, 2])
    with pytest.raises(ValueError, match="class_weights cannot be used"):
        run(loaders, class_weights=[1, 2, 3], criterion=nn.CrossEntropyLoss())


def test_any_iterable_optimizer_and_scheduler_will_do(make_images, tmp_path):
    root = make_images({"a": 12, "b": 12})
    data = ImageFolder(root, transforms.Compose([transforms.Resize(32), transforms.ToTensor()]))
    model = get_model("simple_cnn", 2, image_size=32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.5)
    loader = DataLoader(data, batch_size=10, shuffle=True)  # 3 batches, so it begins again
    model, history = train(model, loader, loader, 2, 10, optimizer, scheduler, eval_every=5)
    assert history["learning_rate"] == [0.05, 0.025]
    assert history["step"] == [5, 10]


def test_a_plateau_scheduler_follows_the_validation_loss(loaders):
    model = get_model("simple_cnn", 3, image_size=32, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-12)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.1)
    arguments = (model, loaders["train"], loaders["valid"], 3, 6, optimizer, scheduler)
    _, history = train(*arguments, eval_every=2)
    assert history["learning_rate"] == pytest.approx([1e-12, 1e-12, 1e-13])


def test_mixed_labels_are_trained_on(loaders):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(16, 3, 32, 32, generator=generator)
    mixed = torch.rand(16, 3, generator=generator).softmax(dim=1)
    loader = DataLoader(TensorDataset(images, mixed), batch_size=8)
    _, history = run({"train": loader, "valid": loaders["valid"]}, 4)
    assert np.isfinite(history["train_loss"]).all()


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1, not 0"),
        ({"eval_every": 0}, "eval_every must be at least 1"),
        ({"early_stopping_patience": -1}, "early_stopping_patience must be at least 0"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"precision": "half"}, "precision must be .*, not 'half'"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"criterion": "hinge"}, "unknown criterion 'hinge'; the losses are cross_entropy"),
        ({"resume": True}, "resume needs the save_path"),
    ],
)
def test_arguments_that_cannot_be_are_refused(loaders, mistake, message):
    with pytest.raises(ValueError, match=message):
        run(loaders, **mistake)


def test_loaders_without_batches_and_wrong_class_counts_are_refused(loaders):
    with pytest.raises(ValueError, match="training loader yielded no batches"):
        run({"train": [], "valid": loaders["valid"]})
    with pytest.raises(ValueError, match="yielded no batches to evaluate"):
        evaluate(get_model("simple_cnn", 3, image_size=32), [])
    model = get_model("simple_cnn", 4, image_size=32)
    with pytest.raises(ValueError, match="num_classes is 4, but the data has 3"):
        train(model, loaders["train"], loaders["valid"], 4, 2, make_optimizer(model))


def test_small_batches_together_make_the_step_of_a_large_one(make_images):
    splits, _ = DatasetBuilder(make_images({"a": 24, "b": 16, "c": 12}), image_size=32).build()
    ends = []
    for batch_size, accumulate in ((12, 1), (4, 3)):
        loaders = create_dataloaders(splits, batch_size, augmentation=False, device="cpu")
        model = get_model("simple_cnn", 3, image_size=32, dropout_rate=0.0, seed=0)
        ends.append(run(loaders, model=model, accumulate=accumulate, precision="fp32"))
    (large, history), (small, history_of_small) = ends
    for name, weights in large.state_dict().items():
        assert torch.allclose(weights, small.state_dict()[name], atol=2e-5), name
    assert history["train_loss"] == pytest.approx(history_of_small["train_loss"], rel=1e-4)


def test_a_compiled_step_computes_the_same(loaders, monkeypatch):
    compiled = functools.partial(torch.compile, backend="aot_eager")  # needs no compiler of C++
    monkeypatch.setattr(torch, "compile", compiled)
    ends = []
    for compile in (False, True):
        model = get_model("simple_cnn", 3, image_size=32, dropout_rate=0.0, seed=0)
        ends.append(run(loaders, model=model, compile=compile, precision="fp32")[0].state_dict())
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.allclose(ends[0][name], ends[1][name], atol=1e-5) for name in ends[0])


@pytest.fixture
def exchanges(monkeypatch):
    """Makes this process one of two, as far as it knows, and notes each exchange of gradients."""
    noted = []

    class Watched(DistributedDataParallel):
        def __init__(self, model, *args, **options):
            super().__init__(model, *args, bucket_cap_mb=1000, **options)
            self.register_comm_hook(None, self.note)

        def note(self, state, bucket):
            noted.append(bucket.index())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr("training.get_world_size", lambda: 2)
    monkeypatch.setattr("training.DistributedDataParallel", Watched)
    yield noted
    dist.destroy_process_group()


@pytest.mark.parametrize("compile", [False, True])
def test_processes_exchange_their_gradients_once_a_step_compiled_or_not(
    loaders, exchanges, monkeypatch, compile
):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = get_model("simple_cnn", 3, image_size=32, seed=0)
    run(loaders, 4, model=model, compile=compile, accumulate=3, eval_every=4)
    assert len(exchanges) == 4


# ---------------------------------------------------------------------------- seams


def test_a_loss_of_ones_own_is_trained_on(loaders):
    seen = []

    def focal(logits, labels):
        seen.append((logits.dtype, labels.dtype))
        log_p = logits.log_softmax(1).gather(1, labels[:, None])
        return (-((1 - log_p.exp()) ** 2) * log_p).mean()

    focal_model, _ = run(loaders, criterion=focal)
    plain_model, _ = run(loaders)
    assert set(seen) == {(torch.float32, torch.int64)}
    assert not same_weights(focal_model, plain_model)


def test_a_loss_added_to_the_table_is_used_by_name(loaders, monkeypatch):
    def smoothed(class_weights):
        return nn.CrossEntropyLoss(class_weights, label_smoothing=0.1)

    monkeypatch.setitem(LOSSES, "smoothed", smoothed)
    named, _ = run(loaders, criterion="smoothed", class_weights=[1, 2, 3])
    own = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]), label_smoothing=0.1)
    given, _ = run(loaders, criterion=own)
    assert same_weights(named, given)


def test_a_run_goes_on_only_with_the_loss_that_it_began_with(loaders, tmp_path):
    run(loaders, save_path=tmp_path)
    with pytest.raises(ValueError, match="criterion is MultiMarginLoss.*, but was None"):
        run(loaders, save_path=tmp_path, resume=True, criterion=nn.MultiMarginLoss())


def test_what_happens_to_the_best_model_can_be_chosen(loaders, tmp_path):
    calls = []

    def on_best(model, evaluation, metrics):
        calls.append((metrics["step"], metrics["loss"], evaluation.loss, len(evaluation.labels)))

    _, history = run(loaders, save_path=tmp_path / "m", on_best=on_best)
    best = best_evaluation(history)
    assert calls[0][0] == history["step"][0]
    loss = history["valid_loss"][best]
    assert calls[-1] == (history["step"][best], loss, loss, len(loaders["valid"].dataset))
    assert {path.name for path in (tmp_path / "m").iterdir()} == {"history.csv", "last.pth"}


class SeesAge(nn.Module):
    """Classifies by the mean colour and the age."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, images, age):
        return self.linear(torch.cat([images.mean(dim=(2, 3)), age[:, None]], dim=1))


def test_a_model_is_given_the_inputs_that_it_knows_by_name():
    torch.manual_seed(0)
    age = torch.rand(32)
    labels = (age > 0.5).long()  # which the images do not tell
    inputs = {"images": torch.full((32, 3, 8, 8), 0.5), "age": age, "place": torch.rand(32)}
    batches = [(inputs, labels)]
    model = SeesAge()
    optimizer = make_optimizer(model, 0.1)
    arguments = {"eval_every": 30, "precision": "fp32"}
    _, history = train(model, batches, batches, 2, 60, optimizer, **arguments)
    assert history["valid_balanced_accuracy"][-1] > 0.8
    plain = get_model("simple_cnn", 2, image_size=32)  # knows images alone
    inputs |= {"images": torch.rand(32, 3, 32, 32)}
    assert len(evaluate(plain, [(inputs, labels)]).labels) == 32


class MixUp:
    """mixup (Zhang et al. 2018), each image with the one opposite in the batch."""

    def draw(self, generator, count):
        return torch.rand(count, generator=generator)

    def apply(self, images, labels, drawn):
        share = drawn.to(images.device)[:, None]
        labels = nn.functional.one_hot(labels, 3).float()
        mixed = share * labels + (1 - share) * labels.flip(0)
        share = share[..., None, None]
        return share * images + (1 - share) * images.flip(0), mixed


def test_a_mixture_of_images_and_labels_is_an_entry_of_a_policy(loaders, tmp_path):
    policy = (*POLICIES["standard"], MixUp())
    datasets = {name: loader.dataset for name, loader in loaders.items()}
    mixed = create_dataloaders(datasets, batch_size=8, device="cpu", augmentation=policy)
    _, labels = next(mixed["train"].batches())
    assert labels.shape == (8, 3)
    assert torch.allclose(labels.sum(dim=1), torch.ones(8))
    assert next(iter(mixed["valid"]))[1].dtype == torch.int64
    _, history = run(mixed, save_path=tmp_path)
    assert np.isfinite(history["train_loss"]).all()
    assert run(mixed, save_path=tmp_path, resume=True)[1] == history
    with pytest.raises(
        ValueError, match="train loader is .*'augmentation': True.*, but was .*MixUp"
    ):
        run(loaders, save_path=tmp_path, resume=True)


def test_of_several_processes_each_gets_its_part_of_what_a_policy_draws(loaders):
    dataset = loaders["train"].dataset

    class Marks:
        def draw(self, generator, count):
            return torch.rand(count, generator=generator)

        def apply(self, images, labels, drawn):
            return images, drawn

    def first_labels(batch_size, **options):
        options |= {"augmentation": [Marks()], "device": "cpu"}
        return next(LesionLoader(dataset, batch_size, **options).batches())[1]

    halves = [first_labels(4, rank=rank, world_size=2) for rank in (0, 1)]
    assert torch.equal(torch.cat(halves), first_labels(8))


# ---------------------------------------------------------------------------- resume


class Stopped(Exception):
    pass


def stop_after(number):
    """A hook of an optimizer that ends the run in this step of its, as a kill would."""
    steps = iter(range(1, 1000))

    def hook(optimizer, args, kwargs):
        if next(steps) == number:
            raise Stopped

    return hook


@pytest.mark.parametrize(
    ("name", "accumulate"), [("simple_cnn", 1), ("simple_cnn", 3), ("small_scratch", 1)]
)
def test_a_resumed_run_ends_as_one_that_was_never_stopped(
    loaders, tmp_path, monkeypatch, name, accumulate
):
    monkeypatch.setitem(BACKBONES, "small", small_backbone())

    def go(path, stop_at=None, resume=False):
        model = get_model(name, 3, layers=18, image_size=32, seed=0)
        optimizer = make_optimizer(model)
        scheduler = warmup_cosine(optimizer, 10)
        optimizer.register_step_post_hook(stop_after(stop_at))
        data = (loaders["train"], loaders["valid"], 3, 10)
        options = {"resume": resume, "checkpoint_every": 4, "accumulate": accumulate}
        return train(model, *data, optimizer, scheduler, None, 3, path, **options)

    whole, history = go(tmp_path / "whole")
    with pytest.raises(Stopped):
        go(tmp_path / "halves", stop_at=6)  # the last checkpoint is that of step 4
    resumed, history_resumed = go(tmp_path / "halves", resume=True)
    assert same_weights(whole, resumed)
    for column in set(HISTORY) - {"images_per_second"}:
        assert history[column] == history_resumed[column]
    last = [torch.load(tmp_path / n / "last.pth", weights_only=True) for n in ("whole", "halves")]
    assert all(torch.equal(last[0]["model"][k], last[1]["model"][k]) for k in last[0]["model"])


def test_resuming_a_finished_run_trains_no_further(loaders, tmp_path, auto_precision):
    first, history = run(loaders, save_path=tmp_path)
    again, history_again = run(loaders, save_path=tmp_path, resume=True)
    assert same_weights(first, again)
    assert history == history_again


def test_resuming_where_nothing_is_starts_afresh(loaders, tmp_path):
    fresh, _ = run(loaders, save_path=tmp_path / "a")
    resumed, _ = run(loaders, save_path=tmp_path / "b", resume=True)
    assert same_weights(fresh, resumed)


def test_resuming_another_run_is_refused_and_names_the_difference(loaders, tmp_path):
    run(loaders, save_path=tmp_path)
    with pytest.raises(ValueError, match="num_steps is 9, but was 6"):
        run(loaders, 9, save_path=tmp_path, resume=True)
    with pytest.raises(ValueError, match="learning_rate is .*, but was"):
        run(loaders, learning_rate=5e-3, save_path=tmp_path, resume=True)
    with pytest.raises(ValueError, match="model is .*resnet_scratch.*, but was .*simple_cnn"):
        run(loaders, name="resnet_scratch", save_path=tmp_path, resume=True)


def test_resuming_with_another_schedule_is_refused(loaders, tmp_path):
    for warmup_fraction, resume in ((0.2, False), (0.8, True)):
        model = get_model("simple_cnn", 3, image_size=32, seed=0)
        optimizer = make_optimizer(model)
        scheduler = warmup_cosine(optimizer, 4, warmup_fraction)
        arguments = (model, loaders["train"], loaders["valid"], 3, 4, optimizer, scheduler)
        if resume:
            with pytest.raises(ValueError, match="scheduler is .*, but was"):
                train(*arguments, save_path=tmp_path, resume=True)
        else:
            train(*arguments, save_path=tmp_path)


def as_torch_2_6(checkpoint):
    """What torch 2.6 would have written: other keys in the optimizer's groups and the schedule.

    Checked against torch 2.6.0 and 2.14.1 themselves: runs with AdamW and the schedule of
    `warmup_cosine`, Adam and StepLR, and SGD and ReduceLROnPlateau, stopped under the one, ended
    under the other, in both directions.
    """
    settings = checkpoint["settings"]
    for group in (*checkpoint["optimizer"]["param_groups"], *settings["optimizer"][1]):
        group.pop("decoupled_weight_decay", None)
    checkpoint["scheduler"].pop("_is_initial", None)
    checkpoint["scheduler"]["verbose"] = False
    settings["scheduler"][1].pop("_is_initial", None)
    settings["scheduler"][1]["verbose"] = "False"
    checkpoint["environment"]["torch"] = "2.6.0"


def as_a_later_torch(checkpoint):
    """What a torch to come may write: keys that this one does not know."""
    settings = checkpoint["settings"]
    for group in checkpoint["optimizer"]["param_groups"]:
        group["novelty"] = None
    for group in settings["optimizer"][1]:
        group["novelty"] = "None"
    checkpoint["scheduler"]["novelty"] = 7
    settings["scheduler"][1]["novelty"] = "7"
    checkpoint["environment"]["torch"] = "99.0"


def rewrite(path, change):
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)


@pytest.mark.parametrize("change", [as_torch_2_6, as_a_later_torch])
@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_resuming_under_another_torch_is_a_warning(loaders, tmp_path, change, kind):
    def go(folder, stop_at=None, resume=False):
        model = get_model("simple_cnn", 3, image_size=32, seed=0)
        if kind == "AdamW":
            optimizer = make_optimizer(model)
            scheduler = warmup_cosine(optimizer, 6)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        if stop_at:
            optimizer.register_step_post_hook(stop_after(stop_at))
        data = (loaders["train"], loaders["valid"], 3, 6, optimizer, scheduler)
        return train(*(model, *data, None, 2, folder), resume=resume, checkpoint_every=1)

    whole, history = go(tmp_path / "whole")
    with pytest.raises(Stopped):
        go(tmp_path / "halves", stop_at=5)
    rewrite(tmp_path / "halves/last.pth", change)
    with pytest.warns(UserWarning, match=r"torch is .*, but was (2\.6|99\.0)"):
        resumed, history_resumed = go(tmp_path / "halves", resume=True)
    assert same_weights(whole, resumed)
    assert history["learning_rate"] == history_resumed["learning_rate"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda c: c["settings"]["optimizer"][1][0].update(eps="1e-05"),
            "optimizer is .*, but was",
        ),
        (lambda c: c["settings"]["optimizer"][1].pop(), "optimizer is .*, but was"),
        (
            lambda c: c["settings"]["scheduler"][1].update(base_lrs="[1.0, 1.0]"),
            "scheduler is .*, but was",
        ),
        (lambda c: c["optimizer"]["param_groups"][0].pop("lr"), "group lacks lr"),
        (lambda c: c["optimizer"]["param_groups"][1].pop("params"), "group lacks params"),
        (lambda c: c["scheduler"].pop("last_epoch"), "scheduler lacks last_epoch"),
        (lambda c: c["optimizer"]["state"][0].pop("exp_avg"), "state 0 lacks exp_avg"),
        (lambda c: c["progress"].pop("best_state"), "progress lacks best_state"),
        (lambda c: c["progress"].update(colour="red"), "progress has an unknown colour"),
    ],
)
def test_what_every_torch_has_must_be_there_and_be_the_same(loaders, tmp_path, change, words):
    run(loaders, save_path=tmp_path)
    rewrite(tmp_path / "last.pth", change)
    with pytest.raises(ValueError, match=words):
        run(loaders, save_path=tmp_path, resume=True)


def test_a_checkpoint_of_an_earlier_version_of_this_project_is_gone_on_with(loaders, tmp_path):
    def as_it_was(checkpoint):
        scheduler = checkpoint["settings"]["scheduler"]
        items = (f"{name!r}: {value}" for name, value in scheduler[1].items())
        scheduler[1] = "{" + ", ".join(items) + "}"
        del checkpoint["scaler"], checkpoint["environment"]
        del checkpoint["progress"]["saved_step"], checkpoint["progress"]["learning_rate"]

    _, history = run(loaders, save_path=tmp_path)
    rewrite(tmp_path / "last.pth", as_it_was)
    assert run(loaders, save_path=tmp_path, resume=True)[1] == history


def test_resuming_needs_a_loader_that_knows_its_place(loaders, tmp_path):
    run(loaders, save_path=tmp_path)
    plain = {"train": DataLoader(loaders["train"].dataset, 8), "valid": loaders["valid"]}
    with pytest.raises(ValueError, match="LesionLoader"):
        run(plain, save_path=tmp_path, resume=True)


def test_a_checkpoint_that_would_run_code_is_refused(loaders, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "broken_into"), "w"))

    (tmp_path / "last.pth").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="last.pth"):
        run(loaders, save_path=tmp_path, resume=True)
    assert not (tmp_path / "broken_into").exists()
