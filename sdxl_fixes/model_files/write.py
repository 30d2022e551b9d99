"""Another header for a .safetensors file on disk. The tensors' bytes are never changed; memory is constant.

Three ways, and what a crash leaves:

- ``header``: the new header fits into the old one's room. One direct write. A killed process leaves the old
  or the new file; so does a power cut unless the disk tears that write, and then the journal beside the file
  has the old header.
- ``copy``: a new file beside the old one, synced, put in its place by one rename: always the old or the new
  file. On file systems that share blocks (XFS, btrfs) the data are not copied: the new header is longer by
  whole blocks, so the kernel can share them.
- ``insert``: only when asked for. ext4 and XFS can insert blocks at the start of a file, which copies
  nothing, but between that and the write of the header (milliseconds, more on a busy disk) the file is
  unreadable; the journal has what is needed and :func:`recover` mends it.

``header`` and ``insert`` are used only while no other program has the file open, under a lease that makes
openers wait.

Locks, which the system lets go of when a process dies: whoever changes or replaces a file, or touches what
lies beside it, holds one on the file; whoever writes the part of a copy holds one on that, too (with --output
the file may be another). So what is not locked was left over.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import mmap
import os
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from sdxl_fixes.atomic import companion, real
from sdxl_fixes.errors import about, plain
from sdxl_fixes.model_files.header import LIMIT, FormatError, Header, parse_header, read_header

try:
    import fcntl
    import signal
except ImportError:  # Windows: only by copy
    fcntl = None  # type: ignore[assignment]

JOURNAL, PART = ".sdxl-fixes-journal", ".sdxl-fixes-part"  # beside the file
JOURNAL_PART = JOURNAL + PART
BLOCK = 4096  # pages, and the blocks of every common file system
# a header grows by this: whole blocks, and the kernel copies at 64 KiB boundaries of both files faster
GROWTH = 64 * 1024
CHUNK = 8 << 20
_INSERT_RANGE = 0x20  # linux/falloc.h
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


class Busy(OSError):
    """Another living process stamps the file."""


def longer(header: Header, text_size: int, room: int = 8 * 1024) -> int:
    """The size for a header of ``text_size`` bytes: the old one's if it fits, else longer by whole blocks,
    with room for the next time."""
    if text_size <= header.size:
        return header.size
    return header.size + -(-(text_size + room - header.size) // GROWTH) * GROWTH


def replace_header(
    path: Path, old: Header, new: bytes, in_place: bool = False, output: Path | None = None
) -> str:
    """Give ``path`` (or, with ``output``, a copy of it) the header ``new``, of a size that :func:`longer`
    gave, and return the way.

    ``old`` is the header that was read. A symbolic link is followed and stays. Raises OSError, with
    everything as it was, if the file is read-only, has other hard links (and would have to be copied), has
    changed since it was read, is being stamped by another process, or does not fit on the disk.
    """
    target = real(path)
    if output is not None:
        check_output(path, output)
        with about(output):
            _copy(target, old, new, real(output))
        return "copy"
    check_writable(path)
    with about(path):
        return _replace(path, target, old, new, in_place)


def _replace(path: Path, target: Path, old: Header, new: bytes, in_place: bool) -> str:
    if hasattr(os, "O_DIRECT") and fcntl is not None:
        grown = len(new) - old.size
        if grown == 0 and _overwrite(target, old, new, 0):
            return "header"
        if grown and in_place and _overwrite(target, old, new, grown):
            return "insert"
    if (links := target.stat().st_nlink) > 1:
        raise OSError(
            f"{path} has {links} names (hard links), and a changed copy would replace only this one: write "
            "the stamped file elsewhere with "
            "--output FILE" + ("" if in_place else ", or change them all with --in_place")
        )
    _copy(target, old, new, target)
    return "copy"


def check_writable(path: Path) -> None:
    """Raise OSError, in one sentence, if ``path`` must not be changed: read-only, or a blob of the Hugging
    Face cache."""
    target = real(path)
    if not target.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH) or not os.access(
        target, os.W_OK
    ):
        raise OSError(
            f"{path} is read-only for you (its mode, chattr +i, or its file system): allow writing to it, or "
            "write the stamped file elsewhere with --output FILE"
        )
    if target.parent.name == "blobs" and (target.parent.parent / "snapshots").is_dir():
        raise OSError(
            f"{path} belongs to the Hugging Face cache, which names files by their content: write the "
            "stamped file elsewhere with "
            "--output FILE"
        )


def check_output(path: Path, output: Path) -> None:
    """Raise OSError, in one sentence, if no changed copy of ``path`` can be written to ``output``."""
    target = real(output)
    if os.path.lexists(target) and not target.is_file():
        raise OSError(f"{output} is not a regular file: choose another name for --output")
    if not target.parent.is_dir():
        raise OSError(f"there is no folder {target.parent}: make it, or choose another --output")
    if target == real(path) or (target.exists() and target.samefile(path)):
        raise OSError(f"{output} is {path} itself: leave --output out")
    if target.exists():
        check_writable(output)


def recover(path: Path) -> str | None:
    """Finish what a crash interrupted: put back the header that a journal beside ``path`` holds if the file
    needs it, and remove what was left over. Returns a sentence if there was something to mend or to remove,
    else None. What a living process works on is let be. Raises OSError only for an unreadable file that
    cannot be mended."""
    target = real(path)
    if not any(_is_file(companion(target, suffix)) for suffix in (JOURNAL, JOURNAL_PART, PART)):
        return None
    try:
        with open(target, "rb") as file, _locked(file.fileno(), path):
            return _recover(file, path, target) if _is_there(target, file.fileno()) else None
    except Busy:
        return None


def _recover(file: BinaryIO, path: Path, target: Path) -> str | None:
    journal, said = companion(target, JOURNAL), None
    if _is_file(journal):
        if not _well_formed(file):
            if (said := _mend(path, target, journal)) is None:
                return None  # neither of the states that we can have left: not ours to touch
        with contextlib.suppress(OSError):
            journal.unlink()
            _sync_folder(target.parent)
    for left in (companion(target, JOURNAL_PART), companion(target, PART)):
        with contextlib.suppress(OSError):  # also: in use
            _remove_left_over(left)
            said = said or f"{left.name}, left over from an interrupted stamp, was removed"
    return said


def _mend(path: Path, target: Path, journal: Path) -> str | None:
    """Put the old header back, if the file is in a state that an interrupted stamp leaves; else None."""
    try:
        about_it, header = _read_journal(journal)
        with open(target, "r+b") as file:
            grown = os.fstat(file.fileno()).st_size - about_it.get("file_size", -1)
            if header is None or grown not in (0, about_it["grown"]):
                return None
            _put_back(file.fileno(), header, grown)
            parse_header(file, str(path))
    except OSError as error:
        raise OSError(
            f"{path} was left unreadable by an interrupted stamp, and its old header, which {journal.name} "
            f"keeps, cannot be put back ({error.strerror}): run sdxl-fixes inspect again where, and as "
            "someone who, may write the file"
        ) from error
    return (
        f"{path} was left unreadable by an interrupted stamp; its old header was put back from {journal.name}"
    )


def _remove_left_over(left: Path) -> None:
    """Raises OSError if it is in use, or not there."""
    # without locks, as on Windows, what is open cannot be removed
    with open(os.open(left, os.O_RDWR | _NO_LINK), "rb") as file, _locked(file.fileno(), left):
        if os.name == "nt":
            file.close()
        left.unlink()


def _well_formed(file: BinaryIO) -> bool:
    try:
        parse_header(file, "")
    except FormatError:
        return False
    return True


def data_hash(path: Path) -> str:
    """SHA-256 of the tensors' bytes, which no stamp may change."""
    digest, size = hashlib.sha256(), read_header(path).size
    with about(path), open(path, "rb") as file:
        file.seek(8 + size)
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


# ---------------------------------------------------------------- in place


def _overwrite(target: Path, old: Header, new: bytes, grown: int) -> bool:
    """Put ``new`` into the file itself, after inserting ``grown`` bytes at its start. False, with nothing
    changed, if this file, file system or moment does not allow it."""
    # a direct write takes whole blocks: the last one ends with tensor bytes, which are written as they were
    end = -(-(8 + len(new)) // BLOCK) * BLOCK
    if end > old.file_size + grown:
        return False
    fd = os.open(target, os.O_RDWR)
    try:
        with _locked(fd, target):
            _check_unchanged(fd, old, target)
            if not _alone(fd):
                return False
            block = mmap.mmap(-1, end)  # page-aligned memory
            block[: 8 + len(new)] = _start(new)
            block[8 + len(new) :] = os.pread(fd, end - 8 - len(new), 8 + old.size)
            if not _direct(fd, True):
                return False
            journal = _write_journal(target, old, grown)
            try:
                if done := not grown or _insert_range(fd, grown):
                    _write_block(fd, block)
                    os.fsync(fd)
            except BaseException as error:
                _undo(fd, old, target, journal)
                if isinstance(error, OSError):
                    raise OSError(
                        f"{target} is as it was: its header could not be written ({error.strerror})"
                    ) from error
                raise
            with contextlib.suppress(OSError):  # one that stays beside a whole file goes with the next stamp
                journal.unlink()
                _sync_folder(target.parent)
            return done
    finally:
        os.close(fd)


def _write_block(fd: int, block: mmap.mmap) -> None:
    """One direct write: the kernel hands it to the disk whole, where a buffered one can be cut between pages
    by a kill."""
    if os.pwrite(fd, block, 0) != len(block):
        raise OSError(errno.EIO, "the disk took only part of the header")


def _undo(fd: int, old: Header, target: Path, journal: Path) -> None:
    """The old header, if it is not there any more, and no journal."""
    try:
        _direct(fd, False)
        about_it = os.fstat(fd)
        if about_it.st_size != old.file_size or os.pread(fd, 8 + old.size, 0) != _start(old.raw):
            _put_back(fd, old.raw, about_it.st_size - old.file_size)
        journal.unlink()
    except OSError as error:
        raise OSError(
            f"{target} could not be written, nor its old header put back ({error.strerror}), which "
            f"{journal.name} keeps: see to the disk, then run sdxl-fixes inspect, which puts it back"
        ) from error


def _put_back(fd: int, header: bytes, grown: int) -> None:
    """The old header, padded by what was inserted."""
    text = _start(header.ljust(len(header) + grown))
    if os.pwrite(fd, text, 0) != len(text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fsync(fd)


def _direct(fd: int, on: bool) -> bool:
    """Switch direct writes on or off; False if the file system has none."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | (os.O_DIRECT if on else 0))
    except OSError:
        return False
    return True


def _alone(fd: int) -> bool:
    """Take a write lease: granted only while nobody else has the file open (or mapped), and openers wait
    until ``fd`` is closed."""
    try:
        # F_SETSIG: an opener announces itself by a signal that is ignored, not by a deadly one
        fcntl.fcntl(fd, 10, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError:
        return False
    return True


def _insert_range(fd: int, size: int) -> bool:
    call = ctypes.CDLL(None, use_errno=True).fallocate
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return bool(call(fd, _INSERT_RANGE, 0, size) == 0)


def _write_journal(target: Path, old: Header, grown: int) -> Path:
    """The old header and what is about to be done, synced before anything is touched."""
    journal, part = companion(target, JOURNAL), companion(target, JOURNAL_PART)
    about_it = {"file_size": old.file_size, "grown": grown, "sha256": hashlib.sha256(old.raw).hexdigest()}
    try:
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _NO_LINK, 0o600)
        with open(fd, "wb", buffering=0) as file:
            _write(file, json.dumps(about_it).encode() + b"\n" + old.raw)
            os.fsync(fd)
        os.replace(part, journal)
        _sync_folder(target.parent)
    except OSError as error:
        for left in (part, journal):
            with contextlib.suppress(OSError):
                left.unlink()
        raise OSError(
            f"cannot keep the old header in {journal} meanwhile ({error.strerror}): {target.name} is "
            "unchanged; free some space there, or write the stamped file elsewhere with --output FILE"
        ) from error
    return journal


def _read_journal(journal: Path) -> tuple[dict[str, int], bytes | None]:
    """What was about to be done, and the old header; None if the journal itself is broken (then nothing had
    been touched)."""
    with open(journal, "rb") as file:
        first, _, header = file.read(LIMIT + BLOCK).partition(b"\n")
    try:
        about_it = json.loads(first[:BLOCK])
        good = about_it["sha256"] == hashlib.sha256(header).hexdigest()
        sizes = {"file_size": int(about_it["file_size"]), "grown": int(about_it["grown"])}
        return sizes, header if good else None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return {}, None


# ---------------------------------------------------------------- by copy


def _copy(source: Path, old: Header, new: bytes, target: Path) -> None:
    """Write the new file beside ``target``, sync it, and put it in its place."""
    part, size = companion(target, PART), old.file_size + len(new) - old.size
    with open(source, "rb") as file, contextlib.ExitStack() as both:
        if source == target:
            both.enter_context(_locked(file.fileno(), target))
        before = _check_unchanged(file.fileno(), old, source)
        with _open_part(part, target) as copy:
            try:
                copy.truncate(0)
                _copy_data(file, copy, old, len(new) - old.size)
                copy.seek(0)
                _write(copy, _start(new))
                copy.truncate(size)
                _copy_owner(copy.fileno(), before)
                os.fsync(copy.fileno())
                parse_header(copy, str(part))
                after = os.stat(source)
                if any(
                    getattr(after, field) != getattr(before, field)
                    for field in ("st_mtime_ns", "st_size", "st_ino")
                ):
                    raise OSError(
                        f"{source} was changed by another program while it was copied: it is left "
                        "as that program made it"
                    )
                _copy_attributes(source, part, before)
                if not _is_there(part, copy.fileno()):  # no locks there, and another machine's stamp
                    raise Busy(f"{target} is being stamped by another process: wait for it")
                if os.name == "nt":  # no open file can be renamed or replaced
                    copy.close()
                    file.close()
                os.replace(part, target)
            except BaseException as error:
                with contextlib.suppress(OSError):
                    ours = copy.closed or _is_there(part, copy.fileno())
                    copy.close()
                    if ours:
                        part.unlink()
                if isinstance(error, OSError) and error.errno is not None:
                    raise OSError(_why_not(error, source, target, size)) from error
                raise
    with contextlib.suppress(OSError):  # the old or the new file, whole either way
        _sync_folder(target.parent)


def _why_not(error: OSError, source: Path, target: Path, size: int) -> str:
    """Why there is no changed copy, and what to do, in one sentence."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(target.parent).free / 2**30
        return (
            f"no space for a changed copy of {source} in {target.parent} ({size / 2**30:.2f} GiB needed, "
            f"{free:.2f} GiB free{', and a quota' * (error.errno == errno.EDQUOT)}): free some, write it "
            "elsewhere with --output FILE, or change the file itself with --in_place (ext4 and XFS)"
        )
    if os.name == "nt" and isinstance(error, PermissionError):
        return f"{target} is open in another program: close it there first"
    return f"{target} is as it was, since no changed copy could take its place: {plain(error)}"


@contextlib.contextmanager
def _open_part(part: Path, target: Path) -> Iterator[FileIO]:
    """The part, locked."""
    for _ in range(20):
        with open(_part(part, target), "r+b", buffering=0) as copy, _locked(copy.fileno(), target):
            if _is_there(part, copy.fileno()):  # neither removed nor put in its place before it was locked
                yield copy
                return
    raise Busy(f"{target} is being stamped by another process: wait for it")


def _part(part: Path, target: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | _NO_LINK | getattr(os, "O_BINARY", 0)
    try:
        if os.name == "nt":  # no locks; but what another process has open cannot be removed there
            part.unlink(missing_ok=True)
            flags |= os.O_EXCL
        return os.open(part, flags, 0o600)
    except OSError as error:
        if os.name == "nt" and part.exists():
            raise Busy(f"{target} is being stamped by another process: wait for it") from error
        raise OSError(
            f"{target}: cannot write in {part.parent} ({error.strerror}): write the stamped file elsewhere "
            "with --output FILE"
        ) from error


def _is_there(part: Path, fd: int) -> bool:
    """Whether the open file is the one of that name (on Windows it is: nobody can move an open file)."""
    try:
        return os.name == "nt" or os.path.samestat(os.fstat(fd), os.lstat(part))
    except FileNotFoundError:
        return False


def _write(file: FileIO, content: bytes) -> None:
    """All of it; unbuffered, so that closing the file cannot fail again."""
    left = memoryview(content)
    while left:
        left = left[file.write(left) or 0 :]


def _copy_data(source: BinaryIO, copy: FileIO, old: Header, grown: int) -> None:
    """The tensors' bytes, moved by ``grown``; from the start of their first block, so that a file system that
    can share blocks does."""
    start = (8 + old.size) // BLOCK * BLOCK if grown % BLOCK == 0 else 8 + old.size
    for begin, end in _extents(source.fileno(), start, old.file_size):
        position = begin
        while position < end:
            size = min(end - position, CHUNK * 8 - position % GROWTH)
            done = _copy_in_kernel(source.fileno(), copy.fileno(), position, position + grown, size)
            if not done:
                source.seek(position)
                copy.seek(position + grown)
                done = len(content := source.read(min(end - position, CHUNK)))
                _write(copy, content)
            if not done:
                raise OSError(errno.EIO, "the file ended while it was copied")
            # let the disk begin with what is there while the next part is copied
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(copy.fileno(), position + grown, done, os.POSIX_FADV_DONTNEED)
            position += done


def _copy_in_kernel(source: int, copy: int, read: int, write: int, size: int) -> int:
    if not hasattr(os, "copy_file_range"):
        return 0
    try:
        return os.copy_file_range(source, copy, size, read, write)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
        return 0  # another file system, one that cannot: by hand


def _extents(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The ranges of a file that hold data; holes stay holes."""
    if not hasattr(os, "SEEK_DATA"):
        yield start, end
        return
    position = start
    while position < end:
        try:
            begin = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # ENXIO: only a hole is left
                yield position, end
            return
        position = min(os.lseek(fd, begin, os.SEEK_HOLE), end)
        yield begin, position


def _copy_owner(copy: int, before: os.stat_result) -> None:
    """The owner and the group, as far as the system lets us: another user's file becomes ours."""
    if hasattr(os, "fchown"):
        try:
            os.fchown(copy, before.st_uid, before.st_gid)
        except OSError:
            with contextlib.suppress(OSError):
                os.fchown(copy, -1, before.st_gid)


def _copy_attributes(source: Path, part: Path, before: os.stat_result) -> None:
    shutil.copymode(source, part)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a file system without them
            for name in os.listxattr(source):
                with contextlib.suppress(OSError):  # one that only root may set
                    os.setxattr(part, name, os.getxattr(source, name))


# ---------------------------------------------------------------- both


def _check_unchanged(fd: int, old: Header, name: Path) -> os.stat_result:
    """The file is still the one that was read."""
    about = os.fstat(fd)
    with open(fd, "rb", closefd=False) as file:
        file.seek(0)
        start = file.read(8 + old.size)
    if (
        about.st_size != old.file_size
        or start != _start(old.raw)
        or not os.path.samestat(about, os.stat(name))
    ):
        raise OSError(f"{name} was changed by another program after it was read: start again")
    return about


@contextlib.contextmanager
def _locked(fd: int, name: Path) -> Iterator[None]:
    """Against another stamp of the same file, and an inspect, which is done in a moment."""
    for _ in range(20):
        try:
            if fcntl is not None:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(0.005)
        except OSError:  # a file system without locks
            break
    else:
        raise Busy(f"{name} is being stamped by another process: wait for it")
    yield


def _start(header: bytes) -> bytes:
    """What the file begins with."""
    return len(header).to_bytes(8, "little") + header


def _is_file(path: Path) -> bool:
    """A regular file, and no link to one: we make no others."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def _sync_folder(folder: Path) -> None:
    if os.name != "nt":
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
