# %% [markdown] lang="en"
# # Lesson 5. Experts: who does the work?
#
# A mixture of experts has many feed-forward blocks per layer and a router that sends each token to a few of them. The model stores all of them and computes few: the teacher here has 3.23 M parameters and uses 1.46 M per token; DeepSeek-V3 has 671 B and uses 37 B.
#
# **After this lesson you can** read a load heat map and MaxVio with its noise floor; say what specialises in what; say what happens when an expert is dropped and what that proves; explain collapse, and balance by a bias without touching a gradient; make a student with experts out of a dense model and teach it.
#
# **Class time** 40 minutes (10 reading the routing, 10 interventions, 15 balance and the student, 5 exercises and check). Computing: {{minutes}} minutes on one CPU thread.
#
# | your machine | what to run |
# |---|---|
# | 2-core CPU | this notebook as it is; about 1 GB of memory |
# | GPU with 8 GB | this notebook, or OLMoE-1B-7B in 4 bits (7 B weights, about 4 GB): any MoE of transformers can be read by `record_routing` |
# | T4 (16 GB, no bf16) | OLMoE-1B-7B in fp16 (14 GB) just fits for reading; in 8 bits it does so easily |
# | one card with 24 GB | Qwen3-30B-A3B in 4 bits (about 17 GB of weights): `distill evaluate ... --top-k 4,8 --route random` |

# %% [markdown] lang="zh"
# # 第 5 课 专家：到底谁在干活？
#
# 混合专家模型每层有许多前馈块，由路由器把每个词元送给其中几个。模型存着全部专家，却只计算少数几个：这里的教师有 323 万参数，每个词元用 146 万；DeepSeek-V3 有 6710 亿，用 370 亿。
#
# **学完本课，你能够**：读懂负载热力图，以及 MaxVio 和它的噪声下限；说出哪些专家专攻什么；说清丢掉一个专家会怎样、这又证明了什么；解释塌缩，并用不影响梯度的偏置来均衡；把稠密模型改成有专家的学生，并教会它。
#
# **课堂用时** 40 分钟（读路由 10 分钟，干预 10 分钟，均衡与学生 15 分钟，练习与自测 5 分钟）。计算用时：单线程 CPU 约 {{minutes}} 分钟。
#
# | 你的机器 | 怎么跑 |
# |---|---|
# | 双核 CPU | 直接运行本笔记本；内存约 1 GB |
# | 8 GB 显存的 GPU | 直接运行；或 4 位的 OLMoE-1B-7B（70 亿权重，约 4 GB）：transformers 里的任何 MoE 都能用 `record_routing` 读取 |
# | T4（16 GB，不支持 bf16） | fp16 的 OLMoE-1B-7B（14 GB）勉强够读取；8 位则绰绰有余 |
# | 一张 24 GB 的卡 | 4 位的 Qwen3-30B-A3B（权重约 17 GB）：`distill evaluate ... --top-k 4,8 --route random` |

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch

from distill import describe, load_model, load_tokenizer, record_routing
from distill.data import TokenRows
from distill.lessons import (
    accuracy,
    ask,
    begin,
    exercise,
    expect,
    experiment,
    held_out_problems,
    scaled,
    share,
    slider,
    step_log,
)
from distill.models import prompt_ids

folder = begin(5)
size = describe("checkpoints/teacher")
print(f"{size['parameters_total']:,} parameters, {size['parameters_active']:,} active per token")
tokenizer, teacher = load_tokenizer("checkpoints/teacher"), load_model("checkpoints/teacher")
problems = held_out_problems({"hard": scaled(84, 28)})
answers = ask(teacher, tokenizer, problems)
prompts = [prompt_ids(tokenizer, p["messages"]) for p in problems]
batch = TokenRows(prompts, [a["completion_ids"] for a in answers]).collate(
    np.arange(len(answers)), tokenizer.pad_token_id
)


def read_routing(model):
    """Every decision of `model` on the same texts."""
    with record_routing(model) as recording, torch.inference_mode():
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return recording


recording = read_routing(teacher)
layers = recording.summary()["layers"]
active = size["parameters_active"] / size["parameters_total"]
expect("active over total parameters", active, 0.44, 0.46, short=True, without=1)  # 1: a dense model

# %% [markdown] lang="en"
# ## Load
#
# Eight experts, two per token, so an even load is 1/8 of the assignments each. **MaxVio** is how far the busiest expert is above the mean: 0 is even, E/k - 1 = 3 is total collapse. A sample of tokens is never quite even, so the noise floor stands beside it: what a perfectly uniform router would show. *Effective experts* says the same as a number of experts: 8.0 of 8 is even, 1 is collapse.

# %% [markdown] lang="zh"
# ## 负载
#
# 八个专家，每个词元选两个，均匀负载就是各占分配总数的 1/8。**MaxVio** 表示最忙的专家比平均高出多少：0 是均匀，E/k - 1 = 3 是完全塌缩。有限的词元样本不可能绝对均匀，所以旁边要放上噪声下限：一个完全均匀的路由器会显示出的数值。“有效专家数”（effective experts）用专家个数说同一件事：8 个中的 8.0 个是均匀，1 个是塌缩。


# %%
def heat(values, rows, even, label):
    """A heat map with its numbers: white is the even share, from blue, 0, to red, twice the even share or more."""
    figure, axis = plt.subplots(figsize=(8, 0.45 * len(rows) + 1.2))
    shown = axis.imshow(100 * values, cmap="RdBu_r", vmin=0, vmax=200 * even, aspect="auto")
    for row in range(len(rows)):
        for expert in range(values.shape[1]):
            dark = abs(float(values[row, expert]) - even) > 0.6 * even
            axis.text(expert, row, f"{100 * values[row, expert]:.1f}", ha="center", va="center",
                      color="white" if dark else "black")  # fmt: skip
    axis.set_yticks(range(len(rows)), rows)
    axis.set_xticks(range(values.shape[1]))
    axis.set_xlabel(f"expert; in each cell {label}, even would be {100 * even:g}")
    axis.grid(False)
    figure.colorbar(shown, extend="max", label="%")
    plt.show()


load = torch.tensor([layer["load"] for layer in layers.values()])
heat(
    load, [name.removeprefix("model.").removesuffix(".mlp") for name in layers], 1 / 8, "% of the assignments"
)
for name, layer in layers.items():
    print(
        f"{name}: MaxVio {layer['max_violation']:.2f} (noise {layer['max_violation_noise_floor']:.2f}), "
        f"dead experts {layer['dead_experts']}, effective experts {layer['effective_experts']:.1f} of 8"
    )
worst = max(layer["max_violation"] for layer in layers.values())
expect(
    "largest MaxVio of the teacher", worst, 0.05, 1.2, short=True, without=8 / 2 - 1
)  # 3: all to two experts
expect(
    "dead experts", sum(layer["dead_experts"] for layer in layers.values()), 0, 0, short=True, without=3 * 6
)

# %% [markdown] lang="en"
# The teacher was balanced in training over *all* levels; on hard problems alone its load is a little less even. Balance is a property of a model **and** a text.
#
# One answer, token by token: which two experts in the first MoE layer?

# %% [markdown] lang="zh"
# 教师是在*所有*难度上训练均衡的；只看难题，负载就稍微不那么均匀。均衡是模型**和**文本共同的性质。
#
# 看一个答案，逐个词元：第一个 MoE 层选了哪两个专家？

# %%
first = next(iter(recording.layers.values()))
start, tokens = len(prompts[0]), len(answers[0]["completion_ids"]) - 1
for place in range(start, start + min(tokens, 14)):
    token = tokenizer.decode([int(batch.input_ids[0, place])])
    chosen = ", ".join(
        f"{e} ({w:.2f})" for e, w in zip(first.indices[place].tolist(), first.weights[place].tolist())
    )
    print(f"{token!r:10} -> experts {chosen}")

# %% [markdown] lang="en"
# ## Who specialises in what?
#
# The share of each task family's tokens that reach each expert; without specialisation every cell would be k/E = 0.25.

# %% [markdown] lang="zh"
# ## 谁专攻什么？
#
# 每类任务的词元有多大比例到达每个专家；若没有专门化，每一格都应是 k/E = 0.25。

# %%
from distill.moe.metrics import specialisation

families = sorted({p["family"] for p in problems})
lengths = batch.attention_mask.sum(1)
groups = torch.tensor([families.index(p["family"]) for p in problems]).repeat_interleave(lengths)
reached = torch.as_tensor(specialisation(first.indices, groups, 8, len(families))).float()
heat(reached, families, 2 / 8, "% of the family's tokens (first MoE layer)")
mixed = groups[
    torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))
]  # families dealt by chance
by_chance = torch.as_tensor(specialisation(first.indices, mixed, 8, len(families))).float()
expect("largest share of a family at one expert (uniform 0.25)", reached.max(), 0.4, 1.0, short=True,
       without=by_chance.max())  # fmt: skip

# %% [markdown] lang="en"
# A picture of specialisation proves nothing about *need*. For that, intervene.
#
# ## Interventions
#
# Change the routing for as long as a context lasts, answer the same problems, compare.

# %% [markdown] lang="zh"
# 专门化的图说明不了*是否必需*。要知道这一点，就得干预。
#
# ## 干预
#
# 在一个上下文里改变路由，回答同样的题目，再作比较。

# %%
from distill import drop_experts, route, use_top_k
from distill.evaluation.stats import wilson_interval

few = problems[: scaled(42, 14)]
rows = {"as trained": ask(teacher, tokenizer, few)}
with use_top_k(teacher, 1):
    rows["1 expert per token"] = ask(teacher, tokenizer, few)
for how in ("uniform", "random"):
    with route(teacher, how):
        rows[f"{how} routing"] = ask(teacher, tokenizer, few)
for expert in range(scaled(8, 2)):
    with drop_experts(teacher, {1: [expert]}):
        rows[f"without {expert}"] = ask(teacher, tokenizer, few)
score = {name: accuracy(found) for name, found in rows.items()}
ends = {name: wilson_interval(round(score[name] * len(few)), len(few)) for name in rows}

figure, axis = plt.subplots(figsize=(7, 3.8))
for place, name in enumerate(rows):
    low, high = ends[name]
    axis.plot([100 * low, 100 * high], [place, place], color="C0", linewidth=2)
    axis.plot(100 * score[name], place, "o", color="C0")
axis.axvline(100 * score["as trained"], color="k", linestyle=":", linewidth=1)
axis.set_yticks(
    range(len(rows)), [f"{name} (layer 1)" if name.startswith("without") else name for name in rows]
)
axis.set(xlabel=f"right answers to {len(few)} hard problems, %, with 95 % interval", xlim=(0, 101))
axis.invert_yaxis()
plt.show()
random = score["random routing"]
expect("as trained", score["as trained"], 0.92, 1, short=True, without=random)
expect("one expert per token", score["1 expert per token"], 0.8, 1, short=(0.6, 1), without=random)
expect("uniform weights", score["uniform routing"], 0.9, 1, short=True, without=random)
expect("random experts", random, 0.0, 0.6, short=True, without=score["as trained"])
slider(
    "experts",
    scores=[[score[name], *ends[name]] for name in rows],
    names=[name.replace("without ", "– ") for name in rows],
)

# %% [markdown] lang="en"
# With its own experts the teacher solves {{as trained|%}} %, with random ones {{random experts|%}} %. So *which* experts matters very much, *how they are weighed* hardly. Dropping one expert of one layer costs little: the next best steps in. With 42 problems a difference of one answer is 2.4 points; do not read the order of the points as a ranking: the lines, 95 % intervals, overlap.
#
# ## Collapse and balance
#
# Training rewards an expert for being used, so the popular get better and more popular. Classic cure: a loss on the load, which also pushes the model away from its best routing. DeepSeek-V3's cure: a bias per expert, added for *selection only*, moved after each step by a fixed u, up for the underused and down for the busy. A simulation with a router that prefers expert 0:

# %% [markdown] lang="zh"
# 用自己选的专家，教师答对 {{as trained|%}}%；随机选专家，只剩 {{random experts|%}}%。所以*选谁*非常重要，*怎么加权*几乎无所谓。某一层丢掉一个专家代价不大：次优的专家会顶上。42 道题时，差一道就是 2.4 个百分点，不要把各点的高低当作排名：代表 95% 区间的线段彼此重叠。
#
# ## 塌缩与均衡
#
# 训练会奖励被使用的专家，于是受欢迎的越来越强，也越来越受欢迎。传统疗法：在负载上加一项损失，但它也会把模型推离最佳路由。DeepSeek-V3 的疗法：给每个专家一个偏置，*只用于选择*；每步之后移动固定的 u，用得少的上调，太忙的下调。下面模拟一个偏爱 0 号专家的路由器：

# %%
from distill.moe import max_violation

preference = torch.linspace(1.5, -1.5, 8)


def simulate(u, steps=300, tokens=512):
    """MaxVio after each step of bias balancing with step size u; experts are chosen by score + bias."""
    generator, bias, history = torch.Generator().manual_seed(0), torch.zeros(8), []
    for _ in range(steps):
        scores = torch.sigmoid(preference + torch.randn(tokens, 8, generator=generator))
        chosen = (scores + bias).topk(2).indices
        counts = torch.bincount(chosen.flatten(), minlength=8).double()
        history.append(max_violation(counts))
        bias += u * torch.sign(counts.mean() - counts)
    return history


history = {u: simulate(u) for u in (0.0, 0.001, 0.01, 0.2)}
for u, curve in history.items():
    plt.plot(curve, label=f"u = {u:g}")
plt.xlabel("step")
plt.ylabel("MaxVio")
plt.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
plt.show()
final = {u: float(np.mean(curve[-50:])) for u, curve in history.items()}
expect("without balancing", final[0.0], 1.5, 2.6, short=True, without=final[0.01])
expect("u = 0.01", final[0.01], 0.0, 0.3, short=True, without=final[0.0])
expect(
    "u = 0.2 over u = 0.01: too large a step swings", final[0.2] / final[0.01], 1.5, 30, short=True, without=1
)
slider("balance")

# %% [markdown] lang="en"
# ## A student with experts
#
# Now for real, and with a student that learns. The base is dense. Each of its MLPs becomes nine copies: eight behind a new router, of which a token uses two, and one that every token uses (*upcycling*, arXiv 2212.05055). At the start the copies are equal, so the model answers as the base does: it solves no long addition. Then it reads the teacher's answers for 50 steps, once without balancing and once with it (`train.expert_bias_step`). The control has the right results and no working.

# %% [markdown] lang="zh"
# ## 一个有专家的学生
#
# 再来真的，这次学生真的学会东西。底座是稠密模型。把它的每个 MLP 复制成九份：八份放在一个新的路由器后面，每个词元用其中两份；还有一份每个词元都用（*upcycling*，arXiv 2212.05055）。开始时各份完全相同，所以模型的回答和底座一样：长加法一道也不会。然后它读教师的回答，训练 50 步：一次不均衡，一次均衡（`train.expert_bias_step`）。对照组只有正确结果，没有推导。

# %%
mixture = "{model: checkpoints/base, mixture: {experts: 8, experts_per_token: 2, shared: true}}"
common = [
    f"student.from={mixture}",
    "student.adapter=full",
    "prompts.families=[addition]",
    f"prompts.levels={scaled('{easy: 30, hard: 220}', '{hard: 24}')}",
    "train.objectives=[{name: cross_entropy}]",
    f"train.steps={scaled(50, 3)}",
    "train.warmup_steps=2",
    f"train.batch_size={scaled(32, 8)}",
    f"train.micro_batch_size={scaled(32, 8)}",
    "train.learning_rate=3e-3",
    "train.precision=fp32",
    "train.expert_bias_freeze=0",
]
runs, violations = {}, {}
for name, u in (("balanced", 0.01), ("not balanced", 1e-9)):  # 1e-9 only counts
    runs[name] = folder / f"u-{u:g}"
    settings = [*common, f"train.expert_bias_step={u}", f"control.enabled={str(name == 'balanced').lower()}"]
    for command in ("base", "generate", "filter", "train"):
        experiment(runs[name], settings, command=command, recipe="recipes/student_from.yaml")
    violations[name] = [line["max_violation"] for line in step_log(runs[name] / "student")]

made = describe(str(runs["balanced"] / "student"))
print(f"{made['parameters_total']:,} parameters, {made['parameters_active']:,} active per token")
additions = held_out_problems({"hard": scaled(60, 14)}, families=["addition"])
student = load_model(str(runs["balanced"] / "student"))
asked = {
    "start": load_model(str(runs["balanced"] / "base")),
    "control": load_model(str(runs["balanced"] / "control")),
    "not balanced": load_model(str(runs["not balanced"] / "student")),
    "balanced": student,
}
learned = {name: ask(model, tokenizer, additions) for name, model in asked.items()}
with route(student, "random"):
    learned["balanced, random experts"] = ask(student, tokenizer, additions)

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.2))
for name, curve in violations.items():
    left.plot(curve, label=name)
left.set(xlabel="optimizer step", ylabel="largest MaxVio of the step")
left.legend()
for place, (name, found) in enumerate(learned.items()):
    score_here = accuracy(found)
    low, high = wilson_interval(round(score_here * len(additions)), len(additions))
    colour = "C0" if "balanced" in name else "0.4"
    right.plot([100 * low, 100 * high], [place, place], color=colour, linewidth=3)
    right.plot(100 * score_here, place, "o", color=colour)
    print(f"{name:25} right {share(found)}")
right.set_yticks(range(len(learned)), learned)
right.set(xlabel=f"right answers to {len(additions)} long additions, %, with 95 % interval", xlim=(-2, 102))
right.invert_yaxis()
plt.show()
end = {name: float(np.mean(curve[-10:])) for name, curve in violations.items()}
for name, value in end.items():
    print(f"{name}: MaxVio {value:.2f} over the last steps")
reached, start = accuracy(learned["balanced"]), accuracy(learned["start"])
gain = reached - accuracy(learned["control"])
expect("student with experts, right answers", reached, 0.5, 1, without=start)
expect("student with experts minus control", gain, 0.4, 1, without=start - accuracy(learned["control"]))
expect("balanced over not balanced", end["balanced"] / end["not balanced"], 0.02, 0.9, without=1)

# %% [markdown] lang="en"
# The student solves {{student with experts, right answers|%}} % of problems of which it solved none, and the control still solves none. So a student may have experts as well. Two things to see:
#
# - On the left: a new router is uneven from its first step, and the bias evens it out while the student learns.
# - On the right, the last line: with random experts the student loses part of what it learned. Its experts began as copies, and in 50 steps they have grown apart. In the teacher, trained with experts from the start, random ones cost nearly everything.

# %% [markdown] lang="zh"
# 这些题学生原来一道也不会，现在答对 {{student with experts, right answers|%}}%；对照组仍然一道也不会。可见学生也可以有专家。请看两点：
#
# - 左图：新的路由器从第一步起就不均匀；学生学习的同时，偏置把它拉平。
# - 右图最后一行：随机选专家，学生会丢掉一部分学到的东西。它的专家开始时只是复制品，50 步里已经各不相同。教师从一开始就带着专家训练，随机选专家几乎会丢掉一切。

# %% [markdown] lang="en"
# ## A measure that sees nothing
#
# Two layers, each collapsed on one expert, each on another. transformers' own balance loss adds the layers' counts *before* it compares them and reports its best value. Per layer the same loss is far from it.

# %% [markdown] lang="zh"
# ## 一个什么都看不见的指标
#
# 两层网络，各自塌缩到一个专家上，且不是同一个。transformers 自带的均衡损失在比较*之前*就把各层的计数加在一起，于是报告它的最优值；逐层计算，同样的损失离最优远得很。

# %%
from distill.training.losses import batch_balance


def collapsed(expert, tokens=64, experts=2):
    """Scores [1, T, E], indices [1, T, 1] of a layer that sends everything to `expert`."""
    scores = torch.full((1, tokens, experts), 0.001)
    scores[..., expert] = 0.999
    return scores, torch.full((1, tokens, 1), expert)


mask = torch.ones(1, 64)
both = [collapsed(0), collapsed(1)]
per_layer = sum(float(batch_balance(s, i, mask)) for s, i in both)
pooled = float(batch_balance(*(torch.cat(parts, 1) for parts in zip(*both)), torch.ones(1, 128)))
print(f"per layer, summed: {per_layer:.2f} (perfect 2)    pooled first: {pooled:.2f} (perfect 1)")
same = [collapsed(0), collapsed(0)]  # both layers on one expert: this the pooled measure does see
seen = float(batch_balance(*(torch.cat(parts, 1) for parts in zip(*same)), torch.ones(1, 128)))
expect("per layer", per_layer, 3.9, 4.0, short=True, without=pooled)
expect("pooled", pooled, 0.99, 1.01, short=True, without=seen)

# %% [markdown] lang="en"
# ## Exercises
#
# **5.1** Write MaxVio from the assignments per expert.

# %% [markdown] lang="zh"
# ## 练习
#
# **5.1** 由每个专家的分配次数写出 MaxVio。


# %% tags=["exercise"]
def my_max_violation(counts): ...  # your code: counts [E] -> a number


# %% tags=["solution"]
def my_max_violation(counts):
    mean = sum(counts) / len(counts)
    return (max(counts) - mean) / mean


# %%
exercise(
    "5.1",
    lambda: abs(my_max_violation([5, 1, 1, 1]) - 1.5) < 1e-9 and my_max_violation([4, 4]) == 0,
    "(largest - mean) / mean",
)

# %% [markdown] lang="en"
# **5.2** Write one step of bias balancing: the new bias after a step with these counts.

# %% [markdown] lang="zh"
# **5.2** 写出偏置均衡的一步：给定本步的计数，返回新的偏置。


# %% tags=["exercise"]
def balance_step(bias, counts, u): ...  # your code: bias [E], counts [E] float tensors


# %% tags=["solution"]
def balance_step(bias, counts, u):
    return bias + u * torch.sign(counts.mean() - counts)


# %%
exercise(
    "5.2",
    lambda: torch.allclose(
        balance_step(torch.zeros(3), torch.tensor([9.0, 3.0, 6.0]), 0.1), torch.tensor([-0.1, 0.1, 0.0])
    ),
    "up by u where the load is below the mean, down where it is above",
)

# %% [markdown] lang="en"
# **5.3** Which expert of layer 1 costs most when it is dropped? Set `worst_expert` to its number. And is that more than chance? Set `told_apart` to True if its 95 % interval and that of the teacher as trained do not overlap, else to False. `score` and `ends` have the numbers.

# %% [markdown] lang="zh"
# **5.3** 第 1 层的专家里，丢掉哪一个代价最大？把 `worst_expert` 设为它的编号。这超出偶然了吗？若它的 95% 区间与原样教师的区间不重叠，把 `told_apart` 设为 True，否则设为 False。数据在 `score` 和 `ends` 里。

# %% tags=["exercise"]
worst_expert = ...  # a number from 0
told_apart = ...  # True or False

# %% tags=["solution"]
worst_expert = min(range(scaled(8, 2)), key=lambda e: score[f"without {e}"])
told_apart = ends[f"without {worst_expert}"][1] < ends["as trained"][0]


# %%
def both_parts():
    lowest = min(value for name, value in score.items() if name.startswith("without"))
    apart = any(
        ends[n][1] < ends["as trained"][0] for n in score if n.startswith("without") and score[n] == lowest
    )
    return score[f"without {worst_expert}"] == lowest and told_apart is apart


exercise("5.3", both_parts, "compare the upper end of the lowest with the lower end of 'as trained'")

# %% [markdown] lang="en"
# ## What commonly goes wrong
#
# - **Logits read as decisions.** In DeepSeek-V3 a bias comes after the logits: top-k of `output_router_logits` is wrong for most tokens. `record_routing` reads decisions where they are used.
# - **MaxVio without the number of tokens.** On 64 tokens a perfect router shows 0.34 by chance. Always give the noise floor.
# - **Padding counted.** Finished rows in a batch feed pads; count real tokens only.
# - **"Dead" experts on a small sample.** With 30 tokens and 256 experts most are idle.
# - **Balance as a goal.** It is a means (no idle memory, no overfull device); perfectly even and useless is easy: route at random.

# %% [markdown] lang="zh"
# ## 常见问题
#
# - **把 logits 当成决定。** DeepSeek-V3 在 logits 之后还要加偏置：对大多数词元，直接取 `output_router_logits` 的 top-k 是错的。`record_routing` 在决定被使用的地方读取它。
# - **只报 MaxVio，不报词元数。** 只有 64 个词元时，完美的路由器也会偶然显示出 0.34。一定要附上噪声下限。
# - **把填充也算进去。** 批次中已结束的行会继续喂填充符；只统计真实词元。
# - **小样本上的“死亡”专家。** 30 个词元对 256 个专家，大多数当然闲着。
# - **把均衡当目标。** 它只是手段（不浪费显存，不让某个设备过载）；绝对均匀又毫无用处很容易：随机路由就行。
