import pytest

from sfumato.errors import UsageError
from sfumato.federation import policy
from sfumato.federation.policy import SitePolicy

WHOLE = """
max_epsilon: 8
account_epsilon: 10
max_rounds: 20
min_units: 100
allowed_recipes: [9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08]
allowed_mechanisms: [record_level, central]
allow_not_private: false
may_say: [steps]
"""


def write(tmp_path, text):
    path = tmp_path / "policy.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_policy_is_read_whole(tmp_path):
    assert policy.load(write(tmp_path, WHOLE)) == SitePolicy(
        max_epsilon=8,
        account_epsilon=10,
        max_rounds=20,
        min_units=100,
        allowed_recipes=("9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",),
        allowed_mechanisms=("record_level", "central"),
        may_say=("steps",),
    )


def test_an_empty_policy_trusts_no_server(tmp_path):
    found = policy.load(write(tmp_path, ""))
    assert found == SitePolicy() and "central" not in (found.allowed_mechanisms or ())
    assert not found.allow_not_private


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_epsilons: 8", "policy.max_epsilons · is not a key"),
        ("max_epsilon: -1", "max_epsilon = -1"),
        ("max_epsilon: [1]", "policy.max_epsilon"),
        ("may_say: [records]", "policy.may_say.0"),
        ("min_units: much", "policy.min_units"),
        ("allowed_recipes: [abc]", "sha256"),
        ("- 1", "must be a mapping"),
        ("a: [", "readable YAML"),
    ],
)
def test_what_is_no_policy_is_refused_by_its_path(tmp_path, text, words):
    with pytest.raises(UsageError) as refused:
        policy.load(write(tmp_path, text))
    assert words in str(refused.value)
    assert "__" not in str(refused.value)  # what is known are the keys of a policy


def test_a_missing_policy_is_refused(tmp_path):
    with pytest.raises(UsageError, match="readable YAML"):
        policy.load(tmp_path / "none.yaml")
