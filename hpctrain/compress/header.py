"""The 64 bytes in front of a payload: what it is, so that a wrong one is refused and not added.

    bytes   field
    0-3     "HPCT"
    4-5     version of this format
    6-7     codec             1 topk, 2 randomk, 3 bf16, 4 fp16, 5 int8, 6 sign
    8-9     type of values    1 float32, 2 float64, 3 bfloat16, 4 float16, 0 none
    10-15   0
    16-55   step, start, stop, k, nbytes: 64 bits each, unsigned
    56-59   fingerprint of the layout
    60-63   0

All of it is little-endian. [start, stop) is the range of the layout that was compressed; k counts
entries; nbytes is the whole payload, header included.

Layer: compress. Knows nothing of devices and codecs.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields

from hpctrain.errors import HpctrainError

__all__ = ["CODECS", "HEADER_BYTES", "Header"]

HEADER_BYTES = 64
VERSION = 1
MAGIC = b"HPCT"
FORMAT = struct.Struct("<4sHHHHIQQQQQII")
CODECS = {"topk": 1, "randomk": 2, "bf16": 3, "fp16": 4, "int8": 5, "sign": 6}
VALUES = {"none": 0, "float32": 1, "float64": 2, "bfloat16": 3, "float16": 4}
_CODEC_NAMES = {code: name for name, code in CODECS.items()}
_VALUE_NAMES = {code: name for name, code in VALUES.items()}


@dataclass(frozen=True, slots=True)
class Header:
    """What a payload is; the fields are those of the format."""

    codec: str
    values: str
    step: int
    start: int
    stop: int
    k: int
    nbytes: int
    layout: int

    def encode(self) -> bytes:
        """The 64 bytes."""
        return FORMAT.pack(
            MAGIC, VERSION, CODECS[self.codec], VALUES[self.values], 0, 0, self.step, self.start,
            self.stop, self.k, self.nbytes, self.layout, 0,
        )  # fmt: skip

    @classmethod
    def decode(cls, data: bytes) -> Header:
        """The header in the first 64 bytes of `data`.

        Raises:
            HpctrainError: these are not a header of this version.
        """
        if len(data) < HEADER_BYTES or data[:4] != MAGIC:
            raise HpctrainError(
                f"a payload begins with {data[:4]!r}, not with {MAGIC!r}: these are other bytes; "
                "do all ranks send and receive in the same order?"
            )
        _, version, codec, values, _, _, *numbers, layout, _ = FORMAT.unpack(data[:HEADER_BYTES])
        if version != VERSION:
            raise HpctrainError(
                f"a payload has version {version}, this hpctrain reads {VERSION}: install the same "
                "hpctrain on all nodes"
            )
        if codec not in _CODEC_NAMES or values not in _VALUE_NAMES:
            raise HpctrainError(
                f"a payload is of codec {codec} with values {values}, which do not exist: its "
                "header is damaged"
            )
        step, start, stop, k, nbytes = numbers
        names = _CODEC_NAMES[codec], _VALUE_NAMES[values]
        return cls(*names, step, start, stop, k, nbytes, layout)

    def require(self, expected: Header) -> None:
        """Refuse a payload that is not what is expected.

        Raises:
            HpctrainError: with the first field that differs.
        """
        for field in fields(self):
            found, wanted = getattr(self, field.name), getattr(expected, field.name)
            if found != wanted:
                raise HpctrainError(
                    f"a payload with {field.name} = {found} came where {field.name} = {wanted} was "
                    "expected: all ranks must have the same run file, layout and step"
                )
