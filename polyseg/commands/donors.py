"""Compute errors of images from donors: two runs, each trained on half of the images."""

import csv
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from polyseg.errors import PolysegError, reason
from polyseg.runs.checkpoints import read_checkpoint
from polyseg.runs.run_folder import RunDirectory
from polyseg.system.files import csv_rows, read_text

_HOW = "make the donors by examples/donors.sh"


def unseen_errors(
    run: Path, donors: Sequence[Path], ids: Collection[str], labels: Sequence[str]
) -> dict[tuple[str, str], float]:
    """Return 1 - Dice of each image from the donor that has not seen it, by (id, label).

    A donor has seen the images of its training part and of its validation part, which chooses the
    checkpoint. The Dice is from the evaluation at the end of its training; NaN if undefined. `ids`
    are the training images of `run`.
    """
    _, own = RunDirectory(run).read_split()
    seen = {donor: _seen_images(donor, run, own, ids) for donor in donors}
    for count, whom in ((len(donors), "both donors"), (0, "neither donor")):
        wrong = [one for one in ids if sum(one in held for held in seen.values()) == count]
        if wrong:
            raise PolysegError(
                f"--donors: {whom} saw {len(wrong)} of {len(ids)} training images of {run}, such "
                f"as {wrong[0]}; each needs one donor that saw it and one that did not; {_HOW}"
            )
    errors: dict[tuple[str, str], float] = {}
    for donor, held in seen.items():
        tested = _tested_dice(donor)
        for place in [(one, label) for one in ids if one not in held for label in labels]:
            if place not in tested:
                what = " of ".join(filter(None, reversed(place)))
                raise PolysegError(f"--donors: {donor} was not tested on {what}; {_HOW}")
            errors[place] = 1 - tested[place]
    return errors


def _seen_images(donor: Path, run: Path, own: Mapping[str, str], ids: Collection[str]) -> set[str]:
    """Return the images that a donor was trained or chosen on."""
    folder = RunDirectory(donor)
    if not folder.last.is_file():
        raise PolysegError(f"--donors: {donor} is not a run; {_HOW}")
    split, hashes = folder.read_split(read_checkpoint(folder.last, with_weights=False).split)
    for identity in ids:
        if hashes.get(identity, own[identity]) != own[identity]:
            raise PolysegError(
                f"--donors: {identity} is another image in {donor} than in {run} (its sha256 "
                f"differs); {_HOW}"
            )
    return {*split["train"], *split["val"]}


def _tested_dice(donor: Path) -> dict[tuple[str, str], float]:
    """Return the Dice of the images that a donor was tested on, by (id, label)."""
    path = RunDirectory(donor).evaluation / "per_image.csv"
    try:
        head, *rows = csv_rows(read_text(path))
        tables = [dict(zip(head, row, strict=True)) for row in rows]
        return {(row["id"], row.get("label", "")): float(row["dice"] or math.nan) for row in tables}
    except OSError as error:
        raise PolysegError(f"--donors: {path} cannot be read: {reason(error)}; {_HOW}") from None
    except (ValueError, KeyError, csv.Error):
        raise PolysegError(f"--donors: {path} is not a table of an evaluation; {_HOW}") from None
