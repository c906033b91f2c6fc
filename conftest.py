"""What all tests share: no network, and the code of the README and the documentation as tests."""

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from sybil import Sybil
from sybil.parsers.myst import PythonCodeBlockParser
from xdist.scheduler import LoadFileScheduling

# Read by huggingface_hub when it is imported: a test that reaches for the network fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"


def _enter_folder(namespace: dict[str, Any]) -> None:
    """Let a document's code write its files into a folder of its own."""
    namespace["_before"] = Path.cwd()
    namespace["_folder"] = tempfile.TemporaryDirectory()
    os.chdir(namespace["_folder"].name)


def _leave_folder(namespace: dict[str, Any]) -> None:
    os.chdir(namespace["_before"])
    namespace["_folder"].cleanup()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser()],
    patterns=["README.md", "docs/*.md", "docs/**/*.md"],
    setup=_enter_folder,
    teardown=_leave_folder,
).pytest()


class ByFileOrSubject(LoadFileScheduling):
    """Give a file to one process, which builds its models once; of the family suite a file's tests of one family."""

    def _split_scope(self, nodeid: str) -> str:
        file, _, case = nodeid.partition("[")
        file = file.split("::")[0]
        return f"{file} {case.split('-')[0]}" if "/families/" in file else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    """Replace the scheduler of `--dist=loadfile`."""
    return ByFileOrSubject(config, log) if config.getoption("dist") == "loadfile" else None
