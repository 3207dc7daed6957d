"""The Python in the README and in the pages runs as it stands there, on a small network; the README's links lead on."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ncmi_kernels import NCMILoss, _backends

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
TRAINING = ROOT / "docs" / "training.md"
QUICK_START = ROOT / "docs" / "quickstart.md"  # tests/test_docs.py runs it


def blocks(page):
    """The blocks of Python of a page, each with the heading that it stands under."""
    heading = ""
    for title, code in re.findall(r"^#+ ([^\n]+)|^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        heading = title or heading
        if code:
            yield heading, code


BLOCKS = dict(blocks(TRAINING))
PAGES = [
    p for p in (README, *sorted(TRAINING.parent.glob("*.md"))) if p not in (TRAINING, QUICK_START) and [*blocks(p)]
]
# What the blocks take as given.
NAMES = """
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from ncmi_kernels import CentroidSGD, NCMILoss, ShardedNCMILoss

torch.manual_seed(0)
torch.set_num_threads(1)
network = torch.nn.Sequential(torch.nn.Linear(8, {features}), torch.nn.BatchNorm1d({features}))
optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
target = torch.arange(400) % {classes}
images = test = test_x = torch.randn({classes}, 8)[target] + 0.1 * torch.randn(400, 8)
features = network(images)
data = TensorDataset(images, target)
loader = train_loader = test_loader = DataLoader(data, batch_size=50)
"""

pytestmark = pytest.mark.skipif(_backends.load_library() is not None, reason="no kernels")


def columns(code):
    """The two programs of a block whose columns are before and after; else the one."""
    if not code.startswith("# before"):
        return [code]
    lines = code.splitlines()
    after = lines[0].index("# after")
    return ["\n".join(line[:after].rstrip() for line in lines), "\n".join(line[after:] for line in lines)]


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_of_a_page(page):
    namespace = {}
    for heading, block in blocks(page):
        for code in columns(block):
            if "criterion =" in code:
                numbers = dict(re.findall(r"(num_classes|feature_dim)=(\d+)", code))
                classes = int(numbers.get("num_classes", 10))
                namespace = {}
                exec(NAMES.format(classes=classes, features=numbers.get("feature_dim", classes)), namespace)
            exec(compile(code, f"{page.name}: {heading}", "exec"), namespace)
            exec("loss = criterion(network(images), target)\nloss.backward()\noptimizer.step()", namespace)
            assert namespace["loss"].isfinite()
            if "predicted" in namespace:
                assert namespace["predicted"].shape == (400,)
                assert 0 < namespace["predicted"].max() < classes


def test_the_recipes_are_those_of_choosing():
    recipes = [code for heading, code in blocks(README) if heading == "Two recipes"]
    assert [code for _, code in blocks(ROOT / "docs" / "choosing.md")] == recipes[:2]


def test_links_of_the_readme():
    links = re.findall(r"\]\((?!\w+:)([^)#]+)#?([^)]*)\)", README.read_text())
    assert links
    for file, anchor in links:
        assert (ROOT / file).is_file(), file
        if anchor:
            headings = re.findall(r"^#+ (.+)$", (ROOT / file).read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_make_has_the_targets_that_pages_name():
    named = {
        name
        for page in (README, ROOT / "CONTRIBUTING.md", *TRAINING.parent.glob("*.md"))
        for name in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.MULTILINE)
    }
    assert {"demo", "test"} <= named <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_every_part_has_its_code():
    expected = {
        "Alternating steps",
        "Several processes",
        "Very many classes",
        "Half precision, compiling, transforms",
        "Mixup and cutmix",
        "Stopping and going on",
        "Lightning",
        "Hugging Face",
        "NCMI as a metric",
    }
    assert set(BLOCKS) == expected
    assert len([*blocks(TRAINING)]) == len(expected)


def run(*headings, **names):
    """The values of the names after the code under these headings."""
    namespace = dict(names)
    exec(NAMES.format(classes=100, features=512), namespace)
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


@pytest.mark.usefixtures("_threads")
def test_mixup():
    found = run("Mixup and cutmix")
    criterion, network, mixed, target = (found[name] for name in ("criterion", "network", "mixed", "target"))
    share, features = found["share"], network.eval()(mixed)
    one, other = criterion.eval()(features, target), criterion(features, target.flip(0))
    labels = torch.nn.functional.one_hot(target, 100)
    loss = criterion(features, share * labels + (1 - share) * labels.flip(0))
    torch.testing.assert_close(loss, share * one + (1 - share) * other)


def test_metric():
    pytest.importorskip("torchmetrics")
    namespace = {}
    exec(NAMES.format(classes=100, features=100) + "from ncmi_kernels import NCMIMetric", namespace)
    exec(BLOCKS["NCMI as a metric"], namespace)
    assert namespace["metric"].compute()["ncmi"] > 0


def test_a_pretrained_backbone_without_a_criterion():
    """What from_pretrained does: every tensor anew, by its key, then _init_weights for each module."""

    class PreTrainedModel(torch.nn.Module):
        def __init__(self, config):
            super().__init__()

        def _init_weights(self, module):
            pass

        def post_init(self):
            pass

    config = SimpleNamespace(num_labels=4, hidden_size=6)
    auto_model = SimpleNamespace(from_config=lambda config: torch.nn.Linear(2, config.hidden_size))
    names = {"PreTrainedModel": PreTrainedModel, "AutoModel": auto_model, "NCMILoss": NCMILoss}
    exec(BLOCKS["Hugging Face"], names)
    with torch.device("meta"):
        model = names["Classifier"](config)
    for key, value in model.state_dict().items():
        module = model.get_submodule(key.rpartition(".")[0])
        memory = torch.full_like(value, 7, device="cpu")
        parameter = key.rpartition(".")[2] in module._parameters
        setattr(module, key.rpartition(".")[2], torch.nn.Parameter(memory) if parameter else memory)
    model.apply(model._init_weights)
    fresh = NCMILoss(4, 6).state_dict()
    assert fresh.keys() == model.criterion.state_dict().keys()
    assert all(torch.equal(value, fresh[name]) for name, value in model.criterion.state_dict().items())


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
    script.write_text(
        NAMES.format(classes=100, features=512) + SCRIPT.format(several=BLOCKS["Several processes"], sharded=sharded)
    )
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
