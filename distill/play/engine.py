"""The engine behind `distill play`: several checkpoints answer one question, token by token, side by side.

    playground = Playground(find_setup(["checkpoints/demo"]), device)       # base, control, student, teacher
    asked = playground.begin("What is 2381 + 4410?", changes={"teacher": Change(drop={1: [3]})})
    for event in playground.answer(asked):          # Spoke, Finished and Compared, as they happen
        ...
    asked.answers["teacher"].verdict                # "correct", by rule; "not verified" for a free question

No page and no browser here (distill/play/page.py is the page). The models speak in turns, one token each; each
token comes with its probability, what else the model could have said, and the experts that were chosen for it in
every routed layer. When all have answered, the teacher reads each answer once, unchanged, and says what it would
have said at every place of it.

Probabilities are the models' own, at temperature 1, whatever they were sampled with. The experts of a token are
those that took part in choosing it: they read the token before it. Nothing is held between two tokens, neither a
hook nor a changed router, so an answer that is abandoned leaves nothing behind.

Shapes: T tokens fed, V vocabulary, N completion tokens.
"""

import inspect
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack

import torch
from transformers.cache_utils import DynamicCache

from distill.errors import DistillError, UserError
from distill.evaluation.routes import token_pieces
from distill.models.chat import prompt_ids, whole_turn
from distill.models.decode import Sampling, choose, row_seed, uniforms
from distill.models.describe import describe_model
from distill.models.hooks import KeptLogits
from distill.models.load import cache_name, eos_ids, load_model, load_tokenizer, same_vocabulary
from distill.models.routers import Router, bare_model, find_routers
from distill.moe.interventions import drop_experts, use_top_k
from distill.moe.recording import record_routing
from distill.play.records import (
    NOT_VERIFIED,
    Asked,
    Change,
    Chosen,
    Compared,
    Finished,
    PlayedAnswer,
    PlayedReference,
    Setup,
    Spoke,
    Token,
    TokenOption,
)
from distill.tasks.problems import CHAT_TEMPLATE, solve
from distill.tasks.verify import extract_answer, judge
from distill.training.cross_tokenizer import TeacherView

OPTIONS_KEPT = 5  # options that are kept at each place
WINDOW = 4  # tokens that the text of the next one may depend on


class Player:
    """A loaded checkpoint under its name."""

    def __init__(self, name: str, path: str, device: torch.device):
        self.name, self.path, self.device = name, path, device
        self.tokenizer, self.model = load_tokenizer(path), load_model(path, device=device)
        self.routers: list[Router] = find_routers(self.model)
        self.cache_name = cache_name(self.model)
        if self.cache_name is None:
            raise UserError(f"{path}: this model has no cache to go on token by token with; leave it out")
        self.config = self.model.config.get_text_config(decoder=True)
        self.ends = eos_ids(self.model, self.tokenizer)
        self.vocabulary = len(self.tokenizer)
        self._about: dict | None = None
        accepted = inspect.signature(bare_model(self.model).forward).parameters
        self.only_last = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    @property
    def about(self) -> dict:
        """What `describe_model` finds: parameters of the model and, apart, of its adapter."""
        if self._about is None:
            self._about = describe_model(self.model)
        return self._about

    def likeliest(self, probabilities: torch.Tensor, before: Sequence[int]) -> list[TokenOption]:
        """The TOP tokens of one distribution [V] after the tokens `before`; ids without a token are left out."""
        values, ids = probabilities[: self.vocabulary].topk(min(OPTIONS_KEPT, self.vocabulary))
        return [TokenOption(i, self.piece(before, i), p) for i, p in zip(ids.tolist(), values.tolist())]

    def piece(self, before: Sequence[int], token: int) -> str:
        """The text of a token where it stands: single tokens lose the spaces of SentencePiece."""
        return token_pieces(self.tokenizer, [*before[-WINDOW:], token])[-1]


class Playground:
    """All players, loaded once. Raises UserError for what cannot be loaded."""

    def __init__(
        self, setup: Setup, device: torch.device, on_load: Callable[[str], None] = lambda name: None
    ):
        """`on_load` is told each name before its weights are read."""
        loaded: dict[str, Player] = {}
        self.players: dict[str, Player] = {}
        for name, path in setup.checkpoints.items():
            on_load(name)
            self.players[name] = loaded[path] = loaded.get(path) or Player(name, path, device)
        self.setup = setup
        self.teacher = self.players.get(setup.teacher) if setup.teacher else None
        self.problems = {p["messages"][-1]["content"]: p for p in setup.problems}
        self._views: dict[str, TeacherView] = {}
        # One forward pass at a time: a change of routing is seen by all threads.
        self._lock = threading.Lock()

    @property
    def narrow(self) -> bool:
        """Whether all players were trained on the embedded families alone, and know nothing else."""
        return self.setup.embedded and all(
            player.tokenizer.chat_template == CHAT_TEMPLATE for player in self.players.values()
        )

    @property
    def routed(self) -> list[Player]:
        return [player for player in self.players.values() if player.routers]

    def reference(self, question: str) -> PlayedReference | None:
        """What the answers are checked with: the picked problem's own reference, else a rule, else None."""
        problem = self.problems.get(question)
        if problem and (problem["answer"] or problem["verifier"].startswith("regex:")):
            return PlayedReference(
                problem["answer"], problem["verifier"], "problem",
                problem["family"], problem["level"], problem["split"],
            )  # fmt: skip
        known = solve(question)
        return known and PlayedReference(
            known.answer, "exact", "rule", known.family, known.level, known.split
        )

    def begin(
        self,
        question: str,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        changes: Mapping[str, Change] | None = None,
    ) -> Asked:
        """A question that nobody has answered yet. `changes`: by model; the others route as they are."""
        problem = self.problems.get(question)
        lead = [{"role": "system", "content": self.setup.system}] if self.setup.system else []
        messages = problem["messages"] if problem else [*lead, {"role": "user", "content": question}]
        answers = {name: PlayedAnswer(name, (changes or {}).get(name, Change())) for name in self.players}
        return Asked(question, messages, self.reference(question), temperature, seed, answers)

    def answer(self, asked: Asked) -> Iterator[Spoke | Finished | Compared]:
        """Let everybody answer, one token each in turn; then the teacher reads what was said.

        A model that fails ends with `error` and the verdict "error"; the others go on.
        """
        speaking = [self._speaker(asked, answer) for answer in asked.answers.values()]
        while speaking:
            for speaker in list(speaking):
                start = time.perf_counter()
                going = self._step(speaker)
                speaker.answer.seconds += time.perf_counter() - start
                if going:
                    yield Spoke(speaker.answer)
                else:
                    speaking.remove(speaker)
                    self._finish(speaker, asked.reference)
                    yield Finished(speaker.answer)
        for answer in asked.answers.values() if self.teacher else ():
            if answer.tokens and not (self.players[answer.model] is self.teacher and not answer.change):
                self._compare(answer, asked.messages)
                yield Compared(answer)

    # ------------------------------------------------------------------------------------ one answer

    def _speaker(self, asked: Asked, answer: PlayedAnswer) -> "_Speaker":
        sampling = Sampling(asked.temperature, max_new_tokens=self.setup.max_new_tokens)
        return _Speaker(self.players[answer.model], answer, asked, sampling)

    def _step(self, speaker: "_Speaker") -> bool:
        try:
            with self._lock:
                return speaker.step()
        except (DistillError, RuntimeError) as error:  # an impossible change of routing, or memory
            speaker.answer.error = str(error).strip().partition("\n")[0]
            speaker.answer.finish_reason = "error"
            return False

    def _finish(self, speaker: "_Speaker", reference: PlayedReference | None) -> None:
        answer, tokenizer = speaker.answer, speaker.player.tokenizer
        ids = [token.id for token in answer.tokens]
        for token, piece in zip(answer.tokens, token_pieces(tokenizer, ids)):
            token.text = piece
        answer.text = whole_turn(tokenizer, tokenizer.decode(ids, skip_special_tokens=True))
        answer.final = None if answer.error else extract_answer(answer.text)
        if reference:
            answer.verdict = judge(
                reference.verifier, answer.text, reference.answer, answer.finish_reason, answer.error
            )
        else:
            answer.verdict = "error" if answer.error else NOT_VERIFIED

    # ------------------------------------------------------------------------------------ the teacher reads

    @torch.inference_mode()
    def _compare(self, answer: PlayedAnswer, messages: list[dict]) -> None:
        """The teacher's distribution at every place of the answer, and its experts: one pass."""
        player, teacher = self.players[answer.model], self.teacher
        said = [token.id for token in answer.tokens]
        try:
            ids, start, pairs, same = self._as_teacher_reads(player, messages, said)
            if not pairs:
                return
            fed = torch.tensor([ids[:-1]], device=teacher.device)  # [1, T]
            keep = torch.zeros_like(fed, dtype=torch.bool)
            keep[0, [start - 1 + theirs for _, theirs in pairs]] = True
            with self._lock, ExitStack() as stack:
                recording = stack.enter_context(record_routing(teacher.model)) if teacher.routers else None
                ask = stack.enter_context(KeptLogits(teacher.model))
                probabilities = ask(fed, torch.ones_like(fed), keep).float().softmax(-1)  # [N, V]
                chosen = _chosen(recording) if recording else []
        except (DistillError, RuntimeError):
            return  # no comparison: the answer does not fit the teacher's context, or the memory
        for (mine, theirs), row in zip(pairs, probabilities):
            token = answer.tokens[mine]
            place = start + theirs
            token.teacher = teacher.likeliest(row, ids[max(start, place - WINDOW) : place])
            token.teacher_experts = chosen[place - 1] if chosen else {}
            if same:
                token.teacher_probability = float(row[token.id])

    def _as_teacher_reads(self, player: Player, messages: list[dict], said: list[int]):
        """(ids of prompt and answer, where the answer begins, pairs of places in both, whether tokens are shared)."""
        teacher = self.teacher
        if player is teacher or same_vocabulary(player.tokenizer, teacher.tokenizer):
            prompt = prompt_ids(teacher.tokenizer, messages)
            return [*prompt, *said], len(prompt), [(i, i) for i in range(len(said))], True
        if player.name not in self._views:
            self._views[player.name] = TeacherView(player.tokenizer, teacher.tokenizer, player.ends)
        row = self._views[player.name].row(messages, said)
        return row.ids.tolist(), row.prompt_tokens, [tuple(pair) for pair in row.pairs.tolist()], False


class _Speaker:
    """One model in the middle of its answer: the cache and the next token to feed."""

    def __init__(self, player: Player, answer: PlayedAnswer, asked: Asked, sampling: Sampling):
        self.player, self.answer, self.sampling = player, answer, sampling
        self.messages, self.seed = asked.messages, row_seed((asked.seed, asked.question))
        self.feed: list[int] = []
        self.fed = 0
        self.cache = DynamicCache(config=player.config)

    @torch.inference_mode()
    def step(self) -> bool:
        """Say one more token; whether there may be another. Raises DistillError for an impossible change."""
        answer, player = self.answer, self.player
        if not self.feed:
            self.feed = self._prompt()
        if answer.finish_reason or len(answer.tokens) >= self.sampling.max_new_tokens:
            answer.finish_reason = answer.finish_reason or "length"
            return False
        logits, experts = self._forward()
        if not logits.logsumexp(-1).isfinite().all():
            answer.finish_reason, answer.error = "error", "non-finite logits"
            return False
        step = torch.tensor([len(answer.tokens)])
        drawn = uniforms(torch.tensor([self.seed]), step).to(logits.device)
        chosen = int(choose(logits[:, : player.vocabulary], self.sampling, drawn))
        probabilities = logits[0].softmax(-1)
        before = [token.id for token in answer.tokens[-WINDOW:]]
        text = player.piece(before, chosen)
        own = player.likeliest(probabilities, before)
        answer.tokens.append(Token(chosen, text, float(probabilities[chosen]), own, experts))
        answer.text += text
        self.feed = [chosen]
        if chosen in player.ends:
            answer.finish_reason = "stop"
        return True

    def _prompt(self) -> list[int]:
        prompt = prompt_ids(self.player.tokenizer, self.messages)
        context = getattr(self.player.config, "max_position_embeddings", None)
        if context is not None and len(prompt) + 1 > context:
            raise UserError(f"the question has {len(prompt)} tokens, more than the context of {context}")
        if context is not None:
            room = min(self.sampling.max_new_tokens, context - len(prompt))
            self.sampling = Sampling(self.sampling.temperature, max_new_tokens=room)
        return prompt

    def _forward(self) -> tuple[torch.Tensor, Chosen]:
        """Logits [1, V] (float32) after what is to be fed, and the experts of its last token."""
        player, change = self.player, self.answer.change
        with ExitStack() as stack:
            if change.top_k is not None:
                stack.enter_context(use_top_k(player.model, change.top_k))
            if any(change.drop.values()):
                stack.enter_context(drop_experts(player.model, change.drop))
            recording = stack.enter_context(record_routing(player.model)) if player.routers else None
            logits = player.model(
                input_ids=torch.tensor([self.feed], device=player.device),
                use_cache=True,
                **{player.cache_name: self.cache},
                **player.only_last,
            ).logits[:, -1]
            experts = _chosen(recording)[-1] if recording else {}
        return logits.float(), experts


def _chosen(recording) -> list[Chosen]:
    """Of each token fed: the experts and weights of every routed layer, heaviest first."""
    layers = {}
    for name, record in recording.layers.items():
        weights, order = record.weights.sort(dim=-1, descending=True, stable=True)
        layers[name] = (record.indices.gather(-1, order).tolist(), weights.tolist())
    tokens = len(next(iter(layers.values()))[0])
    return [
        {name: list(zip(indices[t], weights[t])) for name, (indices, weights) in layers.items()}
        for t in range(tokens)
    ]
