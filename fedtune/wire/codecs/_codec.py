"""The base classes of codecs, and the values that they exchange.

A codec takes one tensor. It writes bytes of its own, and may leave smaller tensors to the codec after it. The number of
bytes and the shapes of these tensors follow from the shape of the tensor alone, so that both ends know them before.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor

from fedtune.recipe.unit_registry import NamedUnit

__all__ = ["Codec", "CodecKind", "Coded", "EntropyCoder", "Layout", "Shape"]

Shape = tuple[int, ...]
CodecKind = Literal["factors", "selects", "quantises", "compresses"]
"""What a codec does. In a recipe, codecs stand in this order, one of each kind at most."""


class Layout(NamedTuple):
    """The bytes that a codec writes for a tensor, and the shapes of the tensors that it leaves to the next codec."""

    num_bytes: int
    shapes: tuple[Shape, ...] = ()


class Coded(NamedTuple):
    """What a codec made of a tensor: its bytes, and the tensors that it leaves to the next codec."""

    content: bytes
    tensors: tuple[Tensor, ...] = ()


class Codec(NamedUnit, ABC):
    """Codes one tensor. Its fields are its settings; all methods are pure."""

    kind: ClassVar[CodecKind]
    suits_weights: ClassVar[bool] = False
    """Whether whole weights survive it, and not only changes of them: for ``wire.down``."""

    @property
    def is_contraction(self) -> bool:
        """Whether what is lost is smaller than the tensor, which error feedback needs."""
        return True

    @abstractmethod
    def get_layout(self, shape: Shape) -> Layout:
        """Return what the codec makes of a tensor of this shape."""

    @abstractmethod
    def encode(self, tensor: Tensor, seed: int) -> Coded:
        """Code a tensor on the CPU. ``seed`` is that of the run, the round, the client and the tensor."""

    @abstractmethod
    def decode(self, content: bytes, tensors: Sequence[Tensor], shape: Shape, seed: int) -> Tensor:
        """Undo ``encode`` as far as the codec can. Both arguments have the sizes of the layout.

        Raise ClientUpdateError for content that ``encode`` never writes. Every machine gets the same bits.
        """

    def changes(self, shape: Shape) -> bool:
        """Return whether the codec does not leave a tensor of this shape as it is."""
        return True

    def count_too_many(self, shape: Shape) -> int:
        """Return how many more values the settings ask for than a tensor of this shape has; 0 if it has enough."""
        return 0


class EntropyCoder(NamedUnit, ABC):
    """Codes the bytes of a whole message, without loss."""

    kind: ClassVar[CodecKind] = "compresses"

    @abstractmethod
    def compress(self, content: bytes) -> bytes:
        """Return the shorter message."""

    @abstractmethod
    def decompress(self, content: bytes, size: int) -> bytes:
        """Return the ``size`` bytes of the message; ClientUpdateError if it has more or fewer, or is damaged."""

    @abstractmethod
    def get_most_bytes(self, size: int) -> int:
        """Return the most bytes that a message of ``size`` bytes can take."""
