"""The demo does its job, twice."""

from __future__ import annotations

from pathlib import Path

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
