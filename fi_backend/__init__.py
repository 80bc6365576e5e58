"""An attention engine for LLM serving."""
