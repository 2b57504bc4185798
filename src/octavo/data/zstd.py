"""Zstandard streams, by the package zstandard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from octavo.errors import UsageError

# A block of 4 bytes can stand for 128 KiB, so a step of 1 KiB gives at most 32 MiB.
_STEP_BYTES = 1024
_MAX_WINDOW_BYTES = 2**27  # the most that the program zstd reads without --long


class ZstdError(Exception):
    """The data are damaged or cut short."""


@contextmanager
def open_zstd(raw: BinaryIO, mode: str = "rb") -> Iterator[ZstdReader]:
    """The decompressed stream of `raw`. UsageError without the package zstandard."""
    try:
        import zstandard
    except ImportError as error:
        hint = "Install it: pip install 'octavo[zstd]'"
        raise UsageError("files in .zst need zstandard, which is not installed.", hint=hint) from error
    try:
        yield ZstdReader(raw, zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES))
    except zstandard.ZstdError as error:
        raise ZstdError(str(error)) from error


class ZstdReader:
    """Reads the frames of a stream one after the other; an end within a frame is an error, as in the program zstd."""

    def __init__(self, raw: BinaryIO, decompressor: Any) -> None:
        self._raw, self._decompressor = raw, decompressor
        self._frame = decompressor.decompressobj()
        self._buffer = b""
        self._in_frame = False

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes; all remaining bytes for -1."""
        while size < 0 or len(self._buffer) < size:
            data = self._raw.read(_STEP_BYTES)
            if not data:
                if self._in_frame:
                    raise ZstdError("the data end within a frame")
                break
            while data:
                self._in_frame = True
                self._buffer += self._frame.decompress(data)
                data = b""
                if self._frame.eof:
                    data, self._in_frame = self._frame.unused_data, False
                    self._frame = self._decompressor.decompressobj()
        result = self._buffer if size < 0 else self._buffer[:size]
        self._buffer = self._buffer[len(result) :]
        return result
