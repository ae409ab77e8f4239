"""Checkpoints from strangers: no code is run, and what is wrong is a ValueError of one line.

Plain pickles, truncated files and any bytes are in test_files.py, configs that do not fit in
test_models.py.
"""

import pickletools
import re
import resource
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset import DatasetBuilder, create_dataloaders
from models import get_model, load_model
from predict import main as predict_main
from storage.tensors import load_tensors, save_tensors
from training import make_optimizer, train, warmup_cosine

CLASSES = ["melanoma", "nevus", "vascular lesion"]
NAN, INF = float("nan"), float("inf")


def contents():
    """What training writes to `model.pth`, of the smallest model there is."""
    model = get_model("simple_cnn", 3, image_size=16, seed=0)
    return {
        "config": model.config,
        "classes": CLASSES,
        "image_size": 16,
        "preprocessors": "",
        "metrics": {"accuracy": 0.5},
        "state_dict": dict(model.state_dict()),
        "temperature": 1.5,
        "bias": [0.1, 0.0, -0.1],
        "thresholds": {"melanoma": {"sensitivity 95%": 0.2}},
        "malignant_classes": ["melanoma"],
    }


def refusal(function, path):
    """What is said of the file; asserts that it is one line that names it."""
    with pytest.raises(ValueError) as caught:
        function(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 1000
    return message


def nested():
    value = []
    for _ in range(100):
        value = [value]
    return value


def inside_itself():
    value = []
    value.append(value)
    return value


def many_times_over():
    value = []
    for _ in range(25):
        value = [value, value]
    return value


# ---------------------------------------------------------------------------- what model.pth says


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("classes", [1, 2, 3], "classes"),
        ("classes", ["a", "a", "b"], "classes"),
        ("classes", "abc", "classes"),
        ("classes", ["a", "b"], "2 classes"),
        ("image_size", 10**6, "image_size"),
        ("image_size", -16, "image_size"),
        ("image_size", "16", "image_size"),
        ("image_size", 32, "image_size is 32"),
        ("preprocessors", 5, "preprocessors"),
        ("precision", 5, "precision"),
        ("metrics", [1], "metrics"),
        ("temperature", NAN, "temperature"),
        ("temperature", INF, "temperature"),
        ("temperature", 0.0, "temperature"),
        ("temperature", -1.0, "temperature"),
        ("temperature", 1e-310, "temperature"),
        ("temperature", "1", "temperature"),
        ("temperature", torch.ones(3), "temperature"),
        ("bias", [0.0], "bias"),
        ("bias", [0.0, NAN, 0.0], "bias 1"),
        ("bias", [0.0, "x", 0.0], "bias 1"),
        ("bias", 7, "bias"),
        ("thresholds", [0.1], "thresholds"),
        ("thresholds", {1: {}}, "thresholds"),
        ("thresholds", {"melanoma": 0.5}, "melanoma"),
        ("thresholds", {"melanoma": {"sensitivity 95%": 1.5}}, "melanoma"),
        ("thresholds", {"melanoma": {"sensitivity 95%": NAN}}, "melanoma"),
        ("thresholds", {"melanoma": {"sensitivity 95%": None}}, "melanoma"),
        ("malignant_classes", ["wart"], "malignant_classes"),
        ("malignant_classes", "melanoma", "malignant_classes"),
        ("malignant_classes", [["melanoma"]], "malignant_classes"),
        ("unknown_classes", ["wart"], "unknown_classes"),
        ("unknown_classes", "melanoma", "unknown_classes"),
        ("metrics", {"a": b"bytes"}, "refers to _codecs.encode"),
        ("metrics", {"a": 1j}, "refers to"),
        ("metrics", {"a": torch.float32}, "refers to torch.float32"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_a_model_file_says_must_make_sense(tmp_path, key, value, words):
    path = tmp_path / "model.pth"
    save_tensors(path, contents() | {key: value})
    assert words in refusal(load_model, path)


@pytest.mark.parametrize(
    ("make", "words"), [(nested, "deep"), (inside_itself, "deep"), (many_times_over, "values")]
)
def test_values_within_values_without_end_are_refused(tmp_path, make, words):
    path = tmp_path / "model.pth"
    save_tensors(path, contents() | {"metrics": {"a": make()}})
    assert words in refusal(load_model, path)


@pytest.mark.parametrize(
    "change",
    [
        {"num_classes": 10**9},
        {"num_classes": -3},
        {"num_classes": 3.0},
        {"num_classes": torch.tensor(3)},
        {"image_size": 10**6},
        {"image_size": 8192},
        {"image_size": 10**30},
        {"layers": 10**9},
        {"layers": [[50]]},
        {"dropout_rate": "0.5"},
        {"dropout_rate": torch.tensor(0.5)},
        {"name": "resnet_scratch", "layers": 50},
        {"name": ["simple_cnn"]},
        {"seed_of_evil": 1},
    ],
    ids=str,
)
def test_an_absurd_config_is_refused_before_its_model_takes_memory(tmp_path, change):
    path, own = tmp_path / "model.pth", contents()
    own["config"] = own["config"] | change
    own["image_size"] = own["config"]["image_size"]
    save_tensors(path, own)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal(load_model, path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


# ---------------------------------------------------------------------------- weights


def with_first(number):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[0] = number
        return tensor

    return change


BAD_WEIGHTS = {
    "nan": with_first(NAN),
    "infinite": with_first(INF),
    "too large for float32": lambda t: with_first(1e300)(t.double()),
    "transposed": lambda t: t.T.contiguous(),
    "one class less": lambda t: t[:2].clone(),
    "a scalar": lambda t: torch.tensor(1.0),
    "integers": lambda t: t.long(),
    "complex": lambda t: t.to(torch.complex64),
    "sparse": lambda t: t.to_sparse(),
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "without numbers": lambda t: t.to("meta"),
    "one number for all": lambda t: torch.zeros(1).expand(t.shape),
    "a list": lambda t: t.tolist(),
    "none": lambda t: None,
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("change", BAD_WEIGHTS.values(), ids=BAD_WEIGHTS.keys())
def test_weights_that_cannot_be_used_are_refused(tmp_path, change):
    path, own = tmp_path / "model.pth", contents()
    own["state_dict"]["head.6.weight"] = change(own["state_dict"]["head.6.weight"])
    save_tensors(path, own)
    refusal(load_model, path)


@pytest.mark.parametrize("number", [NAN, -INF])
def test_the_tensor_whose_numbers_are_not_finite_is_named(tmp_path, number):
    path, own = tmp_path / "model.pth", contents()
    own["state_dict"]["head.3.bias"] = with_first(number)(own["state_dict"]["head.3.bias"])
    save_tensors(path, own)
    assert "head.3.bias has numbers that are not finite" in refusal(load_model, path)


def test_a_weight_too_many_or_too_few_is_named(tmp_path):
    path, own = tmp_path / "model.pth", contents()
    kept = own["state_dict"].pop("head.0.bias")
    save_tensors(path, own)
    assert "lacks head.0.bias" in refusal(load_model, path)
    own["state_dict"] |= {"head.0.bias": kept, "fc.weight": kept}
    save_tensors(path, own)
    assert "has an unknown fc.weight" in refusal(load_model, path)


def test_a_resnet_with_negative_variances_is_refused(tmp_path):
    model = get_model("resnet_scratch", 3, layers=18, image_size=16, seed=0)
    model.backbone.bn1.running_var[3] = -1.0
    path = tmp_path / "model.pth"
    save_tensors(path, contents() | {"config": model.config, "state_dict": model.state_dict()})
    assert "backbone.bn1.running_var" in refusal(load_model, path)


@pytest.mark.parametrize(
    ("name", "number"), [("conv1.weight", NAN), ("layer4.1.bn2.running_mean", INF)]
)
def test_pretrained_weights_that_are_not_finite_are_named(tmp_path, name, number):
    from torchvision.models import resnet18

    path, weights = tmp_path / "resnet.pth", resnet18(weights=None).state_dict()
    weights[name].view(-1)[0] = number
    torch.save(weights, path)

    def start_from(path):
        get_model("resnet_finetuned", 3, layers=18, weights=path)

    assert f"{name} has numbers that are not finite" in refusal(start_from, path)


# ---------------------------------------------------------------------------- files


def rewritten(path, change_pickle=lambda p: p, compression=zipfile.ZIP_STORED, more=()):
    """The same file, but with another pickle, compressed or with other entries."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, value in [*entries.items(), *more]:
            archive.writestr(name, change_pickle(value) if name.endswith("/data.pkl") else value)


def numbers_replaced(old, new):
    """A change of a pickle: every number `old`, of one byte, becomes `new`."""

    def change(pickled):
        places = [at for op, arg, at in pickletools.genops(pickled)
                  if op.name == "BININT1" and arg == old]  # fmt: skip
        for at in reversed(places):
            pickled = pickled[:at] + b"\x8a\x08" + new.to_bytes(8, "little") + pickled[at + 2 :]
        return pickled

    return change


@pytest.mark.parametrize("claimed", [10**4, 10**9, 2**60])
def test_a_tensor_that_claims_more_numbers_than_the_file_has_is_refused(tmp_path, claimed):
    path = tmp_path / "model.pth"
    torch.save({"w": torch.arange(100.0)}, path)
    rewritten(path, numbers_replaced(100, claimed))
    refusal(load_tensors, path)


@pytest.mark.parametrize("claimed", [150, 10**4, 10**9, 2**60])
def test_and_so_it_is_in_the_format_of_old(tmp_path, claimed):
    path = tmp_path / "model.pth"
    torch.save({"w": torch.arange(100.0)}, path, _use_new_zipfile_serialization=False)
    contents = path.read_bytes()
    at = contents.rindex(b"Kd", 0, contents.rindex(b"storage") + 200)
    number = b"\x8a\x08" + claimed.to_bytes(8, "little")
    path.write_bytes(contents[:at] + number + contents[at + 2 :])
    refusal(load_tensors, path)


def test_a_zip_bomb_is_refused_before_it_is_inflated(tmp_path):
    path = tmp_path / "model.pth"
    save_tensors(path, contents())
    bomb = ("model/data/99", bytes(80 * 2**20))
    rewritten(path, compression=zipfile.ZIP_DEFLATED, more=[bomb])
    assert path.stat().st_size < 2 * 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "compressed" in refusal(load_model, path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_an_object_that_takes_memory_by_being_named_is_refused(tmp_path):
    path = tmp_path / "model.pth"
    save_tensors(path, {"a": 1})
    pickled = b"\x80\x02c__builtin__\nbytearray\n\x8a\x06" + (10**13).to_bytes(6, "little")
    rewritten(path, lambda _: pickled + b"\x85R.")
    assert "bytearray" in refusal(load_tensors, path)


@pytest.mark.parametrize("name", ["posix\nsystem", "os\nsystem", "builtins\neval"])
def test_a_pickle_within_a_zip_that_would_run_code_is_refused(tmp_path, name):
    path, proof = tmp_path / "model.pth", tmp_path / "proof"
    save_tensors(path, {"a": 1})
    command = f"touch {proof}".encode()
    pickled = b"\x80\x02c" + name.encode() + b"\nX" + len(command).to_bytes(4, "little") + command
    rewritten(path, lambda _: pickled + b"\x85R.")
    assert name.replace("\n", ".") in refusal(load_model, path)
    assert not proof.exists()


def test_a_zip_of_something_else_and_two_in_one_are_refused(tmp_path):
    path = tmp_path / "model.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("report.txt", "nothing to see")
    refusal(load_model, path)
    save_tensors(path, contents())
    rewritten(path, more=[("MODEL/Data.pkl", b"\x80\x02K\x01.")])
    refusal(load_model, path)


def test_the_command_says_it_in_one_line(tmp_path, capfd):
    path = tmp_path / "model.pth"
    save_tensors(path, contents() | {"temperature": NAN})
    (tmp_path / "image.png").touch()
    assert predict_main(["--model", str(path), str(tmp_path / "image.png")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("predict.py: error:") and str(path) in line and "temperature" in line


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "model.pth"
    save_tensors(path, contents())
    return path.read_bytes(), path.with_name("mutated.pth")


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_file_with_any_bytes_changed_is_refused_or_the_same_model(whole, data):
    original, path = whole
    mutated = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        # Near its ends, or anywhere: most of the file is weights.
        near_end = st.integers(1, 2000).map(lambda n: -n)
        at = data.draw(st.integers(0, 3000) | near_end | st.integers(0, len(mutated) - 1))
        mutated[at] = data.draw(st.integers(0, 255))
    path.write_bytes(mutated)
    try:
        model, info = load_model(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    else:
        expected = contents()
        assert info["classes"] == CLASSES and info["temperature"] == expected["temperature"]
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected["state_dict"][name])


# ---------------------------------------------------------------------------- last.pth


@pytest.fixture
def run(make_images, tmp_path):
    """Trains a small model as the driver does; with `resume`, from the `last.pth` that is there."""
    splits, _ = DatasetBuilder(make_images({"a": 12, "b": 10, "c": 10}), image_size=16).build()
    loaders = create_dataloaders(splits, batch_size=8, device="cpu")

    def train_some(resume=False):
        model = get_model("simple_cnn", 3, image_size=16, seed=0)
        optimizer = make_optimizer(model)
        data = (loaders["train"], loaders["valid"], 3, 4, optimizer, warmup_cosine(optimizer, 4))
        return train(model, *data, eval_every=2, save_path=tmp_path, resume=resume)

    return train_some


def put(contents, place, value):
    *parts, last = place
    for part in parts:
        contents = contents[part]
    contents[last] = value


BAD_CHECKPOINTS = [
    (("progress",), 5),
    (("progress", "step"), "4"),
    (("progress", "step"), -1),
    (("progress", "step"), 10**12),
    (("progress", "evaluations_since_best"), None),
    (("progress", "history"), []),
    (("progress", "history"), {}),
    (("progress", "history", "step"), [1]),
    (("progress", "history", "valid_loss"), ["a", "b"]),
    (("progress", "recent_losses"), [NAN]),
    (("progress", "recent_losses"), 3),
    (("progress", "best_metrics"), {"loss": "low"}),
    (("progress", "best_state"), {}),
    (("progress", "best_state", "head.6.bias"), torch.tensor([NAN, 0, 0])),
    (("progress", "colour"), "red"),
    (("model",), None),
    (("model", "head.6.bias"), torch.zeros(4)),
    (("model", "head.6.bias"), torch.tensor([NAN, 0, 0])),
    (("optimizer",), []),
    (("optimizer", "state", 0, "exp_avg"), torch.zeros(3)),
    (("optimizer", "state", 0, "exp_avg_sq"), "zeros"),
    (("optimizer", "state", 0, "step"), torch.zeros(2)),
    (("optimizer", "state", 0), {}),
    (("optimizer", "state", 99), {}),
    (("optimizer", "param_groups"), []),
    (("optimizer", "param_groups", 0, "lr"), "fast"),
    (("optimizer", "param_groups", 0, "lr"), NAN),
    (("optimizer", "param_groups", 0, "betas"), 0.9),
    (("optimizer", "param_groups", 0, "params"), [0]),
    (("scheduler",), None),
    (("scheduler", "last_epoch"), "four"),
    (("scheduler", "base_lrs"), [0.1]),
    (("scheduler", "lr_lambdas"), [5]),
    (("settings",), "mine"),
    (("settings", "seed"), torch.ones(2)),
]


def test_a_checkpoint_to_resume_from_that_was_tampered_with_is_refused(run, tmp_path):
    run()
    path = tmp_path / "last.pth"
    whole = path.read_bytes()
    for place, value in BAD_CHECKPOINTS:
        path.write_bytes(whole)
        checkpoint = torch.load(path, weights_only=True)
        put(checkpoint, place, value)
        save_tensors(path, checkpoint)
        with pytest.raises(ValueError) as caught:
            run(resume=True)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value), place
    path.write_bytes(whole)
    run(resume=True)


def test_a_file_of_anything_else_is_no_checkpoint_to_resume_from(run, tmp_path):
    path = tmp_path / "last.pth"
    for value in (None, [], {"settings": {}}, torch.zeros(3), contents()):
        save_tensors(path, value)
        assert "not a checkpoint of this program" in refusal(lambda _: run(resume=True), path)
    path.write_bytes(b"")
    refusal(lambda _: run(resume=True), path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
def test_loading_takes_no_more_memory_than_the_file_needs_whatever_it_claims(tmp_path):
    path = tmp_path / "model.pth"
    own = contents()
    own["config"] |= {"image_size": 8000}
    save_tensors(path, own | {"image_size": 8000})
    status = Path("/proc/self/status").read_text()
    taken = int(re.search(r"VmData:\s+(\d+) kB", status)[1]) * 1024
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (taken + 2**29, limits[1]))
    try:
        with pytest.raises(RuntimeError, match="allocate"):
            torch.empty(2**30, dtype=torch.uint8)  # the limit works
        message = refusal(load_model, path)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
    assert "backbone.7.weight has shape (256, 64), not (256, 16000000)" in message
