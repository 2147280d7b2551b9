"""One file for each claim: its experiment and, at the end, its declaration."""
