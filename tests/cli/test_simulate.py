"""`kvpolicy simulate`: sources of text, wrong input, what it prints and writes, and watching files."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kvpolicy.cli.main import main
from kvpolicy.cli.simulate import limits
from kvpolicy.cli.texts import read_pattern
from kvpolicy.cli.watching import files_of
from kvpolicy.errors import UsageError

ROOT = Path(__file__).parents[2]

SMALL = ["--layers", "1", "--heads", "2", "--kv-heads", "1", "--prompt", "6", "--steps", "20"]
PATTERN = ["--pattern", "phoenix,at=2,from=18", *SMALL]

WINDOW = """\
kvpolicy: 1
name: mine
params: {room: {default: 4, help: tokens kept}}
pools:
  all: {admit: all, budget: room}
tests:
  - name: the newest stay
    set: {room: 6}
    attention: {pattern: heavy-hitter, prompt: 8, steps: 12, at: 3, layers: 1}
    expect: [{resident: {max: 6}}]
  - name: the newest stay in another text
    attention: {pattern: uniform, prompt: 3, steps: 9, layers: 1}
    expect: [{resident: {max: 6}}]
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(WINDOW)
    return path


def facts(capsys: pytest.CaptureFixture[str], *words: str) -> dict:  # type: ignore[type-arg]
    assert main(["simulate", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


# Where the text comes from


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("uniform", {"pattern": "uniform"}),
        ("milestone,at=40,until=90", {"pattern": "milestone", "at": 40, "until": 90}),
        ("phoenix, at=[3, 8..9] , from=40,fade=.5", {"pattern": "phoenix", "at": [3, "8..9"], "from": 40, "fade": 0.5}),
        ("heavy-hitter,at=0..7", {"pattern": "heavy-hitter", "at": "0..7"}),
        ("a,of=[{b: [1, 2], c: 3}, 4]", {"pattern": "a", "of": [{"b": [1, 2], "c": 3}, 4]}),
        ("{pattern: sink, sinks: 2}", {"pattern": "sink", "sinks": 2}),
    ],
)
def test_a_pattern_on_the_command_line(text: str, data: dict[str, object]) -> None:
    assert read_pattern(text) == data


def test_a_pattern_is_the_text_and_flags_add_to_it(capsys: pytest.CaptureFixture[str], mine: Path) -> None:
    found = facts(capsys, str(mine), *PATTERN, "--seed", "3")
    assert found["attention"] == {
        "pattern": "phoenix", "at": 2, "from": 18, "steps": 20, "heads": 2, "kv_heads": 1, "layers": 1, "seed": 3,
        "prompt": 6,
    }  # fmt: skip
    assert (found["rows"], found["prompt"], found["tokens"]) == (1, 6, 26)
    assert facts(capsys, str(mine), *PATTERN, "--prompt", "6,9")["rows"] == 2


@pytest.mark.parametrize("asked", ["1", "the newest stay"])
def test_a_test_is_the_text_and_sets_its_params(asked: str, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys, str(mine), "h2o", "--test", asked)
    assert found["attention"]["pattern"] == "heavy-hitter"
    assert found["specs"][0]["params"] == {"room": "6"}
    assert found["specs"][0]["shown"]["pools"][0]["budget"][-1] == 6
    assert found["specs"][1]["params"]["heavy"] == "10% * prompt_len"
    found = facts(capsys, str(mine), "--test", asked, "--set", "room=2", "--steps", "5")
    assert (found["specs"][0]["params"], found["tokens"]) == ({"room": "2"}, 13)


def test_a_trace_is_the_text(tmp_path: Path, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kvpolicy.testing.patterns import synthesize
    from kvpolicy.testing.traces import About, write_trace

    said = synthesize({"pattern": "phoenix", "at": 2, "from": 18, "prompt": 6, "steps": 20, "layers": 1})
    shape = said.geometry
    about = About(
        model="synthetic", model_type="synthetic", model_layers=1, layers=(0,), prompts=said.prompts, steps=said.steps,
        query_heads=shape.query_heads, kv_heads=shape.kv_heads, head_dim=shape.head_dim, dtype="float32",
        scaling=said.scale,
    )  # fmt: skip
    write_trace(tmp_path / "t.safetensors", said, about)
    replayed = facts(capsys, str(mine), "--trace", str(tmp_path / "t.safetensors"))
    made = facts(
        capsys, str(mine), "--pattern", "phoenix,at=2,from=18", "--prompt", "6", "--steps", "20", "--layers", "1"
    )
    assert replayed["specs"] == made["specs"]
    assert facts(capsys, str(mine), "--trace", str(tmp_path / "t.safetensors"), "--steps", "7")["tokens"] == 13


# Wrong input


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "which text? --pattern, --test or --trace gives one"),
        (["--pattern", "uniform", "--test", "1"], "--pattern and --test both give a text"),
        (
            ["--pattern", "milestoen,at=3,until=9"],
            "--pattern: no pattern is called `milestoen`; did you mean `milestone`?",
        ),
        (
            ["--pattern", "milestone,at=3,untill=9"],
            "--pattern: `untill`: `untill` is not an argument here; did you mean",
        ),
        (["--pattern", "milestone,at=3"], "the argument `until` is missing"),
        (["--pattern", "milestone,at=3,9"], "'9' is not NAME=VALUE"),
        (["--pattern", "milestone,at=[3"], "write it as in --pattern milestone,at=40,until=90"),
        (["--pattern", "at=3"], "does not begin with a pattern's name"),
        (["--pattern", ""], "does not begin with a pattern's name"),
        (["--pattern", "{at: 3}"], "names no pattern"),
        (["--pattern", "uniform", "--heads", "3", "--kv-heads", "2"], "3 query heads cannot share 2 KV heads evenly"),
        (["--pattern", "uniform", "--prompt", "8,x"], "'8,x' is not a number of tokens"),
        (["--pattern", "uniform", "--layer", "7"], "--layer 7: this text has layers 0..1"),
        (["--pattern", "uniform", "--fail-under", "mas=.9"], "did you mean `mass`?"),
        (["--pattern", "uniform", "--fail-under", "mass=1.5"], "a share from 0 to 1"),
        (["--pattern", "uniform", "--html", "/nowhere/at/all.html"], "cannot write /nowhere/at/all.html"),
        (["--trace", "/nowhere/at/all.safetensors"], "there is no file `/nowhere/at/all.safetensors`"),
        (["--test", "the newest"], "2 tests of mine have this in the name; there are: 1 the newest stay; 2 the newest"),
        (["--test", "3"], "0 tests of mine has this in the name"),
        (["h2o", "--pattern", "uniform", "--set", "rom=3"], "none of mine, h2o has such a param; did you mean `room`?"),
        (["--pattern", "uniform", "--watch", "--json"], "--watch shows pictures of files"),
    ],
)
def test_usage_errors(words: list[str], says: str, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(mine), *words]) == 2
    said = capsys.readouterr()
    assert says in " ".join(said.err.split())
    assert not said.out and "Traceback" not in said.err


def test_an_invalid_policy_and_an_invalid_test(tmp_path: Path, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(tmp_path / "gone.yaml"), "--pattern", "uniform"]) == 3
    assert main(["simulate", str(mine), "--set", "rooom=3", "--pattern", "uniform"]) == 3
    assert "did you mean `room`?" in capsys.readouterr().err
    mine.write_text(WINDOW.replace("at: 3,", "at: 99,"))
    assert main(["simulate", str(mine), "--test", "1"]) == 3
    assert f"{mine}:9:66: position 99 is never said" in capsys.readouterr().err


def test_limits_are_shares() -> None:
    assert limits(["mass=.95", "min-mass=50%"]) == {"mass": 0.95, "min-mass": 0.5}
    with pytest.raises(UsageError, match="mass twice"):
        limits(["mass=.9", "mass=.8"])


def test_no_torch() -> None:
    code = (
        "import sys\nfrom kvpolicy.cli.main import main\n"
        f"code = main(['simulate', 'raas', '--html', '/dev/null', *{PATTERN!r}])\n"
        "loaded = {'torch', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'loaded {loaded}' if loaded else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# What it says


def test_the_picture_in_the_terminal(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(mine), *PATTERN, "--set", "room=6"]) == 0
    said = capsys.readouterr().out
    assert "\x1b[" not in said
    lines = said.splitlines()
    assert lines[0] == "phoenix (at 2, from 18), steps 20, heads 2, kv heads 1, layers 1, prompt 6"
    rows = {int(line.split()[0]): line for line in lines if re.match(r" +\d+  [█▒░·×]", line)}
    assert sorted(rows) == list(range(21))
    assert rows[0].split()[1:] == ["▒▒▒▒▒▒", "6", "100%"]
    assert rows[20].split()[1][:20] == "··×·················"
    assert rows[20].split()[1][20:] == "▒▒▒▒▒▒"
    loss = next(line.split() for line in lines if line.startswith("  2  "))
    assert loss[:3] == ["2", "3", "13"]
    assert "× evicted, and wanted now" in said
    assert max(map(len, lines)) <= 100


def test_policies_stand_side_by_side_where_there_is_room(
    mine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    heights = {}
    for columns in (60, 100, 160):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert main(["simulate", str(mine), "h2o", "raas", *PATTERN]) == 0
        lines = capsys.readouterr().out.splitlines()
        heights[columns] = len(lines)
        assert max(map(len, lines)) <= columns
        assert sum("mine  keeps" in line and "raas  keeps" in line for line in lines) == (columns == 160)
        assert sum("mine  keeps" in line and "h2o  keeps" in line for line in lines) == (columns >= 100)
    assert heights[60] > heights[100] > heights[160]


def test_colour_on_demand(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(mine), *PATTERN, "--color", "always"]) == 0
    assert "\x1b[" in capsys.readouterr().out


def test_the_object_for_machines(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys, str(mine), "raas", *PATTERN)
    assert (found["schema_version"], found["failed"], found["layers"], found["kv_heads"]) == (1, [], 1, 1)
    window, raas = found["specs"]
    assert (window["policy"], raas["policy"]) == ("mine", "raas")
    assert set(window) == {
        "spec", "policy", "digest", "params", "kv_heads_counted", "mean_mass", "min_mass", "evicted", "updates",
        "shown",
    }  # fmt: skip
    shown = window["shown"]
    assert len(shown["t"]) == len(shown["mass"]) == len(shown["evicted"]) == len(shown["pools"][0]["resident"]) == 21
    assert shown["losses"][0]["tokens"] == [2] and shown["losses"][0]["left"] == [1, 1]
    assert window["mean_mass"] + sum(loss["cost"] for loss in shown["losses"]) + shown["never_wanted"] == pytest.approx(
        1
    )
    last = [run for run in shown["states"] if run["to"] == 21]
    assert {run["token"]: (run["state"], run.get("pool")) for run in last} == {
        token: ("evicted", None) if token < 22 else ("ranked", "all") for token in range(26)
    }
    assert raas["evicted"] == 0 and raas["mean_mass"] == pytest.approx(1)
    assert {(pool["name"], pool["budget"][0]) for pool in raas["shown"]["pools"]} == {
        ("prompt", None),
        ("generated", 1008),
    }


def test_two_of_one_name_go_by_their_files(tmp_path: Path, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(WINDOW.replace("default: 4", "default: 8"))
    assert main(["simulate", str(mine), str(other), *PATTERN]) == 0
    said = capsys.readouterr().out.replace("\n", "")
    assert "mine.yaml" in said and "other.yaml" in said


def test_fail_under(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "dense", *PATTERN, "--fail-under", "mass=1", "--fail-under", "min-mass=100%"]) == 0
    capsys.readouterr()
    assert main(["simulate", "dense", str(mine), *PATTERN, "--fail-under", "mass=.95", "--json"]) == 1
    said = capsys.readouterr()
    found = json.loads(said.out)
    mean, least = found["specs"][1]["mean_mass"], found["specs"][1]["min_mass"]
    sentence = f"mine keeps {mean:.1%} of the attention on average (at worst {least:.1%}, at t = "
    assert found["failed"][0].startswith(sentence) and len(found["failed"]) == 1
    assert said.err == f"error: {found['failed'][0]}\n"
    assert main(["simulate", str(mine), *PATTERN, "--fail-under", "min-mass=.5"]) == 1
    assert f"mine keeps {least:.1%} of the attention at worst" in capsys.readouterr().err


# What it writes


class Page(HTMLParser):
    """Checks that tags match, and collects what a test wants to know."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    path = tmp_path / "hostile.yaml"
    path.write_text(
        "kvpolicy: 1\nname: hostile\nsummary: '</p><script>alert(1)</script> & \"quotes\"'\npools:\n"
        "  all: {admit: all, budget: 4}\ntests:\n  - name: '</title><img src=x onerror=alert(2)>'\n"
        "    attention: {pattern: phoenix, at: 2, from: 18, prompt: 6, steps: 20, layers: 1}\n"
        "    expect: [{resident: {max: 4}}]\n"
    )
    return path


def test_the_page_is_one_file_whole_and_escaped(hostile: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.html"
    assert main(["simulate", str(hostile), "raas", "--test", "1", "--html", str(file)]) == 0
    text = file.read_text(encoding="utf-8")
    page = Page(text)
    names = [tag for tag, _ in page.tags]
    assert names.count("section") == 2 and names.count("script") == 3 and "img" not in names
    assert '</p><script>alert(1)</script> & "quotes"' in page.text
    assert "</title><img src=x onerror=alert(2)>" in page.text
    assert not [attrs for _, attrs in page.tags if attrs.keys() & {"src", "href", "onerror", "srcset"}]
    assert not re.search(r"https?:|@import|url\((?!#)", text)
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")
    assert any(attrs.get("name") == "viewport" for tag, attrs in page.tags)
    assert "prefers-color-scheme: dark" in text
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert all(used in ids for used in re.findall(r"url\(#([^)]*)\)", text))
    assert "Keeps" in page.text and "wanted at t" in page.text  # without any script


def test_the_page_tells_its_script_the_same_numbers(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.html"
    shown = facts(capsys, str(mine), *PATTERN, "--html", str(file))["specs"][0]["shown"]
    told = json.loads(
        re.findall(r'<script type="application/json">(.*?)</script>', file.read_text(encoding="utf-8"))[0]
    )
    assert told["mass"] == pytest.approx(shown["mass"], abs=1e-4)
    assert (told["t"], told["newest"], told["tokens"]) == (shown["t"], shown["newest"], 26)
    assert told["pools"] == [{name: shown["pools"][0][name] for name in ("name", "resident", "budget")}]


def test_a_png(mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "out.png"
    assert main(["simulate", str(mine), "h2o", *PATTERN, "--png", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().err == f"wrote {file}\n"


def test_a_png_needs_an_extra(mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("kvpolicy.lab.chart.find_spec", lambda name: None)
    assert main(["simulate", str(mine), *PATTERN, "--png", "out.png"]) == 5
    said = capsys.readouterr()
    assert said.err == "error: --png needs matplotlib to draw; `pip install 'kvpolicy[plot]'` brings it\n"
    assert not said.out and not Path("out.png").exists()


# Watching


def test_watching_a_file(mine: Path, tmp_path: Path) -> None:
    """Shows the policy, its mistake when there is one, the mended policy, and ends with 130 at Ctrl-C."""
    said = tmp_path / "said.txt"

    def wait_for(words: str) -> None:
        end = time.monotonic() + 60
        while words not in said.read_text():
            assert time.monotonic() < end and watcher.poll() is None, said.read_text()
            time.sleep(0.05)

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with said.open("w") as file:
        watcher = subprocess.Popen(
            [sys.executable, "-m", "kvpolicy", "simulate", str(mine), *PATTERN, "--watch"],
            stdout=file, stderr=subprocess.STDOUT, env=environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
    try:
        wait_for("Ctrl-C ends")
        assert "4 tokens at most, budget 4" in said.read_text()
        mine.write_text(WINDOW.replace("budget: room", "budget: rooom"))
        wait_for("did you mean `room`?")
        mine.write_text(WINDOW.replace("default: 4", "default: 11"))
        wait_for("11 tokens at most, budget 11")
        wait_for("Ctrl-C ends")
        watcher.send_signal(signal.SIGINT)
        assert watcher.wait(timeout=30) == 130
    finally:
        watcher.kill()
        watcher.wait()
    assert "Traceback" not in said.read_text()


def test_what_is_watched(mine: Path) -> None:
    child = mine.with_name("child.yaml")
    child.write_text("kvpolicy: 1\nextends: ./mine.yaml\nname: child\n")
    broken = mine.with_name("broken.yaml")
    broken.write_text("kvpolicy: [")
    found = list(files_of([str(child), str(broken), "scope-slide", "gone.yaml", "t.safetensors"]))
    assert [file.name for file in found[:5]] == [
        child.name,
        broken.name,
        "scope-slide.yaml",
        "gone.yaml",
        "t.safetensors",
    ]
    assert {file.name for file in found[5:]} >= {"mine.yaml", "scope-adaptive.yaml"}
    assert all(file.exists() for file in found if file.name not in ("gone.yaml", "t.safetensors"))


# The documented pictures
