"""Jamba: one layer of eight attends, the others are Mamba and keep a state that no policy touches; experts."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(model_types=("jamba",), covers="Jamba, Jamba 1.5, Jamba Reasoning")
