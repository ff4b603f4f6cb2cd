"""Mean teacher: learns digits from 40 labels, and from a teacher on all other images.

    python examples/teacher.py

takes some seconds on a CPU (scikit-learn has the images). The teacher is the average of the
student's weights, and what it answers is a part of the student's loss.
"""

from __future__ import annotations

import copy

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fused_ema

STEPS, LABELLED, BATCH = 300, 40, 128


def data() -> tuple[Tensor, Tensor]:
    """1,797 images of 64 pixels, shuffled, and which digit each is."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    return images[order], torch.tensor(digits.target)[order]


def seen(images: Tensor) -> Tensor:
    """Flat images, as another look at them shows them: with noise of its own."""
    return images + 0.2 * torch.randn_like(images)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The part of the images that a model knows."""
    model.eval()
    right = (model(images).argmax(1) == labels).float().mean().item()
    model.train()
    return right


def train(steps: int = STEPS, weight: float = 1.0) -> tuple[float, float]:
    """Trains; returns what student and teacher know of the images that had no labels.

    Args:
        steps: Of the optimizer.
        weight: Of the agreement in the loss, at the end; 0 for the labels alone.
    """
    torch.manual_seed(0)
    images, labels = data()
    known, others = images[:LABELLED], images[LABELLED:]
    student = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)

    # The averages are the teacher's own tensors.
    ema = fused_ema.EMAManager(student, momentum=0.05, into=teacher)
    ema.register_step_post_hook(optimizer)

    for step in range(steps):
        batch = others[torch.randint(len(others), (BATCH,))]
        target = (2 * teacher(seen(batch))).softmax(1)  # A little surer than it is.
        agreement = cross_entropy(student(seen(batch)), target)
        loss = cross_entropy(student(seen(known)), labels[:LABELLED])
        (loss + weight * min(1.0, 2 * step / steps) * agreement).backward()
        optimizer.step()  # The hook moves the teacher.
        optimizer.zero_grad()
    answers = labels[LABELLED:]
    return accuracy(student, others, answers), accuracy(teacher, others, answers)


if __name__ == "__main__":
    print(f"labels alone {train(weight=0)[0]:.3f}")
    print("with a teacher {:.3f}, the teacher {:.3f}".format(*train()))
