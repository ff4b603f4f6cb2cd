"""Places that can't be written, and files that can't be read: said first, in one line."""

import json
import os

import pytest

from bench import __main__ as cli
from bench import report

WITHOUT_JSON = ("averages", "scale", "verdict")
WITH_JSON = [c for c in (*cli.COMMANDS, *cli.GPU_COMMANDS) if c not in WITHOUT_JSON]
WITH_PLOT = ["averages", "ops", "posthoc", "train", "verdict"]


@pytest.fixture(autouse=True)
def nothing_is_measured(monkeypatch):
    def measuring(device):
        raise AssertionError("measured")

    monkeypatch.setattr(report, "measuring", measuring)


def refused(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(word) for word in argv])
    assert stopped.value.code == 2
    told = capsys.readouterr().err.splitlines()
    assert "usage" in told[0]
    (line,) = [line for line in told if "error:" in line]
    assert line == told[-1]
    return line


def places(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "file" / "below")
    return {
        "": "Is a directory",
        tmp_path / "folder": "Is a directory",
        tmp_path / "file" / "below": "Not a directory",
        tmp_path / "link": "Not a directory",
        tmp_path / "new" / ("x" * 300): "File name too long",
        "/proc/new.json": "No such file or directory",
    }


@pytest.mark.parametrize("command", WITH_JSON)
def test_json_that_can_t_be_written(command, tmp_path, capsys):
    for place, why in places(tmp_path).items():
        line = refused([command, "--json", place], capsys)
        assert f"argument --json: '{place or '.'}' can't be written ({why})" in line
    assert (tmp_path / "file").read_text() == "kept"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "link"]


@pytest.mark.parametrize("command", WITH_PLOT)
def test_a_plot_that_can_t_be_written(command, tmp_path, capsys):
    files = [tmp_path / "file.json"] if command == "verdict" else []
    (tmp_path / "folder.svg").mkdir()
    (tmp_path / "file").write_text("kept")
    for place, why in {
        tmp_path / "folder": f"'{tmp_path / 'folder.svg'}' can't be written (Is a directory)",
        tmp_path / "file" / "x": "can't be written (Not a directory)",
        ".": "'.' is a folder; name the files in it",
        "": "'' is a folder; name the files in it",
    }.items():
        line = refused([command, *files, "--plot", place], capsys)
        assert "argument --plot: " in line
        assert why in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.svg"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert "(Permission denied)" in refused(["ops", "--json", tmp_path / "b.json"], capsys)


def test_what_is_there_stays_until_the_end(tmp_path):
    path = tmp_path / "b.json"
    path.write_text("kept")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # Nobody reads it: to open it would wait.
    for place in (path, pipe, "/dev/null", tmp_path / "a" / "b" / "new.json"):
        with pytest.raises(AssertionError, match="measured"):
            cli.main(["ops", "--cases", "small", "--json", str(place)])
    assert path.read_text() == "kept"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.json", "pipe"]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("gone.json", None, "can't be read (No such file or directory)"),
        ("folder", ..., "can't be read (Is a directory)"),
        ("empty.json", b"", "is empty; pass what a run wrote with --json"),
        ("empty.jsonl", b"", "isn't of python -m bench"),
        ("blank.json", b" \n", "is empty"),
        ("cut.json", b'{"environment": {', "is no JSON (Expecting property name"),
        ("binary.json", b"\xff\xfe", "is no JSON ('utf-8' codec can't decode"),
        ("list.json", b"[]", "isn't of python -m bench; pass what a run wrote with --json"),
        ("other.json", b'{"records": []}', "isn't of python -m bench"),
        ("anon.json", b'{"environment": {}, "records": []}', "isn't of python -m bench"),
        ("cut.jsonl", b'{"variant": "a"}\n{"vari', "is no JSON (Unterminated string"),
        ("other.jsonl", b"1\n", "isn't of python -m bench"),
    ],
)
def test_verdict_of_what_can_t_be_read(name, content, what, tmp_path, capsys):
    path, good = tmp_path / name, tmp_path / "good.json"
    good.write_text(json.dumps({"environment": {"device": "cpu"}, "records": []}))
    if content is ...:
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    assert f"error: '{path}' {what}" in refused(["verdict", good, path], capsys)


def test_verdict_of_builds_that_don_t_belong_together(tmp_path, capsys):
    chosen, run = tmp_path / "chosen.json", tmp_path / "run.jsonl"
    row = {"case": "small", "op": "swap", "pair": "float32/float32", "build": "new"}
    chosen.write_text(json.dumps({"chosen": [row]}))
    run.write_text(json.dumps({"variant": "other", "gb_per_s": 1.0, **row}))
    assert "builds in turn need both" in refused(["verdict", chosen], capsys)
    assert "builds in turn need both" in refused(["verdict", run], capsys)
    assert "no run of 'new' and 'before' on small swap" in refused(["verdict", chosen, run], capsys)
