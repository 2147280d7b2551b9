"""Privacy: what dropout promises (nothing), what an attacker finds, and what DP-SGD proves."""

from dropkit.fields.privacy.audit import Audit, audit, draw_members, epsilon_bound, membership_scores, p_value
from dropkit.fields.privacy.divergence import delta_at, dropout_delta
from dropkit.fields.privacy.sgd import PrivateRun, proven_epsilon, train_privately

__all__ = [
    "Audit",
    "PrivateRun",
    "audit",
    "delta_at",
    "draw_members",
    "dropout_delta",
    "epsilon_bound",
    "membership_scores",
    "p_value",
    "proven_epsilon",
    "train_privately",
]
