"""The generalised JSD equals that of TRL's GKDTrainer."""

import pytest
import torch

from hybridmem.rl.objectives.distillation import generalized_jsd


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_the_generalised_jsd_is_trls(beta, temperature):
    from trl.experimental.gkd import GKDTrainer  # warns that it is experimental

    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, 5, 11, generator=generator) for _ in range(2))
    student.requires_grad_()
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    expected = GKDTrainer.generalized_jsd_loss(
        student, teacher, torch.zeros(2, 5).masked_fill(~mask, -100), beta=beta, temperature=temperature
    )
    ours = generalized_jsd(student[mask], teacher[mask], beta, temperature).mean()
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)
    gradients = [torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (ours, expected)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-6)
