"""A token ahead: answers are those of plain decoding, whatever the module says, and only fewer passes are made.

Anchors: `decode` token by token, the chain rule in float64 for what is drawn, and transformers' own module.
"""

import copy
import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tiny_families import model_of

from distill.errors import UserError
from distill.models.ahead import FILE, TokenAhead, decode_ahead, load_ahead, shifted
from distill.models.decode import Sampling, decode
from distill.models.load import load_model

PROMPTS = [[5, 9, 3], [7], [4, 8, 15, 16, 23, 42], [11, 12], [60, 61, 62, 63, 64]]
FAMILIES = ["llama", "qwen3_moe", "deepseek_v3"]


def spoiled(ahead: TokenAhead, how: float) -> TokenAhead:
    """A module whose drafts are mostly wrong."""
    with torch.no_grad():
        ahead.eh_proj.weight.add_(
            how * torch.randn(ahead.eh_proj.weight.shape, generator=torch.Generator().manual_seed(3))
        )
    return ahead


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "sampling", [Sampling(max_new_tokens=12), Sampling(0.9, 0.95, max_new_tokens=12)], ids=str
)
def test_answers_are_those_of_plain_decoding(family, sampling):
    """Prompts of all lengths in one batch and, with end tokens that do come up, one at a time; in float64."""
    model = model_of(family).double()
    model.set_experts_implementation("eager")  # grouped kernels know no float64
    ahead = TokenAhead(model).double()
    keys = [(0, i) for i in range(len(PROMPTS))]
    free = decode(model, PROMPTS, sampling, eos_ids=set(), pad_id=0, keys=keys, vocab_limit=90)
    ends = {free[0].ids[5], free[2].ids[8], free[3].ids[0]}
    for module in (ahead, spoiled(TokenAhead(model).double(), 3.0)):
        for eos in (set(), ends):
            plain = decode(model, PROMPTS, sampling, eos_ids=eos, pad_id=0, keys=keys, vocab_limit=90)
            given = {"eos_ids": eos, "pad_id": 0, "vocab_limit": 90}
            found, drafts = decode_ahead(model, module, PROMPTS, sampling, keys=keys, **given)
            for mine, wanted in zip(found, plain):
                assert mine.ids == wanted.ids and mine.finish_reason == wanted.finish_reason
                np.testing.assert_allclose(mine.logprobs, wanted.logprobs, atol=1e-5)
            for prompt, key, wanted in zip(PROMPTS, keys, plain if eos else ()):
                (alone,), _ = decode_ahead(model, module, [prompt], sampling, keys=[key], **given)
                assert alone.ids == wanted.ids and alone.finish_reason == wanted.finish_reason
            produced = sum(len(c.ids) for c in found)
            assert produced >= drafts.taken + len(PROMPTS) and drafts.taken <= drafts.drafted


def spoiled_model(model, how: float):
    """A causal LM of the same tokens that is mostly, but not always, of the same opinion."""
    draft, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in draft.parameters():
            weight.add_(how * weight.std() * torch.randn(weight.shape, generator=generator).to(weight.dtype))
    return draft


@pytest.mark.parametrize(
    ("family", "guesses"), [("llama", 1), ("llama", 4), ("qwen3_moe", 3), ("deepseek_v3", 3)]
)
@pytest.mark.parametrize(
    "sampling", [Sampling(max_new_tokens=12), Sampling(0.9, 0.95, max_new_tokens=12)], ids=str
)
def test_answers_with_another_models_guesses_are_those_of_plain_decoding(family, guesses, sampling):
    """Together, two at a time and alone; some guesses are taken and some are not; another family guesses as well."""
    model = model_of(family).double()
    model.set_experts_implementation("eager")
    keys = [(0, i) for i in range(len(PROMPTS))]
    free = decode(model, PROMPTS, sampling, eos_ids=set(), pad_id=0, keys=keys, vocab_limit=90)
    ends = {free[0].ids[5], free[2].ids[8], free[3].ids[0]}
    near, other = (
        spoiled_model(model, 0.15),
        model_of("qwen3", num_hidden_layers=2, layer_types=None).double(),
    )
    for eos in (set(), ends):
        plain = decode(model, PROMPTS, sampling, eos_ids=eos, pad_id=0, keys=keys, vocab_limit=90)
        for draft, size in ((near, None), (near, 2), (other, None), *([] if eos else [(near, 1)])):
            heard = {}
            found, drafts = decode_ahead(model, draft, PROMPTS, sampling, keys=keys, eos_ids=eos, pad_id=0,
                                         vocab_limit=90, guesses=guesses, batch_size=size,
                                         on_finish=heard.__setitem__)  # fmt: skip
            assert [heard[i] for i in range(len(PROMPTS))] == found
            for mine, wanted in zip(found, plain):
                assert mine.ids == wanted.ids and mine.finish_reason == wanted.finish_reason
                np.testing.assert_allclose(mine.logprobs, wanted.logprobs, atol=1e-5)
            if draft is near and not eos:
                assert 0 < drafts.taken < drafts.drafted
            if size == 1:
                assert sum(len(c.ids) for c in found) == len(PROMPTS) + drafts.passes + drafts.taken


@pytest.mark.parametrize(("guesses", "passes", "taken"), [(1, 4, 4), (3, 2, 6), (16, 1, 7)])
def test_guesses_that_are_right_are_all_taken(guesses, passes, taken):
    """The model itself as its draft: of 9 tokens one is the prompt's, then 1 + guesses a pass; the last needs none."""
    model = model_of("llama").double()
    sampling, keys = Sampling(1.0, max_new_tokens=9), [(1, 0)]
    (answer,) = decode(model, [PROMPTS[0]], sampling, eos_ids=set(), pad_id=0, keys=keys)
    (found,), drafts = decode_ahead(model, copy.deepcopy(model), [PROMPTS[0]], sampling, eos_ids=set(), pad_id=0,
                                    keys=keys, guesses=guesses)  # fmt: skip
    assert found.ids == answer.ids
    assert (drafts.passes, drafts.taken, drafts.acceptance) == (passes, taken, 1.0)


def test_columns_that_no_row_took_leave_the_caches():
    """A draft that is always wrong: the model sees a prompt and an answer, and no column of a guess is kept."""
    model, sampling = model_of("llama").double(), Sampling(max_new_tokens=12)
    wrong, widths, theirs = copy.deepcopy(model), [], []
    with torch.no_grad():
        wrong.model.norm.weight.neg_()
    for who, seen in ((model, widths), (wrong, theirs)):
        who.register_forward_pre_hook(
            lambda _m, _args, given, seen=seen: seen.append(given["attention_mask"].shape[1]),
            with_kwargs=True,
        )
    _, drafts = decode_ahead(model, wrong, [PROMPTS[0]], sampling, eos_ids=set(), pad_id=0, guesses=3)
    assert drafts.taken == 0 and drafts.passes == 11
    guesses = {n: min(3, 11 - n) for n in range(1, 12)}
    assert widths == [3, *(3 + n + count for n, count in guesses.items())]
    assert theirs == [3 + n + further for n, count in guesses.items() for further in range(count)]


def test_what_is_drawn_has_the_models_own_distribution():
    """Pairs of tokens over 6,000 keys against the chain rule of the model, in float64: no draft bends it."""
    model = model_of("llama").double()
    with torch.no_grad():
        model.lm_head.weight.mul_(3)  # a distribution with a shape
    size, count, prompt = 6, 6000, [5, 9, 3]
    sampling = Sampling(1.0, max_new_tokens=2)
    found, drafts = decode_ahead(model, TokenAhead(model).double(), [prompt] * count, sampling, eos_ids=set(), pad_id=0,
                                 keys=[(2, i) for i in range(count)], vocab_limit=size)  # fmt: skip
    with torch.no_grad():
        rows = torch.tensor([[*prompt, a] for a in range(size)])
        logs = model(input_ids=rows).logits[:, -2:, :size].log_softmax(-1)
    expected = (logs[0, 0][:, None] + logs[:, 1]).exp().flatten().numpy() * count
    counts = np.bincount([c.ids[0] * size + c.ids[1] for c in found], minlength=size**2)
    assert chisquare(counts, expected / expected.sum() * count).pvalue > 0.001
    assert not drafts.taken, "two tokens leave a draft of the second no place: it is the last"


def test_what_is_drawn_beside_another_models_guesses_has_the_models_own_distribution():
    """Triples of tokens over 6,000 keys against the chain rule in float64; some guesses are taken, some are not."""
    model = model_of("llama").double()
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    size, count, prompt = 4, 6000, [5, 9, 3]
    found, drafts = decode_ahead(model, spoiled_model(model, 0.5), [prompt] * count, Sampling(1.0, max_new_tokens=3),
                                 eos_ids=set(), pad_id=0, keys=[(3, i) for i in range(count)], vocab_limit=size,
                                 guesses=2)  # fmt: skip
    assert 0.2 < drafts.acceptance < 0.9
    triples = list(itertools.product(range(size), repeat=3))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *t] for t in triples])).logits[:, 2:5, :size]
    logs = logits.log_softmax(-1).gather(2, torch.tensor(triples)[:, :, None])[..., 0].sum(1)
    expected = logs.exp().numpy() * count
    counts = np.bincount([c.ids[0] * size**2 + c.ids[1] * size + c.ids[2] for c in found], minlength=size**3)
    assert expected.min() > 5
    assert chisquare(counts, expected).pvalue > 0.001


@pytest.mark.parametrize("family", FAMILIES)
def test_a_module_reads_a_token_beside_the_state_before_it(family):
    """Row by row without padding; what stands later in the row is not seen; a row's first column has no state."""
    model, generator = model_of(family), torch.Generator().manual_seed(0)
    ahead = TokenAhead(model)
    ids = torch.randint(3, 90, (2, 7), generator=generator)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    states = torch.randn(2, 7, model.config.hidden_size, generator=generator)
    embed = model.get_input_embeddings()
    with torch.no_grad():
        whole = ahead(shifted(states, mask), embed(ids), attention_mask=mask)
        for row, length in ((0, 7), (1, 4)):
            before = torch.cat([torch.zeros(1, 1, states.shape[-1]), states[row : row + 1, : length - 1]], 1)
            alone = ahead(before, embed(ids[row : row + 1, :length]))
            torch.testing.assert_close(whole[row, :length], alone[0], rtol=1e-4, atol=1e-5)
            short = ahead(before[:, :3], embed(ids[row : row + 1, :3]))
            torch.testing.assert_close(alone[:, :3], short, rtol=1e-4, atol=1e-5)


def test_it_computes_what_transformers_own_module_computes():
    """The same weights in transformers' MtpModel, where this version has one."""
    layers = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(layers, "MtpModel"):
        pytest.skip("transformers has no MtpModel")
    model = model_of("deepseek_v3")
    model.config.num_nextn_predict_layers = 1
    theirs, ours = layers.MtpModel(model, 1), TokenAhead(model)
    renamed = {f"mtp_block.{k.removeprefix('body.layers.0.')}" if "layers.0." in k else
               k.replace("body.norm", "post_norm"): v for k, v in ours.state_dict().items()}  # fmt: skip
    theirs.layers[0].load_state_dict(renamed)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (1, 6), generator=generator)
    states = torch.randn(1, 6, model.config.hidden_size, generator=generator)
    from transformers.cache_utils import DynamicCache

    with torch.no_grad():
        found = ours(states, model.get_input_embeddings()(ids))
        cache = DynamicCache(config=theirs.config)
        wanted = theirs.forward_layer(0, states, torch.arange(6)[None], cache, input_ids=ids)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_it_is_kept_beside_the_weights_and_read_again(hub, tmp_path):
    model = load_model(hub["llama"], "fp32")
    model.save_pretrained(tmp_path)
    assert load_ahead(str(tmp_path), model) is None
    ahead = spoiled(TokenAhead(model), 0.1)
    ahead.save(tmp_path)
    plain = load_model(str(tmp_path), "fp32")  # is not disturbed by the file beside it
    again = load_ahead(str(tmp_path), plain)
    assert all(torch.equal(a, b) for a, b in zip(ahead.state_dict().values(), again.state_dict().values()))
    (tmp_path / FILE).write_bytes(b"nothing")
    with pytest.raises(UserError, match="is no module of this model"):
        load_ahead(str(tmp_path), plain)
    with pytest.raises(UserError, match="keys to sample"):
        decode_ahead(model, ahead, [[3]], Sampling(1.0), eos_ids=set(), pad_id=0)
    for pair in ((model, model_of("gemma3_text")), (model_of("gemma3_text"), model)):
        with pytest.raises(UserError, match="full attention in every layer"):
            decode_ahead(*pair, [[3]], Sampling(), eos_ids=set(), pad_id=0)
