"""The README's code on training, as it stands there, on a small network."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from ncmi_kernels import _backends

README = Path(__file__).resolve().parent.parent / "README.md"
TRAINING = README.read_text().partition("\n## Training with NCMI\n")[2].partition("\n## ")[0] if README.exists() else ""
BLOCKS = {
    heading: textwrap.dedent(code)
    for heading, code in re.findall(
        r"^### (.+?)\n(?:(?!^### ).)*?```python\n(.*?)```", TRAINING, re.DOTALL | re.MULTILINE
    )
}
NAMES = """
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from ncmi_kernels import CentroidSGD, NCMILoss, ShardedNCMILoss

torch.manual_seed(0)
torch.set_num_threads(1)
network = torch.nn.Sequential(torch.nn.Linear(8, 512), torch.nn.BatchNorm1d(512))
target = torch.arange(400) % 100
images = torch.randn(100, 8)[target] + 0.1 * torch.randn(400, 8)
data = TensorDataset(images, target)
loader = test_loader = DataLoader(data, batch_size=50)
"""

pytestmark = pytest.mark.skipif(not TRAINING or _backends.load_library() is not None, reason="no README or no kernels")


def test_every_part_has_its_code():
    expected = {
        "Alternating steps",
        "Several processes",
        "Very many classes",
        "Half precision, compiling, transforms",
        "Stopping and going on",
        "Lightning",
        "NCMI as a metric",
    }
    assert set(BLOCKS) == expected


def run(*headings, **names):
    """The values of the names after the code under these headings."""
    namespace = dict(names)
    exec(NAMES, namespace)
    for heading in headings:
        exec(compile(BLOCKS[heading], heading, "exec"), namespace)
    return namespace


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
def test_on_one_device(tmp_path):
    path = tmp_path / "checkpoint.pt"
    first = run("Alternating steps")
    start = first["criterion"].last_terms.cmi
    assert start.isfinite()
    assert first["centroid_optimizer"].state_dict()["param_groups"][0]["step"] == 8
    found = run("Alternating steps", "Half precision, compiling, transforms", "Stopping and going on", path=path)
    assert found["criterion"].last_terms.cmi < start
    assert path.stat().st_size > 0
    assert found["loss"].dtype == torch.float32


def test_metric():
    pytest.importorskip("torchmetrics")
    namespace = {}
    exec(NAMES.replace("512", "100") + "from ncmi_kernels import NCMIMetric", namespace)
    exec(BLOCKS["NCMI as a metric"], namespace)
    assert namespace["metric"].compute()["ncmi"] > 0


SCRIPT = """
import os, sys
directory, device = sys.argv[1], "cpu"
loader = DataLoader(TensorDataset(*(t[int(os.environ["RANK"]) :: 2] for t in data.tensors)), batch_size=50)
{several}
weights = torch.cat([p.detach().flatten() for p in (*network.parameters(), criterion.centroid_logits)])
every = [torch.empty_like(weights) for _ in range(dist.get_world_size())]
dist.all_gather(every, weights)
assert all(torch.equal(weights, other) for other in every)
assert loss.isfinite()
network = torch.nn.Linear(8, 128)
{sharded}
assert predicted.shape == target.shape
assert predicted.max() < 10_000
assert len(criterion.centroid_logits.to_local()) == 5_000
# The interpreter does not end: DDP and DTensor keep gloo's threads past destroy_process_group, and one that lets go of
# a tensor then waits for an interpreter that is gone, which aborts the process (pytorch/pytorch#179291).
dist.barrier()
os._exit(0)
"""


def test_on_several_processes(tmp_path):
    script = tmp_path / "train.py"
    sharded = BLOCKS["Very many classes"].replace("1_000_000", "10_000")  # for its time
    script.write_text(NAMES + SCRIPT.format(several=BLOCKS["Several processes"], sharded=sharded))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [*command, str(tmp_path / "saved")],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "saved" / ".metadata").exists()
