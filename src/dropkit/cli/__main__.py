"""`python -m dropkit.cli` is the `dropkit` command."""

from dropkit.cli import main

main()
