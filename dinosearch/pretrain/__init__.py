"""Teach a vision transformer from unlabelled images by self-distillation. Knows no index and no labels."""
