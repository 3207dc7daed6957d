"""Class probabilities as targets, of mixup and cutmix: two classes a sample."""

import copy

import pytest
import torch
import torch.nn.functional as F
from criteria import B, C, M, batch, exactly, loss_and_grads

from ncmi_kernels import CentroidSGD, NCMILoss, ncmi_terms

WAYS = {
    "cpu": {},
    "reference": {"backend": "reference"},
    "other separation": {"separation": "centroid_to_sample"},
    "focus": {"separation_focus": 5.0},
    "several": {"centroids_per_class": 2},
    "weight": {"weight": torch.tensor([0.5, 2.0, 1.0, 0.1])},
    "fixed": {"learn_centroids": False},
}
REDUCED = [(ratio, reduction) for ratio in ("sample", "soft_margin") for reduction in ("mean", "sum", "none")]

every_way = pytest.mark.parametrize("way", WAYS)
every_reduction = pytest.mark.parametrize(("ratio", "reduction"), REDUCED)


def criterion_of(way, **options):
    defaults = {"ratio": "sample", "dtype": torch.float64, "center_momentum": 0.5}
    return NCMILoss(C, M, **defaults | WAYS[way] | options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_autocast(dtype):
    criterion = criterion_of("fixed", dtype=torch.float32)
    input, target, _ = mixture(dtype=torch.float32)
    input = input.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion.eval()(input, target)
    exactly(loss, criterion(input, target))


def test_double_backward():
    criterion = criterion_of("other separation").eval()
    input, target, _ = mixture()
    torch.autograd.gradgradcheck(lambda input: criterion(input, target), input.requires_grad_())


def test_terms_of_one_hot_rows_are_those_of_the_indices():
    """The other class of such a row has no share, and may be any."""
    criterion = criterion_of("cpu").eval()
    input, target = batch(0, dtype=torch.float64)
    criterion(input, target)
    expected = criterion.last_terms
    criterion(input, F.one_hot(target, C).double())
    torch.testing.assert_close(criterion.last_terms, expected)


def mixture(seed=0, dtype=torch.float64):
    """Features, class probabilities of two classes a row (of one where they agree), and these classes with shares."""
    input, first = batch(seed, dtype=dtype)
    second = first.roll(1)
    share = torch.linspace(0.1, 1, B, dtype=dtype)
    target = share[:, None] * F.one_hot(first, C) + (1 - share)[:, None] * F.one_hot(second, C)
    return input, target, ((first, share), (second, 1 - share))


@every_reduction
@every_way
def test_the_loss_is_that_of_either_class_by_its_share(way, ratio, reduction):
    criterion = criterion_of(way, ratio=ratio, reduction=reduction)
    input, target, parts = mixture()
    actual = loss_and_grads(lambda x: criterion(x, target), input, criterion.centroid_logits)
    plain = copy.deepcopy(criterion).eval()
    plain.reduction = "none"
    weight = torch.ones(C) if plain.weight is None else plain.weight

    def by_class(x):
        each = sum(share * plain(x, classes) for classes, share in parts)
        total = sum(share * weight[classes] for classes, share in parts).sum()
        return {"none": each, "sum": each.sum(), "mean": each.sum() / total}[reduction]

    expected = loss_and_grads(by_class, input, plain.centroid_logits)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_against_the_terms():
    criterion = criterion_of("cpu", center_momentum=None)
    input, target, parts = mixture()
    expected = 0
    for classes, share in parts:
        concentration, separation = ncmi_terms(input, classes, criterion.centroid_logits, l2_normalize=True)
        expected += (share * concentration / (separation + criterion.eps)).sum() / B
    torch.testing.assert_close(criterion(input, target), expected, rtol=1e-12, atol=0)


@every_reduction
@every_way
def test_one_hot_rows_are_indices(way, ratio, reduction):
    criterion = criterion_of(way, ratio=ratio, reduction=reduction)
    other = copy.deepcopy(criterion)
    input, target = batch(dtype=torch.float64)
    for _ in range(2):  # the centre moves once a call, by the mean of the batch
        loss = criterion(input, F.one_hot(target, C).double())
        torch.testing.assert_close(loss, other(input, target), rtol=1e-10, atol=0)
        torch.testing.assert_close(criterion.center, other.center, rtol=1e-12, atol=0)
        exactly(criterion.num_batches_tracked, other.num_batches_tracked)
        input = input + 1


@pytest.mark.parametrize("shape", [(M,), (3, M, 2), (2, M, 3, 2)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_shapes(shape, reduction):
    criterion = criterion_of("cpu", reduction=reduction).eval()
    input = torch.randn(shape, dtype=torch.float64)
    classes = torch.randint(C, shape[:1] + shape[2:] if len(shape) > 1 else ())
    target = F.one_hot(classes, C).double().movedim(-1, min(1, len(shape) - 1))
    expected = criterion(input, classes)
    loss = criterion(input, target)
    assert loss.shape == expected.shape
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_and_compiling(dtype):
    criterion = NCMILoss(C, M, ratio="sample", center_momentum=0.5)
    compiled = torch.compile(copy.deepcopy(criterion), backend="aot_eager", fullgraph=True)
    input, target, _ = mixture(dtype=torch.float32)
    loss = criterion(input, target.to(dtype))
    assert loss.dtype is torch.float32
    torch.testing.assert_close(compiled(input, target.to(dtype)), loss)
    torch.testing.assert_close(
        loss, NCMILoss(C, M, ratio="sample")(input, target), rtol=4 * torch.finfo(dtype).eps, atol=0
    )


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            torch.full((B, C), 1 / C),
            r"the largest class probabilities of row 0 are 0.25 and 0.25, expected at most two",
        ),
        (0.9 * torch.eye(C)[torch.arange(B) % C], "row 0 are 0.9 and 0.0"),
        (0.9 * torch.eye(C)[torch.arange(B) % C] + 0.1 / C, "without label smoothing"),
        (torch.tensor([[1.5, -0.5, 0, 0]]).expand(B, C), "row 0 are 1.5 and 0.0"),
        (torch.full((B, C), torch.nan), "row 0 are nan"),
        (torch.zeros(B, C + 1), r"target: got class probabilities \(7, 5\), expected \(7, 4\) for input \(7, 6\)"),
    ],
)
def test_refused_class_probabilities(target, message):
    criterion = NCMILoss(C, M, ratio="sample")
    with pytest.raises(ValueError, match=message):
        criterion(batch()[0], target)
    assert criterion.num_batches_tracked == 0


def test_refused_settings():
    input, target, _ = mixture(dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"ratio='batch'.* not linear in class probabilities"):
        NCMILoss(C, M)(input, target)
    with pytest.raises(ValueError, match="ignore_index: got the class 1 with class probabilities"):
        NCMILoss(C, M, ratio="sample", ignore_index=1)(input, target)
    criterion = NCMILoss(C, M, ratio="sample")
    CentroidSGD(criterion, 0.1)
    with pytest.raises(RuntimeError, match="class probabilities with a CentroidSGD, which takes class indices"):
        criterion(input, target)
    with pytest.raises(RuntimeError, match="target: got a tensor that requires a gradient"):
        NCMILoss(C, M, ratio="sample")(input, target.requires_grad_())
