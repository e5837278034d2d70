"""Deliberately broken copies of the runtime: one small change each, in a step of its pipeline, and what it breaks.

A change is made to the source of a module while a fresh process imports it; no file is touched. The fragment must occur
exactly once. There is no change here that means the same: each must be caught.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """``old`` in the source of ``module`` becomes ``new``, which breaks what ``breaks`` says."""

    breaks: str
    module: str
    old: str
    new: str


R, S, A = "kvpolicy.runtime.", "kvpolicy.scorers.", "kvpolicy.attention."

MUTANTS = (
    # admit
    Mutant(
        "a new unit keeps the score of who lay there before",
        R + "pool",
        "                tensor[rows, heads, unit] = fresh\n",
        "                tensor[rows, heads, unit] = torch.maximum(fresh, tensor[rows, heads, unit])\n",
    ),
    Mutant(
        "a new page keeps the bounds of the old one's keys",
        R + "token_pass",
        "widened = torch.where(opens[:, None, None], key[:, :, 0], wider(old, key[:, :, 0]))",
        "widened = wider(old, key[:, :, 0])",
    ),
    Mutant(
        "a token's position is that of the one before it",
        R + "token_pass",
        "state.position[slot] = clocks.position[:, None]",
        "state.position[slot] = (clocks.position - 1).clamp(min=0)[:, None]",
    ),
    Mutant(
        "a generated token's place in its pool's order is one too high",
        R + "clocks",
        "self.ordinal.copy_(self.seen)",
        "self.ordinal.copy_(self.seen + 1)",
    ),
    Mutant(
        "a page that survived is forgotten when a token joins it",
        R + "pool",
        "joined = survivor[rows, heads, unit] & ~opens[:, None]",
        "joined = torch.zeros_like(unit, dtype=torch.bool)",
    ),
    # attend
    Mutant(
        "a generated token does not see the first one",
        R + "token_pass",
        "visible = (state.position >= 0)[:, :, None]",
        "visible = (state.position > 0)[:, :, None]",
    ),
    Mutant(
        "query heads are shared out to KV heads the wrong way round",
        R + "token_pass",
        '"b (k g) 1 d -> b k g d"',
        '"b (g k) 1 d -> b k g d"',
    ),
    Mutant(
        "the same for prompt scores",
        A + "torch_prompt",
        '"b (k g) n d -> (b k) g n d"',
        '"b (g k) n d -> (b k) g n d"',
    ),
    Mutant(
        "a prompt's queries do not score themselves",
        A + "torch_prompt",
        "(placed[..., :seen] > position[:, tile])",
        "(placed[..., :seen] >= position[:, tile])",
    ),
    Mutant(
        "a tile of prompt scores repeats the last query of the one before it",
        A + "torch_prompt",
        "seen = min(tile.stop, slots) if in_order else slots\n",
        "tile = slice(max(0, tile.start - 1), tile.stop)\n"
        "            seen = min(tile.stop, slots) if in_order else slots\n",
    ),
    Mutant(
        "a prompt's queries do not see themselves where no mask is needed",
        A + "torch_prompt",
        'float("-inf"), device=query.device).triu(1)',
        'float("-inf"), device=query.device).triu(0)',
    ),
    Mutant(
        "of a padded prompt only the slots before a tile are seen",
        A + "torch_prompt",
        "seen = min(tile.stop, slots) if in_order else slots\n",
        "seen = min(tile.start + 1, slots) if in_order else slots\n",
    ),
    Mutant(
        "a generated token does not see the first one where scores are read",
        R + "token_pass",
        "state.position < 0, formula",
        "state.position <= 0, formula",
    ),
    # observe
    Mutant(
        "the sum is not decayed",
        S + "memory",
        "folded = memory * leaf.memory_value + score",
        "folded = memory + score",
    ),
    Mutant(
        "the maximum is not decayed",
        S + "memory",
        "torch.maximum(memory * leaf.memory_value, score)",
        "torch.maximum(memory, score)",
    ),
    Mutant(
        "a hit is stamped with the clock before it",
        S + "memory",
        "now = t[:, None, None].to(memory.dtype)",
        "now = (t - 1)[:, None, None].to(memory.dtype)",
    ),
    Mutant(
        "the longest gap is the latest gap",
        S + "memory",
        "torch.maximum(gap, now - memory)",
        "now - memory",
    ),
    Mutant(
        "rows that bring no token to a pass observe it",
        R + "pool",
        "units = active[:, None, None] & sight.state.resident_units(sight.state.pools[self.name])",
        "units = sight.state.resident_units(sight.state.pools[self.name])",
    ),
    Mutant(
        "units of a prompt that are still empty remember it",
        R + "pool",
        "units = active[:, None, None] & sight.state.resident_units(sight.state.pools[self.name])",
        "units = active[:, None, None]",
    ),
    Mutant(
        "query heads are averaged over all rows",
        A + "columns",
        'by_head.sum(2) if how == "sum" else by_head.mean(2)',
        'by_head.sum(2) if how == "sum" else by_head.mean((0, 2), keepdim=True).squeeze(2).expand_as(by_head[:, :, 0])',
    ),
    Mutant(
        "a page's score reads slots that hold no token",
        R + "state",
        'paged.masked_fill(self.pool_positions(pool) < 0, float("-inf")).amax(-1)',
        "paged.amax(-1)",
    ),
    Mutant(
        "heads draw the same random numbers",
        S + "place",
        "heads.expand_as(position)), position)",
        "torch.zeros_like(position)), position)",
    ),
    Mutant(
        "page bounds of queries before the page's first token count",
        S + "sight",
        'self._sum(side, box, self.state.unit_position(pool), "logits", "each")',
        'self._sum(side, box, self.state.unit_position(pool) * 0, "logits", "each")',
    ),
    Mutant(
        "smoothing looks at the neighbours before only",
        R + "pool",
        "F.pad(line, (width // 2, width // 2))",
        "F.pad(line, (width - 1, 0))",
    ),
    Mutant(
        "softmax runs over protected units too",
        R + "pool",
        '            logits = score.masked_fill(~candidate, float("-inf"))\n            return',
        "            logits = score\n            return",
    ),
    # quantities
    Mutant(
        "budgets and windows are rounded up",
        R + "quantities",
        "else numerator // denominator",
        "else -(-numerator // denominator)",
    ),
    Mutant(
        "a share of hits is rounded down",
        R + "quantities",
        "-((-numerator * count) // denominator)",
        "(numerator * count) // denominator",
    ),
    Mutant(
        "seen() is read before admission",
        R + "pool",
        "= state.seen(pool)\n",
        "= state.seen(pool) - 1\n",
    ),
    # update
    Mutant(
        "the window is one short",
        R + "pool",
        "edge = clock.seen[:, None] - floored(self.window, values)",
        "edge = clock.seen[:, None] - floored(self.window, values) + 1",
    ),
    Mutant("one more first token is pinned", R + "pool", "ordinal >= _each(", "ordinal > _each("),
    Mutant(
        "the newest page is not protected",
        R + "pool",
        "free[state.rows, state.heads, state.newest_unit(pool)] = False",
        "pass",
    ),
    Mutant(
        "of equal scores the newer goes first",
        R + "pool",
        "torch.add(place, ordered.long(), alpha=1 << 32)",
        "torch.add(0x7FFFFFFF - place, ordered.long(), alpha=1 << 32)",
    ),
    Mutant(
        "scores of different sign are compared as bits",
        R + "pool",
        "ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)",
        "ordered = bits",
    ),
    Mutant(
        "a page that is over the budget in part stays",
        R + "evict",
        "(count * page - budget + page - 1) // page",
        "(count * page - budget) // page",
    ),
    Mutant(
        "protected units go where nothing else is left",
        R + "evict",
        "gone = (steps < excess[..., None]) & (key < LAST_KEY)",
        "gone = steps < excess[..., None]",
    ),
    Mutant(
        "the same where one unit goes at a time",
        R + "evict",
        "gone = candidate.gather(-1, victim) & (excess > 0)[..., None]",
        "gone = (excess > 0)[..., None]",
    ),
    Mutant(
        "updates fire one step early",
        R + "evict",
        "clocks.t % pool.cadence == 0",
        "(clocks.t + 1) % pool.cadence == 0",
    ),
    Mutant(
        "freed units are written one place too far into the ring",
        R + "evict",
        "index = tail[..., None]\n",
        "index = tail[..., None] + 1\n",
    ),
    Mutant(
        "a layer's heads decide by the highest score, not the mean",
        R + "evict",
        "gather(score).mean(1, keepdim=True)",
        "gather(score).amax(1, keepdim=True)",
    ),
    Mutant(
        "units survive updates that did not fire",
        R + "evict",
        "survivor.copy_(now if due is None else torch.where(due[:, None, None], now, survivor))",
        "survivor.copy_(now)",
    ),
    Mutant(
        "size() is recorded where the cadence did not fire",
        R + "evict",
        "size.copy_(now if due is None else torch.where(due[:, None], now, size))",
        "size.copy_(now)",
    ),
    # heads that share a budget, and slots
    Mutant(
        "what a head wins is rounded down",
        R + "across_heads",
        "(2 * mixed + whole) // (2 * whole)",
        "mixed // whole",
    ),
    Mutant(
        "heads win one place more than there is",
        R + "across_heads",
        "losers = candidate.sum((1, 2)) - room.sum(1)",
        "losers = candidate.sum((1, 2)) - room.sum(1) - 1",
    ),
    Mutant(
        "heads attend to each other's tokens",
        A + "shared",
        "foreign = owner[:, None] != heads[:, None]",
        "foreign = (owner[:, None] < 0).expand(-1, len(heads), -1)",
    ),
    Mutant(
        "a shared token is written down as the first head's",
        R + "shared_slots",
        "torch.where(position >= 0, owner, -1)",
        "torch.where(position >= 0, 0, -1)",
    ),
    # clocks, turns and packing
    Mutant(
        "padding counts as prompt",
        R + "clocks",
        "        tokens = valid.sum(1)\n",
        "        tokens = torch.full_like(self.t, valid.shape[1])\n",
    ),
    Mutant(
        "rows share one clock of positions",
        R + "clocks",
        "self.position.copy_(self.prompt_len + self.t)",
        "self.position.copy_((self.prompt_len + self.t).max())",
    ),
    Mutant(
        "the open page stays open over a new turn",
        R + "clocks",
        "            clock.close(begins)\n",
        "",
    ),
    Mutant(
        "the newest page of a prompt takes one token more",
        R + "clocks",
        "torch.where(self.turn_tokens > 0, (self.turn_tokens - 1) % page + 1, self.fill)",
        "torch.where(self.turn_tokens > 0, (self.turn_tokens - 1) % page, self.fill)",
    ),
    Mutant(
        "a later turn's tokens are counted twice in their pool's order",
        R + "turn",
        "ordinal = (clock.seen - clock.turn_tokens)[row] + place",
        "ordinal = clock.seen[row] + place",
    ),
    Mutant(
        "a chunk of the prompt opens a page of its own",
        R + "turn",
        "    return -clock.heard % pool.page\n",
        "    return torch.zeros_like(clock.heard)\n",
    ),
    Mutant(
        "an update after a chunk is told of the whole prompt",
        R + "chunks",
        "    now.prompt_len, now.turn_tokens = clocks.prompt_len.clone(), inside.sum(1)\n",
        "    now.prompt_len, now.turn_tokens = clocks.prompt_len, inside.sum(1)\n",
    ),
    Mutant(
        "where positions are compact, keys stay where they were rotated",
        R + "compact",
        "ranks(position, position), self.frequencies",
        "position.clamp(min=0), self.frequencies",
    ),
    Mutant(
        "a window's queries stay where they were rotated",
        R + "core",
        "                queries = self.compact.queries(queries, placed, position)\n",
        "                queries = queries\n",
    ),
    Mutant(
        "what a pool above has taken enters the next one as well",
        R + "clocks",
        "        mine = mine & ~traits[trait]\n",
        "        pass\n",
    ),
    Mutant(
        "the host believes that all of a turn went to every pool",
        R + "clocks",
        "own = self.turn_tokens.tolist() if self.stream.traits else lengths",
        "own = lengths",
    ),
    Mutant(
        "a page with a special token is dropped like any other",
        R + "pool",
        "~clocks.is_special(state.pool_positions(pool).flatten(2)))",
        "clocks.is_special(state.pool_positions(pool).flatten(2)).fill_(True))",
    ),
    Mutant(
        "a special token is noted at its column",
        R + "clocks",
        "self.special[row, position[row, column]] = True",
        "self.special[row, column] = True",
    ),
    Mutant(
        "memory is lost when a turn is packed",
        R + "packing",
        'name.endswith(".ring"):',
        'name.endswith(".ring") or ".memory." in name:',
    ),
    Mutant(
        "rows that were silent in a turn are updated at its end",
        R + "prompt_pass",
        "spoken = clocks.turn_tokens > 0",
        "spoken = clocks.turn_tokens >= 0",
    ),
    Mutant(
        "rows are reordered without what their units remember",
        R + "cache",
        "            tensor.copy_(tensor.index_select(0, rows.to(tensor.device)))\n",
        "            if tensor.dim() != 3 or tensor.dtype != torch.float32:\n"
        "                tensor.copy_(tensor.index_select(0, rows.to(tensor.device)))\n",
    ),
)
