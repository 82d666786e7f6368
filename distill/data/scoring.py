"""A teacher's opinion of text that is already there: one forward pass over prompt and completion.

`distill generate` runs this after decoding when the recipe asks to keep signals, and instead of decoding when
`prompts.completion_column` gives the text (somebody else's answers, scored by this teacher):

    generate: {signal: {kind: sampled, k: 32}}       # then train.objectives: [{name: sampled_cross_entropy}]

    score_rows(model, rows, form, keys=keys, pad_id=0, vocabulary=151_936)     # per row: logprobs, two blobs

`sampled` draws its K tokens by systematic sampling (Madow 1949; as resampling in particle filters: Kitagawa
1996, appendix): one uniform number places K equidistant points on the cumulative distribution. Token i comes
floor(K p_i) or ceil(K p_i) times, and K p_i times on average. So it is as unbiased as the K independent
draws of random sampling distillation (arXiv 2503.16870), with less noise and the same storage: likely tokens
are exact to 1 / K.

`hidden` keeps what the output head reads of every token, and the head once, in a file beside the rows: together
they are the whole distribution, to the rounding of the states, at 2 d bytes a token and without the teacher's body.

Shapes: B rows, T time, N kept tokens, V vocabulary, K stored tokens, n tokens of a chunk, d hidden size.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.config.section import Signal
from distill.data.batches import TokenRows
from distill.data.signals import HIDDEN, SignalFormat, encode_hidden, encode_sampled, encode_top_k
from distill.data.teachers import Answer, LocalTeacher, Question, closed, taught
from distill.data.vllm import VllmTeacher
from distill.errors import UserError
from distill.models.chat import continuation, prompt_ids, text_ids
from distill.models.decode import Decoder, Sampling, copies_rows, row_seed, uniforms
from distill.models.hooks import AtHead, Head, Hooks, KeptLogits, at_places, output_head
from distill.models.layers import rows_apart
from distill.models.load import load_config, tokenizer_fingerprint
from distill.storage import SIGNAL_COLUMNS, read_rows

BATCH_LOGITS = 2**27  # logits of one forward pass, at most: 512 MiB in float32; a longer row goes alone
CHUNK_LOGITS = 2**22  # of which so many are made into float64 probabilities at a time
COPIED = 2**28  # bytes of keys and values that options behind their contexts take at a time
CHUNK_LOGITS_ON_ACCELERATORS = 2**25  # 220 rows at V = 151,936, 256 MiB in float64: few, large kernels


@dataclass(frozen=True)
class RowScore:
    """Of one row of T completion tokens. logprobs [T]: natural logs, of the tokens that stand there."""

    logprobs: list[float]
    signal_ids: bytes | None
    signal_values: bytes | None


def signal_format(section: Signal, teacher) -> SignalFormat | None:
    """The format of what this teacher's signals will be stored in; None where the recipe wants none.

    Raises UserError for a teacher whose logits cannot be had.
    """
    if section.kind == "none":
        return None
    if not isinstance(teacher, LocalTeacher) and not getattr(teacher, "tokenizer", None):
        raise UserError(
            f"generate.signal needs the logits of '{teacher.name}', which are at an endpoint: name the folder of its "
            "tokenizer in teacher.endpoint.tokenizer (a vLLM server then scores the answers), set "
            "generate.signal.kind=none, or load the teacher here"
        )
    if not isinstance(teacher, LocalTeacher) and section.kind != "top_k":
        raise UserError(
            f"generate.signal.kind={section.kind}: an endpoint and vLLM name their likeliest tokens alone; set "
            "kind=top_k, or load the teacher here (teacher.engine=transformers)"
        )
    identity = tokenizer_fingerprint(teacher.tokenizer)
    width = load_config(teacher.name).get_text_config().hidden_size if section.kind == HIDDEN else 0
    return SignalFormat.from_recipe(section, len(teacher.tokenizer), identity, width)


def signal_head(form: SignalFormat | None, teacher) -> Head | None:
    """The teacher's output head, without which signals of kind hidden mean nothing; None for other kinds.

    Raises UserError where the teacher's logits are not one matrix of its states.
    """
    return _plain_head(teacher.model, form.k).head() if form and form.kind == HIDDEN else None


def _plain_head(model, width: int) -> AtHead:
    at = AtHead(model)
    if not at.fusable or at.module.weight.shape[1] != width:
        raise UserError(
            f"generate.signal.kind=hidden: the output head of this {type(model).__name__} is not one plain matrix; use "
            "top_k or sampled"
        )
    return at


@torch.inference_mode()
def score_rows(
    model,
    rows: TokenRows,
    form: SignalFormat | None,
    *,
    keys: list[tuple],
    pad_id: int,
    vocabulary: int,
    batch_size: int = 64,
) -> list[RowScore]:
    """Teacher-forced scores of every row, in their order. Logits from `vocabulary` on stand for no token.

    keys: a tuple of ints and strings per row, which with the token's place fixes its draws: no batch size or
    order changes them. The model sees `batch_size` rows at most, fewer where V is large.
    """
    if form and form.kind == HIDDEN:
        return _score_states(model, rows, form, pad_id, vocabulary, batch_size)
    scores: list[RowScore | None] = [None] * len(rows)
    device = next(model.parameters()).device
    # Not the numbers that chose the text: given those, draws would be no fair sample.
    seeds = [row_seed(("signal", *key)) for key in keys]
    with KeptLogits(model) as kept:
        for indices in length_batches(rows, batch_size, max(1, BATCH_LOGITS // vocabulary)):
            batch = rows.collate(indices, pad_id).to(device)
            with rows_apart(batch.rows):
                logits = kept(batch.input_ids, batch.attention_mask, batch.places)[:, :vocabulary]  # [N, V]
            lengths = rows.completion_lengths[indices]
            seed = torch.tensor([seeds[i] for i in indices]).repeat_interleave(torch.from_numpy(lengths))
            place = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))
            u = uniforms(seed, place).to(device, non_blocking=True)
            columns = [column.cpu().numpy() for column in _summaries(logits, batch.targets, u, form)]
            for i, *parts in zip(indices, *(np.split(c, lengths.cumsum()[:-1]) for c in columns)):
                scores[i] = _encoded(form, *parts)
    return scores


def logprobs_behind(
    model, contexts: list[list[int]], texts: list[list[int]], *, pad_id: int, vocabulary: int
) -> list[list[float]]:
    """Natural logs of every token of `texts[i]` behind `contexts[i]`, all rows in one batch (a piece of `pieces`).

    A context that comes several times, as a question before its options, is read once, and each text after it from
    its cache. A model whose cache cannot be copied reads every row from its beginning.
    """
    if _repeat(contexts, texts) and copies_rows(model):
        return _behind(model, contexts, texts, pad_id, vocabulary)
    rows = TokenRows(contexts, texts)
    given = {"keys": [()] * len(rows), "pad_id": pad_id, "vocabulary": vocabulary, "batch_size": len(rows)}
    return [score.logprobs for score in score_rows(model, rows, None, **given)]


def pieces(
    contexts: list[list[int]], texts: list[list[int]], batch_size: int, vocabulary: int
) -> list[np.ndarray]:
    """Row numbers by length, in groups of at most `batch_size` rows and BATCH_LOGITS; those of one context together."""
    most = max(1, BATCH_LOGITS // vocabulary)
    if not _repeat(contexts, texts):
        return list(length_batches(TokenRows(contexts, texts), batch_size, most))
    found, held = [[]], 0
    order = sorted(range(len(texts)), key=lambda i: (len(contexts[i]), contexts[i]))
    for _, same in itertools.groupby(order, key=lambda i: contexts[i]):
        rows = list(same)
        tokens = sum(len(texts[i]) for i in rows)
        if found[-1] and (len(found[-1]) + len(rows) > batch_size or held + tokens > most):
            found.append([])
            held = 0
        found[-1] += rows
        held += tokens
    return [np.array(piece) for piece in found]


def _repeat(contexts: list[list[int]], texts: list[list[int]]) -> bool:
    """Whether reading each context once saves a quarter of the tokens: of options it does, of one BOS token not."""
    every = sum(map(len, contexts))
    return 4 * (every - sum(map(len, set(map(tuple, contexts))))) > every + sum(map(len, texts))


@torch.inference_mode()
def _behind(model, contexts, texts, pad_id: int, vocabulary: int) -> list[list[float]]:
    """`logprobs_behind` from the cache of each different context."""
    decoder = Decoder(model, contexts, Sampling(), set(), pad_id)
    places = {context: place for place, context in enumerate(dict.fromkeys(map(tuple, contexts)))}
    cache, logits = decoder.read(list(places))
    device = logits.device
    owner = torch.tensor([places[tuple(context)] for context in contexts], device=device)
    first = _said(
        logits[:, :vocabulary].index_select(0, owner),
        torch.tensor([text[0] for text in texts], device=device),
    )
    found = [[said] for said in first.tolist()]
    # The first token is said by the context; each of the others is said by the one before it.
    longer = [i for i, text in enumerate(texts) if len(text) > 1]
    kept = [(layer.keys, layer.values) for layer in cache.layers]
    each = sum(states.nbytes for both in kept for states in both) / len(places)
    size = max(1, int(COPIED // max(1.0, each)))
    for rows in (longer[start : start + size] for start in range(0, len(longer), size)):
        for layer, both in zip(cache.layers, kept):
            layer.hold(*(states.index_select(0, owner[rows]) for states in both))
        lengths = torch.tensor([len(contexts[i]) for i in rows], device=device)
        said = iter(_rest(decoder, cache, lengths, [texts[i] for i in rows], vocabulary))
        for i in rows:
            found[i] += [next(said) for _ in texts[i][1:]]
    return found


def _rest(decoder: Decoder, cache, lengths: Tensor, texts: list[list[int]], vocabulary: int) -> list[float]:
    """Of all tokens but the first of each text, one text after the other; the cache ends in contexts of `lengths` [O].

    They stand right behind the context, with padding at the end: windows count columns.
    """
    device, width, size = lengths.device, cache.get_seq_length(), max(map(len, texts))
    padded = torch.tensor([text + [decoder.pad_id] * (size - len(text)) for text in texts], device=device)
    column = torch.arange(size - 1, device=device)
    fed = column < torch.tensor([len(text) - 1 for text in texts], device=device)[:, None]
    before = lengths[:, None]
    mask = torch.cat([torch.arange(width, device=device) >= width - before, fed], 1)
    with Hooks() as hooks:
        hooks.before(output_head(decoder.model), lambda _head, args: (args[0][fed].unsqueeze(1), *args[1:]))
        logits = decoder.forward(padded[:, :-1], mask, before + column, cache, keep=0)
    return _said(logits[:, :vocabulary], padded[:, 1:][fed]).tolist()


def _said(logits: Tensor, tokens: Tensor) -> Tensor:
    """[N] of `tokens` [N] by logits [N, V]."""
    return _summaries(logits, tokens, None, None)[0]


def _score_states(model, rows: TokenRows, form: SignalFormat, pad_id: int, vocabulary: int, batch_size: int):
    """`score_rows` for states [N, d] before the head."""
    scores: list[RowScore | None] = [None] * len(rows)
    device, at = next(model.parameters()).device, _plain_head(model, form.k)
    head = at.head()
    most = max(1, BATCH_LOGITS // form.k)  # states of one forward pass; logits exist a chunk at a time
    for indices in length_batches(rows, batch_size, most):
        batch = rows.collate(indices, pad_id).to(device)
        with rows_apart(batch.rows):
            states = at(
                lambda hidden, places=batch.places: at_places(hidden, places), **batch.inputs()
            )  # [N, d]
        size = chunk_tokens(vocabulary, device)
        said = []
        for start in range(0, len(states), size):
            part = slice(start, start + size)
            logits = head.transform(at.module(states[part])).float()[:, :vocabulary]
            said.append(logits.log_softmax(-1).gather(1, batch.targets[part, None])[:, 0])
        lengths = rows.completion_lengths[indices].cumsum()[:-1]
        logprobs = np.split(torch.cat(said).cpu().numpy(), lengths)
        for i, *parts in zip(indices, logprobs, np.split(states.float().cpu().numpy(), lengths)):
            scores[i] = _encoded(form, *parts)
    return scores


def _encoded(form: SignalFormat | None, logprobs: np.ndarray, *signal: np.ndarray) -> RowScore:
    if form is None or np.isnan(logprobs).any():
        return RowScore(logprobs.tolist(), None, None)
    encode = {"top_k": encode_top_k, "sampled": encode_sampled, HIDDEN: encode_hidden}[form.kind]
    return RowScore(logprobs.tolist(), *encode(form, *signal))


def length_batches(rows: TokenRows, batch_size: int, tokens: int) -> Iterator[np.ndarray]:
    """Row numbers by length, in groups of at most `batch_size` rows and (but for one row) `tokens`."""
    group, held = [], 0
    for i in np.argsort(rows.lengths, kind="stable"):
        length = int(rows.completion_lengths[i])
        if group and (len(group) == batch_size or held + length > tokens):
            yield np.array(group)
            group, held = [], 0
        group.append(i)
        held += length
    if group:
        yield np.array(group)


def chunk_tokens(vocabulary: int, device: torch.device) -> int:
    """Rows of logits [n, V] that are worked on at a time."""
    return max(1, (CHUNK_LOGITS if device.type == "cpu" else CHUNK_LOGITS_ON_ACCELERATORS) // vocabulary)


def _summaries(logits: Tensor, targets: Tensor, u: Tensor | None, form: SignalFormat | None) -> list[Tensor]:
    """logprobs [N]; for top_k also ids and logprobs [N, K], for sampled ids [N, K]. A chunk at a time."""
    found = []
    size = chunk_tokens(logits.shape[1], logits.device)
    for start in range(0, len(logits), size):
        part = slice(start, start + size)
        chunk = logits[part].float()
        logprobs = chunk.log_softmax(-1)  # [n, V]
        columns = [logprobs.gather(1, targets[part, None])[:, 0]]
        if form and form.kind == "top_k":
            values, ids = logprobs.topk(form.k)
            columns += [ids, values]
        elif form:
            columns.append(draw((chunk / form.temperature).double().softmax(-1), form.k, u[part]))
        found.append(columns)
    return [torch.cat(column) for column in zip(*found)]


def draw(probabilities: Tensor, k: int, u: Tensor) -> Tensor:
    """Systematic sample of k tokens from each row of [n, V], by u [n] in [0, 1) -> ids [n, k], ascending.

    Token i comes floor(k p_i) or ceil(k p_i) times, k p_i times in expectation over u.
    """
    cumulative = probabilities.cumsum(-1)
    points = (torch.arange(k, device=u.device) + u[:, None]) / k * cumulative[:, -1:]
    return torch.searchsorted(cumulative, points, right=True).clamp(max=probabilities.shape[1] - 1)


# ---- answers of the stage `generations/` ------------------------------------------------------------------


def given_answers(teacher, questions: list[Question], texts: list[str], on_finish) -> list[Answer]:
    """Somebody's texts as this teacher's answers: in its tokens, closed by its end token, not yet scored."""
    context = teacher.context
    answers = []
    for question, text in zip(questions, texts):
        try:
            prompt = prompt_ids(teacher.tokenizer, question.messages)
        except UserError as refused:
            answers.append(Answer(text, "error", error=str(refused)))
            on_finish(answers[-1])
            continue
        said = continuation(text, teacher.opened)
        text = teacher.opened + said
        completion = closed(teacher.tokenizer, text_ids(teacher.tokenizer, said))
        length = len(prompt) + len(completion)
        error = None
        if context and length > context:
            error = f"prompt and text have {length} tokens and the teacher takes {context}"
        reason = "error" if error else "stop"
        answers.append(Answer(text, reason, prompt, completion, [], error, len(prompt), len(completion)))
        on_finish(answers[-1])
    return answers


def score_answers(
    section: Signal, teacher, questions: list[Question], answers: list[Answer], cut: bool = False
) -> None:
    """Give every answer its signal, and its logprobs where it has none yet.

    Failed answers, which are never trained on, get nothing; cut-off ones only where `cut` says that they are kept.
    """
    reasons = ("stop", "length") if cut else ("stop",)
    form = signal_format(section, teacher)
    if not isinstance(teacher, LocalTeacher):
        if form or isinstance(teacher, VllmTeacher):
            teacher.score(questions, answers, form, reasons)
        return
    due = [
        (question.key, answer)
        for question, answer in zip(questions, answers)
        if answer.completion_ids and answer.finish_reason in reasons and (form or not answer.logprobs)
    ]
    if not due:
        return
    # As `filter` will train on it: a text that ended by another end token gets the tokenizer's own as well.
    rows = TokenRows([a.prompt_ids for _, a in due], [taught(teacher.tokenizer, a) for _, a in due])
    scores = score_rows(
        teacher.model,
        rows,
        form,
        keys=[key for key, _ in due],
        pad_id=teacher.tokenizer.pad_token_id,
        vocabulary=len(teacher.tokenizer),
        batch_size=teacher.batch_size,
    )
    for (_, answer), score in zip(due, scores):
        if np.isnan(score.logprobs).any():
            answer.error, answer.finish_reason = "the teacher's logits are not finite", "error"
            continue
        answer.logprobs = answer.logprobs or score.logprobs
        answer.signal_ids, answer.signal_values = score.signal_ids, score.signal_values


def check_scores(form: SignalFormat | None, teacher) -> None:
    """Have an endpoint score a short text before any answer is paid for. Raises UserError with its reason."""
    if form is None or isinstance(teacher, LocalTeacher | VllmTeacher):
        return
    tried = Answer("1", "stop")
    teacher.score([Question([{"role": "user", "content": "1"}], (0, "", 0))], [tried], form)
    if tried.error:
        raise UserError(
            f"'{teacher.name}' scores no text for generate.signal: {tried.error}. Lower generate.signal.k, start the "
            "server anew (vllm serve ... --max-logprobs K), or set generate.signal.kind=none"
        )


def measured_signal(form: SignalFormat | None, folder: Path) -> dict | None:
    """What a manifest says of its signal columns: the format, and the bytes a token really takes."""
    if form is None:
        return None
    tokens = size = 0
    for row in read_rows(folder, ["completion_ids", *SIGNAL_COLUMNS]):
        if row["signal_ids"] is not None:
            tokens += len(row["completion_ids"])
            size += len(row["signal_ids"]) + len(row["signal_values"])
    return {**form.to_manifest(), "tokens": tokens, "bytes_per_token": round(size / max(tokens, 1), 2)}
