"""Runs that are stopped, by a signal, by another run or by numbers that are none."""

import contextlib
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import visualizations
from dataset import DatasetBuilder, create_dataloaders
from experiment.external import EvaluationSettings, evaluate_folder
from experiment.run_folder import claim
from models import get_model, load_model
from predict import main as predict_main
from storage.tensors import save_tensors
from tests.samples import snapshot, training_flags
from train_models import main
from training import NonFiniteLossError, make_optimizer, train, warmup_cosine

ROOT = Path(__file__).parents[2]
SIGNALS = (signal.SIGINT, signal.SIGTERM)
pytestmark = pytest.mark.usefixtures("quick_figures")


@pytest.fixture
def loaders(make_images):
    splits, _ = DatasetBuilder(make_images({"a": 24, "b": 16, "c": 12}), image_size=32).build()
    return create_dataloaders(splits, batch_size=8, device="cpu")


@pytest.fixture
def at_step():
    """A function that has another called at the end of an optimizer's step of this number."""
    handles = []

    def register(number, action):
        steps = iter(range(1, 10**6))

        def hook(optimizer, args, kwargs):
            if next(steps) == number:
                action()

        handles.append(register_optimizer_step_post_hook(hook))

    yield register
    for handle in handles:
        handle.remove()


@pytest.fixture(autouse=True)
def _same_handlers_after():
    """No test may leave a handler behind, and neither may what it tests."""
    before = [signal.getsignal(signum) for signum in SIGNALS]
    yield
    assert [signal.getsignal(signum) for signum in SIGNALS] == before


@pytest.fixture
def handled():
    """The signals that a handler of the user's has got, which raises KeyboardInterrupt."""
    got = []

    def handle(signum, frame):
        got.append(signum)
        raise KeyboardInterrupt

    before = {signum: signal.signal(signum, handle) for signum in SIGNALS}
    yield got
    for signum, handler in before.items():
        signal.signal(signum, handler)


def run(loaders, folder=None, num_steps=10, model=None, **options):
    model = model or get_model("simple_cnn", 3, image_size=32, seed=0)
    optimizer = make_optimizer(model)
    scheduler = warmup_cosine(optimizer, num_steps)
    arguments = {"eval_every": 3, "checkpoint_every": 2, "save_path": folder} | options
    data = (loaders["train"], loaders["valid"], 3, num_steps)
    return train(model, *data, optimizer, scheduler, **arguments)


def last(folder):
    return torch.load(folder / "last.pth", weights_only=True)


def assert_same_end(one, other):
    """The same weights and history, to the last bit."""
    (first, history), (second, history_again) = one, other
    second = second.state_dict()
    assert all(torch.equal(value, second[key]) for key, value in first.state_dict().items())
    for column in history.keys() - {"images_per_second"}:
        assert history[column] == history_again[column], column


def send(*signums):
    return lambda: [signal.raise_signal(signum) for signum in signums]


# ---------------------------------------------------------------------------- signals, the library


@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize(
    ("step", "options"),  # between evaluations, at one, at the last
    [(5, {}), (6, {"accumulate": 2, "early_stopping_patience": 3}), (10, {})],
)
def test_a_signal_ends_the_step_and_resuming_ends_as_if_there_had_been_none(
    loaders, tmp_path, at_step, handled, signum, step, options
):
    whole = run(loaders, tmp_path / "whole", **options)
    at_step(step, send(signum))
    with pytest.raises(KeyboardInterrupt):
        run(loaders, tmp_path / "halves", **options)
    assert handled == [signum]
    assert last(tmp_path / "halves")["progress"]["step"] == step
    resumed = run(loaders, tmp_path / "halves", resume=True, **options)
    assert_same_end(whole, resumed)
    tables = [pd.read_csv(tmp_path / name / "history.csv") for name in ("whole", "halves")]
    columns = [column for column in tables[0] if column != "images_per_second"]
    assert tables[0][columns].equals(tables[1][columns])
    assert (tables[1]["images_per_second"] > 0).all()


@pytest.mark.parametrize("evaluation", [1, 4])  # the fourth is that after the last step
def test_a_signal_ends_an_evaluation_at_once_and_resuming_does_it_again(
    loaders, tmp_path, handled, evaluation
):
    whole = run(loaders, tmp_path / "whole")
    model = get_model("simple_cnn", 3, image_size=32, seed=0)
    batches = iter(range(1, 1000))
    first = (evaluation - 1) * len(list(loaders["valid"])) + 1

    def interrupt(module, inputs):
        if not module.training:
            number = next(batches)
            assert number <= first, "the evaluation went on"
            if number == first:
                os.kill(os.getpid(), signal.SIGTERM)

    model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(loaders, tmp_path / "halves", model=model)
    contents = last(tmp_path / "halves")["progress"]
    assert contents["step"] == [3, 6, 9, 10][evaluation - 1]
    assert len(contents["history"].get("step", [])) == evaluation - 1
    assert_same_end(whole, run(loaders, tmp_path / "halves", resume=True))


def test_a_second_signal_ends_the_step_and_leaves_the_former_checkpoint(
    loaders, tmp_path, at_step, handled, monkeypatch
):
    whole = run(loaders, tmp_path / "whole")
    monkeypatch.setattr("learning.processes.SECONDS_OF_ONE_SIGNAL", 0.0)
    at_step(6, send(signal.SIGINT, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run(loaders, tmp_path / "halves")
    assert handled == [signal.SIGINT]
    assert last(tmp_path / "halves")["progress"]["step"] == 4
    assert_same_end(whole, run(loaders, tmp_path / "halves", resume=True))


def test_the_same_signal_twice_within_a_second_is_one(loaders, tmp_path, at_step, handled):
    at_step(5, send(signal.SIGTERM, signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        run(loaders, tmp_path)
    assert handled == [signal.SIGTERM]
    assert last(tmp_path)["progress"]["step"] == 5


def test_ctrl_c_reaches_the_user_where_nothing_is_saved(loaders, at_step):
    at_step(2, send(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run(loaders)


def test_the_end_is_the_end_even_for_a_handler_that_goes_on(loaders, tmp_path, at_step, handled):
    signal.signal(signal.SIGTERM, lambda signum, frame: handled.append(signum))
    at_step(5, send(signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        run(loaders, tmp_path)
    assert handled == [signal.SIGTERM]


def test_a_signal_that_is_ignored_stays_ignored(loaders, at_step, handled):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    at_step(2, send(signal.SIGINT))
    assert run(loaders)[1]["step"] == [3, 6, 9, 10]


def test_another_thread_leaves_the_handlers_alone(loaders, at_step):
    before = [signal.getsignal(signum) for signum in SIGNALS]
    seen, results = [], []
    at_step(2, lambda: seen.extend(signal.getsignal(signum) for signum in SIGNALS))
    thread = threading.Thread(target=lambda: results.append(run(loaders)))
    thread.start()
    thread.join()
    assert seen == before
    assert results[0][1]["step"] == [3, 6, 9, 10]


# ---------------------------------------------------------------------------- signals, the command


@pytest.fixture
def arguments(make_images, tmp_path):
    root = make_images({"melanoma": 20, "nevus": 14})
    return training_flags(
        root, tmp_path / "out", num_steps=6, models="simple_cnn", checkpoint_every=4
    )


def said_command(line):
    """The arguments of the command that a line says how to go on with."""
    words = shlex.split(line.partition("continue with: ")[2])
    assert words[:2] == ["python", "train_models.py"]
    return words[2:]


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("signum", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143)],
)
def test_a_stopped_run_says_the_command_that_ends_it_as_if_it_had_not_been(
    arguments, tmp_path, at_step, capfd, signum, status
):
    assert main([*arguments, "--save_dir", str(tmp_path / "whole")]) == 0
    capfd.readouterr()
    at_step(5, send(signum))
    assert main(arguments) == status
    (line,) = capfd.readouterr().err.splitlines()
    assert f"stopped by {signum.name}" in line
    assert main(said_command(line)) == 0
    whole, resumed = (tmp_path / run / "simple_cnn/predictions.csv" for run in ("whole", "out"))
    assert whole.read_bytes() == resumed.read_bytes()


@pytest.mark.usefixtures("no_figures")
def test_a_signal_while_images_are_prepared_leaves_nothing(arguments, tmp_path, monkeypatch, capfd):
    from imaging import cache

    make_thumbnail = cache.make_thumbnail

    def interrupted(image):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        return make_thumbnail(image)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "make_thumbnail", interrupted)
        assert main(arguments) == 130
    (line,) = capfd.readouterr().err.splitlines()
    assert line == "train_models.py: stopped by SIGINT; nothing was changed"
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "processed").rglob("*.npy"))
    assert main([*arguments, "--resume"]) == 0


@pytest.mark.usefixtures("quick_figures")
@pytest.mark.parametrize("where", ["plot_samples", "plot_reliability", "plot_model_comparison"])
def test_a_signal_while_figures_are_drawn_leaves_none_half_written(
    arguments, tmp_path, monkeypatch, capfd, where
):
    def interrupted(*args, save_path, **kwargs):
        send(signal.SIGTERM, signal.SIGTERM)()

    with monkeypatch.context() as patch:
        patch.setattr(visualizations, where, interrupted)
        assert main(arguments) == 143
    (line,) = capfd.readouterr().err.splitlines()
    assert not list(tmp_path.rglob("*.tmp*"))
    assert not (tmp_path / "out/report.html").exists()
    assert main(said_command(line)) == 0
    assert (tmp_path / "out/report.html").exists()


def test_a_real_process_ends_in_one_line_with_the_status_of_its_signal(arguments, start, tmp_path):
    words = [*arguments, "--num_steps", "100000", "--eval_every", "100000"]
    process = start(ROOT / "train_models.py", *words, "--checkpoint_every", "10")
    while not (tmp_path / "out/simple_cnn/last.pth").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    (line,) = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 143
    assert said_command(line)[-1] == "--resume"


@pytest.fixture
def prediction(make_images, tmp_path, monkeypatch):
    """The flags of a prediction of 3000 images in batches of one, in the folder it is run in."""
    images = make_images({"a": 1})
    for number in range(2999):
        os.link(images / "a/0000.png", images / f"a/copy {number}.png")
    model = get_model("simple_cnn", 2, image_size=32, weights=None)
    contents = {"config": model.config, "classes": ["a", "b"], "image_size": 32}
    contents |= {"preprocessors": "", "state_dict": model.state_dict()}
    save_tensors(tmp_path / "model.pth", contents)
    monkeypatch.chdir(tmp_path)
    return ["--model", "model.pth", "raw", "--device", "cpu", "--batch_size", "1"]


@pytest.mark.parametrize(
    ("signum", "output"), [(signal.SIGINT, "out.csv"), (signal.SIGTERM, "out.json")]
)
def test_a_prediction_that_is_stopped_ends_in_one_line_without_half_a_file(
    prediction, start, tmp_path, signum, output
):
    before = sorted(tmp_path.iterdir())
    process = start(ROOT / "predict.py", *prediction, "--output", output)
    while not list(tmp_path.glob(".out.*.tmp*")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signum)
    (line,) = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 128 + signum
    assert line == f"predict.py: stopped by {signum.name}; nothing was written"
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize("where", ["predict.Ensemble.__init__", "tqdm.tqdm.write"])
def test_a_prediction_can_be_stopped_at_any_moment(
    prediction, tmp_path, monkeypatch, capfd, signum, where
):
    (tmp_path / "out.csv").write_text("earlier")
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(where, lambda *_, **__: signal.raise_signal(signum))
    assert predict_main([*prediction, "--output", "out.csv", "--overwrite"]) == 128 + signum
    captured = capfd.readouterr()
    assert captured.err == f"predict.py: stopped by {signum.name}; nothing was written\n"
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "out.csv").read_text() == "earlier"


def test_overlays_are_whole_when_drawing_them_is_stopped(prediction, tmp_path, monkeypatch, capfd):
    save, drawn = Image.Image.save, []

    def stop_at_the_third(image, path, **options):
        save(image, path, **options)
        drawn.append(path)
        if len(drawn) == 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", stop_at_the_third)
        assert predict_main([*prediction, "--gradcam", "cam"]) == 130
    (line,) = capfd.readouterr().err.splitlines()
    assert line == "predict.py: stopped by SIGINT; the overlays drawn so far are in cam"
    overlays = list((tmp_path / "cam").iterdir())
    assert overlays  # several threads draw them
    for overlay in overlays:
        with Image.open(overlay) as image:
            image.load()


def test_a_second_ctrl_c_ends_a_way_out_that_takes_long():
    script = """
import time, train_models

def run(settings, is_demo):
    try:
        print("running", flush=True)
        time.sleep(60)
    finally:
        print("leaving", flush=True)
        time.sleep(60)

train_models.run = run
train_models.main(["--demo"])
"""
    words = [sys.executable, "-c", script]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "leaving\n"
        process.send_signal(signal.SIGINT)  # of the same moment, as timeout(1) sends two
        time.sleep(1.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == -signal.SIGINT


QUICK_FIGURES = """
import matplotlib.figure, sys, train_models
from PIL import Image
def save(figure, file, *, format, **options):
    Image.new("RGB", (8, 8)).save(file, format)
matplotlib.figure.Figure.savefig = save
sys.exit(train_models.main())
"""


def test_runs_killed_at_random_moments_end_as_if_they_had_not_been(arguments, start, tmp_path):
    """As benchmarks/crash.py does, which does it more often and draws the figures."""
    script = tmp_path / "quick_figures.py"
    script.write_text(QUICK_FIGURES)
    script_and_words = [script, *arguments, "--num_steps", "40", "--checkpoint_every", "4"]
    started = time.monotonic()
    whole = start(*script_and_words, "--save_dir", tmp_path / "whole")
    assert whole.wait(timeout=120) == 0, whole.communicate()
    duration = time.monotonic() - started
    rng = random.Random(time.time_ns())
    for _ in range(6):
        run = start(*script_and_words, "--resume")
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(rng.uniform(0, duration))
        run.kill()
        assert run.wait(60) in (0, -signal.SIGKILL), run.communicate()
    assert start(*script_and_words, "--resume").wait(timeout=120) == 0
    weights, resumed = (
        load_model(tmp_path / name / "simple_cnn/model.pth")[0].state_dict()
        for name in ("whole", "out")
    )
    assert all(torch.equal(value, resumed[key]) for key, value in weights.items())
    tables = [tmp_path / name / "simple_cnn/predictions.csv" for name in ("whole", "out")]
    assert tables[0].read_bytes() == tables[1].read_bytes()
    assert not list(tmp_path.rglob("*.tmp*"))


# ---------------------------------------------------------------------------- two at once


OWNER = """
import sys, time
from pathlib import Path
from experiment.run_folder import claim
with claim(sys.argv[1]):
    Path("claimed").touch()
    time.sleep(600)
"""


@pytest.mark.usefixtures("no_figures")
def test_a_second_run_names_the_first_and_touches_nothing(
    arguments, start, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr("experiment.run_folder.SECONDS_TO_WAIT", 0.1)
    out = tmp_path / "out"
    (tmp_path / "owner.py").write_text(OWNER)
    owner = start(tmp_path / "owner.py", out, cwd=tmp_path)
    while not (tmp_path / "claimed").exists() and owner.poll() is None:
        time.sleep(0.02)
    before = snapshot(out)
    for words in (arguments, [*arguments, "--resume"], [*arguments[:4], "--audit_only"]):
        assert main(words) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert f"{out} is in use by process {owner.pid} on " in line
    assert snapshot(out) == before
    owner.kill()
    owner.wait()
    assert main(arguments) == 0  # the claim has gone with its process
    model, found = out / "simple_cnn/model.pth", tmp_path / "found"
    with claim(found), pytest.raises(ValueError, match=f"in use by process {os.getpid()} on"):
        evaluate_folder([model], arguments[1], found, EvaluationSettings(device="cpu"))
    assert not (found / ".owner").exists()


LEFTOVER = ".metrics.0123456789abcdef.tmp.json"
WRITE = """
import sys
from storage.files import write_atomically
with write_atomically(sys.argv[1]) as temporary:
    temporary.write_text("whole")
    print(flush=True)
    input()
"""


def test_a_claim_removes_what_killed_runs_left_half_written(tmp_path):
    out = tmp_path / "out"
    for folder in (".", "simple_cnn", "demo/simple_cnn", "deeper/down"):
        (out / folder).mkdir(parents=True, exist_ok=True)
        (out / folder / LEFTOVER).write_text("{")
    (out / "demo/.lock").touch()  # another run's folder, which may be running
    (out / "demo" / LEFTOVER).write_text("{")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / LEFTOVER).write_text("{")
    (out / "link").symlink_to(tmp_path / "elsewhere")
    (out / "simple_cnn/metrics.json").write_text("{}")
    with claim(out):
        pass
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob(LEFTOVER)}
    kept = ("out/demo", "out/demo/simple_cnn", "out/deeper/down", "elsewhere")
    assert left == {f"{folder}/{LEFTOVER}" for folder in kept}
    assert (out / "simple_cnn/metrics.json").read_text() == "{}"


def test_a_claim_leaves_what_a_prediction_is_writing_in_the_folder(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    words = [sys.executable, "-c", WRITE, str(out / "table.csv")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, env=environment, **pipes) as writer:
        writer.stdout.readline()
        with claim(out):
            pass
        writer.communicate(b"go on\n")
    assert writer.returncode == 0
    assert (out / "table.csv").read_text() == "whole"
    with claim(out):
        assert not list(out.glob("*.tmp*"))


# ---------------------------------------------------------------------------- numbers


def test_a_loss_that_is_not_finite_names_what_is_kept(loaders, tmp_path):
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = get_model("simple_cnn", 3, image_size=32, seed=0)
            self.calls = 0

        def forward(self, images):
            self.calls += self.training
            return self.inner(images) * (float("nan") if self.calls >= 8 else 1)

    message = r"nan at step 8 \(learning rate .*m/last.pth is from step 6, .*from step [36]"
    with pytest.raises(NonFiniteLossError, match=message):
        run(loaders, tmp_path / "m", model=Breaks())
    assert (tmp_path / "m/model.pth").exists()


@pytest.mark.parametrize("step", [4, 6, 10])  # a checkpoint is due, an evaluation, the end
def test_weights_that_are_not_finite_are_never_saved(loaders, tmp_path, at_step, step):
    model = get_model("simple_cnn", 3, image_size=32, seed=0)

    def overflow():  # when the loss of the step is known already
        with torch.no_grad():
            model.head[-1].bias.fill_(-torch.inf)

    at_step(step, overflow)
    with pytest.raises(NonFiniteLossError, match=rf"head.* is not finite at step {step} \(learn"):
        run(loaders, tmp_path, model=model)
    contents = last(tmp_path)
    assert contents["progress"]["step"] < step
    assert all(tensor.isfinite().all() for tensor in contents["model"].values())


def test_before_the_first_checkpoint_there_is_none_to_name(loaders, tmp_path, at_step):
    model = get_model("simple_cnn", 3, image_size=32, seed=0)
    at_step(1, lambda: model.head[-1].bias.detach().fill_(torch.nan))
    with pytest.raises(NonFiniteLossError, match="no checkpoint was written before"):
        run(loaders, tmp_path, model=model)


# ---------------------------------------------------------------------------- cost


def test_checkpoints_take_a_hundredth_of_the_time_however_slow_the_disk(
    loaders, tmp_path, monkeypatch
):
    written = []

    def slow(path, contents):
        time.sleep(0.2)
        written.append(path.name)

    monkeypatch.setattr("training.SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    monkeypatch.setattr("learning.checkpoints.save_tensors", slow)
    run(loaders, tmp_path, checkpoint_every=None)
    assert written.count("last.pth") == 2  # after the first step and at the end


# ---------------------------------------------------------------------------- another machine


def test_resuming_with_another_torch_or_machine_is_a_warning(loaders, tmp_path, at_step):
    at_step(5, send(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run(loaders, tmp_path)
    contents = last(tmp_path)
    assert contents["environment"].keys() == {"torch", "threads", "device"}
    contents["environment"] |= {"torch": "1.0", "device": "an abacus"}
    torch.save(contents, tmp_path / "last.pth")
    with pytest.warns(
        UserWarning, match=r"device is cpu.*, but was an abacus; torch is .*, but was 1.0"
    ):
        assert run(loaders, tmp_path, resume=True)[1]["step"] == [3, 6, 9, 10]
