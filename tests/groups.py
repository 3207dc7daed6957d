"""Criteria of several processes, each with the one of one process that has all rows and classes."""

import copy

import torch
import torch.distributed as dist
from conftest import relative
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from ncmi_kernels import NCMILoss, ShardedNCMILoss

C, M = 6, 9
IGNORED = 4
SIZES = {2: [8, 5], 4: [5, 0, 3, 8]}  # rows of each process: uneven, one without any
VARIANTS = [
    {"separation": separation, "ratio": ratio, "reduction": reduction}
    for separation in ("sample_to_centroid", "centroid_to_sample")
    for ratio, reduction in (("batch", "mean"), ("sample", "mean"), ("sample", "sum"))
]
VARIANTS += [{**VARIANTS[0], "priors": True}, {**VARIANTS[3], "priors": True}]
# In which every sample and centroid have a weight.
WEIGHED = [{**options, "separation_focus": 5.0} for options in VARIANTS]
SEVERAL = [
    {**options, "centroids_per_class": 1 + number % 3, "centroid_focus": 3.0, "separation_focus": focus}
    for number, options in enumerate(VARIANTS, start=1)
    for focus in (0.0, 5.0)
    if number % 3
]


def batches(sizes, dtype=torch.float32, seed=0, ignored=IGNORED, classes=C):
    """A batch for each process, and all of them in one; about one row in five is ignored."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(sum(sizes), M, generator=generator, dtype=torch.float64) + torch.arange(M) / M
    target = torch.randint(classes, (sum(sizes),), generator=generator)
    target[torch.rand(len(target), generator=generator) < 0.2] = ignored
    whole = features.to(dtype), target
    return list(zip(*(tensor.split(sizes) for tensor in whole), strict=True)), whole


def _with_priors(classes, options):
    """The options, `priors` made into some of the classes."""
    options = dict(options)
    if options.pop("priors", False):
        prior = torch.arange(1.0, classes + 1)
        options["class_prior"] = prior / prior.sum()
    return options


def criterion_of(dtype, seed=1, classes=C, **options):
    options = _with_priors(classes, options)
    generator = torch.Generator().manual_seed(seed)
    criterion = NCMILoss(classes, M, dtype=dtype, **{"center_momentum": 0.5, **options})
    with torch.no_grad():
        criterion.centroid_logits.copy_(
            torch.randn(criterion.centroid_logits.shape, generator=generator, dtype=torch.float64)
        )
    return criterion


def with_group(criterion):
    criterion = copy.deepcopy(criterion)
    criterion.process_group = dist.group.WORLD
    return criterion


def sharded_pair(classes, dtype=torch.float32, **options):
    """A criterion whose centroids are shared out, and one that has them all."""
    plain = criterion_of(dtype, classes=classes, **{"ignore_index": IGNORED, **options})
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    options = {"dtype": dtype, "ignore_index": IGNORED, "center_momentum": 0.5, **_with_priors(classes, options)}
    sharded = ShardedNCMILoss(classes, M, device_mesh=mesh, **options)
    with torch.no_grad():
        own(sharded.centroid_logits).copy_(part(plain.centroid_logits))
    return sharded, plain


def pair(kind, classes, dtype=torch.float32, **options):
    """A criterion whose rows are shared out, or its centroids as well ("shards"); and one that has all."""
    if kind == "shards":
        return sharded_pair(classes, dtype, **options)
    plain = criterion_of(dtype, classes=classes, **{"ignore_index": IGNORED, **options})
    return with_group(plain), plain


def own(table):
    """What of a table this process has."""
    return table.detach().to_local() if isinstance(table, DTensor) else table.detach()


def part(whole):
    """The rows of a [C, M] tensor that this process has, where they are shared out."""
    rows = -(-len(whole) // dist.get_world_size())
    return whole.detach()[dist.get_rank() * rows :][:rows]


def close(actual, expected, tolerance):
    """A tensor of this process; or a table of which it may have a part."""
    if isinstance(actual, DTensor):
        actual, expected = own(actual), part(expected)
    assert actual.shape == expected.shape
    assert not len(expected) or relative(actual, expected) <= tolerance


def summed(grad):
    """The gradient of the centroids of all processes: those of shards are that already."""
    if not isinstance(grad, DTensor):
        dist.all_reduce(grad)
    return grad


def step(criterion, features, target, upstream=None):
    """The loss, its gradients by features and by centroids that are learnt."""
    features = features.detach().requires_grad_()
    loss = criterion(features, target)
    wanted = [features] + [p for p in criterion.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, wanted, torch.full_like(loss, 3.0) if upstream is None else upstream)
    return loss.detach(), *grads


def same_on_all(*tensors):
    """Whether every process has the same bits."""
    here = torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])
    every = [torch.empty_like(here) for _ in range(dist.get_world_size())]
    dist.all_gather(every, here)
    return all(torch.equal(here, other) for other in every)
