"""Which samples a loss pulls at: why NCMI with equal weights learns many classes more slowly.

    python benchmarks/experiments/gradients.py

Trains the small network with each loss on fashion-pairs, and takes the gradient of the loss by the outputs for each
held out sample, times the length of the output, so that scales compare. A loss that tells hard samples from easy ones
pulls harder at those that the network takes for another class, and away from the class that it takes them for.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import images
import plans
import torch
import torch.nn.functional as F
from arguments import positive
from records import write_lines
from torch import Tensor, nn
from tqdm import tqdm
from training import EVALUATION_BATCH, SAMPLE, Run, outputs_of, train

from ncmi_kernels import NCMILoss

RESULTS = Path(__file__).resolve().parent.parent / "results" / "gradients.csv"
SECURE = 0.5  # of the samples that are right: those whose margin is in the upper half


class Pull(NamedTuple):
    """A line of the CSV file."""

    loss: str
    seed: int
    epochs: int
    wrong_samples: float  # percent of the samples
    wrong_pull: float  # percent of the sum of the lengths of the gradients that those have
    wrong_over_secure: float  # mean length of a gradient: wrong samples over the securely right ones
    away_from_nearest: float  # percent: how much of the pull away from all other classes is from the nearest one


def gradients(criterion: nn.Module, outputs: Tensor, target: Tensor) -> Tensor:
    """Length [N] of the gradient of the mean loss by each output, times the length of the centred output."""
    leaf = outputs.detach().requires_grad_()
    (grad,) = torch.autograd.grad(criterion(leaf, target), leaf)
    center = criterion.center if isinstance(criterion, NCMILoss) else outputs.mean(dim=0)
    return grad.norm(dim=1) * (outputs - center).norm(dim=1)


def pushes(criterion: nn.Module, outputs: Tensor, target: Tensor) -> Tensor:
    """How much the loss of each sample falls as it leaves another class, [N, C], zero for its own; rows add up to one.

    Cross-entropy: by the logit of the class, its probability. NCMI: by the divergence from its centroid, its weight in
    the separation.
    """
    own = F.one_hot(target, int(target.max()) + 1).bool()
    if isinstance(criterion, NCMILoss):
        # -scores are the divergences up to a term that all classes of a sample share: sum p log p.
        log_p = criterion._log_probabilities(outputs)
        divergence = (log_p.exp() * log_p).sum(dim=1, keepdim=True) - criterion.scores(outputs)
        nearest = divergence.masked_fill(own, torch.inf).amin(dim=1, keepdim=True)
        weight = -criterion.options.separation_focus * divergence / nearest
        return torch.softmax(weight.masked_fill(own, -torch.inf), dim=1)
    return torch.softmax(outputs.masked_fill(own, -torch.inf), dim=1)


@torch.no_grad()
def nearest_other(criterion: nn.Module, outputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The margin [N], by which the own class's score is above the best other one's, and that class [N]."""
    scores = criterion.scores(outputs) if isinstance(criterion, NCMILoss) else outputs
    own = scores.gather(1, target[:, None])[:, 0]
    best, other = scores.scatter(1, target[:, None], -torch.inf).max(dim=1)
    return own - best, other


def measure(name: str, seed: int, epochs: int, criterion: nn.Module, outputs: Tensor, target: Tensor) -> Pull:
    """One line, from a trained network's outputs for held out samples."""
    margin, other = nearest_other(criterion, outputs, target)
    length = gradients(criterion, outputs, target)
    wrong = margin < 0
    secure = margin > margin[~wrong].quantile(SECURE)
    near = pushes(criterion, outputs, target).gather(1, other[:, None]).mean()
    return Pull(
        name,
        seed,
        epochs,
        100 * wrong.double().mean().item(),
        100 * (length[wrong].sum() / length.sum()).item(),
        (length[wrong].mean() / length[secure].mean()).item(),
        100 * near.item(),
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Which samples a loss pulls at.")
    parser.add_argument("--data", choices=images.DATASETS, default=plans.PAIRS, help="(default: %(default)s)")
    parser.add_argument("--data-dir", type=Path, help="where the files of Fashion-MNIST or CIFAR-100 are")
    parser.add_argument("--seeds", type=positive, default=3, help="networks for each loss (default: %(default)s)")
    parser.add_argument("--epochs", type=positive, default=4, help="how long (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the CSV file (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        data = images.load(arguments.data + images.VALIDATION, arguments.data_dir)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    lines: list[Pull] = []
    task = plans.TASKS[arguments.data]
    target = data.test_y[: min(SAMPLE, 5 * EVALUATION_BATCH)]
    with tqdm(total=arguments.seeds * len(task.settings) * arguments.epochs, unit="epoch") as bar:
        for seed in range(arguments.seeds):
            for name, setting in task.settings.items():

                def note(network: nn.Module, criterion: nn.Module, name: str = name, seed: int = seed) -> None:
                    outputs = outputs_of(network, data, data.test_x[: len(target)])
                    lines.append(measure(name, seed, arguments.epochs, criterion, outputs, target))

                run = Run("gradients", arguments.data, task.network, name, setting, seed, arguments.epochs)
                train(run, data, on_epoch=bar.update, on_end=note)
    write_lines(arguments.output, [line._asdict() for line in lines], Pull._fields)
    print(f"{arguments.output} is written")


if __name__ == "__main__":
    main()
