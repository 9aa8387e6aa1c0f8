"""An audit that reports the largest lower bound over all thresholds, each at the full confidence.

Claimed: wrong one time in twenty. In truth it finds something in nothing much more often.
"""

from tests.auditing.adapters.loop import trainer

from sfumato.auditing.conformance.nulls import largest_over_thresholds

RIGHT_ROW, ROWS = 24, {24}
CLAIMED_EPSILON, TRUE_EPSILON = None, None  # it is the audit that is wrong


def wrong():
    return trainer(lower_bound=largest_over_thresholds)
