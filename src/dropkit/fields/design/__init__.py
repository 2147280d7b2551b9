"""Design: sequences as numbers, what to build next, the loop of rounds, and the committee as a BoTorch model."""

from dropkit.fields.design.botorch import dropout_model
from dropkit.fields.design.loop import Campaign, Round, run_campaign
from dropkit.fields.design.picking import greedy, thompson, upper_bound
from dropkit.fields.design.sequences import ALPHABETS, one_hot

__all__ = [
    "ALPHABETS",
    "Campaign",
    "Round",
    "dropout_model",
    "greedy",
    "one_hot",
    "run_campaign",
    "thompson",
    "upper_bound",
]
