"""LwF's term: zero with a zero gradient at the teacher, T squared, old classes only, real tokens only."""

import pytest
import torch
from torch import Tensor, nn

from fedtune.continual._distillation import compute_distillation_loss, predict_with_teacher, select_real_tokens
from tests.test_fisher_sums import Examples, Linear
from tests.tiny import few_texts, llama


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test draws the same numbers, whichever ran before it."""
    torch.manual_seed(0)


def test_term_and_gradient_are_zero_at_the_teacher() -> None:
    logits = torch.randn(4, 6, requires_grad=True)
    loss = compute_distillation_loss(logits, logits.detach(), 2.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-6


def test_term_is_scaled_kullback_leibler_divergence() -> None:
    student, teacher = torch.randn(2, 5, 4).unbind()
    p, q = (teacher / 3).softmax(-1), (student / 3).softmax(-1)
    wanted = 9 * (p * (p.log() - q.log())).sum(-1).mean()
    assert compute_distillation_loss(student, teacher, 3.0).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_gradient_does_not_shrink_with_temperature() -> None:
    """For large T the gradient tends to that of (z - z')^2 / (2 C), whatever T is: without T^2 it would go to zero."""
    student, teacher = (torch.randn(1, 4, dtype=torch.float64) for _ in range(2))
    sizes = []
    for temperature in (50.0, 100.0):
        given = student.clone().requires_grad_(True)
        compute_distillation_loss(given.float(), teacher, temperature).backward()
        assert given.grad is not None
        sizes.append(given.grad)
    centred = (student - student.mean()) - (teacher - teacher.mean())
    for size in sizes:
        assert torch.allclose(size, centred / 4, rtol=0.05, atol=1e-3)


def test_only_old_classes_are_distilled() -> None:
    """fed-mammoth slices to the new classes, which distils nothing old."""
    student, teacher = torch.randn(2, 3, 5).unbind()
    student.requires_grad_(True)
    compute_distillation_loss(student, teacher, 2.0, [0, 1]).backward()
    assert student.grad is not None
    assert student.grad[:, :2].abs().min() > 0
    assert not student.grad[:, 2:].any()


def test_masked_logits_give_no_nan() -> None:
    logits = torch.tensor([[1.0, 2.0, -torch.inf]], requires_grad=True)
    loss = compute_distillation_loss(logits, torch.tensor([[2.0, 1.0, 0.0]]), 2.0, [0, 1])
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_teacher_answers_without_dropout_and_leaves_the_model_alone() -> None:
    model = Linear().train()
    held = {name: one.clone() for name, one in model.state_dict().items()}
    batch = Examples().make_batch([0, 1])
    teacher = {"head.weight": torch.ones_like(model.head.weight)}
    found = predict_with_teacher(model, teacher, batch)
    assert torch.allclose(found, batch["pixel_values"].sum(1, keepdim=True).expand(-1, 3), atol=1e-5)
    assert not found.requires_grad
    assert model.training
    assert all(torch.equal(one, held[name]) for name, one in model.state_dict().items())


def test_padding_is_not_distilled() -> None:
    logits = torch.arange(12.0).reshape(1, 3, 4)
    batch = {"attention_mask": torch.tensor([[1, 1, 0]])}
    assert torch.equal(select_real_tokens(logits, batch), logits[0, :2])
    assert torch.equal(select_real_tokens(logits[0], batch), logits[0])


def test_teacher_shares_the_base() -> None:
    """Only the given tensors differ, so a teacher costs no second model."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.head = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> object:
            return type("Output", (), {"logits": self.head(self.base(x))})()

    model = Two()
    zero = {"head.weight": torch.zeros(2, 2), "head.bias": torch.zeros(2)}
    assert not predict_with_teacher(model, zero, {"x": torch.ones(1, 2)}).any()


def test_language_model_is_distilled_at_every_real_token() -> None:
    """The teacher differs in its last layer. Texts in a batch count by their tokens, padding does not."""
    model = llama().eval()
    batch = few_texts(language=True).make_batch([0, 1, 2])
    other = {"lm_head.weight": torch.randn_like(model.lm_head.weight)}
    student, teacher = model(**batch).logits, predict_with_teacher(model, other, batch)
    one, two = (select_real_tokens(logits, batch) for logits in (student, teacher))
    assert len(one) == int(batch["attention_mask"].sum()) < batch["attention_mask"].numel()
    assert compute_distillation_loss(one, two, 2.0) > 0.1
    own = {"lm_head.weight": model.lm_head.weight.detach().clone()}
    same = select_real_tokens(predict_with_teacher(model, own, batch), batch)
    assert compute_distillation_loss(one, same, 2.0).item() == pytest.approx(0, abs=1e-5)
