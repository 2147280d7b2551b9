"""Engines that spread a committee's work over many machines."""
