"""How true a policy's run is to the full cache on the same text: while a model writes (``referee.py``), and on texts
that are given (``forcing.py`` and what follows from it)."""
