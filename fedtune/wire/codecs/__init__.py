"""Codecs make messages small. Each codec is one file; a recipe names them in ``wire.up`` and ``wire.down``."""

from fedtune.wire.codecs._codec import Codec, CodecKind, Coded, EntropyCoder, Layout, Shape
from fedtune.wire.codecs._pipeline import (
    WirePipeline,
    build_wire_pipeline,
    count_coded_bytes,
    decode_values,
    encode_values,
)

__all__ = [
    "Codec",
    "CodecKind",
    "Coded",
    "EntropyCoder",
    "Layout",
    "Shape",
    "WirePipeline",
    "build_wire_pipeline",
    "count_coded_bytes",
    "decode_values",
    "encode_values",
]
