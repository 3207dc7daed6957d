"""A minute with an installed wheel, outside the repository: `make wheel` runs it in a second environment."""

import torch

import ncmi_kernels

assert ncmi_kernels.available_backends()["cpu"] is None, ncmi_kernels.available_backends()
criterion = ncmi_kernels.NCMILoss(num_classes=10, feature_dim=64)
features = torch.randn(32, 64, requires_grad=True)
target = torch.randint(10, (32,))
loss = criterion(features, target)
loss.backward()
criterion.backend = "reference"
torch.testing.assert_close(loss, criterion(features, target), rtol=1e-3, atol=0.0)
assert features.grad is not None
assert bool(features.grad.isfinite().all())
print(
    f"ncmi_kernels {ncmi_kernels.__version__} with torch {torch.__version__}: "
    f"{torch.ops.ncmi_kernels.cpu_capability()} kernels, loss {loss.item():.4f}"
)
