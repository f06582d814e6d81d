"""Data: text or conversations of any source -> tokeniser -> Arrow store -> packing -> a stream of samples."""
