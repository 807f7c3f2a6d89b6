"""Built-in models and data, used only by `_target_`.

byte_gpt            a byte-level GPT, and a report with a text that it generates
digits              scikit-learn's handwritten digits, a small CNN, and a report of its worst mistakes
source_code         windows of bytes over the source of Python's standard library
audio/speech        speech, synthesized by espeak-ng or from a folder of audio files
audio/audio_codec   a residual vector quantizer for speech, fitted by k-means, and WAV files
audio/speech_codes  speech as the codes of a codec
audio/code_gpt      a GPT over audio codes, and a report with audio that it generates
"""
