"""Predict probabilities at the original size of images or at the size of the network's input."""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from polyseg.data.dataset import ImageSet
from polyseg.data.preprocessing import resize_map
from polyseg.networks.inference import predict
from polyseg.networks.segmentation_network import SegmentationNetwork

At = Literal["original", "network"]
"""Size at which predictions and masks are compared: that of the image's file, or `data.size`."""


def probabilities(
    network: SegmentationNetwork,
    images: ImageSet,
    ids: Sequence[str],
    batch_size: int,
    at: At = "original",
) -> Iterator[tuple[str, NDArray[np.floating]]]:
    """Yield the id and the probabilities, (K, H, W) in [0, 1], of each image by one pass.

    Args:
        network: a trained network.
        images: the images.
        ids: the images that are predicted, in this order.
        batch_size: number of images of one pass.
        at: the size of the result.
    """
    for batch, logits in predict(network, images.batches(ids, batch_size)):
        for row, identity in enumerate(batch.ids):
            found = logits[row].double().sigmoid().numpy()
            yield identity, at_size(found, images, identity, at)


def at_size(
    maps: NDArray[np.floating], images: ImageSet, identity: str, at: At
) -> NDArray[np.floating]:
    """Return probabilities of an image, (K, h, w), as float32 at the size of its file.

    With "network" they are not changed. Bilinear resizing keeps values between their neighbours'.
    """
    if at == "network":
        return maps
    size = images.item(identity).original_size
    return np.stack([resize_map(one.astype(np.float32), size) for one in maps]).clip(0, 1)
