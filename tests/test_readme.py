"""The README's example runs as it stands, and the demo does its job twice."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def run(arguments: list[str], folder: Path, data: Path) -> subprocess.CompletedProcess[str]:
    hidden = {"POSTGRES_URL", "PGLITE_DATA_DIR"}
    environ = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**environ, "PGLITE_DATA_DIR": str(data)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def test_the_example_runs_on_the_embedded_server(tmp_path: Path, server_dir: Path) -> None:
    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    (tmp_path / "example.py").write_text(code[1], encoding="utf-8")
    done = run(["example.py"], tmp_path, server_dir.parent / "readme")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1.000  My brother is allergic to nuts.\n"


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
