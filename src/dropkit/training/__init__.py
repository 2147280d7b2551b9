"""The fitting loop: networks in stacks, early stopping, the search for a rate."""

from dropkit.training.division import divide_rows
from dropkit.training.fit import Fit, fit
from dropkit.training.losses import bound_log_variance, categorical_nll, committee_nll, gaussian_nll
from dropkit.training.network import GaussianHead, NetworkSpec, build_network
from dropkit.training.records import Curve, Fold, Plan, Progress, StackResult, Trained
from dropkit.training.search import Candidate, Search, Trial
from dropkit.training.stack import train_stack

__all__ = [
    "Candidate",
    "Curve",
    "Fit",
    "Fold",
    "GaussianHead",
    "NetworkSpec",
    "Plan",
    "Progress",
    "Search",
    "StackResult",
    "Trained",
    "Trial",
    "bound_log_variance",
    "build_network",
    "categorical_nll",
    "committee_nll",
    "divide_rows",
    "fit",
    "gaussian_nll",
    "train_stack",
]
