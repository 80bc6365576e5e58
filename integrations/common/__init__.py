"""What the adapters of several engines share; no engine is imported here."""
