"""Helpers without knowledge of detection: files, random streams, processes, text on terminals."""
