"""Generate small copies of well-known data sets with their real names, folders and formats."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import tifffile
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

SIZE = (40, 48)
SLICES = 4
SPACING = 0.75
THICKNESS = 3.0

Pixels = NDArray[np.uint8]

FAULTY_FILES = (
    "images/case_01.png",
    "masks/case_02.png",
    "masks/case_03.png",
    "masks/case_04.png",
    "masks/case_05.png",
    "images/case_06.png",
    "images/case_07.png",
    "masks/case_08.png",
    "images/case_09.png",
    "masks/case_10.tif",
)
"""Faulty files in the folder of `planted_faults`."""


def scene(seed: int, size: tuple[int, int] = SIZE, scale: float = 1.0) -> tuple[Pixels, Pixels]:
    """Draw an image with a soft bright blob, and its mask of 0 and 1."""
    generator = np.random.default_rng(seed)
    height, width = size
    rows, columns = np.mgrid[:height, :width]
    row, column = generator.uniform(0.35, 0.65, 2) * size
    tall, wide = generator.uniform(0.15, 0.28, 2) * size * scale
    distance = ((rows - row) / tall) ** 2 + ((columns - column) / wide) ** 2
    light = 60 + 130 / (1 + np.exp(6 * np.minimum(distance - 1, 9)))
    pixels = np.clip(light + generator.normal(0, 8, size), 0, 255).astype(np.uint8)
    return pixels, (distance < 1).astype(np.uint8)


def volume(seed: int, size: tuple[int, int] = SIZE) -> tuple[Pixels, Pixels]:
    """Draw a stack of slices (slice, row, column) whose blobs grow and shrink, and its masks."""
    scales = 1 - 0.5 * np.abs(np.linspace(-1, 1, SLICES))
    slices = [scene(1000 * seed, size, scale) for scale in scales]
    noise = np.random.default_rng(seed).integers(0, 9, (SLICES, *size), np.uint8)
    return np.stack([one for one, _ in slices]) + noise, np.stack([one for _, one in slices])


def kvasir(folder: Path) -> Path:
    """Kvasir-SEG: images and masks are JPEG files in colour, so masks are not just 0 and 255."""
    root = folder / "Kvasir-SEG"
    for index in range(12):
        pixels, mask = scene(index)
        name = f"cju{hashlib.sha256(bytes([index])).hexdigest()[:22]}.jpg"
        _save(root / "images" / name, _colour(pixels), quality=95)
        _save(root / "masks" / name, np.repeat(255 * mask[..., None], 3, 2))
    (root / "kavsir_bboxes.json").write_text("{}")
    return root


def cvc_clinicdb(folder: Path) -> Path:
    """CVC-ClinicDB: TIFF files in Original/ and Ground Truth/."""
    root = folder / "CVC-ClinicDB"
    _clinic(root, ".tif")
    return root


def cvc_clinicdb_twice(folder: Path) -> Path:
    """CVC-ClinicDB as distributed with PNG copies, which makes the folder ambiguous."""
    root = folder / "CVC-ClinicDB"
    _clinic(root / "PNG", ".png")
    _clinic(root / "TIF", ".tif")
    (root / "metadata.csv").write_text("frame_id,sequence_id\n1,1\n")
    return root


def isic2018(folder: Path) -> Path:
    """ISIC 2018, task 1: inputs and ground truths of three parts."""
    root = folder / "ISIC2018"
    number = 0
    for part, count in (("Training", 8), ("Validation", 3), ("Test", 3)):
        inputs = root / f"ISIC2018_Task1-2_{part}_Input"
        truths = root / f"ISIC2018_Task1_{part}_GroundTruth"
        for _ in range(count):
            pixels, mask = scene(100 + number)
            _save(inputs / f"ISIC_{number:07}.jpg", _colour(pixels), quality=95)
            _save(truths / f"ISIC_{number:07}_segmentation.png", 255 * mask)
            number += 1
        for place in (inputs, truths, root):
            (place / "ATTRIBUTION.txt").write_text("by the generator")
            (place / "LICENSE.txt").write_text("CC0")
    return root


def busi(folder: Path) -> Path:
    """BUSI: masks beside images in folders of classes, some in two files, some normal without."""
    root = folder / "Dataset_BUSI_with_GT"
    for kind, count in (("benign", 7), ("malignant", 5)):
        for index in range(1, count + 1):
            pixels, mask = scene(200 + index + len(kind) * 20)
            name = f"{kind} ({index})"
            _save(root / kind / f"{name}.png", _colour(pixels))
            _save(root / kind / f"{name}_mask.png", 255 * mask)
    _, second = scene(300, scale=0.5)
    _save(root / "benign/benign (1)_mask_1.png", 255 * second)
    for index in range(1, 4):
        pixels, mask = scene(400 + index, scale=0.01)
        _save(root / "normal" / f"normal ({index}).png", _colour(pixels))
        if index < 3:
            _save(root / "normal" / f"normal ({index})_mask.png", 0 * mask)
    return root


def drive(folder: Path) -> Path:
    """DRIVE: TIFF images, GIF annotations of one or two observers, and fields of view."""
    root = folder / "DRIVE"
    for part, first, count in (("training", 21, 8), ("test", 1, 4)):
        for number in range(first, first + count):
            pixels, mask = scene(500 + number)
            place, name = root / part, f"{number:02}"
            _save(place / "images" / f"{name}_{part}.tif", _colour(pixels))
            _save(place / "1st_manual" / f"{name}_manual1.gif", 255 * mask)
            _save(place / "mask" / f"{name}_{part}_mask.gif", np.full(SIZE, 255, np.uint8))
            if part == "test":
                _save(place / "2nd_manual" / f"{name}_manual2.gif", 255 * np.roll(mask, 1))
    return root


def nnunet_png(folder: Path) -> Path:
    """nnU-Net raw, version 2: PNG files of two channels, and a test part with labels."""
    root = folder / "Dataset001_Blobs"
    for end, count in (("Tr", 10), ("Ts", 3)):
        for index in range(count):
            pixels, mask = scene(600 + index + len(end + str(count)) * 50)
            name = f"blob{end}_{index:03}"
            _save(root / f"images{end}" / f"{name}_0000.png", pixels)
            _save(root / f"images{end}" / f"{name}_0001.png", 255 - pixels // 2)
            _save(root / f"labels{end}" / f"{name}.png", mask)
    description = {
        "channel_names": {"0": "B-mode", "1": "inverse"},
        "labels": {"background": 0, "tumour": 1},
        "numTraining": 10,
        "file_ending": ".png",
    }
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def nnunet_nifti(folder: Path) -> Path:
    """nnU-Net raw, version 2: NIfTI volumes, and test images without labels."""
    root = folder / "Dataset002_Organ"
    for index in range(4):
        pixels, mask = volume(10 + index)
        _save_nifti(root / "imagesTr" / f"organ_{index:03}_0000.nii.gz", _hounsfield(pixels))
        _save_nifti(root / "labelsTr" / f"organ_{index:03}.nii.gz", mask)
    _save_nifti(root / "imagesTs/organ_100_0000.nii.gz", _hounsfield(volume(19)[0]))
    description = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "organ": 1},
        "numTraining": 4,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def decathlon(folder: Path) -> Path:
    """Task 5 of the Medical Segmentation Decathlon: two modalities in one 4D file."""
    root = folder / "Task05_Prostate"
    names = [f"prostate_{index:02}" for index in range(3)]
    for index, name in enumerate(names):
        pixels, mask = volume(20 + index, (20, 24))
        both = np.stack([pixels, 255 - pixels], -1).astype(np.float32)
        _save_nifti(root / "imagesTr" / f"{name}.nii.gz", both)
        _save_nifti(root / "labelsTr" / f"{name}.nii.gz", mask)
        for side in ("imagesTr", "labelsTr"):
            (root / side / f"._{name}.nii.gz").write_bytes(b"\0\5\x16\7")
    pixels, _ = volume(29, (20, 24))
    _save_nifti(root / "imagesTs/prostate_03.nii.gz", np.stack([pixels, 255 - pixels], -1))
    description = {
        "name": "PROSTATE",
        "tensorImageSize": "4D",
        "modality": {"0": "T2", "1": "ADC"},
        "labels": {"0": "background", "1": "prostate"},
        "numTraining": 3,
        "numTest": 1,
        "training": [
            {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
            for name in names
        ],
        "test": ["./imagesTs/prostate_03.nii.gz"],
    }
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def nifti_folder(folder: Path) -> Path:
    """NIfTI volumes in images/ and masks/."""
    root = folder / "volumes"
    for index in range(4):
        pixels, mask = volume(30 + index)
        _save_nifti(root / "images" / f"case_{index:02}.nii.gz", _hounsfield(pixels))
        _save_nifti(root / "masks" / f"case_{index:02}.nii.gz", mask)
    return root


def dicom_series(folder: Path) -> Path:
    """A folder of DICOM slices for each patient, and masks in NIfTI or, of the last, in DICOM.

    Names of files go up where positions go down, and NIfTI's axes point to the other side, as
    they do in files that were converted.
    """
    root = folder / "series"
    for index in range(4):
        pixels, mask = volume(40 + index)
        patient = f"patient_{index:02}"
        _save_series(root / "images" / patient, _hounsfield(pixels), patient)
        if index < 3:
            affine = np.diag([-SPACING, -SPACING, THICKNESS, 1])
            _save_nifti(root / "masks" / f"{patient}.nii.gz", mask, affine)
        else:
            _save_series(root / "masks" / patient, mask.astype(np.int16), patient, intercept=0)
    return root


def dicom_slices(folder: Path) -> Path:
    """Single DICOM files, one image each, and masks in PNG."""
    root = folder / "slices"
    for index in range(10):
        pixels, mask = scene(700 + index)
        path = root / "images" / f"slice_{index:02}.dcm"
        _save_dicom(path, _hounsfield(pixels), f"patient_{index:02}", 0, generate_uid())
        _save(root / "masks" / f"slice_{index:02}.png", 255 * mask)
    return root


def tiff_stack(folder: Path) -> Path:
    """TIFF files of several pages of 16 bit, and masks of as many."""
    root = folder / "stacks"
    for index in range(4):
        pixels, mask = volume(50 + index)
        for side, pages in (("images", pixels.astype(np.uint16) * 200), ("masks", 255 * mask)):
            path = root / side / f"stack_{index:02}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(path, pages, photometric="minisblack")
    return root


def parts(folder: Path) -> Path:
    """Folders train, val and test, which hold images and masks each."""
    root = folder / "ready"
    number = 0
    for part, count in (("train", 8), ("val", 3), ("test", 3)):
        for _ in range(count):
            _pair(root / part, f"{number:03}", 800 + number)
            number += 1
    return root


def manifest(folder: Path) -> Path:
    """A CSV file that lists images and masks in any folder, with parts and patients."""
    root = folder / "listed"
    lines = ["image,mask,split,group"]
    for index in range(12):
        pixels, mask = scene(900 + index)
        patient, part = index // 2, ("train", "train", "train", "train", "val", "test")[index // 2]
        image, truth = f"patient {patient}/view{index}.png", f"truth/t{index}.png"
        _save(root / image, pixels)
        _save(root / truth, 255 * mask)
        lines.append(f"{image},{truth},{part},p{patient}")
    path = root / "list.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def own_folder(folder: Path) -> Path:
    """The most common layout: images/ and masks/ with equal file names."""
    root = folder / "own"
    for index in range(12):
        _pair(root, f"scan {index:02}", 1000 + index)
    return root


COPIES: dict[str, Callable[[Path], Path]] = {
    copy.__name__: copy
    for copy in (
        *(kvasir, cvc_clinicdb, isic2018, busi, drive, nnunet_png, nnunet_nifti, decathlon),
        *(nifti_folder, dicom_series, dicom_slices, tiff_stack, parts, manifest, own_folder),
    )
}
"""Functions that write a data set into a folder and return the path for --data."""


def dsb2018(folder: Path) -> Path:
    """2018 Data Science Bowl: a folder for each image, with a mask for each nucleus."""
    root = folder / "data-science-bowl-2018"
    for index in range(8):
        pixels, mask = scene(1200 + index)
        name = hashlib.sha256(bytes([index, 1])).hexdigest()
        place = root / "stage1_train" / name
        _save(place / "images" / f"{name}.png", _colour(pixels))
        for k, part in enumerate((mask, np.roll(mask, 14, 1))):
            own = hashlib.sha256(bytes([index, k])).hexdigest()
            _save(place / "masks" / f"{own}.png", 255 * part)
    return root


def kaggle_3m(folder: Path) -> Path:
    """LGG MRI segmentation: a folder for each patient, masks beside the slices."""
    root = folder / "kaggle_3m"
    for patient in ("TCGA_CS_4941_19960909", "TCGA_DU_5849_19950405", "TCGA_HT_7473_19970826"):
        for index in range(1, 4):
            pixels, mask = scene(1300 + index + 10 * ord(patient[6]))
            _save(root / patient / f"{patient}_{index}.tif", _colour(pixels))
            _save(root / patient / f"{patient}_{index}_mask.tif", 255 * mask)
    (root / "data.csv").write_text("Patient,age\n")
    return root


def kits19(folder: Path) -> Path:
    """KiTS19: a folder for each case, with the same two names."""
    root = folder / "kits19" / "data"
    for index in range(4):
        pixels, mask = volume(60 + index)
        _save_nifti(root / f"case_{index:05}" / "imaging.nii.gz", _hounsfield(pixels))
        _save_nifti(root / f"case_{index:05}" / "segmentation.nii.gz", mask * (1 + index % 2))
    (root / "kits.json").write_text("[]")
    return root.parent


def chase_db1(folder: Path) -> Path:
    """CHASE_DB1: masks of two observers beside the photographs of both eyes."""
    root = folder / "CHASEDB1"
    for number in range(1, 5):
        for side in "LR":
            pixels, mask = scene(1400 + number + ord(side))
            name = f"Image_{number:02}{side}"
            _save(root / f"{name}.jpg", _colour(pixels), quality=95)
            _save(root / f"{name}_1stHO.png", 255 * mask)
            _save(root / f"{name}_2ndHO.png", 255 * np.roll(mask, 1))
    return root


def glas(folder: Path) -> Path:
    """GlaS: numbered glands beside the images, in files named _anno."""
    root = folder / "Warwick QU Dataset (Released 2016_07_08)"
    for part, count in (("train", 5), ("testA", 3), ("testB", 2)):
        for index in range(1, count + 1):
            pixels, mask = scene(2500 + index + 10 * ord(part[-1]))
            _save(root / f"{part}_{index}.bmp", _colour(pixels))
            _save(root / f"{part}_{index}_anno.bmp", mask + np.roll(mask, 13, 1) * (mask == 0) * 2)
    (root / "Grade.csv").write_text("name\n")
    return root


def montgomery(folder: Path) -> Path:
    """Montgomery County chest X-rays: the left and the right lung in a folder each."""
    root = folder / "MontgomerySet"
    for index in range(1, 9):
        pixels, mask = scene(1600 + index)
        name = f"MCUCXR_{index:04}_0.png"
        _save(root / "CXR_png" / name, pixels)
        _save(root / "ManualMask/leftMask" / name, 255 * mask)
        _save(root / "ManualMask/rightMask" / name, 255 * np.roll(mask, 13, 1))
    return root


def bids_lesions(folder: Path) -> Path:
    """BIDS: volumes of subjects, and lesion masks among the derivatives."""
    root = folder / "ds004199"
    for index in range(1, 5):
        pixels, mask = volume(70 + index)
        stem = f"sub-{index:05}"
        _save_nifti(root / stem / "anat" / f"{stem}_T1w.nii.gz", _hounsfield(pixels))
        place = root / "derivatives/manual" / stem / "anat"
        _save_nifti(place / f"{stem}_label-lesion_mask.nii.gz", mask)
    (root / "dataset_description.json").write_text("{}")
    return root


def ph2(folder: Path) -> Path:
    """PH2: a folder for each lesion, which holds folders of the image, the mask and colours."""
    root = folder / "PH2Dataset"
    for index in range(3, 11):
        pixels, mask = scene(1700 + index)
        name = f"IMD{index:03}"
        place = root / "PH2 Dataset images" / name
        _save(place / f"{name}_Dermoscopic_Image" / f"{name}.bmp", _colour(pixels))
        _save(place / f"{name}_lesion" / f"{name}_lesion.bmp", 255 * mask)
        _save(place / f"{name}_roi" / f"{name}_R1_Label3.bmp", 255 * np.roll(mask, 5, 1))
    (root / "PH2_dataset.txt").write_text("|| Name |\n")
    return root


def ham10000(folder: Path) -> Path:
    """HAM10000: dermoscopic images in two folders, and the masks of both in one."""
    root = folder / "HAM10000"
    for index in range(24306, 24316):
        pixels, mask = scene(1800 + index)
        name = f"ISIC_{index:07}"
        _save(root / f"HAM10000_images_part_{1 + index % 2}" / f"{name}.jpg", _colour(pixels))
        place = root / "HAM10000_segmentations_lesion_tesselated"
        _save(place / f"{name}_segmentation.png", 255 * mask)
    (root / "HAM10000_metadata.csv").write_text("lesion_id,image_id,dx\n")
    return root


def acdc(folder: Path) -> Path:
    """ACDC: a folder for each patient, with two frames that have masks and all frames without."""
    root = folder / "ACDC" / "database"
    for number in (*range(1, 6), 101, 102):
        name = f"patient{number:03}"
        place = root / ("training" if number < 100 else "testing") / name
        for frame in (1, 12):
            pixels, mask = volume(80 + number + frame)
            _save_nifti(place / f"{name}_frame{frame:02}.nii.gz", pixels.astype(np.int16))
            _save_nifti(place / f"{name}_frame{frame:02}_gt.nii.gz", 3 * mask)
        _save_nifti(place / f"{name}_4d.nii.gz", np.stack([pixels] * 3, 3).astype(np.int16))
        (place / "Info.cfg").write_text("ED: 1\nES: 12\n")
    return root


PUBLIC: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    **{copy.__name__: (copy, ()) for copy in (kvasir, cvc_clinicdb, isic2018, busi, drive)},
    "decathlon": (decathlon, ()),
    "dsb2018": (dsb2018, ()),
    "kaggle_3m": (kaggle_3m, ()),
    "kits19": (kits19, ("data.foreground=nonzero",)),
    "chase_db1": (chase_db1, ()),
    "glas": (glas, ("data.foreground=nonzero",)),
    **{copy.__name__: (copy, ()) for copy in (montgomery, bids_lesions, ph2, ham10000)},
    "acdc": (acdc, ("data.foreground=3",)),
}
"""Copies of public sets by name, and the settings they need, which the error message names."""


def planted_faults(folder: Path) -> Path:
    """Write 16 pairs with ten faults of different kinds: FAULTY_FILES."""
    root = folder / "faults"
    for index in range(16):
        _pair(root, f"case_{index:02}", 1100 + index)
    images, masks = root / "images", root / "masks"
    (masks / "case_01.png").unlink()
    (images / "case_02.png").unlink()
    _save(masks / "case_03.png", 255 * scene(1, (SIZE[0], SIZE[1] - 8))[1])
    _save(masks / "case_04.png", _colour(scene(2)[0]))
    _save(masks / "case_05.png", scene(3)[1] * 7 + np.eye(*SIZE, dtype=np.uint8) * 130)
    _truncate(images / "case_06.png")
    (images / "case_07.png").write_text("this is no image\n")
    _truncate(masks / "case_08.png")
    (images / "case_09.png").write_bytes(b"")
    (masks / "case_10.png").unlink()
    pages = np.stack([255 * scene(1110)[1]] * 3)
    tifffile.imwrite(masks / "case_10.tif", pages, photometric="minisblack")
    return root


def _clinic(root: Path, suffix: str) -> None:
    for index in range(1, 11):
        pixels, mask = scene(50 + index)
        _save(root / "Original" / f"{index}{suffix}", _colour(pixels))
        _save(root / "Ground Truth" / f"{index}{suffix}", 255 * mask)


def _pair(root: Path, name: str, seed: int) -> None:
    pixels, mask = scene(seed)
    _save(root / "images" / f"{name}.png", pixels)
    _save(root / "masks" / f"{name}.png", 255 * mask)


def _colour(pixels: Pixels) -> Pixels:
    return np.stack([pixels, pixels // 2 + 20, pixels // 3 + 10], -1).astype(np.uint8)


def _hounsfield(pixels: Pixels) -> NDArray[np.int16]:
    return (pixels.astype(np.int16) - 100) * 4


def _save(path: Path, pixels: Pixels, quality: int = 90) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=quality)


def _save_nifti(
    path: Path, stack: NDArray[np.generic], affine: NDArray[np.float64] | None = None
) -> None:
    """Write (slice, row, column[, channel]) as NIfTI's (column, row, slice[, channel])."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([SPACING, SPACING, THICKNESS, 1]) if affine is None else affine
    nibabel.save(nibabel.Nifti1Image(np.swapaxes(stack, 0, 2), affine), path)


def _save_series(
    folder: Path, stack: NDArray[np.int16], patient: str, *, intercept: int = -1024
) -> None:
    series = generate_uid()
    for index, pixels in enumerate(stack):
        path = folder / f"IM-0001-{len(stack) - index:04}.dcm"
        _save_dicom(path, pixels, patient, index, series, intercept)


def _save_dicom(
    path: Path,
    pixels: NDArray[np.int16],
    patient: str,
    index: int,
    series: str,
    intercept: int = -1024,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(path, {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    data.Modality, data.PatientID, data.PatientName = "CT", patient, patient
    data.StudyInstanceUID, data.SeriesInstanceUID = series, series
    data.FrameOfReferenceUID = series
    data.StudyDate, data.StudyTime, data.SeriesNumber = "20200101", "120000", 1
    data.InstanceNumber = index + 1
    data.ImagePositionPatient = [0, 0, THICKNESS * index]
    data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    data.PixelSpacing, data.SliceThickness = [SPACING, SPACING], THICKNESS
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
    data.RescaleSlope, data.RescaleIntercept = 1, intercept
    data.PixelData = (pixels - intercept).astype("<i2").tobytes()
    pydicom.dcmwrite(path, data, enforce_file_format=True)


def _truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 5])
