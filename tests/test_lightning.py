"""The README's LightningModule: alternating training, checkpoints and the metric in Lightning's hands."""

import importlib.util
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

if importlib.util.find_spec("pytorch_lightning") is None or importlib.util.find_spec("torchmetrics") is None:
    pytest.skip("needs pytorch-lightning", allow_module_level=True)

import pytorch_lightning as lightning

from ncmi_kernels import CentroidSGD, NCMILoss, NCMIMetric

CLASSES, FEATURES = 5, 16


class Classifier(lightning.LightningModule):
    def __init__(self, network):
        super().__init__()
        self.network = network
        self.criterion = NCMILoss(CLASSES, FEATURES)
        self.centroid_optimizer = CentroidSGD(self.criterion, lr=0.1, momentum=0.9)
        self.metric = NCMIMetric(CLASSES, FEATURES, l2_normalize=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.network.parameters(), lr=1.0, momentum=0.9)

    def training_step(self, batch, index):
        images, target = batch
        features = self.network(images)
        return {"loss": self.criterion(features, target), "features": features.detach()}

    def on_train_batch_end(self, outputs, batch, index):  # the network has taken its step
        self.centroid_optimizer.step(outputs["features"], batch[1])

    def validation_step(self, batch, index):
        images, target = batch
        features = self.network(images)
        self.metric.update(features - self.criterion.center, target)
        self.log("accuracy", (self.criterion.predict(features) == target).float().mean())

    def on_validation_epoch_end(self):
        self.log_dict(self.metric.compute())
        self.metric.reset()

    def on_save_checkpoint(self, checkpoint):
        checkpoint["centroid_optimizer"] = self.centroid_optimizer.state_dict()

    def on_load_checkpoint(self, checkpoint):
        self.centroid_optimizer.load_state_dict(checkpoint["centroid_optimizer"])


def classifier():
    torch.manual_seed(1)
    return Classifier(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, FEATURES)))


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
