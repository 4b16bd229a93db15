"""Products of matrices on a CPU, in whichever way is the fastest there."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def by_onednn() -> bool:
    """Whether oneDNN's products are the faster ones: on some AMD processors twice, on Intel's MKL's are."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older versions do not tell
    name = capabilities.get("cpu_name", "")
    return torch.backends.mkldnn.is_available() and "Intel" not in name


def product(x: Tensor, weight: Tensor, *, add: Tensor | None = None, slope: float = 1.0) -> Tensor:
    """x [..., i] times weight [o, i] transposed, plus `add` [..., o] or through a leaky ReLU; no gradient."""
    if x.dtype == torch.float32 and by_onednn():
        # Of matrices that are neither whole nor wholly transposed oneDNN makes a hundred times the work.
        x, weight = (m if m.is_contiguous() or m.mT.is_contiguous() else m.contiguous() for m in (x, weight))
        linear = torch.ops.mkldnn._linear_pointwise
        if add is not None:
            return linear.binary(x, add, weight, None, "add")
        return linear(x, weight, None, "none" if slope == 1 else "leaky_relu", [slope], "")
    if add is not None:
        return torch.addmm(add.flatten(0, -2), x.flatten(0, -2), weight.mT).view(add.shape)
    y = F.linear(x, weight)
    return y if slope == 1 else F.leaky_relu_(y, slope)


def weight_gradient(dy: Tensor, x: Tensor, total: Tensor | None = None) -> Tensor:
    """The sum of outer products dy [..., o] x [..., i] over all positions -> [o, i], added to `total`."""
    dy, x = dy.flatten(0, -2), x.flatten(0, -2)
    if x.dtype != torch.float32 or not by_onednn():
        return dy.mT @ x if total is None else total.addmm_(dy.mT, x)
    if dy.size(1) > x.size(1):  # the wider one is laid out anew
        return weight_gradient(x, dy, None if total is None else total.mT).mT
    dw = product(dy.mT, x.mT)
    return dw if total is None else total.add_(dw)


def products(a: Tensor, b: Tensor) -> Tensor:
    """Matrices a [n, i, j] times b [n, j, k] -> [n, i, k]; no gradient.

    Of a narrow result the transposed one is made: MKL takes up to eight times as long for the other.
    """
    narrow = 4 * b.size(2) < a.size(1)
    return torch.bmm(b.mT, a.mT).mT if narrow else torch.bmm(a, b)
