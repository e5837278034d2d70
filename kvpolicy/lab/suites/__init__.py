"""Suites: lists of experiments, each one of a paper's figures or tables measured again on a model that is given.

``kvpolicy compare --suite NAME`` runs one, and ``python -m kvpolicy.lab.suites`` makes docs/evidence.md. Read
``base.py`` first.
"""
