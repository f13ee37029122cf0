"""The ECG page: what lies where (layout.py) and how it is drawn (render.py)."""
