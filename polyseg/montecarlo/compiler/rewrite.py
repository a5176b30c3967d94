"""Exact rewrites of a network's graph that make it faster.

Each changes a traced network to one with the same results, up to the rounding of floating-point
sums.
"""

from typing import Any

import torch
from torch import fx
from torch.fx import Node

from polyseg.montecarlo.compiler import winograd
from polyseg.montecarlo.compiler.operations import (
    ADD,
    CONCATENATE,
    CONVOLUTIONS,
    MULTIPLY,
    Convolution,
    add_constant,
    arguments_of,
    aten,
    calls_to,
    channels_of,
    mask_of,
    pair,
    replace_call,
    shape_of,
    sides_of,
    tensor_of,
)
from polyseg.montecarlo.compiler.split import Part, stochastic_nodes

IN_PLACE = {
    aten.relu.default: aten.relu_.default,
    aten.leaky_relu.default: aten.leaky_relu_.default,
    aten.addcmul.default: aten.addcmul_.default,
    MULTIPLY: aten.mul_.Tensor,
    ADD: aten.add_.Tensor,
}
_MAKES_A_TENSOR = (winograd.convolve, *CONVOLUTIONS, *IN_PLACE, *IN_PLACE.values())


def apply_all(network: fx.GraphModule, *, wide: bool) -> None:
    """Apply all rewrites to a traced network; `wide` allows Winograd's algorithm."""
    fold_batch_norms(network)
    fold_identities(network)
    merge_pointwise(network)
    split_concatenations(network)
    if wide:
        use_winograd(network)


def fold_batch_norms(network: fx.GraphModule) -> None:
    """Fold batch normalisation in evaluation mode into the convolution before it."""
    for node in calls_to(network, (aten.batch_norm.default,)):
        norm = arguments_of(node)
        conv = Convolution.of(norm["input"])
        if norm["training"] or norm["running_mean"] is None or not (conv and conv.is_own(network)):
            continue
        names = ("running_mean", "running_var", "weight", "bias")
        mean, variance, gamma, beta = (tensor_of(network, norm[name]) for name in names)
        folded = conv.with_batch_norm(network, mean, variance, norm["eps"], gamma, beta)
        node.replace_all_uses_with(folded)
    network.graph.eliminate_dead_code()


def fold_identities(network: fx.GraphModule) -> None:
    """Add 1 to the kernel instead of the input to the output, conv(u) + u = conv'(u)."""
    for node in calls_to(network, (ADD,)):
        if arguments_of(node)["alpha"] != 1:
            continue
        for one, other in (node.args[:2], node.args[1::-1]):
            conv = Convolution.of(one)
            if not (conv and conv.input is other and conv.is_own(network) and conv.is_centred()):
                continue
            if conv.kernel_shape[0] == conv.kernel_shape[1]:
                weight = tensor_of(network, conv.weight).clone()
                middle = [side // 2 for side in weight.shape[2:]]
                weight[:, :, middle[0], middle[1]] += torch.eye(len(weight)).to(weight)
                node.replace_all_uses_with(conv.with_weight(network, weight))
                break
    network.graph.eliminate_dead_code()


def merge_pointwise(network: fx.GraphModule) -> None:
    """Merge a convolution with a 1 x 1 convolution after it, if the result costs less."""
    for node in calls_to(network, (aten.conv2d.default,)):
        outer = Convolution.of(node)
        inner = Convolution.of(outer.input)
        pointwise = outer.kernel_shape[2:] == (1, 1) and outer.is_centred()
        if not (inner and inner.is_own(network) and pointwise):
            continue
        if not outer.has_constant_weight(network):
            continue
        head = tensor_of(network, outer.weight)[:, :, 0, 0]
        weight = tensor_of(network, inner.weight)
        if len(head) > head.shape[1] or inner.settings["groups"] != 1:
            continue
        pattern = "ko,iohw->ikhw" if inner.transposed else "ko,oihw->kihw"
        bias = tensor_of(network, outer.bias)
        if inner.bias is not None:
            carried = head @ tensor_of(network, inner.bias)
            bias = carried if bias is None else carried + bias
        merged = inner.with_weight(network, torch.einsum(pattern, head, weight), bias)
        node.replace_all_uses_with(merged)
        merged.meta["val"] = node.meta["val"]
    network.graph.eliminate_dead_code()


def split_concatenations(network: fx.GraphModule) -> None:
    """Convolve parts that depend on no mask separately, conv(cat(a, b)) = conv(a) + conv(b)."""
    stochastic = stochastic_nodes(network)
    for node in calls_to(network, CONVOLUTIONS):
        conv = Convolution.of(node)
        joined = conv.input
        if joined.target is not CONCATENATE or arguments_of(joined)["dim"] != 1:
            continue
        parts = joined.args[0]
        moving = [part in stochastic for part in parts]
        if all(moving) or not any(moving) or conv.settings["groups"] != 1:
            continue
        if not conv.has_constant_weight(network):
            continue
        weights = tensor_of(network, conv.weight).split(
            [channels_of(part) for part in parts], dim=0 if conv.transposed else 1
        )
        still = conv.over_parts(network, parts, weights, [not one for one in moving], conv.bias)
        changing = conv.over_parts(network, parts, weights, moving, None)
        replace_call(node, ADD, changing, still)
    network.graph.eliminate_dead_code()


def use_winograd(network: fx.GraphModule) -> None:
    """Use Winograd's algorithm for wide 3 x 3 convolutions that run in each pass."""
    stochastic = stochastic_nodes(network)
    for node in calls_to(network, (aten.conv2d.default,)):
        conv = Convolution.of(node)
        if node not in stochastic or not conv.has_constant_weight(network):
            continue
        weight = tensor_of(network, conv.weight)
        fits = conv.is_centred() and pair(conv.settings["dilation"]) == (1, 1)
        if fits and winograd.is_worthwhile(weight):
            kernel = add_constant(network, node, winograd.transform_kernel(weight))
            replace_call(node, winograd.convolve, conv.input, kernel, conv.bias)
    network.graph.eliminate_dead_code()


def _reads_before(reader: Node, node: Node) -> bool:
    """Return whether an operation comes before another and writes its result to a new tensor."""
    # Transposed convolutions are excluded, because the graph may be cut after them.
    return reader.target in (winograd.convolve, aten.conv2d.default) and reader < node


def work_in_place(part: Part, kind: torch.dtype = torch.float32) -> None:
    """Let activations, products and sums overwrite inputs that are not used afterwards."""
    network = part.function
    for node in calls_to(network, (aten.prelu.default,)):
        slope = tensor_of(network, node.args[1])
        if slope is not None and slope.numel() == 1:
            node.target = aten.leaky_relu.default
            node.args = (node.args[0], float(slope))
    if kind == torch.float32:  # CPUs have no such operation for other types, and are slower.
        for node in calls_to(network, (ADD,)):
            _add_product(node)
    network.graph.eliminate_dead_code()
    for node in calls_to(network, tuple(IN_PLACE)):
        swappable = node.target is ADD and arguments_of(node)["alpha"] == 1
        if swappable and isinstance(node.args[1], Node) and not _is_unused(node.args[0], node):
            node.args = node.args[::-1]
        if _is_unused(node.args[0], node):
            node.target = IN_PLACE[node.target]
    network.recompile()


def _add_product(node: Node) -> None:
    """Replace x + y m by one operation, if the product is not used elsewhere."""
    if arguments_of(node)["alpha"] != 1:
        return
    for product, other in (node.args, node.args[::-1]):
        mask = mask_of(product)
        spare = mask is not None and len(product.users) == 1
        if spare and isinstance(other, Node) and product is not other:
            node.target = aten.addcmul.default
            node.args = (other, product.args[0], mask)
            return


def _is_unused(node: Any, user: Node) -> bool:
    """Return whether a tensor is new, has the shape of the user's result, and no later user."""
    return (
        isinstance(node, Node)
        and node.target in _MAKES_A_TENSOR
        and all(one is user or _reads_before(one, user) for one in node.users)
        and user.args.count(node) == 1
        and sides_of(node) is not None
        # As text, because the number of images is a symbol.
        and str(shape_of(node)) == str(shape_of(user))
    )
