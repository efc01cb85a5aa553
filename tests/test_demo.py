"""The demo does its job, twice."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from elizasql.__main__ import main

from .test_documentation import run


def test_the_demo_finds_its_memories_again(tmp_path: Path, server_dir: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("Ann: The key is under the blue flower pot.\nBob: I sail on Sundays.\n", encoding="utf-8")
    data = server_dir.parent / "demo"
    first = run(["-m", "elizasql", "demo"], tmp_path, data)
    assert first.returncode == 0, first.stderr
    assert "10 of 10 questions" in first.stdout
    assert "stored    207 memories" in first.stdout
    second = run(["-m", "elizasql", "demo"], tmp_path, data)
    assert second.returncode == 0, second.stderr
    assert "207 memories from the last run are still here; nothing to store" in second.stdout
    own = run(["-m", "elizasql", "demo", "--file", str(notes)], tmp_path, data)
    assert own.returncode == 0, own.stderr
    assert "stored    2 memories of notes.txt" in own.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="file systems elsewhere take UTF-8 only")
def test_a_file_whose_name_is_not_utf_8(tmp_path: Path, server_dir: Path) -> None:
    notes = tmp_path / os.fsdecode(b"notes-\xfc.txt")
    notes.write_text("Ann: The key is under the blue flower pot.\n", encoding="utf-8")
    for found in ("", "1 memories from the last run are still here"):
        said = run(["-m", "elizasql", "demo", "--file", str(notes)], tmp_path, server_dir.parent / "demo")
        assert said.returncode == 0, said.stderr
        assert found in said.stdout


@pytest.mark.parametrize(
    ("command", "code", "pattern"),
    [
        ('"$@" >&-', 0, ""),
        ('"$@" 2>&1 >/dev/full', 1, "elizasql demo: No space left on device\n"),
        # The reader takes one line; the demo has written it before it goes on.
        ('{ "$@"; echo $? >&2; } | read line', 0, "0\n"),
    ],
)
def test_output_that_nobody_takes(tmp_path: Path, server_dir: Path, command: str, code: int, pattern: str) -> None:
    if "/dev/full" in command and not Path("/dev/full").exists():
        pytest.skip("no device that is full")
    program = [sys.executable, "-u", "-m", "elizasql.demo", "--data-dir", str(server_dir.parent / "demo")]
    said = subprocess.run(
        ["sh", "-c", command, "sh", *program], cwd=tmp_path, capture_output=True, text=True, timeout=110
    )
    assert (said.returncode, said.stdout + said.stderr) == (code, pattern)


@pytest.mark.parametrize(
    ("dsn", "code", "pattern"),
    [("postgres://127.0.0.1:1/x", 3, "no connection to"), ("postgres://h/x?sslmode=often", 1, "sslmode")],
)
def test_what_is_wrong_with_the_server_decides_the_exit_code(
    capsys: pytest.CaptureFixture[str], dsn: str, code: int, pattern: str
) -> None:
    assert main(["demo", "--dsn", dsn]) == code
    assert re.match(f"elizasql demo: .*{pattern}.*\n$", capsys.readouterr().err)


@pytest.mark.parametrize(("command", "name"), [("demo", "elizasql demo"), ("doctor", "elizasql")])
def test_ctrl_c_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, name: str
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # to be restored
    monkeypatch.setattr(asyncio, "run", interrupted)  # with a coroutine that was never awaited
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert main([command, "--data-dir", str(tmp_path)]) == 130
    assert capsys.readouterr().err == f"{name}: interrupted\n"
    assert said == []


def test_ctrl_c_is_one_line(tmp_path: Path, server_dir: Path) -> None:
    program = [sys.executable, "-m", "elizasql", "demo", "--data-dir", str(server_dir.parent / "demo-interrupted")]
    environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        program, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as demo:
        assert demo.stdout is not None
        assert demo.stdout.readline().startswith("embedder")
        demo.send_signal(signal.SIGINT)
        assert demo.communicate(timeout=60)[1] == "elizasql demo: interrupted\n"
    assert demo.returncode == 130
