"""Prediction: scores, classes, and the means of the classes."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from criteria import C, M, activated, batch, distribution, exactly

from ncmi_kernels import NCMILoss

pytestmark = pytest.mark.filterwarnings("ignore::ncmi_kernels.DegenerateMinimumWarning")


def negative_divergences(p, q):
    """- KL(p_i || q_c) in float64 [B, C], from the definition."""
    p, q = p[:, None], q[None]
    return -(p * (p.log() - q.log())).sum(dim=2)


PREDICTED = {
    "defaults": {},
    "no l2": {"l2_normalize": False},
    "softmax": {"activation": "softmax", "temperature": 0.2},
    "float64": {"dtype": torch.float64},
    "no centre": {"center_momentum": None},
}


def predicting(options, classes=C, columns=M, size=64):
    """A criterion with random centroids and class means, and features."""
    generator = torch.Generator().manual_seed(0)
    criterion = NCMILoss(classes, columns, **options)
    dtype = criterion.center.dtype
    with torch.no_grad():
        criterion.centroid_logits.add_(torch.randn(classes, columns, generator=generator))
    features = torch.randn(size, columns, generator=generator, dtype=torch.float64).to(dtype)
    criterion(features, torch.arange(size) % classes)
    criterion.fit_class_means([(features, torch.arange(size) % classes)])
    return criterion, features + 0.1


@pytest.mark.parametrize("class_means", [False, True])
@pytest.mark.parametrize("name", PREDICTED)
def test_scores_and_predictions_against_the_definition(name, class_means):
    criterion, features = predicting(PREDICTED[name])
    p = distribution(features, criterion)
    q = criterion.class_means.double() if class_means else activated(criterion.centroid_logits.detach(), criterion)
    divergences = negative_divergences(p, q)
    scores = criterion.scores(features, class_means=class_means)
    assert (scores.shape, scores.dtype) == ((64, C), features.dtype)
    assert not scores.requires_grad
    entropy = (p * p.log()).sum(dim=1, keepdim=True)
    expected = divergences + entropy
    assert (scores.double() - expected).abs().max() <= 1e-6 * expected.abs().max()
    predicted = criterion.predict(features, class_means=class_means)
    exactly(predicted, divergences.argmax(dim=1))
    exactly(predicted, scores.argmax(dim=1))
    assert len(predicted.unique()) > 1


@pytest.mark.parametrize("class_means", [False, True])
def test_predictions_where_all_classes_are_nearly_as_likely(class_means):
    # With many features of length one, p and q differ by a percent, and the scores of two classes by 1e-4.
    criterion, features = predicting({}, classes=50, columns=512, size=500)
    q = criterion.class_means.double() if class_means else activated(criterion.centroid_logits.detach(), criterion)
    divergences = negative_divergences(distribution(features, criterion), q)
    exactly(criterion.predict(features, class_means=class_means), divergences.argmax(dim=1))


@pytest.mark.parametrize("class_means", [True, False])
def test_predictions_of_any_shape_that_the_loss_takes(class_means):
    criterion = NCMILoss(C, M)
    image, classes = torch.randn(3, M, 2, 4), torch.randint(C, (3, 2, 4))
    rows = image.movedim(1, -1).reshape(-1, M)
    exactly(criterion.fit_class_means([(image, classes)]), NCMILoss(C, M).fit_class_means([(rows, classes.flatten())]))
    criterion.fit_class_means([(image, classes), (rows[0], classes[0, 0, 0])])
    scores, predicted = (function(rows, class_means=class_means) for function in (criterion.scores, criterion.predict))
    exactly(criterion.scores(image, class_means=class_means).movedim(1, -1).reshape(-1, C), scores)
    exactly(criterion.predict(image, class_means=class_means), predicted.view(3, 2, 4))
    torch.testing.assert_close(criterion.scores(rows[0], class_means=class_means), scores[0])
    exactly(criterion.predict(rows[0], class_means=class_means), predicted[0])
    assert criterion.scores(image[:0], class_means=class_means).shape == (0, C, 2, 4)


@pytest.mark.parametrize("scale", [1e20, 1e30, 1e37])
def test_the_length_of_huge_features_drops_out(scale):
    criterion = NCMILoss(C, M, center_momentum=None)
    features, target = torch.randn(30, M), torch.randint(C, (30,))
    exactly(criterion.predict(scale * features), criterion.predict(features))
    expected = criterion.fit_class_means([(features, target)]).clone()
    torch.testing.assert_close(criterion.fit_class_means([(scale * features, target)]), expected)


@pytest.mark.parametrize("training", [True, False])
def test_prediction_leaves_the_state_alone(training):
    criterion, features = predicting({})
    criterion.train(training)
    before = copy.deepcopy(criterion.state_dict())
    criterion.predict(features)
    criterion.scores(features)
    exactly(criterion.predict(features[:0]), torch.zeros(0, dtype=torch.int64))
    criterion.fit_class_means([(features - 0.1, torch.arange(64) % C)])
    exactly(dict(criterion.state_dict()), dict(before))


def test_class_means_are_the_direct_means():
    criterion, _ = predicting({"ignore_index": 1})
    features, target = batch(1, 50)
    p = distribution(features, criterion)
    expected = torch.stack([p[target == c].mean(dim=0) if c != 1 else torch.zeros(M).double() for c in range(C)])
    whole = criterion.fit_class_means([(features, target)])
    assert whole is criterion.class_means
    torch.testing.assert_close(whole.double(), expected, rtol=1e-6, atol=0)
    sizes = (1, 20, 0, 3, 26)
    streamed = criterion.fit_class_means(pair for pair in zip(features.split(sizes), target.split(sizes), strict=True))
    torch.testing.assert_close(streamed.double(), expected, rtol=1e-6, atol=0)


def test_class_means_of_samples_that_are_ignored_or_not_there():
    criterion = NCMILoss(C, M)
    features, target = batch(1, 50)
    target[target == 2] = -100
    features[target == -100] = torch.nan
    means = criterion.fit_class_means([(features, target)])
    assert means.isfinite().all()
    exactly(means[2], torch.zeros(M))
    present = [0, 1, 3]
    torch.testing.assert_close(means[present].sum(dim=1), torch.ones(3))
    features, _ = batch(2, 50)
    scores = criterion.scores(features, class_means=True)
    exactly(scores[:, 2], torch.full((50,), -torch.inf))
    assert scores[:, present].isfinite().all()
    predicted = criterion.predict(features, class_means=True)
    exactly(predicted, scores.argmax(dim=1))
    assert set(predicted.tolist()) == set(present)


@pytest.mark.parametrize("activation", ["nsf", "softmax"])
def test_missing_class_is_not_predicted_where_a_probability_underflows(activation):
    criterion = NCMILoss(C, M, l2_normalize=False, center_momentum=None, activation=activation)
    features, _ = batch(1, 9)
    criterion.fit_class_means([(features, torch.arange(9) % 3)])
    features[:, 0] = -200.0
    scores = criterion.scores(features, class_means=True)
    exactly(scores[:, 3], torch.full((9,), -torch.inf))
    assert scores[:, :3].isfinite().all()
    exactly(criterion.predict(features, class_means=True), scores.argmax(dim=1))


def test_class_means_fitted_again():
    criterion, features = predicting({})
    first = criterion.class_means.clone()
    other, target = batch(3, 40)
    criterion.fit_class_means([(other, target)])
    fresh = copy.deepcopy(criterion)
    fresh.reset_parameters()
    fresh.center.copy_(criterion.center)
    fresh.fit_class_means([(other, target)])
    assert not torch.equal(criterion.class_means, first)
    exactly(criterion.class_means, fresh.class_means)
    exactly(criterion.scores(features, class_means=True), fresh.scores(features, class_means=True))


def likelihood(scores, target, temperature):
    return -F.cross_entropy(scores.double() / temperature, target).item()


@pytest.mark.parametrize("class_means", [False, True])
def test_a_temperature_makes_the_targets_likeliest(class_means):
    criterion = NCMILoss(C, M, dtype=torch.float64)
    features, target = batch(1, 400, dtype=torch.float64)
    features[torch.arange(400), target] += 1.0
    criterion.fit_class_means([(features, target)])
    features, target = batch(2, 400, dtype=torch.float64)
    features[torch.arange(400), target] += 1.0
    scores = criterion.scores(features, class_means=class_means)
    with pytest.raises(RuntimeError, match=rf"temperature: not fitted yet.*fit_temperature\(class_means={class_means}"):
        criterion.probabilities(features, class_means=class_means)
    ignored = torch.cat([features, features[:9] * torch.nan]), torch.cat([target, target[:9] * 0 - 100])
    temperature = criterion.fit_temperature(*ignored, class_means=class_means).item()
    best = likelihood(scores, target, temperature)
    assert best > likelihood(scores, target, temperature * 1.01)
    assert best > likelihood(scores, target, temperature / 1.01)
    assert best > -math.log(C) + 0.1 > likelihood(scores, target, 1.0)  # scores alone say next to nothing
    p = criterion.probabilities(features, class_means=class_means)
    torch.testing.assert_close(p, (scores / temperature).softmax(dim=1))
    exactly(p.argmax(dim=1), criterion.predict(features, class_means=class_means))
    # Calibrated: as sure as it is right.
    right = (p.argmax(dim=1) == target).double().mean()
    assert (p.amax(dim=1).mean() - right).abs() < 0.05
    with pytest.raises(RuntimeError, match="not fitted yet"):
        criterion.probabilities(features, class_means=not class_means)


def test_probabilities_of_any_shape_and_of_a_class_without_a_mean():
    criterion = NCMILoss(C, M)
    features, target = batch(1, 24)
    criterion.fit_class_means([(features, target % 3)])
    criterion.fit_temperature(features, target, class_means=True)
    p = criterion.probabilities(features, class_means=True)
    exactly(p[:, 3], torch.zeros(24))
    torch.testing.assert_close(p.sum(dim=1), torch.ones(24))
    pixels = features.view(4, 6, M).movedim(-1, 1)
    exactly(criterion.probabilities(pixels, class_means=True), p.view(4, 6, C).movedim(-1, 1))
    torch.testing.assert_close(criterion.probabilities(features[0], class_means=True), p[0])


def test_a_class_without_a_mean_has_no_part_in_the_temperature():
    classes = 40
    few, all_of = NCMILoss(4, M, dtype=torch.float64), NCMILoss(classes, M, dtype=torch.float64)
    features, target = batch(1, 200, dtype=torch.float64)
    few.fit_class_means([(features, target)])
    all_of.fit_class_means([(features, target)])
    others = torch.cat([features, features[:9]]), torch.cat([target, torch.full((9,), classes - 1)])
    expected = few.fit_temperature(features, target, class_means=True)
    torch.testing.assert_close(all_of.fit_temperature(*others, class_means=True), expected)
    with pytest.raises(ValueError, match="target: got no sample that counts"):
        all_of.fit_temperature(features[:1], torch.tensor([9]), class_means=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_temperature_of_several_centroids_a_class(dtype):
    criterion = NCMILoss(C, M, centroids_per_class=2, dtype=dtype)
    features, target = batch(3, 200, dtype=dtype)
    temperature = criterion.fit_temperature(features, target).float()
    p = criterion.probabilities(features).float()
    torch.testing.assert_close(p.sum(dim=1), torch.ones(200), rtol=0, atol=0.02 if dtype == torch.bfloat16 else 1e-6)
    exactly(p.argmax(dim=1), criterion.predict(features))
    assert temperature > 0


def test_temperatures_that_are_not_kept():
    criterion = NCMILoss(C, M)
    features, target = batch(1, 24)
    criterion.fit_class_means([(features, target)])
    criterion.fit_temperature(features, target, class_means=True)
    criterion.fit_class_means([(2 * features, target)])
    with pytest.raises(RuntimeError, match="temperature: not fitted yet"):
        criterion.probabilities(features, class_means=True)
    with pytest.raises(ValueError, match="features: got a number that is not finite"):
        criterion.fit_temperature(features.fill_(torch.inf), target)
    half = NCMILoss(C, 20000, dtype=torch.float16)
    with pytest.raises(RuntimeError, match=r"temperature: got .*, which torch.float16 cannot hold"):
        half.fit_temperature(5 * torch.eye(C, 20000, dtype=torch.float16), torch.arange(C))  # the lowest there is


def test_a_state_dict_of_before_there_were_temperatures():
    criterion = NCMILoss(C, M)
    old = {name: value for name, value in criterion.state_dict().items() if name != "scores_temperature"}
    fresh = NCMILoss(C, M, device="meta")
    fresh.load_state_dict(old, assign=True)
    assert not fresh.scores_temperature.is_meta
    exactly(fresh.class_means, torch.zeros(C, M))


def test_temperatures_at_the_ends():
    criterion = NCMILoss(C, M)
    features = 5 * torch.eye(M)[:C]
    assert criterion.fit_temperature(features, torch.arange(C)) > 0  # every sample right
    torch.testing.assert_close(criterion.probabilities(features), torch.eye(C))
    with pytest.raises(ValueError, match="target: got no sample that counts"):
        criterion.fit_temperature(features, torch.full((C,), -100))
    alike = torch.ones(C, M)
    criterion.fit_temperature(alike, torch.arange(C))
    p = criterion.probabilities(alike)
    assert (p - 1 / C).abs().max() < 2 * math.exp(-7) / C * (C - 1)  # at the highest temperature
