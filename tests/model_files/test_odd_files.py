"""Names, folders, links and neighbours as people have them: a stamp writes whole files or refuses in one
sentence, before anything is written."""

import contextlib
import io
import json
import os
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import KINDS, model, write

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.checkpoint import JSON_LIMIT, RECORD_KEY, Sampling, read_json, read_record
from sdxl_fixes.cli import main
from sdxl_fixes.model_files import write as w
from sdxl_fixes.model_files.header import read_header
from sdxl_fixes.model_files.model_file import beside
from sdxl_fixes.model_files.stamp import stamp_file
from sdxl_fixes.uis.verdicts import verdicts

V = ["--prediction_type", "v_prediction"]
posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
linux = pytest.mark.skipif(sys.platform != "linux", reason="a name that is no text needs Linux")


def stamped(path):
    record = read_record(read_header(path).metadata)
    return record == Sampling(NoiseSchedule.sdxl(), "v_prediction")


def refusal(capsys, *words):
    """The one sentence that the command ends with; what lies in the folder of the file is as it was."""
    folder = os.path.dirname(words[1]) if not os.path.isdir(words[1]) else words[1]

    def there():
        return {
            entry.name: entry.stat(follow_symlinks=False).st_mtime_ns
            for entry in os.scandir(folder)
            if not entry.is_dir(follow_symlinks=False)
        }

    before = there()
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("sdxl-fixes ") and said.count("\n") == 1 and "Errno" not in said
    assert there() == before
    return said


# ---------------------------------------------------------------- names


@posix
@pytest.mark.parametrize("letter", ["x", "ö", "模"])
@pytest.mark.parametrize("size", [200, 226, 238, 255])
def test_names_of_any_length_are_stamped_and_inspected(letter, size, tmp_path, capsys):
    """Everything beside the file has a longer name, and a name has 255 bytes at most."""
    stem = "a" * ((size - 12) % len(letter.encode())) + letter * ((size - 12) // len(letter.encode()))
    path = model(tmp_path / f"{stem}.safetensors")
    assert len(os.fsencode(path.name)) == size
    for words in (V, [*V, "--zero_terminal_snr", "--force"], [*V, "--force", "--in_place"]):
        assert main(["stamp", str(path), *words]) == 0
    assert stamped(path) and main(["inspect", str(path)]) == 0
    config = beside(path, ".scheduler_config.json")
    assert sorted(os.listdir(tmp_path)) == sorted([path.name, config.name])
    assert json.loads(config.read_text())["prediction_type"] == "v_prediction"
    assert (config.name == f"{stem}.scheduler_config.json") == (size + 10 <= 255)
    journal = w._write_journal(path, read_header(path), 0)  # and is mended
    content = path.read_bytes()
    path.write_bytes(content[:8] + b"{torn" + content[13:])
    assert "was put back" in w.recover(path) and path.read_bytes() == content and not journal.exists()


def test_long_names_that_begin_alike_have_neighbours_of_their_own(tmp_path):
    one, other = (tmp_path / f"{'x' * 240}{end}.safetensors" for end in ("1", "2"))
    names = {beside(path, ".scheduler_config.json").name for path in (one, other)}
    assert len(names) == 2 and all(len(name) == 255 for name in names)


NAMES = ["mö.safetensors", "模型.safetensors", "a\nb\x1b[31m.safetensors"]
SHIFT_JIS = pytest.param(os.fsdecode(b"\x83\x82\x83f.safetensors"), marks=linux)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("name", [*NAMES, SHIFT_JIS])
def test_a_console_without_the_letters_of_a_name(name, encoding, tmp_path, monkeypatch, capsys):
    path = model(tmp_path / name)
    console = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(console, encoding))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(console, encoding, errors="backslashreplace"))
    for words in (["stamp", *V], ["inspect"], ["inspect", "--json"], ["inspect", "--markdown"]):
        assert main([words[0], str(path), *words[1:]]) == 0
    assert main(["stamp", str(path), "--prediction_type", "epsilon"]) == 2
    sys.stderr.flush()
    said = console.getvalue().decode(encoding)
    assert stamped(path) and beside(path, ".scheduler_config.json").is_file()
    assert "\x1b" not in said and not any(line.startswith("b") for line in said.splitlines())


@linux
@pytest.mark.parametrize("output", ["full", "closed"])
def test_an_output_that_takes_nothing_leaves_nothing_half_done(output, tmp_path, monkeypatch, capsys):
    path = model(tmp_path / "m.safetensors")
    full = io.TextIOWrapper(open("/dev/full", "wb")) if output == "full" else None
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert main(["stamp", str(path), *V]) == (2 if full else 0)
    assert stamped(path) and beside(path, ".scheduler_config.json").is_file()
    said = capsys.readouterr().err
    assert ("standard output: No space left" in said and said.count("\n") == 1) if full else said == ""


# ---------------------------------------------------------------- links, and what is no file


@posix
def test_a_link_is_followed_and_its_config_lies_beside_the_link(tmp_path):
    (tmp_path / "disk").mkdir()
    path = model(tmp_path / "disk" / "m.safetensors")
    link, again = tmp_path / "link.safetensors", tmp_path / "again.safetensors"
    link.symlink_to(path)
    again.symlink_to(link)
    config = tmp_path / "disk" / "config.json"
    config.write_text('{"mine": 1}')
    beside(again, ".scheduler_config.json").symlink_to(config)
    assert main(["stamp", str(again), *V]) == 0
    assert again.is_symlink() and link.is_symlink() and stamped(path)
    assert beside(again, ".scheduler_config.json").is_symlink()
    assert json.loads(config.read_text())["prediction_type"] == "v_prediction"


@posix
@pytest.mark.parametrize("command", ["stamp", "inspect"])
def test_links_that_lead_nowhere(command, tmp_path, capsys):
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("other")
    (tmp_path / "other").symlink_to("loop")
    for name in ("dangling", "loop"):
        words = V if command == "stamp" else []
        assert "leads to no file" in refusal(capsys, command, tmp_path / name, *words)
    path = model(tmp_path / "m.safetensors")
    assert "is not a regular file" in refusal(capsys, "stamp", path, *V, "--output", tmp_path / "loop")


@posix
@pytest.mark.parametrize("kind", ["folder", "fifo", "link to fifo"])
@pytest.mark.parametrize("where", ["config", "yaml", "output"])
def test_what_is_no_file_is_not_replaced_or_waited_for(where, kind, tmp_path, capsys):
    path = model(tmp_path / "m.safetensors")
    ends = {"config": "m.scheduler_config.json", "yaml": "m.yaml", "output": "o.safetensors"}
    odd = tmp_path / ends[where]
    if kind == "folder":
        odd.mkdir()
    elif kind == "fifo":
        os.mkfifo(odd)
    else:
        os.mkfifo(tmp_path / "fifo")
        odd.symlink_to("fifo")
    words = {"config": [], "yaml": ["--yaml"], "output": ["--output", odd, "--force"]}[where]
    assert f"{odd} is not a regular file" in refusal(capsys, "stamp", path, *V, *words)
    assert main(["inspect", str(path)]) == 0
    if where != "output":
        assert f"{odd} is not a regular file" in refusal(capsys, "stamp", path, *V, *words, "--force")


def test_an_output_that_cannot_be_is_refused_before_anything_is_copied(tmp_path, capsys, monkeypatch):
    path = model(tmp_path / "m.safetensors")
    monkeypatch.setattr(w, "_copy", pytest.fail)
    for output, sentence in (
        (tmp_path / "no" / "o.safetensors", "there is no folder"),
        (path, "itself: leave --output out"),
    ):
        assert sentence in refusal(capsys, "stamp", path, *V, "--output", output, "--force")


@posix
def test_a_read_only_file_is_refused_by_a_dry_run_too(tmp_path, capsys):
    path = model(tmp_path / "m.safetensors")
    path.chmod(0o444)
    for words in ([], ["--dry_run"], ["--in_place"]):
        assert "is read-only" in refusal(capsys, "stamp", path, *V, *words)
    path.chmod(0o644)
    config = beside(path, ".scheduler_config.json")
    config.write_text("{}\n\n")
    config.chmod(0o444)
    assert main(["stamp", str(path), *V]) == 0  # holds nothing to keep
    config.chmod(0o644)
    config.write_text('{"mine": 1}')
    config.chmod(0o444)
    words = ["--prediction_type", "epsilon", "--force"]
    assert f"{config} is read-only" in refusal(capsys, "stamp", path, *words) and stamped(path)


# ---------------------------------------------------------------- what is beside the file, and the record

CONFIGS = {
    "no JSON": (b"{", "is not JSON"),
    "no UTF-8": (b'{"a": "\xff"}', "is not JSON"),
    "a list": (b"[]", "holds a list"),
    "deep": (b'{"a":' + b"[" * 100_000, "is not JSON"),
    "a long number": (b'{"a":' + b"9" * 5000 + b"}", "is not JSON"),
    "NaN": (b'{"a": NaN}', "what is no strict JSON"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_cannot_be_kept_stops_the_stamp_before_the_file_is_changed(case, tmp_path, capsys):
    content, sentence = CONFIGS[case]
    path = model(tmp_path / "m.safetensors")
    config = beside(path, ".scheduler_config.json")
    config.write_bytes(content)
    said = refusal(capsys, "stamp", path, *V, "--force")
    assert f"{config} " in said and sentence in said and config.read_bytes() == content
    assert main(["inspect", str(path)]) == 0


def test_a_json_file_without_end_is_refused(tmp_path, capsys):
    config = tmp_path / "c.json"
    with open(config, "wb") as file:
        file.truncate(JSON_LIMIT * 1000)
    with pytest.raises(ValueError, match=f"c.json has more than {JSON_LIMIT} bytes"):
        read_json(config)


def test_no_space_for_the_config_leaves_the_file_as_it_was(tmp_path, capsys, monkeypatch):
    path = model(tmp_path / "m.safetensors")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    said = refusal(capsys, "stamp", path, *V)
    assert "m.scheduler_config.json: No space left on device: free some space" in said


def test_a_folder_of_which_one_file_cannot_be_stamped_says_how_many_are(tmp_path, capsys, monkeypatch):
    (tmp_path / "unet").mkdir()
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    shapes = list(KINDS["diffusers_unet"].items())
    for number in (1, 2):
        name = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        write(tmp_path / "unet" / name, dict(shapes[number - 1 : number + 1]))
    replace = w._replace

    def full(path, *args):
        if "00002-of" in path.name:
            raise OSError(28, "No space left on device")
        return replace(path, *args)

    monkeypatch.setattr(w, "_replace", full)
    assert main(["stamp", str(tmp_path), *V]) == 2
    assert "1 of 2 files are stamped: then give the same command again" in capsys.readouterr().err
    assert not list((tmp_path / "scheduler").iterdir())
    monkeypatch.undo()
    assert main(["stamp", str(tmp_path), *V]) == 0
    assert all(stamped(file) for file in (tmp_path / "unet").glob("*.safetensors"))
    assert [file.name for file in (tmp_path / "scheduler").iterdir()] == ["scheduler_config.json"]


RECORDS = {
    "no JSON": "{",
    "deep": "[" * 100_000,
    "no schedule": '{"format":"sdxl_fixes.schedule"}',
    "a newer version": '{"format":"sdxl_fixes.schedule","version":99,"betas":[0.1,0.2]}',
    "a number": "1",
    "empty": "",
}


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("kind", ["checkpoint", "lora"])
def test_a_broken_record_is_mended_by_force(kind, record, tmp_path, capsys):
    path = model(tmp_path / "m.safetensors", kind, metadata={RECORD_KEY: RECORDS[record], "format": "pt"})
    assert "record" in refusal(capsys, "stamp", path, *V)
    assert main(["stamp", str(path), *V, "--force"]) == 0 and stamped(path)
    assert "its record was broken" in capsys.readouterr().out
    assert main(["inspect", str(path)]) == 0


def test_what_a_file_says_is_printed_short_and_without_control_characters(tmp_path, capsys):
    evil = "v\x1b]0;owned\x07\n" + "x" * 100_000
    says = dict.fromkeys(("modelspec.prediction_type", "ss_zero_terminal_snr"), evil)
    path = model(tmp_path / "m.safetensors", metadata=says)
    assert main(["inspect", str(path)]) == 0
    assert main(["stamp", str(path), *V]) in (0, 2)
    said = "".join(capsys.readouterr())
    assert "\x1b" not in said and "\x07" not in said and len(said) < 10_000


@pytest.mark.parametrize("kind", ["adapter", "bare"])
def test_a_later_stamp_of_what_the_adapters_save_moves_nothing(kind, tmp_path):
    """The room that integrations/*/checkpoint.py leave, written by the reference writer."""
    torch, safetensors = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    from sdxl_fixes.checkpoint import metadata
    from sdxl_fixes.model_files.header import ROOM, ROOM_KEY

    said = metadata(NoiseSchedule.sdxl(), "v_prediction") | {ROOM_KEY: " " * ROOM}
    entries = {key: value for key, value in said.items() if value} if kind == "adapter" else {"format": "pt"}
    path = tmp_path / "m.safetensors"
    tensors = {"lora_unet_x.lora_down.weight": torch.zeros(4, 4)}
    safetensors.save_file(tensors, path, entries)
    size = path.stat().st_size
    stamp_file(path, Sampling(NoiseSchedule.sdxl().with_terminal_sigma(300, "tail"), "epsilon"), force=True)
    assert (path.stat().st_size == size) == (kind == "adapter")
    assert verdicts(path)[1].schedule.terminal_sigma == pytest.approx(300)


SAYS = ("modelspec.prediction_type", "ss_zero_terminal_snr", "modelspec.predict_key", RECORD_KEY)


@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(
    st.dictionaries(st.sampled_from(SAYS) | st.text(), st.text()), st.lists(st.text(max_size=8), max_size=3)
)
def test_fuzz_whatever_a_file_says_is_a_sentence_without_control_characters(tmp_path_factory, says, names):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    shapes = {**KINDS["lora"], **{name: [0] for name in names if name != "__metadata__"}}
    write(path, shapes, {key: value for key, value in says.items() if printable_text(key + value)})
    for words in (["inspect"], ["inspect", "--json"], ["stamp", *V, "--dry_run"], ["stamp", *V, "--force"]):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([words[0], str(path), *words[1:]])
        assert status == 0 or (status == 2 and err.getvalue().count("\n") == 1)
        assert all(c == "\n" or c.isprintable() for c in out.getvalue() + err.getvalue())
    assert stamped(path)


def printable_text(text):
    """No halves of surrogate pairs, which no header may have."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
