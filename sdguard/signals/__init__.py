"""Signals: functions of an `Observation`, one float per image, higher = more memorized. One file each."""
