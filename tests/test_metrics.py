"""NCMIMetric against the two-pass definition, in more precision than its own; and as a metric of torchmetrics."""

import copy
import csv
import math
import pickle
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

if find_spec("torchmetrics") is None:
    pytest.skip("NCMIMetric needs torchmetrics", allow_module_level=True)

from torchmetrics import MetricCollection, MetricTracker
from torchmetrics.classification import MulticlassAccuracy

from ncmi_kernels.metrics import NCMIMetric

SEPARATIONS = ("sample_to_centroid", "centroid_to_sample")
NAMES = ("cmi", "gamma", "ncmi")
PRIOR = torch.tensor([0.5, 0.25, 0.1875, 0.0625], dtype=torch.float64)
extended = np.longdouble  # 64 bits of mantissa on x86; as double elsewhere


def two_pass(features, target, options, classes=None):
    """CMI, Gamma, NCMI as they are defined: the class means, then the divergences from them."""
    x, y = features.double().numpy().astype(extended), target.numpy()
    if options.get("center") is not None:
        x = x - options["center"].double().numpy().astype(extended)
    if options.get("l2_normalize"):
        x = x / np.sqrt((x * x).sum(axis=1, keepdims=True))
    x = x / extended(options.get("temperature", 1.0))
    if options.get("activation") != "softmax":
        x = np.minimum(x, 0) - np.log1p(np.exp(-abs(x)))
    x = x - x.max(axis=1, keepdims=True)
    log_p = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    classes = classes or len(np.unique(y))
    s = np.stack([p[y == c].mean(axis=0) for c in range(classes)])
    from_samples = (p * log_p).sum(axis=1, keepdims=True) - p @ np.log(s).T  # KL(p_i || s_v)
    own = np.arange(len(y)), y
    divergence = from_samples
    if options.get("separation") == "centroid_to_sample":
        divergence = (s * np.log(s)).sum(axis=1) - log_p @ s.T  # KL(s_v || p_i)
    cmi = from_samples[own].mean()
    prior = np.full(classes, 1 / extended(classes))
    if options.get("class_prior") is not None:
        prior = options["class_prior"].numpy().astype(extended)
    gamma = (divergence @ prior - prior[y] * divergence[own]).mean()
    return cmi, gamma, cmi / gamma


def samples(size, classes, columns, scale, noise, dtype=torch.float64):
    target = torch.randint(classes, (size,))
    target[:classes] = torch.arange(classes)
    features = scale * F.one_hot(target, columns) + noise * torch.randn(size, columns, dtype=dtype)
    return features.to(dtype), target


def measured(metric, features, target, batch_size=100):
    for batch in zip(features.split(batch_size), target.split(batch_size), strict=True):
        metric.update(*batch)
    return metric.compute()


def assert_close(result, expected, tolerance=1e-10):
    assert tuple(result) == NAMES
    for value, exact in zip(result.values(), expected, strict=True):
        assert value.dtype == torch.float64
        assert value.shape == ()
        assert abs(extended(value.item()) / exact - 1) < tolerance


@pytest.fixture(params=SEPARATIONS)
def separation(request):
    return request.param


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# How the samples are made, the options, and what CMI is then. That it is so far below the entropies, of order log M, is
# what a difference of sums of p log p loses: it fails the last two.
REGIMES = {
    "authors": ((2000, 100, 512, 1, 0.02), {"l2_normalize": True, "temperature": 1.0}, 4e-5),
    "authors, tau 0.2": ((2000, 100, 512, 1, 0.02), {"l2_normalize": True, "temperature": 0.2}, 1e-3),
    "many samples": ((100_000, 10, 32, 1, 0.05), {}, 3e-4),
    "untrained": ((1000, 10, 32, 0.01, 0.01), {}, 1.2e-5),
    "broad": ((1000, 7, 20, 3, 3), {"temperature": 0.7}, 0.3),
    "softmax": ((1000, 10, 10, 10, 0.5), {"activation": "softmax"}, 1e-4),
    "softmax, sure": ((1000, 10, 10, 20, 0.5), {"activation": "softmax"}, 5e-9),
    "softmax, smoothed": ((1000, 10, 10, 5, 0.01), {"activation": "softmax"}, 5e-6),
    "priors": ((1000, 4, 10, 20, 0.5), {"activation": "softmax", "class_prior": PRIOR}, 5e-9),
}


@pytest.mark.parametrize("regime", REGIMES)
def test_is_the_two_pass_definition(regime, separation):
    sizes, options, about = REGIMES[regime]
    features, target = samples(*sizes)
    options = {**options, "separation": separation}
    expected = two_pass(features, target, options)
    assert about / 2 < expected[0] < 2 * about
    result = measured(NCMIMetric(sizes[1], sizes[2], **options), features, target, 1000)
    assert_close(result, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_centre_and_dtypes(separation, dtype):
    """Every dtype is measured in float64, as it is, under autocast too."""
    features, target = samples(300, 5, 8, 2, 1, torch.float64)
    features = features.to(dtype)
    center = features.float().mean(dim=0) + 1
    options = {"separation": separation, "center": center, "l2_normalize": True}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = measured(NCMIMetric(5, 8, **options), features, target)
    assert_close(result, two_pass(features, target, options))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
@pytest.mark.parametrize("shape", [(8,), (3, 8, 4), (2, 8, 3, 5), (0, 8, 3)])
def test_shapes_and_targets_of_the_loss(separation, shape, dtype):
    features = torch.randn(shape)
    rows = features.movedim(1, -1).reshape(-1, 8) if len(shape) > 1 else features[None]
    target = torch.randint(5, (len(rows),))
    target[1:2] = 255
    metric, by_rows = (NCMIMetric(5, 8, separation=separation, ignore_index=255) for _ in range(2))
    metric.update(features, target.to(dtype).view(shape[:1] + shape[2:] if len(shape) > 1 else ()))
    by_rows.update(rows, target)
    torch.testing.assert_close(metric.metric_state, by_rows.metric_state, rtol=0, atol=0, equal_nan=True)


def test_feature_dim_is_the_number_of_classes_unless_given():
    metric = NCMIMetric(5)
    assert (metric.num_classes, metric.feature_dim) == (5, 5)
    assert NCMIMetric(5, 3).feature_dim == 3


def test_batches_do_not_matter(separation):
    """One sample at a time, sorted by class, all at once, in batches of none."""
    features, target = samples(200, 6, 9, 1, 0.5)
    expected = two_pass(features, target, {"separation": separation})
    order = target.argsort()
    for batch_size, x, y in ((1, features, target), (7, features[order], target[order]), (200, features, target)):
        metric = NCMIMetric(6, 9, separation=separation)
        metric.update(features[:0], target[:0])
        assert_close(measured(metric, x, y, batch_size), expected, 1e-12)


def test_classes_without_samples_do_not_count(separation):
    """As if num_classes were the number of those that have some."""
    features, target = samples(200, 4, 9, 1, 0.5)
    classes = torch.tensor([1, 3, 4, 8])
    metric = NCMIMetric(10, 9, separation=separation)
    result = measured(metric, features, classes[target])
    assert_close(result, two_pass(features, target, {"separation": separation}))
    # They count from their first sample on.
    more, others = samples(200, 6, 9, 1, 0.5)
    result = measured(metric, more, torch.tensor([0, 2, 5, 6, 7, 9])[others])
    both = torch.cat([classes[target], torch.tensor([0, 2, 5, 6, 7, 9])[others]])
    assert_close(result, two_pass(torch.cat([features, more]), both, {"separation": separation}))


def test_one_class_alone(separation):
    features = torch.randn(50, 4)
    target = torch.full((50,), 2)
    result = measured(NCMIMetric(3, 4, separation=separation), features, target)
    p = features.double().sigmoid() / features.double().sigmoid().sum(dim=1, keepdim=True)
    assert result["cmi"].item() == pytest.approx((p * (p / p.mean(dim=0)).log()).sum(dim=1).mean().item(), rel=1e-10)
    assert result["gamma"] == 0
    assert result["ncmi"] == torch.inf


def test_classes_that_do_not_count(separation):
    """Where none of the classes with samples has a prior, nothing is to be separated from."""
    features, target = samples(40, 2, 9, 1, 0.5)
    prior = torch.tensor([0, 0, 0.75, 0.25])
    result = measured(NCMIMetric(4, 9, separation=separation, class_prior=prior), features, target)
    assert (result["gamma"], result["ncmi"]) == (0, math.inf)
    assert_close({**result, "gamma": result["cmi"], "ncmi": result["cmi"]}, 3 * [two_pass(features, target, {})[0]])


def test_without_a_sample_everything_is_nan(separation):
    metric = NCMIMetric(3, 4, separation=separation)
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert all(value.isnan() for value in metric.compute().values())
    metric.update(torch.randn(2, 4), torch.tensor([-100, -100]))
    result = metric.compute()
    assert tuple(result) == NAMES
    assert all(value.isnan() for value in result.values())


def test_ignored_samples(separation):
    features, target = samples(300, 5, 8, 2, 1)
    expected = two_pass(features[100:], target[100:], {"separation": separation})
    target[:100] = 255
    features[:50] = torch.nan
    metric = NCMIMetric(5, 8, separation=separation, ignore_index=255)
    order = torch.randperm(300)
    assert_close(measured(metric, features[order], target[order]), expected)


def test_nan_is_not_hidden(separation):
    features, target = samples(100, 5, 8, 2, 1)
    features[17, 3] = torch.inf
    result = measured(NCMIMetric(5, 8, separation=separation), features, target)
    assert all(value.isnan() for value in result.values())


def test_probabilities_that_underflow(separation):
    """Finite, and close to the definition as far as that is: the logarithm stops at that of the smallest normal."""
    features, target = samples(100, 3, 3, 800, 0.1)
    result = measured(NCMIMetric(3, activation="softmax", separation=separation), features, target)
    _, gamma, _ = two_pass(features, target, {"separation": separation, "activation": "softmax"})
    assert result["cmi"] == 0
    assert 0.85 < result["gamma"].item() / gamma < 1 + 1e-10


# ------------------------------------------------------------------------------------------------------------
# As a metric.
# ------------------------------------------------------------------------------------------------------------


def batches(separation, count=4):
    features, target = samples(80 * count, 5, 8, 1, 0.3)
    expected = two_pass(features, target, {"separation": separation})
    return list(zip(features.split(80), target.split(80), strict=True)), expected


def test_forward_gives_the_batch_and_keeps_the_whole(separation):
    parts, expected = batches(separation)
    metric = NCMIMetric(5, 8, separation=separation)
    for features, target in parts:
        value = metric(features.requires_grad_(), target)
        assert_close(value, two_pass(features.detach(), target, {"separation": separation}))
        assert not value["ncmi"].requires_grad
    assert_close(metric.compute(), expected)


def test_reset(separation):
    parts, expected = batches(separation)
    metric = NCMIMetric(5, 8, separation=separation)
    metric.update(torch.full((1, 8), torch.nan, dtype=torch.float64), torch.tensor([0]))
    assert metric.compute()["cmi"].isnan()
    metric.reset()
    for part in parts:
        metric.update(*part)
    assert_close(metric.compute(), expected)


COPIES = {
    "clone": lambda metric: metric.clone(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda metric: pickle.loads(pickle.dumps(metric)),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_go_on_by_themselves(name, separation):
    parts, _ = batches(separation)
    center = torch.randn(8)
    metric = NCMIMetric(5, 8, separation=separation, center=center)
    metric.update(*parts[0])
    twin = COPIES[name](metric)
    before = metric.compute()
    for part in parts[1:]:
        twin.update(*part)
    expected = two_pass(*map(torch.cat, zip(*parts, strict=True)), {"separation": separation, "center": center})
    assert_close(twin.compute(), expected)
    metric.update(*parts[0])
    metric.reset()
    metric.update(*parts[0])
    assert metric.compute() == before


def test_merge_state(separation):
    """Metrics of parts of the data, merged."""
    parts, expected = batches(separation)
    first, second = (NCMIMetric(5, 8, separation=separation) for _ in range(2))
    first.update(*parts[0])
    for part in parts[1:]:
        second.update(*part)
    first.merge_state(second)
    assert_close(first.compute(), expected)


def test_state_dict(separation):
    """Persistent on request, as of every metric; the centre is a setting and not in it."""
    parts, expected = batches(separation)
    metric = NCMIMetric(5, 8, separation=separation, center=torch.zeros(8))
    for part in parts:
        metric.update(*part)
    assert metric.state_dict() == {}
    metric.persistent(True)
    other = NCMIMetric(5, 8, separation=separation)
    other.persistent(True)
    other.load_state_dict(metric.state_dict())
    other.update(parts[0][0][:0], parts[0][1][:0])
    assert_close(other.compute(), expected)


def test_collection():
    """Several settings and an accuracy on one stream, each as if alone."""
    features, target = samples(300, 5, 5, 1, 0.3)
    options = {
        "default": {},
        "other": {"separation": "centroid_to_sample"},
        "centred": {"center": torch.full((5,), 0.3)},
        "softmax": {"activation": "softmax"},
    }
    metrics = {name: NCMIMetric(5, **each) for name, each in options.items()}
    collection = MetricCollection({"accuracy": MulticlassAccuracy(5, average="micro"), **metrics})
    for batch in zip(features.split(100), target.split(100), strict=True):
        collection.update(*batch)
    result = collection.compute()
    assert result["accuracy"] == pytest.approx((features.argmax(dim=1) == target).double().mean().item())
    for name, each in options.items():
        assert_close({key: result[f"{name}_{key}"] for key in NAMES}, two_pass(features, target, each))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"ignore_index": 0}),
        ({"ignore_index": 255}, {"ignore_index": 256}),
        ({}, {"temperature": 1.000001}),
        ({}, {"activation": "softmax"}),
        ({}, {"l2_normalize": True}),
        ({}, {"separation": "centroid_to_sample"}),
        ({}, {"center": torch.zeros(8)}),
        ({"center": torch.zeros(8)}, {"center": torch.zeros(8)}),
    ],
)
def test_collection_keeps_apart_what_begins_alike(one, other):
    """Of a first batch without a sample all states are the same. Centres move later, as criterion.center does."""
    features, target = samples(100, 5, 8, 1, 0.3)
    collection = MetricCollection({"one": NCMIMetric(5, 8, **one), "other": NCMIMetric(5, 8, **other)})
    collection.update(features[:0], target[:0])
    assert len(collection.compute_groups) == 2
    if "center" in other:
        other = {"center": torch.full((8,), 0.3)}
        collection["other"].center.copy_(other["center"])
    for _ in range(2):
        collection.reset()
        collection.update(features, target)
        result = collection.compute()
        for name, options in (("one", one), ("other", other)):
            assert measured(NCMIMetric(5, 8, **options), features, target) == {
                key: result[f"{name}_{key}"] for key in NAMES
            }


def test_state_stays_double(separation):
    """A model that holds the metric is cast; the metric moves, and measures as before."""
    parts, _ = batches(separation)
    center = torch.randn(8, dtype=torch.float64)
    model = nn.Module()
    model.metric = NCMIMetric(5, 8, separation=separation, center=center)
    model.metric.update(*parts[0])
    for cast in (nn.Module.half, nn.Module.float, lambda module: module.to(torch.bfloat16), nn.Module.bfloat16):
        cast(model)
    model.metric.set_dtype(torch.float32)
    for part in parts[1:]:
        model.metric.update(*part)
    expected = two_pass(*map(torch.cat, zip(*parts, strict=True)), {"separation": separation, "center": center})
    assert_close(model.metric.compute(), expected)
    model.to("meta")
    assert model.metric.moments.device.type == "meta"
    assert model.metric.center.device.type == "meta"


def test_centre_is_a_copy_that_can_follow():
    center = torch.zeros(8, dtype=torch.float64)
    metric = NCMIMetric(5, 8, center=center)
    center.fill_(1)
    assert metric.center.eq(0).all()
    features, target = samples(100, 5, 8, 1, 0.3)
    metric.center.copy_(center)
    assert_close(measured(metric, features, target), two_pass(features, target, {"center": center}))


def test_inference_mode(separation):
    """What was begun there can go on outside, and the other way round."""
    parts, expected = batches(separation)
    metric = NCMIMetric(5, 8, separation=separation)
    for i, part in enumerate(parts):
        with torch.inference_mode(i % 2 == 0):
            metric.update(*part)
    assert_close(metric.compute(), expected)


def test_plot(separation):
    """The value so far, another one, several in a row."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    parts, _ = batches(separation)
    metric = NCMIMetric(5, 8, separation=separation)
    values = [metric(*part) for part in parts]
    for value, length in ((None, 1), (values[0], 1), (values, len(parts))):
        _, axes = metric.plot(value)
        lines = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
        assert tuple(lines) == NAMES
        assert all(len(line) == length for line in lines.values())
        assert "Optimal" in axes.texts[0].get_text()
    assert lines["ncmi"].tolist() == [value["ncmi"].item() for value in values]
    assert metric.plot(ax=axes)[1] is axes
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("value", ["cmi", "gamma", "ncmi"])
def test_one_value(value):
    """A scalar, as MetricTracker takes it; of the separation more is better."""
    whole, tracker = NCMIMetric(3), MetricTracker(NCMIMetric(3, value=value))
    history = []
    for epoch in range(3):
        whole.reset(), tracker.increment()
        features, target = torch.randn(20, 3), torch.arange(20) % 3
        features[torch.arange(20), target] += epoch
        whole.update(features, target), tracker.update(features, target)
        history.append(whole.compute()[value])
        assert torch.equal(tracker.compute(), history[-1])
    assert tracker.maximize == (value == "gamma")
    best = max if value == "gamma" else min
    assert tracker.best_metric() == best(history)


@pytest.mark.gpu
def test_on_a_gpu(separation):
    parts, expected = batches(separation)
    metric = NCMIMetric(5, 8, separation=separation).cuda()
    for features, target in parts:
        metric.update(features.cuda(), target.cuda())
    result = metric.compute()
    assert result["ncmi"].is_cuda
    assert_close({name: value.cpu() for name, value in result.items()}, expected)


def worker(rank, path, shards):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    results = []
    for separation in SEPARATIONS:
        metric = NCMIMetric(5, 8, separation=separation)
        for batch in shards[rank]:
            metric.update(*batch)
        first = metric.compute()
        metric.update(*shards[1][0])  # the state of a process is its own again after compute
        alone = NCMIMetric(5, 8, separation=separation, sync_on_compute=False)
        alone.update(*shards[rank][0])
        results.append((first, metric.compute(), alone.compute()))
    torch.save(results, f"{path}/{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path):
    """Uneven shards, and a class that only one process sees, against one process."""
    features, target = samples(400, 5, 8, 1, 0.3)
    order = (target == 4).int().argsort(stable=True)  # the last class at the end
    features, target = features[order], target[order]
    parts = list(zip(features.split(70), target.split(70), strict=True))
    shards = parts[:1], parts[1:]
    assert not (parts[0][1] == 4).any()
    torch.multiprocessing.spawn(worker, (str(tmp_path), shards), nprocs=2)
    for rank in range(2):
        for separation, results in zip(SEPARATIONS, torch.load(tmp_path / str(rank)), strict=True):
            for result, seen in zip(results, (parts, [*parts, parts[1], parts[1]], shards[rank][:1]), strict=True):
                one = NCMIMetric(5, 8, separation=separation)
                for batch in seen:
                    one.update(*batch)
                expected = [extended(value.item()) for value in one.compute().values()]
                assert_close(result, expected, 1e-12)


# ------------------------------------------------------------------------------------------------------------
# Errors.
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "exception", "message"),
    [
        ({"num_classes": 1}, ValueError, "num_classes: got 1, expected an integer >= 2"),
        ({"value": "accuracy"}, ValueError, "value: got 'accuracy', expected one of 'cmi', 'gamma', 'ncmi'"),
        ({"num_classes": 3.0}, TypeError, "num_classes: got 3.0, expected an integer >= 2"),
        ({"feature_dim": 1}, ValueError, "feature_dim: got 1, expected an integer >= 2"),
        ({"feature_dim": True}, TypeError, "feature_dim: got True, expected an integer >= 2"),
        ({"activation": "relu"}, ValueError, "activation: got 'relu', expected one of 'nsf', 'softmax'"),
        ({"separation": "both"}, ValueError, "separation: got 'both', expected one of 'sample_to_centroid'"),
        ({"temperature": 0}, ValueError, "temperature: got 0, expected a finite number > 0"),
        ({"temperature": "1"}, TypeError, "temperature: got '1', expected a number > 0"),
        ({"l2_normalize": 1}, TypeError, "l2_normalize: got 1, expected True or False"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index: got 0.5, expected an integer"),
        ({"center": [0.0] * 4}, TypeError, "center: got list, expected a torch.Tensor"),
        ({"center": torch.zeros(3)}, ValueError, "center: got shape (3,), expected (4,)"),
        ({"center": torch.zeros(4, dtype=torch.int64)}, RuntimeError, "center: got dtype torch.int64"),
        ({"nonsense": 1}, ValueError, "nonsense"),
    ],
)
def test_refused_settings(changes, exception, message):
    with pytest.raises(exception) as caught:
        NCMIMetric(**{"num_classes": 3, "feature_dim": 4, **changes})
    assert type(caught.value) is exception
    assert message in str(caught.value)


X, Y = torch.zeros(2, 4), torch.tensor([0, 2])


@pytest.mark.parametrize(
    ("features", "target", "exception", "message"),
    [
        (X.tolist(), Y, TypeError, "features: got list, expected a torch.Tensor"),
        (X.long(), Y, RuntimeError, "features: got dtype torch.int64"),
        (X.to_sparse(), Y, RuntimeError, "features: got layout torch.sparse_coo"),
        (X[:, :3], Y, ValueError, "features: got shape (2, 3), expected [B, M], [M] or [B, M, d1, ...] with M = 4"),
        (X[:, None], Y, ValueError, "features: got shape (2, 1, 4), expected [B, M], [M] or [B, M, d1, ...]"),
        (X[0, 0], Y[0], ValueError, "features: got shape (), expected [B, M], [M] or [B, M, d1, ...]"),
        (X, Y.tolist(), TypeError, "target: got list, expected a torch.Tensor"),
        (X, Y.int(), RuntimeError, "target: got dtype torch.int32, expected torch.int64"),
        (X, torch.rand(2, 3), RuntimeError, "class probabilities are not supported"),
        (X, Y[:1], ValueError, "target: got shape (1,), expected (2,) for features (2, 4)"),
        (X, Y[:, None], ValueError, "target: got shape (2, 1), expected (2,)"),
        (X[0], Y[:1], ValueError, "target: got shape (1,), expected () for features (4,)"),
        (X[..., None], Y, ValueError, "target: got shape (2,), expected (2, 1) for features (2, 4, 1)"),
        (X, Y + 1, IndexError, "target: value 3 at row 1 is out of range, expected a class in [0, 3)"),
        (X, Y - 1, IndexError, "target: value -1 at row 0 is out of range"),
        (X, (Y - 100).to(torch.uint8), IndexError, "target: value 156 at row 0 is out of range"),
        (X, Y.to("meta"), RuntimeError, "target: got device meta, expected cpu"),
        (X.to("meta"), Y.to("meta"), RuntimeError, "features: got device meta, expected cpu, that of the metric"),
    ],
)
def test_refused_batches(features, target, exception, message):
    metric = NCMIMetric(3, 4)
    with pytest.raises(exception) as caught:
        metric.update(features, target)
    assert type(caught.value) is exception
    assert message in str(caught.value)
    assert metric.moments.eq(0).all()


IMPORTS = """
import sys
import ncmi_kernels
assert "torchmetrics" not in sys.modules, "importing the package must not import torchmetrics"
exec("from ncmi_kernels import *")
assert "torchmetrics" not in sys.modules
sys.modules["torchmetrics"] = None  # as if it were not installed
for statement in ("from ncmi_kernels.metrics import NCMIMetric", "ncmi_kernels.NCMIMetric"):
    try:
        exec(statement)
    except ImportError as error:
        assert type(error) is ImportError
        assert "pip install torchmetrics" in str(error), error
    else:
        raise AssertionError(statement)
del sys.modules["torchmetrics"]
from ncmi_kernels import NCMIMetric
assert NCMIMetric is ncmi_kernels.metrics.NCMIMetric
try:
    ncmi_kernels.NCMIMetrics
except AttributeError as error:
    assert "NCMIMetrics" in str(error)
"""


def test_torchmetrics_is_optional():
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)


# ------------------------------------------------------------------------------------------------------------
# NCMI against accuracy.
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ncmi_accuracy():
    if any(find_spec(name) is None for name in ("matplotlib", "rich", "sklearn", "tqdm")):
        pytest.skip("the benchmark needs matplotlib, rich, scikit-learn and tqdm")
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    import ncmi_accuracy

    return ncmi_accuracy


def test_checkpoint_steps(ncmi_accuracy):
    assert ncmi_accuracy.checkpoint_steps(132, 1) == [132]
    assert ncmi_accuracy.checkpoint_steps(1, 5) == [1]
    assert ncmi_accuracy.checkpoint_steps(1000, 3) == [10, 100, 1000]


def test_checkpoints_are_those_of_the_run(ncmi_accuracy):
    """The last one has what the demo reports of the same run; it is the demo's definition of CMI and Gamma, too."""
    demo, dataset = ncmi_accuracy.demo, ncmi_accuracy.demo.data.digits()
    for name in ncmi_accuracy.LOSSES:
        recipe = demo.TASKS["digits"].recipes[name]
        run = demo.train(recipe, dataset, seed=3, epochs=1, batch_size=64)
        kept = ncmi_accuracy.checkpoints(recipe, dataset, 3, 1, 64, [2, 22])
        assert list(kept) == [2, 22]
        accuracy, values = ncmi_accuracy.measure(*kept[22], dataset)
        assert accuracy == run.accuracy[-1]
        assert values["NSF"] == pytest.approx([run.cmi, run.gamma, run.ncmi], rel=1e-8)
        assert ncmi_accuracy.measure(*kept[2], dataset)[0] != accuracy


def test_command_line(ncmi_accuracy, tmp_path, monkeypatch, capsys):
    output = tmp_path / "result"
    arguments = ["--epochs=1", "--seeds=1", "--checkpoints=4", f"--output={output}"]
    monkeypatch.setattr(sys, "argv", ["ncmi_accuracy.py", *arguments])
    ncmi_accuracy.main()
    rows = list(csv.DictReader(output.with_suffix(".csv").open()))
    assert [(row["loss"], row["distribution"], int(row["step"])) for row in rows] == [
        ("cross-entropy", distribution, step) for step in (2, 5, 10, 22) for distribution in ("NSF", "softmax")
    ] + [("NCMI", "NSF", step) for step in (2, 5, 10, 22)]
    assert all(float(row["ncmi"]) == pytest.approx(float(row["cmi"]) / float(row["gamma"]), rel=1e-5) for row in rows)
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "rank corr." in capsys.readouterr().out
