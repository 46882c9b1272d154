"""Where models come from: names, directories, GGUF files and hub ids, kept in one cache.

Everything that ranks need is a directory of config, safetensors and tokenizer; `resolve` finds or
makes it. What the tensors mean is the business of `cqil_dist.model`.
"""
