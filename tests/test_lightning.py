"""The LightningModule of docs/training.md: alternating training, checkpoints and the metric in Lightning's hands."""

import importlib.util
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

if importlib.util.find_spec("pytorch_lightning") is None or importlib.util.find_spec("torchmetrics") is None:
    pytest.skip("needs pytorch-lightning", allow_module_level=True)

import pytorch_lightning as lightning
from test_readme import BLOCKS

from ncmi_kernels import CentroidSGD, NCMILoss, NCMIMetric

CLASSES, FEATURES = 5, 16


def classifier():
    names = {"lightning": lightning, "torch": torch}
    names |= {"CentroidSGD": CentroidSGD, "NCMILoss": NCMILoss, "NCMIMetric": NCMIMetric}
    exec(BLOCKS["Lightning"], names)
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, FEATURES))
    return names["Classifier"](network, CLASSES, FEATURES)


def trainer(directory, epochs):
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=directory,
        use_distributed_sampler=False,
    )


@pytest.fixture
def loader():
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(200) % CLASSES
    images = 2 * torch.randn(CLASSES, 8, generator=generator)[target] + torch.randn(200, 8, generator=generator)
    return DataLoader(TensorDataset(images, target), batch_size=20)


def test_alternating_training_resumed_from_a_checkpoint(loader, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning: few workers, few batches
        whole, first, resumed = (classifier() for _ in range(3))
        run = trainer(tmp_path, 6)
        run.fit(whole, loader, loader)
        assert run.callback_metrics["accuracy"] > 0.9
        assert 0 < run.callback_metrics["cmi"] < run.callback_metrics["gamma"]
        assert run.callback_metrics["ncmi"] == pytest.approx(
            (run.callback_metrics["cmi"] / run.callback_metrics["gamma"]).item(), rel=1e-6
        )
        run = trainer(tmp_path, 3)
        run.fit(first, loader, loader)
        run.save_checkpoint(tmp_path / "middle.ckpt")
        trainer(tmp_path, 6).fit(resumed, loader, loader, ckpt_path=tmp_path / "middle.ckpt", weights_only=False)
    start = classifier().criterion.centroid_logits
    assert not torch.equal(whole.criterion.centroid_logits, start)
    for (name, actual), expected in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(actual, expected), name
