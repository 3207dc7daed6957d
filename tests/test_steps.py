"""What training does to a step: autocast, loss scaling, checkpoints of activations, accumulation, clipping."""

from functools import partial

import pytest
import torch
from conftest import relative
from criteria import CRITERIA, C, M, exactly, step_pair
from problems import every_ratio
from torch.autograd import grad
from torch.utils.checkpoint import checkpoint

from ncmi_kernels import NCMILoss, ncmi_loss, ncmi_terms

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------
# Autocast, loss scaling
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_ratio
def test_a_step_under_autocast(ratio, dtype):
    """The network in half precision; the loss in float32, of the same features."""
    (network, criterion, _, optimizer), (_, single, _, _) = step_pair(ratio, True)
    for _ in range(3):
        x, y = torch.randn(16, 8), torch.randint(C, (16,))
        optimizer.zero_grad(), single.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            features = network(x)
            loss = criterion(features, y)
        assert (features.dtype, loss.dtype) == (dtype, torch.float32)
        features.retain_grad()
        loss.backward()
        copied = features.detach().float().requires_grad_()
        expected = single(copied, y)
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        assert features.grad.dtype == dtype
        torch.testing.assert_close(features.grad, copied.grad.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)
        torch.testing.assert_close(criterion.centroid_logits.grad, single.centroid_logits.grad, rtol=1e-5, atol=1e-8)
        assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in network.parameters())
        optimizer.step()
        with torch.no_grad():
            single.centroid_logits.copy_(criterion.centroid_logits)
    torch.testing.assert_close(criterion.center, single.center)


@every_ratio
def test_loss_scaling_keeps_float16_gradients_from_underflow(ratio):
    """Scaled by 2 ** 16 they are the float32 gradients times that, rounded once; unscaled most of them are zero."""
    criterion = NCMILoss(C, M, ratio=ratio, temperature=100.0).eval()
    half = (300 * torch.randn(512, M)).half().requires_grad_()
    y = torch.randint(C, (512,))
    single = half.detach().float().requires_grad_()
    (exact,) = grad(criterion(single, y), single)
    unscaled, scaled = (grad(factor * criterion(half, y), half)[0] for factor in (1.0, 2.0**16))
    assert (unscaled == 0).float().mean() > 0.5
    torch.testing.assert_close(scaled, (exact * 2**16).half(), rtol=2**-10, atol=2**-23)
    assert (scaled == 0).float().mean() < 0.1


@every_ratio
def test_a_gradient_scaler_skips_what_overflows_and_recovers(ratio):
    (network, criterion, wanted, optimizer), _ = step_pair(ratio, True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**34, growth_interval=1000, backoff_factor=2.0**-24)
    before = [p.detach().clone() for p in wanted]
    for number in range(2):
        x, y = torch.randn(16, 8), torch.randint(C, (16,))
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = criterion(network(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(wanted, 1.0)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**10
        if number == 0:
            assert not norm.isfinite()
            exactly([p.detach() for p in wanted], before)
    assert 0 < norm < 10
    assert all(p.isfinite().all() and not torch.equal(p, old) for p, old in zip(wanted, before, strict=True))
    assert criterion.center.isfinite().all()


# ------------------------------------------------------------------------------------------------------------
# Checkpoints, accumulation, clipping
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@every_ratio
def test_a_checkpoint_around_the_criterion(ratio, backend, reentrant):
    """Its forward pass runs twice, and moves the centre once: where gradients are enabled."""
    (network, criterion, wanted, _), (network_2, criterion_2, wanted_2, _) = step_pair(ratio, True)
    criterion.backend = criterion_2.backend = backend
    for number in range(3):
        x, y = torch.randn(9, 8).requires_grad_(), torch.randint(C, (9,))
        repeats = []

        def forward(x, y=y, repeats=repeats):
            repeats.append(None)
            return criterion(network(x), y)

        loss = checkpoint(forward, x, use_reentrant=reentrant)
        before = criterion_2.eval()(network_2(x), y)
        expected = criterion_2.train()(network_2(x), y)
        exactly(loss, before if reentrant else expected)
        assert criterion.num_batches_tracked == number + (not reentrant)
        loss.backward()
        assert len(repeats) == 2
        exactly([p.grad for p in wanted], list(grad(expected, wanted_2)))
        exactly(dict(criterion.state_dict()), dict(criterion_2.state_dict()))
        assert criterion.num_batches_tracked == number + 1
        for p in wanted:
            p.grad = None


@pytest.mark.parametrize("name", ["batch", "sample", "focus"])
def test_two_checkpoints_before_one_backward_pass(name):
    """Without re-entrance the gradients are those at the centres of the forward passes."""
    (network, criterion, wanted, _), (network_2, criterion_2, wanted_2, _) = step_pair(
        **{"ratio": "batch", "learnt": True} | CRITERIA[name]
    )
    batches = [(torch.randn(9, 8) + shift, torch.randint(C, (9,))) for shift in (0, 3)]
    sum(checkpoint(lambda x, y: criterion(network(x), y), *batch, use_reentrant=False) for batch in batches).backward()
    expected = grad(sum(criterion_2(network_2(x), y) for x, y in batches), wanted_2)
    exactly([p.grad for p in wanted], list(expected))
    exactly(criterion.center, criterion_2.center)


@every_ratio
def test_accumulated_gradients(ratio):
    """By sample they are the gradient of the whole batch; by batch they are that of the mean of the ratios."""
    (network, criterion, wanted, _), _ = step_pair(ratio, True)
    x, y = torch.randn(24, 8), torch.randint(C, (24,))
    criterion(network(x), y)
    criterion.eval()
    for part in range(3):
        rows = slice(8 * part, 8 * part + 8)
        (criterion(network(x[rows]), y[rows]) / 3).backward()
    accumulated = torch.cat([p.grad.flatten() for p in wanted])

    def flat(loss):
        return torch.cat([g.flatten() for g in grad(loss, wanted)])

    whole = flat(criterion(network(x), y))
    options = {"center": criterion.center, "l2_normalize": True}
    concentration, separation = ncmi_terms(network(x), y, criterion.centroid_logits, **options)
    means = concentration.view(3, 8).mean(dim=1), separation.view(3, 8).mean(dim=1)
    if ratio != "batch":
        assert relative(accumulated, whole) < 1e-5
    else:
        assert relative(accumulated, flat((means[0] / (means[1] + 1e-8)).mean())) < 1e-5
        assert relative(accumulated, whole) > 1e-3


def test_accumulation_by_sample_of_unequal_micro_batches():
    """The sum of each, divided by the weight of all."""
    weight = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)
    z, y, xi = torch.randn(9, M).double(), torch.arange(9) % C, torch.randn(C, M).double()
    y[2] = -100
    xi.requires_grad_()
    loss = partial(ncmi_loss, ratio="sample", weight=weight)
    parts = sum(loss(z[rows], y[rows], xi, reduction="sum") for rows in (slice(0, 2), slice(2, 9)))
    parts = parts / weight[y[y >= 0]].sum()
    whole = loss(z, y, xi)
    close(parts, whole)
    close(grad(parts, xi), grad(whole, xi))


def test_clipping_the_norm_of_the_gradients():
    (_, criterion, _, _), _ = step_pair("batch", True)
    z, y = torch.randn(9, M).requires_grad_(), torch.randint(C, (9,))
    criterion(z, y).backward()
    gradients = [z.grad.clone(), criterion.centroid_logits.grad.clone()]
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    bound = norm.item() / 4
    torch.testing.assert_close(torch.nn.utils.clip_grad_norm_([z, criterion.centroid_logits], bound), norm)
    for actual, before in zip((z.grad, criterion.centroid_logits.grad), gradients, strict=True):
        torch.testing.assert_close(actual, before / 4, rtol=1e-4, atol=0)
