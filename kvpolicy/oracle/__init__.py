"""The oracle: what a policy means, in plain NumPy float64, one row and one token at a time.

It defines the language. There are no slots, no batches, and no code in common with the runtime: a row's text holds
queries, keys and values by position; a pool is a list of pages; a page is a list of positions. Read ``step.py`` first
(one pass: admit, read, attend, observe, update), then ``pools.py``, ``scoring.py`` (the stages of a scorer),
``signals.py`` and ``text.py`` (what one KV head sees). Section numbers in comments are those of DESIGN.md.

Where the language leaves a choice, the oracle reads it so:

- A row that brings no token to a pass is untouched by it, except that a turn's first pass closes its open pages.
- ``prompt_chunk``: the caller feeds the chunks (``more=True`` but for the last), and an update follows each that
  brought the row a token. A chunk is so many of a row's own tokens: padding takes no part.
- A unit enters its pool, and its memory starts, with its first token.
- A pool fed by ``to`` takes over units whole, in order of position; its ``first`` and ``window`` are counted among its
  residents, and no page of it is open. What was just moved there takes part in the destination's update of the same
  pass.
- ``across-heads`` counts in units: a head's room is the whole pages of its budget less the protected ones. Of equal
  score and position, the lower head's unit goes first.
- ``read``: all units of the pool are its candidates.
- A query says 0 about a token that it may not see (a later one, or, for probabilities, an unread one). Logits and page
  bounds of unread tokens do count, since reading is decided by them. A page is seen where its first token is.
- ``smooth`` and ``norm`` know candidates only: where one is stated, every other unit counts 0 from there on.
- ``key-anchor`` takes its mean over the pool's tokens. ``key-similarity`` compares the tokens that are ranked: the
  pool's, or all where ``hit: {top: …}`` ranks the cache. ``keep: newest`` excuses, in each token's row, the newest
  other token that resembles it (cosine > ``above``).
- ``lag`` counts its blocks by position, among the tokens that are ranked (as for ``key-similarity``); a block that a
  whole one does not follow, or of which nothing is left in the next, is not judged and counts 1. Of equals the newer.
- ``above-average`` counts the tokens that the query sees within ``over``; a share of 1 - 2^-12 will do. Query heads of
  a KV head share the noise of ``gumbel-attention``.
- Signals read keys as attention does: as stored, and turned to their rank where positions are compact.
- ``positions: compact``: queries and keys are given unrotated, with ``rotate(vectors, positions)``. In each pass a key
  is turned to its rank among the residents of its KV head, a query to the rank of its own token there.
- ``store {bits, group, keys, values}``: numbers are rounded to 2^bits levels between the least and the greatest of
  their group, both included: along ``token`` ``group`` neighbouring channels of one token, along ``channel`` one
  channel of ``group`` neighbouring tokens of a page. A page is rounded once, when it is full, closed or was moved; it
  takes effect after the pass, for everyone, and not before a prompt turn has ended.
"""

from kvpolicy.oracle.records import Choice, Hit, PoolStep, Reading, Step
from kvpolicy.oracle.rows import Oracle
from kvpolicy.oracle.step import Kept, Memories
from kvpolicy.oracle.text import Rotate

__all__ = ["Choice", "Hit", "Kept", "Memories", "Oracle", "PoolStep", "Reading", "Rotate", "Step"]
