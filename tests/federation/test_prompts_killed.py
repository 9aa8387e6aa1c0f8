"""kill -9 of a site: what stays at home is that of the last round that was finished, whole; nothing charged is forgotten."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.federation.prompt_site import METHOD, ask, site_and_work
from tests.federation.prompting import model_of, steps_of_their_own

from sfumato.federation import local, site_memory
from sfumato.privacy.ledger import show

ROOT = Path(__file__).parents[2]


def begun_and_killed(folder, moment):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.federation.prompt_site", str(folder), moment],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == -signal.SIGKILL, ran.stderr


@pytest.mark.parametrize(("moment", "charged"), [("training", 3), ("writing", 4)])
def test_a_site_that_is_killed_goes_on_with_its_part_of_the_round_before(moment, charged, tmp_path):
    begun_and_killed(tmp_path, moment)
    site, work = site_and_work(tmp_path)
    kept = site_memory.kept_at_home(site)["p_L"]
    assert not torch.equal(kept, model_of(METHOD).p_L) and kept.isfinite().all()  # of round 1, not as it was built
    assert show(site.ledger)["steps"] == charged  # two of round 1, and what of round 2 was begun

    again = local.answer(site, work, ask(work, 2))
    assert again.refused is not None and again.refused.code == "replayed"
    torch.testing.assert_close(site_memory.kept_at_home(site)["p_L"], kept, rtol=0, atol=0)
    assert show(site.ledger)["steps"] == charged

    begun_at = []

    def looking(model, table, plan, ledger, *, steps, first_step):
        begun_at.append(model.p_L.detach().clone())
        steps_of_their_own(model, table, plan, ledger, steps=steps, first_step=first_step)

    reply = local.answer(*site_and_work(tmp_path, looking), ask(work, 3))
    assert reply.refused is None and set(reply.tensors) == {"p_G"}
    torch.testing.assert_close(begun_at[0], kept, rtol=0, atol=0)
    assert not torch.equal(site_memory.kept_at_home(site)["p_L"], kept) and show(site.ledger)["steps"] == charged + 2
