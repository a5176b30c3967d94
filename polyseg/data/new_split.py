"""Make a new split of a set of images, and check that it is usable for training."""

import logging
from collections.abc import Sequence

from polyseg.config import Config, DataConfig
from polyseg.data.dataset import ImageSet, Item, member_of
from polyseg.data.duplicates import refuse_leaks
from polyseg.data.splits import Split, groups_in_two_parts, split_by_settings
from polyseg.errors import PolysegError

log = logging.getLogger(__name__)

_SHOWN = 5
_MANY_WINDOWS = 100


def new_split(config: Config, images: ImageSet) -> Split:
    """Split the images by the settings, and check that the parts have no image in common.

    Raises:
        PolysegError: there are too few images, a batch would have several sizes, or an image is in
            two parts.
    """
    if not images.has_masks:
        raise PolysegError("data: some images have no masks; training needs one for each")
    several = len(images.sizes()) > 1
    if several and config.training.batch_size > 1 and images.tiling is None:
        raise PolysegError(
            f"data.size: the images have {len(images.sizes())} sizes and no batch can hold them; "
            "set data.size, data.fit=tile, or training.batch_size=1"
        )
    if several and config.uncertainty.save_maps and config.assesses:
        raise PolysegError(
            f"uncertainty.save_maps: the images have {len(images.sizes())} sizes and one array of "
            "maps has one; set data.size"
        )
    split = split_by_settings(images.members(), config.data)
    _refuse_shared(split, images.items, config.data)
    _warn_of_many_windows(images)
    if config.data.training_slices == "foreground":
        split["train"] = [one for one in split["train"] if images.item(one).foreground]
    if not split["train"]:
        raise PolysegError("data: there are no training images; see data.split")
    if not split["test"]:
        log.warning(
            "there are no test images, so training ends without test metrics; give some by "
            "data.split_file, data.fold or a folder test/; `polyseg evaluate --split val` tests "
            "the validation images"
        )
    _refuse_without_foreground(split["train"], images)
    return split


def _refuse_without_foreground(training: Sequence[str], images: ImageSet) -> None:
    """Raise if no training mask has foreground of a label, also after resizing."""
    kept = [images.item(one).kept for one in training]
    resized = [one for one in kept if one is not None and one.objects]
    if resized and None not in kept and not any(one.area for one in resized):
        raise PolysegError(
            "data.size: resizing leaves no foreground in any training mask; set a larger "
            "data.size, or data.fit=tile with data.size=256"
        )
    shares = [images.item(identity).shares or () for identity in training]
    for k, label in enumerate(images.labels):
        if not any(share[k] for share in shares):
            what = f"foreground of {label}" if label else "foreground"
            raise PolysegError(
                f"data: no training mask has any {what}; data.foreground names the values"
            )


def _refuse_shared(split: Split, items: Sequence[Item], config: DataConfig) -> None:
    """Raise PolysegError if equal images, or images of one group, are in two parts of a split."""
    likeness = {item.id: item.likeness for item in items}
    for sentence in refuse_leaks(split, likeness, config.duplicates)[:_SHOWN]:
        log.warning("%s, which data.duplicates allows", sentence)
    if shared := groups_in_two_parts(split, [member_of(item) for item in items], config):
        more = f" and {len(shared) - _SHOWN} more" if len(shared) > _SHOWN else ""
        what = f"data: images of one group are in two parts: {', '.join(shared[:_SHOWN])}{more}"
        if config.duplicates != "allow":
            raise PolysegError(f"{what}; correct the split, or allow it by data.duplicates=allow")
        log.warning("%s, which data.duplicates allows", what)


def _warn_of_many_windows(images: ImageSet) -> None:
    """Warn if small patches make the prediction of whole images slow."""
    if images.tiling is None:
        return
    height, width = images.tiling.size
    rows, columns = max(images.sizes(), key=lambda size: size[0] * size[1])
    windows = -(-rows // height) * -(-columns // width)
    if windows > _MANY_WINDOWS:
        log.warning(
            "an image of %d x %d needs over %d windows of %d x %d in each pass of MC Dropout; a "
            "larger data.size is faster",
            *(rows, columns, windows, height, width),
        )
