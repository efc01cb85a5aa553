"""The public face as a type checker sees it, from a user's program and against the installed package.

`typing_face/correct.py` must pass without a word; in `typing_face/mistakes.py` exactly the marked lines are reported.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FACE = Path(__file__).parent / "typing_face"
ROOT = FACE.parent.parent

pytestmark = pytest.mark.timeout(300)
needs_pyright = pytest.mark.skipif(
    importlib.util.find_spec("basedpyright") is None, reason="pip install --group typing"
)

MARKED = {
    ("mistakes.py", number)
    for number, line in enumerate((FACE / "mistakes.py").read_text(encoding="utf-8").splitlines(), 1)
    if "# mistake:" in line
}


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """Give a folder with the program, from which the package's sources cannot be seen."""
    shutil.copytree(FACE, tmp_path / "program", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "program"


def check(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # a checker asks the first Python there
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env={**{name: value for name, value in os.environ.items() if name != "MYPYPATH"}, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


def test_mypy(program: Path) -> None:
    # Its cache is of this Python's version, and so apart from that of `make types`.
    options = ("--strict", "--config-file=", f"--cache-dir={ROOT / '.mypy_cache'}", "--no-error-summary")
    done = check(program, "mypy", *options, "correct.py", "mistakes.py")
    assert done.stderr == ""
    found = re.findall(r"^(\w+\.py):(\d+): error: ", done.stdout, re.MULTILINE)
    assert {(name, int(line)) for name, line in found} == MARKED, done.stdout


@pytest.mark.slow
@needs_pyright
def test_pyright(program: Path) -> None:
    (program / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}', encoding="utf-8")
    done = check(program, "basedpyright", "--outputjson")
    found = json.loads(done.stdout)["generalDiagnostics"]
    places = {(Path(each["file"]).name, each["range"]["start"]["line"] + 1) for each in found}
    assert places == MARKED, [each["message"] for each in found]


@pytest.mark.slow
@needs_pyright
def test_every_public_type_is_known(program: Path) -> None:
    done = check(program, "basedpyright", "--verifytypes", "elizasql", "--ignoreexternal", "--outputjson")
    completeness = json.loads(done.stdout)["typeCompleteness"]
    assert completeness["exportedSymbolCounts"]["withKnownType"] > 1000
    unknown = [symbol["name"] for symbol in completeness["symbols"] if not symbol["isTypeKnown"]]
    assert unknown == []
