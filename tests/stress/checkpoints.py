"""Damaged and forged checkpoints: refused in one line, or read as the network that was written.

Damaged files have changed bytes. Forged files have a changed header or changed tensors with a
valid hash: they may hold any consistent network, but may not crash, run code, or take more time or
memory than their size explains.
"""

import itertools
import json
import random
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from polyseg.config import load_config
from polyseg.errors import PolysegError
from polyseg.runs import checkpoints
from polyseg.runs.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from polyseg.runs.weights import network_of, new_network
from tests.children import faults_in_child, faults_of_reading
from tests.hostile import DAMAGE, Random

Header = dict[str, Any]
Tensors = dict[str, Tensor]

_SETTINGS = (
    "network.kwargs={channels: [4, 8], strides: [2], num_res_units: 1}",
    "data.demo_images=8",
    "data.size=32",
)


def check(count: int, seed: int) -> list[str]:
    """Read `count` checkpoints and build their networks; return the faults of each."""
    generator = random.Random(f"checkpoints {seed}")
    failures: list[str] = []
    torch.set_num_threads(1)  # Threads do not survive a fork.
    with tempfile.TemporaryDirectory() as place:
        sound = Sound(Path(place) / "sound.safetensors")
        path = Path(place) / "bad.safetensors"
        built(Path(place) / "sound.safetensors")  # Imports modules, so no file is charged.
        for k in range(count):
            name, good = _made(generator, sound, path, k)
            faults = faults_in_child(lambda good=good: faults_of_reading(path, built, good))
            failures += [f"checkpoints, seed {seed}, file {k} ({name}): {one}" for one in faults]
            path.unlink()
    print(f"checkpoints: {count} files of seed {seed}, {len(failures)} failures", flush=True)
    return failures


class Sound:
    """A valid checkpoint and its parts."""

    def __init__(self, path: Path) -> None:
        torch.manual_seed(0)
        config = load_config(overrides=list(_SETTINGS))
        weights = new_network(config, 1).state_dict()
        self.checkpoint = Checkpoint(
            config=config,
            channels=1,
            epoch=7,
            weights=weights,
            optimizer={"0/step": torch.tensor(3.0)},
            best_epoch=5,
            best_dice=0.75,
            assessments={"epoch_0005.h5": "0" * 64},
        )
        write_checkpoint(path, self.checkpoint)
        self.content = path.read_bytes()
        length = struct.unpack("<Q", self.content[:8])[0]
        self.table = json.loads(self.content[8 : 8 + length])
        self.data = self.content[8 + length :]

    def same(self, read: tuple[Checkpoint, nn.Module]) -> bool:
        """Return whether a checkpoint and its network equal those that were written."""
        other, network = read
        kept = self.checkpoint
        plain = ("config", "channels", "epoch", "best_epoch", "best_dice", "assessments")
        state = network.state_dict()
        return (
            all(getattr(other, name) == getattr(kept, name) for name in plain)
            and state.keys() == kept.weights.keys()
            and all(torch.equal(state[name], kept.weights[name]) for name in state)
            and other.optimizer.keys() == kept.optimizer.keys()
            and all(torch.equal(other.optimizer[k], kept.optimizer[k]) for k in kept.optimizer)
        )


def built(path: Path) -> tuple[Checkpoint, nn.Module]:
    """Read a checkpoint and build its network, as commands do."""
    checkpoint = read_checkpoint(path)
    try:
        return checkpoint, network_of(checkpoint)
    except PolysegError as error:
        # A network that cannot be built is reported without the path.
        raise PolysegError(f"{path}: {error}") from None


def _made(generator: Random, sound: Sound, path: Path, k: int) -> tuple[str, Callable[[Any], bool]]:
    """Write a file; of every ten, five are damaged, one has a damaged table, four are forged."""
    if k % 10 < 5:
        damage = generator.choice(DAMAGE)
        path.write_bytes(damage(generator, sound.content))
        return damage.__name__, sound.same
    if k % 10 == 5:
        lie = generator.choice(LIES)
        table, data = lie(generator, json.loads(json.dumps(sound.table)), sound.data)
        text = table if isinstance(table, bytes) else json.dumps(table).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)
        return lie.__name__, sound.same
    forge = FORGERIES[(k // 10 * 4 + k % 10) % len(FORGERIES)]
    header, tensors = _parts(sound)
    header, tensors = forge(generator, header, tensors)
    _write(path, header, tensors)
    return forge.__name__, lambda _: True


def _parts(sound: Sound) -> tuple[Header, Tensors]:
    header = json.loads(sound.table["__metadata__"]["polyseg"])
    tensors = {f"weights/{name}": one.clone() for name, one in sound.checkpoint.weights.items()}
    return header, tensors | {"optimizer/0/step": torch.tensor(3.0)}


def _write(path: Path, header: Header | str, tensors: Tensors) -> None:
    """Write a forged file: any header, with its valid hash."""
    text = header if isinstance(header, str) else json.dumps(header)
    stored = {name: checkpoints.stored_of(one) for name, one in tensors.items()}
    metadata = {"polyseg": text, "sha256": checkpoints.digest_of(text, stored)}
    safetensors.torch.save_file(tensors, path, metadata)


# False entries in the table at the start of a safetensors file.

Table = dict[str, Any] | bytes
Lie = Callable[[Random, dict[str, Any], bytes], tuple[Table, bytes]]


def _a_tensor(generator: Random, table: dict[str, Any]) -> dict[str, Any]:
    name = generator.choice([name for name in table if name != "__metadata__"])
    found: dict[str, Any] = table[name]
    return found


def huge_shape(generator: Random, table: dict[str, Any], data: bytes) -> tuple[Table, bytes]:
    shape = generator.choice([[2**40], [2**63], [2**64], [-1], [0], [2**32, 2**32], [1] * 10_000])
    _a_tensor(generator, table)["shape"] = shape
    return table, data


def other_type(generator: Random, table: dict[str, Any], data: bytes) -> tuple[Table, bytes]:
    kinds = ["F64", "I64", "U8", "BOOL", "BF16", "F8_E4M3", "F4", "C64", "none", None, 3]
    _a_tensor(generator, table)["dtype"] = generator.choice(kinds)
    return table, data


def other_place(generator: Random, table: dict[str, Any], data: bytes) -> tuple[Table, bytes]:
    place = generator.choice([[0, 4], [0, 2**60], [2**63, 2**63 + 4], [8, 4], [-4, 0], [0], "x"])
    _a_tensor(generator, table)["data_offsets"] = place
    return table, data


def swapped_places(generator: Random, table: dict[str, Any], data: bytes) -> tuple[Table, bytes]:
    """Swap the values of two tensors of equal shape."""
    tensors = [one for name, one in table.items() if name != "__metadata__"]
    generator.shuffle(tensors)
    for one, other in itertools.combinations(tensors, 2):
        if one["shape"] == other["shape"]:
            places = other["data_offsets"], one["data_offsets"]
            one["data_offsets"], other["data_offsets"] = places
            break
    return table, data


def a_name_twice(generator: Random, table: dict[str, Any], data: bytes) -> tuple[Table, bytes]:
    name = generator.choice([name for name in table if name != "__metadata__"])
    text = json.dumps(table)
    return f'{text[:-1]}, "{name}": {json.dumps(table[name])}}}'.encode(), data


def other_metadata(generator: Random, table: dict[str, Any], data: bytes) -> tuple[Table, bytes]:
    table["__metadata__"] = generator.choice([None, {}, 3, {"polyseg": 3}, {"polyseg": "{"}, []])
    return table, data


def table_of_noise(generator: Random, table: dict[str, Any], data: bytes) -> tuple[Table, bytes]:
    text = json.dumps(table)
    deep = "[" * generator.choice([100, 100_000])
    return generator.choice(
        [deep, "{}", "", text[:-1], f"{text} ", "null", f" {text}"]
    ).encode(), data


def more_data(generator: Random, table: dict[str, Any], data: bytes) -> tuple[Table, bytes]:
    return table, generator.choice([data + bytes(100), data[:-4], b""])


LIES: list[Lie] = [
    huge_shape,
    other_type,
    other_place,
    swapped_places,
    a_name_twice,
    other_metadata,
    table_of_noise,
    more_data,
]

# Forgeries: valid files with a header or tensors that no training writes.

Forged = tuple[Header | str, Tensors]
Forgery = Callable[[Random, Header, Tensors], Forged]


def forged_number(generator: Random, header: Header, tensors: Tensors) -> Forged:
    name = generator.choice(["epoch", "channels", "best_epoch", "best_dice", "schema"])
    header[name] = generator.choice(
        [-1, 0, 10**9, 10**30, 1.5, "7", None, True, [], {}, float("nan"), float("inf"), "9" * 5000]
    )
    return header, tensors


def forged_field(generator: Random, header: Header, tensors: Tensors) -> Forged:
    name = generator.choice(list(header))
    if generator.random() < 0.3:
        del header[name]
    else:
        header[name] = generator.choice(
            [None, 0, "", "a\nb", [], [[]], {"a": "b"}, "\ud800", 1e308]
        )
    return header, tensors


def forged_names(generator: Random, header: Header, tensors: Tensors) -> Forged:
    name = generator.choice(["../../x", "epoch_1.h5", "/etc/passwd", "epoch_0001.h5\n", "", "a\0b"])
    header["assessments"] = {name: generator.choice(["0" * 64, 3, None, []])}
    return header, tensors


def forged_levels(generator: Random, header: Header, tensors: Tensors) -> Forged:
    header["levels"] = generator.choice(
        [{}, [], 3, {"means": [1e400]}, {"mean": [0], "deviation": [0]}, {"a": {"b": [1] * 9999}}]
    )
    return header, tensors


def giant_network(generator: Random, header: Header, tensors: Tensors) -> Forged:
    arguments = generator.choice(
        [
            {"channels": [10**6, 10**6], "strides": [2]},
            {"channels": [4096] * 16, "strides": [2] * 15},
            {"channels": [4096] * 16, "strides": [1] * 15, "num_res_units": 4096},
            {"channels": [4, 8], "strides": [2], "num_res_units": 4096},
            {"channels": [4, 8], "strides": [4096]},
            {"channels": [4, 8], "strides": [2], "kernel_size": 4095},
            {"channels": [], "strides": []},
            {"channels": [0, 0], "strides": [0]},
            {"channels": "many", "strides": {}},
            {"channels": [4, 8], "strides": [2], "spatial_dims": 7},
            {"channels": [4, 8], "strides": [2], "act": "os.system"},
            {"channels": [4, 8], "strides": [2], "norm": ["instance", {"eps": -1}]},
            {"no_such_argument": 1},
        ]
    )
    header["config"]["network"]["kwargs"] = arguments
    return header, tensors


def other_network(generator: Random, header: Header, tensors: Tensors) -> Forged:
    header["config"]["network"]["name"] = generator.choice(
        ["dynunet", "segresnet", "attention-unet", "basic-unet", "os:system", "no-such", "a\nb", ""]
    )
    arguments = generator.choice([{}, {"filters": [4096] * 16}, {"features": [4096] * 6}])
    header["config"]["network"]["kwargs"] = arguments | generator.choice(
        [{}, {"init_filters": 4096}]
    )
    return header, tensors


def forged_setting(generator: Random, header: Header, tensors: Tensors) -> Forged:
    section = generator.choice(list(header["config"]))
    name = generator.choice(list(header["config"][section]))
    header["config"][section][name] = generator.choice(
        [None, -1, 10**30, 1e308, "a\0b", "x" * 10**6, [1] * 10**5, {"a": 1}, True, "../..", "("]
    )
    return header, tensors


def deep_setting(generator: Random, header: Header, tensors: Tensors) -> Forged:
    depth = generator.choice([50, 900, 20_000])
    text = json.dumps(header)
    kwargs = json.dumps(header["config"]["network"]["kwargs"])
    return text.replace(kwargs, '{"a":' + "[" * depth + "]" * depth + "}"), tensors


def weights_of_no_number(generator: Random, header: Header, tensors: Tensors) -> Forged:
    name = generator.choice([name for name in tensors if tensors[name].is_floating_point()])
    tensors[name] = tensors[name] * generator.choice([float("nan"), float("inf")])
    return header, tensors


def weights_of_another_kind(generator: Random, header: Header, tensors: Tensors) -> Forged:
    name = generator.choice(list(tensors))
    one = tensors[name]
    tensors[name] = generator.choice(
        [one.double(), one.half(), one.reshape(-1), one[None].clone(), torch.zeros(3), one.bool()]
    )
    return header, tensors


def weights_missing_or_more(generator: Random, header: Header, tensors: Tensors) -> Forged:
    if generator.random() < 0.5:
        del tensors[generator.choice(list(tensors))]
    else:
        name = generator.choice(
            ["weights/more", "weights/", "more", "optimizer/../x", "weights/a\nb"]
        )
        tensors[name] = torch.zeros(4)
    return header, tensors


def forged_history(generator: Random, header: Header, tensors: Tensors) -> Forged:
    header["history"] = generator.choice([["epoch"], [], ["a"] * 10**4, [1, None], "epoch", None])
    shape = generator.choice([(7, 1), (7, 10**4), (0, 1), (7,), (1, 1, 1)])
    tensors["history"] = torch.full(
        shape, generator.choice([0.0, float("nan")]), dtype=torch.float64
    )
    return header, tensors


def forged_schedule(generator: Random, header: Header, tensors: Tensors) -> Forged:
    ids = generator.choice([b"a\nb", b"", b"\xff", b"a\na", b"a\0", b"\x1b[2J\nb"])
    tensors["schedule/ids"] = torch.frombuffer(bytearray(ids or b"\n"), dtype=torch.uint8)
    shape = generator.choice([(7, 2), (7, 0), (0, 2), (7,), ()])
    tensors["schedule/epsilon"] = torch.full(shape, generator.choice([0.0, float("nan"), -9.0]))
    if generator.random() < 0.7:
        count = generator.choice([7, 0, 3])
        tensors["schedule/assessed"] = torch.full((count,), generator.choice([-1, 2**62]))
    return header, tensors


FORGERIES: list[Forgery] = [
    forged_number,
    forged_field,
    forged_names,
    forged_levels,
    giant_network,
    other_network,
    forged_setting,
    deep_setting,
    weights_of_no_number,
    weights_of_another_kind,
    weights_missing_or_more,
    forged_history,
    forged_schedule,
]
