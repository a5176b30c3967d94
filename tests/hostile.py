"""Damaged and hostile files for the readers, and a harness: python -m tests.hostile [count] [seed].

Each file is read by read_image_stack and by read_label_stack with to_masks in a child process
of its own. A fault is any error other than a one-line PolysegError that names the file,
any printed text, more than 5 s of processor time, a hang, or more memory than 200 MB
plus three times the pixels that were read.
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
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from polyseg.data.formats.readers import read_image_stack, read_label_stack
from polyseg.data.masks import to_masks
from polyseg.errors import PolysegError
from polyseg.runs.record_files import _seal_of

from .children import faults_in_child, faults_of_reading

Random = random.Random


# Valid files, which are damaged afterwards.


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
            "WEBP": ["L", "RGB", "RGBA"],
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
    odd = kind in (np.int16, np.float32) or (shape[-1] == 3 and pixels.dtype != np.uint8)
    if "imagej" in style and (compression or options.get("tile") or odd):
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


def nrrd(generator: Random, body: bytes | None = None, **changes: str) -> bytes:
    """Return an NRRD volume; `changes` are header fields, `body` the bytes after the header."""
    kind = generator.choice(["uint8", "int16", "float"])
    shape = generator.choice([(4, 16, 20), (16, 20), (4, 16, 20, 3)])
    values = texture(generator, shape).astype({"float": "<f4"}.get(kind, kind)).tobytes()
    encoding = generator.choice(["raw", "gzip"])
    axes = "(0.7,0,0) (0,0.8,0) (0,0,3)"
    fields = {"type": kind, "dimension": str(len(shape)), "encoding": encoding, "endian": "little"}
    fields["sizes"] = " ".join(map(str, reversed(shape)))
    if len(shape) == 4:
        fields["kinds"] = "RGB-color domain domain domain"
        axes = f"none {axes}"
    if len(shape) > 2:
        fields |= {"space": "left-posterior-superior", "space directions": axes}
    header = "".join(f"{key}: {value}\n" for key, value in (fields | changes).items())
    packed = gzip.compress(values, mtime=0) if encoding == "gzip" else values
    return b"NRRD0004\n" + header.encode() + b"\n" + (packed if body is None else body)


def meta_image(generator: Random, body: bytes | None = None, **changes: str) -> bytes:
    """Return a MetaImage volume; `changes` are header fields, `body` the bytes after the header."""
    kind, name = generator.choice([("u1", "UCHAR"), ("<i2", "SHORT"), ("<f4", "FLOAT")])
    shape = generator.choice([(4, 16, 20), (16, 20)])
    values = texture(generator, shape).astype(kind).tobytes()
    packed = generator.random() < 0.5
    fields = {
        "ObjectType": "Image",
        "NDims": str(len(shape)),
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": str(packed),
        "Offset": " ".join("0" * len(shape)),
        "ElementSpacing": " ".join(["0.7", "0.8", "3"][: len(shape)]),
        "DimSize": " ".join(map(str, reversed(shape))),
        "ElementType": f"MET_{name}",
    }
    if body is None:
        body = zlib.compress(values) if packed else values
    fields |= {"CompressedDataSize": str(len(body))} if packed or len(body) > 10**6 else {}
    header = fields | changes | {"ElementDataFile": changes.get("ElementDataFile", "LOCAL")}
    text = "".join(f"{key} = {value}\n" for key, value in header.items())
    return text.encode() + body


SOUND: dict[str, Callable[[Random], bytes]] = {
    ".png": lambda generator: picture(generator, "PNG"),
    ".jpg": lambda generator: picture(generator, "JPEG"),
    ".bmp": lambda generator: picture(generator, "BMP"),
    ".gif": lambda generator: picture(generator, "GIF"),
    ".tif": tiff,
    ".nii": nifti,
    ".nii.gz": lambda generator: gzip.compress(nifti(generator), mtime=0),
    ".dcm": dicom,
    ".webp": lambda generator: picture(generator, "WEBP"),
    ".nrrd": nrrd,
    ".mha": meta_image,
}


# Damage.


def cut(generator: Random, content: bytes) -> bytes:
    return content[: generator.randrange(len(content))]


def flipped(generator: Random, content: bytes) -> bytes:
    changed = bytearray(content)
    # Mostly in the header, where damage has the largest effect.
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


# Files built byte by byte.


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
    """Return a TIFF with one directory of tags (type, count, value) at byte 8, and then a body."""
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
    """Return pages of 8192 x 8192 that all share one strip."""
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
    """Return directories that form a cycle after the first few."""
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
    """Return a directory that lists itself as its sub-image many times, or has a very long tag."""
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
    """Return OME-XML that names other files, declares a huge image, or expands."""
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
    """Return gigabytes of compressed zeros after a header of a small or a large volume."""
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


LYING_SIZES = ("0 0 0", "-5 20 4", "32767 32767 32767", "1024 1024 500", "99999999999 4 4", "nan")
PLACES = ("/dev/zero", "/etc/passwd", "../x.raw", "LIST", "%d.raw 0 9 1", "sound.nii", "sound.png")
"""Data files that headers name; `warm_up` writes the last two."""


def nrrd_lies(generator: Random) -> bytes:
    lies = {
        "sizes": generator.choice(LYING_SIZES),
        "dimension": generator.choice(["3", "16", "-1"]),
    }
    return nrrd(generator, **dict(generator.sample(list(lies.items()), generator.choice([1, 2]))))


def nrrd_bomb(generator: Random) -> bytes:
    """Return gigabytes of compressed zeros after a header of as many voxels, or of few."""
    sizes = generator.choice(["1000 1000 1000", "512 512 400", "16 20 4"])
    body = gzip.compress(zeros(1000 * 2**20), mtime=0)
    lies = {"sizes": sizes, "dimension": "3", "type": "uint8", "encoding": "gzip"}
    return nrrd(generator, body, **lies)


def nrrd_elsewhere(generator: Random) -> bytes:
    return nrrd(generator, b"", **{"data file": generator.choice(PLACES)})


def meta_image_lies(generator: Random) -> bytes:
    lies = {
        "DimSize": generator.choice(LYING_SIZES),
        "NDims": generator.choice(["0", "10", "99999"]),
        "ElementNumberOfChannels": generator.choice(["0", "-1", "100000"]),
        "HeaderSize": generator.choice(["-1", "99999999"]),
        "CompressedDataSize": generator.choice(["-1", "0", "9999999999999"]),
        "TransformMatrix": "nan 0 0 0 inf 0 0 0 0",
    }
    return meta_image(generator, **dict(generator.sample(list(lies.items()), 2)))


def meta_image_bomb(generator: Random) -> bytes:
    sizes = generator.choice(["1000 1000 1000", "512 512 400", "16 20 4"])
    lies = {"DimSize": sizes, "NDims": "3", "ElementType": "MET_UCHAR", "CompressedData": "True"}
    return meta_image(generator, zeros(1000 * 2**20), **lies)


def meta_image_elsewhere(generator: Random) -> bytes:
    return meta_image(generator, b"", ElementDataFile=generator.choice(PLACES))


def webp_of(width: int, height: int, frames: int = 1) -> bytes:
    """Return an image of one colour, or an animation, of few bytes."""
    stream = io.BytesIO()
    images = [Image.new("RGB", (width, height), (k, 0, 9)) for k in range(frames)]
    more = {"save_all": True, "append_images": images[1:]} if frames > 1 else {}
    images[0].save(stream, "WEBP", lossless=True, **more)
    return stream.getvalue()


def webp_lies(generator: Random) -> bytes:
    """Return a canvas with sides of up to 2^24 pixels around a small image."""
    inner = webp_of(20, 16)[12:]
    side = generator.choice([2**24 - 1, 16383, 8192, 0])
    canvas = struct.pack("<I", side)[:3] * 2
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas + inner
    return b"RIFF" + struct.pack("<I", len(body)) + body


def dicom_nested(generator: Random) -> bytes:
    """Return nested sequences of undefined or of stated length."""
    depth = generator.choice([50, 2000, 20000])
    start = dicom(generator)[:132]
    syntax = b"1.2.840.10008.1.2.1\0"
    meta = struct.pack("<HH2sH", 2, 16, b"UI", len(syntax)) + syntax
    meta = struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(meta)) + meta
    item = struct.pack("<HH2sHI", 8, 0x1140, b"SQ", 0, 0xFFFFFFFF)
    item += struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    return start + meta + item * depth


def dicom_of_frame(generator: Random, frame: bytes, syntax: str) -> bytes:
    """Return a DICOM file of one compressed frame in the named transfer syntax."""
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
    """Return a frame of 16 x 16 that holds a JPEG of 12000 x 12000."""
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
    """Return run-length rows of the allowed width and wider, with jumps over many rows."""
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
    """Return a large mask of noise, the slowest case for the search for soft edges."""
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
    "nrrd_lies": (".nrrd", nrrd_lies),
    "nrrd_bomb": (".nrrd", nrrd_bomb),
    "nrrd_elsewhere": (".nhdr", nrrd_elsewhere),
    "meta_image_lies": (".mha", meta_image_lies),
    "meta_image_bomb": (".mha", meta_image_bomb),
    "meta_image_elsewhere": (".mhd", meta_image_elsewhere),
    "webp_huge": (".webp", lambda _: webp_of(8193, 8193)),
    "webp_film": (".webp", lambda _: webp_of(64, 48, frames=200)),
    "webp_lies": (".webp", webp_lies),
}


def special(generator: Random, path: Path) -> None:
    """Create a path that is not a regular file."""
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
    """Write `count` files, equal for equal seeds, and yield the path of each."""
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
    """Read a file in a child process and return the faults found."""
    return faults_in_child(
        lambda: faults_of_reading(path, _read_image) + faults_of_reading(path, _read_masks)
    )


def _read_image(path: Path) -> NDArray[Any]:
    return read_image_stack(path).pixels


def _read_masks(path: Path) -> NDArray[Any]:
    # A valid volume is not always a valid mask.
    labels = read_label_stack(path).pixels
    to_masks(labels, path, None)
    return labels


def warm_up(folder: Path) -> None:
    """Import the modules that readers import on demand, so that no file is charged for them."""
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


def seal(path):
    """Write the sha256 of a changed HDF5 file into its user block."""
    with path.open("r+b") as stream:
        block = _seal_of(stream)
        stream.seek(0)
        stream.write(block)
