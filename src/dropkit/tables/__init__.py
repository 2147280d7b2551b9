"""Tables: read, described, encoded as numbers, and models of them on disk."""
