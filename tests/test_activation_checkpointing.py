"""Recomputation of feature maps in the backward pass (activation checkpointing)."""

import pytest
import torch

from polyseg.choices import NETWORKS
from polyseg.networks.networks_by_name import build_network
from polyseg.training.activation_checkpointing import recompute_blocks


def bytes_kept(network, images):
    """Return the bytes that autograd saves of a forward pass besides weights."""
    held = {}
    weights = {one.untyped_storage().data_ptr() for one in network.parameters()}

    def pack(values):
        storage = values.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return values

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda values: values):
        logits = network(images)
    return sum(held.values()), logits


@pytest.mark.slow
@pytest.mark.parametrize("name", list(NETWORKS))
def test_recomputation_saves_memory_and_keeps_gradients(name):
    images = torch.rand(2, 1, 64, 64)
    results = []
    for recomputes in (False, True):
        torch.manual_seed(0)
        network = build_network(name, in_channels=1)
        if recomputes:
            assert recompute_blocks(network) >= 5
        torch.manual_seed(1)
        kept, logits = bytes_kept(network.train(), images)
        logits.square().sum().backward()
        gradients = [weights.grad for weights in network.parameters()]
        results.append((kept, [logits, *gradients, *network.buffers()]))
    (whole, wanted), (few, found) = results
    assert few < 0.6 * whole
    for one, other in zip(wanted, found, strict=True):
        assert one is None or torch.equal(one, other)


def test_recomputation_does_not_change_evaluation_mode():
    network = build_network("unet", in_channels=1).eval()
    images = torch.rand(1, 1, 32, 32)
    wanted = network(images)
    recompute_blocks(network)
    assert torch.equal(network(images), wanted)
