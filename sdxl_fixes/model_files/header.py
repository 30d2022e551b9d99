"""The header of a .safetensors file: 8 bytes of length, JSON, then the tensors' bytes. Strict reading;
nothing about schedules here.

Strict means: what the reference reader (safetensors 0.4 to 0.8) refuses is refused here, and so is what it
lets pass but we could not write back the same (a key twice, an unknown field). Only the header is ever read,
and a pickle is never opened.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from sdxl_fixes.errors import about, shown

LIMIT = 100_000_000  # bytes of JSON that the reference reader accepts
# values and quotes in a header (SDXL's has 25,000): more take gigabytes and half a minute to read
CROWD = 2_000_000
# a metadata entry of spaces: room that any safetensors writer can leave in the header
ROOM_KEY = "sdxl_fixes.room"
ROOM = 32 * 1024  # bytes that our own saves leave; a schedule record with 1000 betas is 21 KB

# bits of each dtype
DTYPES = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64}
DTYPES |= dict.fromkeys(
    ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8
)
DTYPES |= (
    dict.fromkeys(("I16", "U16", "F16", "BF16"), 16)
    | dict.fromkeys(("I32", "U32", "F32"), 32)
    | dict.fromkeys(("I64", "U64", "F64"), 64)
)

_OTHERS = (
    (
        b"PK\x03\x04",
        "it is a zip archive, as PyTorch's pickles are: convert it to safetensors first "
        "(pickles are never opened here)",
    ),
    (b"\x80", "it is a pickle: convert it to safetensors first (pickles are never opened here)"),
    (b"version ", "it is a Git LFS pointer, not the file itself: run git lfs pull"),
    (b"GGUF", "it is a GGUF file"),
    (b"<", "it is a web page, probably a failed download"),
)


class FormatError(ValueError):
    """The file is no well-formed safetensors file; the message is one sentence that names it."""


@dataclass(frozen=True)
class Tensor:
    """One entry: dtype, shape, and where its bytes lie, counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header. ``raw`` is its JSON as it stands in the file, padding included."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    raw: bytes = field(repr=False)
    data_size: int

    @property
    def size(self) -> int:
        """Bytes of JSON and padding; the tensors' bytes begin at 8 + size."""
        return len(self.raw)

    @property
    def file_size(self) -> int:
        """Bytes of the whole file."""
        return 8 + len(self.raw) + self.data_size


def read_header(path: Path) -> Header:
    """The checked header of ``path``. Raises FormatError, in one sentence, for anything but a well-formed
    safetensors file."""
    with about(path), open(path, "rb") as file:
        return parse_header(file, str(path))


def parse_header(file: BinaryIO, name: str) -> Header:
    """The checked header of an open file that errors call ``name``."""
    file_size = file.seek(0, 2)
    file.seek(0)
    start = file.read(8)
    for magic, what in _OTHERS:
        # a header of 128 bytes also starts with \x80
        if start.startswith(magic) and not file.read(1) == b"{":
            raise FormatError(f"{name} is no safetensors file: {what}")
        file.seek(len(start))
    if len(start) < 8:
        raise FormatError(
            f"{name} is no safetensors file: it has {file_size} bytes, and the length of the "
            "header alone takes 8"
        )
    size = int.from_bytes(start, "little")
    if size > LIMIT:
        raise FormatError(
            f"{name} is no safetensors file: its first 8 bytes announce a header of {size} "
            f"bytes, and {LIMIT} is the limit"
        )
    if 8 + size > file_size:
        raise FormatError(
            f"{name} is cut off: its header should take {8 + size} bytes, the file has {file_size}"
        )
    if file.read(min(size, 1)) != b"{":
        raise FormatError(f"{name} is no safetensors file: its header does not begin with {{")
    raw = b"{" + file.read(size - 1)
    if _crowded(raw):
        raise FormatError(f"{name} is no model: its header has more than {CROWD} values or quotes")
    metadata, tensors = _checked(raw, name)
    data_size = file_size - 8 - size
    _check_tiling(tensors, data_size, name)
    return Header(metadata, tensors, raw, data_size)


def encode_header(
    metadata: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    size: int | Callable[[int], int] | None = None,
) -> bytes:
    """The JSON, metadata first, padded with spaces to ``size`` bytes, which may be told by the JSON's length
    (None: to the next multiple of 8). Raises ValueError if longer."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, tensor in tensors.items():
        content[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [tensor.begin, tensor.end],
        }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    if size is None or callable(size):
        size = -(-len(text) // 8) * 8 if size is None else size(len(text))
    if max(len(text), size) > LIMIT:
        raise ValueError(
            f"the header would take {max(len(text), size)} bytes, and {LIMIT} is the limit of "
            "the safetensors format"
        )
    if len(text) > size:
        raise ValueError(f"the header takes {len(text)} bytes and there is room for {size}")
    return text.ljust(size)


def _crowded(raw: bytes) -> bool:
    """Whether reading the JSON would take more memory than any model's. Its strings may be of any length."""
    if len(raw) <= CROWD:
        return False
    text = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    if text.count(b'"') > CROWD:
        return True
    outside = b"".join(text.split(b'"')[::2])
    return outside.count(b",") + outside.count(b"[") + outside.count(b"{") > CROWD


def _checked(raw: bytes, name: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        content = json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{name} has a header that is not UTF-8 ({error.reason} at byte {error.start})"
        ) from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{name} has a header that is not strict JSON: {error}") from error
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{name} has __metadata__ that is not an object of strings")
    tensors = {
        key: _tensor(value, f"{name} has a bad entry {key[:80]!r} in its header")
        for key, value in content.items()
    }
    try:
        for word in (*metadata, *metadata.values(), *tensors):
            word.encode()
    except UnicodeEncodeError as error:
        raise FormatError(
            f"{name} has a header with half a surrogate pair, which is not Unicode text"
        ) from error
    return metadata, tensors


def _tensor(value: Any, sentence: str) -> Tensor:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{sentence}: expected an object with dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not (_naturals(shape) and _naturals(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise FormatError(
            f"{sentence}: shape and data_offsets must be lists of whole numbers, the two offsets in order"
        )
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(f"{sentence}: unknown dtype {shown(dtype)}")
    bits = 1
    for length in (*shape, DTYPES[dtype]):  # in this order: the reference reader's product may not overflow
        bits *= length
        if max(bits, length) >> 64:
            raise FormatError(f"{sentence}: its shape is larger than any file")
    if bits != 8 * (offsets[1] - offsets[0]):
        raise FormatError(
            f"{sentence}: {dtype} of shape {shown(shape)} takes {bits / 8:g} bytes, its data_offsets "
            f"{shown(offsets[1] - offsets[0])}"
        )
    return Tensor(dtype, tuple(shape), *offsets)


def _check_tiling(tensors: Mapping[str, Tensor], data_size: int, name: str) -> None:
    """The tensors must cover the data without hole or overlap (the reference reader refuses anything
    else)."""
    reached = 0
    for key, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != reached:
            problem = "overlaps the tensor before it" if tensor.begin < reached else "leaves a hole before it"
            raise FormatError(
                f"{name} has an entry {key[:80]!r} in its header that {problem} (byte "
                f"{tensor.begin}, expected {reached})"
            )
        reached = tensor.end
    if reached != data_size:
        problem = "is cut off" if data_size < reached else "has bytes after its last tensor"
        raise FormatError(
            f"{name} {problem}: its header describes {reached} bytes of tensors, the file has {data_size}"
        )


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key {key[:80]!r} is there twice")
        content[key] = value
    return content


def _no_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON number")


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
