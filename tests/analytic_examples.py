"""Features of several classes for tests of analytic heads, and splits of them over clients."""

import numpy as np
import torch
from torch import Tensor

CLASSES, WIDTH, CLIENTS = 6, 24, 4


def make_features(examples: int = 600, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features [n, d] that are correlated like those of a network, fp32, and labels [n] in mixed order."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (examples,), generator=random)
    mixing = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9))
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(10))
    noise = torch.randn(examples, WIDTH, generator=random) @ mixing / 4
    return torch.relu(centres[labels] + noise), labels


def split_rows(labels: Tensor, split: str, seed: int) -> list[Tensor]:
    """The rows of each client; a client may have none."""
    random = np.random.default_rng(seed)
    if split == "even":
        owner = random.integers(CLIENTS, size=len(labels))
    elif split == "one class each":
        owner = labels.numpy()
    else:
        shares = random.dirichlet(np.full(CLIENTS, 0.1), size=CLASSES)
        owner = np.array([random.choice(CLIENTS, p=shares[label]) for label in labels.tolist()])
    return [torch.from_numpy(np.flatnonzero(owner == client)) for client in range(owner.max() + 1)]
