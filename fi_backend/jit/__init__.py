"""Compiling at run time, and the on-disk cache of what was compiled."""
