"""What was spent, written down before it is spent: the ledger of a run, and the account of a data set.

    chain.py    the entries, their hashes, what may follow what; touches no file
    blocks.py   how many steps are reserved at once, and which were handed out
    storage.py  SQLite, locks, the system's errors
    run.py      ``Ledger``: one run's, open for writing
    account.py  what all runs on one data set have spent, and limits on all of them
    reading.py  show, verify, trajectory
    export.py   as text, for a bundle

``docs/privacy.md`` says what is noticed, what is refused, and what a file cannot show.
"""

from sfumato.privacy.ledger.export import events_of_jsonl, export_jsonl, plan_of_jsonl, read_jsonl
from sfumato.privacy.ledger.reading import other_runs, show, trajectory, verify, verify_chain
from sfumato.privacy.ledger.run import Ledger, Sign

__all__ = [
    "Ledger",
    "Sign",
    "events_of_jsonl",
    "export_jsonl",
    "other_runs",
    "plan_of_jsonl",
    "read_jsonl",
    "show",
    "trajectory",
    "verify",
    "verify_chain",
]
