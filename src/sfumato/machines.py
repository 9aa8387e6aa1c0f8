"""A federation over several machines: what the server's administrator starts, and what a site's does.

They exchange two files by hand, once: the site's public key goes to the server, the server's authority (a certificate) and
address to the site. From then on sites ask the server, never the other way.

    join    the server shows the resolved recipe; the site's policy agrees by its sha256 and the site says how many units it
            has, a number that is hereby public, or refuses
    begin   the server says how many all have, and the run's name; the site makes its plan from its own number
    train   ... and what else a way of collecting needs: `federation.local.answer`   [shell: processes, files]
"""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato import deploying, federating, prompting, site_ledgers, stages
from sfumato import recipe as recipes_file
from sfumato.data.settings import OWN
from sfumato.errors import PrivacyRefused, UsageError
from sfumato.federation import credentials
from sfumato.federation import policy as policies
from sfumato.federation.policy import PolicyRefused, SitePolicy, check_asked
from sfumato.federation.processes import Status, ended, status
from sfumato.recipe import Recipe
from sfumato.stages import Progress
from sfumato.training.folder import RunFolder

if TYPE_CHECKING:
    from sfumato.federation.deployment import Server
    from sfumato.federation.messages import Ask, Reply
    from sfumato.federation.serving import Exchange
    from sfumato.federation.sites import Site, Work

JOIN, BEGIN = "join", "begin"
IDENTITY = "identity"  # in a site's folder: its key in secure aggregation
KNOWN = "identities.json"  # in a site's folder: the keys of the others in secure aggregation, as they were seen first
JOINED = "joined.json"  # in a site's folder: what it agreed to, so that it goes on after a restart
_RUN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*/v[0-9]+")


# -- the server ------------------------------------------------------------------------------------------------------------


def serve(
    recipe: Recipe,
    *,
    sites: Mapping[str, Path],
    folder: Path,
    hosts: Sequence[str],
    bind: str,
    port: int,
    out: Path,
    progress: Progress,
    data: Path | None = None,
    resume: RunFolder | None = None,
    patience: float = 86_400.0,
    wait: float = deploying.WAIT,
    absence: float = deploying.ABSENCE,
) -> dict[str, Any]:
    """Waits for the sites, leads the rounds, writes the run. Ctrl-C ends it after the round; ``resume`` goes on.

    Args:
      sites: {name: file of its public key}; their order is that of their names.
      folder: certificates, secrets, the SuperLink's database and logs; the same for all runs, since sites trust its authority.
      data: public records of this machine, for pictures and quality; by default what the recipe's data say.
      patience: seconds that all sites have to join.
    Raises: UsageError; PrivacyRefused where a site says no to joining: nothing was trained.
    """
    from sfumato.federation.deployment import Server

    deploying.require_flower()
    prompting.refuse_elsewhere(recipe)
    if not sites:
        raise UsageError("sites = none · at least one", next="Give --site NAME=FILE.pub for each.")
    keys = {name: credentials.public_key(path) for name, path in sorted(sites.items())}
    if len(set(keys.values())) != len(keys):
        raise UsageError("sites · two of them have one key", next="Ask each for its own.")
    prepared = stages.load(recipe if data is None else _with_data(recipe, data))
    server = Server(folder / "link", folder / "keys", hosts=hosts, bind=bind, port=port)
    text = recipes_file.to_yaml(recipe)
    (folder / "resolved.yaml").write_text(text, encoding="utf-8")
    told = Status(folder, what="server", address=f"{hosts[0]}:{server.port}", sites=list(keys), waiting_for=list(keys))
    try:
        with ended([server.child]):
            server.start(keys)
            progress(f"listening on {bind}:{server.port}; authority: {server.authority}")
            progress(
                f"recipe for the sites: {folder / 'resolved.yaml'}, sha256 {hashlib.sha256(text.encode()).hexdigest()}"
            )
            populations = _joined(server, recipe, text, list(keys), told, patience)
            if recipe.federation.populations:
                populations = dict(zip(populations, recipe.federation.populations, strict=True))
            progress("joined: " + ", ".join(f"{name} ({number})" for name, number in populations.items()))
            members = _members_elsewhere(recipe, populations)
            result = federating.run(
                recipe,
                out=out,
                progress=progress,
                resume=resume,
                engine=partial(_engine, server, populations, told, wait=wait, absence=absence),
                members=members,
                prepared=prepared,
            )
            server.link.close()
            return result
    finally:
        told.say(ended=time.time())
        told.close()


def _joined(
    server: "Server", recipe: Recipe, text: str, names: Sequence[str], told: Status, patience: float
) -> dict[str, int]:
    """Units by site."""
    from sfumato.federation.messages import Ask

    asked = {
        name: Ask(run=recipe.name, round=1, exchange=0, kind=JOIN, values={"recipe": text, "site": name})
        for name in names
    }
    replies = server.exchange(asked, wait=patience, meanwhile=lambda: told.say(online=sorted(server.link.online())))
    reasons = [
        {"code": no.code, "message": f"site {name}: {no.message}", "next": ""}
        for name in names
        if (no := replies[name].refused if name in replies else _silent()) is not None
    ]
    if reasons:
        raise PrivacyRefused(
            "; ".join(reason["message"] for reason in reasons),
            next="Settle it with the sites, or leave them out of --site; nothing was trained.",
            code="site_did_not_join",
            refusals=reasons,
        )
    populations = {name: replies[name].values.get("population") for name in names}
    for name, number in populations.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise UsageError(
                f"site {name}: population = {str(number)[:40]} · must be a number of units", next="Ask the site."
            )
    told.say(waiting_for=[], populations=populations)
    return {name: number for name, number in populations.items() if isinstance(number, int)}


def _silent() -> Any:
    from sfumato.federation.messages import Refusal

    return Refusal(round=1, code="silent", message="did not join in time")


def _members_elsewhere(recipe: Recipe, populations: Mapping[str, int]) -> "list[Site]":
    return [
        federating.member(
            recipe,
            name,
            plan,
            table=_not_here,
            ledger=Path("sites") / f"site-{number}" / "ledger.db",
            elsewhere=True,
        )
        for number, (name, plan) in enumerate(federating.plans_for(recipe, populations).items(), start=1)
    ]


def _not_here(*arguments: Any) -> Any:
    raise AssertionError("the records and the keys of a site are at the site")


@contextmanager
def _engine(
    server: "Server",
    populations: Mapping[str, int],
    told: Status,
    members: "Sequence[Site]",
    work: "Work",
    folder: RunFolder,
    *,
    wait: float,
    absence: float,
) -> "Iterator[Exchange]":
    from sfumato.federation.messages import Ask

    values: Any = {"populations": dict(populations)}
    begin = Ask(run=folder.name, round=1, exchange=0, kind=BEGIN, values=values)
    server.exchange(
        dict.fromkeys(populations, begin), wait=wait, absence=absence
    )  # who says no here, refuses the rounds too
    told.say(run=folder.name)
    yield deploying.watched(server.exchange, told, [], wait=wait, absence=absence)
    told.say(bytes_up=server.link.traffic.up, bytes_down=server.link.traffic.down)


# -- a site ----------------------------------------------------------------------------------------------------------------


def make_key(folder: Path) -> dict[str, Any]:
    """The site's key, and what its administrator sends to the server's."""
    credentials.private_folder(folder)
    credentials.for_site(folder / deploying.KEY)
    public = folder / f"{deploying.KEY}.pub"
    return {
        "key": str(folder / deploying.KEY),
        "public_key": str(public),
        "line": public.read_text().strip(),
        "identity": federating.identity(folder / IDENTITY).public.hex(),
    }


def take_part(
    *,
    policy: Path,
    data: Path | None,
    server: str,
    authority: Path,
    folder: Path,
    progress: Progress,
    population: int | None = None,
    share: tuple[int, int] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Answers one server until ``stopped`` or interrupted.

    Args:
      policy: is read again for every message, so a change counts from the next one on.
      data: the folder or file of this site's records, in the place of what the recipe names.
      population: N of this site, declared public; by default the units are counted, and the count is hereby public.
      share: (k, n): only the k-th of n shares of the records (from 1), to try a federation out with one set.
    """
    from sfumato.federation.deployment import Node

    deploying.require_flower()
    policies.load(policy)
    if not re.fullmatch(r"[\w.-]+:\d+|\[[0-9a-fA-F:]+\]:\d+", server):
        raise UsageError(f"server = {server!r} · must be HOST:PORT", next="Such as fed.example.org:9443.")
    if not authority.is_file():
        raise UsageError(
            f"authority = {authority} · is no file", next="Ask the server's administrator for authority.pem."
        )
    if data is not None and not Path(data).exists():
        raise UsageError(f"data = {data} · is not there", next="Give the folder of this site's records.")
    os.umask(0o077)
    make_key(folder)
    told = Status(folder, what="site", server=server)
    member = Member(folder, policy=policy, data=data, population=population, share=share, told=told)
    node = Node(folder, server=server, authority=authority, key=folder / deploying.KEY)
    progress(f"asking {server}; Ctrl-C ends it, nothing is lost")
    try:
        with suppress(KeyboardInterrupt), ended([node.child]):
            node.serve(member.answer, site=member.name, stopped=stopped)
    finally:
        told.close()


class Member:
    """A site's side of all messages: `JOIN` and `BEGIN` here, the others by `federation.local.answer`."""

    def __init__(
        self,
        folder: Path,
        *,
        policy: Path,
        data: Path | None,
        population: int | None,
        share: tuple[int, int] | None,
        told: Status,
    ) -> None:
        self._folder, self._policy_file, self._data = folder, policy, data
        self._population, self._share, self._told = population, share, told
        self._home = RunFolder(folder)
        self._joined: dict[str, Any] = self._home.read_json(JOINED) if (folder / JOINED).is_file() else {}
        self._at_work: tuple[str, Site, Work] | None = None  # run, and what is needed for it
        self._read: tuple[Recipe, Sequence[Any], Path] | None = None

    @property
    def name(self) -> str:
        return str(self._joined.get("site", "site"))

    def answer(self, ask: "Ask") -> "Reply":
        from sfumato.federation import local
        from sfumato.federation.deployment import remembering
        from sfumato.federation.messages import Part, Reply

        try:
            if ask.kind == JOIN:
                return Reply.to(ask, str(ask.values.get("site")), Part(values=self._join(ask)))
            if ask.kind == BEGIN:
                self._begin(ask)
                return Reply.to(ask, self.name, Part())
            if ask.kind == site_ledgers.KIND:
                return Reply.to(ask, self.name, Part(values=self._ledger(ask.run)))
            site, work = self._work(ask.run)
        except PolicyRefused as no:
            self._told.say(refused=f"{no.message} · {no.next}")  # what to do is for this site's administrator
            return Reply.no(ask, self.name, no.code, no.message)
        site = replace(site, policy=policies.load(self._policy_file))
        reply = remembering(lambda asked: local.answer(site, work, asked), site.folder / deploying.LAST_REPLY)(ask)
        refused = None if reply.refused is None else reply.refused.message
        self._told.say(run=ask.run, round=ask.round, exchange=ask.exchange, refused=refused)
        return reply

    def _join(self, ask: "Ask") -> dict[str, Any]:
        """What the server needs of this site. Agrees to a recipe, or raises PolicyRefused; only then the records are counted."""
        text, name = ask.values.get("recipe"), ask.values.get("site")
        if not isinstance(text, str) or not isinstance(name, str):
            raise PolicyRefused("join · without a recipe or a name", next="Use the same version.", code="message")
        recipe, policy = _parsed(text), policies.load(self._policy_file)
        prompting.refuse_elsewhere(recipe)
        named = sorted(_files_named(recipe))
        if named and policy.allowed_recipes is None:
            raise PolicyRefused(
                f"recipe · names files of this machine ({', '.join(named)}), and this site's policy allows any recipe",
                next="Let the site read the recipe, and name its sum in allowed_recipes.",
                code="recipe_names_files",
            )
        check_asked(
            policy,
            recipe=_sum(text),
            mechanism=recipe.federation.mechanism.kind,
            population=self._population or policy.min_units,
            rounds=0,
        )
        known = self._known_identities(recipe, name, policy)
        number = self._population or len({record.unit for record in self._records(recipe)[0]})
        if number < policy.min_units:
            raise PolicyRefused(
                f"population · is below the {policy.min_units} units that this site asks for",
                next="Leave this site out.",
                code="too_few_units",
            )
        if known is not None:
            self._home.write_json(KNOWN, known)
        self._joined = {"site": name, "recipe": text, "run": None, "population": number}
        self._home.write_json(JOINED, self._joined)
        self._told.say(name=name, joined=recipe.name)
        return {"population": number}

    def _known_identities(self, recipe: Recipe, name: str, policy: SitePolicy) -> dict[str, str] | None:
        """The others' keys to remember; None where the policy lists them, or nothing is aggregated securely.

        Raises PolicyRefused unless the recipe names this site's own key and, of the others, those of the policy, or else those
        that it named first (trust on first use: a server that was hostile from the start made them up itself)."""
        if recipe.federation.mechanism.kind != "distributed":
            return None
        claimed = dict(recipe.federation.identities)
        if claimed.pop(name, None) != federating.identity(self._folder / IDENTITY).public.hex():
            raise PolicyRefused(
                f"federation.identities.{name} · is not this site's", next="Give each site's own to the recipe.",
                code="other_identity",
            )  # fmt: skip
        file = self._folder / KNOWN
        listed = policy.identities
        known = dict(listed) if listed is not None else self._home.read_json(KNOWN) if file.is_file() else {}
        changed = sorted(
            site for site in claimed if known.get(site, claimed[site] if listed is None else None) != claimed[site]
        )
        if changed:
            where = f"its line in {file}" if listed is None else "identities in the policy"
            raise PolicyRefused(
                f"federation.identities.{changed[0]} · is another than "
                f"{'the one that was seen first' if listed is None else 'in the policy'} of site {name}",
                next=f"Ask {changed[0]} itself, not the server, whether it has a new key; if it has, change {where}.",
                code="changed_identity",
            )
        return {**known, **claimed} if listed is None else None

    def _begin(self, ask: "Ask") -> None:
        populations = ask.values.get("populations")
        right = isinstance(populations, dict) and all(type(n) is int and n > 0 for n in populations.values())
        if not right or not self._joined or not _RUN.fullmatch(ask.run):
            raise PolicyRefused("begin · does not follow a join", next="Join first.", code="message")
        assert isinstance(populations, dict)
        if populations.get(self.name) != self._joined["population"]:
            raise PolicyRefused(
                f"begin · says {str(populations.get(self.name))[:20]} units of this site, which said {self._joined['population']}",
                next="Correct federation.populations.",
                code="other_population",
            )
        self._joined = {**self._joined, "run": ask.run, "populations": populations}
        self._home.write_json(JOINED, self._joined)
        self._work(ask.run)  # a plan that cannot be made is refused now

    def _ledger(self, run: str) -> dict[str, Any]:
        """This site's ledger of a run, signed; a key is made for that if there is none."""
        from sfumato.federation import mechanisms
        from sfumato.privacy import ledger
        from sfumato.release import keys

        if "ledger" not in policies.load(self._policy_file).may_say:
            raise PolicyRefused(
                "may_say · of this site's policy has no ledger",
                next="Add it, if the server may have it.",
                code="may_not_say",
            )
        site, work = self._work(run)
        if not site.ledger.is_file():
            raise PolicyRefused(
                "ledger · nothing was charged here", next="Ask for nothing.", code=site_ledgers.NO_LEDGER
            )
        key = keys.own()
        text = ledger.export_jsonl(site.ledger, sign=keys.signer(key))
        if ledger.plan_of_jsonl(text) != (mechanisms.build(work.settings).promise(work.public).at_site or site.whole):
            raise PolicyRefused(
                "ledger · is of an earlier run of this name, of another recipe",
                next="Federate under a new name.",
                code="other_run",
            )
        return dict(site_ledgers.values_of(text, key.public))

    def _work(self, run: str) -> "tuple[Site, Work]":
        if self._at_work is None or self._at_work[0] != run:
            if self._joined.get("run") != run:
                raise PolicyRefused("run · has not begun at this site", next="Begin it first.", code="other_run")
            self._at_work = (run, *self._made(run))
        return self._at_work[1:]

    def _made(self, run: str) -> "tuple[Site, Work]":
        from sfumato.release import keys

        recipe = _parsed(self._joined["recipe"])
        private = federating.is_charged_at_site(recipe)
        plans = federating.plans_for(recipe, self._joined["populations"])
        key = keys.existing()

        def table() -> Any:
            return federating.encoded(recipe, self.name, self._records(recipe)[0])

        own: dict[str, Any] = {
            "table": cache(table),
            "records": lambda: self._records(recipe)[0],
            "ledger": self._folder / "runs" / run / "ledger.db",
            "account": self._account(recipe) if private else None,
            "sign": keys.signer(key) if key is not None else None,
        }
        if recipe.federation.mechanism.kind == "distributed":
            own["identity"] = federating.identity(self._folder / IDENTITY)
        members = [
            federating.member(recipe, name, plan, **own)
            if name == self.name
            else federating.member(
                recipe,
                name,
                plan,
                table=_not_here,
                ledger=Path("nowhere"),
                elsewhere=True,
            )
            for name, plan in plans.items()
        ]
        work = replace(federating.work_for(recipe, members), recipe=_sum(self._joined["recipe"]))
        return next(site for site in members if site.name == self.name), work

    def _records(self, recipe: Recipe) -> tuple[Sequence[Any], Path]:
        """This site's own records, and where their account lies. What the recipe says of a path is not followed."""
        from sfumato.federation.simulate import split_by_site

        if self._read is not None and self._read[0] == recipe:
            return self._read[1:]
        if self._data is None and recipe.data.source in OWN:
            raise PolicyRefused(
                "data · this site was started without --data", next="Start it with --data.", code="no_data"
            )
        prepared = stages.load(_with_data(recipe, self._data))
        records: Sequence[Any] = prepared.private
        if self._share is not None:
            records = list(split_by_site(records, self._share[1], recipe.data.site_column).values())[self._share[0] - 1]
        self._read = (recipe, records, prepared.account_home)
        return self._read[1:]

    def _account(self, recipe: Recipe) -> Path:
        name = "account" if self._share is None else f"account-site-{self._share[0]}-of-{self._share[1]}"
        return self._records(recipe)[1] / ".sfumato" / f"{name}.db"


def _parsed(text: str) -> Recipe:
    import yaml

    try:
        recipe = recipes_file.from_mapping(yaml.safe_load(text))
    except (UsageError, yaml.YAMLError, ValueError, RecursionError):
        raise PolicyRefused("recipe · cannot be read here", next="Use the same version.", code="recipe") from None
    return replace(recipe, privacy=replace(recipe.privacy, account=None))


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _with_data(recipe: Recipe, data: Path | None) -> Recipe:
    return replace(recipe, data=replace(recipe.data, path=None if data is None else str(data)))


def _files_named(recipe: Recipe) -> set[str]:
    """Settings of the model that are paths: a recipe from elsewhere should not choose what this machine reads."""
    found = set()

    def look(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                look(inner, f"{path}.{key}" if path else str(key))
        elif isinstance(value, str) and path.rpartition(".")[2] in ("path", "folder", "checkpoint", "file"):
            found.add(path)

    values = recipes_file.to_mapping(recipe)
    look({key: inner for key, inner in values.items() if key != "data"}, "")
    return found


def shown(folder: Path) -> dict[str, Any]:
    """What server or site said last in ``folder`` (a run's folder will do). Raises UsageError where nobody ever worked."""
    for place in (folder, folder / federating.SERVER):
        if (said := status(place)) is not None:
            return said
    raise UsageError(
        f"{folder} · is no folder of a server or a site", next="Give --folder of `federate server` or `site`, or a run."
    )
