"""The recipe parser: what it accepts it gives back the same, and whatever else it meets is a UsageError that names the place."""

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sfumato import recipe as recipes
from sfumato.errors import UsageError
from sfumato.recipe import Recipe

DEFAULTS = recipes.to_mapping(Recipe(name="x"))


def test_a_recipe_written_and_read_is_the_same(tmp_path):
    recipe = recipes.from_mapping(
        {"name": "a-b", "privacy": {"epsilon": 3}, "model": {"image": {"kind": "cosine", "kept": 8}}}
    )
    (tmp_path / "r.yaml").write_text(recipes.to_yaml(recipe))
    assert recipes.load(tmp_path / "r.yaml") == recipe


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"name": "x", "privcy": {}}, ("privcy", "Did you mean privacy?")),
        ({"name": "x", "privacy": {"epsilom": 1}}, ("privacy.epsilom", "Did you mean privacy.epsilon?")),
        (
            {"name": "x", "federation": {"mechanism": {"kind": "tree"}}},  # DP-FTRL, which there is not
            ("federation.mechanism", "tree", "record_level", "update_level", "central", "distributed"),
        ),
        (
            {"name": "x", "federation": {"mechanism": "update_level"}},
            (
                "federation.mechanism = 'update_level' · must be a mapping with a kind",
                "Set federation.mechanism: {kind: update_level}.",
            ),
        ),
        (
            {"name": "x", "federation": {"mechanism": {"kind": "foo"}}},
            ("federation.mechanism.kind = 'foo' · must be one of 'record_level', 'update_level'",),
        ),
        ({"name": "x", "federation": {"mechanism": {"epsilon": 3}}}, ("federation.mechanism = ", "must say its kind")),
        ({"name": "x", "training": "foo"}, ("training = 'foo' · must be a mapping",)),
        ({"name": "x", "model": {"backbone": {"kind": "mlp", "widht": 1}}}, ("model.backbone", "widht")),
        ({"name": "x", "model": {"backbone": {"kind": "resnet"}}}, ("model.backbone", "resnet")),
        ({"name": "x", "privacy": {"epsilon": 0}}, ("privacy", "epsilon = 0")),
        ({"name": "x", "privacy": {"epsilon": -1}}, ("privacy", "epsilon = -1")),
        ({"name": "x", "privacy": {"epsilon": math.nan}}, ("privacy", "epsilon = nan")),
        ({"name": "x", "privacy": {"epsilon": math.inf}}, ("privacy", "epsilon = inf")),
        ({"name": "x", "privacy": {"epsilon": None}}, ("privacy", "exactly one")),
        ({"name": "x", "privacy": {"noise_multiplier": 1.0}}, ("privacy", "exactly one")),
        ({"name": "x", "privacy": {"delta": 2}}, ("privacy", "delta = 2")),
        ({"name": "x", "privacy": {"delta": "tiny"}}, ("privacy.delta", "tiny")),
        ({"name": "x", "privacy": {"records_per_unit": 3}}, ("records_per_unit = 3", "person")),
        ({"name": "x", "privacy": {"adjacency": "replaced"}}, ("privacy.adjacency", "replaced")),
        ({"name": "x", "privacy": None}, ("privacy", "None")),
        ({"name": "x", "training": {"steps": "many"}}, ("training.steps", "many")),
        ({"name": "x", "training": {"steps": 0}}, ("training", "steps = 0")),
        ({"name": "x", "training": {"steps": 10**400}}, ("training", "steps")),
        ({"name": "x", "data": {"source": "folder"}}, ("data", "path = None")),
        ({"name": "x", "data": {"source": "imagenet"}}, ("data.source", "imagenet")),
        ({"name": "../x"}, ("name", "../x")),
        ({"name": ""}, ("name", "''")),
        ({}, ("name",)),
        ([], ("list",)),
        (None, ("NoneType",)),
        ({1: 2}, ("1",)),
    ],
    ids=str,
)
def test_a_wrong_recipe_is_refused_by_the_path_of_what_is_wrong(values, named):
    with pytest.raises(UsageError) as caught:
        recipes.from_mapping(values)
    for words in named:
        assert words in str(caught.value)
    assert caught.value.next


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"- a\n",
        b"a: [",
        b"\xff\xfe\x00",
        b"a: &x [*x]\n",
        b"!!python/object/apply:os.system [ls]",
        b"d: 2020-13-45\n",
        b"a: " + b"[" * 5_000,
    ],
    ids=lambda content: repr(content[:20]),
)
def test_a_file_that_is_no_recipe_is_wrong_use(content, tmp_path):
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(UsageError):
        recipes.load(tmp_path / "r.yaml")


@pytest.mark.parametrize("path", ["missing.yaml", ".", "a\0b"])
def test_a_path_that_is_no_file_is_wrong_use(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        recipes.load(path)


def test_an_alias_bomb_is_refused_at_once(tmp_path):
    """Each line names the one before ten times: 10^9 items if anyone wrote it out."""
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    (tmp_path / "r.yaml").write_text("\n".join(lines) + "\n")
    with pytest.raises(UsageError, match="a0"):
        recipes.load(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text(
        "name: x\ndata:\n" + "\n".join("  " + line for line in lines).replace("  a9:", "  path:")
    )
    with pytest.raises(UsageError):
        recipes.load(tmp_path / "r.yaml")
    bomb = yaml.safe_load("\n".join(lines))["a9"]
    with pytest.raises(UsageError, match="path") as caught:
        recipes.from_mapping({"name": "x", "data": {"path": bomb}})
    assert len(str(caught.value)) < 2_000


def test_override_sets_one_value_and_leaves_the_rest():
    values = {"name": "x", "privacy": {"epsilon": 8}}
    changed = recipes.override(values, ["privacy.epsilon=4", "training.steps=7", "data.path=a=b", "privacy.delta=1e-6"])
    assert changed["privacy"] == {"epsilon": 4, "delta": "1e-6"}
    assert changed["training"] == {"steps": 7}
    assert changed["data"] == {"path": "a=b"}
    assert values == {"name": "x", "privacy": {"epsilon": 8}}
    assert recipes.from_mapping({**changed, "data": {}}).privacy.delta == 1e-6


@pytest.mark.parametrize(
    "assignment", ["", "=", "x", ".=1", "a..b=1", "name.x=1", "a=[", "a=2020-13-45", "a=" + "[" * 5_000]
)
def test_an_assignment_that_cannot_be_made_is_wrong_use(assignment):
    with pytest.raises(UsageError):
        recipes.override({"name": "x"}, [assignment])


# ---- fuzz: whatever it is given, only UsageError ever comes out ----

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates() | st.binary(max_size=4)
    | st.integers(min_value=10**300, max_value=10**310),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.one_of(st.text(max_size=6), st.integers(), st.none(), st.booleans()), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
sections = st.sampled_from([name for name in DEFAULTS if name != "name"])
some_keys = st.sampled_from(
    [(section, key) for section, values in DEFAULTS.items() if isinstance(values, dict) for key in values]
)


def _tolerated(values):
    try:
        return recipes.from_mapping(values)
    except UsageError:
        return None


@settings(max_examples=150, deadline=None)
@given(anything)
def test_fuzz_any_value_as_a_recipe(values):
    assert _tolerated(values) is None


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(some_keys, anything), min_size=1, max_size=3))
def test_fuzz_any_value_at_any_known_key(changes):
    values = {"name": "x"}
    for (section, key), value in changes:
        values.setdefault(section, {})[key] = value
    recipe = _tolerated(values)
    if recipe is not None:
        assert recipes.from_mapping(recipes.to_mapping(recipe)) == recipe


@settings(max_examples=150, deadline=None)
@given(sections, anything)
def test_fuzz_any_value_as_a_section(section, value):
    _tolerated({"name": "x", section: value})


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_fuzz_any_bytes_as_a_file(tmp_path, content):
    path = Path(tmp_path) / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError):
        recipes.load(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(min_value=0), st.binary(max_size=4))
def test_fuzz_a_real_recipe_with_bytes_changed(tmp_path, position, patch):
    content = recipes.to_yaml(Recipe(name="x")).encode()
    position %= len(content)
    path = Path(tmp_path) / "r.yaml"
    path.write_bytes(content[:position] + patch + content[position + len(patch) :])
    try:
        recipe = recipes.load(path)
    except UsageError:
        return
    assert isinstance(recipe, Recipe)


@settings(max_examples=300, deadline=None)
@given(
    st.text(max_size=30)
    | st.tuples(some_keys, st.text(max_size=12)).map(lambda pair: f"{pair[0][0]}.{pair[0][1]}={pair[1]}")
)
def test_fuzz_any_assignment(assignment):
    try:
        values = recipes.override({"name": "x"}, [assignment])
    except UsageError:
        return
    _tolerated(values)


@pytest.mark.parametrize("name", ["clinic-tokens", "wordnet", "emails", "emoji-private"])
def test_a_recipe_of_many_parts_is_written_and_read_the_same(name, tmp_path):
    from sfumato.recipes import named

    recipe = named(name)
    (tmp_path / "r.yaml").write_text(recipes.to_yaml(recipe))
    assert recipes.load(tmp_path / "r.yaml") == recipe
