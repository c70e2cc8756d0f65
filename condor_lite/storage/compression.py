"""Stored payloads: compressed as they come in, made whole again where they are looked into.

An answer is mostly digits that nothing can foresee, in a frame that repeats. Each run of digits from its
first that is not 0 on is put aside, and a "1" left in its place; what is compressed is the runs' lengths, the
frame, and all digits in a row. Put back, they are the answer's very bytes, whatever it was.
"""

from __future__ import annotations

import threading
from io import BytesIO

import numpy as np
import numpy.typing as npt
import zstandard

from condor_lite.errors import StorageError

Places = npt.NDArray[np.intp]

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
_STAND_IN, _ZERO = b"10"  # as numbers, 49 and 48
_LONGEST_RUN = 255  # a length is a byte
_MOST_ZEROS = 8  # left in the frame before a run

# An answer of 60 segments takes 90 us, half of them in `_split`; higher levels gain little. Among digits a
# match of fewer than 6 bytes costs more than it saves.
_LEVEL = 5
_SHORTEST_MATCH = 6
_LARGE_BYTES = 256 * 1024  # a larger answer would hold up others for longer than it gains
_LEVEL_OF_LARGE = 3


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
    payload[::2] = rest[:last].split(b"%c" % _STAND_IN)
    payload[1::2] = map(BytesIO(rest[last:]).read, lengths)
    return b"".join(payload)


def restored(body: bytes, whose: str) -> bytes:
    """`decompress`, where somebody looks at the answer. Raises StorageError where the file is damaged."""
    try:
        return decompress(body)
    except (zstandard.ZstdError, ValueError, IndexError) as error:
        raise StorageError(
            f"the stored answer of {whose} is damaged ({error}); restore the database from a backup"
        ) from error


def whole_bytes(body: bytes) -> int:
    """How many bytes a stored payload has when it is whole."""
    if body[0] == _SPLIT:
        return int.from_bytes(body[:_HEADER_BYTES], "little") >> 8
    return int(zstandard.frame_content_size(body))


def _split(payload: bytes) -> tuple[bytes, bytes, bytes]:
    """The lengths of the runs of digits, the frame with a stand-in for each, and the runs one after another:
    as long as the payload and twice the number of runs. Leaves other threads their turn.
    """
    chars = np.frombuffer(payload, np.uint8)
    digit = chars - np.uint8(_ZERO) < 10
    edges = np.flatnonzero(digit[1:] != digit[:-1]) + 1
    if digit[:1].any():
        edges = np.insert(edges, 0, 0)
    if digit[-1:].any():
        edges = np.append(edges, len(chars))
    starts, ends = edges[::2], edges[1::2]
    for _ in range(_MOST_ZEROS):
        zero = chars[starts] == _ZERO
        if not zero.any():
            break
        digit[starts[zero]] = False
        starts = starts + zero
        left = starts < ends
        starts, ends = starts[left], ends[left]
    starts, ends = _cut(starts, ends)
    frame, framed = chars.copy(), ~digit
    frame[starts] = _STAND_IN
    framed[starts] = True
    return (ends - starts).astype(np.uint8).tobytes(), frame[framed].tobytes(), chars[digit].tobytes()


def _cut(starts: Places, ends: Places) -> tuple[Places, Places]:
    """The runs, with those that are too long in pieces."""
    if (ends - starts <= _LONGEST_RUN).all():
        return starts, ends
    pieces = -(-(ends - starts) // _LONGEST_RUN)
    before = np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.repeat(starts, pieces) + _LONGEST_RUN * (np.arange(len(before)) - before)
    return starts, np.minimum(starts + _LONGEST_RUN, np.repeat(ends, pieces))


# What frames share; nor is this ever to be changed.
_, _FRAME, _ = _split(_DICTIONARY.replace(b"0.000", b"0.0001"))
_codec = _Codec()
