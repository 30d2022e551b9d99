"""The header of a safetensors file: what the reference reader refuses is refused in one sentence, and nothing
is touched."""

import json
import sys
import time
import tracemalloc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import header, write
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sdxl_fixes.model_files.header import CROWD, LIMIT, FormatError, encode_header, read_header
from sdxl_fixes.model_files.write import longer, replace_header

SHAPES = {"a": [2, 3], "b": [], "c": [0, 5], "d": [4]}


def file_of(path, content, data=b"", size=None):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.write_bytes((len(text) if size is None else size).to_bytes(8, "little") + text + data)
    return path


def entry(begin, end, shape=None, dtype="U8"):
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def reference_accepts(path):
    try:
        with safe_open(path, "pt") as file:
            file.keys()
        return True
    except (SafetensorError, Exception):  # the reference raises many kinds
        return False


def test_reads_what_the_reference_writes(tmp_path):
    tensors = {
        "x": torch.arange(6.0).reshape(2, 3),
        "y": torch.zeros(0),
        "z": torch.ones(3, dtype=torch.bfloat16),
        "ü": torch.tensor(1),
    }
    save_file(tensors, tmp_path / "m.safetensors", {"a": "b", "ü": "é\n"})
    read = read_header(tmp_path / "m.safetensors")
    assert (
        read.metadata == {"a": "b", "ü": "é\n"}
        and read.file_size == (tmp_path / "m.safetensors").stat().st_size
    )
    assert {name: tensor.shape for name, tensor in read.tensors.items()} == {
        name: tuple(t.shape) for name, t in tensors.items()
    }


def test_the_reference_reads_what_we_write(tmp_path):
    read = read_header(write(tmp_path / "m.safetensors", SHAPES))
    text = encode_header({"ü": "é", "r": "x" * 5000}, read.tensors, 8192)
    again = file_of(tmp_path / "n.safetensors", text, bytes(read.data_size))
    assert reference_accepts(again) and read_header(again).tensors == read.tensors
    with safe_open(again, "pt") as file:
        assert file.metadata() == {"ü": "é", "r": "x" * 5000}


def test_a_header_that_does_not_fit_is_refused(tmp_path):
    read = read_header(write(tmp_path / "m.safetensors", SHAPES))
    with pytest.raises(ValueError, match="there is room for 16"):
        encode_header({}, read.tensors, 16)
    with pytest.raises(ValueError, match="limit of the safetensors format"):
        encode_header({}, read.tensors, LIMIT + 1)


MALFORMED = {
    "empty": (b"", "has 0 bytes"),
    "short": (b"\x01\x00", "has 2 bytes"),
    "huge header": ((LIMIT + 1).to_bytes(8, "little") + b"{}", "announce a header"),
    "header length lies": ((999).to_bytes(8, "little") + b"{}", "is cut off"),
    "zip": (b"PK\x03\x04" + bytes(60), "pickles are never opened"),
    "pickle": (b"\x80\x02}q\x00." + bytes(60), "pickles are never opened"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "web page": (b"<!DOCTYPE html><html></html>", "web page"),
    "gguf": (b"GGUF" + bytes(60), "GGUF"),
}
CONTENT = {
    "not JSON": (b"{'a': 1}", b"", "not strict JSON"),
    "NaN": (b'{"a": NaN}', b"", "NaN is no JSON number"),
    "leading space": (b" {}", b"", "does not begin with {"),
    "list": (b"[]", b"", "does not begin with {"),
    "text after": (b"{} x", b"", "not strict JSON"),
    "deep": (b'{"a":' * 5000, b"", "not strict JSON"),
    "long number": (b'{"a":' + b"9" * 5000 + b"}", b"", "not strict JSON"),
    "not UTF-8": (b'{"a\xff": 1}', b"", "not UTF-8"),
    "surrogate": (b'{"__metadata__": {"a": "\\ud800"}}', b"", "surrogate"),
    "twice": (b'{"a": 1, "a": 2}', b"", "is there twice"),
    "twice in metadata": (b'{"__metadata__": {"k": "1", "k": "2"}}', b"", "is there twice"),
    "metadata not strings": ({"__metadata__": {"k": True}}, b"", "not an object of strings"),
    "metadata list": ({"__metadata__": []}, b"", "not an object of strings"),
    "entry not an object": ({"a": 1}, b"", "expected an object"),
    "unknown field": ({"a": {**entry(0, 1), "x": 1}}, b"1", "expected an object"),
    "unknown dtype": ({"a": entry(0, 1, dtype="F128")}, b"1", "unknown dtype"),
    "dtype a list": ({"a": entry(0, 1, dtype=["U8"])}, b"1", "unknown dtype"),
    "negative shape": ({"a": entry(0, 1, [-1])}, b"1", "whole numbers"),
    "shape true": ({"a": entry(0, 1, [True])}, b"1", "whole numbers"),
    "shape a float": ({"a": entry(0, 1, [1.0])}, b"1", "whole numbers"),
    "offsets reversed": ({"a": entry(1, 0, [1])}, b"1", "in order"),
    "three offsets": ({"a": {**entry(0, 1), "data_offsets": [0, 1, 1]}}, b"1", "whole numbers"),
    "shape and offsets disagree": ({"a": entry(0, 3, [2])}, b"123", "takes 2 bytes"),
    "shape overflows": ({"a": entry(0, 1, [2**63, 2**63])}, b"1", "larger than any file"),
    "shape overflows before a zero": ({"a": entry(0, 0, [2**40, 2**40, 0])}, b"", "larger than any file"),
    "shape of a length that no machine has": ({"a": entry(0, 0, [0, 2**64])}, b"", "larger than any file"),
    "a dtype without end": ({"a": entry(0, 1, dtype="x" * 100_000)}, b"1", "unknown dtype"),
    "a shape without end": ({"a": entry(0, 1, [1] * 100_000 + [2])}, b"1", "takes 2 bytes"),
    "overlap": ({"a": entry(0, 2), "b": entry(1, 3)}, b"123", "overlaps"),
    "hole": ({"a": entry(0, 1), "b": entry(2, 3)}, b"123", "leaves a hole"),
    "cut off": ({"a": entry(0, 4)}, b"12", "is cut off"),
    "bytes after": ({"a": entry(0, 1)}, b"123", "bytes after its last tensor"),
}


@pytest.mark.parametrize("name", [*MALFORMED, *CONTENT])
def test_malformed_files_get_one_sentence(name, tmp_path):
    path = tmp_path / "m.safetensors"
    if name in MALFORMED:
        content, sentence = MALFORMED[name]
        path.write_bytes(content)
    else:
        content, data, sentence = CONTENT[name]
        file_of(path, content, data)
    before = path.read_bytes()
    with pytest.raises(FormatError) as error:
        read_header(path)
    assert sentence in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 500 + len(str(path))
    assert not (name.startswith("shape") and reference_accepts(path))
    assert path.read_bytes() == before


def test_a_header_of_128_bytes_is_no_pickle(tmp_path):
    text, end = header({"a": [2]})
    assert read_header(file_of(tmp_path / "m.safetensors", text.ljust(128), bytes(end))).size == 128


def test_a_shape_of_huge_numbers_takes_no_time(tmp_path):
    """20,000 numbers of 4,000 digits and a zero: their product would take minutes."""
    shape = "[" + ("9" * 4000 + ",") * 2000 + "0]"
    content = f'{{"a":{{"dtype":"U8","shape":{shape},"data_offsets":[0,0]}}}}'.encode()
    start = time.process_time()
    with pytest.raises(FormatError, match="larger than any file"):
        read_header(file_of(tmp_path / "m.safetensors", content))
    assert time.process_time() - start < 5


@pytest.mark.parametrize("value", [b"[],", b"{},", b'"",', b"0.5,"])
def test_a_header_of_too_many_values_is_refused_before_they_are_made(value, tmp_path):
    """They would take some 60 bytes each; the strings of a header may be as long as they like."""
    path = file_of(tmp_path / "m.safetensors", b'{"a":[' + value * (CROWD + 1) + b"0]}")
    size = path.stat().st_size
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=f"more than {CROWD} values or quotes"):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 40 * (CROWD + 1) + size
    finally:
        tracemalloc.stop()
    long = json.dumps({"__metadata__": {"a": '[{",\\' * 500_000}}).encode()
    assert read_header(file_of(path, long)).metadata == {"a": '[{",\\' * 500_000}


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system with holes")
def test_a_terabyte_of_holes_is_read_and_stamped_at_once(tmp_path):
    path = file_of(tmp_path / "m.safetensors", {"a": entry(0, 2**40)})
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + 2**40)
    old = read_header(path)
    assert old.tensors["a"].shape == (2**40,)
    replace_header(path, old, encode_header({"k": "v" * 9000}, old.tensors, longer(old, 9200)))
    assert read_header(path).metadata["k"] == "v" * 9000
    assert path.stat().st_blocks * 512 < 1 << 20


def mutations():
    """Bytes of a valid file with some of them replaced, cut out, doubled or appended."""
    text, end = header({"a": [2, 3], "b": [], "v_pred": [0]}, {"k": "v", "modelspec.prediction_type": "v"})
    valid = len(text).to_bytes(8, "little") + text + bytes(range(end))

    def mutate(changes):
        data = bytearray(valid)
        for kind, position, chunk in changes:
            position %= len(data) + 1
            if kind == 0:
                data[position : position + len(chunk)] = chunk
            elif kind == 1:
                del data[position : position + len(chunk)]
            else:
                data[position:position] = chunk
        return bytes(data)

    words = st.sampled_from(
        [
            b"{",
            b"}",
            b'"',
            b",",
            b":",
            b"[",
            b"0",
            b"-1",
            b"9",
            b" ",
            b"\n",
            b"\x00",
            b"null",
            b"true",
            b"1e3",
            b"a",
            b"v_pred",
        ]
    )
    change = st.tuples(
        st.integers(0, 2), st.integers(0, len(valid)), st.one_of(words, st.binary(min_size=1, max_size=4))
    )
    return st.lists(change, min_size=1, max_size=3).map(mutate)


@settings(max_examples=400, suppress_health_check=list(HealthCheck))
@given(mutations())
def test_fuzz_what_we_accept_the_reference_accepts(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(data)
    try:
        read = read_header(path)
    except FormatError as error:
        assert "\n" not in str(error)
        return
    assert reference_accepts(path) and read.file_size == len(data)


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=200))
def test_fuzz_any_bytes(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    for content in (
        data,
        len(data).to_bytes(8, "little") + data,
        (len(data) + 1).to_bytes(8, "little") + b"{" + data,
    ):
        path.write_bytes(content)
        try:
            read_header(path)
        except FormatError as error:
            assert "\n" not in str(error)
