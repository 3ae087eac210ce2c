"""A pytest plugin that notes every outcome as it comes, so that a run cut short still tells what it saw.

One JSON line an event, appended to the file named by FASTATTN_TEST_RECORD. While collecting, the events are the
tests found and the files that could not be read.
"""

from __future__ import annotations

import json
import os

import pytest

from benchmarks.gpu import compilations

_path = os.environ.get("FASTATTN_TEST_RECORD")
LOST_DEVICE = 86  # the exit code of a process whose GPU no longer answers


def _note(**event: str | float) -> None:
    if _path:
        with open(_path, "a") as file:
            file.write(json.dumps(event) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    compilations.listen()


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.outcome == "failed":
        _note(test=report.nodeid, outcome="unreadable", text=report.longreprtext)
    elif report.outcome == "skipped":
        _note(test=report.nodeid, outcome="skipped", seconds=0.0, text=_text(report))


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly:
        for item in session.items:
            _note(test=item.nodeid, outcome="found")


def pytest_runtest_logstart(nodeid: str) -> None:
    _note(test=nodeid, outcome="started")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        _note(test=report.nodeid, outcome=report.outcome, seconds=report.duration, text=_text(report))


def _text(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The failure, with the inputs hypothesis found and what the test printed; the reason of a skip."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    sections = [content for name, content in report.sections if "log" not in name]
    return "\n".join([report.longreprtext, *sections])


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """After an illegal address no test can pass in this process: end it; the tests after it run in a new one."""
    outcome = yield
    report = outcome.get_result()
    if _path and report.outcome == "failed" and _device_is_lost():
        _note(test=report.nodeid, outcome="failed", seconds=report.duration, text=_text(report))
        os._exit(LOST_DEVICE)


def _device_is_lost() -> bool:
    import torch

    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
