"""Built-in models and data, reached only by `_target_`.

byte_gpt     a byte-level GPT and a report that shows what it writes
audio_codec  a residual vector quantizer of speech, fitted by k-means, and WAV files
code_gpt     a GPT over audio codes laid out by a pattern, and a report that lets it be heard
digits       scikit-learn's handwritten digits, a small net for them and a report of its hardest mistakes
source_code  windows over the source of Python's own standard library
speech       speech, spoken by espeak-ng or from a folder of audio files
speech_codes the same as the codes of a codec
"""
