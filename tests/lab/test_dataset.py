"""The reader of ``--dataset`` files: what it takes, and what it says of what it does not."""

import json
from pathlib import Path

import pytest

from kvpolicy.errors import UsageError
from kvpolicy.lab.dataset import need_outputs, read_dataset


def written(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_lines_of_prompt_and_output_are_read_in_order(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.jsonl", {"prompt": "one", "output": " two"}, "", {"prompt": "3", "output": "4", "x": []}
    )
    texts = read_dataset(path)
    assert [(text.number, text.prompt, text.output) for text in texts] == [(0, "one", " two"), (1, "3", "4")]
    assert texts[1].place == f"{path}, line 3"


def test_what_a_model_wrote_is_found_where_longgenbench_keeps_it(tmp_path: Path) -> None:
    row = {"prompt": "Question_1: …", "questions": ["…"], "answers": [18], "length": 10006, "pred": "Answer_1: 18"}
    (text,) = read_dataset(written(tmp_path / "a.jsonl", row))
    assert text.output == "Answer_1: 18"


def test_no_more_lines_are_looked_at_than_asked_for(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", {"prompt": "a", "output": "b"}, "not JSON")
    assert len(read_dataset(path, most=1)) == 1
    with pytest.raises(UsageError, match="line 2: this is no JSON"):
        read_dataset(path)


def test_a_plain_text_is_cut_at_white_space(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("aaaa bbbb cccc dddd\n")
    (text,) = read_dataset(path)
    assert (text.prompt, text.output) == ("aaaa bbbb cccc", " dddd")
    (text,) = read_dataset(path, split=0.1)
    assert (text.prompt, text.output) == ("aaaa", " bbbb cccc dddd")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2: this is no JSON .* at column"),
        ([1], "line 2: a line is an object with a 'prompt'"),
        ({"text": "x", "id": 1}, "line 2: .*'prompt', and this one has text, id"),
        ({"prompt": 7}, "line 2: the prompt is to be a string, and is a number"),
        ({"prompt": "x", "output": ["y"]}, "line 2: the output is to be a string, and is a list"),
        ({"prompt": "  "}, "line 2: the prompt is empty"),
    ],
)
def test_a_line_that_makes_no_sense_is_named(tmp_path: Path, line: object, reason: str) -> None:
    path = written(tmp_path / "a.jsonl", {"prompt": "good", "output": "x"}, line)
    with pytest.raises(UsageError, match=reason):
        read_dataset(path)


def test_files_that_are_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*No such file"):
        read_dataset(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match=r"a \.jsonl file"):
        read_dataset(tmp_path / "a.csv")
    with pytest.raises(UsageError, match="is empty"):
        read_dataset(written(tmp_path / "a.jsonl", ""))
    (tmp_path / "b.jsonl").write_bytes(b'{"prompt": "x"}\n\xff\xfe\n')
    with pytest.raises(UsageError, match="line 2: this is not UTF-8"):
        read_dataset(tmp_path / "b.jsonl")
    (tmp_path / "c.txt").write_text("word")
    with pytest.raises(UsageError, match="one of the two parts of this text is empty"):
        read_dataset(tmp_path / "c.txt")
    with pytest.raises(UsageError, match="between 0 and 1"):
        read_dataset(tmp_path / "c.txt", split=1.5)


def test_who_needs_outputs_says_which_line_has_none(tmp_path: Path) -> None:
    texts = read_dataset(written(tmp_path / "a.jsonl", {"prompt": "a", "pred": "b"}, {"prompt": "c"}))
    with pytest.raises(UsageError, match=r"line 2: there is nothing after the prompt; .*'output' or 'pred'"):
        need_outputs(texts)
