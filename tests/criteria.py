"""A small criterion: batches for it, what it gives, and training steps of a network with it."""

import copy

import torch
from torch import nn

from ncmi_kernels import NCMILoss

B, C, M = 7, 4, 6
BACKENDS = ("cpu", "reference")
OPTIONS = {
    "temperature": 0.5,
    "l2_normalize": False,
    "activation": "softmax",
    "separation": "centroid_to_sample",
    "ratio": "sample",
    "ignore_index": 2,
    "eps": 0.1,
}
CRITERIA = {
    "batch": {},
    "sample": {"ratio": "sample"},
    "focus": {"separation_focus": 5.0},
    "several": {"centroids_per_class": 2, "class_prior": torch.tensor([0.4, 0.3, 0.2, 0.1])},
    "fixed": {"learn_centroids": False},
    "reference": {"backend": "reference"},
}


def batch(seed=0, size=B, columns=M, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    input = torch.randn(size, columns, generator=generator) + torch.arange(columns) / columns
    return input.to(dtype), torch.randint(C, (size,), generator=generator)


def exactly(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def loss_and_grads(function, input, *parameters):
    """function(input), and its gradients by the input and by the parameters that require one."""
    input = input.detach().requires_grad_()
    loss = function(input)
    wanted = [input, *(p for p in parameters if p.requires_grad)]
    return loss.detach(), *torch.autograd.grad(loss.sum(), wanted)


def distribution(features, criterion):
    """p of the features in float64, from the definition."""
    x = features.double() - criterion.center.double()
    if criterion.l2_normalize:
        x = x / x.norm(dim=1, keepdim=True)
    return activated(x / criterion.temperature, criterion)


def activated(x, criterion):
    value = x.double().exp() if criterion.activation == "softmax" else x.double().sigmoid()
    return value / value.sum(dim=1, keepdim=True)


def step_pair(ratio, learnt, rate=0.5, **options):
    """A network, a criterion, and an optimiser of both; twice the same."""
    network = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, M))
    options = {"ratio": ratio, "learn_centroids": learnt, "center_momentum": 0.5, **options}
    criterion = NCMILoss(C, M, **options)
    pair = []
    for _ in range(2):
        modules = nn.ModuleList(copy.deepcopy([network, criterion]))
        wanted = [p for p in modules.parameters() if p.requires_grad]
        pair.append((*modules, wanted, torch.optim.SGD(wanted, lr=rate, momentum=0.9)))
    return pair
