"""Policies at budgets on tasks, beside the full cache: what ``kvpolicy compare`` runs and reports.

Read ``rows.py`` first: all that is reported is computed from rows.
"""
