"""Training by gradients on features: federated averaging of a head, maybe with a bottleneck before it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.fashion_features import CLASSES, Part

BATCH = 32


class Net(nn.Module):
    """A linear head, maybe behind a residual bottleneck."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, 128) if kind == "adapter" else None
        self.up = nn.Linear(128, width) if kind == "adapter" else None
        if self.up is not None:
            nn.init.zeros_(self.up.weight)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[n, d] -> [n, C]."""
        if self.down is not None and self.up is not None:
            x = x + self.up(F.relu(self.down(x)))
        logits: Tensor = self.head(x)
        return logits


def average_clients(net: Net, clients: Sequence[Part], classes: Sequence[int], rate: float, share: float) -> None:
    """One round: each client trains on a share of an epoch, and the mean by examples replaces the net."""
    start = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    total, count = {name: torch.zeros_like(tensor) for name, tensor in start.items()}, sum(len(y) for _, y in clients)
    for x, y in clients:
        net.load_state_dict(start)
        train_client(net, x, y, classes, rate, share)
        for name, tensor in net.state_dict().items():
            total[name] += tensor * (len(y) / count)
    net.load_state_dict(total)


def train_client(net: Net, x: Tensor, y: Tensor, classes: Sequence[int], rate: float, share: float) -> None:
    hidden = torch.ones(CLASSES, dtype=torch.bool)
    hidden[list(classes)] = False
    optimiser = torch.optim.AdamW(net.parameters(), rate, weight_decay=0.0)
    order = torch.randperm(len(y))[: round(len(y) * share)]
    for rows in order.split(BATCH):
        optimiser.zero_grad()
        F.cross_entropy(net(x[rows]).masked_fill(hidden, -torch.inf), y[rows]).backward()
        optimiser.step()
