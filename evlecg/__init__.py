"""evlecg: distil a large ECG vision-language model into a small one (EVL-ECG, arXiv 2605.29977)."""

__version__ = "0.1.0"
