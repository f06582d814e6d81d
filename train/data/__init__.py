"""Data: text of any source -> tokeniser -> Arrow store -> fill-in-the-middle -> packing -> TokenStream."""
