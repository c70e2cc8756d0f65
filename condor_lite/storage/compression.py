"""Stored payloads: compressed as they come in, made whole again where they are looked into.

An answer is mostly digits that nothing can foresee, in a frame that repeats. Each run of digits from its
first that is not 0 on is put aside, and a "1" left in its place; what is compressed is the runs' lengths, the
frame, and all digits in a row. Put back, they are the answer's very bytes, whatever it was.
"""

from __future__ import annotations

import re
import threading
from io import BytesIO

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

_SPLIT = 1  # a payload's first byte where its digits stand apart; the next three have its whole length
_HEADER_BYTES = 4
_DIGITS = re.compile(rb"([1-9][0-9]{0,254})")  # a length is a byte
_STAND_IN = b"1"

# An answer of 60 segments takes 120 us, half of them in `_split`; higher levels gain little. Among digits a
# match of fewer than 6 bytes costs more than it saves.
_LEVEL = 5
_SHORTEST_MATCH = 6
_LARGE_BYTES = 256 * 1024  # a larger answer would hold up others for longer than it gains
_LEVEL_OF_LARGE = 3
_PORTION_BYTES = 16 * 1024  # what is split in one go: no other thread has its turn in that


class _Codec(threading.local):
    """zstandard's contexts: costly to make, not to be shared between threads."""

    def __init__(self) -> None:
        raw = zstandard.DICT_TYPE_RAWCONTENT
        whole = zstandard.ZstdCompressionDict(_DICTIONARY, dict_type=raw)
        dictionary = zstandard.ZstdCompressionDict(_FRAME, dict_type=raw)
        parameters = zstandard.ZstdCompressionParameters.from_level(
            _LEVEL,
            source_size=8192,
            dict_size=len(_FRAME),
            min_match=_SHORTEST_MATCH,
            strategy=zstandard.STRATEGY_LAZY2,
        )
        self.compressor = zstandard.ZstdCompressor(dict_data=dictionary, compression_params=parameters)
        self.compressor_of_large = zstandard.ZstdCompressor(level=_LEVEL_OF_LARGE)
        self.decompressor = zstandard.ZstdDecompressor(dict_data=dictionary)
        self.decompressor_of_whole = zstandard.ZstdDecompressor(dict_data=whole)  # of those without it, too


def compress(payload: bytes) -> bytes:
    if len(payload) > _LARGE_BYTES:
        return _codec.compressor_of_large.compress(payload)
    lengths, frame, digits = _split(payload)
    # Digits in a block of their own, with a code of their own.
    stream = _codec.compressor.compressobj(size=len(lengths) + len(frame) + len(digits))
    return b"".join(
        (
            (len(payload) << 8 | _SPLIT).to_bytes(_HEADER_BYTES, "little"),
            stream.compress(lengths),
            stream.compress(frame),
            stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK),
            stream.compress(digits),
            stream.flush(),
        )
    )


def decompress(body: bytes) -> bytes:
    """A stored payload's bytes as the model sent them."""
    if body[0] != _SPLIT:
        return _codec.decompressor_of_whole.decompress(body)
    content = _codec.decompressor.decompress(body[_HEADER_BYTES:])
    count = (len(content) - whole_bytes(body)) // 2
    lengths, rest = content[:count], content[count:]
    last = len(rest) - sum(lengths)
    payload = [b""] * (2 * count + 1)
    payload[::2] = rest[:last].split(_STAND_IN)
    payload[1::2] = map(BytesIO(rest[last:]).read, lengths)
    return b"".join(payload)


def whole_bytes(body: bytes) -> int:
    """How many bytes a stored payload has when it is whole."""
    if body[0] == _SPLIT:
        return int.from_bytes(body[:_HEADER_BYTES], "little") >> 8
    return int(zstandard.frame_content_size(body))


def _split(payload: bytes) -> tuple[bytes, bytes, bytes]:
    """The lengths of the runs of digits, the frame with a stand-in for each, and the runs one after another:
    as long as the payload and twice the number of runs.
    """
    frame, runs = [], []
    for at in range(0, len(payload), _PORTION_BYTES):  # a run that is cut is two
        parts = _DIGITS.split(payload[at : at + _PORTION_BYTES])
        frame.append(_STAND_IN.join(parts[::2]))
        runs += parts[1::2]
    return bytes(map(len, runs)), b"".join(frame), b"".join(runs)


# What frames share; nor is this ever to be changed.
_, _FRAME, _ = _split(_DICTIONARY.replace(b"0.000", b"0.0001"))
_codec = _Codec()
