"""The published sets: each is a tiny copy of what is downloaded, with its names and its tables."""

import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from dataset import DatasetBuilder
from imaging.layouts import READERS, describe_layouts, layout_of
from imaging.lesions import find_diagnosis
from imaging.medmnist import CLASSES
from imaging.sources import read_folder
from train_models import main

ISIC_2018 = "image,MEL,NV,BCC,AKIEC,BKL,DF,VASC"
ISIC_2019 = "image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK"
HAM10000 = "lesion_id,image_id,dx,dx_type,age,sex,localization"


@pytest.fixture
def make_set(tmp_path):
    """A function that makes a folder of images, and of tables from their lines."""
    rng = np.random.default_rng(0)

    def make(images, tables=()):
        for path in images:
            file = tmp_path / "set" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).save(file)
        for path, lines in dict(tables).items():
            file = tmp_path / "set" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(lines) + "\n")
        return tmp_path / "set"

    return make


def read(root, **options):
    """Returns the metadata of the images that can be used, by the name of the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = DatasetBuilder(root, image_size=16, **options).prepare().images
    table = images.table.join(images.given)
    table.index = table["path"].str.rpartition("/")[2]
    return table, images


def build(root, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is not in")  # few images for three splits
        return DatasetBuilder(root, image_size=16, **options).build()[1]


def one_hot(name, label, header):
    return ",".join([name, *("1.0" if code == label else "0.0" for code in header.split(",")[1:])])


# ---------------------------------------------------------------------------- HAM10000

HAM10000_ROWS = [
    "HAM_0000118,ISIC_0027419,bkl,histo,80.0,male,scalp",
    "HAM_0000118,ISIC_0025030,bkl,histo,80.0,male,scalp",
    "HAM_0002730,ISIC_0026769,mel,histo,0.0,female,ear",
    "HAM_0001466,ISIC_0031633,nv,follow_up,,unknown,unknown",
]
HAM10000_PARTS = [
    "HAM10000_images_part_1/ISIC_0027419.jpg", "HAM10000_images_part_1/ISIC_0025030.jpg",
    "HAM10000_images_part_2/ISIC_0026769.jpg", "HAM10000_images_part_2/ISIC_0031633.jpg",
]  # fmt: skip


def test_ham10000_of_kaggle_is_read_with_its_lesions(make_set):
    tables = {
        "HAM10000_metadata.csv": [HAM10000, *HAM10000_ROWS],
        "hmnist_28_28_RGB.csv": ["pixel0000,pixel0001,label", "1,2,0"],
    }
    root = make_set(HAM10000_PARTS, tables)
    table, images = read(root)
    assert images.layout == "ham10000"
    assert table["class"].to_dict() == {
        "ISIC_0025030.jpg": "bkl", "ISIC_0027419.jpg": "bkl", "ISIC_0026769.jpg": "mel",
        "ISIC_0031633.jpg": "nv",
    }  # fmt: skip
    columns = ["lesion_id", "dx_type", "age", "sex", "site"]
    assert images.given.columns.tolist() == columns
    assert table.loc["ISIC_0026769.jpg", columns].tolist() == [
        "HAM_0002730", "histo", "0.0", "female", "ear",
    ]  # fmt: skip
    assert table["age"].isna().sum() == 1
    metadata = build(root)
    assert metadata.groupby("lesion_id")["group"].nunique().max() == 1
    assert metadata["group"].nunique() == 3


@pytest.mark.parametrize("suffix", ["", ".tab", ".csv"])
def test_ham10000_of_dataverse_is_read_flat_or_in_parts_and_without_its_masks(make_set, suffix):
    rows = [HAM10000 + ",dataset", *(row + ",vidir_modern" for row in HAM10000_ROWS)]
    separator = "\t" if suffix == ".tab" else ","
    tables = {
        f"dataverse_files/HAM10000_metadata{suffix}": [r.replace(",", separator) for r in rows]
    }
    masks = [
        f"HAM10000_segmentations_lesion_tschandl/{row.split(',')[1]}_segmentation.png"
        for row in HAM10000_ROWS
    ]
    images = [f"HAM10000_images/{path.rpartition('/')[2]}" for path in HAM10000_PARTS]
    table, found = read(make_set([*images, *masks], tables))
    assert sorted(table["class"]) == ["bkl", "bkl", "mel", "nv"]
    assert found.left_out == {"mask": 4}
    assert set(table["dataset"]) == {"vidir_modern"}


def test_the_copies_in_kaggles_second_pair_of_folders_are_left_out(make_set):
    root = make_set(HAM10000_PARTS, {"HAM10000_metadata.csv": [HAM10000, *HAM10000_ROWS]})
    for part in ("part_1", "part_2"):
        shutil.copytree(root / f"HAM10000_images_{part}", root / f"ham10000_images_{part}")
    table, images = read(root)
    assert images.left_out == {"copy in another folder": 4}
    assert table["source_split"].str.startswith("HAM10000").all()


@pytest.mark.parametrize(
    "test_table",
    [
        [ISIC_2018, one_hot("ISIC_0034529", "MEL", ISIC_2018)],
        [HAM10000 + ",dataset", "HAM_1000000,ISIC_0034529,mel,histo,55.0,male,back,x"],
    ],
)
def test_the_test_set_of_isic_2018_beside_ham10000_is_its_official_test_set(make_set, test_table):
    tables = {
        "HAM10000_metadata": [HAM10000, *HAM10000_ROWS],
        "ISIC2018_Task3_Test_GroundTruth.csv": test_table,
    }
    root = make_set([*HAM10000_PARTS, "ISIC2018_Task3_Test_Images/ISIC_0034529.jpg"], tables)
    table, images = read(root)
    assert images.layout == "ham10000"
    assert table.loc["ISIC_0034529.jpg", ["class", "split_given"]].tolist() == ["mel", "test"]
    assert table["split_given"].value_counts().to_dict() == {"train": 4, "test": 1}
    metadata = build(root, split_by="official")
    assert set(metadata["split"][metadata["split_given"] == "test"]) == {"test"}
    assert "test" not in set(metadata["split"][metadata["split_given"] == "train"])


def test_a_set_of_which_only_a_part_is_there_says_so(make_set):
    root = make_set(HAM10000_PARTS[:3], {"HAM10000_metadata.csv": [HAM10000, *HAM10000_ROWS]})
    expected = (
        r"3 of its 4 rows used, for 3 of 3 images.*; 1 rows match no image, such as ISIC_0031633"
    )
    with pytest.warns(UserWarning, match=expected):
        images = DatasetBuilder(root).prepare().images
    assert images.table["class"].value_counts().to_dict() == {"bkl": 2, "mel": 1}


# ---------------------------------------------------------------------------- ISIC challenges


def test_isic_2016_has_no_header_and_numbers_for_its_test_set(make_set):
    tables = {
        "ISBI2016_ISIC_Part3_Training_GroundTruth.csv": [
            "ISIC_0000000,benign", "ISIC_0000002,malignant", "ISIC_0000004,malignant",
        ],
        "ISBI2016_ISIC_Part3_Test_GroundTruth.csv": ["ISIC_0000003,0.0", "ISIC_0000012,1.0"],
    }  # fmt: skip
    images = [f"ISBI2016_ISIC_Part3_Training_Data/ISIC_000000{i}.jpg" for i in (0, 2, 4)]
    images += [f"ISBI2016_ISIC_Part3_Test_Data/ISIC_00000{i}.jpg" for i in ("03", "12")]
    root = make_set(images, tables)
    table, found = read(root)
    assert found.layout == "isic2016"
    assert table["class"].to_dict() == {
        "ISIC_0000000.jpg": "benign", "ISIC_0000002.jpg": "malignant",
        "ISIC_0000003.jpg": "benign", "ISIC_0000004.jpg": "malignant",
        "ISIC_0000012.jpg": "malignant",
    }  # fmt: skip
    assert table["split_given"].tolist() == ["test", "test", "train", "train", "train"]
    assert len(build(root)) == 5


def test_isic_2017_is_of_three_classes_and_leaves_out_superpixels(make_set):
    numbers = {"Training": range(6), "Validation": range(6, 9), "Test_v2": range(9, 12)}
    images, tables = [], {}
    for split, of_split in numbers.items():
        names = [f"ISIC_{number:07d}" for number in of_split]
        images += [f"ISIC-2017_{split}_Data/{name}.jpg" for name in names]
        images += [f"ISIC-2017_{split}_Data/{name}_superpixels.png" for name in names]
        labels = ["1.0,0.0", "0.0,1.0", "0.0,0.0"]
        tables[f"ISIC-2017_{split}_Part3_GroundTruth.csv"] = [
            "image_id,melanoma,seborrheic_keratosis",
            *(f"{name},{labels[i % 3]}" for i, name in enumerate(names)),
        ]
        tables[f"ISIC-2017_{split}_Data/ISIC-2017_{split}_Data_metadata.csv"] = [
            "image_id,age_approximate,sex", *(f"{name},55,female" for name in names),
        ]  # fmt: skip
    root = make_set(images, tables)
    table, found = read(root)
    assert (found.layout, found.left_out) == ("isic2017", {"superpixels": 12})
    assert table["class"].tolist()[:3] == ["melanoma", "seborrheic_keratosis", "nevus"]
    assert (set(table["age"]), set(table["sex"])) == ({"55"}, {"female"})
    metadata = build(root, split_by="official")
    assert metadata["split"].tolist() == ["test"] * 3 + ["train"] * 6 + ["valid"] * 3


def test_isic_2018_has_its_labels_in_folders_and_its_lesions_in_a_table(make_set):
    labels = {"Training": ["MEL", "NV", "NV", "BKL"], "Validation": ["NV"], "Test": ["VASC"]}
    images, tables, number = [], {}, 0
    for split, of_split in labels.items():
        name = f"ISIC2018_Task3_{split}_GroundTruth"
        tables[f"{name}/{name}.csv"] = [ISIC_2018]
        for label in of_split:
            images.append(f"ISIC2018_Task3_{split}_Input/ISIC_{number:07d}.jpg")
            row = one_hot(f"ISIC_{number:07d}", label, ISIC_2018)
            tables[f"{name}/{name}.csv"].append(row)
            number += 1
    tables["ISIC2018_Task3_Training_LesionGroupings.csv"] = [
        "image,lesion_id,diagnosis_confirm_type", "ISIC_0000000,HAM_0,histopathology",
        "ISIC_0000001,HAM_1,histopathology", "ISIC_0000002,HAM_1,histopathology",
        "ISIC_0000003,HAM_3,single image expert consensus",
    ]  # fmt: skip
    root = make_set(images, tables)
    table, found = read(root)
    assert found.layout == "isic2018"
    assert table["class"].to_list() == ["VASC", "MEL", "NV", "NV", "BKL", "NV"]
    assert table["split_given"].tolist() == ["test", *["train"] * 4, "valid"]
    assert table.loc["ISIC_0000002.jpg", "lesion_id"] == "HAM_1"
    metadata = build(root)
    assert metadata.groupby("lesion_id")["group"].nunique().max() == 1
    assert metadata["group"].nunique() == 5


def test_isic_2019_has_downsampled_names_and_test_images_without_labels(make_set):
    names = ["ISIC_0000000", "ISIC_0000017_downsampled", "ISIC_0000018_downsampled"]
    tables = {
        "ISIC_2019_Training_GroundTruth.csv": [
            ISIC_2019, *map(one_hot, names, ["NV", "SCC", "NV"], [ISIC_2019] * 3),
        ],
        "ISIC_2019_Training_Metadata.csv": [
            "image,age_approx,anatom_site_general,lesion_id,sex",
            f"{names[0]},55,anterior torso,,female", f"{names[1]},50,posterior torso,BCN_1,",
            f"{names[2]},50,posterior torso,BCN_1,male",
        ],
        "ISIC_2019_Test_Metadata.csv": [
            "image,age_approx,anatom_site_general,sex", "ISIC_0034321,75,upper extremity,female",
        ],
    }  # fmt: skip
    images = [f"ISIC_2019_Training_Input/{name}.jpg" for name in names]
    root = make_set([*images, "ISIC_2019_Test_Input/ISIC_0034321.jpg"], tables)
    with pytest.raises(ValueError, match=r"no class for 1 of 4 images.*ISIC_0034321.*--unlabelled"):
        DatasetBuilder(root).list_images()
    table, found = read(root, unlabelled="drop")
    assert (found.layout, found.left_out) == ("isic2019", {"no label (other images)": 1})
    assert table["class"].tolist() == ["NV", "SCC", "NV"]
    columns = ["age", "site", "lesion_id", "sex"]
    assert sorted(found.given.columns) == sorted(columns)
    assert table.iloc[1][columns[:3]].tolist() == ["50", "posterior torso", "BCN_1"]
    assert table["lesion_id"].isna().tolist() == [True, False, False]
    assert read_folder(root)["class"].isna().sum() == 1


ISIC_2020 = (
    "image_name,patient_id,lesion_id,sex,age_approx,anatom_site_general_challenge,diagnosis,"
    "benign_malignant,target"
)
ISIC_2020_ROWS = [
    "ISIC_2637011,IP_7279968,IL_7972535,male,45,head/neck,unknown,benign,0",
    "ISIC_0079038,IP_5295861,IL_1642984,male,70,torso,unknown,benign,0",
    "ISIC_8521950,IP_5295861,IL_1642985,male,70,torso,unknown,benign,0",
    "ISIC_0149568,IP_0962375,IL_6540984,female,55,upper extremity,melanoma,malignant,1",
    "ISIC_0078703,IP_7279968,IL_6850356,male,45,,nevus,benign,0",
]


@pytest.mark.parametrize("version", ["", "_v2", "both"])
def test_isic_2020_keeps_patients_together_and_leaves_out_listed_duplicates(make_set, version):
    first = [
        ",".join(cell for i, cell in enumerate(line.split(",")) if i != 2).replace(",45,", ",45.0,")
        for line in [ISIC_2020, *ISIC_2020_ROWS]
    ]  # without lesion_id, as first published
    tables = {
        "ISIC_2020_Training_GroundTruth.csv": first,
        "ISIC_2020_Training_GroundTruth_v2.csv": [ISIC_2020, *ISIC_2020_ROWS],
        "ISIC_2020_Training_Duplicates.csv": [
            "image_name_1,image_name_2", "ISIC_0079038,ISIC_8521950", "ISIC_0000001,ISIC_2637011",
        ],
    }  # fmt: skip
    if version != "both":
        unused = "_v2" if version == "" else ""
        tables.pop(f"ISIC_2020_Training_GroundTruth{unused}.csv")
    names = [row.split(",")[0] for row in ISIC_2020_ROWS]
    root = make_set([f"train/{name}.jpg" for name in names], tables)
    table, found = read(root)
    assert (found.layout, found.left_out) == ("isic2020", {"duplicate": 1})
    assert "ISIC_8521950.jpg" not in table.index
    assert table["class"].value_counts().to_dict() == {"benign": 3, "malignant": 1}
    assert ("lesion_id" in table) == (version != "")
    assert table.loc["ISIC_0149568.jpg", ["age", "sex", "site", "diagnosis"]].tolist() == [
        "55", "female", "upper extremity", "melanoma",
    ]  # fmt: skip
    metadata = build(root)
    assert metadata.groupby("patient_id")["group"].nunique().max() == 1


# ---------------------------------------------------------------------------- other sets


def test_the_nine_class_set_of_kaggle_is_read_through_its_long_outer_folder(make_set):
    outer = "Skin cancer ISIC The International Skin Imaging Collaboration"
    images = [f"{outer}/Train/{c}/ISIC_{i}.jpg" for i in range(4) for c in ("melanoma", "nevus")]
    images += [f"{outer}/Test/{c}/ISIC_{i}.jpg" for i in (8, 9) for c in ("melanoma", "nevus")]
    root = make_set(images)
    table, found = read(root)
    assert found.layout == "isic9"
    assert table["class"].value_counts().to_dict() == {"melanoma": 6, "nevus": 6}
    assert set(table["source_split"]) == {f"{outer}/Train", f"{outer}/Test"}
    metadata = build(root, split_by="official")
    assert (metadata["split"] == "test").tolist() == (metadata["split_given"] == "test").tolist()
    assert layout_of(root / outer) == "class folders"


PAD_UFES_20 = (
    "patient_id,lesion_id,smoke,drink,background_father,background_mother,age,pesticide,gender,"
    "skin_cancer_history,cancer_history,has_piped_water,has_sewage_system,fitspatrick,region,"
    "diameter_1,diameter_2,diagnostic,itch,grew,hurt,changed,bleed,elevation,img_id,biopsed"
)


def test_pad_ufes_20_has_its_images_in_three_parts(make_set):
    rows = [("PAT_1516", "1765", "NEV", "530"), ("PAT_46", "881", "BCC", "939")]
    rows += [("PAT_46", "882", "ACK", "140"), ("PAT_1545", "1867", "BOD", "547")]
    lines = [
        f"{p},{lesion},,,,,8,,FEMALE,,,,,2.0,ARM,,,{label},FALSE,FALSE,FALSE,FALSE,FALSE,FALSE,"
        f"{p}_{lesion}_{n}.png,TRUE"
        for p, lesion, label, n in rows
    ]
    images = [
        f"images/imgs_part_{i % 3 + 1}/imgs_part_{i % 3 + 1}/{p}_{lesion}_{n}.png"
        for i, (p, lesion, _, n) in enumerate(rows)
    ]
    root = make_set(images, {"metadata.csv": [PAD_UFES_20, *lines]})
    table, found = read(root)
    assert found.layout == "pad_ufes_20"
    assert table.loc["PAT_46_881_939.png", "class"] == "BCC"
    columns = ["patient_id", "lesion_id", "age", "sex", "site", "biopsed", "fitspatrick"]
    assert table.loc["PAT_1516_1765_530.png", columns].tolist() == [
        "PAT_1516", "1765", "8", "FEMALE", "ARM", "TRUE", "2.0",
    ]  # fmt: skip
    assert build(root)["group"].nunique() == 3


def test_ph2_is_read_from_its_text_table_and_without_its_masks(make_set):
    names = ["IMD002", "IMD003", "IMD004", "IMD405"]
    lines = [
        "||   Name || Histological Diagnosis || Clinical Diagnosis || Asymmetry | Pigment Network "
        "| Dots/Globules | Streaks | Regression Areas | Blue-Whitish Veil ||           Colors ||",
        "|| IMD003 ||                        ||                  0 ||         0 |               T "
        "|             A |       A |                A |                 A ||                4 ||",
        "|| IMD002 ||                        ||                  1 ||         1 |               T "
        "|             A |       A |                A |                 A ||             4  3 ||",
        "|| IMD004 ||                        ||                  1 ||         0 |              AT "
        "|             A |       A |                A |                 A ||                3 ||",
        "|| IMD405 || Superficial spreading melanoma || 2 || 2 | AT | AT | P | P | P || 1 2 5 ||",
        "",
        "Legends",
        "",
        "Clinical Diagnosis: 0 - Common Nevus; 1 - Atypical Nevus; 2 - Melanoma",
    ]
    images = []
    for name in names:
        folder = f"PH2Dataset/PH2 Dataset images/{name}"
        images += [
            f"{folder}/{name}_Dermoscopic_Image/{name}.bmp",
            f"{folder}/{name}_lesion/{name}_lesion.bmp",
            f"{folder}/{name}_roi/{name}_R1_Label4.bmp",
        ]
    root = make_set(images, {"PH2Dataset/PH2_dataset.txt": lines})
    table, found = read(root)
    assert (found.layout, found.left_out) == ("ph2", {"mask": 8})
    assert table["class"].to_dict() == {
        "IMD002.bmp": "Atypical Nevus", "IMD003.bmp": "Common Nevus",
        "IMD004.bmp": "Atypical Nevus", "IMD405.bmp": "Melanoma",
    }  # fmt: skip
    assert table["Pigment Network"].tolist() == ["T", "T", "AT", "AT"]
    assert table["Histological Diagnosis"].notna().tolist() == [False, False, False, True]
    assert len(build(root)) == 4
    (root / "PH2Dataset/PH2_dataset.txt").unlink()
    with pytest.raises(FileNotFoundError, match="no table of labels; .* named like ph2_dataset"):
        DatasetBuilder(root).list_images()


FITZPATRICK17K = (
    "md5hash,fitzpatrick_scale,fitzpatrick_centaur,label,nine_partition_label,"
    "three_partition_label,qc,url,url_alphanum"
)
FITZPATRICK17K_ROWS = [
    "5e82a45bc5d78bd24ae9202d194423f8,3,3,drug eruption,inflammatory,non-neoplastic,,http://x,a.jpg",
    "d2bac3c9e4499032ca8e9b07c7d3bc40,2,3,dermatofibroma,benign dermal,benign,,http://y,b.jpg",
    "b87804452f60aa162a6d29c0f66a2466,-1,1,melanoma,malignant melanoma,malignant,,http://z,c.jpg",
]


def test_fitzpatrick17k_is_of_three_classes_or_of_those_of_another_column(make_set):
    images = [f"data/finalfitz17k/{row.split(',')[0]}.jpg" for row in FITZPATRICK17K_ROWS]
    root = make_set(images, {"fitzpatrick17k.csv": [FITZPATRICK17K, *FITZPATRICK17K_ROWS]})
    table, found = read(root)
    assert found.layout == "fitzpatrick17k"
    assert table["class"].tolist() == ["non-neoplastic", "malignant", "benign"]
    assert table["fitzpatrick_scale"].tolist() == ["3", "-1", "2"]
    assert "url" not in table
    options = {"layout": "fitzpatrick17k", "label_column": "nine_partition_label"}
    table, _ = read(root, **options)
    assert table["class"].tolist() == ["inflammatory", "malignant melanoma", "benign dermal"]
    with pytest.raises(ValueError, match="no column dx; its columns are path, .*label"):
        DatasetBuilder(root, layout="fitzpatrick17k", label_column="dx").list_images()


def test_ddi_is_benign_or_malignant_whatever_the_case(make_set):
    lines = [
        ",DDI_ID,DDI_file,skin_tone,malignant,disease",
        "0,1,000001.png,56,True,melanoma-in-situ",
        "1,2,000002.png,12,TRUE,mycosis-fungoides",
        "2,3,000003.png,34,False,melanocytic-nevi",
    ]
    root = make_set([f"images/00000{i}.png" for i in (1, 2, 3)], {"ddi_metadata.csv": lines})
    table, found = read(root)
    assert found.layout == "ddi"
    assert table["class"].tolist() == ["malignant", "malignant", "benign"]
    assert found.given.columns.tolist() == ["DDI_ID", "skin_tone", "disease"]
    table, _ = read(root, layout="ddi", label_column="disease")
    assert table["class"].tolist() == ["melanoma-in-situ", "mycosis-fungoides", "melanocytic-nevi"]


# ---------------------------------------------------------------------------- DermaMNIST


@pytest.fixture
def archive(tmp_path):
    """A file of DermaMNIST with seven, two and two images."""
    rng, arrays = np.random.default_rng(0), {}
    for split, labels in (("train", range(7)), ("val", (4, 5)), ("test", (5, 0))):
        labels = np.array(labels, np.uint8)
        arrays[f"{split}_images"] = rng.integers(0, 256, (len(labels), 8, 8, 3), np.uint8)
        arrays[f"{split}_labels"] = labels[:, None]
    (tmp_path / "set").mkdir()
    np.savez(tmp_path / "set/dermamnist_64.npz", **arrays)
    return tmp_path / "set/dermamnist_64.npz"


@pytest.mark.parametrize("is_folder", [True, False])
def test_dermamnist_is_written_to_files_once_beside_its_archive(archive, is_folder, caplog):
    root = archive.parent if is_folder else archive
    table, found = read(root)
    assert (
        f"wrote its 11 images as files to {archive.parent / 'dermamnist_64_images'}" in caplog.text
    )
    assert found.layout == "dermamnist"
    assert table["split_given"].value_counts().to_dict() == {"train": 7, "valid": 2, "test": 2}
    assert table["class"].nunique() == 7
    row = table[(table["split_given"] == "test") & (table["class"] == "melanocytic nevi")].iloc[0]
    image = np.array(Image.open(found_folder(archive, is_folder) / row["path"]))
    assert (image == np.load(archive)["test_images"][0]).all()
    caplog.clear()
    metadata = build(root, split_by="official")
    assert metadata["split"].tolist() == metadata["split_given"].replace("val", "valid").tolist()
    assert caplog.text == ""
    assert sorted(path.name for path in archive.parent.iterdir()) == [
        "dermamnist_64.npz", "dermamnist_64_images", *(["processed"] if not is_folder else []),
    ]  # fmt: skip


def found_folder(archive, is_folder):
    return archive.parent if is_folder else archive.parent / "dermamnist_64_images"


def test_images_of_another_archive_are_never_taken_for_those_of_this_one(archive):
    DatasetBuilder(archive).list_images()
    arrays = dict(np.load(archive))
    arrays["val_images"] = 255 - arrays["val_images"]
    np.savez(archive, **arrays)
    with pytest.raises(ValueError, match="another version of it; rename or remove that folder"):
        DatasetBuilder(archive).list_images()


def test_archives_that_are_not_as_published_are_refused_and_nothing_is_left(archive):
    arrays = dict(np.load(archive))
    for wrong in (
        {"val_labels": arrays["val_labels"] + 7},
        {"test_images": arrays["test_images"].astype(np.float32)},
        {"train_images": arrays["train_images"][..., 0]},
    ):
        np.savez(archive, **arrays | wrong)
        with pytest.raises(ValueError, match=r"dermamnist_64\.npz: not DermaMNIST"):
            DatasetBuilder(archive).list_images()
    np.savez(archive, some=arrays["val_labels"])
    with pytest.raises(ValueError, match=r"not DermaMNIST .*train_images"):
        DatasetBuilder(archive).list_images()
    archive.write_bytes(b"not a zip file")
    with pytest.raises(ValueError, match=r"not a valid \.npz file"):
        DatasetBuilder(archive).list_images()
    assert [path.name for path in archive.parent.iterdir()] == ["dermamnist_64.npz"]


def test_of_several_sizes_of_dermamnist_one_is_to_be_chosen(archive):
    shutil.copy(archive, archive.with_name("dermamnist.npz"))
    with pytest.raises(ValueError, match=r"dermamnist\.npz, dermamnist_64\.npz have the same"):
        DatasetBuilder(archive.parent).list_images()
    assert len(DatasetBuilder(archive).list_images()) == 11


def test_the_command_takes_the_archive_itself_and_no_other(archive, tmp_path, capsys):
    words = ["--audit_only", "--save_dir", str(tmp_path / "audit"), "--image_size", "16"]
    assert main(["--data_dir", str(archive), *words]) == 1  # of each class there are few images
    assert (tmp_path / "audit/audit.csv").exists()
    other = shutil.copy(archive, archive.with_name("pathmnist.npz"))
    assert main(["--data_dir", str(other), *words]) == 2
    assert "pathmnist.npz is not DermaMNIST" in capsys.readouterr().err


# ---------------------------------------------------------------------------- recognition


@pytest.mark.parametrize(
    ("images", "tables"),
    [
        (["melanoma/a.jpg", "nevus/b.jpg"], {"metadata.csv": ["image,age", "a,1"]}),
        (["train/mel/a.jpg", "test/nv/b.jpg"], {"train.csv": ["a"], "labels/test.csv": ["a"]}),
        (["HAM10000/mel/ISIC_1.jpg", "HAM10000/nv/ISIC_2.jpg"], {"hmnist_8_8_L.csv": ["a"]}),
        (["PH2/Melanoma/IMD1.bmp", "PH2/Nevus/IMD2.bmp"], {"my_ph2_dataset.txt": ["a"]}),
        (["imgs_part_1/x/a.png", "b/x/c.png"], {"metadata.csv": ["img_id"]}),
        (
            ["a/HAM10000_metadata.jpg", "b/fitzpatrick17k.png"],
            {"old/x/y/z/ddi_metadata.csv": ["a"]},
        ),
        (["a/1.png", "b/2.png"], {".old/HAM10000_metadata.csv": [HAM10000]}),
    ],
)
def test_ordinary_class_folders_are_no_published_set(make_set, images, tables):
    assert layout_of(make_set(images, tables)) == "class folders"


def test_names_are_recognised_in_upper_or_lower_case_and_below_other_folders(make_set):
    rows = [HAM10000, *HAM10000_ROWS]
    images = [f"download/{path.upper()}" for path in HAM10000_PARTS]
    root = make_set(images, {"download/tables/ham10000_METADATA.CSV": rows})
    table, found = read(root)
    assert found.layout == "ham10000"
    assert sorted(table["class"]) == ["bkl", "bkl", "mel", "nv"]


def test_a_table_without_the_columns_of_its_set_is_named(make_set):
    root = make_set(HAM10000_PARTS, {"HAM10000_metadata.csv": ["picture,dx", "ISIC_0027419,bkl"]})
    with pytest.raises(ValueError, match=r"HAM10000_metadata\.csv: no column image or image_id"):
        DatasetBuilder(root).list_images()
    (root / "HAM10000_metadata.csv").write_text("image_id,diagnosis\nISIC_0027419,bkl\n")
    with pytest.raises(ValueError, match=r"HAM10000_metadata\.csv: no column dx of labels"):
        DatasetBuilder(root).list_images()
    (root / "HAM10000_metadata.csv").write_text("image_id,dx\nISIC_0027419,bkl\nISIC_0027419,nv\n")
    with pytest.raises(ValueError, match="the classes of ISIC_0027419 contradict each other"):
        DatasetBuilder(root).list_images()


def test_the_layout_can_be_chosen(make_set):
    images = [f"{'mel' if i < 3 else 'nv'}/ISIC_{i}.jpg" for i in range(6)]
    tables = {"HAM10000_metadata.csv": [HAM10000, *HAM10000_ROWS]}
    root = make_set(images, tables)
    with pytest.raises(ValueError, match="no row matches an image.* --layout"):
        DatasetBuilder(root).list_images()
    assert len(DatasetBuilder(root, layout="class folders").list_images()) == 6
    kaggle = ["image_name,benign_malignant", *(f"ISIC_{i},benign" for i in range(4))]
    kaggle += ["ISIC_4,malignant", "ISIC_5,malignant"]
    (root / "train.csv").write_text("\n".join(kaggle))
    found = DatasetBuilder(root, layout="isic2020").list_images()
    assert found["class"].value_counts().to_dict() == {"benign": 4, "malignant": 2}


def test_a_mistyped_layout_is_an_error_that_suggests_the_right_one(make_set):
    root = make_set(["a/1.png", "b/2.png"])
    with pytest.raises(ValueError, match=r"unknown layout 'ham1000'; did you mean .*ham10000"):
        DatasetBuilder(root, layout="ham1000")
    with pytest.raises(FileNotFoundError, match="no table of labels; .* named like ham10000_meta"):
        DatasetBuilder(root, layout="ham10000").list_images()


UNKNOWN = {"UNK"}  # the challenge's own word for it


def test_every_class_of_every_set_is_a_known_diagnosis_or_said_to_be_unknown():
    names = [*ISIC_2019.split(",")[1:], *ISIC_2018.split(",")[1:], "melanoma", "nevus"]
    names += ["seborrheic_keratosis", "benign", "malignant", "non-neoplastic"]
    names += ["BCC", "SCC", "ACK", "SEK", "BOD", "MEL", "NEV"]
    names += ["Common Nevus", "Atypical Nevus", "Melanoma"]
    unknown = {name for name in [*names, *CLASSES] if find_diagnosis(name) is None}
    assert unknown == UNKNOWN
    assert find_diagnosis("BOD").is_malignant and not find_diagnosis("BEN_OTH").is_malignant


def test_every_layout_is_described_within_100_columns(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--layouts"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert printed == describe_layouts() + "\n"
    assert max(map(len, printed.splitlines())) <= 100
    for name, reader in READERS.items():
        assert f"\n{name}" in f"\n{printed}" and reader.title in printed


def test_the_table_of_layouts_needs_no_torch():
    code = "import imaging.layouts, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
