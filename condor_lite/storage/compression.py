"""Stored payloads: compressed as they come in, made whole again where they are looked into."""

from __future__ import annotations

import threading

import zstandard

# What short answers share: 6 segments of normals keep 35 % of their bytes without it, 24 % with it.
# Never to be edited: stored payloads can't be read with another.
_DICTIONARY = (
    b'{"step":60,"type":"builtin","name":"laplace","params":{"loc":0.000,"scale":0.000}}'
    b'{"step": 60, "type": "builtin", "name": "laplace", "params": {"loc": 0.000, "scale": 0.000}}'
    b'{"step":60,"type":"builtin","name":"logistic","params":{"loc":0.000,"scale":0.000}}'
    b'{"step": 60, "type": "builtin", "name": "logistic", "params": {"loc": 0.000, "scale": 0.000}}'
    b'{"step":60,"type":"builtin","name":"t","params":{"df":0.000,"loc":0.000,"scale":0.000}}'
    b'{"step": 60, "type": "builtin", "name": "t", "params": {"df": 0.000, "loc": 0.000, "scale": 0.000}}'
    b'{"step":60,"type":"builtin","name":"norm","params":{"loc":0.000,"scale":0.000}}'
    b'{"step": 60, "type": "builtin", "name": "norm", "params": {"loc": 0.000, "scale": 0.000}}'
    b'[{"step":60,"type":"mixture","components":[{"density":{"type":"builtin","name":"norm",'
    b'"params":{"loc":0.0,"scale":0.0002}},"weight":0.5},'
    b'[{"step": 60, "type": "mixture", "components": [{"density": {"type": "builtin", "name": "norm", '
    b'"params": {"loc": 0.0, "scale": 0.0002}}, "weight": 0.5}, '
)

# 60 segments take 70 us at level 5 and keep 12 % (6 digits a number) to 19 % (17 digits); higher levels gain
# little. Long answers would hold the writer up for longer than they gain.
_LEVEL = 5
_LONG_BYTES = 16 * 1024
_LEVEL_OF_LONG = 3


class _Codec(threading.local):
    """zstandard's contexts: costly to make, not to be shared between threads."""

    def __init__(self) -> None:
        dictionary = zstandard.ZstdCompressionDict(_DICTIONARY, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
        self.compressor = zstandard.ZstdCompressor(level=_LEVEL, dict_data=dictionary)
        self.compressor_of_long = zstandard.ZstdCompressor(level=_LEVEL_OF_LONG)
        self.decompressor = zstandard.ZstdDecompressor(dict_data=dictionary)  # of those without it, too


_codec = _Codec()


def compress(payload: bytes) -> bytes:
    if len(payload) > _LONG_BYTES:
        return _codec.compressor_of_long.compress(payload)
    return _codec.compressor.compress(payload)


def decompress(body: bytes) -> bytes:
    """A stored payload's bytes as the model sent them."""
    return _codec.decompressor.decompress(body)


def whole_bytes(body: bytes) -> int:
    """How many bytes a stored payload has when it is whole."""
    return int(zstandard.frame_content_size(body))
