"""What gives way: nicer than what serves, but no thread that a busy machine leaves without any CPU."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from actors.giving_way import giving_way, housekeeping_gives_way, threads, threads_give_way, tokens_come_first
from tests.niceness import of_threads

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="niceness is a thread's own on Linux")


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def of_a_thread_begun_here() -> tuple[int, int]:
    """Its niceness and its policy."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(lambda: (niceness(), os.sched_getscheduler(0))).result()


def test_work_is_nicer_than_who_waits_for_it():
    before = niceness()
    assert giving_way(niceness) == min(before + 10, 19)
    assert niceness() == before


def test_what_it_begins_gives_way_too():
    assert giving_way(of_a_thread_begun_here) == (min(niceness() + 10, 19), os.SCHED_OTHER)


def test_nobody_is_nicer_than_nineteen():
    assert giving_way(lambda: giving_way(lambda: giving_way(niceness))) == 19


def test_threads_give_way_a_little_with_all_that_they_begin_and_no_others_do():
    before = niceness()
    with ThreadPoolExecutor(1) as executor:
        others = threads()
        number = executor.submit(threading.get_native_id).result()
        assert number not in others and number in threads()
        threads_give_way([number])
        assert executor.submit(niceness).result() == min(before + 5, 19)
        assert executor.submit(of_a_thread_begun_here).result() == (min(before + 5, 19), os.SCHED_OTHER)
    assert niceness() == before


def test_who_computes_lets_tokens_pass():
    before = niceness()
    with ThreadPoolExecutor(1, initializer=tokens_come_first) as executor:
        assert executor.submit(niceness).result() == min(before + 3, 19)
        assert executor.submit(of_a_thread_begun_here).result() == (min(before + 3, 19), os.SCHED_OTHER)
    assert niceness() == before


def test_a_thread_that_has_ended_meanwhile_is_none_to_care_for():
    with ThreadPoolExecutor(1) as executor:
        number = executor.submit(threading.get_native_id).result()
    threads_give_way([number])


# Begins the processes whose words it is given, says "up" when they are, and ends with its stdin. It has two threads, as
# niceness is a thread's own.
PROCESS = """
import json, subprocess, sys, threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
children = [subprocess.Popen([sys.executable, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            for words in json.loads(sys.argv[1])]
for child in children:
    child.stdout.readline()
print("up", flush=True)
sys.stdin.read()
for child in children:
    child.communicate()
"""


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[psutil.Process]:
    """Those of a node of Ray, in the places where Ray has them, under one that has begun all."""

    def script(name: str, *children: list[str]) -> list[str]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(PROCESS)
        return [str(path), json.dumps(children)]

    agent = script("dashboard/agent.py")
    raylet = script("raylet", agent, script("runtime_env/agent.py"), script("workers/default_worker.py"))
    dashboard = script("dashboard/dashboard.py", script("head_of_something"))
    log_monitor = script("_private/log_monitor.py")
    words = [*raylet, f"--agent-command={' '.join(agent)} --node-ip-address=127.0.0.1"]
    root = script("ray", words, dashboard, log_monitor, script("autoscaler/_private/monitor.py"), script("gcs_server"))
    with subprocess.Popen([sys.executable, *root], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        yield psutil.Process(process.pid)
        process.communicate()


def test_rays_housekeeping_gives_way_and_nothing_else_of_it(processes: psutil.Process, tmp_path: Path):
    before = niceness()
    housekeeping_gives_way(processes)
    found = {
        str(Path(process.cmdline()[1]).relative_to(tmp_path)): of_threads(process)
        for process in [processes, *processes.children(recursive=True)]
    }
    served, nicer = {before}, {min(before + 10, 19)}
    assert found == {
        "ray": served,
        "gcs_server": served,
        "raylet": served,
        "workers/default_worker.py": served,
        "runtime_env/agent.py": served,
        "dashboard/agent.py": nicer,
        "dashboard/dashboard.py": nicer,
        "head_of_something": nicer,
        "_private/log_monitor.py": nicer,
        "autoscaler/_private/monitor.py": nicer,
    }
