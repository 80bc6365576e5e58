"""Adapters that make fi_backend the attention backend of a serving engine."""
