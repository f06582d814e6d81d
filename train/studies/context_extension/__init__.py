"""Context extension on small models: loss by position and needles, with YaRN and without (arXiv:2412.19437 §4.3)."""
