"""Compressed files as streams with limits, and the errors of all the libraries that read them as one."""

import bz2
import contextlib
import dataclasses
import errno
import gzip
import io
import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

BLOCK = 1 << 20  # bytes
_WINDOW = 128 << 20  # bytes; the largest window of xz -9e and of zstd --ultra -22 is 64 and 128 MiB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a file may ask for.

    Attributes:
      member_bytes: of one member, line or cell.
      total_bytes: of all an archive's members together.
      members: of an archive, folders and links included.
      ratio: bytes out for a byte in, over the whole archive, beyond `free_bytes` of output. Source code has 4 to 10.
      free_bytes: output that is never called a bomb.
      held_bytes: of contents that are in memory at a time.
    """

    member_bytes: int = 8_000_000
    total_bytes: int = 16_000_000_000
    members: int = 1_000_000
    ratio: float = 100.0
    free_bytes: int = 16_000_000
    held_bytes: int = 128_000_000


class Refused(Exception):
    """A file that cannot be read as a whole; `reason` as in "broken_archive", "bomb", "too_many_members"."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@contextlib.contextmanager
def faults() -> Iterator[None]:
    """Turns what archive libraries raise on broken input into Refused."""
    import zstandard

    try:
        yield
    except Refused:
        raise
    except (NotImplementedError, RuntimeError) as error:  # zipfile: an unknown method, a password
        raise Refused("unsupported") from error
    except (
        *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, zstandard.ZstdError, gzip.BadGzipFile, EOFError),
        *(struct.error, ValueError, OverflowError, MemoryError, IndexError, KeyError),
    ) as error:
        raise Refused("broken_archive") from error
    except OSError as error:  # bz2 and a seek before the start say "broken" this way
        raise Refused("broken_archive" if error.errno in (None, errno.EINVAL) else "unreadable") from error


class Stream(Protocol):
    """Bytes in order."""

    def read(self, size: int, /) -> bytes: ...


class _Xz:
    """lzma.LZMAFile with a limit on memory."""

    def __init__(self, file: IO[bytes]):
        self._file, self._decoder, self._input, self._ended = file, self._fresh(), b"", False

    @staticmethod
    def _fresh() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(memlimit=2 * _WINDOW)

    def read(self, size: int, /) -> bytes:
        while not self._ended:
            if self._decoder.eof:  # of one stream; others may follow, and padding
                self._input = (self._decoder.unused_data or self._file.read(BLOCK)).lstrip(b"\0")
                self._decoder, self._ended = self._fresh(), not self._input
            elif out := self._decoder.decompress(self._next(), size):
                return out
        return b""

    def _next(self) -> bytes:
        raw, self._input = self._input, b""
        if self._decoder.needs_input and not raw and not (raw := self._file.read(BLOCK)):
            raise EOFError("ends before the end of its stream")
        return raw


class _Zstd:
    """zstandard's reader, but one that says when a frame is cut short."""

    _STEP = 1024  # bytes of input at a time, of which a bomb can make 32 MB

    def __init__(self, file: IO[bytes]):
        import zstandard

        self._file, self._fresh = file, zstandard.ZstdDecompressor(max_window_size=_WINDOW).decompressobj
        self._decoder, self._input, self._out, self._whole = self._fresh(), b"", memoryview(b""), True

    def read(self, size: int, /) -> bytes:
        while not self._out:
            raw, self._input = self._input or self._file.read(self._STEP), b""
            if not raw:
                if not self._whole:
                    raise EOFError("ends before the end of its frame")
                return b""
            if self._decoder.eof:
                self._decoder = self._fresh()
            self._out = memoryview(self._decoder.decompress(raw))
            self._whole = self._decoder.eof
            if self._whole:
                self._input = self._decoder.unused_data
        part, self._out = self._out[:size], self._out[size:]
        return bytes(part)


class _Limited:
    """Counts what comes out, and refuses a bomb before it has burst. Gives as many bytes as asked for, but at the end."""

    def __init__(self, stream: Stream, compressed: int, limits: Limits):
        self._stream = stream
        self._most = min(limits.total_bytes + limits.free_bytes, int(limits.ratio * compressed) + limits.free_bytes)

    def read(self, size: int, /) -> bytes:
        parts = []
        while size > 0 and (part := self._stream.read(min(size, BLOCK))):
            parts.append(part)
            size -= len(part)
            self._most -= len(part)
            if self._most < 0:
                raise Refused("bomb")
        return parts[0] if len(parts) == 1 else b"".join(parts)


@contextlib.contextmanager
def opened(path: Path, limits: Limits) -> Iterator[Stream]:
    """Opens a file by its first bytes: gzip, bzip2, xz, zstandard, or as it is."""
    with path.open("rb") as file:
        magic = file.read(6)
        file.seek(0)
        stream: Stream
        if magic.startswith(b"\x1f\x8b"):
            stream = gzip.GzipFile(fileobj=file)
        elif magic.startswith(b"BZh"):
            stream = bz2.BZ2File(file)
        elif magic.startswith(b"\xfd7zXZ"):
            stream = _Xz(file)
        elif magic.startswith(b"\x28\xb5\x2f\xfd"):
            stream = _Zstd(file)
        else:
            stream = file
        yield _Limited(stream, path.stat().st_size, limits)


def drain(stream: Stream) -> None:
    """Reads to the end, so that checksums are checked."""
    while stream.read(BLOCK):
        pass


def buffered(stream: Stream) -> io.BufferedReader:
    """A stream with `readline`."""

    class _Raw(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, target: memoryview) -> int:  # type: ignore[override]
            part = stream.read(len(target))
            target[: len(part)] = part
            return len(part)

    return io.BufferedReader(_Raw(), BLOCK)
