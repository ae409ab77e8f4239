"""Diagnoses of skin lesions: how the published data sets spell them, and which are malignant.

The diagnoses are in `lesions.toml`. A name that is not among them, such as "unknown" or
"indeterminate", is unknown, never benign by default. Names are recognised as a whole: "melanoma (in
situ)" is a melanoma, but "melanoma-like nevus" is unknown.
"""

import re
import tomllib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Diagnosis:
    """A row of the table.

    `spellings` are its other names and codes; `qualifiers` the phrases that may come before and
    after these without making it another diagnosis. Several rows with the same name are variants of
    one diagnosis that take different qualifiers.
    """

    name: str
    is_malignant: bool | None = None  # None where the name leaves it open
    spellings: Sequence[str] = ()
    qualifiers: Sequence[str] = ()


_CONTENTS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
DIAGNOSES = tuple(Diagnosis(**fields) for fields in _CONTENTS["diagnoses"])
_IRREGULAR_PLURALS = {
    "nevi": "nevus",
    "keratoses": "keratosis",
    "metastases": "metastasis",
    "melanoses": "melanosis",
    "carcinomata": "carcinoma",
    "melanomata": "melanoma",
    "lentigines": "lentigo",
    "ephelides": "ephelis",
    "verrucae": "verruca",
}
MAX_WORDS = 30  # of a name; the longest of the published sets has 12
# "less than 0.76 mm", "0.76 to 1.5 mm" and "> 4 mm" after `normalize_name`.
_THICKNESS = re.compile(
    r"(?:(?:less|more|greater) than |[<>≤≥]=? ?)?"
    r"\b\d+(?: \d+)?(?: to \d+(?: \d+)?)? ?mm\b(?: thick)?"
)


def normalize_name(name: str) -> str:
    """Returns the same text for all spellings of a name.

    Case, `_`, `-`, punctuation and brackets, accents, a plural s and British spelling make no
    difference; question marks, exclamation marks and symbols such as + do.
    """
    text = unicodedata.normalize("NFKD", name).casefold()
    text = "".join(c for c in text if not "\u0300" <= c <= "\u036f" and c not in "'’`´")
    kept = (
        c if c.isalnum() or c in "?!" or unicodedata.category(c)[0] in "SM" else " " for c in text
    )
    words = "".join(kept).replace("ae", "e").replace("oe", "e").replace("tumour", "tumor").split()
    return " ".join(map(_singular, words))


def _singular(word: str) -> str:
    word = _IRREGULAR_PLURALS.get(word, word)
    is_plural = word.endswith("s") and not word.endswith("ss") and len(word) > 3
    return word[:-1] if is_plural else word  # of three letters: "nos" is not "no"


def _phrases(*phrases: str) -> frozenset[str]:
    return frozenset(map(normalize_name, phrases))


def all_qualifiers(diagnosis: Diagnosis) -> frozenset[str]:
    """Returns the normalized qualifiers that the diagnosis takes, the general ones included."""
    general = _CONTENTS["qualifiers"]
    by_malignancy = {True: general["malignant"], False: general["benign"], None: []}
    own = diagnosis.qualifiers
    return _phrases(*general["any"], *by_malignancy[diagnosis.is_malignant], *own)


_TABLE = tuple((d, _phrases(d.name, *d.spellings), all_qualifiers(d)) for d in DIAGNOSES)
# Without spaces, as folders and columns have them: BasalCellCarcinoma, BENOTH.
_BY_SPELLING = {s.replace(" ", ""): d for d, spellings, _ in _TABLE for s in spellings}


def find_diagnosis(name: str) -> Diagnosis | None:
    """Returns the diagnosis of which the name is a spelling, qualifiers aside, or None."""
    text = normalize_name(name)
    diagnosis = _BY_SPELLING.get(text.replace(" ", ""))
    if diagnosis is not None:
        return diagnosis
    words = _THICKNESS.sub("mm", text).split()
    if len(words) > MAX_WORDS:
        return None
    for diagnosis, spellings, qualifiers in _TABLE:
        if _consists_of(words, spellings, qualifiers):
            return diagnosis
    return None


def is_malignant(name: str) -> bool | None:
    """Returns whether a class of this name is malignant; None if that is unknown."""
    diagnosis = find_diagnosis(name)
    return None if diagnosis is None else diagnosis.is_malignant


def is_melanoma(name: str) -> bool | None:
    """Returns whether a class of this name is melanoma; None if that is unknown."""
    diagnosis = find_diagnosis(name)
    if diagnosis is None or diagnosis.name == "malignant":
        return None
    return diagnosis.name == "melanoma"


def _consists_of(words: list[str], spellings: frozenset[str], qualifiers: frozenset[str]) -> bool:
    """Returns whether the words are a sequence of these phrases, with at least one spelling."""
    longest = max(len(phrase.split()) for phrase in spellings | qualifiers)
    reached = {(0, False)}  # (number of words, whether a spelling is among them)
    for end in range(1, len(words) + 1):
        for start in range(max(0, end - longest), end):
            phrase = " ".join(words[start:end])
            if phrase in spellings and {(start, False), (start, True)} & reached:
                reached.add((end, True))
            elif phrase in qualifiers:
                reached |= {(end, found) for at, found in reached if at == start}
    return (len(words), True) in reached
