"""Feature dropout does not prepare for data that are missing otherwise; what does, side by side."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from dropkit.claims import data
from dropkit.claims.claim import Chart, Claim, Findings, Rule, Series, Setting, critical
from dropkit.claims.experiments.missing_tables import Way, standardised, test_errors
from dropkit.claims.experiments.networks import over_seeds
from dropkit.fields.missing import Mechanism, check_missing, mar, mcar, self_masking

RATE = 0.4
NAMES = {"mcar": "at random (MCAR)", "mar": "given what is seen (MAR)", "self-masking": "by its value (MNAR)"}


def experiment(setting: Setting, *, epochs: int = 20, name: str = "concrete") -> Findings:
    """Ways of preparing, each tested under three mechanisms of equal rate on the same columns."""
    table = data.table(name)
    x, y = standardised(table)
    splits = table.splits[: 20 if setting.full else setting.seeds]
    mechanisms = _mechanisms(x)
    holes = {kind: one.remove(x, seed=1000 + setting.seed) for kind, one in mechanisms.items()}
    ways = {
        "complete rows": Way(None),
        "feature dropout": Way(mechanisms["mcar"]),
        "dropout, indicators": Way(mechanisms["mcar"], indicators=True),
    }
    found = {label: test_errors(x, y, splits, way, holes, epochs=epochs) for label, way in ways.items()}
    for label, options in (
        ("its own mechanism", ()),
        ("its own, indicators", (True,)),
        ("its own, imputed", (True, True)),
    ):
        found[label] = {
            kind: test_errors(x, y, splits, Way(one, *options), {kind: holes[kind]}, epochs=epochs)[kind]
            for kind, one in mechanisms.items()
        }
    dropped, told = found["feature dropout"], found["its own, indicators"]
    half = critical(len(splits) - 1) / len(splits) ** 0.5
    kinds = tuple(NAMES)
    series = tuple(
        Series(
            label, tuple(range(len(kinds))), tuple(float(errors[k].mean()) for k in kinds),
            tuple(half * float(errors[k].std()) for k in kinds), "bars",
        )
        for label, errors in found.items()
    )  # fmt: skip
    return Findings(
        figures={
            "mar": over_seeds(dropped["mar"] - found["its own mechanism"]["mar"]),
            "mnar": over_seeds(dropped["self-masking"] - found["its own mechanism"]["self-masking"]),
            "mar_told": over_seeds(dropped["mar"] - told["mar"]),
            "mnar_told": over_seeds(dropped["self-masking"] - told["self-masking"]),
            "mnar_more": over_seeds(dropped["self-masking"] - dropped["mcar"]),
            "imputation": over_seeds(dropped["mar"] - found["its own, imputed"]["mar"]),
        },
        charts=(
            Chart(
                "ways", f"Test error with {100 * RATE:g} % of the cells of the same columns missing, by mechanism and "
                "by what the network was prepared with; bars are 95 % intervals over splits.",
                "how cells go missing", "root mean squared error [sd of the target]", series,
                x_names=tuple(NAMES.values()),
            ),
        ),
        data=f"{table.name}: {len(x):,} rows, {x.shape[1]} columns, {len(splits)} of its splits",
        setup=f"Perceptrons of 64 and 64 units, {epochs} epochs over 10 copies of the rows; holes are filled "
        "by the mean, or by scikit-learn's IterativeImputer fitted on training rows with holes; the logits of MAR "
        "and MNAR have standard deviation 2.",
        remarks=(
            "The splits share rows, so their intervals are too narrow by an unknown factor.",
            *_real_tables(),
        ),
    )  # fmt: skip


def _mechanisms(x: Tensor) -> dict[str, Mechanism]:
    columns = range(max(1, x.shape[1] // 3), x.shape[1])
    return {
        "mcar": mcar(x, RATE, columns=columns),
        "mar": mar(x, RATE, columns=columns),
        "self-masking": self_masking(x, RATE, columns=columns),
    }


def _real_tables() -> tuple[str, ...]:
    """What the check says of a table whose holes are known to depend on age."""
    folder = data.shared_folder()
    path = folder / "tabular_missing" / "mice_boys.csv" if folder else None
    if path is None or not path.is_file():
        return ("The growth table of Dutch boys (mice::boys) is not here, so the check was not shown on it.",)
    import pandas as pd

    frame = pd.read_csv(path)
    numbers = frame[["age", "hgt", "wgt", "bmi", "hc", "tv"]].to_numpy(np.float64)
    found = check_missing(numbers)
    tv = next(column for column in found.columns if column.column == 5)
    said = "refutes" if found.refutes_mcar else "does not refute"
    return (
        f"On mice::boys ({found.rows} rows), where testicular volume is missing for every boy under 8, the check "
        f"{said} MCAR: the other columns predict its holes with area {tv.auc:.2f}.",
    )


CLAIM = Claim(
    name="missing_mar",
    title="It does not prepare for MAR and MNAR",
    article="Where missing depends on other columns or on the value itself, feature dropout is the wrong rehearsal.",
    prediction="Under MAR and MNAR a network rehearsed with the mechanism at hand has a lower error than one trained "
    "with feature dropout of the same rate.",
    condition="Which mechanism is at work must be known: MNAR cannot be seen in the data alone.",
    rules=(
        Rule("mar", "error of feature dropout minus of its own mechanism, under MAR, sd of the target", "above"),
        Rule("mnar", "error of feature dropout minus of its own mechanism, under MNAR, sd of the target", "above"),
        Rule("mar_told", "the same under MAR, its own mechanism with indicators", "shown"),
        Rule("mnar_told", "the same under MNAR, its own mechanism with indicators", "shown"),
        Rule("mnar_more", "error of feature dropout under MNAR minus under MCAR of equal rate", "shown"),
        Rule("imputation", "the same under MAR, its own mechanism, imputed rows and indicators", "shown"),
    ),
    experiment=experiment,
    seconds=20,
)  # fmt: skip
