"""Pickles that would run code in place of a checkpoint: refused in one line, never unpickled."""

import contextlib
import gzip
import importlib
import io
import itertools
import os
import pickle
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.children import answer_of, faults_in_child, refusal_of
from tests.stress.checkpoints import Sound


class Malice:
    """An object that creates a folder, the canary, when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def check(count: int, _: int = 0) -> list[str]:
    """Run `count` pairs of a pickle and a command; return the failures."""
    failures: list[str] = []
    for job in ("evaluate", "estimate_uncertainty", "predict", "train"):
        importlib.import_module(f"polyseg.commands.{job}")  # Import once, not in every child.
    pairs = list(itertools.product(PICKLES.items(), COMMANDS))[:count]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "images").mkdir()
        Image.fromarray(np.zeros((32, 32), np.uint8)).save(folder / "images" / "a.png")
        canary = folder / "canary"
        for (name, (make, load)), command in pairs:
            path = folder / name
            path.write_bytes(make(Malice(canary), folder))
            faults = _not_harmed(load, path, canary)
            faults += faults_in_child(lambda path=path, command=command: _faults(command, path))
            if canary.exists():
                faults.append("the canary was made")
                canary.rmdir()
            failures += [f"pickles, {name}, {command.__name__}: {fault}" for fault in faults]
    print(f"pickles: {len(pairs)} pairs of a file and a command, {len(failures)} failures")
    return failures


def _not_harmed(load: Callable[[Path], Any], path: Path, canary: Path) -> list[str]:
    """Return a fault if a reader that trusts the file does not create the canary."""
    with contextlib.suppress(Exception):  # Errors after unpickling do not matter.
        load(path)
    if not canary.exists():
        return ["harms no one who trusts it"]
    canary.rmdir()
    return []


def _faults(command: Callable[[Path], list[object]], path: Path) -> list[str]:
    arguments = command(path)
    said = str(refusal_of(answer_of(*arguments)))
    named = any(str(one) in said for one in (path, path.parent / "run"))
    return [] if named and "\n" not in said else [f"says {said!r}"]


# Pickles, each with the reader that would run it.


def raw(malice: Malice, _: Path) -> bytes:
    return pickle.dumps(malice)


def torch_zip(malice: Malice, _: Path) -> bytes:
    stream = io.BytesIO()
    torch.save({"state_dict": malice}, stream)
    return stream.getvalue()


def torch_tar(malice: Malice, _: Path) -> bytes:
    """Return the format of torch's first versions, which torch still reads."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            content = pickle.dumps(malice)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def numpy_objects(malice: Malice, _: Path) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([malice], dtype=object), allow_pickle=True)
    return stream.getvalue()


def packed(malice: Malice, _: Path) -> bytes:
    return gzip.compress(pickle.dumps(malice), mtime=0)


def polyglot(malice: Malice, folder: Path) -> bytes:
    """Return a valid checkpoint that is also a torch archive, which is read from its end."""
    return Sound(folder / "sound.safetensors").content + torch_zip(malice, folder)


def _unpickled(path: Path) -> Any:
    return pickle.loads(path.read_bytes())


def _trusted(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def _from_archive(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        return pickle.loads(archive.read(name))


PICKLES: dict[str, tuple[Callable[[Malice, Path], bytes], Callable[[Path], Any]]] = {
    "raw.safetensors": (raw, _unpickled),
    "zip.pt": (torch_zip, _trusted),
    "tar.pth": (torch_tar, _trusted),
    "objects.npy": (numpy_objects, lambda path: np.load(path, allow_pickle=True)),
    "packed.pkl.gz": (packed, lambda path: pickle.loads(gzip.decompress(path.read_bytes()))),
    "polyglot.safetensors": (polyglot, _from_archive),
}


# Commands.


def evaluate(path: Path) -> list[object]:
    return ["evaluate", path, "--data", path.parent / "images", "--trust"]


def estimate_uncertainty(path: Path) -> list[object]:
    return ["estimate-uncertainty", path, "--data", path.parent / "images", "--trust"]


def predict(path: Path) -> list[object]:
    out = path.parent / "predictions"
    return ["predict", path, path.parent / "images", "--out", out, "--trust"]


def resume(path: Path) -> list[object]:
    """Continue a run whose last checkpoint is the pickle."""
    run = path.parent / "run"
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "checkpoints" / "last.safetensors").write_bytes(path.read_bytes())
    return ["train", "--resume", "--out", run]


def replay(path: Path) -> list[object]:
    return ["train", "--dry-run", "--set", f'control.replay="{path}"']


COMMANDS = (evaluate, estimate_uncertainty, predict, resume, replay)
