"""Runs the command line in this process, against a workflow that only remembers what it was asked."""

import json
import sys
import types
from dataclasses import dataclass
from typing import Any

import pytest

import sfumato
from sfumato.cli.main import run


@dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out.splitlines()[-1])


@pytest.fixture
def sfu(capsys):
    """``sfu("plan", "--json")`` as a person would type it."""

    def call(*arguments: str) -> Ran:
        capsys.readouterr()
        code = run(arguments)
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return call


class FakeWorkflow(types.ModuleType):
    """``answers[name]`` is returned, or raised if it is an exception; ``asked`` holds the calls."""

    def __init__(self) -> None:
        super().__init__("sfumato.workflow")
        self.answers: dict[str, Any] = {}
        self.asked: list[tuple[str, tuple, dict]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments: Any, **named: Any) -> Any:
            self.asked.append((name, arguments, named))
            answer = self.answers[name]
            if isinstance(answer, BaseException):
                raise answer
            return answer

        return call


@pytest.fixture
def workflow(monkeypatch):
    fake = FakeWorkflow()
    monkeypatch.setitem(sys.modules, "sfumato.workflow", fake)
    monkeypatch.setattr(sfumato, "workflow", fake, raising=False)
    return fake
