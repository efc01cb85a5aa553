"""The plugin for users' tests, as a user's test run sees it."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.timeout(180)

CONFTEST = 'pytest_plugins = ["elizasql.pytest_plugin"]\n'
# What a project of its own has not: our settings, and the plugins that would alter the order.
QUIET = ("-p", "no:randomly", "-p", "no:benchmark", "-p", "no:cacheprovider", "-q")


def run(pytester: pytest.Pytester, *options: str) -> pytest.RunResult:
    """Run the tests in a process of its own, as a user does, with the plugin once, however it is found."""
    found = any(point.name == "elizasql" for point in importlib.metadata.entry_points(group="pytest11"))
    if not found:
        pytester.makeconftest(CONFTEST)
    return pytester.runpytest_subprocess(*QUIET, *options)


def test_every_test_has_an_empty_database(pytester: pytest.Pytester) -> None:
    pytester.makeini(
        "[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\nfilterwarnings = error\n"
    )
    pytester.makepyfile(
        """
        from uuid import uuid4
        import numpy as np
        import pytest
        import elizasql

        seen = []

        @pytest.mark.parametrize("number", range(3))
        async def test_clean(elizasql_db, number):
            assert await elizasql_db.count_agents() == 1
            assert await elizasql_db.get_message_servers() == []
            assert elizasql_db.agent_id not in seen
            seen.append(elizasql_db.agent_id)
            await elizasql_db.create_memory({"content": {"text": "x"}}, table_name="messages")
            await elizasql_db.create_message_server({"name": "s", "sourceType": "x"})
            await elizasql_db.set_cache("key", number)
            await elizasql_db.create_agents([{"id": uuid4(), "name": "another"}])

        @pytest.mark.elizasql(dimension=768, ef_search=50)
        async def test_options(elizasql_db):
            assert await elizasql_db.get_embedding_dimension() == 768
            assert elizasql_db.config.ef_search == 50

        async def test_the_address_is_for_what_is_tested(elizasql_db, elizasql_server):
            async with elizasql.connect(agent_id=elizasql_db.agent_id, dsn=elizasql_server.dsn) as other:
                await other.set_cache("key", 1)
            assert await elizasql_db.get_cache("key") == 1

        @pytest.mark.elizasql(dimension=384)
        def test_blocking(elizasql_sync_db):
            assert elizasql_sync_db.count_agents() == 1
            elizasql_sync_db.create_memory({"content": {}, "embedding": np.ones(384)}, table_name="facts")
            assert elizasql_sync_db.count_memories(table_name="facts") == 1

        def test_blocking_again(elizasql_sync_db):
            assert elizasql_sync_db.count_memories(table_name="facts") == 0

        async def test_both(elizasql_db, elizasql_sync_db):
            await elizasql_db.set_cache("key", 1)
            assert elizasql_sync_db.count_agents() == 2

        def test_both_the_other_way_round(elizasql_sync_db, elizasql_db):
            assert elizasql_sync_db.count_agents() == 2
        """
    )
    result = run(pytester)
    result.assert_outcomes(passed=9)


@pytest.mark.slow
def test_options_for_all_come_from_the_conftest(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n")
    pytester.makepyfile(
        """
        from uuid import UUID
        import pytest

        AGENT = UUID(int=7)

        @pytest.fixture
        def elizasql_options():
            return {"agent_id": AGENT, "batch_size": 7}

        async def test_one(elizasql_db):
            assert elizasql_db.agent_id == AGENT and elizasql_db.config.batch_size == 7

        @pytest.mark.elizasql(batch_size=8)
        async def test_other(elizasql_db):
            assert elizasql_db.agent_id == AGENT and elizasql_db.config.batch_size == 8
        """
    )
    run(pytester).assert_outcomes(passed=2)


def test_the_server_and_its_folder_go_with_the_run(pytester: pytest.Pytester) -> None:
    place = pytester.mkdir("temporary")
    pytester.makepyfile(
        """
        def test_it(elizasql_server):
            assert elizasql_server.data_dir.is_dir()
            assert elizasql_server.dsn.startswith("postgresql://")
        """
    )
    pytester._monkeypatch.setenv("TMPDIR", str(place))
    run(pytester).assert_outcomes(passed=1)
    assert [path.name for path in place.iterdir() if path.name.startswith("esql-")] == []


def test_ctrl_c_while_the_server_starts_takes_it_back(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import os, signal
        from pathlib import Path
        from elizasql import _embedded

        signal.signal(signal.SIGINT, signal.default_int_handler)
        start = _embedded._Cluster._start

        def start_and_interrupt(self, server_lock):
            start(self, server_lock)
            Path("server").write_text(f"{self.process.pid} {self.home.parent}")
            os.kill(os.getpid(), signal.SIGINT)

        _embedded._Cluster._start = start_and_interrupt

        def test_anything(elizasql_server):
            pass
        """
    )
    result = run(pytester)
    pid, folder = Path(pytester.path, "server").read_text().split()
    assert result.ret == pytest.ExitCode.INTERRUPTED
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
    assert not Path(folder).exists()
    assert "ignored" not in result.stderr.str()


@pytest.mark.slow
def test_settings_of_the_project_are_for_its_own_server(pytester: pytest.Pytester) -> None:
    pytester.makefile(".env", **{"": "ELIZASQL_MIGRATE=false\nPOSTGRES_URL=postgresql://nowhere/x\n"})
    pytester.makepyfile("def test_it(elizasql_sync_db):\n    assert elizasql_sync_db.count_agents() == 1\n")
    run(pytester).assert_outcomes(passed=1)


def test_nothing_is_started_where_no_fixture_is_asked_for(pytester: pytest.Pytester) -> None:
    place = pytester.mkdir("temporary")
    pytester.makepyfile(
        """
        import os, threading

        def test_it():
            assert threading.active_count() == 1
            assert not [name for name in os.listdir(os.environ["TMPDIR"]) if name.startswith("esql-")]
        """
    )
    pytester._monkeypatch.setenv("TMPDIR", str(place))
    run(pytester).assert_outcomes(passed=1)


def test_the_marker_is_known(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("import pytest\n@pytest.mark.elizasql(dimension=384)\ndef test_it(): pass\n")
    result = run(pytester, "--strict-markers", "--markers")
    result.stdout.fnmatch_lines(["*elizasql(**options)*"])


def test_a_setting_without_its_name_is_refused(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.fixture(scope="session")
        def elizasql_server():
            "Nothing has to be started for this."

        @pytest.mark.elizasql(384)
        def test_it(elizasql_sync_db):
            pass
        """
    )
    result = run(pytester)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*takes settings by name, as dimension=384, not (384,)*"])
