"""Fixed centroids: what is kept of them is never out of date."""

import copy

import pytest
import torch
from criteria import OPTIONS, C, M, batch, exactly, loss_and_grads
from torch import nn

from ncmi_kernels import CentroidSGD, NCMILoss, _plain, ncmi_loss

pytestmark = pytest.mark.filterwarnings("ignore::ncmi_kernels.DegenerateMinimumWarning")


EDITED = torch.randn(C, C, generator=torch.Generator().manual_seed(5))


def optimiser_step(optimizer=torch.optim.SGD, **options):
    def step(criterion):
        criterion.requires_grad_(True)
        with torch.enable_grad():
            criterion(*batch(3, columns=C)).backward()
        optimizer(criterion.parameters(), lr=100.0, **options).step()
        criterion.requires_grad_(False)

    return step


def inference_mode(criterion):
    with torch.inference_mode():
        criterion.centroid_logits.mul_(0.3)


def replace_data(criterion):
    criterion.centroid_logits.data = EDITED.clone()


def transpose_data(criterion):
    # Same address, shape and version: only the strides differ.
    criterion.centroid_logits.data = criterion.centroid_logits.data.t()


def replace_parameter(criterion):
    criterion.centroid_logits = nn.Parameter(EDITED.clone(), requires_grad=False)


def edit_in_float64_and_back(criterion):
    criterion.double().centroid_logits.mul_(0.3)
    criterion.float()


def set_option(name):
    return lambda criterion: setattr(criterion, name, OPTIONS[name])


def other_separation(criterion):
    pair = ("sample_to_centroid", "centroid_to_sample")
    criterion.separation = pair[criterion.separation == pair[0]]


def load(**options):
    return lambda criterion: criterion.load_state_dict(
        {**copy.deepcopy(criterion.state_dict()), "centroid_logits": EDITED.clone()}, **options
    )


EDITS = {
    "in place": lambda criterion: criterion.centroid_logits.mul_(0.3),
    "one element": lambda criterion: criterion.centroid_logits[1, 2].fill_(7.0),
    "copy_": lambda criterion: criterion.centroid_logits.copy_(EDITED),
    "nn.init": lambda criterion: nn.init.normal_(criterion.centroid_logits),
    "through detach": lambda criterion: criterion.centroid_logits.detach().copy_(EDITED),
    "load_state_dict": load(),
    "load_state_dict by assignment": load(assign=True),
    "replace .data": replace_data,
    "transpose .data": transpose_data,
    "replace the parameter": replace_parameter,
    "vector_to_parameters": lambda criterion: nn.utils.vector_to_parameters(
        EDITED.flatten(), [criterion.centroid_logits]
    ),
    "to float64": lambda criterion: criterion.to(torch.float64),
    "to float64 and back": edit_in_float64_and_back,
    "to bfloat16": lambda criterion: criterion.bfloat16(),
    "optimiser step": optimiser_step(),
    "optimiser step, for each": optimiser_step(foreach=True),
    "optimiser step, fused": optimiser_step(fused=True, momentum=0.9),
    "optimiser step, fused AdamW": optimiser_step(torch.optim.AdamW, fused=True),
    "CentroidSGD": lambda criterion: CentroidSGD(criterion, lr=100.0).step(*batch(3, columns=C)),
    "inference mode": inference_mode,
    "reset_parameters": lambda criterion: criterion.reset_parameters(),
    "separation": other_separation,
    "activation": set_option("activation"),
    "temperature": set_option("temperature"),
}


def fixed_criterion(**options):
    """A criterion with fixed centroids that has been used, so that its cache is filled."""
    criterion = NCMILoss(C, C, learn_centroids=False, **options)
    with torch.no_grad():
        criterion.centroid_logits.add_(torch.arange(C * C).view(C, C) / 10)  # not symmetric
    for seed in range(2):
        criterion(*batch(seed, columns=C))
    return criterion


def fresh_copy(criterion):
    names = ("temperature", "activation", "separation", "separation_focus")
    options = {name: getattr(criterion, name) for name in names}
    fresh = NCMILoss(C, C, learn_centroids=False, dtype=criterion.centroid_logits.dtype, **options)
    with torch.no_grad():
        fresh.centroid_logits.copy_(criterion.centroid_logits)
        fresh.center.copy_(criterion.center)
    return fresh


def check_against_a_copy(criterion):
    given = batch(4, columns=C)
    exactly(criterion(*given), copy.deepcopy(criterion)(*given))


def test_fixed_centroids_that_share_their_memory():
    """A vector that is changed in place and set as the parameters again, and another process's writing."""
    options = {"learn_centroids": False, "center_momentum": None}
    criterion = NCMILoss(C, C, **options)
    flat = nn.utils.parameters_to_vector(criterion.parameters()).detach().clone()
    for _ in range(3):
        flat += torch.randn(flat.shape)
        nn.utils.vector_to_parameters(flat, criterion.parameters())
        check_against_a_copy(criterion)
    criterion = NCMILoss(C, C, **options).share_memory()
    check_against_a_copy(criterion)
    # What another process does to shared memory, by another tensor of it.
    storage = criterion.centroid_logits.untyped_storage()
    other = torch.empty(0).set_(torch.UntypedStorage._new_shared_fd_cpu(*storage._share_fd_cpu_()))
    other += torch.randn(other.shape)
    check_against_a_copy(criterion)


@pytest.mark.parametrize("fused", [True, False])
def test_centroids_frozen_between_backward_pass_and_step(fused):
    criterion = NCMILoss(C, C, center_momentum=None)
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.5, fused=fused)
    criterion(*batch(3, columns=C)).backward()
    criterion.requires_grad_(False)
    check_against_a_copy(criterion)
    optimizer.step()
    check_against_a_copy(criterion)
    optimizer.zero_grad()
    check_against_a_copy(criterion)


@pytest.mark.parametrize("options", [{}, {"separation": "centroid_to_sample"}, {"separation_focus": 5.0}], ids=str)
@pytest.mark.parametrize("edit", EDITS)
def test_fixed_centroids_are_never_out_of_date(edit, options):
    criterion = fixed_criterion(**options)
    input, target = batch(4, columns=C)
    before = criterion.eval()(input, target)
    with torch.no_grad():
        EDITS[edit](criterion)
    fresh = fresh_copy(criterion).eval()
    for _ in range(2):
        actual = loss_and_grads(lambda x: criterion(x, target), input)
        assert actual[0].item() != before.item()
        exactly(actual, loss_and_grads(lambda x: fresh(x, target), input))


def test_fixed_centroids_given_for_one_call():
    criterion = fixed_criterion().eval()
    input, target = batch(4, columns=C)
    before = criterion(input, target)
    expected = ncmi_loss(input, target, EDITED, center=criterion.center, l2_normalize=True)
    for given in (EDITED, nn.Parameter(EDITED, requires_grad=False)):
        replaced = {"centroid_logits": given}
        exactly(torch.func.functional_call(criterion, replaced, (input, target)), expected)
        exactly(criterion(input, target), before)


def test_fixed_centroids_used_in_inference_mode_first():
    criterion, plain = (NCMILoss(C, C, learn_centroids=False) for _ in range(2))
    input, target = batch(columns=C)
    with torch.inference_mode():
        criterion(input, target)
    plain(input, target)
    exactly(
        loss_and_grads(lambda x: criterion(x, target), input),
        loss_and_grads(lambda x: plain(x, target), input),
    )


@pytest.fixture
def calls(monkeypatch):
    """The centroids of which statistics were computed, call by call."""
    seen, compute = [], _plain.table_of

    def counted(centroid_logits, *others):
        seen.append(centroid_logits)
        return compute(centroid_logits, *others)

    monkeypatch.setattr(_plain, "table_of", counted)
    return seen


@pytest.mark.parametrize("focus", [0.0, 5.0])
def test_fixed_centroids_are_computed_once(focus, calls):
    criterion = NCMILoss(C, M, learn_centroids=False, separation_focus=focus)
    for seed, training in enumerate((True, True, False)):
        input, target = batch(seed, size=3 + seed)
        criterion.training = training
        criterion(input.requires_grad_(), target).backward()
    assert len(calls) == 1
    with torch.no_grad():
        criterion.centroid_logits.mul_(0.5)
    for _ in range(2):
        criterion(*batch())
    assert len(calls) == 2


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_edits_that_no_version_counter_sees_count_from_the_next_train_or_eval_on(mode, calls):
    criterion = NCMILoss(C, M, learn_centroids=False, center_momentum=None)
    criterion(*batch())
    criterion.centroid_logits.data.copy_(torch.randn(C, M))
    actual = getattr(criterion, mode)()(*batch())
    assert len(calls) == 2
    fresh = NCMILoss(C, M, center_momentum=None)
    fresh.load_state_dict(criterion.state_dict())
    assert torch.equal(actual, fresh(*batch()))


def test_learnt_centroids_are_computed_every_time(calls):
    criterion = NCMILoss(C, M)
    for _ in range(2):
        criterion(*batch())
    assert len(calls) == 2
