"""Names by which folders and files are recognised as images or masks."""

import re

from polyseg.data.layouts.cases import part_of, plain

IMAGE_FOLDERS = ("images", "image", "img", "imgs", "original", "jpegimages", "input", "inputs")
MASK_FOLDERS = (
    *("masks", "mask", "labels", "label", "gt", "groundtruth", "annotations", "annotation"),
    *("segmentations", "segmentation", "segmentationclass", "1stmanual"),
)
OTHER_OBSERVER = "2ndmanual"
"""Folder of a second observer's annotations, which are read only if data.masks names it."""

_MASK_ENDING = re.compile(
    r"[ _.-]+(masks?|segmentations?|segmented|seg|manual|gt|ground[ _-]?truth|labels?|annotations?"
    r"|annot|anno|1stHO)[ _-]?\d*$",
    re.IGNORECASE,
)
_IMAGE_ENDING = re.compile(
    r"[ _.-]+(images?|img|input|original|train|training|val|validation|test)$", re.IGNORECASE
)
_MASK_WORDS = re.compile(
    r"(.*[ _.-])?(masks?|segmentations?|seg|labels?|gt|ground[ _-]?truth|manual|annotations?|anno)",
    re.IGNORECASE,
)
SECOND_OBSERVER = re.compile(r"[ _.-]+2ndHO$", re.IGNORECASE)
"""Ending of a second observer's masks in CHASE_DB1."""
DRAWING = re.compile(r"_superpixels$", re.IGNORECASE)
"""Ending of drawings that lie beside ISIC's training images."""


def without_mask_endings(stem: str) -> list[str]:
    """Return the stem, and the stem without the endings of masks.

    >>> without_mask_endings("21_manual1"), without_mask_endings("benign (1)_mask_1")
    (['21_manual1', '21'], ['benign (1)_mask_1', 'benign (1)'])
    """
    names = [stem]
    while (shorter := _MASK_ENDING.sub("", names[-1])) not in ("", names[-1]):
        names.append(shorter)
    return names


def without_image_ending(stem: str) -> str:
    """Return the stem of an image without endings such as _test.

    >>> without_image_ending("21_training")
    '21'
    """
    return _IMAGE_ENDING.sub("", stem)


def is_mask_name(name: str) -> bool:
    """Return whether a name, such as that of a file in a case's folder, means a mask.

    >>> is_mask_name("segmentation"), is_mask_name("lung_mask"), is_mask_name("imaging")
    (True, True, False)
    """
    return _MASK_WORDS.fullmatch(name) is not None


def meaning_of(name: str) -> tuple[str, str] | None:
    """Return ("images" or "masks", part) for names such as ISIC2018_Task1_Test_GroundTruth.

    >>> meaning_of("val_images"), meaning_of("ISIC-2017_Training_Part1_GroundTruth")
    (('images', 'val'), ('masks', 'train'))
    """
    words = [word for word in re.split(r"[ _-]+", name) if word]
    parts = {part for word in words if (part := part_of(word))}
    rest = [word.lower() for word in words if not part_of(word)]
    if len(parts) != 1 or not rest:
        return None
    part = parts.pop()
    if rest[-1] in IMAGE_FOLDERS or (rest[-1] == "data" and len(rest) > 1):
        return "images", part
    if rest[-1] in MASK_FOLDERS or "".join(rest[-2:]) == "groundtruth":
        return "masks", part
    return None


def is_for_masks(name: str) -> bool:
    """Return whether a folder's name means masks.

    >>> is_for_masks("Ground Truth"), is_for_masks("train_masks"), is_for_masks("images")
    (True, True, False)
    """
    meaning = meaning_of(name)
    return plain(name) in (*MASK_FOLDERS, OTHER_OBSERVER, "labelstr", "labelsts") or (
        meaning is not None and meaning[0] == "masks"
    )
