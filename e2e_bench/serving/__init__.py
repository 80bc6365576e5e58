"""Engines under load with several attention backends, by their own servers and clients."""
