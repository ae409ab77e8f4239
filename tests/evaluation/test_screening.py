"""Which classes are screened for, and how well a score tells them from the rest."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    roc_auc_score,
)

from evaluation import (
    MALIGNANT,
    choose_thresholds,
    group_by_malignancy,
    match_classes,
    screen,
    screening_targets,
    screening_warnings,
    wilson_interval,
)
from tests.evaluation.cases import copied


def test_classes_are_matched_whatever_the_case_hyphens_and_plurals():
    names = ["Basal_Cell-Carcinomas", "nevus", "MELANOMA", "actinic keratosis", "naevi"]
    assert match_classes(names, MALIGNANT) == [0, 2, 3]
    with pytest.raises(ValueError, match="unknown classes melanoma, .*the classes are cat, dog"):
        match_classes(["cat", "dog"], MALIGNANT)


def test_an_exact_spelling_goes_before_a_similar_one_and_that_before_the_diagnosis():
    names = ["Melanoma", "melanoma", "melanoma (in situ)", "mel", "HPV+", "HPV-"]
    assert match_classes(names, ["melanoma"]) == [1]
    assert match_classes(names, ["MELANOMAS"]) == [0, 1]
    assert match_classes(names, ["malignant melanoma"]) == [0, 1, 2, 3]
    assert match_classes(names, ["hpv+"]) == [4]
    assert match_classes(["akiec", "bcc", "nv"], ["Nevus", "actinic keratosis"]) == [0, 2]
    assert match_classes(["melanoma in situ", "nevus"], ["melanoma"]) == [0]


def test_a_wanted_name_of_no_class_is_an_error_that_names_it_and_the_nearest_class():
    names = ["melanoma", "basal cell carcinoma", "nevus"]
    words = r"unknown class bsal cell carcinoma; did you mean basal cell carcinoma\? \(the classes"
    for wanted in (["melanoma", "bsal cell carcinoma"], ["bsal cell carcinoma"]):
        for function in (match_classes, group_by_malignancy, screening_targets):
            with pytest.raises(ValueError, match=words):
                function(names, wanted)
    with pytest.raises(
        ValueError, match=r"unknown classes melonama, nevu5; did you mean mel.*, nevus\? \("
    ):
        match_classes(names, ["nevus", "melonama", "nevu5"])
    with pytest.raises(ValueError, match="unknown class ---"):
        match_classes(["...", "nevus"], ["---"])


@pytest.mark.parametrize(
    ("names", "malignant", "melanoma"),
    [
        ("akiec bcc bkl df mel nv vasc", "akiec bcc mel", "mel"),
        ("MEL NV BCC AK BKL DF VASC SCC", "MEL BCC AK SCC", "MEL"),
        ("ACK BCC MEL NEV SCC SEK", "ACK BCC MEL SCC", "MEL"),
        ("AKIEC BCC BEN_OTH BKL DF INF MAL_OTH MEL NV SCCKA VASC",
         "AKIEC BCC MAL_OTH MEL SCCKA", "MEL"),
        ("melanoma-in-situ basal-cell-carcinoma melanocytic-nevi",
         "melanoma-in-situ basal-cell-carcinoma", "melanoma-in-situ"),
        ("benign malignant", "malignant", ""),
        ("melanoma non-melanoma", None, "melanoma"),
    ],
)  # fmt: skip
def test_the_published_sets_are_screened_without_a_word_of_the_users(names, malignant, melanoma):
    names = names.split()
    expected = {"malignant": malignant, "melanoma": melanoma}
    assert screening_targets(names) == {
        target: [names.index(name) for name in of_target.split()]
        for target, of_target in expected.items()
        if of_target
    }


def test_what_is_screened_for_is_what_the_classes_have():
    names = ["Melanoma", "nevus", "basal_cell_carcinoma"]
    assert screening_targets(names) == {"malignant": [0, 2], "melanoma": [0]}
    assert screening_targets(names, ["nevus"]) == {"malignant": [1], "melanoma": [0]}
    assert screening_targets(["cat", "dog"]) == {}
    assert screening_targets(["melanoma", "actinic keratosis"]) == {"melanoma": [0]}


def test_classes_that_are_not_known_count_neither_as_malignant_nor_as_benign():
    names = ["mel", "UNK", "nv", "malignant", "cat"]
    assert group_by_malignancy(names) == {
        "malignant": ["mel", "malignant"], "benign": ["nv"], "unknown": ["UNK", "cat"],
    }  # fmt: skip
    assert screening_targets(names) == {"malignant": [0, 3], "melanoma": [0]}
    # What is malignant may be a melanoma.
    assert screening_targets(names, positive=None) == {"malignant": [1, 4], "melanoma": [1, 3, 4]}
    # The user has said it all.
    assert group_by_malignancy(names, ["mel", "cat"])["benign"] == ["UNK", "nv", "malignant"]
    assert screening_targets(names, ["mel", "cat"], positive=None) == {
        "malignant": [],
        "melanoma": [4],
    }
    assert group_by_malignancy(names, ["mel"], ["cat"])["unknown"] == ["cat"]


@given(st.lists(st.sampled_from(["mel", "bcc", "nv", "UNK", "malignant", "a", "melanoma in situ"])))
def test_every_class_counts_as_one_thing_and_melanoma_never_as_benign(names):
    names = list(dict.fromkeys(names))
    counted = group_by_malignancy(names)
    assert sorted(name for kind in counted.values() for name in kind) == sorted(names)
    assert not {"mel", "bcc", "malignant", "melanoma in situ", "UNK", "a"} & set(counted["benign"])
    for target, labels in screening_targets(names).items():
        left_out = screening_targets(names, positive=None)[target]
        assert labels and not set(labels) & set(left_out)
        assert len(labels) + len(left_out) < len(names)


def test_what_a_user_has_to_hear_about_screening_is_said_and_nothing_else():
    assert screening_warnings(group_by_malignancy(["melanoma", "bcc", "nevus"])) == []
    assert screening_warnings(group_by_malignancy(["melanoma", "cat"], ["melanoma"])) == []
    (off,) = screening_warnings(group_by_malignancy(["cat", "dog"]))
    assert off.startswith("screening is off: none of the classes cat, dog is known as malignant; ")
    assert off.endswith("with --malignant_classes")
    (off,) = screening_warnings(group_by_malignancy(["melanoma", "cat"]))
    assert off.startswith("screening is off: none of the classes melanoma, cat is known as benign")
    (unknown,) = screening_warnings(group_by_malignancy(["melanoma", "cat", "nevus"]))
    assert "left out of the screening metrics: cat;" in unknown
    (doubtful,) = screening_warnings(group_by_malignancy(["mel", "akiec", "nv"], ["mel"]))
    assert doubtful.endswith("but known as malignant: akiec")


def test_a_perfect_score_has_area_1_and_perfect_points():
    is_positive = np.arange(40) % 4 == 0
    thresholds = choose_thresholds(is_positive, is_positive * 1.0)
    found = screen(is_positive, is_positive * 1.0, thresholds)
    assert found["roc_auc"] == 1
    low, high = found["roc_auc_interval"]
    assert 0.8 < low < 0.95 and high == 1  # another of 10 positives might well not be parted
    assert [point["aim"] for point in found["points"]] == [
        "sensitivity 90%", "sensitivity 95%", "specificity 90%", "specificity 95%",
    ]  # fmt: skip
    for point in found["points"][:2]:
        assert point["sensitivity"] == point["specificity"] == 1
        assert point["sensitivity_interval"] == wilson_interval(10, 10)


def test_copies_and_images_of_one_lesion_narrow_no_interval_of_screening():
    rng = np.random.default_rng(8)
    is_positive = np.arange(60) % 3 == 0
    score = rng.normal(is_positive * 1.5, 1)
    thresholds = choose_thresholds(is_positive, score)
    once = screen(is_positive, score, thresholds)
    groups, is_positive, score = copied(np.arange(60), is_positive, score)
    thrice = screen(is_positive, score, thresholds, groups)
    assert thrice["roc_auc_interval"] == pytest.approx(once["roc_auc_interval"])
    for point, same_point in zip(thrice["points"], once["points"], strict=True):
        for name in ("sensitivity_interval", "specificity_interval"):
            assert point[name] == pytest.approx(same_point[name])


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_thresholds_reach_their_aim_on_validation_and_no_better_one_does(seed, has_ties):
    rng = np.random.default_rng(seed)
    is_positive = np.arange(60) % 3 == 0
    score = rng.normal(is_positive * 1.5, 1)
    score = score.round() if has_ties else score
    found = screen(is_positive, score, choose_thresholds(is_positive, score))
    assert found["roc_auc"] == pytest.approx(roc_auc_score(is_positive, score))
    assert found["roc_auc_interval"][0] <= found["roc_auc"] <= found["roc_auc_interval"][1]
    rates = [
        ((score[is_positive] >= t).mean(), (score[~is_positive] < t).mean())
        for t in [*np.unique(score), np.inf]
    ]
    levels = (0.90, 0.95)
    for point, level in zip(found["points"][:2], levels, strict=True):
        assert point["sensitivity"] >= level
        assert point["specificity"] == max(spec for sens, spec in rates if sens >= level)
    for point, level in zip(found["points"][2:], levels, strict=True):
        assert point["specificity"] >= level
        assert point["sensitivity"] == max(sens for sens, spec in rates if spec >= level)


def test_what_is_flagged_for_another_reason_counts_as_flagged():
    is_positive, score = np.array([1.0, 1.0, 0.0, 0.0, np.nan]), np.array([0.9, 0.1, 0.8, 0.2, 1])
    aims = {"sensitivity 95%": 0.85, "specificity 95%": 0.85}
    implied = {"sensitivity 95%": np.array([False, True, False, True, False])}
    points = screen(is_positive, score, aims, implied=implied)["points"]
    assert [(p["sensitivity"], p["specificity"]) for p in points] == [(1.0, 0.5), (0.5, 1.0)]


def test_screening_without_one_of_the_kinds_is_refused():
    with pytest.raises(ValueError, match="but all of these are positive"):
        screen([1, 1], [0.1, 0.9], {"sensitivity 95%": 0.5})
    with pytest.raises(ValueError, match="but all of these are negative"):
        choose_thresholds([0, 0], [0.5, 0.6])
