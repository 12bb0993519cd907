"""Texts split over ranks give the logits and gradients of a single process."""

import pytest
import torch

from hybridmem.model.context_parallel import handed_over, own_part, sum_gradients
from tests.hybridmem.models import KINDS, tiny_model, tokens
from tests.several import as_processes

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
DOCUMENTS = torch.tensor([[0] * 9 + [1] * 20 + [0] * 11, [0] * 20 + [4] * 20])


def target(logits, part=lambda x: x):
    """Return a loss in which every logit has a different weight."""
    weights = torch.randn(2, 40, 37, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return (logits * part(weights)).sum()


def whole(settings, documents):
    """Return the logits and gradients of one process."""
    model = tiny_model(**settings)
    logits = model(tokens(), document_ids=documents).logits
    target(logits).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def pieces(rank, kinds, documents):
    """Return one rank's logits and summed gradients for every kind of model."""
    found = {}
    for kind in kinds:
        model = tiny_model(**KINDS[kind])
        with handed_over(model) as cache:
            own = None if documents is None else own_part(documents)
            logits = model(own_part(tokens()), document_ids=own, past_key_values=cache).logits
        target(logits, own_part).backward()
        sum_gradients(model)
        found[kind] = logits.detach(), {name: p.grad for name, p in model.named_parameters()}
    return found


@pytest.mark.parametrize(
    ("kinds", "documents"),
    [(["mag", "full", "mixed"], None), (list(KINDS), DOCUMENTS)],
    ids=["one document", "several"],
)
def test_a_split_text_gives_the_same(kinds, documents):
    """Pieces, windows, segments and chunks need not align, and any of them may be the shortest."""
    ranks = as_processes(3, pieces, kinds, documents)
    for kind in kinds:
        logits, gradients = whole(KINDS[kind], documents)
        joined = torch.cat([found[kind][0] for found in ranks], dim=1)
        torch.testing.assert_close(joined, logits, atol=1e-10, rtol=0, msg=kind)
        for name, gradient in gradients.items():
            for found in ranks:
                close = dict(atol=1e-10, rtol=1e-10, msg=f"{kind}: {name}")
                torch.testing.assert_close(found[kind][1][name], gradient, **close)


def refuse(rank):
    """Check the errors for models and inputs that cannot be split."""
    model = tiny_model()
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="activation checkpointing discards"), handed_over(model):
        pass
    with pytest.raises(ValueError, match="1 tokens cannot be split over 2 ranks"):
        own_part(torch.zeros(2, 1))
    return True


def test_unsupported_models_and_inputs_raise():
    assert as_processes(2, refuse) == [True, True]
