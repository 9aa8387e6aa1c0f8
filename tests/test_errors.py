"""Errors: one tree, documented exit codes, every class with its own code."""

import pytest

from sfumato import errors

CODES = {
    "SfumatoError": 1, "UsageError": 2, "DataError": 2, "PrivacyRefused": 3, "BudgetExhausted": 3, "LedgerError": 3,
    "UnsupportedLayer": 3, "VerificationFailed": 4, "OutsideError": 5, "MissingDependency": 5,
}  # fmt: skip


def _all(kind):
    return {kind}.union(*(_all(child) for child in kind.__subclasses__()))


def test_every_error_has_the_documented_exit_code():
    ours = {kind for kind in _all(errors.SfumatoError) if kind.__module__ == "sfumato.errors"}
    assert {kind.__name__: kind.exit_code for kind in ours} == CODES


def test_every_error_has_a_code_of_its_own():
    ours = [kind for kind in _all(errors.SfumatoError) if kind.__module__ == "sfumato.errors"]
    assert len({kind.code for kind in ours}) == len(ours)


def test_python_programs_can_catch_them_by_their_usual_names():
    assert issubclass(errors.UsageError, ValueError)
    assert issubclass(errors.DataError, ValueError)
    assert issubclass(errors.MissingDependency, ImportError)


def test_the_words_of_an_error_hold_message_and_next_step():
    error = errors.UsageError("steps = 0 · must be > 0", next="Give more.", code="steps")
    assert str(error) == "steps = 0 · must be > 0 · Give more."
    assert error.as_dict() == {"code": "steps", "message": "steps = 0 · must be > 0", "next": "Give more."}
    assert str(errors.UsageError("x = 1 · no")) == "x = 1 · no"


def test_a_refusal_without_a_list_is_its_own_reason():
    assert errors.BudgetExhausted("m", next="n").refusals == [{"code": "budget_exhausted", "message": "m", "next": "n"}]


@pytest.mark.parametrize("name", CODES)
def test_an_error_survives_pickling(name):
    """Errors cross process borders in parallel tests and in federations."""
    import pickle

    error = pickle.loads(pickle.dumps(getattr(errors, name)("m", next="n")))
    assert (error.message, error.next) == ("m", "n")
