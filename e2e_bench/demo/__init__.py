"""The demo: a tiny model behind a real vLLM server, with vLLM's own attention and with ours."""
