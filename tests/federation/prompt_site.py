"""A site that learns a prompt, in a process of its own, which is killed at a moment of its second round.

    python -m tests.federation.prompt_site FOLDER MOMENT

It answers round 1 and writes what it sent; in round 2 it is gone by SIGKILL: in the first step (after it was charged), or when what
stays at home is about to be renamed into its place.
"""

import os
import signal
import sys
from pathlib import Path

from tests.federation.conftest import work_for
from tests.federation.prompting import building, model_of, sites_of, steps_of_their_own

from sfumato.federation import keeping, local
from sfumato.federation.messages import Ask
from sfumato.federation.prompts.settings import DpFpl
from sfumato.federation.sites import Site, Work

METHOD = DpFpl(rank=2)


def site_and_work(folder: Path, train_steps=steps_of_their_own) -> tuple[Site, Work]:
    sites = sites_of(METHOD, ["a"], folder, noise=1.0, clip=0.5, steps=10)
    return sites[0], work_for(sites, building(METHOD), train_steps, home=("p_L",), rounds=5)


def ask(work: Work, number: int) -> Ask:
    values = {"recipe": work.recipe, "told": {}, "collecting": {}}
    shared = {"p_G": model_of(METHOD).p_G.detach()}
    return Ask(run="r", round=number, exchange=0, kind="train", tensors=shared, values=values)


def killed(*arguments: object, **named: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(folder: str, moment: str) -> None:
    site, work = site_and_work(Path(folder))
    reply = local.answer(site, work, ask(work, 1))
    assert reply.refused is None, reply.refused
    if moment == "training":

        def one_step(model, table, plan, ledger, *, steps, first_step):
            steps_of_their_own(model, table, plan, ledger, steps=1, first_step=first_step)
            killed()

        site, work = site_and_work(Path(folder), one_step)
    else:
        real, seen = os.replace, []

        def replace(source, target):
            seen.append(target)
            if len(seen) == 2:  # first: that the ask is answered; then: what stays at home
                killed()
            real(source, target)

        keeping.os.replace = replace
    local.answer(site, work, ask(work, 2))


if __name__ == "__main__":
    main(*sys.argv[1:])
