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
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sdxl_fixes.model_files.header import FormatError, Header, parse_header, read_header

try:
    import fcntl
    import signal
except ImportError:  # Windows: only by copy
    fcntl = None  # type: ignore[assignment]

JOURNAL, PART = ".sdxl-fixes-journal", ".sdxl-fixes-part"  # beside the file
BLOCK = 4096  # pages, and the blocks of every common file system
# a header grows by this: whole blocks, and the kernel copies at 64 KiB boundaries of both files faster
GROWTH = 64 * 1024
CHUNK = 8 << 20
_INSERT_RANGE = 0x20  # linux/falloc.h


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

    ``old`` is the header that was read. A symbolic link is followed and stays. Raises OSError, in one
    sentence and with everything as it was, if the file is read-only, has other hard links (and would have to
    be copied), has changed since it was read, is being stamped by another process, or does not fit on the
    disk.
    """
    target = path.resolve()
    if output is not None:
        _copy(target, old, new, output.resolve())
        return "copy"
    check_writable(path)
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
    target = path.resolve()
    if not target.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH) or not os.access(
        target, os.W_OK
    ):
        raise OSError(
            f"{path} is read-only: allow writing to it (chmod u+w), or write the stamped file "
            "elsewhere with --output FILE"
        )
    if target.parent.name == "blobs" and (target.parent.parent / "snapshots").is_dir():
        raise OSError(
            f"{path} belongs to the Hugging Face cache, which names files by their content: write the "
            "stamped file elsewhere with "
            "--output FILE"
        )


def recover(path: Path) -> str | None:
    """Finish what a crash interrupted: put back the header that a journal beside ``path`` holds if the file
    needs it, and remove what was left over. Returns a sentence if there was something to mend or to remove,
    else None. Raises OSError while another process stamps the file."""
    target = path.resolve()
    journal, part, said = _beside(target, JOURNAL), _beside(target, PART), None
    if journal.exists():
        with open(target, "r+b") as file, _locked(file.fileno(), path):
            about, header = _read_journal(journal)
            try:
                parse_header(file, str(path))
            except FormatError:
                grown = os.fstat(file.fileno()).st_size - about.get("file_size", -1)
                if header is None or grown not in (0, about["grown"]):
                    return None  # neither of the states that we can have left: not ours to touch
                _put_back(file.fileno(), header, grown)
                parse_header(file, str(path))
                said = (
                    f"{path} was left unreadable by an interrupted stamp; its old header was put back "
                    f"from {journal.name}"
                )
            journal.unlink(missing_ok=True)  # a stamp that was just ending may have done so
            _sync_folder(target.parent)
    for left in (part, _beside(target, JOURNAL + PART)):
        with contextlib.suppress(FileNotFoundError), open(left, "rb") as old, _locked(old.fileno(), path):
            if os.name == "nt":  # no open file can be removed; one that another stamp writes cannot either
                old.close()
            left.unlink()
            said = said or f"{left.name}, left over from an interrupted stamp, was removed"
    return said


def data_hash(path: Path) -> str:
    """SHA-256 of the tensors' bytes, which no stamp may change."""
    digest, size = hashlib.sha256(), read_header(path).size
    with open(path, "rb") as file:
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
            block[: 8 + len(new)] = len(new).to_bytes(8, "little") + new
            block[8 + len(new) :] = os.pread(fd, end - 8 - len(new), 8 + old.size)
            if not _direct(fd, True):
                return False
            journal = _write_journal(target, old, grown)
            try:
                if done := not grown or _insert_range(fd, grown):
                    _write_block(fd, block)
                    os.fsync(fd)
            except BaseException:
                _put_back(fd, old.raw, os.fstat(fd).st_size - old.file_size)
                journal.unlink()
                raise
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


def _put_back(fd: int, header: bytes, grown: int) -> None:
    """The old header, padded by what was inserted."""
    _direct(fd, False)
    os.pwrite(fd, (len(header) + grown).to_bytes(8, "little") + header.ljust(len(header) + grown), 0)
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
    journal, part = _beside(target, JOURNAL), _beside(target, JOURNAL + PART)
    about = {"file_size": old.file_size, "grown": grown, "sha256": hashlib.sha256(old.raw).hexdigest()}
    try:
        with open(part, "wb") as file:
            file.write(json.dumps(about).encode() + b"\n" + old.raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, journal)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(
            f"cannot keep the old header in {journal} meanwhile ({error.strerror}): {target.name} "
            "is unchanged"
        ) from error
    _sync_folder(target.parent)
    return journal


def _read_journal(journal: Path) -> tuple[dict[str, int], bytes | None]:
    """What was about to be done, and the old header; None if the journal itself is broken (then nothing had
    been touched)."""
    first, _, header = journal.read_bytes().partition(b"\n")
    try:
        about = json.loads(first)
        good = about["sha256"] == hashlib.sha256(header).hexdigest()
        return {"file_size": int(about["file_size"]), "grown": int(about["grown"])}, header if good else None
    except (ValueError, KeyError, TypeError):
        return {}, None


# ---------------------------------------------------------------- by copy


def _copy(source: Path, old: Header, new: bytes, target: Path) -> None:
    """Write the new file beside ``target``, sync it, and put it in its place."""
    part, grown = _beside(target, PART), len(new) - old.size
    with open(source, "rb") as file:
        before = _check_unchanged(file.fileno(), old, source)
        with open(_open_part(part), "r+b") as copy, _locked(copy.fileno(), target):
            if os.name != "nt" and (
                not part.exists() or not os.path.samestat(os.fstat(copy.fileno()), part.stat())
            ):
                raise OSError(f"{target} is being stamped by another process: wait for it")
            try:
                copy.truncate(0)
                _copy_data(file, copy, old, grown)
                copy.seek(0)
                copy.write(len(new).to_bytes(8, "little") + new)
                copy.truncate(old.file_size + grown)
                copy.flush()
                if hasattr(os, "fchown"):
                    with contextlib.suppress(OSError):  # another user's file: the copy is ours
                        os.fchown(copy.fileno(), before.st_uid, before.st_gid)
                os.fsync(copy.fileno())
                parse_header(copy, str(part))
                after = os.stat(source)
                if (after.st_mtime_ns, after.st_size, after.st_ino) != (
                    before.st_mtime_ns,
                    before.st_size,
                    before.st_ino,
                ):
                    raise OSError(
                        f"{source} was changed by another program while it was copied: it is left "
                        "as that program made it"
                    )
                _copy_attributes(source, part, before)
                if os.name == "nt":  # no open file can be renamed or replaced
                    copy.close()
                    file.close()
                os.replace(part, target)
            except BaseException as error:
                copy.close()
                part.unlink(missing_ok=True)
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise OSError(
                        f"no space for a changed copy of {source} in {target.parent} "
                        f"({old.file_size / 2**30:.2f} GiB needed, "
                        f"{shutil.disk_usage(target.parent).free / 2**30:.2f} GiB free): free some, write "
                        "it elsewhere with --output FILE, "
                        "or change the file itself with --in_place (ext4 and XFS)"
                    ) from error
                if os.name == "nt" and isinstance(error, PermissionError):
                    raise OSError(f"{target} is open in another program: close it there first") from error
                raise
    _sync_folder(target.parent)


def _open_part(part: Path) -> int:
    try:
        return os.open(part, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)
    except OSError as error:
        raise OSError(
            f"cannot write in {part.parent} ({error.strerror}): write the stamped file elsewhere "
            "with --output FILE"
        ) from error


def _copy_data(source: BinaryIO, copy: BinaryIO, old: Header, grown: int) -> None:
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
                done = copy.write(source.read(min(end - position, CHUNK)))
                copy.flush()
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
        if error.errno in (
            errno.EXDEV,
            errno.EINVAL,
            errno.ENOSYS,
            errno.EOPNOTSUPP,
            errno.EPERM,
            errno.EBADF,
        ):
            return 0
        raise


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


def _copy_attributes(source: Path, part: Path, before: os.stat_result) -> None:
    shutil.copymode(source, part)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a file system without them, or one that only root may set
            for name in os.listxattr(source):
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
        or start != old.size.to_bytes(8, "little") + old.raw
        or not os.path.samestat(about, os.stat(name))
    ):
        raise OSError(f"{name} was changed by another program after it was read: start again")
    return about


@contextlib.contextmanager
def _locked(fd: int, name: Path) -> Iterator[None]:
    """Against another stamp of the same file; the system lets go of the lock when a process dies."""
    if fcntl is not None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(f"{name} is being stamped by another process: wait for it") from error
        except OSError:  # a file system without locks
            pass
    yield


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(target.name + suffix)


def _sync_folder(folder: Path) -> None:
    if os.name != "nt":
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
