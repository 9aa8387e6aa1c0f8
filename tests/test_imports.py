"""What is imported when: help at once, planning and verifying without torch, imports one way."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = (
    "torch",
    "transformers",
    "diffusers",
    "scipy.stats",
    "dp_accounting",
    "pyarrow",
    "matplotlib",
    "pydantic",
    "numpy",
)


def _python(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    return done.stdout


def test_the_package_and_its_command_line_import_nothing_heavy():
    found = _python(f"import sys, sfumato, sfumato.cli.main; print([m for m in {HEAVY} if m in sys.modules])")
    assert found.strip() == "[]"


@pytest.mark.parametrize(
    "module",
    [
        "sfumato.recipe",
        "sfumato.reports",
        "sfumato.privacy.plan",
        "sfumato.privacy.accounting",
        "sfumato.privacy.ledger",
        "sfumato.privacy.guarantee",
        "sfumato.release.verify",
        "sfumato.release.keys",
    ],
)
def test_planning_and_verifying_need_no_torch(module):
    assert _python(f"import sys, {module}; print('torch' in sys.modules)").strip() == "False"


def test_planning_for_real_needs_no_torch():
    program = """
import sys
from sfumato.cli.main import run
code = run(["plan", "--population", "10000", "--expected-batch-size", "500", "--steps", "100", "--epsilon", "8", "--json"])
print(code, "torch" in sys.modules)
"""
    assert _python(program).splitlines()[-1] == "0 False"


def test_verifying_for_real_needs_no_torch(tmp_path):
    program = f"""
import sys
from sfumato.cli.main import run
print(run(["verify", {str(tmp_path)!r}, "--json"]), "torch" in sys.modules)
"""
    assert _python(program).splitlines()[-1] == "4 False"


def test_help_costs_at_most_half_a_second_of_processor_time():
    """Processor time, not waiting: half a second is ten times what it takes, so a loaded machine does not fail this."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    out = _python("from sfumato.cli.main import run; run(['--help'])")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "Commands:" in out
    assert (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime) <= 0.5


def test_every_public_name_is_there():
    import sfumato

    for name in sfumato.__all__:
        assert getattr(sfumato, name) is not None
    assert "Ledger" in dir(sfumato)
    with pytest.raises(AttributeError, match="nothing_of_ours"):
        sfumato.nothing_of_ours  # noqa: B018


def test_imports_run_one_way():
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache"],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
