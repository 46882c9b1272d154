"""Where models come from: built-in names, directories, GGUF files and hub ids, behind one cache.

Ranks need a directory of config, safetensors and tokenizer; `store.resolve` in store.py finds or
makes it. What the tensors in it mean is the business of `cqil_dist.model`.
"""
