"""Every value knows its line, and nothing but plain YAML is read."""

from __future__ import annotations

import time

import pytest

from yolo_kd.config.source import MAX_BYTES, Item, parse_yaml, problem, raise_if, read_yaml, shown, wrap
from yolo_kd.errors import ConfigError


def test_items_know_their_lines():
    problems: list[str] = []
    root = parse_yaml("# head\na:\n  b: 1\n  c:\n    - x\n    - 2.5\n", "f.yaml", problems)
    assert not problems
    assert root is not None
    assert root.plain() == {"a": {"b": 1, "c": ["x", 2.5]}}
    assert root.value["a"].value["b"].where == "f.yaml:3"
    assert root.value["a"].value["c"].value[1].where == "f.yaml:6"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\na: 1e-3", "f.yaml:2: 1e-3 is read as text; write 1.0e-3."),
        ("a: 1.0e3", "f.yaml:1: 1.0e3 is read as text; write 1.0e+3."),
        ("a: [0, -1E5]", "f.yaml:1: -1E5 is read as text; write -1.0e+5."),
        ("a: +.5", "f.yaml:1: +.5 is read as text; write +0.5."),
        ("a:\n  b: 1\n  b: 2", "f.yaml:3: key 'b' is given twice, first in line 2."),
        ("a: [{b: 1, b: 2}]", "f.yaml:1: key 'b' is given twice, first in line 1."),
        ("a: &x 1", "f.yaml:1: '&x': no anchors and no aliases here; write the values out."),
        ("a: &x 1\nb: *x", "f.yaml:2: '*x': no anchors and no aliases here; write the values out."),
        ("<<: {a: 1}", "f.yaml:1: no inheritance with '<<' here; write the values out."),
        ("a: !!python/object:os.system {}", "f.yaml:1: the tag '!!python/object:os.system' is not allowed here"),
        ("a: !!python/name:os.system", "the tag '!!python/name:os.system' is not allowed here"),
        ("!mine\na: 1", "f.yaml:1: the tag '!mine' is not allowed here"),
        ("a: !!str {b: 1}", "the tag '!!str' is not allowed here"),
        ("a: !!int x", "f.yaml:1: the tag '!!int' is not allowed here"),
        ("a: =", "f.yaml:1: = is read as a sign of YAML; put it in quotes."),
        ("a: 2001-01-01", "f.yaml:1: 2001-01-01 is read as a date; put it in quotes."),
        ("a: 1:30", "f.yaml:1: 1:30 is read as a number to base 60; put it in quotes."),
        ("1: a", "f.yaml:1: key '1' is read as a number; put it in quotes."),
        ("on: a", "f.yaml:1: key 'on' is read as true or false; put it in quotes."),
        ("? [a]\n: 1", "f.yaml:1: a key must be text, not a mapping or a list."),
        ("a: 1\nb: [", "f.yaml:2: not valid YAML: "),
        ("a: b: c", "f.yaml:1: not valid YAML: mapping values are not allowed here."),
        ("a: 1\n\tb: 2", "f.yaml:2: not valid YAML: "),
        ("a: 1\n---\nb: 2", "f.yaml:2: not valid YAML: expected a single document"),
        ("a: 1\n\x00", "f.yaml:2: not valid YAML: character 0 is not allowed."),
        ('"\\UFFFFFFFF"', "f.yaml: not valid YAML: "),
        ("[" * 1000, "f.yaml:1: nested more than 20 deep."),
        ("a: " + "9" * 5000, "is too long for a number."),
    ],
)
def test_mistakes(text: str, message: str):
    problems: list[str] = []
    parse_yaml(text, "f.yaml", problems)
    assert any(message in line for line in problems), problems
    assert all("\n" not in line for line in problems)


def test_text_in_quotes_may_look_like_a_number():
    problems: list[str] = []
    root = parse_yaml("a: '1e-3'", "f.yaml", problems)
    assert not problems
    assert root == Item({"a": Item("1e-3", "f.yaml:1")}, "f.yaml:1")


def test_all_mistakes_are_collected():
    problems: list[str] = []
    parse_yaml("a: 1e-3\na: 2\n3: 4\n", "f.yaml", problems)
    assert len(problems) == 3


def test_bombs_are_refused_quickly():
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    start = time.perf_counter()
    for text in ("\n".join(lines), "[" * 100_000, "{a: " * 50_000, "- " * 50_000):
        problems: list[str] = []
        assert parse_yaml(text, "f.yaml", problems) is None
        assert problems
    assert time.perf_counter() - start < 5


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: \xe9\n")
    (tmp_path / "large.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    problems: list[str] = []
    for name in ("missing.yaml", ".", "latin.yaml", "large.yaml", "nul\0.yaml", "/dev/zero"):
        assert read_yaml(name, problems) is None
    assert problems == [
        "missing.yaml: no such file.",
        ".: is a folder, not a file.",
        "latin.yaml:2: not UTF-8 text. Save the file in that encoding.",
        "large.yaml: is larger than 256 KB. Is it the right file?",
        "nul\0.yaml: no such file.",
        "/dev/zero: is a device or a pipe, not a file.",
    ]


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    file = tmp_path / "bom.yaml"
    file.write_bytes(b"\xef\xbb\xbfa: 1\n")
    problems: list[str] = []
    root = read_yaml(file, problems)
    assert not problems
    assert root is not None
    assert root.plain() == {"a": 1}


def test_python_values_are_named_by_their_path():
    problems: list[str] = []
    root = wrap({"a": {"b": (1, 2)}, 3: 4}, "kd", problems)
    assert root.value["a"].value["b"].where == "kd.a.b"
    assert root.plain() == {"a": {"b": [1, 2]}}
    assert problems == ["kd: keys must be text, received 3."]


def test_a_mapping_that_holds_itself():
    loop: dict[str, object] = {}
    loop["a"] = loop
    problems: list[str] = []
    wrap(loop, "kd", problems)
    assert len(problems) == 1
    assert problems[0].endswith("nested more than 20 deep.")


def test_messages_stay_on_one_line():
    assert problem("f.yaml:1", "a\nb") == "f.yaml:1: a b"
    assert problem("", "a") == "a"
    assert shown(None) == "nothing"
    assert shown("x" * 100) == "'" + "x" * 56 + "..."
    assert shown(16**5000) == "a value of type int"


def test_raise_if():
    raise_if([])
    with pytest.raises(ConfigError) as info:
        raise_if(["a", "b", "a"])
    assert info.value.problems == ("a", "b")
