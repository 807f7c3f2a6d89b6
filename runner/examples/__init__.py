"""Built-in models and data, reached only by `_target_`.

byte_gpt     a byte-level GPT and a report that shows what it writes
digits       scikit-learn's handwritten digits, a small net for them and a report of its hardest mistakes
source_code  windows over the source of Python's own standard library
"""
