"""The stages of a run, and how much work each is taken for."""

import pytest

from experiment.settings import Settings
from experiment.stages import CACHED, LIVE, count_operations, make_stages

IMAGES = {"train": 70, "valid": 20, "test": 10}


def test_the_multiplications_of_resnets_are_the_published_ones():
    # 1.81 and 4.09 billion in torchvision's table of weights.
    assert count_operations("resnet_scratch", 18, 224) == pytest.approx(1.81e9, rel=0.01)
    assert count_operations("resnet_finetuned", 50, 224) == pytest.approx(4.09e9, rel=0.01)


def test_training_weighs_as_much_as_the_model_and_a_frozen_backbone_a_third():
    settings = Settings(data_dir="x", models=("simple_cnn", "resnet_head", "resnet_finetuned"))
    stages = make_stages(settings, dict.fromkeys(settings.models, False), IMAGES)
    work = {s.subject.split()[0]: s.work for s in stages if s.name == "training"}
    assert work["resnet_finetuned"] > 50 * work["simple_cnn"]
    assert work["resnet_head"] == pytest.approx(work["resnet_finetuned"] / 3, rel=0.01)


def test_features_that_are_cached_are_a_stage_as_long_as_their_views():
    settings = Settings(data_dir="x", models=("resnet_head",), cached_features=True)
    stages = make_stages(settings, {"resnet_head": False}, IMAGES, features={"resnet_head": CACHED})
    assert [s.name for s in stages][:3] == ["computing features", "training", "evaluating"]
    assert [(s.kind, s.work) for s in stages][:2] == [("model", 8 * 70 + 20), ("head", 2000)]
    stages = make_stages(settings, {"resnet_head": False}, IMAGES, features={"resnet_head": LIVE})
    assert [s.name for s in stages][:2] == ["training", "evaluating"]


def test_finished_models_have_no_stages():
    settings = Settings(data_dir="x", models=("simple_cnn", "resnet_scratch"))
    stages = make_stages(settings, {"simple_cnn": True, "resnet_scratch": False}, IMAGES)
    assert {stage.subject for stage in stages} == {"resnet_scratch (2 of 2)", ""}
