"""Diagnoses of skin lesions: how the published data sets spell them, and which are malignant.

A name that is not in the table, such as "unknown" or "indeterminate", is unknown, never benign by
default. Names are recognised as a whole: "melanoma (in situ)" is a melanoma, but "melanoma-like
nevus" is unknown.
"""

import re
import unicodedata
from dataclasses import dataclass


@dataclass(frozen=True)
class Diagnosis:
    """A row of the table.

    `spellings` are its other names and codes; `qualifiers` the phrases that may come before and
    after these without making it another diagnosis. Several rows with the same name are variants of
    one diagnosis that take different qualifiers.
    """

    name: str
    is_malignant: bool | None  # None where the name does not tell
    spellings: tuple[str, ...] = ()
    qualifiers: tuple[str, ...] = ()


# Qualifiers of every diagnosis, and of every malignant or benign one.
QUALIFIERS = (
    "NOS", "not otherwise specified", "unspecified", "lesion", "skin", "of skin", "of the skin",
    "cutaneous", "pigmented", "nonpigmented", "non pigmented",
)  # fmt: skip
MALIGNANT_QUALIFIERS = (
    "malignant", "invasive", "metastatic", "metastasis", "primary", "recurrent", "early",
    "advanced", "ulcerated", "skin cancer",
)  # fmt: skip
BENIGN_QUALIFIERS = ("benign",)

# HAM10000: akiec bcc bkl df mel nv vasc. ISIC challenges: MEL NV BCC AK BKL DF VASC SCC (UNK is not
# known). PAD-UFES-20: ACK BCC MEL NEV SCC SEK. MILK10k: AKIEC BCC BEN_OTH BKL DF INF MAL_OTH MEL NV
# SCCKA VASC. Names are those of the ISIC archive's diagnosis columns, derm7pt, PH2, Dermofit, DDI
# and Fitzpatrick17k. Their "Thing, Variant" is a spelling with a qualifier.
# fmt: off
DIAGNOSES = (
    Diagnosis("melanoma", True, (
        "mel", "lentigo maligna", "malignant lentigo", "Hutchinson's melanotic freckle", "LMM",
        "Malignant melanocytic proliferations (Melanoma)", "malignant melanocytic proliferation",
    ), (
        "in situ", "nodular", "NM", "superficial spreading", "SSM", "acral", "lentiginous", "ALM",
        "amelanotic", "hypomelanotic", "desmoplastic", "nevoid", "spitzoid", "mucosal", "subungual",
        "thin", "thick", "type", "associated with a nevus", "associated with nevus",
        "nevus associated", "arising in a nevus", "on chronically sun exposed skin or", "mm",
    )),
    Diagnosis("basal cell carcinoma", True, (
        "bcc", "basalioma", "basal cell cancer", "basosquamous carcinoma",
    ), (
        "nodular", "superficial", "infiltrating", "infiltrative", "micronodular", "morpheaform",
        "morpheiform", "morphoeic", "sclerosing", "sclerodermiform", "solid", "cystic", "adenoid",
        "keratotic", "basosquamous", "metatypical", "fibroepithelial", "fibroepithelioma of Pinkus",
    )),
    Diagnosis("squamous cell carcinoma", True, (
        "scc", "cSCC", "SCCKA", "squamous cell cancer", "squamous carcinoma",
        "spinocellular carcinoma", "verrucous carcinoma",
    ), (
        "well differentiated", "moderately differentiated", "poorly differentiated", "keratinizing",
        "acantholytic", "desmoplastic", "spindle cell", "verrucous", "keratoacanthoma",
        "and keratoacanthoma", "or keratoacanthoma", "keratoacanthoma type", "ka",
    )),
    # Precancerous, counted as malignant: it calls for action. HAM10000's and MILK10k's class takes
    # Bowen's disease in.
    Diagnosis("actinic keratosis", True, (
        "akiec", "ak", "ack", "solar keratosis", "solar or actinic keratosis", "actinic cheilitis",
    ), (
        "hyperkeratotic", "hypertrophic", "atrophic", "bowenoid", "pagetoid", "lichenoid",
        "acantholytic", "intraepithelial carcinoma", "and intraepithelial carcinoma",
        "intraepidermal carcinoma", "and intraepidermal carcinoma", "Bowen's disease",
        "and Bowen's disease", "or Bowen's disease", "Bowen's disease and",
    )),
    Diagnosis("Bowen's disease", True, (
        "Bowen", "squamous cell carcinoma in situ", "in situ squamous cell carcinoma",
        "SCC in situ", "SCCis", "iec", "intraepithelial carcinoma", "intraepidermal carcinoma",
        "erythroplasia of Queyrat",
    )),
    Diagnosis("keratoacanthoma", True, ("ka",)),
    Diagnosis("Merkel cell carcinoma", True, ("mcc", "merkel cell cancer")),
    Diagnosis("Kaposi's sarcoma", True),
    Diagnosis("cutaneous lymphoma", True, (
        "lymphoma", "T cell lymphoma", "B cell lymphoma", "CTCL", "CBCL", "mycosis fungoides",
        "subcutaneous T cell lymphoma", "Sezary syndrome", "leukemia cutis",
        "blastic plasmacytoid dendritic cell neoplasm",
    )),
    Diagnosis("dermatofibrosarcoma protuberans", True, ("dfsp", "dermatofibrosarcoma")),
    Diagnosis("angiosarcoma", True),
    Diagnosis("leiomyosarcoma", True),
    Diagnosis("atypical fibroxanthoma", True, ("afx", "pleomorphic dermal sarcoma")),
    Diagnosis("Paget's disease", True, ("extramammary Paget's disease", "EMPD")),
    Diagnosis("adnexal carcinoma", True, (
        "sebaceous carcinoma", "porocarcinoma", "eccrine carcinoma", "apocrine carcinoma",
        "microcystic adnexal carcinoma", "trichilemmal carcinoma", "pilomatrix carcinoma",
        "hidradenocarcinoma",
    )),
    Diagnosis("carcinoma", True, (), ("in situ",)),
    Diagnosis("sarcoma", True),
    # Malignant and no melanoma.
    Diagnosis("other malignant lesion", True, (
        "mal oth", "other malignant", "malignant other", "nonmelanoma skin cancer",
        "non melanoma skin cancer", "NMSC", "keratinocyte carcinoma", "keratinocyte cancer",
        "other malignant proliferation", "other malignant proliferation including collision tumor",
        "malignant epidermal", "malignant epidermal proliferation", "malignant dermal",
        "malignant adnexal epithelial proliferation follicular",
        "malignant adnexal epithelial proliferation apocrine or eccrine",
        "malignant soft tissue proliferation fibro histiocytic",
        "malignant soft tissue proliferation vascular", "malignant cutaneous lymphoma",
    )),
    # Malignant, and a melanoma or not.
    Diagnosis("malignant", True, (
        "malignancy", "cancer", "cancerous", "malignant tumor", "malignant neoplasm", "metastasis",
        "collision at least one malignant proliferation",
    )),

    Diagnosis("nevus", False, (
        "nv", "nev", "mole", "melanocytic nevus any type", "nevocellular nevus", "nevocytic nevus",
    ), (
        "melanocytic", "common", "acquired", "atypical", "dysplastic", "clark",
        "atypical dysplastic or clark", "congenital", "dermal", "intradermal", "compound",
        "junctional", "junction", "blue", "combined", "recurrent", "persistent",
        "recurrent or persistent", "acral", "halo", "balloon cell", "deep penetrating",
        "of special anatomic site", "of ota or ito", "of ota", "of ito", "meyerson", "miescher",
        "unna", "spilus", "papillomatous", "giant",
    )),
    # Not with "atypical": atypical Spitz lesions may behave as a melanoma.
    Diagnosis("nevus", False, (
        "Spitz nevus", "nevus Spitz", "Reed nevus", "nevus Reed", "Reed or Spitz nevus",
        "Spitz or Reed nevus", "nevus of Reed", "spindle cell nevus of Reed",
    ), ("melanocytic", "congenital", "dermal", "compound", "junctional")),
    # HAM10000's bkl, which takes in seborrheic keratosis, solar lentigo and lichen planus-like
    # keratosis; the ISIC archive and the nine-class set have its images as pigmented benign
    # keratosis.
    Diagnosis("pigmented benign keratosis", False, (
        "bkl", "benign keratosis", "benign keratosis like lesion", "benign keratinocytic lesion",
        "benign epidermal proliferation", "pbk",
        "benign keratosis solar lentigo seborrheic keratosis lichen planus like keratosis",
    )),
    Diagnosis("seborrheic keratosis", False, (
        "sek", "sk", "seborrheic wart", "inverted follicular keratosis", "stucco keratosis",
    ), ("irritated", "inflamed", "clonal", "acanthotic", "hyperkeratotic", "reticulated")),
    Diagnosis("lichenoid keratosis", False, (
        "lichen planus like keratosis", "lplk", "benign lichenoid keratosis",
    )),
    Diagnosis("lentigo", False, (
        "solar lentigo", "lentigo simplex", "simple lentigo", "ink spot lentigo", "senile lentigo",
        "actinic lentigo",
    )),
    Diagnosis("melanosis", False, (
        "mucosal melanotic macule", "acral melanotic macule", "melanotic macule",
        "labial melanotic macule", "ephelis", "freckle", "cafe au lait macule", "cafe au lait spot",
        "flat melanotic pigmentation not melanocytic nevus",
    )),
    Diagnosis("dermatofibroma", False, ("df", "benign fibrous histiocytoma"), (
        "hemosiderotic", "aneurysmal", "atrophic",
    )),
    Diagnosis("vascular lesion", False, (
        "vasc", "vascular", "vascular lesion and hemorrhage", "vascular anomaly",
        "benign soft tissue proliferation vascular",
    )),
    Diagnosis("hemangioma", False, ("angioma", "cherry angioma", "arteriovenous hemangioma"), (
        "infantile", "capillary", "cavernous", "thrombosed", "cherry", "senile",
    )),
    Diagnosis("angiokeratoma", False),
    Diagnosis("pyogenic granuloma", False, ("pyo", "lobular capillary hemangioma")),
    Diagnosis("hemorrhage", False, ("hematoma", "subungual hematoma", "subcorneal hematoma")),
    Diagnosis("lymphangioma", False),
    Diagnosis("port wine stain", False, ("nevus flammeus",)),
    Diagnosis("glomus tumor", False, ("glomangioma",)),
    Diagnosis("wart", False, (
        "verruca", "verruca vulgaris", "common wart", "plantar wart", "flat wart",
    )),
    Diagnosis("molluscum contagiosum", False, ("molluscum",)),
    Diagnosis("acrochordon", False, (
        "skin tag", "fibroepithelial polyp", "fibroepithelial papilloma", "soft fibroma",
    )),
    Diagnosis("angiofibroma", False, ("fibrous papule", "angiofibroma or fibrous papule")),
    Diagnosis("clear cell acanthoma", False),
    Diagnosis("sebaceous hyperplasia", False),
    Diagnosis("benign adnexal tumor", False, (
        "hidradenoma", "syringoma", "chondroid syringoma", "poroma", "eccrine poroma",
        "spiradenoma", "cylindroma", "trichoepithelioma", "trichoblastoma", "trichilemmoma",
        "trichofolliculoma", "pilomatricoma", "pilomatrixoma", "syringocystadenoma papilliferum",
        "benign adnexal epithelial proliferation apocrine or eccrine",
        "benign adnexal epithelial proliferation follicular",
    )),
    Diagnosis("neurofibroma", False),
    Diagnosis("lipoma", False),
    Diagnosis("leiomyoma", False, ("angioleiomyoma",)),
    Diagnosis("xanthogranuloma", False, ("juvenile xanthogranuloma",)),
    Diagnosis("cyst", False, (
        "epidermal cyst", "epidermoid cyst", "trichilemmal cyst", "pilar cyst", "sebaceous cyst",
        "trichilemmal or isthmic catagen or pilar cyst", "milia", "milium", "steatocystoma",
    )),
    Diagnosis("scar", False, ("keloid", "hypertrophic scar")),
    Diagnosis("epidermal nevus", False, (
        "nevus sebaceous", "sebaceous nevus", "nevus sebaceous of Jadassohn", "Becker nevus",
        "Becker's nevus", "nevus lipomatosus superficialis", "nevus lipomatosus",
    )),
    Diagnosis("inflammatory or infectious disease", False, (
        "inf", "inflammatory", "infectious", "inflammatory and infectious",
        "inflammatory or infectious", "inflammatory and infectious disease",
        "inflammatory and infectious condition", "inflammatory disease", "infectious disease",
    )),
    # Benign, whatever it is.
    Diagnosis("benign", False, (
        "ben oth", "other benign", "benign other", "benign tumor", "benign neoplasm",
        "benign proliferation", "other benign proliferation",
        "other benign proliferation including collision tumor", "not malignant", "non malignant",
        "nonmalignant", "non cancerous", "noncancerous", "not cancerous", "non neoplastic",
        "nonneoplastic", "benign melanocytic", "benign melanocyte", "benign epidermal",
        "benign dermal", "benign melanocytic proliferation",
        "benign soft tissue proliferation fibro histiocytic",
        "benign soft tissue proliferation neural", "benign soft tissue proliferation lipocytic",
        "collision only benign proliferation",
    )),
    # Malignant or benign, and no melanoma.
    Diagnosis("not melanoma", None, ("non melanoma", "nonmelanoma", "notmelanoma", "no melanoma")),
)
# fmt: on

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
    by_malignancy = {True: MALIGNANT_QUALIFIERS, False: BENIGN_QUALIFIERS, None: ()}
    return _phrases(*QUALIFIERS, *by_malignancy[diagnosis.is_malignant], *diagnosis.qualifiers)


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
