"""What the documentation shows."""

import re
import shlex
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest

import augmentation
import models
import predict
import train_models
from imaging import sources

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "info.md", *ROOT.glob("docs/*.md")]


def code_blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-").lower() for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target


def test_the_readme_fits_on_a_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1200


def test_the_examples_of_extending_run_as_they_stand(make_images, tmp_path, monkeypatch, capsys):
    make_images({"melanoma": 24, "nevus": 24}, name="data/raw")
    monkeypatch.chdir(tmp_path)
    # What the examples add is removed again at the end.
    namespace = {}
    with (
        patch.dict(models.BACKBONES),
        patch.dict(augmentation.POLICIES),
        patch.dict(sources.READERS),
    ):
        for block in code_blocks(ROOT / "docs/extending.md", "python"):
            exec(block, namespace)
        (tmp_path / "flat").mkdir()
        (tmp_path / "flat/index.json").write_text('[{"file": "a.jpg", "diagnosis": "nevus"}]')
        assert sources.read_folder(tmp_path / "flat")["class"].tolist() == ["nevus"]
    assert len(namespace["history"]["valid_loss"]) == 1  # of the model with a second input
    assert capsys.readouterr().out.startswith("[")


# Commands that no test runs. Those of benchmarks/ and of docs/results.md, whose numbers are shown,
# were run by hand as well.
BY_HAND = (
    "make",
    "python3 -m venv",
    ".venv/bin/pip",
    "find",
    "torchrun",  # in tests/test_train_models.py, with other flags
    "python predict.py --model models/resnet_scratch --export",  # in test_export.py
)
SMALL = "--models simple_cnn --image_size 16 --num_steps 2 --batch_size 8 --device cpu"


def commands_of(page):
    lines = "\n".join(code_blocks(page, "sh")).splitlines()
    return [line for line in lines if line and not line.startswith(BY_HAND)]


def table_in(page, start):
    """The table on a page whose first line starts so."""
    blocks = code_blocks(ROOT / "docs" / page, "text")
    return next(block for block in blocks if block.startswith(start))


@pytest.fixture(scope="module")
def folder_of_a_user(make_module_images, tmp_path_factory):
    """All files that the commands name, and models trained on the images in `data/raw`."""
    folder = tmp_path_factory.mktemp("user")
    classes = ["actinic keratosis", "melanoma", "nevus"]
    counts = {f"{split}/{name}": 12 for split in ("Train", "Test") for name in classes}
    shutil.copytree(make_module_images(counts), folder / "data/raw")
    paths = iter(sorted((folder / "data/raw").rglob("*.png")))
    lesions = table_in("data.md", "image_id,")
    (folder / "lesions.csv").write_text(lesions)
    (folder / "map.csv").write_text(table_in("prediction.md", "old,"))
    for line in lesions.split()[1:]:
        image = next(paths)
        image.rename(image.with_stem(line.split(",")[0]))
    for number, image in enumerate(paths, 20000):
        image.rename(image.with_stem(f"ISIC_{number:07}"))
    nevus = sorted((folder / "data/raw/Train/nevus").iterdir())[-1]
    shutil.copy(nevus, folder / "data/raw/Train/actinic keratosis/ISIC_0030999.png")
    shutil.copytree(folder / "data/raw/Test", folder / "other_hospital")
    shutil.copytree(folder / "data/raw/Test/nevus", folder / "new")
    shutil.copytree(folder / "new", folder / "new_images")
    (folder / "images").mkdir()
    rows = ["image_id,lesion_id,dx"]
    for number, image in enumerate(sorted((folder / "data/raw").rglob("*.png"))):
        shutil.copy(image, folder / "images" / image.name)
        rows.append(f"{image.stem},{number},{image.parent.name}")
    (folder / "HAM10000_metadata.csv").write_text("\n".join(rows))
    shutil.copytree(folder / "images", folder / "HAM10000/HAM10000_images")
    shutil.copy(folder / "HAM10000_metadata.csv", folder / "HAM10000")
    for name in ("simple_cnn", "resnet_scratch", "resnet_finetuned"):
        model = models.get_model("simple_cnn", 3, image_size=16, seed=0)
        (folder / "trained" / name).mkdir(parents=True)
        info = models.ModelInfo(config=model.config, classes=classes, image_size=16)
        info.save(folder / "trained" / name / "model.pth", model.state_dict())
    return folder


@pytest.mark.parametrize("page", [*filter(commands_of, PAGES)], ids=lambda page: page.name)
def test_every_command_runs(
    page, folder_of_a_user, tmp_path, monkeypatch, quick_figures, no_figures
):
    shutil.copytree(folder_of_a_user, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    if page.name != "results.md":
        (tmp_path / "trained").rename(tmp_path / "models")
    for block in code_blocks(page, "python") if page.parent.name == "docs" else []:
        exec(block, {})
    for command in commands_of(page):
        python, program, *words = shlex.split(command)
        assert python.endswith("python")
        if "--audit_only" in words:
            words += ["--save_dir", "audit"]
        elif program == "train_models.py":
            words += ["--overwrite", *SMALL.split()]
        elif program == "predict.py":
            words.append("--overwrite")
        main = {"train_models.py": train_models.main, "predict.py": predict.main}[program]
        assert main(words) == (1 if "--audit_only" in words else 0), command
