"""Damaged and hostile files for the readers, and a harness: python -m tests.hostile [count] [seed].

Each file goes to read_image_stack and to read_label_stack with to_masks, in a child process of
its own. It fails where anything but a PolysegError of one line that names the file comes out,
where something is printed, where it takes over 5 s of a processor or never ends, or over 200 MB
of memory.
"""

import contextlib
import functools
import gzip
import io
import os
import random
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from polyseg.data.formats.readers import read_image_stack, read_label_stack
from polyseg.data.masks import to_masks
from polyseg.errors import PolysegError

from .children import faults_in_child, faults_of_reading

Random = random.Random


# Sound files, which are damaged afterwards.


def blob(generator: Random, shape=(48, 64)):
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    center = generator.uniform(10, 30), generator.uniform(10, 40)
    return (np.hypot(rows - center[0], columns - center[1]) < generator.uniform(4, 12)) * 255


def texture(generator: Random, shape=(48, 64)):
    return np.random.default_rng(generator.getrandbits(32)).integers(0, 256, shape, np.uint8)


def picture(generator: Random, kind: str) -> bytes:
    stream = io.BytesIO()
    pixels = generator.choice([blob, texture])(generator).astype(np.uint8)
    mode = generator.choice(
        {
            "PNG": ["L", "1", "P", "RGB", "RGBA", "LA", "I;16"],
            "JPEG": ["L", "RGB", "CMYK"],
            "BMP": ["L", "1", "P", "RGB"],
            "GIF": ["L", "P"],
        }[kind]
    )
    if mode == "I;16":
        image = Image.fromarray(pixels.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(pixels).convert(mode)
    options = {}
    if kind == "JPEG":
        options["progressive"] = generator.random() < 0.3
        exif = Image.Exif()
        exif[0x0112] = generator.randint(1, 8)
        options["exif"] = exif
    image.save(stream, kind, **options)
    return stream.getvalue()


def tiff(generator: Random) -> bytes:
    stream = io.BytesIO()
    shape = generator.choice([(48, 64), (4, 48, 64), (48, 64, 3), (2, 48, 64, 3)])
    kind = generator.choice([np.uint8, np.uint16, np.int16, np.float32])
    pixels = texture(generator, shape).astype(kind)
    compression = generator.choice([None, "zlib", "lzw", "packbits", "zstd", "jpeg"])
    if compression == "jpeg":
        pixels = pixels.astype(np.uint8)
    options = {"compression": compression}
    if generator.random() < 0.4:
        options["tile"] = (16, 16)
    elif generator.random() < 0.5:
        options["rowsperstrip"] = 8
    if compression in ("zlib", "lzw", "zstd") and generator.random() < 0.5:
        options["predictor"] = True
    style = generator.choice([{}, {}, {"bigtiff": True}, {"imagej": True}, {"ome": True}])
    if "imagej" in style and (compression or options.get("tile") or kind in (np.int16, np.float32)):
        style = {}
    photometric = "rgb" if shape[-1] == 3 else "minisblack"
    tifffile.imwrite(stream, pixels, photometric=photometric, **options, **style)
    return stream.getvalue()


def nifti(generator: Random) -> bytes:
    import nibabel

    shape = generator.choice([(16, 20, 6), (16, 20), (16, 20, 6, 2), (16, 20, 1)])
    kind = generator.choice([np.uint8, np.int16, np.int32, np.float32, np.float64])
    affine = np.diag([*generator.sample([1.0, -0.7, 3.0], 3), 1.0])[
        generator.choice([[0, 1, 2, 3], [2, 0, 1, 3]])
    ]
    image = generator.choice([nibabel.Nifti1Image, nibabel.Nifti2Image])(
        texture(generator, shape).astype(kind), affine
    )
    if generator.random() < 0.3:
        image.header.set_slope_inter(0.5, -3)
    return image.to_bytes()


def dicom(generator: Random, **changes) -> bytes:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, RLELossless, generate_uid

    frames = generator.choice([1, 1, 3])
    bits = generator.choice([8, 16])
    pixels = texture(generator, (frames, 24, 32)).astype(f"u{bits // 8}")
    dataset = Dataset()
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    dataset.SOPInstanceUID = generate_uid(entropy_srcs=[str(generator.random())])
    dataset.Rows, dataset.Columns = 24, 32
    dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, 0
    dataset.PhotometricInterpretation = generator.choice(["MONOCHROME1", "MONOCHROME2"])
    dataset.BitsAllocated = dataset.BitsStored = bits
    dataset.HighBit = bits - 1
    dataset.PixelSpacing = [0.5, 0.7]
    dataset.RescaleSlope, dataset.RescaleIntercept = 2, -1024
    if frames > 1:
        dataset.NumberOfFrames = frames
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.PixelData = pixels.tobytes()
    dataset["PixelData"].VR = "OW"
    if generator.random() < 0.3:
        dataset.compress(
            RLELossless, pixels if frames > 1 else pixels[0], generate_instance_uid=False
        )
    for name, value in changes.items():
        setattr(dataset, name, value)
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


SOUND: dict[str, Callable[[Random], bytes]] = {
    ".png": lambda generator: picture(generator, "PNG"),
    ".jpg": lambda generator: picture(generator, "JPEG"),
    ".bmp": lambda generator: picture(generator, "BMP"),
    ".gif": lambda generator: picture(generator, "GIF"),
    ".tif": tiff,
    ".nii": nifti,
    ".nii.gz": lambda generator: gzip.compress(nifti(generator), mtime=0),
    ".dcm": dicom,
}


# Damage.


def cut(generator: Random, content: bytes) -> bytes:
    return content[: generator.randrange(len(content))]


def flipped(generator: Random, content: bytes) -> bytes:
    changed = bytearray(content)
    # Most of the headers, where damage does most.
    most = generator.choice([64, 512, len(content)])
    for _ in range(generator.randint(1, 12)):
        changed[generator.randrange(min(most, len(content)))] = generator.getrandbits(8)
    return bytes(changed)


def zeroed(generator: Random, content: bytes) -> bytes:
    start = generator.randrange(len(content))
    length = min(generator.randint(1, 400), len(content) - start)
    return content[:start] + bytes(length) + content[start + length :]


def doubled(generator: Random, content: bytes) -> bytes:
    start = generator.randrange(len(content))
    return content[:start] + content[start // 2 :]


def extreme(generator: Random, content: bytes) -> bytes:
    """Put a huge, zero or negative number somewhere near the start."""
    number = generator.choice([0, 2**31 - 1, 2**31, 2**32 - 1, 65535, 32767, 2**16])
    order = generator.choice(["<I", ">I"])
    at = generator.randrange(min(400, max(1, len(content) - 4)))
    return content[:at] + struct.pack(order, number) + content[at + 4 :]


DAMAGE = (cut, flipped, flipped, zeroed, doubled, extreme)


# Made by hand.


def png_of(width: int, height: int, content: bytes, depth: int = 8, colours: int = 0) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", content)
        + chunk(b"IEND", b"")
    )


@functools.lru_cache
def zeros(count: int) -> bytes:
    packer = zlib.compressobj(9)
    parts = [packer.compress(bytes(2**20)) for _ in range(count // 2**20)]
    return b"".join([*parts, packer.compress(bytes(count % 2**20)), packer.flush()])


def tiff_of(tags: dict[int, tuple[int, int, int]], body: bytes = b"", following: int = 0) -> bytes:
    """Make one directory at byte 8 of tags (type, count, value), and then a body."""
    table = b"".join(struct.pack("<HHII", code, *tag) for code, tag in sorted(tags.items()))
    directory = struct.pack("<H", len(tags)) + table + struct.pack("<I", following)
    return b"II*\0" + struct.pack("<I", 8) + directory + body


def plain_tags(**changes: int) -> dict[int, tuple[int, int, int]]:
    sides = {
        "width": 32,
        "height": 32,
        "compression": 1,
        "length": 1024,
        "photometric": 1,
    } | changes
    return {
        256: (4, 1, sides["width"]),
        257: (4, 1, sides["height"]),
        258: (3, 1, 8),
        259: (3, 1, sides["compression"]),
        262: (3, 1, sides["photometric"]),
        273: (4, 1, 8 + 2 + 12 * 10 + 4),
        277: (3, 1, 1),
        278: (4, 1, sides["height"]),
        279: (4, 1, sides["length"]),
        339: (3, 1, 1),
    }


def tiff_bomb(generator: Random) -> bytes:
    packed = zeros(2**30)
    return tiff_of(plain_tags(compression=8, length=len(packed)), packed)


def tiff_many_pages(generator: Random) -> bytes:
    """Pages of 8192 x 8192 that all share one strip."""
    packed = zeros(2**26)
    pages = generator.choice([3, 30, 500])
    start = 8 + len(packed)
    size = 2 + 12 * 10 + 4
    parts = []
    for k in range(pages):
        tags = plain_tags(width=8192, height=8192, compression=8, length=len(packed))
        tags[273] = (4, 1, 8)
        following = start + (k + 1) * size if k + 1 < pages else 0
        table = b"".join(struct.pack("<HHII", code, *tag) for code, tag in sorted(tags.items()))
        parts.append(struct.pack("<H", 10) + table + struct.pack("<I", following))
    return b"II*\0" + struct.pack("<I", start) + packed + b"".join(parts)


def tiff_circle(generator: Random) -> bytes:
    """Directories that follow each other in a circle, which begins late."""
    pages, back = generator.choice([(1, 0), (5, 2), (150, 120), (3000, 2000)])
    size = 2 + 12 * 10 + 4
    parts = []
    for k in range(pages):
        tags = plain_tags()
        tags[273] = (4, 1, 8)
        following = 1032 + size * (k + 1 if k + 1 < pages else back)
        table = b"".join(struct.pack("<HHII", code, *tag) for code, tag in sorted(tags.items()))
        parts.append(struct.pack("<H", 10) + table + struct.pack("<I", following))
    return b"II*\0" + struct.pack("<I", 1032) + bytes(1024) + b"".join(parts)


def tiff_deep(generator: Random) -> bytes:
    """A directory that says to be its own sub-image many times, or a very long tag."""
    tags = plain_tags()
    if generator.random() < 0.5:
        tags[330] = (4, 2**20, 8)
    else:
        tags[270] = (2, 2**31 - 1, 8)
    return tiff_of(tags, bytes(2**22))


def tiff_jpeg_bomb(generator: Random) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (12000, 12000)).save(stream, "JPEG")
    content = stream.getvalue()
    return tiff_of(plain_tags(compression=7, length=len(content)), content)


def tiff_ome(generator: Random) -> bytes:
    """OME-XML that asks for other files, for much memory, or expands."""
    pixels = (
        'DimensionOrder="XYCZT" SizeX="32" SizeY="32" SizeC="{}" SizeZ="{}" SizeT="1" Type="uint8"'
    )
    text = (
        generator.choice(
            [
                f"<OME><Image><Pixels {pixels.format(10**9, 10**9)}><TiffData/>"
                "</Pixels></Image></OME>",
                f'<OME><Image><Pixels {pixels.format(1, 2)}><TiffData IFD="0">'
                '<UUID FileName="/etc/passwd">a</UUID></TiffData></Pixels></Image></OME>',
                '<!DOCTYPE a [<!ENTITY b "bbbbbbbbbb"><!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;">'
                '<!ENTITY d "&c;&c;&c;&c;&c;&c;&c;&c;">]><OME>&d;</OME>',
            ]
        ).encode()
        + b"\0"
    )
    tags = plain_tags() | {270: (2, len(text), 8 + 2 + 12 * 11 + 4)}
    tags[273] = (4, 1, 8 + 2 + 12 * 11 + 4 + len(text))
    return tiff_of(tags, text + bytes(1024))


def nifti_lies(generator: Random) -> bytes:
    content = bytearray(nifti(generator).ljust(2000, b"\0"))
    while struct.unpack_from("<I", content)[0] != 348:
        content = bytearray(nifti(generator).ljust(2000, b"\0"))
    dims = generator.choice(
        [
            (3, 32767, 32767, 32767, 1, 1, 1, 1),
            (3, 0, 20, 5, 1, 1, 1, 1),
            (3, -5, 20, 5, 1, 1, 1, 1),
            (3, 1024, 1024, 400, 1, 1, 1, 1),
            (7, 16, 20, 6, 9, 9, 9, 9),
            (3, 16, 20, 6, 1, 1, 1, 1),
            (4, 16, 16, 1, 32767, 1, 1, 1),
        ]
    )
    struct.pack_into("<8h", content, 40, *dims)
    for at in generator.sample([280, 284, 296, 312, 108, 112, 116], 2):
        struct.pack_into("<f", content, at, generator.choice([float("nan"), float("inf"), 0, 1e30]))
    return bytes(content)


def nifti_bomb(generator: Random) -> bytes:
    """Zeros by the gigabyte behind a header of little, or of much."""
    header = bytearray(nifti(generator)[:352])
    while struct.unpack_from("<I", header)[0] != 348:
        header = bytearray(nifti(generator)[:352])
    shape = generator.choice([(16, 16, 16), (512, 512, 400), (32767, 100, 100), (1024, 1024, 510)])
    struct.pack_into("<8h", header, 40, 3, *shape, 1, 1, 1, 1)
    struct.pack_into("<hh", header, 70, 2, 8)
    struct.pack_into("<f", header, 108, 352)
    if generator.random() < 0.3:  # an extension of two gigabytes
        struct.pack_into("<f", header, 108, 2.0**31)
        header[348:352] = b"\1\0\0\0"
    packer = zlib.compressobj(9, wbits=31)
    parts = [packer.compress(bytes(header))]
    parts += [packer.compress(bytes(2**20)) for _ in range(generator.choice([100, 1000]))]
    return b"".join([*parts, packer.flush()])


def dicom_nested(generator: Random) -> bytes:
    """Sequences within sequences, of undefined or of some length."""
    depth = generator.choice([50, 2000, 20000])
    start = dicom(generator)[:132]
    syntax = b"1.2.840.10008.1.2.1\0"
    meta = struct.pack("<HH2sH", 2, 16, b"UI", len(syntax)) + syntax
    meta = struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(meta)) + meta
    item = struct.pack("<HH2sHI", 8, 0x1140, b"SQ", 0, 0xFFFFFFFF)
    item += struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    return start + meta + item * depth


def dicom_of_frame(generator: Random, frame: bytes, syntax: str) -> bytes:
    """Return a DICOM file of one compressed frame, by the name of its transfer syntax."""
    from pydicom import dcmread, uid
    from pydicom.encaps import encapsulate

    dataset = dcmread(io.BytesIO(dicom(generator, BitsAllocated=8, BitsStored=8, HighBit=7)))
    dataset.NumberOfFrames = 1
    dataset.PixelData = encapsulate([frame])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = getattr(uid, syntax)
    result = io.BytesIO()
    dataset.save_as(result, enforce_file_format=True)
    return result.getvalue()


def dicom_jpeg_bomb(generator: Random) -> bytes:
    """A frame of 16 x 16 that holds a JPEG of 12000 x 12000."""
    stream = io.BytesIO()
    Image.new("L", (12000, 12000)).save(stream, "JPEG")
    return dicom_of_frame(generator, stream.getvalue(), "JPEGBaseline8Bit")


def dicom_rle_bomb(generator: Random) -> bytes:
    frame = struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\0" * (2 * 10**6)
    return dicom_of_frame(generator, frame, "RLELossless")


def dicom_deflated(generator: Random) -> bytes:
    start = dicom(generator)[:132]
    syntax = b"1.2.840.10008.1.2.1.99"
    meta = struct.pack("<HH2sH", 2, 16, b"UI", len(syntax)) + syntax
    meta = struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(meta)) + meta
    return start + meta + zeros(2**30)[2:-4]


def bmp_of_runs(generator: Random) -> bytes:
    """A row as wide as allowed and wider, and steps over many rows at once."""
    width = generator.choice([2**26, 2**16, 4000])
    runs = (b"\0\2\xff\xff" if generator.random() < 0.5 else b"\1\0") * 10**6
    header = struct.pack(
        "<IiiHHIIiiII", 40, width, 2**26 // width, 1, 8, 1, len(runs), 0, 0, 256, 0
    )
    start = 14 + 40 + 1024
    return (
        b"BM" + struct.pack("<IHHI", start + len(runs), 0, 0, start) + header + bytes(1024) + runs
    )


def soft_mask(generator: Random) -> bytes:
    """A large mask of noise, which the search for soft edges has to look through."""
    pixels = np.zeros((6000, 6000), np.uint8)
    pixels[::7] = 255
    pixels[::9, ::11] = [[50], [120], [180]] * 222 + [[60]]
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


WRONG_KINDS = {
    "text": b"this is no image\n" * 20,
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n%%EOF\n",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>',
    "pickle": b"\x80\x04cposix\nsystem\n(S'true'\ntR.",
    "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "elf": b"\x7fELF\x02\x01\x01" + bytes(200),
    "zip": b"PK\x03\x04" + bytes(100),
    "empty": b"",
    "zero": bytes(4096),
    "gzip": gzip.compress(b"no volume", mtime=0),
    "magic": bytes(128) + b"DICM",
}

BY_HAND: dict[str, tuple[str, Callable[[Random], bytes]]] = {
    "png_huge": (".png", lambda _: png_of(2**31 - 1, 2**31 - 1, zeros(1000))),
    "png_wide": (".png", lambda _: png_of(2**26, 1, zeros(1000))),
    "png_zeros": (".png", lambda _: png_of(8192, 8192, zeros(8193 * 8192))),
    "png_zeros_rgb": (".png", lambda _: png_of(8192, 8192, zeros(24577 * 8192), 8, 2)),
    "png_zeros_deep": (".png", lambda _: png_of(4096, 4096, zeros(24577 * 4096), 16, 2)),
    "png_bits": (".png", lambda _: png_of(8192, 8192, zeros(1025 * 8192), 1)),
    "png_palette": (".png", lambda _: png_of(8192, 8192, zeros(8193 * 8192), 8, 3)),
    "bmp_runs": (".bmp", bmp_of_runs),
    "soft": (".png", soft_mask),
    "tiff_bomb": (".tif", tiff_bomb),
    "tiff_wide": (".tif", lambda _: tiff_of(plain_tags(width=2**31 - 1), bytes(2000))),
    "tiff_high": (".tif", lambda _: tiff_of(plain_tags(height=2**31 - 1), bytes(2000))),
    "tiff_pages": (".tif", tiff_many_pages),
    "tiff_circle": (".tif", tiff_circle),
    "tiff_deep": (".tif", tiff_deep),
    "tiff_jpeg": (".tif", tiff_jpeg_bomb),
    "tiff_ome": (".tif", tiff_ome),
    "nifti_lies": (".nii", nifti_lies),
    "nifti_bomb": (".nii.gz", nifti_bomb),
    "dicom_huge": (".dcm", lambda g: dicom(g, Rows=65535, Columns=65535, NumberOfFrames=10**6)),
    "dicom_long": (".dcm", lambda g: dicom(g, NumberOfFrames=10**6)),
    "dicom_bits": (".dcm", lambda g: dicom(g, BitsAllocated=g.choice([0, 1, 7, 64, 65528]))),
    "dicom_nested": (".dcm", dicom_nested),
    "dicom_jpeg": (".dcm", dicom_jpeg_bomb),
    "dicom_runs": (".dcm", dicom_rle_bomb),
    "dicom_deflated": (".dcm", dicom_deflated),
}


def special(generator: Random, path: Path) -> None:
    """Make what is no file at all."""
    kind = generator.randrange(4)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to(path.name)
    else:
        path.symlink_to("/dev/zero")


def hostile_files(folder: Path, count: int, seed: int) -> Iterator[Path]:
    """Write so many files, the same for the same seed, and yield each when it is there."""
    generator = Random(seed)
    by_hand = list(BY_HAND.items())
    generator.shuffle(by_hand)
    for k in range(count):
        choice = k % 10
        if choice < 6:
            suffix = generator.choice(list(SOUND))
            damage = generator.choice(DAMAGE)
            path = folder / f"{k:05d}-{damage.__name__}{suffix}"
            path.write_bytes(damage(generator, SOUND[suffix](generator)))
        elif choice < 8:
            name, (suffix, make) = by_hand[(k // 10 * 2 + choice - 6) % len(by_hand)]
            path = folder / f"{k:05d}-{name}{suffix}"
            path.write_bytes(make(generator))
        else:
            suffix = generator.choice(list(SOUND))
            if choice == 8:
                name = generator.choice(list(WRONG_KINDS))
                path = folder / f"{k:05d}-{name}{suffix}"
                path.write_bytes(WRONG_KINDS[name])
            else:
                path = folder / f"{k:05d}-special{suffix}"
                special(generator, path)
        yield path


# The harness.


def faults(path: Path) -> list[str]:
    """Read a file in a child process and return what it did that no file may."""
    return faults_in_child(
        lambda: faults_of_reading(path, _read_image) + faults_of_reading(path, _read_masks)
    )


def _read_image(path: Path) -> None:
    read_image_stack(path)


def _read_masks(path: Path) -> None:
    # A sound volume may still be no mask.
    to_masks(read_label_stack(path).pixels, path, None)


def warm_up(folder: Path) -> None:
    """Import what readers import when they need it, so that no file is blamed for that."""
    generator = Random(0)
    for suffix, make in SOUND.items():
        path = folder / f"sound{suffix}"
        path.write_bytes(make(generator))
        for read in (_read_image, _read_masks):
            with contextlib.suppress(PolysegError):
                read(path)


def main(count: int = 500, seed: int = 0) -> int:
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        warm_up(Path(folder))
        for path in hostile_files(Path(folder), count, seed):
            for fault in faults(path):
                failed += 1
                print(f"{path.name}: {fault}", flush=True)
            if path.is_file() and not path.is_symlink():
                path.unlink()
    print(f"seed {seed}: {count} files, {failed} faults")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:3])))
