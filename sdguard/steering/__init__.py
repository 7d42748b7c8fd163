"""Steering: ways to turn flagged samples away from a memorized picture. One file each; the ladder chooses among them."""
