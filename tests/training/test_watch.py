"""What is looked at while a model trains."""

import json
import math
import sys

import pytest

from sfumato.errors import MissingDependency, OutsideError
from sfumato.training import watch
from sfumato.training.watch import Board, Line, MetricsFile

LINE = {
    "step": 3, "steps": 10, "loss": 0.5, "epsilon": 1.25, "epsilon_planned": 8.0, "seconds": 2.0, "seconds_left": 125.0,
    "examples_per_second": 400.0, "learning_rate": 1e-3,
}  # fmt: skip


def test_metrics_are_one_object_a_line_and_are_added_to(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).figures(LINE)
    MetricsFile(path).figures({**LINE, "step": 4, "loss": math.nan, "epsilon": math.inf})
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first == LINE
    assert (second["step"], second["loss"], second["epsilon"]) == (4, None, None)  # JSON has neither


@pytest.mark.parametrize("half", ['{"step": 3, "lo', '{"step": 2}\n{"st', ""])
def test_a_line_that_a_kill_cut_short_does_not_spoil_the_next(tmp_path, half):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + half)
    MetricsFile(path).figures(LINE)
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps[0] == 1
    assert steps[-1] == 3


def test_metrics_that_cannot_be_written_are_an_outside_error(tmp_path):
    with pytest.raises(OutsideError, match=r"metrics = .* · could not be written") as caught:
        MetricsFile(tmp_path / "no folder" / "metrics.jsonl").figures(LINE)
    assert caught.value.exit_code == 5


def test_the_line_tells_rate_time_loss_and_epsilon():
    said = []
    Line(said.append).figures(LINE)
    assert said == ["step 3/10 · 400 units/s · 2:05 left · loss 0.5000 · epsilon 1.25 of 8.00"]
    Line(said.append).figures({**LINE, "epsilon": None, "epsilon_planned": None})
    assert said[-1].endswith("not private")


def test_the_line_comes_now_and_then_and_at_the_end(monkeypatch):
    said, now = [], [0.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    line = Line(said.append, every_seconds=5.0)
    for second in range(12):
        now[0] = float(second)
        line.figures({**LINE, "step": second, "steps": 11})
    assert [text.split()[1] for text in said] == ["0/11", "5/11", "10/11", "11/11"]


def test_the_board_is_asked_for_by_name_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        MissingDependency, match=r"training.tensorboard = true · tensorboard is not installed"
    ) as caught:
        Board(tmp_path)
    assert "sfumato[track]" in caught.value.next


def test_the_board_gets_the_figures(tmp_path, monkeypatch):
    import types

    written = []

    class SummaryWriter:
        def __init__(self, folder):
            written.append(folder)

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def flush(self):
            written.append("flush")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    Board(tmp_path).figures({**LINE, "loss": math.nan})
    assert written == [
        str(tmp_path), ("epsilon", 1.25, 3), ("examples_per_second", 400.0, 3), ("learning_rate", 1e-3, 3), "flush",
    ]  # fmt: skip
