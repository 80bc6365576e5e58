"""SGLang on a GPU with this backend: whether it computes what SGLang's own backends do.

Needs SGLang (0.5.16) and a GPU, no network and no installed package: PYTHONPATH names SGLang's
folder, and the checkout declares its own entry point.
"""
