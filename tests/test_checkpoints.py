"""What outlives a criterion: its state_dict, its copies and pickles."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed.checkpoint as checkpoint
from criteria import BACKENDS, C, M, batch, exactly
from torch import nn

from ncmi_kernels import NCMILoss

pytestmark = pytest.mark.filterwarnings("ignore::ncmi_kernels.DegenerateMinimumWarning")


def trained(steps=3, *, fitted=False, learnt=True, seed=0, **options):
    """A criterion with more classes than dimensions (random centroids), some steps into its training."""
    torch.manual_seed(seed)
    criterion = NCMILoss(C, 3, learn_centroids=learnt, center_momentum=0.9, weight=torch.ones(C), **options)
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.1)
    for step in range(steps):
        input, target = batch(step, columns=3)
        loss = criterion(input, target)
        if learnt:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    if fitted:
        criterion.fit_class_means([batch(seed + 1, 40, columns=3)])
    return criterion


def assert_same(criterion, other):
    """Same state, and the same loss to the bit, in evaluation and in the next training steps."""
    state, others = criterion.state_dict(), other.state_dict()
    assert state.keys() == others.keys()
    for name, tensor in state.items():
        exactly(others[name], tensor)
        assert others[name].data_ptr() != tensor.data_ptr()
    for seed, training in ((7, False), (8, True), (9, True)):
        input, target = batch(seed, columns=3)
        exactly(other.train(training)(input, target), criterion.train(training)(input, target))
        exactly(other.center, criterion.center)
        exactly(other.num_batches_tracked, criterion.num_batches_tracked)
    input, _ = batch(10, columns=3)
    for class_means in (False, True)[: 1 + bool(criterion.class_means.any())]:
        exactly(other.scores(input, class_means=class_means), criterion.scores(input, class_means=class_means))


@pytest.mark.parametrize("into", ["fresh", "trained", "fitted"])
@pytest.mark.parametrize("fitted", [True, False])
@pytest.mark.parametrize("learnt", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_state_dict_round_trip_during_training(backend, learnt, fitted, into):
    criterion = trained(fitted=fitted, learnt=learnt, backend=backend)
    file = io.BytesIO()
    torch.save(criterion.state_dict(), file)
    file.seek(0)
    steps = 0 if into == "fresh" else 2
    other = trained(steps, fitted=into == "fitted", learnt=learnt, seed=1, backend=backend)
    assert not torch.equal(other.centroid_logits, criterion.centroid_logits)
    keys = other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert keys.missing_keys == keys.unexpected_keys == []
    assert bool(other.class_means.any()) == fitted
    assert_same(criterion, other)


def test_state_dict_of_a_model_that_holds_the_criterion():
    def model(seed, **options):
        return nn.ModuleDict({"net": nn.Linear(2, 3), "criterion": trained(seed=seed, **options)})

    for fitted, into in ((True, False), (False, True)):
        first, second = model(0, fitted=fitted), model(1, fitted=into)
        assert bool(first.state_dict()["criterion.class_means"].any()) == fitted
        second.load_state_dict(first.state_dict(), strict=True)
        assert_same(first["criterion"], second["criterion"])


def test_state_dict_with_a_key_missing_or_too_many_is_refused():
    state = trained().state_dict()
    with pytest.raises(RuntimeError, match="center"):
        trained().load_state_dict({name: tensor for name, tensor in state.items() if name != "center"})
    with pytest.raises(RuntimeError, match="another"):
        trained().load_state_dict({**state, "another": torch.zeros(1)})


@pytest.mark.parametrize("fitted", [True, False])
def test_loading_keeps_the_dtype_of_the_module(fitted):
    other = trained().double()
    if fitted:
        other.fit_class_means([batch(columns=3)])
    criterion = trained(fitted=True)
    other.load_state_dict(criterion.state_dict())
    assert {t.dtype for t in other.state_dict().values()} == {torch.float64, torch.int64}
    exactly(other.class_means, criterion.class_means.double())


def test_class_means_stay_where_nothing_is_said_of_them():
    model = nn.ModuleDict({"net": nn.Linear(2, 3), "criterion": trained(fitted=True)})
    before = model["criterion"].class_means.clone()
    net = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("net")}
    missing = model.load_state_dict(net, strict=False).missing_keys
    assert "criterion.class_means" in missing
    exactly(model["criterion"].class_means, before)
    with pytest.raises(RuntimeError, match="class_means"):
        model.load_state_dict({name: t for name, t in model.state_dict().items() if "class_means" not in name})


@pytest.mark.parametrize("fitted", [True, False])
def test_class_means_that_do_not_fit_are_refused(fitted):
    criterion = trained(fitted=fitted)
    before = criterion.class_means.clone()
    other = NCMILoss(C + 1, 3)
    other.fit_class_means([(torch.randn(20, 3), torch.arange(20) % C)])
    shape = {**criterion.state_dict(), "class_means": torch.rand(3, 2)}
    for state in (other.state_dict(), shape):
        with pytest.raises(RuntimeError, match="size mismatch for class_means"):
            criterion.load_state_dict(state)
        exactly(criterion.class_means, before)
    criterion.class_means = torch.rand(3, 2)
    with pytest.raises(ValueError, match=r"class_means: got shape \(3, 2\), expected \(4, 3\)"):
        criterion.predict(torch.randn(2, 3), class_means=True)


def test_state_dict_from_before_there_were_temperatures():
    criterion, other = trained(fitted=True), trained(seed=1)
    for each in (criterion, other):
        each.fit_temperature(*batch(columns=3))
    state = {name: value for name, value in criterion.state_dict().items() if name != "scores_temperature"}
    nn.ModuleDict({"criterion": other}).load_state_dict({f"criterion.{name}": value for name, value in state.items()})
    exactly(other.scores_temperature, torch.zeros(2))
    assert "scores_temperature" not in state
    with pytest.raises(RuntimeError, match="temperature: not fitted yet"):
        other.probabilities(batch(columns=3)[0])


def test_class_means_fitted_in_inference_mode_are_an_ordinary_buffer():
    criterion = NCMILoss(C, M)
    with torch.inference_mode():
        criterion.fit_class_means([batch()])
    assert not criterion.class_means.is_inference()
    before = criterion.class_means.clone()
    assert torch.equal(criterion.class_means.mul_(0.5), before / 2)


def test_a_new_criterion_takes_class_means_from_a_distributed_checkpoint(tmp_path):
    saved = trained(fitted=True)
    checkpoint.save({"criterion": saved.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    for new in (trained(seed=1), trained(seed=1, fitted=True)):
        state = {"criterion": new.state_dict()}
        checkpoint.load(state, checkpoint_id=tmp_path, no_dist=True)
        new.load_state_dict(state["criterion"])
        assert_same(new, copy.deepcopy(saved))


def test_state_dict_is_loaded_by_assignment():
    criterion, other = trained(fitted=True, learnt=False), trained(0, seed=1, learnt=False)
    other(*batch(columns=3))
    other.load_state_dict(copy.deepcopy(criterion.state_dict()), assign=True)
    assert_same(criterion, other)


def through_file(criterion):
    file = io.BytesIO()
    torch.save(criterion, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda criterion: pickle.loads(pickle.dumps(criterion)),
    "torch.save": through_file,
}


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("fitted", [True, False])
@pytest.mark.parametrize("learnt", [True, False])
def test_copies(learnt, fitted, name):
    criterion = trained(fitted=fitted, learnt=learnt, separation="centroid_to_sample")
    other = COPIES[name](criterion)
    assert other._table._key is None
    assert repr(other) == repr(criterion)
    assert other.centroid_logits.requires_grad == learnt
    assert_same(criterion, other)
    # Neither follows what happens to the other.
    input, target = batch(columns=3)
    before = criterion.eval()(input, target)
    with torch.no_grad():
        other.centroid_logits.neg_()
    other.temperature = 0.1
    exactly(criterion(input, target), before)
    assert not torch.equal(other.eval()(input, target), before)
