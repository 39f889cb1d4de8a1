"""Messages of the p2p transport: a header that says all about itself, entries, payload.

    header   64 bytes, little-endian, see Header; its last field is the CRC-32 of what stands before it and the entries
    entries  (expert, rows) as two uint32 each; ROWS only: its rows are sorted by these entries
    payload  rows * row_bytes bytes

A ROWS message is answered by one RESULTS or REFUSED message with the same serial, rows and row_bytes; answers come in
the order in which a connection's messages were sent. REFUSED has a text, cut or padded with zeros to the length that
the results would have had, so that whoever has laid out room for results needs no second way of receiving.

Where rows travel by lanes, no message has a payload; all else is the same.

The payload has no checksum of its own: TCP's and the kernel's stand for it. The header has one because a wrong length
would turn all that follows to nonsense.
"""

from enum import IntEnum
from struct import Struct
from typing import NamedTuple
from zlib import crc32

import torch

MAGIC = b"HRDR"
VERSION = 1
MAX_ROWS = 1 << 16  # of one message
MAX_ENTRIES = 1 << 12

_FIELDS = Struct("<4sBBBBqQQIIIIII4x")
_CRC = Struct("<I")
ENTRY_BYTES = 8
HEADER_BYTES = _FIELDS.size + _CRC.size

DTYPE_CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.float64: 4}


class Kind(IntEnum):
    ROWS = 1
    RESULTS = 2
    REFUSED = 3


_ROWS, _RESULTS, _REFUSED = map(int, Kind)  # cheaper to name


class Refusal(IntEnum):
    """Why a REFUSED message refuses; NONE in all others."""

    NONE = 0
    STALE_EPOCH = 1
    NOT_HELD = 2
    FAILED = 3


class MalformedMessage(Exception):
    """Bytes that are no message, or one beyond the receiver's limits. The connection is of no use any more."""


class Header(NamedTuple):
    """What a message says of itself.

    Attributes:
        dtype: code of the rows' type.
        refusal: a Refusal.
        epoch: of the sender's expert map; an answer repeats the epoch, step, serial, layer and micro-batch it answers.
        step: number of the sender's step.
        serial: number of the message at its sender.
        micro_batch: how many other batches the sender had under way.
        source: who asks.
        entries: number of entries.
        rows, row_bytes: of the payload.
    """

    magic: bytes
    version: int
    kind: int
    dtype: int
    refusal: int
    epoch: int
    step: int
    serial: int
    layer: int
    micro_batch: int
    source: int
    entries: int
    rows: int
    row_bytes: int

    @classmethod
    def of(cls, message: bytes) -> "Header":
        """The header of a message that this process has made itself; nothing is checked."""
        return cls(*_FIELDS.unpack_from(message))

    @property
    def length(self) -> int:
        """Bytes of the whole message."""
        return self.payload_at + self.rows * self.row_bytes

    @property
    def payload_at(self) -> int:
        """Bytes before the payload; a multiple of 8."""
        return HEADER_BYTES + self.entries * ENTRY_BYTES


def encode_rows(
    entries: list[int],
    dtype: int,
    epoch: int,
    step: int,
    serial: int,
    layer: int,
    micro_batch: int,
    source: int,
    rows: int,
    row_bytes: int,
) -> bytes:
    """Header and entries of a ROWS message; `entries` are the pairs of expert and rows, one after the other."""
    count = len(entries) >> 1
    about = epoch, step, serial, layer, micro_batch, source, count, rows, row_bytes
    fields = _FIELDS.pack(MAGIC, VERSION, _ROWS, dtype, 0, *about)
    packed = _entries(count).pack(*entries)
    return fields + _CRC.pack(crc32(packed, crc32(fields))) + packed


def encode_answer(asked: Header, refusal: int = Refusal.NONE) -> bytes:
    """Header of the answer to a ROWS message: RESULTS, or REFUSED if a refusal is given."""
    kind = _REFUSED if refusal else _RESULTS
    fields = _FIELDS.pack(MAGIC, VERSION, kind, asked.dtype, refusal, *asked[5:11], 0, *asked[12:])
    return fields + _CRC.pack(crc32(fields))


def refusal_text(text: str, asked: Header) -> bytes:
    """Payload of a REFUSED message: as long as the results would have been."""
    length = asked.rows * asked.row_bytes
    return text.encode()[:length].ljust(length, b"\0")


def decode_header(data: memoryview, dtype: int, row_bytes: int, max_entries: int) -> Header:
    """The header that `data` begins with, at least HEADER_BYTES long; decode_entries() says whether it came unchanged.

    Raises:
        MalformedMessage: it is none, or its rows are of another type or size than the receiver's, or it has more
            entries or rows than can be.
    """
    header = Header(*_FIELDS.unpack_from(data))
    if header.magic != MAGIC or header.version != VERSION:
        raise MalformedMessage(f"no message: begins with {bytes(data[:6]).hex()}")
    if header.dtype != dtype or header.row_bytes != row_bytes:
        raise MalformedMessage(f"rows of {header.row_bytes} bytes and type {header.dtype}, not {row_bytes} and {dtype}")
    if header.entries > max_entries or not 0 < header.rows <= MAX_ROWS:
        raise MalformedMessage(f"{header.entries} entries and {header.rows} rows are beyond the limits")
    return header


def decode_entries(data: memoryview, header: Header) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Experts and rows of each, in the order of the payload; none if it is no ROWS message.

    Args:
        data: header and entries, at least.

    Raises:
        MalformedMessage: header or entries are not as they were sent, the entries' rows are not the message's, or an
            expert has several entries.
    """
    size = _FIELDS.size
    count = header.entries
    packed = data[HEADER_BYTES : HEADER_BYTES + count * ENTRY_BYTES]
    if _CRC.unpack_from(data, size)[0] != crc32(packed, crc32(data[:size])):
        raise MalformedMessage("the header's checksum is wrong")
    numbers = _entries(count).unpack(packed)
    experts, counts = numbers[::2], numbers[1::2]
    if header.kind == _ROWS and sum(counts) != header.rows:
        raise MalformedMessage(f"the entries have {sum(counts)} rows, the message has {header.rows}")
    if len(set(experts)) != count:
        raise MalformedMessage("an expert has several entries")
    return experts, counts


_entry_structs: list[Struct] = []


def _entries(count: int) -> Struct:
    """The struct of so many entries, made once; count is bounded by MAX_ENTRIES."""
    while len(_entry_structs) <= count:
        _entry_structs.append(Struct(f"<{2 * len(_entry_structs)}I"))
    return _entry_structs[count]
