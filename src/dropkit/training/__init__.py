"""The fitting loop: networks in stacks, early stopping, the search for a rate."""

from dropkit.training.checkpoint import Checkpoints
from dropkit.training.division import divide_rows
from dropkit.training.fit import Fit, fit
from dropkit.training.logs import JsonLines, TensorBoard, follow, read_log
from dropkit.training.losses import bound_log_variance, categorical_nll, committee_nll, gaussian_nll
from dropkit.training.network import GaussianHead, NetworkSpec, build_network
from dropkit.training.r_drop import categorical_divergence, gaussian_divergence, r_drop, two_passes
from dropkit.training.records import Curve, Fold, Plan, Progress, StackResult, Team, Trained
from dropkit.training.row_ids import WithRowIds
from dropkit.training.search import Candidate, Search, Trial
from dropkit.training.stack import train_stack
from dropkit.training.team import ProcessTeam, join_team

__all__ = [
    "Candidate",
    "Checkpoints",
    "Curve",
    "Fit",
    "Fold",
    "GaussianHead",
    "JsonLines",
    "NetworkSpec",
    "Plan",
    "ProcessTeam",
    "Progress",
    "Search",
    "StackResult",
    "Team",
    "TensorBoard",
    "Trained",
    "Trial",
    "WithRowIds",
    "bound_log_variance",
    "build_network",
    "categorical_divergence",
    "categorical_nll",
    "committee_nll",
    "divide_rows",
    "fit",
    "follow",
    "gaussian_divergence",
    "gaussian_nll",
    "join_team",
    "r_drop",
    "read_log",
    "train_stack",
    "two_passes",
]
