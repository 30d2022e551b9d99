"""Changing a header on disk: tensors untouched, and whatever is killed, whenever, the old or the new file can
be read."""

import errno
import itertools
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from models import write

from sdxl_fixes.errors import plain
from sdxl_fixes.model_files import write as w
from sdxl_fixes.model_files.header import FormatError, encode_header, read_header

DATA = os.urandom(300_000)
SHAPES = {"a": [100_000], "b": [50_000]}  # 300 KB: some pages
NEW = "new" * 3000
posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
linux = pytest.mark.skipif(sys.platform != "linux", reason="changing a file in place needs Linux")


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "m.safetensors", SHAPES, {"k": "old"}, DATA)


@pytest.fixture
def roomy(file):
    """The same file after a first stamp, which left room."""
    return make_room(file)


def make_room(path):
    change(path, "x" * 20_000)
    change(path, "old")
    return path


def change(path, value, **options):
    old = read_header(path)
    metadata = {"k": value}
    size = w.longer(old, len(encode_header(metadata, old.tensors).rstrip()))
    return w.replace_header(path, old, encode_header(metadata, old.tensors, size), **options)


def says(path):
    """The value in the header, after checking that the tensors are what they were."""
    read = read_header(path)
    assert path.read_bytes()[8 + read.size :] == DATA
    return read.metadata["k"]


def can_write_in_place(path):
    """Whether this file system lets us at all (leases, direct writes)."""
    probe = write(path.with_name("probe.safetensors"), SHAPES, {"k": "old"}, DATA)
    make_room(probe)
    return change(probe, "y") == "header"


def test_copy_then_room(file):
    assert change(file, "new" * 1000) == "copy" and says(file) == "new" * 1000
    in_place = can_write_in_place(file)
    inode = file.stat().st_ino
    assert change(file, "newer" * 1000) == ("header" if in_place else "copy") and says(file) == "newer" * 1000
    assert (file.stat().st_ino == inode) == in_place
    assert sorted(p.name for p in file.parent.iterdir()) == ["m.safetensors", "probe.safetensors"]


@linux
def test_insert_when_asked(file):
    inode = file.stat().st_ino
    way = change(file, NEW, in_place=True)
    assert says(file) == NEW and way in ("insert", "copy")
    if way == "copy":
        pytest.skip("this file system inserts no blocks: ext4 and XFS do")
    assert file.stat().st_ino == inode


@linux
@pytest.mark.parametrize("in_place", [False, True])
def test_a_file_in_use_is_copied_and_its_reader_keeps_the_old_one(roomy, in_place):
    with open(roomy, "rb") as reader:
        assert change(roomy, "new" * (1 if not in_place else 9999), in_place=in_place) == "copy"
        assert b'"old"' in reader.read(4096)
    assert says(roomy).startswith("new")


def test_output_leaves_the_file_alone(file, tmp_path):
    before = file.read_bytes()
    file.chmod(0o444)
    assert change(file, "new", output=tmp_path / "other.safetensors") == "copy"
    assert file.read_bytes() == before and says(tmp_path / "other.safetensors") == "new"


def test_a_link_stays_a_link(file, tmp_path):
    (tmp_path / "models").mkdir()
    link = tmp_path / "models" / "link.safetensors"
    link.symlink_to(file)
    change(link, "new")
    assert (
        link.is_symlink() and says(file) == "new" and os.listdir(tmp_path / "models") == ["link.safetensors"]
    )


def test_mode_and_attributes_stay(file):
    file.chmod(0o640)
    try:
        os.setxattr(file, "user.note", b"mine")
        noted = True
    except (OSError, AttributeError):
        noted = False
    change(file, "new")
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert not noted or os.getxattr(file, "user.note") == b"mine"


def refused(path, sentence, before=None, **options):
    before = path.read_bytes() if before is None else before
    names = sorted(os.listdir(path.parent))
    with pytest.raises(OSError) as error:
        change(path, "new" * 9999, **options)
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert path.read_bytes() == before and sorted(os.listdir(path.parent)) == names


def test_read_only_is_refused(file):
    file.chmod(0o444)
    refused(file, "is read-only")


def test_hard_links_are_refused_where_a_copy_is_needed(file, tmp_path):
    os.link(file, tmp_path / "other.safetensors")
    refused(file, "has 2 names (hard links)")


@linux
def test_hard_links_are_changed_together_in_room(roomy, tmp_path):
    if not can_write_in_place(roomy):
        pytest.skip("this file system has no leases or direct writes")
    os.link(roomy, tmp_path / "other.safetensors")
    assert change(roomy, "new") == "header" and says(tmp_path / "other.safetensors") == "new"


def test_a_blob_of_the_hugging_face_cache_is_refused(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots" / "1").mkdir(parents=True)
    blob = write(tmp_path / "blobs" / "abc", SHAPES, {"k": "old"}, DATA)
    link = tmp_path / "snapshots" / "1" / "m.safetensors"
    link.symlink_to(blob)
    refused(link, "Hugging Face cache")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_is_one_sentence(file, monkeypatch, code):
    def full(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "copy_file_range", full, raising=False)
    refused(file, "no space for a changed copy")


def test_a_change_by_another_program_is_seen(file, monkeypatch):
    old = read_header(file)
    new = encode_header({"k": "new"}, old.tensors, w.longer(old, 20_000))
    copy_data = w._copy_data

    def meanwhile(*args):
        copy_data(*args)
        os.utime(file, ns=(1, 1))

    monkeypatch.setattr(w, "_copy_data", meanwhile)
    with pytest.raises(OSError, match="was changed by another program while it was copied"):
        w.replace_header(file, old, new)
    monkeypatch.undo()
    write(file, SHAPES, {"k": "other"}, DATA)
    with pytest.raises(OSError, match="was changed by another program after it was read"):
        w.replace_header(file, old, new)
    assert says(file) == "other" and os.listdir(file.parent) == [file.name]


@linux
def test_two_at_once(file):
    import fcntl

    part = file.with_name(file.name + w.PART)
    with open(part, "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        refused(file, "is being stamped by another process")


def test_memory_is_constant(tmp_path):
    """64 MiB of tensors, and a peak that grows by less than 24 MiB, by every way of copying."""
    code = (
        "import os, resource, sys; from pathlib import Path; from sdxl_fixes.model_files import write as w\n"
        "from sdxl_fixes.model_files.header import *\n"
        "for path in map(Path, sys.argv[1:]):\n"
        "    if path.stem == 'plain': w._copy_in_kernel = lambda *args: 0\n"
        "    old = read_header(path); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "    w.replace_header(path, old, encode_header({'k': 'new'}, old.tensors, w.longer(old, 20000))); "
        "w.data_hash(path)\n"
        "    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)\n"
    )
    paths = [
        write(tmp_path / f"{way}.safetensors", {"a": [1 << 25]}, {"k": "old"}, os.urandom(1 << 26))
        for way in ("kernel", "plain")
    ]
    process = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)
    assert all(float(grown) < 24 for grown in process.stdout.split()) and len(process.stdout.split()) == 2


# ---------------------------------------------------------------- crashes

CALLS = ("open", "pwrite", "fsync", "replace", "copy_file_range")
MORE_CALLS = ("close", "stat")


def stopped_at(step, act, error=None):
    """Call ``act`` in a child process that is killed right before its ``step``-th call into the system, or
    whose call fails with ``error``. Returns its status: 0, minus SIGKILL, or 3 for an OSError that names a
    file."""
    child = os.fork()
    if child == 0:
        count = 0

        def deadly(function):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count == step + 1:
                    if error is not None:
                        raise OSError(error, os.strerror(error))
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        for name in CALLS if error else CALLS + MORE_CALLS:
            setattr(os, name, deadly(getattr(os, name)))
        for name in () if error else ("_insert_range", "_write_block", "_alone", "_sync_folder"):
            setattr(w, name, deadly(getattr(w, name)))
        Path.unlink = deadly(Path.unlink)
        code = 1
        try:
            act()
            code = 0 if error is None or step < count else 5  # 5: it never came to that step
        except OSError as failed:
            said = plain(failed)
            code = 3 if "m.safetensors" in said and "\n" not in said and "Errno" not in said else 4
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(step, path, **options):
    return stopped_at(step, lambda: change(path, NEW, **options))


@linux
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("way", ["copy", "header", "insert"])
def test_failing_at_every_step(way, code, tmp_path):
    """Done, or refused in a sentence with the file as it was; what could not be removed goes with the next
    start."""
    outcomes = []
    for step in itertools.count():
        path = write(tmp_path / "m.safetensors", SHAPES, {"k": "old"}, DATA)
        if way == "header":
            make_room(path)
        status = stopped_at(step, lambda path=path: change(path, NEW, in_place=way == "insert"), code)
        if status == 5:
            break
        assert status in (0, 3)
        outcomes.append((status, says(path)))
        w.recover(path)
        assert says(path) == outcomes[-1][1] and os.listdir(tmp_path) == [path.name]
    assert set(outcomes) <= {(0, NEW), (3, "old")} and (3, "old") in outcomes and len(outcomes) > 5


@linux
def test_recovery_killed_at_every_step_is_finished_by_the_next(tmp_path):
    """From the worst state, blocks inserted and no header."""
    for step in itertools.count():
        path = write(tmp_path / "m.safetensors", SHAPES, {"k": "old"}, DATA)
        w._write_journal(path, read_header(path), w.GROWTH)
        path.write_bytes(bytes(w.GROWTH) + path.read_bytes())
        status = stopped_at(step, lambda path=path: w.recover(path))
        w.recover(path)
        assert says(path) == "old" and os.listdir(tmp_path) == [path.name]
        if status == 0:
            break
    assert step > 5


@linux
def test_what_a_living_process_works_on_is_let_be(file):
    """A journal and parts beside a file that is locked, or that has been replaced since."""
    import fcntl

    left = [file.with_name(file.name + suffix) for suffix in (w.JOURNAL, w.JOURNAL_PART, w.PART)]
    for path in left:
        path.write_bytes(b"{}")
    with open(file, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert w.recover(file) is None and all(path.exists() for path in left)
    with open(left[-1], "rb") as other:  # a stamp of another file with this --output
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "was removed" in w.recover(file) and [path.exists() for path in left] == [False, False, True]
    assert "was removed" in w.recover(file) and os.listdir(file.parent) == [file.name]


@linux
@pytest.mark.parametrize("way", ["copy", "header", "insert"])
def test_stamps_and_inspects_at_once(way, tmp_path):
    """Five processes: each stamp is done or refused in one sentence that says why, every read succeeds, and
    nobody takes away what another writes."""
    path = write(tmp_path / "m.safetensors", SHAPES, {"k": "old"}, DATA)
    if way == "header":
        make_room(path)
    why = ("wait for it", "start again", "as that program made it")

    def work(number):
        for turn in range(8):
            if number == 0:
                assert w.recover(path) is None
                read_header(path)
                continue
            try:
                change(path, f"{number}{turn}" * 100 * 9 ** (way == "insert"), in_place=way == "insert")
            except OSError as error:
                assert error.errno is None and str(error).endswith(why), error

    children = []
    for number in range(5):
        if (child := os.fork()) == 0:
            code = 1
            try:
                work(number)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 5
    assert len(set(says(path)[::2])) == 1 and os.listdir(tmp_path) == [path.name]


@linux
def test_without_locks_another_part_is_neither_put_in_place_nor_removed(file, monkeypatch):
    """As of another machine on a network folder, which took ours away and writes its own."""
    part, copy_data = file.with_name(file.name + w.PART), w._copy_data

    def meanwhile(*args):
        copy_data(*args)
        part.unlink()
        part.write_bytes(b"half of another's")

    monkeypatch.setattr(w, "_copy_data", meanwhile)
    with pytest.raises(w.Busy, match="is being stamped by another process"):
        change(file, NEW)
    assert says(file) == "old" and part.read_bytes() == b"half of another's"


@posix
def test_a_link_beside_the_file_is_not_written_through(file, tmp_path):
    mine = tmp_path / "mine"
    mine.write_bytes(b"precious")
    for suffix in (w.PART, w.JOURNAL, w.JOURNAL_PART):
        file.with_name(file.name + suffix).symlink_to(mine)
    assert w.recover(file) is None
    refused(file, "cannot write in")
    assert mine.read_bytes() == b"precious"


@linux
def test_one_attribute_that_cannot_be_kept_costs_no_other(file, monkeypatch):
    kept = []

    def setxattr(path, name, value):
        if name == "trusted.first":
            raise PermissionError(errno.EPERM, "Operation not permitted")
        kept.append(name)

    monkeypatch.setattr(os, "listxattr", lambda path: ["trusted.first", "user.second"])
    monkeypatch.setattr(os, "getxattr", lambda path, name: b"")
    monkeypatch.setattr(os, "setxattr", setxattr)
    assert change(file, NEW) == "copy"
    assert kept == ["user.second"]


@posix
def test_a_file_that_may_not_be_that_large_is_not_called_a_full_disk(file):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        refused(file, "files may not be that large there")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@linux
@pytest.mark.parametrize("way", ["copy", "header", "insert"])
def test_killed_at_every_step(way, tmp_path):
    unreadable, outcomes, step = 0, [], 0
    while True:
        path = write(tmp_path / f"{step}.safetensors", SHAPES, {"k": "old"}, DATA)
        if way == "header":
            make_room(path)
        code = killed_at(step, path, in_place=way == "insert")
        assert code in (0, -signal.SIGKILL)
        try:
            outcomes.append(says(path))
        except FormatError:
            unreadable += 1
            assert way == "insert"  # the one window that is documented
            assert "its old header was put back" in w.recover(path)
            outcomes.append(says(path))
        w.recover(path)
        assert not [name for name in os.listdir(tmp_path) if "sdxl-fixes" in name]
        if code == 0:
            break
        step += 1
    assert set(outcomes) == {"old", NEW} and outcomes == sorted(
        outcomes, reverse=True
    )  # first old, then new, never back
    assert step > 5 and unreadable <= 2


@linux
@pytest.mark.parametrize("way", ["copy", "header", "insert"])
def test_everything_is_on_the_disk_before_it_counts(way, file, monkeypatch):
    """Against a power cut: the copy is synced before it is renamed, the journal before the file is touched,
    and it goes last."""
    if way == "header":
        make_room(file)
    log = []

    def logged(owner, name, label):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: (log.append(label(*args)), original(*args))[1])

    logged(
        os,
        "fsync",
        lambda fd: (
            "sync "
            + (
                "folder"
                if stat.S_ISDIR(os.fstat(fd).st_mode)
                else Path(os.readlink(f"/proc/self/fd/{fd}")).name
            )
        ),
    )
    logged(os, "replace", lambda old, new: f"rename to {Path(new).name}")
    logged(w, "_write_block", lambda *args: "write header")
    logged(w, "_insert_range", lambda *args: "insert")
    logged(Path, "unlink", lambda path, **options: f"remove {path.name}")
    name, journal = file.name, file.name + w.JOURNAL
    before = [f"sync {journal}{w.PART}", f"rename to {journal}", "sync folder"]
    expected = {
        "copy": [f"sync {name}{w.PART}", f"rename to {name}", "sync folder"],
        "header": [*before, "write header", f"sync {name}", f"remove {journal}", "sync folder"],
        "insert": [*before, "insert", "write header", f"sync {name}", f"remove {journal}", "sync folder"],
    }
    if change(file, NEW, in_place=way == "insert") != way:
        pytest.skip("this file system has no leases, direct writes or inserted blocks")
    assert log == expected[way]


@linux
@pytest.mark.parametrize("grown", [False, True])
def test_nothing_is_touched_where_the_journal_cannot_be_written(roomy, grown, monkeypatch):
    if not can_write_in_place(roomy):
        pytest.skip("this file system has no leases or direct writes")
    roomy.with_name("probe.safetensors").unlink()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    before = roomy.read_bytes()
    with pytest.raises(OSError, match=r"cannot keep the old header .* is unchanged"):
        change(roomy, "new" * (99_999 if grown else 1), in_place=grown)
    assert roomy.read_bytes() == before and os.listdir(roomy.parent) == [roomy.name]


@linux
@pytest.mark.parametrize("grown", [0, 8192])
def test_a_torn_header_is_mended(roomy, grown):
    """What a power cut could leave: half of the new header, with or without the inserted blocks."""
    old = read_header(roomy)
    w._write_journal(roomy, old, grown)
    content = roomy.read_bytes()
    torn = (old.size + grown).to_bytes(8, "little") + b'{"half' + bytes(grown) + content[14:]
    roomy.write_bytes(torn)
    with pytest.raises(FormatError):
        read_header(roomy)
    assert "old header was put back" in w.recover(roomy) and says(roomy) == "old" and w.recover(roomy) is None


@linux
def test_a_broken_journal_changes_nothing(roomy):
    journal = roomy.with_name(roomy.name + w.JOURNAL)
    for content in (b"", b"{}\n", b'{"file_size": 1, "grown": 0, "sha256": "x"}\n{}'):
        journal.write_bytes(content)
        before = roomy.read_bytes()
        assert w.recover(roomy) is None and roomy.read_bytes() == before and not journal.exists()


@linux
def test_an_error_while_writing_puts_the_old_header_back(roomy, monkeypatch):
    if not can_write_in_place(roomy):
        pytest.skip("this file system has no leases or direct writes")

    def torn(fd, block):
        w._direct(fd, False)
        os.pwrite(fd, bytes(block[:4096])[::-1], 0)
        raise OSError(errno.EIO, "bad disk")

    monkeypatch.setattr(w, "_write_block", torn)
    with pytest.raises(OSError, match="bad disk"):
        change(roomy, "new")
    assert says(roomy) == "old" and not [name for name in os.listdir(roomy.parent) if "sdxl-fixes" in name]


@linux
@pytest.mark.parametrize("way", ["copy", "header"])
def test_killed_at_random_moments(way, tmp_path):
    """Real kills of a process that stamps in a loop: never an unreadable file, and nothing left over after
    the next start."""
    path = write(tmp_path / "m.safetensors", SHAPES, {"k": "old"}, DATA)
    change(path, "0" * 27_000)
    rng = random.Random(0)
    for _ in range(40):
        child = os.fork()
        if child == 0:
            if way == "copy":
                w._overwrite = lambda *args: False
            try:
                for i in itertools.cycle(range(10)):
                    change(path, str(i) * 27_000)
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert len(set(says(path))) == 1
        w.recover(path)
        assert os.listdir(tmp_path) == [path.name]


@linux
def test_a_journal_mends_no_file_of_another_size(roomy):
    """Neither of the states that an interrupted stamp can have left: another program's, which is let be."""
    old = read_header(roomy)
    w._write_journal(roomy, old, 8192)
    roomy.write_bytes(old.size.to_bytes(8, "little") + b'{"half' + roomy.read_bytes()[14:] + bytes(4096))
    before = roomy.read_bytes()
    assert w.recover(roomy) is None and roomy.read_bytes() == before


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
@pytest.mark.parametrize("mode", [0o640, 0o600, 0o664])
def test_a_copy_has_the_mode_of_the_original(file, mode):
    """One that a group may read stays so, and one that nobody else may read, too."""
    file.chmod(mode)
    assert change(file, "y" * 20_000) == "copy"
    assert stat.S_IMODE(file.stat().st_mode) == mode
