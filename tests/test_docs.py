"""What the documentation shows."""

import re
from pathlib import Path
from unittest.mock import patch

import pytest

import augmentation
import models
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
