"""A vision-language model under a policy that tells images from text: random weights, tiny pictures."""

import copy

import pytest
import torch

from kvpolicy import CacheError, UsageError
from kvpolicy.language import loads_policy
from kvpolicy.patching import apply, cache_for, remove
from kvpolicy.runtime import decode_loop
from kvpolicy.runtime.waiting import no_waiting
from kvpolicy.testing.live import LiveAgreement
from kvpolicy.testing.models import random_model

IMAGE, START, END = 94, 95, 96
GREEDY = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}


def policy(images, rest="rest: {admit: all}"):
    return loads_policy(
        f"kvpolicy: 1\nname: seeing\npools:\n  images: {{admit: {{modality: image}}, {images}}}\n  {rest}\n"
    )


def said(before=5, after=7, grids=((1, 4, 6), (1, 8, 4)), seed=1):
    """Two rows with a picture each, of 6 and of 8 tokens; the shorter row is padded on its left."""
    random = torch.Generator().manual_seed(seed)

    def text(count):
        return torch.randint(2, 93, (count,), generator=random)

    rows = []
    for grid in grids:
        picture = torch.full((grid[1] * grid[2] // 4,), IMAGE)
        rows.append(torch.cat([text(before), torch.tensor([START]), picture, torch.tensor([END]), text(after)]))
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
    pixels = sum(grid[1] * grid[2] for grid in grids)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(pixels, 3 * 2 * 2, generator=random),
        "image_grid_thw": torch.tensor(grids),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


@pytest.fixture
def seeing(build):
    return build("qwen2_5_vl")


def kept(cache, row, layer=0, head=0):
    return sorted(set(cache.positions(layer)[row, head].tolist()) - {-1})


def test_a_live_model_keeps_what_the_oracle_keeps(seeing):
    """Images by the question, special tokens pinned, text under a budget; padded rows, with their pictures."""
    rest = "rest: {admit: all, budget: 12, window: 3, pinned: {tokens: special}, scorer: {signal: attention}}"
    by_question = "budget: 3, scorer: {signal: attention, queries: {last: 4}}, update: prompt-end"
    apply(seeing, policy(by_question, rest), special_tokens=[START, END])
    live = LiveAgreement(seeing, prompt=(20, 22), max_new_tokens=20, batch=2)
    inputs = said()
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    live.feed(ids, mask, position_ids=None, **inputs)
    for step in range(20):
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
        places = mask.sum(1, keepdim=True) - 1 + seeing.model.rope_deltas
        live.feed(torch.full((2, 1), 3 + step), mask, position_ids=places)
    assert live.agreement.compared == 21 * 2 * 3 * 2
    assert all(counts["evicted"] > 0 for counts in live.cache.stats()["pools"].values())
    assert live.cache.bytes == live.cache.plan.bytes


@pytest.mark.parametrize("family", ["llava", "llama4"])
def test_a_model_whose_decoder_is_anothers(greedy, family):
    """Pictures by ids alone."""
    model, random = random_model(family), torch.Generator().manual_seed(5)
    ids = torch.randint(2, 90, (2, 15), generator=random)
    ids[:, 3:7] = IMAGE
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8, generator=random)}
    expected = model.generate(**inputs, **GREEDY, max_new_tokens=64)
    apply(model, policy("budget: 4, update: prompt-end"))
    got = model.generate(**inputs, **GREEDY, max_new_tokens=64)
    for one, other in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    remove(model)
    again = model.generate(**inputs, **GREEDY, max_new_tokens=64)
    assert all(torch.equal(one, other) for one, other in zip(again.logits, expected.logits, strict=True))
    apply(model, policy("budget: 1, update: prompt-end"))
    out = model.generate(**inputs, **greedy, return_dict_in_generate=True)
    assert kept(out.past_key_values, 0) == [0, 1, 2, *range(6, 15 + 23)]
    lean = model.generate(**inputs, **greedy, custom_generate=decode_loop)
    assert torch.equal(lean, out.sequences)


@pytest.mark.parametrize(
    ("family", "compile"), [("qwen2_5_vl", None), ("qwen2_5_vl", "eager"), ("qwen3_vl", None), ("qwen3_5", None)]
)
def test_room_for_everything_is_the_unpatched_model(family, compile):
    seeing = random_model(family)
    expected = seeing.generate(**said(), **GREEDY, max_new_tokens=64)
    apply(seeing, policy("budget: 100, scorer: {signal: attention, queries: all}, update: prompt-end"), compile=compile)
    got = seeing.generate(**said(), **GREEDY, max_new_tokens=64)
    assert torch.equal(got.sequences, expected.sequences)
    for one, other in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    pools = got.past_key_values.stats()["pools"]
    heads = len(got.past_key_values.governed) * 2
    assert (pools["images"]["seen"], pools["images"]["evicted"]) == ((6 + 8) * heads, 0)
    remove(seeing)
    again = seeing.generate(**said(), **GREEDY, max_new_tokens=64)
    assert all(torch.equal(one, other) for one, other in zip(again.logits, expected.logits, strict=True))


def test_only_images_leave_and_those_that_stay_keep_their_places(seeing):
    """Steps after the eviction give the logits of a model that sees all but what left, every token where it was."""
    plain, inputs = copy.deepcopy(seeing), said(grids=((1, 4, 6),))
    apply(seeing, policy("budget: 2, update: prompt-end"))  # of the 6 image tokens, at 6..11, the newest stay
    out = seeing.generate(**inputs, **GREEDY, max_new_tokens=12)
    length = inputs["input_ids"].shape[1]
    assert kept(out.past_key_values, 0) == [*range(6), *range(10, length + 11)]

    ids = out.sequences
    types = (ids == IMAGE).int()
    places, _ = plain.model.get_rope_index(ids, types, image_grid_thw=inputs["image_grid_thw"])
    visible = torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
    visible[length:, 6:10] = False
    with torch.no_grad():
        reference = plain(
            input_ids=ids,
            attention_mask=torch.where(visible, 0.0, float("-inf"))[None, None],
            position_ids=places,
            pixel_values=inputs["pixel_values"],
            image_grid_thw=inputs["image_grid_thw"],
        ).logits[0]
    got = torch.cat(out.logits)
    torch.testing.assert_close(got, reference[length - 1 : -1], rtol=1e-4, atol=1e-4)


def test_a_padded_row_is_what_it_is_alone(seeing):
    apply(seeing, policy("budget: 3, scorer: {signal: attention, queries: all}, update: prompt-end"))
    both = seeing.generate(**said(), **GREEDY, max_new_tokens=8)
    inputs = said()
    pad, pixels = int((inputs["attention_mask"][0] == 0).sum()), 4 * 6
    alone = {name: value[:1, pad:] for name, value in inputs.items() if value.shape[0] == 2 and value.shape[1] > 3}
    alone |= {"pixel_values": inputs["pixel_values"][:pixels], "image_grid_thw": inputs["image_grid_thw"][:1]}
    one = seeing.generate(**alone, **GREEDY, max_new_tokens=8)
    assert torch.equal(one.sequences[0, -8:], both.sequences[0, -8:])
    for layer in range(3):
        for head in range(2):
            assert kept(one.past_key_values, 0, layer, head) == kept(both.past_key_values, 0, layer, head)


def test_the_lean_loop_sees_images_too(seeing):
    apply(seeing, policy("budget: 3, scorer: {signal: attention, queries: all}, update: prompt-end"))
    expected = seeing.generate(**said(), do_sample=False, max_new_tokens=20)
    lean = seeing.generate(**said(), do_sample=False, max_new_tokens=20, custom_generate=decode_loop)
    assert torch.equal(lean, expected)


def test_ids_alone_tell_what_is_an_image(seeing):
    apply(seeing, policy("budget: 1, update: prompt-end"))
    cache = cache_for(seeing, prompt=24, max_new_tokens=4)
    with torch.no_grad():
        seeing(input_ids=said(grids=((1, 4, 6),))["input_ids"], past_key_values=cache)
    assert kept(cache, 0) == [*range(6), *range(11, 20)]


def test_embeddings_do_not_tell_and_somebody_else_may(seeing):
    apply(seeing, policy("budget: 1, update: prompt-end"))
    cache = cache_for(seeing, prompt=9, max_new_tokens=4)
    embeds = torch.randn(1, 9, 32)
    with torch.no_grad(), pytest.raises(CacheError, match=r"embeddings do not show .* cache\.tell\(modality="):
        seeing(inputs_embeds=embeds, past_key_values=cache)
    with torch.no_grad():
        cache.tell(modality=torch.tensor([[0, 1, 1, 0, 1, 2, 0, 0, 0]]))
        seeing(inputs_embeds=embeds, past_key_values=cache)
        assert kept(cache, 0) == [0, 3, 4, 5, 6, 7, 8]  # 2 is not an image
        seeing(inputs_embeds=embeds[:, :1], past_key_values=cache)  # of a generated token nothing need be told


def test_a_later_turn_brings_another_picture(seeing):
    apply(seeing, policy("budget: 2, update: prompt-end"))
    cache = cache_for(seeing, prompt=48, max_new_tokens=8, turns=2)
    inputs = said(grids=((1, 4, 6),))
    out = seeing.generate(**inputs, do_sample=False, max_new_tokens=4, past_key_values=cache)
    new = torch.tensor([[7, START, IMAGE, IMAGE, IMAGE, END, 9]])
    ids = torch.cat([out, new], 1)
    with torch.no_grad():  # one generated token is still to be read
        seeing(input_ids=ids[:, cache.get_seq_length() :], past_key_values=cache)
    begun = out.shape[1]
    assert kept(cache, 0) == [*range(6), *range(12, begun + 2), begun + 3, begun + 4, *range(begun + 5, begun + 7)]


def test_copies_tell_their_caches_as_well(seeing):
    apply(seeing, policy("budget: 2, update: prompt-end"))
    again = copy.deepcopy(seeing)
    out = again.generate(**said(), **GREEDY, max_new_tokens=4)
    assert out.past_key_values.stats()["pools"]["images"]["evicted"] == (4 + 6) * 3 * 2
    remove(again)
    assert not again.model._forward_pre_hooks and not again.model.language_model._forward_pre_hooks
    assert seeing.model._forward_pre_hooks


def test_nobody_is_told_where_no_policy_asks(seeing, policies):
    apply(seeing, policies["window"])
    assert not seeing.model._forward_pre_hooks


# Special tokens -------------------------------------------------------------------------------------------------------

PINNING = "kvpolicy: 1\nname: pinning\npools: {all: {admit: all, budget: 4, pinned: {tokens: special}}}\n"


class Tokenizer:
    all_special_ids = (40, 41)


@pytest.mark.parametrize(
    ("told", "special"),
    [(None, {0, 1}), ([40], {40}), (Tokenizer(), {40, 41}), (torch.tensor([41, 0]), {0, 41})],
    ids=["configs", "list", "tokenizer", "tensor"],
)
def test_special_tokens_stay(build, prompt, told, special):
    model = apply(build(), loads_policy(PINNING), special_tokens=told)
    prompt[0, [0, 3, 5, 8]] = torch.tensor([1, 40, 0, 41])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY, max_new_tokens=9)
    for row in range(2):
        pinned = {place for place in range(17) if int(prompt[row, place]) in special}
        assert pinned <= set(kept(out.past_key_values, row))
        assert len(kept(out.past_key_values, row)) == max(4, len(pinned))


def test_where_no_special_token_is_known_one_sentence_says_what_to_do(build):
    nameless = {"pad_token_id": None, "bos_token_id": None}
    model = build(**nameless)
    model.generation_config.pad_token_id = model.generation_config.bos_token_id = None
    with pytest.raises(UsageError, match=r"pinning asks which .* special_tokens=tokenizer\), or a list of ids"):
        apply(model, loads_policy(PINNING))
    assert "_kvpolicy" not in model.__dict__
    apply(model, loads_policy(PINNING), special_tokens=[7])


def test_special_tokens_are_ids(build):
    with pytest.raises(UsageError, match="special_tokens are ids, or a tokenizer that knows them, not a float"):
        apply(build(), loads_policy(PINNING), special_tokens=0.5)


def test_generated_steps_ask_the_device_nothing(build, prompt):
    model = apply(build(), loads_policy(PINNING))
    cache = cache_for(model, prompt=17, max_new_tokens=4, batch=2)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        with no_waiting():
            model(prompt[:, :1], past_key_values=cache, position_ids=torch.full((2, 1), 17))
