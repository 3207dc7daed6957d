"""The authors' settings against their formulas, written out as they stand in their code: [B, C, M] tensors."""

import pytest
import torch
import torch.nn.functional as F
from conftest import relative
from criteria import exactly

from ncmi_kernels import NCMILoss

CLASSES, COLUMNS, ROWS = 12, 20, 16


def sigmax(x, guard):
    sigmoid = torch.sigmoid(x)
    return sigmoid / (sigmoid.sum(dim=1, keepdim=True) + 1e-8 * guard)


def pairwise_kl(log_p, log_q):
    log_p, log_q = log_p[:, None], log_q[None]
    return (log_p.exp() * (log_p - log_q)).sum(dim=2)


def authors_loss(features, target, center, guard):
    """`guard` is 1, or 0 without the small numbers that keep them from dividing by zero."""
    p = sigmax(F.normalize(features - center, dim=1) / 0.2, guard).log()
    logits = F.pad(torch.eye(CLASSES, dtype=torch.float64), (0, COLUMNS - CLASSES)) * 10 + 1e-6 * guard
    q = sigmax(logits, guard).log()
    rows = torch.arange(ROWS)
    cmi = pairwise_kl(p, q)[rows, target] + 1e-10 * guard
    others = torch.ones(CLASSES, ROWS, dtype=torch.float64)
    others[target, rows] = 0
    return (cmi / (others * pairwise_kl(q, p)).mean(dim=0)).mean()


@pytest.mark.parametrize(("guard", "tolerance"), [(0, 1e-12), (1, 1e-6)])
@pytest.mark.parametrize("momentum", [0.999999, 0.5])
def test_loss_gradient_and_centre(guard, tolerance, momentum):
    criterion = NCMILoss.from_authors(CLASSES, COLUMNS, center_momentum=momentum, dtype=torch.float64, eps=1e-300)
    center = None
    for step in range(3):
        features = (torch.randn(ROWS, COLUMNS, dtype=torch.float64) + step).requires_grad_()
        target = torch.randint(CLASSES, (ROWS,))
        mean = features.detach().mean(dim=0)
        center = mean if center is None else momentum * center + (1 - momentum) * mean
        loss, expected = criterion(features, target), authors_loss(features, target, center, guard)
        assert relative(criterion.center, center) < 1e-12
        assert relative(loss, expected) < tolerance
        gradients = [torch.autograd.grad(each, features)[0] for each in (loss, expected)]
        assert relative(*gradients) < tolerance
    assert not criterion.centroid_logits.requires_grad


def test_options_in_place_of_theirs():
    criterion = NCMILoss.from_authors(CLASSES, COLUMNS, temperature=1.0, learn_centroids=True, center_momentum=0.9)
    assert (criterion.temperature, criterion.center_momentum, criterion.ratio) == (1.0, 0.9, "sample")
    assert criterion.centroid_logits.requires_grad


def test_their_checkpoint():
    features, center = torch.randn(50, COLUMNS), torch.randn(COLUMNS)
    means = torch.rand(CLASSES, COLUMNS) + 0.1
    means = means / means.sum(dim=1, keepdim=True)
    saved = {"center_dict": {"Center": center}, "centroid": {"centroids": means}, "epoch": 1, "state_dict": {}}
    criterion = NCMILoss.from_authors(CLASSES, COLUMNS)
    criterion.load_authors_checkpoint(saved)
    log_p = sigmax(F.normalize(features - center, dim=1) / 0.2, 1).log()
    exactly(criterion.eval().predict(features, class_means=True), pairwise_kl(log_p, means.log()).argmin(dim=1))
    criterion.train()(features[:CLASSES], torch.arange(CLASSES))  # a centre that is there is not set anew
    torch.testing.assert_close(criterion.center, center, rtol=1e-4, atol=1e-4)
    before = {name: value.clone() for name, value in criterion.state_dict().items()}
    for wrong, message in (
        ({}, r"checkpoint: got none of the authors' code, .*KeyError\('center_dict'\)"),
        (saved | {"centroid": {"centroids": means[1:]}}, r"centroids \(11, 20\), expected \(20,\) and \(12, 20\)"),
    ):
        with pytest.raises(ValueError, match=message):
            criterion.load_authors_checkpoint(wrong)
    exactly(dict(criterion.state_dict()), before)
