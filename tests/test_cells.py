"""The end of a network on cells gives what it gives on the whole map, at the cells' pixels."""

import pytest
import torch
from torch import nn

from polyseg import rewrites
from polyseg.cells import CellEnd, Cells
from tests.test_graph import Flow, begin, conv, drop, parts_of, up, worst

FRAME = (12, 16)
UPS = {
    "2 of 2": up(),
    "3 of 2": up(4, 5, 3, padding=1, output_padding=1),
    "4 of 2": up(4, 5, 4, padding=1, bias=False),
    "2 x 4 of 2": up(4, 5, (2, 4), padding=(0, 1)),
}


def last_part(core, shared=True):
    """Return what hangs on masks, and the values that it takes."""
    network, values = begin(core, shared)
    prefix, suffix = parts_of(network)
    rewrites.work_in_place(suffix)
    prefix.run(values)
    return suffix, values


def core_of(layer, flow=lambda s, x: s.head(s.act(s.up(s.d(s.a(x))) + s.skip(x)) * 2)):
    outputs = layer.out_channels
    return Flow(
        flow,
        a=conv(),
        d=drop(nn.Dropout),
        up=layer,
        skip=up(4, outputs),
        act=nn.PReLU(),
        head=conv(outputs, 3, 1),
    )


@torch.no_grad()
@pytest.mark.parametrize("wanted", ["one", "corners", "some", "all"])
@pytest.mark.parametrize("layer", UPS.values(), ids=UPS)
def test_cells_are_the_pixels_of_the_whole(layer, wanted):
    suffix, values = last_part(core_of(layer))
    expected = suffix.function(*(values[name] for name in suffix.inputs))[0]
    chosen = torch.zeros(FRAME, dtype=torch.bool)
    chosen[5, 7] = wanted == "one"
    if wanted == "corners":
        chosen[::11, ::15] = True
    if wanted == "some":
        chosen |= torch.rand(FRAME) < 0.1
        chosen[3] = True
    if wanted == "all":
        chosen[:] = True
    end = CellEnd.of(suffix, FRAME)
    cells = Cells(end, chosen)
    end.head.run(values)
    row, column = chosen.nonzero(as_tuple=True)
    for image in range(3):
        # Masks are shared; maps are an image's own.
        own = {k: v[image % len(v)][None] for k, v in values.items()}
        inputs = cells.crop(own)
        found = end.end.function(*(inputs[name] for name in end.end.inputs))[0]
        assert found.shape[3] == 4 * int(end.grid(chosen[None]).sum())
        at_pixels = found[0, :, 0, cells.locate(row, column)]
        assert worst(at_pixels, expected[image][:, row, column]) < 1e-12


@pytest.mark.parametrize(
    "core",
    [
        core_of(up(), lambda s, x: s.head(s.up(s.d(s.a(x)))).tanh()),
        Flow(lambda s, x: s.b(s.up(s.d(x))), d=drop(), up=up(), b=conv()),
        Flow(lambda s, x: s.up(s.d(x)), d=drop(), up=up(4, 4, 3, stride=1, padding=1)),
        Flow(lambda s, x: s.up(s.d(x)), d=drop(), up=up(4, 4, groups=2)),
        Flow(lambda s, x: s.up(s.d(x)), d=drop(), up=up(4, 4, 2, stride=(2, 1))),
        Flow(lambda s, x: s.up(s.d(x)).mean((2, 3), keepdim=True), d=drop(), up=up()),
        Flow(lambda s, x: s.b(s.d(x)), d=drop(), b=conv()),
    ],
    ids=["tanh", "3 x 3 behind", "stride 1", "groups", "two strides", "mean", "no way up"],
)
def test_other_ends_have_no_cells(core):
    suffix, _ = last_part(core)
    assert CellEnd.of(suffix, FRAME) is None


def test_a_constant_for_each_place_is_no_end_of_cells():
    class Placed(nn.Module):
        def __init__(self):
            super().__init__()
            self.where = nn.Parameter(torch.randn(1, 4, *FRAME))
            self.up, self.drop = up(), drop()

        def forward(self, images):
            return self.up(self.drop(images.relu())) + self.where

    suffix, _ = last_part(Placed())
    assert CellEnd.of(suffix, FRAME) is None
