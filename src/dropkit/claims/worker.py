"""One claim in a process of its own.

It writes the outcome to a file and ends with status 0. Else the last line on standard error says why, in one line, and
the status is `NOT_RUN` where a package is missing, 1 for any other reason. The process ends with its parent.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import traceback

from dropkit.claims.claim import Claim, Setting
from dropkit.claims.record import outcome_of, write_outcome
from dropkit.directory import write_file
from dropkit.errors import DropkitError, MissingPackageError, OptionError

NOT_RUN = 3


def main(module: str, name: str, setting: str, digest: str, path: str) -> int:
    """Run one claim.

    Args:
        module: of its experiment.
        name: of the claim.
        setting: as JSON.
        digest: to be written into the outcome.
        path: of the file to write.

    Returns:
        The status that the process ends with.
    """
    import torch

    torch.set_num_threads(1)
    extras: tuple[str, ...] = ()
    try:
        claim = find_claim(module, name)
        extras = claim.extras
        chosen = Setting(**json.loads(setting))
        outcome = outcome_of(claim, claim.experiment(chosen), chosen, versions(), digest)
        with write_file(path, force=True) as file:
            file.write(write_outcome(outcome).decode())
    except MissingPackageError as error:
        return complain(str(error), NOT_RUN)
    except ModuleNotFoundError as error:
        if extras:
            return complain(missing_extras(error.name or str(error), extras), NOT_RUN)
        return complain(f"{type(error).__name__}: {error}", 1)
    except Exception as error:
        said = str(error) if isinstance(error, DropkitError) else f"{type(error).__name__}: {error}"
        return complain(said, 1)
    return 0


def find_claim(module: str, name: str) -> Claim:
    """The claim of this name among the values of the module of its experiment, or in the article's list."""
    for place in (module, "dropkit.claims.chapters"):
        for value in vars(importlib.import_module(place)).values():
            for one in value if isinstance(value, tuple) else (value,):
                if isinstance(one, Claim) and one.name == name:
                    return one
    raise OptionError(f"{module} holds no claim {name!r}. Let the module of its experiment hold the claim.")


def versions() -> tuple[tuple[str, str], ...]:
    """What results depend on, without the build of torch."""
    import numpy as np
    import torch

    import dropkit

    build = torch.__version__.partition("+")[0]
    return (("dropkit", dropkit.__version__), ("torch", build), ("numpy", np.__version__))


def missing_extras(package: str, extras: tuple[str, ...]) -> str:
    """One line that names the package and how to get it."""
    return f"needs {package}, which is not installed: pip install 'dropkit[{','.join(extras)}]'"


def complain(said: str, status: int) -> int:
    """The way to the mistake, then what it was in one line."""
    traceback.print_exc()
    sys.stderr.write("\n" + " ".join(said.split()) + "\n")
    return status


def start() -> None:
    """What the process begins with; its arguments are those of `main`."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.exit(main(*sys.argv[1:]))


def end_with_parent() -> None:
    """Wait until the parent's end of standard input is closed, by its will or its death, and end at once."""
    while os.read(0, 1):  # not sys.stdin, whose lock a process that ends would wait for
        pass
    os._exit(130)
