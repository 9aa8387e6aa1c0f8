"""One rule per layer type: how to run the layer without an unclipped weight gradient, and what its per-row gradients are.

``registry.py`` says what a rule is and holds those that are known; the other files hold them, family by family.
"""

from sfumato.privacy.gradients.rules.activation import PReLURule
from sfumato.privacy.gradients.rules.attention import MultiheadAttentionRule
from sfumato.privacy.gradients.rules.convolution import ConvolutionRule, TransposedConvolutionRule
from sfumato.privacy.gradients.rules.copies import Copies as _Copies
from sfumato.privacy.gradients.rules.copies import buffers_of_weights
from sfumato.privacy.gradients.rules.copies import swapped as _swapped
from sfumato.privacy.gradients.rules.embedding import Embedding as _Embedding
from sfumato.privacy.gradients.rules.embedding import EmbeddingRule, problem_of_embedding
from sfumato.privacy.gradients.rules.linear import Linear as _Linear
from sfumato.privacy.gradients.rules.linear import LinearRule
from sfumato.privacy.gradients.rules.normalisation import (
    GroupNormRule,
    InstanceNormRule,
    LayerNormRule,
    RMSNormRule,
)
from sfumato.privacy.gradients.rules.recurrent import GRUCellRule, LSTMCellRule, RNNCellRule
from sfumato.privacy.gradients.rules.registry import (
    Call,
    Record,
    Rule,
    forward_is_replaced,
    known_layers,
    plain_forward,
    rule,
    rule_finder,
    rule_for,
    sum_of,
    trainable,
)
from sfumato.privacy.gradients.rules.row_by_row import RowByRow

__all__ = [
    "Call",
    "ConvolutionRule",
    "EmbeddingRule",
    "GRUCellRule",
    "GroupNormRule",
    "InstanceNormRule",
    "LSTMCellRule",
    "LayerNormRule",
    "LinearRule",
    "MultiheadAttentionRule",
    "PReLURule",
    "RMSNormRule",
    "RNNCellRule",
    "Record",
    "RowByRow",
    "Rule",
    "TransposedConvolutionRule",
    "_Copies",
    "_Embedding",
    "_Linear",
    "_swapped",
    "buffers_of_weights",
    "forward_is_replaced",
    "known_layers",
    "plain_forward",
    "problem_of_embedding",
    "rule",
    "rule_finder",
    "rule_for",
    "sum_of",
    "trainable",
]
