"""Forwards written from the formulas, every hook point a cut point; nothing of transformers, nothing of a plugin."""
