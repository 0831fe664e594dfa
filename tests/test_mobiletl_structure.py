"""Which blocks are found, in what nets, where a net is cut, and what is refused."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fedtune.errors import ModelError, RecipeError
from fedtune.tasks import Task
from fedtune.techniques import UnfrozenBatchNorm2d
from fedtune.techniques._layers.layer_replacement import ForwardOverride
from fedtune.techniques.mobile._frozen_prefix import run_frozen_prefix
from fedtune.techniques.mobile._inverted_residual import TailLayers, find_inverted_residuals, split_before_last_blocks
from tests.mobile_nets import SmallNet, age, hard_net, in_transformers, pictures
from tests.own_nets import net
from tests.technique_steps import IMAGES, TEXT, chosen, logits, shared
from tests.tiny import bert


@pytest.mark.parametrize(
    ("build", "count", "without_expansion", "gates"),
    [
        (lambda: net("efficientnet-lite"), 16, 1, 0),
        (lambda: net("mobilenet-v2"), 17, 1, 0),
        (lambda: net("mobilenet-v3-small"), 11, 1, 9),
        (in_transformers, 16, 0, 0),
        (SmallNet, 5, 1, 0),
    ],
)
def test_every_block_of_a_mobile_net_is_found(
    build: Callable[[], nn.Module], count: int, without_expansion: int, gates: int
) -> None:
    found = find_inverted_residuals(build())
    assert len(found) == count
    assert sum(len(block.convolutions) == 2 for block in found) == without_expansion
    assert sum(bool(block.gate_layers) for block in found) == gates
    assert all(len(block.inner_norms) == len(block.activations) == len(block.convolutions) - 1 for block in found)


def test_a_blocks_layers_are_told_apart() -> None:
    block = find_inverted_residuals(hard_net())[-1]
    assert block.name == "blocks.2"
    inside = [f"blocks.2.block.{name}" for name in ("0.0", "1.0", "3.0", "0.1", "1.1", "0.2", "1.2", "3.1")]
    assert [*block.convolutions, *block.inner_norms, *block.activations, block.last_norm] == inside
    gate = ("fc1", "activation", "fc2", "scale_activation")
    assert block.gate_layers == tuple(f"blocks.2.block.2.{name}" for name in gate)


def test_a_net_is_cut_below_its_top_blocks() -> None:
    found = split_before_last_blocks(SmallNet(), 2)
    assert found.frozen_modules == ("stem", "blocks.0", "blocks.1", "blocks.2")
    assert [block.name for block in found.blocks] == ["blocks.3", "blocks.4"]
    assert found.tail == TailLayers(("top.0",), ("top.1",), ("top.2",), ("dropout",))
    assert split_before_last_blocks(in_transformers(), 16).frozen_modules == ("mobilenet_v2.conv_stem",)


@pytest.mark.parametrize("technique", ["mobiletl", "last-blocks", "tinytl"])
@pytest.mark.parametrize(
    ("build", "task", "sentence"),
    [
        (
            lambda: net("resnet18"),
            IMAGES,
            "^ResNet18 has no inverted residual blocks: no convolution filters each chan",
        ),
        (bert, TEXT, "^BertForSequenceClassification has no inverted residual blocks: no convolution filters each"),
        (
            lambda: _Separable(),
            IMAGES,
            "^_Separable has no inverted residual blocks: none of its modules widens, filte",
        ),
    ],
)
def test_a_net_without_such_blocks_is_refused_with_what_it_lacks(
    build: Callable[[], nn.Module], task: Task, sentence: str, technique: str
) -> None:
    with pytest.raises(ModelError, match=sentence):
        shared(technique, build(), task)


class _Separable(nn.Module):
    """A depthwise convolution, and an activation after it was narrowed: MobileNetV1."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(3, 3, 3, groups=3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.block(pixel_values)
        return out


def test_more_blocks_than_there_are_is_refused() -> None:
    for technique in ("mobiletl", "last-blocks"):
        with pytest.raises(ModelError, match=r"^SmallNet has 5 inverted residual blocks, not 6; take fewer$"):
            shared(technique, SmallNet(), IMAGES, blocks=6)


class _Shifted(SmallNet):
    """It does something between its modules."""

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        return super().logits(pixels) if not self.blocks else self._rest(self.stem(pixels) + 1)

    def _rest(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.stages()[1:]:
            x = stage(x)
        return x


def test_a_net_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(
        ModelError, match=r"^_Shifted does more than run modules before blocks\.2; choose full or lora$"
    ):
        shared("mobiletl", _Shifted(), IMAGES)


def test_a_model_that_takes_no_pictures_is_refused() -> None:
    class Odd(SmallNet):
        def logits(self, pixels: torch.Tensor) -> torch.Tensor:
            raise ValueError("32 pixels only")

    with pytest.raises(ModelError, match=r"^Odd cannot be tried out on a picture \(32 pixels only\); choose lora$"):
        shared("mobiletl", Odd(), IMAGES)


def test_a_cache_takes_examples_one_by_one() -> None:
    with pytest.raises(RecipeError, match="cache_outputs stores one example at a time; leave micro_batch_size at 1"):
        chosen("mobiletl", cache=True, micro_batch=2)


def test_what_is_trained_is_what_the_card_says() -> None:
    """Of the last two of five blocks; a batch norm's statistics beside its parameters."""
    names = shared("mobiletl", SmallNet(), IMAGES, blocks=1)
    layers = ("_expand_conv.weight", "_bn0.bias", "_depthwise_conv.weight", "_bn1.bias", "_project_conv.weight")
    last = ("_bn2.weight", "_bn2.bias", "_bn2.running_mean", "_bn2.running_var")
    block = {f"blocks.4.{name}" for name in (*layers, *last)}
    assert set(names) == block | {"top.0.weight", "top.1.bias", "fc.weight", "fc.bias"}
    frozen_head = shared("mobiletl", SmallNet(), IMAGES, blocks=1, head="freeze", last_norm="frozen")
    assert set(frozen_head) == {name for name in block if "running" not in name} | {"fc.weight", "fc.bias"}
    gates = [name for name in shared("mobiletl", hard_net(), IMAGES, blocks=1) if ".fc" in name]
    assert gates == [f"blocks.2.block.2.fc{number}.{kind}" for number in (1, 2) for kind in ("bias", "weight")]


def test_last_blocks_trains_all_of_them_with_their_statistics() -> None:
    model = SmallNet()
    names = shared("last-blocks", model, IMAGES, blocks=2)
    state = {name for name in model.state_dict() if not name.endswith("num_batches_tracked")}
    assert set(names) == {name for name in state if name.startswith(("blocks.3.", "blocks.4.", "top.", "fc."))}
    assert sum(isinstance(layer, UnfrozenBatchNorm2d) for layer in model.modules()) == 7
    quiet = shared("last-blocks", SmallNet(), IMAGES, blocks=2, head="freeze", norms="frozen")
    assert set(quiet) == {name for name in names if "running" not in name and not name.startswith("top.")}


@pytest.mark.parametrize("build", [SmallNet, hard_net, in_transformers, lambda: net("efficientnet-lite")])
def test_the_frozen_part_gives_in_micro_batches_what_it_gives_on_the_whole_batch_and_no_graph(
    build: Callable[[], nn.Module],
) -> None:
    plain, model = age(build()), age(build())
    cut = split_before_last_blocks(model, 2)
    run_frozen_prefix(model, cut.frozen_modules, 1, cache_outputs=False)
    seen: list[torch.Tensor] = []
    for one in (plain, model):
        block = one.get_submodule(cut.blocks[0].name)
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        one.train(one is model)  # the frozen part must not follow
        one(**pictures(5))
    whole, pieces = seen[0].detach(), seen[1]
    assert not pieces.requires_grad
    assert float((pieces - whole).abs().max()) <= 1e-5 * float(whole.abs().max())


class _Twice(ForwardOverride):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_the_frozen_part_runs_what_already_stood_in_for_its_modules() -> None:
    plain, model = age(SmallNet()), age(SmallNet())
    for one in (plain, model):
        _Twice().install(one.blocks[0])
    run_frozen_prefix(model, split_before_last_blocks(SmallNet(), 3).frozen_modules, 5, cache_outputs=False)
    assert torch.equal(logits(model, pictures(5)), logits(plain, pictures(5)))


def test_statistics_of_the_frozen_part_stay_though_the_whole_model_is_put_in_training_mode() -> None:
    model = age(SmallNet())
    shared("mobiletl", model, IMAGES, blocks=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    model(**pictures(16))
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {f"blocks.{block}._bn2.running_{kind}" for block in (3, 4) for kind in ("mean", "var")}


def test_the_function_is_the_untouched_nets_to_the_bit_on_a_whole_batch() -> None:
    for build in (SmallNet, hard_net, in_transformers):
        plain, model = age(build()), age(build())
        for joined in ("mobiletl", "last-blocks", "batch-norm", "bias"):
            settings = {"blocks": 2, "micro_batch": 5} if joined == "mobiletl" else {}
            model = age(build())
            shared(joined, model, IMAGES, **settings)
            assert torch.equal(logits(model, pictures(5)), logits(plain, pictures(5))), joined
