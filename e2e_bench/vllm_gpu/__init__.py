"""vLLM on a GPU with this backend beside vLLM's own: whether it computes the same tokens.

Runs where vLLM is on PYTHONPATH without being installed, and so may this checkout::

    PYTHONPATH=/path/to/vllm:. python -m e2e_bench.vllm_gpu.tokens --out tokens.json
"""
