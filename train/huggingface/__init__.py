"""The layout in which DeepSeek-V3 was released: read, write, convert, verify."""
