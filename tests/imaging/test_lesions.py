"""Names of diagnoses are recognised as a whole, however they are spelled, and never guessed at."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imaging.lesions import (
    DIAGNOSES,
    Diagnosis,
    all_qualifiers,
    find_diagnosis,
    is_malignant,
    is_melanoma,
    normalize_name,
)

ROOT = Path(__file__).parents[2]
PUBLISHED = {  # by set, the malignant names, the benign ones, and those that tell neither
    "nine classes": (
        ["melanoma", "basal cell carcinoma", "squamous cell carcinoma", "actinic keratosis"],
        ["dermatofibroma", "nevus", "pigmented benign keratosis", "seborrheic keratosis",
         "vascular lesion"],
        [],
    ),
    "HAM10000": (["akiec", "bcc", "mel"], ["bkl", "df", "nv", "vasc"], []),
    "HAM10000 in words": (
        ["Actinic keratoses and intraepithelial carcinoma / Bowen's disease",
         "basal cell carcinoma", "melanoma"],
        ["benign keratosis-like lesions", "dermatofibroma", "melanocytic nevi", "vascular lesions"],
        [],
    ),
    "ISIC challenges": (["MEL", "BCC", "AK", "SCC"], ["NV", "BKL", "DF", "VASC"], ["UNK"]),
    "PAD-UFES-20": (["ACK", "BCC", "MEL", "SCC"], ["NEV", "SEK"], []),
    "MILK10k": (
        ["AKIEC", "BCC", "MAL_OTH", "MEL", "SCCKA"], ["BEN_OTH", "BKL", "DF", "INF", "NV", "VASC"],
        [],
    ),
    "derm7pt": (
        ["basal cell carcinoma", "melanoma", "melanoma (in situ)", "melanoma (less than 0.76 mm)",
         "melanoma (0.76 to 1.5 mm)", "melanoma (more than 1.5 mm)", "melanoma metastasis"],
        ["blue nevus", "clark nevus", "combined nevus", "congenital nevus", "dermal nevus",
         "dermatofibroma", "lentigo", "melanosis", "recurrent nevus", "reed or spitz nevus",
         "seborrheic keratosis", "vascular lesion"],
        ["miscellaneous"],
    ),
    "PH2": (["Melanoma"], ["Common Nevus", "Atypical Nevus"], []),
    "ISIC archive": (
        ["Malignant", "Malignant melanocytic proliferations (Melanoma)", "Melanoma Invasive",
         "Melanoma in situ", "Melanoma, NOS", "Melanoma metastasis",
         "Melanoma in situ, Lentigo maligna type", "Melanoma Invasive, Associated with a nevus",
         "Melanoma Invasive, On chronically sun-exposed skin or lentigo maligna melanoma",
         "Melanoma Invasive, Superficial spreading", "Basal cell carcinoma, Nodular",
         "Malignant adnexal epithelial proliferations - Follicular",
         "Malignant epidermal proliferations", "Squamous cell carcinoma, Invasive",
         "Squamous cell carcinoma, NOS", "Squamous cell carcinoma in situ", "Bowen's disease",
         "Solar or actinic keratosis", "Keratoacanthoma", "Merkel cell carcinoma", "Kaposi sarcoma",
         "Collision - At least one malignant proliferation"],
        ["Benign", "Nevus", "Nevus, Atypical, Dysplastic, or Clark", "Nevus, Spitz",
         "Nevus, NOS, Dermal", "Nevus, Of special anatomic site", "Solar lentigo", "Lentigo NOS",
         "Lichen planus like keratosis", "Hemangioma", "Scar", "Verruca", "Fibroepithelial polyp",
         "Trichilemmal or isthmic-catagen or pilar cyst", "Angiofibroma or fibrous papule",
         "Benign soft tissue proliferations - Fibro-histiocytic", "Cysts",
         "Flat melanotic pigmentations - not melanocytic nevus",
         "Inflammatory or infectious diseases"],
        ["Indeterminate", "indeterminate/benign", "Atypical melanocytic neoplasm", "AIMP",
         "Atypical intraepithelial melanocytic proliferation", "atypical spitz tumor", "other",
         "Indeterminate melanocytic proliferations", "unknown"],
    ),
    "DDI": (
        ["melanoma-acral-lentiginous", "nodular-melanoma-(nm)", "basal-cell-carcinoma-superficial",
         "squamous-cell-carcinoma-keratoacanthoma", "mycosis-fungoides", "sebaceous-carcinoma",
         "subcutaneous-t-cell-lymphoma", "metastatic-carcinoma", "leukemia-cutis"],
        ["melanocytic-nevi", "dysplastic-nevus", "seborrheic-keratosis-irritated", "epidermal-cyst",
         "pigmented-spindle-cell-nevus-of-reed", "verruca-vulgaris",
         "nevus-lipomatosus-superficialis"],
        ["atypical-spindle-cell-nevus-of-reed"],
    ),
    "folders": (["malignant", "Malignant_lesions"], ["benign", "BENIGN", "non-malignant"], ["a"]),
}  # fmt: skip
MALIGNANT_SPELLINGS = [s for d in DIAGNOSES if d.is_malignant for s in (d.name, *d.spellings)]
BENIGN_SPELLINGS = [s for d in DIAGNOSES if d.is_malignant is False for s in (d.name, *d.spellings)]
NORMALIZED_SPELLINGS = {normalize_name(s) for s in (*MALIGNANT_SPELLINGS, *BENIGN_SPELLINGS)}
ALL_QUALIFIERS = sorted({q for diagnosis in DIAGNOSES for q in all_qualifiers(diagnosis)})
STATEMENTS = [
    "no {0}", "not {0}", "non-{0}", "suspected {0}", "possible {0}", "{0}?", "rule out {0}",
    "{0}-like lesion", "{0} 2", "{0}oid", "un{0}", "anti{0}", "{0} vs {1}", "{0} or {1}",
    "{0} with {1}", "{0}/{1}", "{1} and {0}",
]  # fmt: skip
any_spelling = st.sampled_from([*MALIGNANT_SPELLINGS, *BENIGN_SPELLINGS])


@pytest.mark.parametrize("published", PUBLISHED)
def test_the_names_of_the_published_sets_are_known_and_undecided_ones_are_not(published):
    for names, expected in zip(PUBLISHED[published], (True, False, None), strict=True):
        assert {name: is_malignant(name) for name in names} == dict.fromkeys(names, expected)


@pytest.mark.parametrize(
    "name",
    ["nevus vs melanoma", "benign or malignant", "benign_malignant", "melanoma-like nevus",
     "suspected melanoma", "melanoma?", "melanoma & nevus", "nevus + melanoma", "no melanoma",
     "non-melanoma", "nevus with melanoma", "nevus associated with a melanoma", "not a nevus",
     "malignant blue nevus", "nevus in situ", "invasive nevus", "metastatic nevus",
     "basal cell nevus",
     "atypical Spitz nevus", "nevus, atypical, Spitz", "melanoma or benign nevus", "not benign",
     "juvenile melanoma, benign", "keratosis", "melanocytic", "pigmented lesion", "atypical mole?",
     "precancerous melanosis", "Hutchinson freckle", "nevus (not benign)", "unbenign", "", "---"],
)  # fmt: skip
def test_a_name_that_only_contains_a_diagnosis_is_not_known(name):
    assert is_malignant(name) is None


@pytest.mark.parametrize(
    "name",
    ["lentigo maligna", "lentigo maligna melanoma", "Hutchinson's melanotic freckle",
     "verrucous carcinoma", "dermatofibrosarcoma protuberans", "atypical fibroxanthoma",
     "erythroplasia of Queyrat",
     "lichenoid actinic keratosis", "spitzoid melanoma", "nevoid melanoma", "amelanotic melanoma",
     "non-pigmented melanoma", "malignant lentigo", "sclerosing basal cell carcinoma",
     "non-melanoma skin cancer",
     "actinic cheilitis", "Paget disease"],
)  # fmt: skip
def test_what_sounds_benign_and_is_malignant_is_known_as_malignant(name):
    assert is_malignant(name) is True


@given(any_spelling, st.data())
def test_case_separators_brackets_and_plurals_make_no_difference(spelling, data):
    expected = find_diagnosis(spelling)
    words = spelling.split()
    separators = st.sampled_from([" ", "_", "-", "  ", ", ", " / ", ".", " ("])
    name = data.draw(st.sampled_from(["", "(", "_"])) + words[0]
    for word in words[1:]:
        name += data.draw(separators) + word
    flips = data.draw(st.lists(st.booleans(), min_size=len(name), max_size=len(name)))
    name = "".join(c.upper() if flip else c.lower() for c, flip in zip(name, flips, strict=True))
    if name[-1] not in "sS)" and len(words[-1]) > 2:
        name += data.draw(st.sampled_from(["", "s", "S"]))
    assert find_diagnosis(name + data.draw(st.sampled_from(["", ")", "."]))).name == expected.name


@given(any_spelling, any_spelling, st.sampled_from(STATEMENTS))
def test_what_is_said_about_a_diagnosis_is_not_the_diagnosis(spelling, other, statement):
    name = statement.format(spelling, other)
    if normalize_name(name) not in NORMALIZED_SPELLINGS:  # as "not malignant" is
        found = is_malignant(name)
        assert found is None or {found} == {is_malignant(spelling), is_malignant(other)}, name


@given(st.sampled_from(DIAGNOSES), st.data())
def test_qualifiers_before_and_after_never_make_it_another_diagnosis(diagnosis, data):
    qualifiers = st.lists(st.sampled_from(sorted(all_qualifiers(diagnosis))), max_size=3)
    spelling = data.draw(st.sampled_from((diagnosis.name, *diagnosis.spellings)))
    name = " ".join([*data.draw(qualifiers), spelling, *data.draw(qualifiers)])
    assert find_diagnosis(name).is_malignant is find_diagnosis(spelling).is_malignant


@given(
    st.sampled_from(MALIGNANT_SPELLINGS),
    st.sampled_from([*BENIGN_SPELLINGS, *ALL_QUALIFIERS, "or", "and", "in", "with", "like", "a"]),
)
def test_nothing_added_to_a_malignant_diagnosis_makes_it_benign(spelling, added):
    for name in (f"{spelling} {added}", f"{added} {spelling}", f"{spelling}{added}"):
        assert is_malignant(name) is not False, name


def test_no_spelling_stands_for_two_diagnoses():
    spellings = {}
    for diagnosis in DIAGNOSES:
        for spelling in {normalize_name(s) for s in (diagnosis.name, *diagnosis.spellings)}:
            joined = spelling.replace(" ", "")
            assert spellings.setdefault(joined, diagnosis.name) == diagnosis.name, spelling


def test_rows_of_one_name_agree_on_what_they_are():
    truths = {}
    for diagnosis in DIAGNOSES:
        assert truths.setdefault(diagnosis.name, diagnosis.is_malignant) is diagnosis.is_malignant


def test_melanoma_is_known_from_other_cancers_but_not_where_the_name_leaves_it_open():
    for name in ("MEL", "melanoma in situ", "lentigo maligna", "Melanoma, NOS"):
        assert is_melanoma(name) is True
    for name in ("nv", "bcc", "MAL_OTH", "non-melanoma", "benign", "nonmelanoma skin cancer"):
        assert is_melanoma(name) is False
    for name in ("malignant", "skin cancer", "unknown", "a"):
        assert is_melanoma(name) is None


def test_words_may_be_written_together():
    for name, expected in {
        "BasalCellCarcinoma": True,
        "BENOTH": False,
        "nonmalignant": False,
    }.items():
        assert is_malignant(name) is expected


@settings(deadline=None)
@given(st.text(max_size=30))
def test_any_text_has_a_normalized_name_and_no_error(text):
    assert normalize_name(normalize_name(text).upper()) is not None
    assert find_diagnosis(text) is None or isinstance(find_diagnosis(text), Diagnosis)


def test_a_very_long_name_takes_no_time():
    started = time.monotonic()
    assert find_diagnosis("malignant melanoma in situ " * 100_000 + "x") is None
    assert time.monotonic() - started < 5


def test_the_table_needs_neither_torch_nor_any_other_module_of_the_project():
    script = (
        "import sys, imaging.lesions\n"
        "own = {'dataset', 'evaluation', 'storage', 'torch', 'numpy'}\n"
        "sys.exit(len(own & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0
