"""Scans split over ranks give the outputs and gradients of a single process."""

import pytest
import torch

from hybridmem_kernels import memory_scan
from hybridmem_kernels.memory_scan.over_ranks import memory_scan_over_ranks
from tests.several import as_processes

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def scan_inputs():
    """Return 40 tokens in rows of one and several documents, one of which starts with a rank's piece."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(2, 3, 40, 5)] * 2 + [(2, 3, 40, 4)] + [(2, 3, 40)] * 3
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in inputs[:2])
    alpha, eta, theta = (torch.sigmoid(x) * 0.5 for x in inputs[3:])
    starts = torch.zeros(2, 40, dtype=torch.long)
    starts[1, [14, 20, 27]] = 1
    return [q, k, inputs[2], alpha, eta, theta], starts.cumsum(1)


def scan_piece(rank, with_documents):
    """Return the output, state and gradients of one rank's piece."""
    inputs, documents = scan_inputs()
    cut = [x.tensor_split(3, dim=2)[rank].requires_grad_() for x in inputs]
    own = documents.tensor_split(3, dim=1)[rank] if with_documents else None
    out, state = memory_scan_over_ranks(*cut, chunk_size=8, document_ids=own)
    loss = (out * torch.arange(1.0, 5.0)).sum() * (rank + 1)
    if rank == 2:
        loss = loss + state.weight.square().sum() + state.momentum.sum()
    return out.detach(), state.detach(), torch.autograd.grad(loss, cut)


@pytest.mark.parametrize("with_documents", [False, True])
def test_a_split_scan_gives_the_same(with_documents):
    inputs, documents = scan_inputs()
    inputs = [x.requires_grad_() for x in inputs]
    out, state = memory_scan(*inputs, chunk_size=8, document_ids=documents if with_documents else None)
    pieces = (out * torch.arange(1.0, 5.0)).tensor_split(3, dim=2)
    loss = sum(piece.sum() * (rank + 1) for rank, piece in enumerate(pieces))
    loss = loss + state.weight.square().sum() + state.momentum.sum()
    expected = torch.autograd.grad(loss, inputs)
    outs, states, grads = zip(*as_processes(3, scan_piece, with_documents), strict=True)
    close = dict(atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(torch.cat(outs, dim=2), out, **close)
    torch.testing.assert_close(states[-1], state, **close)
    for whole_gradient, parts in zip(expected, zip(*grads, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(parts, dim=2), whole_gradient, **close)
