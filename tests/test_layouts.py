"""Detection of data set layouts: recognised layouts, ambiguous ones, and errors."""

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyseg.data.layouts import cases as cases_module
from polyseg.data.layouts import find_cases as finding
from polyseg.data.layouts.cases import Case, raise_problems, stem_of
from polyseg.data.layouts.find_cases import holds_masks
from polyseg.data.layouts.pairing import RULES
from polyseg.data.layouts.unlabelled import find_unlabelled
from polyseg.errors import PolysegError
from tests.layout_copies import COPIES, FAULTY_FILES, cvc_clinicdb_twice, planted_faults


def find_cases(*arguments, **settings):
    """Find cases as a run does, which raises an error if there are problems."""
    layout = finding.find_cases(*arguments, **settings)
    raise_problems(layout.problems)
    return layout


FOUND = {
    "kvasir": ("images/ and masks/", {None: 12}),
    "cvc_clinicdb": ("Original/ and Ground Truth/", {None: 10}),
    "isic2018": (
        "ISIC2018_Task1-2_Training_Input/ and ISIC2018_Task1_Training_GroundTruth/, "
        "with parts train, val, test",
        {"train": 8, "val": 3, "test": 3},
    ),
    "busi": ("images with masks beside them", {None: 15}),
    "drive": ("images/ and 1st_manual/, with parts train, test", {"train": 8, "test": 4}),
    "nnunet_png": ("nnU-Net raw", {None: 10, "test": 3}),
    "nnunet_nifti": ("nnU-Net raw", {None: 4}),
    "decathlon": ("Medical Segmentation Decathlon", {None: 3}),
    "nifti_folder": ("images/ and masks/", {None: 4}),
    "dicom_series": ("images/ and masks/", {None: 4}),
    "dicom_slices": ("images/ and masks/", {None: 10}),
    "tiff_stack": ("images/ and masks/", {None: 4}),
    "parts": (
        "images/ and masks/, with parts train, val, test",
        {"train": 8, "val": 3, "test": 3},
    ),
    "manifest": ("CSV manifest", {"train": 8, "val": 2, "test": 2}),
    "own_folder": ("images/ and masks/", {None: 12}),
}


def make(root, *names):
    """Create empty files; the layout depends on names only."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def many(pattern, count=3):
    return [pattern.replace("#", str(index)) for index in range(1, count + 1)]


def ids(layout):
    return [case.id for case in layout.cases]


def parts_of(layout):
    return {case.id: case.part for case in layout.cases}


def error_of(*arguments, **settings):
    with pytest.raises(PolysegError) as caught:
        find_cases(*arguments, **settings)
    return str(caught.value)


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    return {name: copy(tmp_path_factory.mktemp(name)) for name, copy in COPIES.items()}


@pytest.mark.parametrize("name", COPIES)
def test_layouts_of_known_sets_are_recognised(copies, name):
    path = copies[name]
    layout = find_cases(path)
    counts = {}
    for case in layout.cases:
        counts[case.part] = counts.get(case.part, 0) + 1
        assert case.images
        assert all(file.exists() for file in (*case.images, *case.masks))
    assert (layout.name, counts) == FOUND[name]
    assert ids(layout) == sorted(set(ids(layout)))
    assert set(FOUND) == set(COPIES)


@pytest.mark.parametrize("name", [name for name in COPIES if name != "manifest"])
def test_wrapping_folder_does_not_change_the_layout(copies, name):
    assert find_cases(copies[name].parent).cases == find_cases(copies[name]).cases


@pytest.mark.parametrize("name", [name for name in COPIES if name != "manifest"])
def test_unlabelled_images_of_known_sets_are_found(copies, name):
    labelled = {case.id: case.images for case in find_cases(copies[name]).cases}
    cases = find_unlabelled([copies[name]])
    assert all(case.masks is None for case in cases)
    if name in ("nnunet_nifti", "decathlon"):
        assert {case.id for case in cases} == {{"n": "organ_100", "d": "prostate_03"}[name[0]]}
    elif name == "nnunet_png":
        assert [len(case.images) for case in cases] == [2, 2, 2]
        assert all(labelled[case.id] == case.images for case in cases)
    else:
        assert {case.id: case.images for case in cases} == labelled


def test_known_sets_have_expected_masks_labels_and_notes(copies):
    busi = {case.id: case for case in find_cases(copies["busi"]).cases}
    assert len(busi["benign (1)"].masks) == 2
    assert busi["normal (3)"].masks == ()
    assert busi["normal (1)"].masks[0].name == "normal (1)_mask.png"
    drive = find_cases(copies["drive"])
    assert [case.masks[0].name for case in drive.cases][:2] == ["01_manual1.gif", "02_manual1.gif"]
    assert ids(drive)[-1] == "28_training"
    assert any("2nd_manual" in note for note in drive.notes)
    assert find_cases(copies["nnunet_png"]).labels == {"tumour": 1}
    assert find_cases(copies["decathlon"]).labels == {"prostate": 1}
    assert find_cases(copies["decathlon"]).notes == ("1 test image without labels left out",)
    series = find_cases(copies["dicom_series"]).cases
    assert series[0].images[0].is_dir()
    assert [case.masks[0].is_dir() for case in series] == [False, False, False, True]
    listed = find_cases(copies["manifest"])
    assert {case.group for case in listed.cases} == {f"p{index}" for index in range(6)}


def test_missing_masks_and_images_of_a_faulty_set_are_reported(tmp_path):
    root = planted_faults(tmp_path)
    text = error_of(root)
    assert "1 image (case_01.png) without a mask" in text
    assert "1 mask (case_02.png) without an image" in text
    assert len(text.split("\n")) == 2
    present = {str(path.relative_to(root)) for path in root.rglob("*.*")}
    assert set(FAULTY_FILES) <= present


# Folders of images and masks.


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("images", "masks"),
        ("IMG", "Ground_Truth"),
        ("JPEGImages", "SegmentationClass"),
        ("inputs", "ground-truth"),
        ("image", "labels"),
    ],
)
def test_common_folder_names_are_recognised(tmp_path, images, masks):
    make(tmp_path, *many(f"{images}/#.jpg"), *many(f"{masks}/#.png"), "readme.txt", "more/note.md")
    assert ids(find_cases(tmp_path)) == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("a", "a"),
        ("a", "a_mask"),
        ("a", "a-mask"),
        ("a", "a mask"),
        ("a", "a_Segmentation"),
        ("a", "a_gt"),
        ("a", "a.label"),
        ("21_training", "21_manual1"),
        ("a_image", "a_label"),
        ("a_mask", "a_mask"),
    ],
)
def test_masks_are_matched_by_name(tmp_path, image, mask):
    make(tmp_path, f"images/{image}.png", f"masks/{mask}.tif")
    (case,) = find_cases(tmp_path).cases
    assert (case.id, case.masks) == (image, (tmp_path / f"masks/{mask}.tif",))


def test_several_masks_can_belong_to_one_image(tmp_path):
    make(tmp_path, "images/a.png", "images/a_1.png", *many("masks/a_mask_#.png"), "masks/a_1.png")
    first, second = find_cases(tmp_path).cases
    assert [mask.stem for mask in first.masks] == ["a_mask_1", "a_mask_2", "a_mask_3"]
    assert [mask.stem for mask in second.masks] == ["a_1"]


def test_system_and_hidden_files_are_ignored(tmp_path):
    make(tmp_path, "images/a.PNG", "masks/a.gif", "images/Thumbs.db", "images/._a.png")
    make(tmp_path, "masks/.b.png", "masks/list.csv", "__MACOSX/images/b.png", "images/no suffix")
    make(tmp_path, "images/__MACOSX/c.png", ".cache/x.png")
    assert ids(find_cases(tmp_path)) == ["a"]


def test_all_problems_are_reported_together(tmp_path):
    make(tmp_path, *many("images/#.png", 9), *many("masks/#.png", 2), "masks/b.png", "images/1.bmp")
    lines = error_of(tmp_path).split("\n")
    assert len(lines) == 3
    assert "1 name (1) shared by two files" in lines[0]
    assert "1 mask (b.png) without an image" in lines[1]
    assert "7 images (3.png, 4.png, 5.png, 6.png, 7.png and 2 more) without a mask" in lines[2]
    assert "data.unmasked=empty" in lines[2]


def test_problems_of_all_parts_are_reported_together(tmp_path):
    make(tmp_path, *many("train/images/#.png"), *many("train/masks/#.png", 2))
    make(tmp_path, *many("val/images/#.png", 2), *many("val/masks/#.png"))
    lines = error_of(tmp_path).split("\n")
    assert [("train/images" in line, "val/masks" in line) for line in lines] == [
        (True, False),
        (False, True),
    ]


def test_unmasked_setting_keeps_or_skips_images_without_a_mask(tmp_path):
    make(tmp_path, *many("images/#.png"), "masks/1.png")
    empty = find_cases(tmp_path, unmasked="empty")
    assert [len(case.masks) for case in empty.cases] == [1, 0, 0]
    assert empty.notes == (f"{tmp_path}/images: 2 images without a mask: taken as empty",)
    skipped = find_cases(tmp_path, unmasked="skip")
    assert ids(skipped) == ["1"]
    assert skipped.notes == (f"{tmp_path}/images: 2 images without a mask: left out",)


def test_set_without_any_mask_is_refused(tmp_path):
    make(tmp_path, *many("images/#.png"), "masks/readme.txt")
    assert "3 images (1.png, 2.png, 3.png) without a mask" in error_of(tmp_path)
    assert "has no image with a mask" in error_of(tmp_path, unmasked="skip")


def test_names_that_never_match_give_one_line(tmp_path):
    make(tmp_path, *many("images/a#.png"), *many("masks/b#.png"))
    text = error_of(tmp_path)
    assert "no name matches" in text
    assert "such as a1 and b1" in text
    assert "\n" not in text


def test_images_folder_without_images_is_refused(tmp_path):
    make(tmp_path, "images/notes.txt", "masks/1.png")
    assert "images: holds no image (.png" in error_of(tmp_path)


@pytest.mark.parametrize("side", ["images", "masks"])
def test_two_candidate_folders_need_a_setting(tmp_path, side):
    second = {"images": "original", "masks": "labels"}[side]
    make(tmp_path, *many("images/#.png"), *many("masks/#.png"), *many(f"{second}/#.png"))
    text = error_of(tmp_path)
    assert f"several folders may hold the {side}" in text
    assert f"data.{side}=NAME" in text
    (case, *_) = find_cases(tmp_path, **{side: second}).cases
    assert {"images": case.images, "masks": case.masks}[side][0].parent.name == second


def test_folder_without_readable_files_is_no_candidate(tmp_path):
    make(tmp_path, *many("images/#.png"), *many("masks/#.png"), *many("labels/#.txt"))
    assert ids(find_cases(tmp_path)) == ["1", "2", "3"]


def test_folder_names_can_be_given_by_settings(tmp_path):
    make(tmp_path, *many("train/photos/#.png"), *many("train/drawn by A/#.png"))
    assert "has no known layout" in error_of(tmp_path)
    layout = find_cases(tmp_path, images="photos", masks="drawn by A")
    assert layout.name == "photos/ and drawn by A/, with parts train"
    text = error_of(tmp_path, images="photos", masks="nowhere")
    assert "nothing matches data.images='photos' and data.masks='nowhere'" in text
    assert "is the folder of images too" in error_of(tmp_path, images="a", masks="A")
    assert "data.images: has no effect" in error_of(tmp_path, images="a", layout="nnunet")


def test_error_names_the_setting_if_one_folder_is_known(tmp_path):
    make(tmp_path, *many("pictures/#.png"), *many("masks/#.png"))
    assert "set data.images=NAME" in error_of(tmp_path)
    assert len(find_cases(tmp_path, images="pictures").cases) == 3


def test_folder_with_two_sets_is_refused(tmp_path):
    text = error_of(cvc_clinicdb_twice(tmp_path))
    assert "holds 2 data sets (PNG/, TIF/); give the path of one" in text
    assert find_cases(tmp_path / "CVC-ClinicDB/TIF").cases[0].images[0].suffix == ".tif"


def test_drive_test_part_without_annotations_is_left_out(tmp_path):
    for part, first in (("training", 21), ("test", 10)):
        for number in range(first, first + 3):
            make(tmp_path / part, f"images/{number}_{part}.tif", f"mask/{number}_{part}_mask.gif")
    text = error_of(tmp_path)
    assert "has no known layout" in text
    make(tmp_path, *[f"training/1st_manual/{number}_manual1.gif" for number in (21, 22, 23)])
    layout = find_cases(tmp_path)
    assert ids(layout) == ["21_training", "22_training", "23_training"]
    assert f"{tmp_path}/test has no masks and was left out" in layout.notes
    chosen = find_cases(tmp_path, masks="mask")
    assert chosen.cases[0].masks[0].parent.name == "mask"


# Masks beside images.


def test_masks_beside_images_are_found_by_suffix(tmp_path):
    make(tmp_path, *many("#.jpg"), *many("#_mask.png"), "2_mask_1.png")
    layout = find_cases(tmp_path)
    assert [len(case.masks) for case in layout.cases] == [1, 2, 1]
    make(tmp_path, "lost_mask.png", "bare.png")
    lines = error_of(tmp_path).split("\n")
    assert "1 mask (lost_mask.png) without an image" in lines[0]
    assert "1 image (bare.png) without a mask" in lines[1]


def test_one_folder_per_patient(tmp_path):
    for patient in ("TCGA_CS_4941", "TCGA_CS_4942"):
        make(tmp_path / patient, *many(f"{patient}_#.tif"), *many(f"{patient}_#_mask.tif"))
    make(tmp_path, "data.csv", "README.md")
    assert len(find_cases(tmp_path).cases) == 6


def test_equal_ids_get_the_class_as_prefix(tmp_path):
    for kind in ("benign", "malignant"):
        make(tmp_path / "BUSI" / kind, *many("#.png", 2), *many("#_mask.png", 2))
    assert ids(find_cases(tmp_path)) == ["benign/1", "benign/2", "malignant/1", "malignant/2"]


def test_only_normal_images_have_empty_masks_by_default(tmp_path):
    make(tmp_path, "benign/1.png", "benign/1_mask.png", "Normal/2.png", "Normal/3.png")
    layout = find_cases(tmp_path)
    assert [case.masks for case in layout.cases][1:] == [(), ()]
    assert "2 images without a mask: normal, so taken as empty" in layout.notes[0]
    make(tmp_path, "other/4.png")
    assert "other: 1 image (4.png) without a mask" in error_of(tmp_path)


# Parts.


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [("train", "val", "test"), ("Training", "Valid", "TESTING"), ("TrainDataset", "val_set", "t")],
)
def test_folder_names_define_the_parts(tmp_path, train, val, test):
    for name in (train, val, test):
        make(tmp_path / name, f"images/{name}.png", f"masks/{name}.png")
    if test == "t":
        assert len(find_cases(tmp_path).cases) == 2
    else:
        parts = parts_of(find_cases(tmp_path))
        assert (parts[train], parts[val], parts[test]) == ("train", "val", "test")


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("images/{}", "masks/{}"),
        ("images/{}", "labels/{}"),
        ("{}_images", "{}_masks"),
        ("images_{}", "masks-{}"),
        ("ISBI2016_ISIC_Part1_{}_Data", "ISBI2016_ISIC_Part1_{}_GroundTruth"),
        ("ISIC-2017_{}_v2_Data", "ISIC-2017_{}_v2_Part1_GroundTruth"),
    ],
)
def test_part_folders_inside_image_folders_define_the_parts(tmp_path, images, masks):
    for part in ("train", "test"):
        make(tmp_path, *many(f"{images.format(part)}/#.png", 2))
        make(tmp_path, *many(f"{masks.format(part)}/#.png", 2))
    parts = parts_of(find_cases(tmp_path))
    assert parts == {"test/1": "test", "test/2": "test", "train/1": "train", "train/2": "train"}


def test_class_folders_inside_parts(tmp_path):
    for part in ("train", "test"):
        for kind in ("benign", "malignant"):
            make(tmp_path / part / kind, "1.png", "1_mask.png")
    parts = parts_of(find_cases(tmp_path))
    assert parts["test/benign/1"] == "test"
    assert len(parts) == 4


def test_class_folders_inside_images_and_masks(tmp_path):
    for side in ("images", "masks"):
        make(tmp_path / side, "benign/1.png", "malignant/1.png")
    layout = find_cases(tmp_path)
    assert (layout.name, ids(layout)) == ("images/ and masks/", ["benign/1", "malignant/1"])


def test_test_part_without_masks_is_left_out(tmp_path):
    make(tmp_path, "train/images/1.png", "train/masks/1.png", "test/images/2.png")
    layout = find_cases(tmp_path)
    assert ids(layout) == ["1"]
    assert layout.notes == (f"{tmp_path}/test has no masks and was left out",)
    make(tmp_path, "training/images/3.png")
    assert f"{tmp_path}/training: there are no masks for these images" in error_of(tmp_path)


def test_nested_test_part_without_masks_is_left_out(tmp_path):
    make(tmp_path, "images/train/1.png", "masks/train/1.png", "images/test/2.png")
    assert find_cases(tmp_path).notes == (f"{tmp_path}/images/test has no masks and was left out",)
    make(tmp_path, "masks/val/3.png", "images/extra/4.png")
    text = error_of(tmp_path)
    assert f"{tmp_path}/masks/val: there are no images" in text
    assert f"expected {tmp_path}/masks/extra" in text


def test_superpixel_files_are_ignored(tmp_path):
    name = "ISIC-2017_Training_Data/ISIC_0000000"
    make(tmp_path, f"{name}.jpg", f"{name}_superpixels.png")
    make(tmp_path, "ISIC-2017_Training_Part1_GroundTruth/ISIC_0000000_segmentation.png")
    assert ids(find_cases(tmp_path)) == ["ISIC_0000000"]


# Pairing rules.


@pytest.mark.parametrize(
    ("image", "mask", "rule"),
    [
        ("images/image_{}.png", "masks/mask_{}.png", "prefix"),
        ("images/{}.png", "masks/00{}.png", "zeros"),
        ("images/Case{}.png", "masks/case{}.png", "case"),
        ("images/IMG_{}.png", "masks/mask_0{}.png", "loose"),
        ("image_{}.png", "mask_{}.png", "prefix"),
        ("{}.jpg", "{}.png", "equal"),
        ("{}.bmp", "{}_anno.bmp", "equal"),
        ("Image_{}L.jpg", "Image_{}L_1stHO.png", "equal"),
    ],
)
def test_masks_are_paired_by_rules(tmp_path, image, mask, rule):
    for number in range(1, 5):
        make(tmp_path, image.format(number), mask.format(number))
    layout = find_cases(tmp_path)
    pairs = {case.images[0].name: [one.name for one in case.masks] for case in layout.cases}
    names = [(Path(image.format(n)).name, [Path(mask.format(n)).name]) for n in range(1, 5)]
    assert pairs == dict(names)
    assert [RULES[rule].help in note for note in layout.notes] == [True] * (rule != "equal")


def test_pairing_rules_skip_masks_that_fit_two_images(tmp_path):
    make(tmp_path, "images/1.png", "images/01.png", "images/2.png", "masks/001.png")
    assert "no name matches one in" in error_of(tmp_path)


def test_masks_of_a_second_observer_are_left_out(tmp_path):
    make(tmp_path, *many("Image_#L.jpg"), *many("Image_#L_1stHO.png"), *many("Image_#L_2ndHO.png"))
    layout = find_cases(tmp_path)
    assert [case.masks[0].stem[-5:] for case in layout.cases] == ["1stHO"] * 3
    assert layout.notes == (f"{tmp_path}: 3 masks of a second observer left out",)


def test_equal_names_in_two_lossless_formats_need_a_setting(tmp_path):
    make(tmp_path, *many("#.bmp"), *many("#.png"))
    assert "name the masks by data.masks, such as data.masks='*.png'" in error_of(tmp_path)
    layout = find_cases(tmp_path, masks="*.png")
    assert [case.images[0].suffix for case in layout.cases] == [".bmp"] * 3
    assert [case.masks[0].suffix for case in layout.cases] == [".png"] * 3


# Folders given by path, and several folders.


def test_masks_in_several_folders_need_a_setting_and_are_united(tmp_path):
    make(tmp_path, *many("images/#.png"), *many("masks/left/#.png"), *many("masks/right/#.png"))
    assert "set data.masks=[masks/left, masks/right] to unite them, or =" in error_of(tmp_path)
    united = find_cases(tmp_path, masks=["masks/left", "masks/right"])
    assert [[mask.parent.name for mask in case.masks] for case in united.cases] == [
        ["left", "right"]
    ] * 3
    one = find_cases(tmp_path, masks="masks/left")
    assert [len(case.masks) for case in one.cases] == [1, 1, 1]
    assert one.name == "images/ and masks/left/"


def test_images_can_be_read_from_several_folders(tmp_path):
    make(tmp_path, *many("a/x/#.png", 2), "b/3.png", *many("truth/#.png"))
    layout = find_cases(tmp_path, images=["a/x", "b"], masks="truth")
    assert ids(layout) == ["1", "2", "3"]
    assert "holds no file that can be read" in error_of(tmp_path, images="a/y", masks="truth")


# One folder for each case.


def test_one_folder_per_image_with_many_masks(tmp_path):
    for name in ("ab12", "cd34", "ef56"):
        make(tmp_path / "stage1_train" / name, f"images/{name}.png", *many("masks/x#.png"))
        make(tmp_path / "stage1_test" / f"t{name}", f"images/t{name}.png")
    layout = find_cases(tmp_path)
    assert [(case.id, len(case.masks), case.part) for case in layout.cases] == [
        ("ab12", 3, "train"),
        ("cd34", 3, "train"),
        ("ef56", 3, "train"),
    ]
    assert layout.notes == (f"{tmp_path}/stage1_test has no masks and was left out",)


def test_one_folder_per_case_with_fixed_names(tmp_path):
    for number in range(3):
        make(tmp_path / f"case_{number:05}", "imaging.nii.gz", "segmentation.nii.gz")
    layout = find_cases(tmp_path)
    assert ids(layout) == ["case_00000", "case_00001", "case_00002"]
    assert layout.cases[0].masks == (tmp_path / "case_00000/segmentation.nii.gz",)


def test_file_names_of_cases_can_be_given_by_settings(tmp_path):
    for number in range(4):
        make(tmp_path / f"case_{number}", "scan.png", "truth.png")
    assert "has no known layout" in error_of(tmp_path)
    layout = find_cases(tmp_path, images="scan", masks="truth")
    assert ids(layout) == [f"case_{number}" for number in range(4)]
    assert layout.cases[3].masks == (tmp_path / "case_3/truth.png",)


def test_several_channels_of_a_case_need_a_setting(tmp_path):
    for number in range(1, 4):
        name = f"BraTS20_Training_00{number}"
        make(tmp_path / name, *[f"{name}_{end}.nii" for end in ("t1", "flair", "seg")])
    text = error_of(tmp_path)
    assert "several files of each case may hold the images (flair, t1)" in text
    both = find_cases(tmp_path, images=["flair", "t1"]).cases
    assert [file.name[-9:] for file in both[0].images] == ["flair.nii", "01_t1.nii"]
    one = find_cases(tmp_path, images="t1").cases
    assert [len(case.images) for case in one] == [1, 1, 1]


def test_bids_masks_are_found_among_derivatives(tmp_path):
    for subject in ("01", "02"):
        for session in ("1", "2"):
            stem = f"sub-{subject}_ses-{session}"
            folder = f"sub-{subject}/ses-{session}/anat"
            make(tmp_path, f"{folder}/{stem}_T1w.nii.gz", "dataset_description.json")
            mask = f"derivatives/manual/{folder}/{stem}_space-T1w_desc-lesion_mask.nii.gz"
            make(tmp_path, mask)
    layout = find_cases(tmp_path)
    assert layout.name == "BIDS, T1w and mask"
    assert [(case.id, case.group, len(case.masks)) for case in layout.cases] == [
        (f"sub-{subject}_ses-{session}", f"sub-{subject}", 1)
        for subject in ("01", "02")
        for session in ("1", "2")
    ]
    make(tmp_path, "sub-01/ses-1/anat/sub-01_ses-1_FLAIR.nii.gz")
    assert "several kinds of files may hold the images (FLAIR, T1w)" in error_of(tmp_path)
    assert len(find_cases(tmp_path, images="T1w").cases) == 4


# Files that are left out.


def test_broken_links_and_unsupported_files_are_counted_and_named(tmp_path):
    make(tmp_path, *many("images/#.png", 5), *many("masks/#.png", 5), "images/a.svs", "masks/b.mat")
    for side in ("images", "masks"):
        (tmp_path / side / "6.png").symlink_to("../.git/annex/objects/xx")
    layout = find_cases(tmp_path)
    assert len(layout.cases) == 5
    assert layout.notes == (
        f"{tmp_path}/images: 1 broken link (6.png) left out; fetch the files, such as by "
        "`git annex get`",
        f"{tmp_path}/images: 1 file (a.svs) left out; their kinds are not read (.svs)",
        f"{tmp_path}/masks: 1 broken link (6.png) left out; fetch the files, such as by "
        "`git annex get`",
        f"{tmp_path}/masks: 1 file (b.mat) left out; their kinds are not read (.mat)",
    )


def test_mostly_broken_links_are_an_error(tmp_path):
    make(tmp_path, "images/0.png", "masks/0.png")
    for name in many("images/#.png") + many("masks/#.png"):
        (tmp_path / name).symlink_to("nowhere")
    text = error_of(tmp_path)
    assert "images: 3 broken links (1.png, 2.png, 3.png) left out; fetch" in text


# DICOM.


def write_dicom(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 8)


def test_dicom_files_may_have_no_suffix(tmp_path):
    for name in ("images/IM0001", "images/1.2.840.7", "images/DICOMDIR", "masks/p/1", "masks/p/2"):
        write_dicom(tmp_path / name)
    make(tmp_path, "masks/IM0001.png", "masks/1.2.840.7.png", "images/README")
    make(tmp_path, "images/p.nii.gz")
    layout = find_cases(tmp_path)
    assert ids(layout) == ["1.2.840.7", "IM0001", "p"]
    assert layout.cases[2].masks == (tmp_path / "masks/p",)


def test_dicom_series_may_be_nested_or_have_one_slice(tmp_path):
    write_dicom(tmp_path / "images/p1/study/series/a.dcm")
    write_dicom(tmp_path / "images/p1/study/series/b.dcm")
    write_dicom(tmp_path / "images/p2/only.dcm")
    make(tmp_path, "masks/p1.nii.gz", "masks/p2.png")
    first, second = find_cases(tmp_path).cases
    assert first.images == (tmp_path / "images/p1/study/series",)
    assert second.images == (tmp_path / "images/p2/only.dcm",)
    assert find_unlabelled([tmp_path / "images/p1"]) == [replace(first, masks=None)]


# nnU-Net and the Decathlon.


def described(root, description, *names):
    make(root, "dataset.json", "imagesTr/.keep", *names)
    text = description if isinstance(description, str) else json.dumps(description)
    (root / "dataset.json").write_text(text)
    return root


V1 = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver", "2": "tumour"}}
LISTED = {"training": [{"image": "./imagesTr/la_003.nii.gz", "label": "./labelsTr/la_003.nii.gz"}]}
LA = ("imagesTr/la_003.nii.gz", "labelsTr/la_003.nii.gz")


def test_nnunet_version_1_is_recognised(tmp_path):
    names = ("imagesTr/la_003_0000.nii.gz", "labelsTr/la_003.nii.gz", "imagesTr/._la_003.nii.gz")
    layout = find_cases(described(tmp_path, V1 | LISTED, *names))
    assert (layout.name, ids(layout)) == ("nnU-Net raw", ["la_003"])
    assert layout.labels == {"liver": 1, "tumour": 2}


def test_nnunet_regions_become_tasks(tmp_path):
    names = "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz"
    labels = {"background": 0, "whole": [1, 2], "core": 2}
    layout = find_cases(described(tmp_path, {"labels": labels}, *names))
    assert layout.labels == {"core": 2}
    assert layout.regions == {"whole": (1, 2), "core": (2,)}


def test_nnunet_ignore_label_is_refused(tmp_path):
    names = "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz"
    labels = {"background": 0, "core": 2, "ignore": 3}
    text = error_of(described(tmp_path, {"labels": labels}, *names))
    assert "pixels of ignore (3) cannot be left out of the loss" in text
    assert "\n" not in text


def test_nnunet_cases_must_have_the_same_channels(tmp_path):
    names = [f"imagesTr/{name}.png" for name in ("a_0000", "a_0001", "b_0000", "c_0001", "odd")]
    description = {"channel_names": {"0": "T1", "1": "T2"}, "file_ending": ".png"}
    described(tmp_path, description, *names, *[f"labelsTr/{name}.png" for name in "abcd"])
    make(tmp_path, "imagesTr/x_0000.tif")
    lines = error_of(tmp_path).split("\n")
    assert "1 file (x_0000.tif) not ending in .png" in lines[0]
    assert "1 image (odd.png) without a channel in the name; expected CASE_0000.png" in lines[1]
    assert "2 cases (b, c) without exactly the channels _0000 to _0001" in lines[2]
    assert "1 mask (d) without an image" in lines[3]


def test_nnunet_cases_without_labels_need_a_setting(tmp_path):
    names = ("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", "imagesTr/b_0000.nii.gz")
    described(tmp_path, V1, *names)
    assert "1 image (b_0000.nii.gz) without a mask" in error_of(tmp_path)
    assert ids(find_cases(tmp_path, unmasked="skip")) == ["a"]


def test_folder_with_several_nnunet_sets_is_refused(tmp_path):
    for name in ("Dataset001_A", "Dataset002_B"):
        described(tmp_path / name, V1, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    assert "holds 2 data sets (Dataset001_A/, Dataset002_B/)" in error_of(tmp_path)


def test_dataset_json_of_another_tool_is_ignored(tmp_path):
    make(tmp_path, *many("images/#.png"), *many("masks/#.png"))
    (tmp_path / "dataset.json").write_text("of another tool")
    assert len(find_cases(tmp_path).cases) == 3


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"image": "../a.nii.gz"}, "leads out of the folder"),
        ({"image": "/etc/passwd"}, "leads out of the folder"),
        ({"image": "imagesTr/no.nii.gz"}, "there is no such file"),
        ({"image": "x" * 5000}, "there is no such file"),
        ({"image": "a\0\ud800"}, "there is no such file"),
        ({"image": "dataset.json"}, "is not a supported file"),
        ({"image": 5}, "5 is not a path"),
        ([[]], "a list is not a path"),
        (LISTED["training"][0], "belong to two images"),
    ],
)
def test_files_listed_by_the_decathlon_must_exist(tmp_path, entry, expected):
    training = [*LISTED["training"], entry]
    assert expected in error_of(described(tmp_path, {"training": training}, *LA))


@pytest.mark.parametrize(
    ("description", "expected"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON: nested too deep"),
        ("[]", "expected an object"),
        ('{"labels": {"a": 1' + "0" * 5000 + "}}", "is not JSON"),
        ({"labels": []}, "labels: expected values by name"),
        ({"labels": {"a": 1.5}}, "labels: a is 1.5; expected a whole number"),
        ({"labels": {"a": True}}, "expected a whole number"),
        ({"labels": {"a": -1}}, "give a value from 0"),
        ({"labels": {"a\n": 1}}, "is not valid text"),
        ({"labels": {"1": "a", "2": "a"}}, "two values are called a"),
        ({"file_ending": ".svs"}, "file_ending is .svs; expected one of .png"),
        ({"file_ending": 7}, "file_ending is 7"),
        ({"channel_names": "CT"}, "channel_names: expected names by number"),
        ({}, "has no image with a mask"),
    ],
)
def test_invalid_dataset_json_is_one_line(tmp_path, description, expected):
    text = error_of(described(tmp_path, description))
    assert expected in text
    assert "\n" not in text
    assert str(tmp_path) in text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=12,
)
KEYS = ("labels", "training", "test", "modality", "channel_names", "file_ending", "numTraining")


@given(st.dictionaries(st.sampled_from(KEYS), JSON), st.sampled_from(["nnunet", "decathlon"]))
def test_any_dataset_json_is_read_or_refused(description, layout):
    with tempfile.TemporaryDirectory() as name:
        root = described(Path(name), description, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
        for settings in ({}, {"layout": layout}):
            try:
                assert find_cases(root, **settings).cases
            except PolysegError as error:
                assert name in str(error)


# CSV manifests.


def listed(root, text, *names):
    make(root, *names)
    path = root / "list.csv"
    path.write_text(text)
    return path


IMAGES = ("a/1.png", "a/2.png", "b/1.png", "m/1.png", "m/2.png")


def test_manifest_lists_images_masks_and_groups(tmp_path):
    text = f"image,mask,group\na/1.png,m/1.png;m/2.png,p1\n\n{tmp_path}/a/2.png , m/2.png\n"
    layout = find_cases(listed(tmp_path, text, *IMAGES))
    assert layout.cases == [
        Case(
            "1", (tmp_path / "a/1.png",), (tmp_path / "m/1.png", tmp_path / "m/2.png"), None, "p1"
        ),
        Case("2", (tmp_path / "a/2.png",), (tmp_path / "m/2.png",)),
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_manifest_saved_by_a_spreadsheet_is_read(tmp_path, encoding, end):
    path = listed(tmp_path, "", *IMAGES)
    lines = ["Image\tMask\tSplit\tId", "a/1.png\tm/1.png\tTraining\tx", "a/2.png\tm/2.png\ttest\ty"]
    path.write_bytes(end.join(lines).encode(encoding))
    assert parts_of(find_cases(path)) == {"x": "train", "y": "test"}


def test_manifest_ids_are_unique(tmp_path):
    text = "image,mask\na/1.png,m/1.png\nb/1.png,m/1.png\n"
    assert ids(find_cases(listed(tmp_path, text, *IMAGES))) == ["a/1", "b/1"]
    make(tmp_path, "c_0000.png", "c_0001.png")
    text = "image,mask\nc_0000.png;c_0001.png,m/1.png\n"
    (case,) = find_cases(listed(tmp_path, text)).cases
    assert (case.id, len(case.images)) == ("c", 2)


def test_manifest_rows_without_a_mask_need_a_setting(tmp_path):
    path = listed(tmp_path, "image,mask\na/1.png,m/1.png\na/2.png,\n", *IMAGES)
    assert "1 image (2.png) without a mask" in error_of(path)
    assert find_cases(path, unmasked="empty").cases[1].masks == ()
    assert ids(find_cases(path, unmasked="skip")) == ["1"]


def test_all_problems_of_a_manifest_are_reported(tmp_path):
    rows = [
        "image,mask,split,id",
        "a/1.png,m/1.png,,x",
        "a/2.png,m/9.png,later,x",
        ",m/1.png,,y",
        "list.csv,m,,../z",
    ]
    lines = error_of(listed(tmp_path, "\n".join(rows), *IMAGES)).split("\n")
    assert "line 3: " in lines[0]
    assert lines[0].endswith("m/9.png: there is no such file")
    assert "line 3: split is later; expected train, val, test or nothing" in lines[1]
    assert "line 4: names no image" in lines[2]
    assert "is not a supported file" in lines[3]
    assert "is a folder, but holds no DICOM series" in lines[4]
    assert "line 5: id ../z cannot be used" in lines[5]
    assert "lines 2, 3 have the same id x" in lines[6]
    assert len(lines) == 7


def test_at_most_twenty_problems_are_shown(tmp_path):
    rows = "".join(f"{index}.png,m/1.png\n" for index in range(30))
    lines = error_of(listed(tmp_path, f"image,mask\n{rows}", *IMAGES)).split("\n")
    assert len(lines) == 21
    assert lines[-1] == "and 10 more"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "has no column image and no column mask"),
        ("image\na/1.png", "has no column mask"),
        ("image,mask,spilt\n", "unknown column 'spilt'; did you mean split?"),
        ("image,mask,mask\n", "two columns are called mask"),
        ("image;mask\n", "by commas (or tabs), not by semicolons"),
        ("image,mask\na,b,c\n", "line 2 has 3 cells, the header 2"),
        ("image,mask\n", "has no image with a mask"),
        ("image,mask\na/1.png," + "x" * 200_000, "line 2 is not CSV"),
        ("image,mask\na/1\x07.png,m/1.png", "a path is not valid text"),
    ],
)
def test_invalid_manifest_is_refused(tmp_path, text, expected):
    assert expected in error_of(listed(tmp_path, text, *IMAGES))


def test_binary_manifest_is_refused(tmp_path):
    path = listed(tmp_path, "")
    path.write_bytes("image,mask\n".encode("utf-16"))
    assert "is not a text file; save it as CSV in UTF-8" in error_of(path)
    assert "data.masks: has no effect for a CSV manifest" in error_of(path, masks="m")


CELLS = st.sampled_from(["a/1.png", "m/1.png", "", ";", "train", "image", "mask", ".", "\0", '"'])


@given(st.lists(st.lists(CELLS | st.text(max_size=6), max_size=5), max_size=5), st.booleans())
def test_any_csv_is_read_or_refused(rows, with_header):
    text = "image,mask,split,id\n" * with_header + "\n".join(map(",".join, rows))
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "list.csv"
        make(Path(name), *IMAGES)
        path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
        try:
            for case in find_cases(path).cases:
                assert case.id.isprintable()
                assert ".." not in case.id.split("/")
        except PolysegError as error:
            assert name in str(error)


# Unknown layouts.


def test_unknown_layout_error_lists_the_folder(tmp_path):
    make(tmp_path, "pictures/a.png", *many("file #.txt", 9))
    text = error_of(tmp_path)
    assert "it holds pictures/, file 1.txt, file 2.txt, file 3.txt, file 4.txt and 5 more" in text
    assert f"`polyseg data manifest {tmp_path} --out set.csv` writes a draft" in text
    assert "it holds nothing" in error_of(make(tmp_path / "empty", ".x").parent / "empty")


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("folders", "does not fit data.layout=folders (it holds 1.png, 1_mask.png); name the"),
        ("nnunet", "has no dataset.json"),
        ("decathlon", "has no dataset.json"),
        ("manifest", "is a folder; data.layout=manifest takes a CSV file"),
    ],
)
def test_layout_setting_is_enforced(tmp_path, layout, expected):
    make(tmp_path, "1.png", "1_mask.png")
    assert expected in error_of(tmp_path, layout=layout)
    assert ids(find_cases(tmp_path, layout="suffixes")) == ["1"]


def test_layout_suffixes_refuses_image_and_mask_folders(tmp_path):
    make(tmp_path, *many("images/#.png"), *many("masks/#.png"))
    text = error_of(tmp_path, layout="suffixes")
    assert "does not fit data.layout=suffixes" in text
    assert len(find_cases(tmp_path, layout="folders").cases) == 3


def test_paths_without_data_are_refused(tmp_path):
    assert "there is no such file or folder" in error_of(tmp_path / "nowhere")
    make(tmp_path, "a.png")
    assert "is a file; data.layout=auto takes a folder or a CSV" in error_of(tmp_path / "a.png")
    assert "is a file; data.layout=nnunet takes a folder" in error_of(
        tmp_path / "a.png", layout="nnunet"
    )
    os.mkfifo(tmp_path / "pipe")
    assert "is neither file nor folder" in error_of(tmp_path / "pipe")


def test_pipes_and_cyclic_links_are_ignored(tmp_path):
    make(tmp_path, *many("images/#.png"), *many("masks/#.png"))
    for name in ("pipe", "pipe.png", "pipe.dcm"):
        os.mkfifo(tmp_path / "images" / name)
    (tmp_path / "images/again").symlink_to(tmp_path)
    (tmp_path / "images/loop.png").symlink_to("loop.png")
    (tmp_path / "images/gone.png").symlink_to("nowhere.png")
    assert ids(find_cases(tmp_path)) == ["1", "2", "3"]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/images").symlink_to(tmp_path / "images")
    (tmp_path / "elsewhere/masks").symlink_to(tmp_path / "masks")
    assert ids(find_cases(tmp_path / "elsewhere")) == ["1", "2", "3"]


def test_file_names_that_are_not_text_are_refused(tmp_path):
    make(tmp_path, "images/a\n.png", "masks/1.png")
    text = error_of(tmp_path)
    assert "1 name ('a\\n.png') is not valid text; rename it" in text
    assert "\n" not in text
    (tmp_path / "images/a\n.png").rename(tmp_path / "images" / os.fsdecode(b"\xff.png"))
    assert "'\\udcff.png'" in error_of(tmp_path)


def test_too_many_files_are_refused(tmp_path, monkeypatch):
    make(tmp_path, *many("images/#.png", 9), *many("masks/#.png", 9))
    monkeypatch.setattr(cases_module, "LARGEST_SET", 15)
    assert "over 15 files and folders" in error_of(tmp_path)


def test_names_are_compared_in_composed_unicode_form(tmp_path):
    make(tmp_path, "images/Pólip.png", "masks/Po\u0301lip.png")
    assert ids(find_cases(tmp_path)) == ["Pólip"]
    assert stem_of(Path("o\u0301.NII.GZ")) == "ó"


# Images to predict, without masks.


def test_files_and_folders_can_be_predicted(tmp_path):
    make(tmp_path, "a/1.png", "a/1_mask.png", "a/notes.txt", "b/images/2.png", "b/masks/2.png")
    make(tmp_path, "3.nii.gz")
    paths = [tmp_path / name for name in ("3.nii.gz", "a", "b", "a/1.png")]
    cases = find_unlabelled(paths)
    assert [(case.id, case.masks) for case in cases] == [("1", None), ("2", None), ("3", None)]


def test_images_to_predict_get_unique_ids(tmp_path):
    make(tmp_path, "x/a/1.png", "y/a/1.png", "x/b/2.png")
    cases = find_unlabelled([tmp_path / "x/a", tmp_path / "y/a/1.png", tmp_path / "x/b"])
    assert [case.id for case in cases] == ["x/a/1", "x/b/2", "y/a/1"]
    make(tmp_path, "x/a/1.jpg")
    with pytest.raises(PolysegError, match="shared by images"):
        find_unlabelled([tmp_path / "x/a"])


def test_dicom_series_can_be_predicted(tmp_path):
    for name in ("p1/1.dcm", "p1/2.dcm", "p2/1", "p2/2", "images/1.dcm", "images/2.dcm"):
        write_dicom(tmp_path / "all" / name)
    one = find_unlabelled([tmp_path / "all/p1"])
    assert one == [Case("p1", (tmp_path / "all/p1",), None)]
    assert [case.id for case in find_unlabelled([tmp_path / "all"])] == ["1", "2"]
    (tmp_path / "all/images").rename(tmp_path / "images")
    assert [case.id for case in find_unlabelled([tmp_path / "all"])] == ["p1", "p2"]


def test_everything_that_cannot_be_predicted_is_named(tmp_path):
    make(tmp_path, "notes.txt", "empty/x.txt")
    with pytest.raises(PolysegError) as caught:
        find_unlabelled([tmp_path / "notes.txt", tmp_path / "empty", tmp_path / "nowhere"])
    lines = str(caught.value).split("\n")
    assert "is not a supported file" in lines[0]
    assert "holds no image" in lines[1]
    assert "there is no such file" in lines[2]
    with pytest.raises(PolysegError, match="no image was named"):
        find_unlabelled([])


def test_data_sets_are_distinguished_from_image_folders(copies, tmp_path):
    assert all(holds_masks(copies[name]) for name in COPIES)
    assert not holds_masks(copies["kvasir"] / "images")
    (tmp_path / "only/images").mkdir(parents=True)
    (tmp_path / "only/images/a.png").touch()
    assert not holds_masks(tmp_path / "only")


def test_unused_manifest_columns_are_noted(tmp_path):
    for name in ("a.png", "a_m.png"):
        (tmp_path / name).touch()
    (tmp_path / "l.csv").write_text("image,age,mask,site\na.png,63,a_m.png,Kyoto\n")
    layout = find_cases(tmp_path / "l.csv")
    assert layout.cases[0].masks == (tmp_path / "a_m.png",)
    assert layout.notes == (f"{tmp_path / 'l.csv'}: columns that are not used: age, site",)


@pytest.mark.parametrize("column", ["patient", "Patient_ID", "subject", "case"])
def test_manifest_column_of_patients_without_group_is_noted_in_its_own_line(tmp_path, column):
    for name in ("a.png", "a_m.png"):
        (tmp_path / name).touch()
    path, name = tmp_path / "l.csv", column.lower()
    advice = f"{path}: {name}: name the column group to keep the images of a "
    path.write_text(f"image,mask,age,{column}\na.png,a_m.png,63,p1\n")
    first, second = find_cases(path).notes
    assert first.startswith(advice) and first.endswith(" in one part of the split")
    assert second == f"{path}: columns that are not used: age"
    path.write_text(f"image,mask,group,{column}\na.png,a_m.png,7,p1\n")
    assert find_cases(path).notes == (f"{path}: columns that are not used: {name}",)
