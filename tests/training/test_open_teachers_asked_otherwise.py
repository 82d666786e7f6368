"""Teachers that read another prompt, or with other experts: what they say is what they would say, asked directly."""

import numpy as np
import pytest
import torch
import yaml
from step_example import build, rows

from distill.config.recipe import load_recipe
from distill.config.training import Context
from distill.data.batches import TokenRows
from distill.errors import UserError
from distill.models.chat import prompt_ids
from distill.models.layers import attend_by_row, rows_apart
from distill.models.load import load_model, load_tokenizer
from distill.moe.interventions import sample_experts
from distill.training.live_teachers import FrozenTeacher
from distill.training.open_teachers import SampledRoutings, ToldTeacher, told


def test_several_draws_are_the_mean_of_their_distributions():
    """Chunks share their memory: each must be taken before the next one is asked."""
    data, teacher = rows(n=5), FrozenTeacher(build("olmoe"))
    batch = data.collate(np.arange(5), 0)
    several = SampledRoutings(teacher, 3)(batch)["dense"]
    expected = 0
    for seed in range(3):
        with sample_experts(teacher.model, seed):
            expected = expected + teacher(batch)["dense"].chunk(slice(None), None)[0].float().softmax(-1) / 3
    for part in (slice(0, 4), slice(4, None)):
        (logits,) = several.chunk(part, None)
        torch.testing.assert_close(logits.softmax(-1), expected[part])
        torch.testing.assert_close(logits.exp().sum(-1), torch.ones(len(logits)))
    assert SampledRoutings(teacher, 3).flops_per_token(8) == 3 * teacher.flops_per_token(8)


def test_a_told_teacher_says_what_it_says_behind_its_own_prompt(hub):
    """Row by row without padding: the student reads one prompt, the teacher another, the answer is the same."""
    model, tokenizer = load_model(hub["llama"], "fp32"), load_tokenizer(hub["llama"])
    asked = [[{"role": "user", "content": q}] for q in ("2+2", "a longer question?", "?")]
    context = Context(system="Be brief.", question="{question} The answer is {answer}")
    told_messages = [told(m, answer, context) for m, answer in zip(asked, ("4", "yes {question}", ""))]
    assert told_messages[1][1]["content"] == "a longer question? The answer is yes {question}"
    assert [m["role"] for m in told_messages[0]] == ["system", "user"]
    given = [{"role": "system", "content": "Be long."}, *asked[0]]
    assert told(given, "4", Context(system="Be brief.")) == [
        {"role": "system", "content": "Be brief."},
        *asked[0],
    ], "one of them, and not the student's"
    answers = [tokenizer(t)["input_ids"] for t in ("five", "no", "or so")]
    data = TokenRows([prompt_ids(tokenizer, m) for m in asked], answers)
    data.messages = told_messages
    order = np.array([2, 0, 1])
    teacher = ToldTeacher(FrozenTeacher(model), tokenizer)
    assert attend_by_row(model)  # as training has it
    for batch in (data.collate(order, tokenizer.pad_token_id), data.pack(order)):
        with rows_apart(batch.rows):  # of the student's batch: the teacher's is padded, whatever that is
            (found,) = teacher(batch)["dense"].chunk(slice(None), None)
        expected = []
        for i in order:
            prompt = prompt_ids(tokenizer, told_messages[i])
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*prompt, *answers[i]]])).logits[0]
            expected.append(logits[len(prompt) - 1 : -1])
        torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_a_student_learns_from_itself_told_the_answer(make_recipe, run_cli):
    """The whole way: stored rows and the student's own text, its start as the teacher that reads the answer."""
    path, run = make_recipe(teacher="llama", student="llama")
    with open(path) as file:
        data = yaml.safe_load(file)
    data["filter"]["finish_reasons"] = ["stop", "length"]
    data["train"] |= {
        "objectives": [{"name": "reverse_kl"}], "steps": 2,
        "teachers": {"own_start": True, "context": {"question": "{question} ({answer})"}},
    }  # fmt: skip
    data["control"] = {"enabled": False}
    with open(path, "w") as file:
        yaml.safe_dump(data, file)
    for command in ("generate", "filter", "train"):
        code, _, told_user = run_cli(command, path)
        assert code == 0, told_user
    lines = (run / "student" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 and '"loss": 0.0,' not in lines[0]  # untold, its start agrees with itself
    with pytest.raises(UserError, match=r"text with \{question\} in it"):
        load_recipe(path, ["train.teachers.context.question='the answer is {answer}'"])
    with pytest.raises(UserError, match="divergences from the teacher's distribution"):
        load_recipe(path, ["train.objectives=[{name: cross_entropy}]"])
