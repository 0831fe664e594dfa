"""The masked head: it trains and predicts as a head that grows."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from fedtune.continual import find_head, list_classes, mask_classes
from fedtune.errors import ModelError
from tests.streams import make_plan

LABELS = ("a", "b", "c", "d", "e")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test draws the same numbers, whichever ran before it."""
    torch.manual_seed(0)


class _Net(nn.Module):
    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.body, self.classifier = nn.Linear(6, 8), nn.Linear(8, classes)

    def forward(self, pixels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.classifier(self.body(pixels).relu()))


def _make_net() -> _Net:
    torch.manual_seed(0)
    return _Net()


def test_hidden_classes_have_no_probability_and_no_gradient() -> None:
    net, pixels = _make_net(), torch.randn(7, 6)
    with mask_classes(net, [0, 2], 5):
        logits = net(pixels).logits
        F.cross_entropy(logits, torch.tensor([0, 2, 0, 2, 0, 2, 0])).backward()
    assert logits.softmax(-1)[:, [1, 3, 4]].abs().max() == 0
    assert net.classifier.weight.grad is not None
    assert net.classifier.weight.grad[[1, 3, 4]].abs().max() == 0
    assert net.classifier.weight.grad[[0, 2]].abs().max() > 0
    assert torch.isfinite(net(pixels).logits).all()  # the hook is gone


def test_a_masked_head_is_a_head_that_grows() -> None:
    whole, pixels, labels = _make_net(), torch.randn(9, 6), torch.arange(9) % 3
    small = _Net(3)
    small.body.load_state_dict(whole.body.state_dict())
    small.classifier.weight.data, small.classifier.bias.data = (
        whole.classifier.weight.data[:3].clone(),
        whole.classifier.bias.data[:3].clone(),
    )
    with mask_classes(whole, [0, 1, 2], 5):
        F.cross_entropy(whole(pixels).logits, labels).backward()
    F.cross_entropy(small(pixels).logits, labels).backward()
    torch.testing.assert_close(whole.body.weight.grad, small.body.weight.grad, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(whole.classifier.weight.grad[:3], small.classifier.weight.grad, atol=1e-6, rtol=1e-6)  # type: ignore[index]


def test_the_head_is_the_outermost_last_layer_with_that_many_outputs() -> None:
    net = _make_net()
    assert find_head(net, 5) is net.classifier
    with pytest.raises(ModelError, match="no last layer with 7 outputs"):
        find_head(net, 7)


def test_a_low_rank_pair_around_the_head_is_masked_as_a_whole() -> None:
    net = _make_net()
    wrapped = get_peft_model(net, LoraConfig(r=2, target_modules=["classifier"]))
    with mask_classes(wrapped, [1], 5):
        probabilities = wrapped.base_model.model(torch.randn(2, 6)).logits.softmax(-1)
    assert probabilities.tolist() == [[0, 1, 0, 0, 0]] * 2


def test_classes_follow_the_tasks_and_a_blur_adds_those_of_the_neighbours() -> None:
    tasks = [{"name": "x", "where": ["b", "a"], "rounds": 1}, {"name": "c", "rounds": 1}, {"name": "e", "rounds": 1}]
    plan = make_plan(setting="class", by="label", tasks=tasks)
    assert list_classes(plan, LABELS, [0]) == [0, 1]
    assert list_classes(plan, LABELS, [0, 2]) == [0, 1, 4]
    assert list_classes(plan, LABELS, [0], neighbours=True) == [0, 1]
    blurred = make_plan(setting="class", by="label", tasks=tasks, blur=0.2)
    assert list_classes(blurred, LABELS, [0], neighbours=True) == [0, 1, 2]
    assert list_classes(make_plan(), LABELS, [0]) is None
