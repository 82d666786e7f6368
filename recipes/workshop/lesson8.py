# %% [markdown] lang="en"
# # Lesson 8. Half of the experts, and four bits
#
# Lesson 5 took one expert out of one layer, and little happened. So take half of them out, in every layer. A quarter of the right answers goes with them. Then let the whole model teach what is left of it. This is distillation with teacher and student of one mould, and large open models are made smaller this way (REAP, arXiv 2510.13999).
#
# **After this lesson you can** say by what an expert's worth is measured, and why "how often it is used" is another measure; say what a cut costs and what distillation brings back; read the control beside it; count the bytes of a model in four bits, and say what they do to the router.
#
# **Class time** 35 minutes (10 the worth of an expert, 15 cut and recovery, 5 four bits, 5 exercises and check). Computing: {{minutes}} minutes on one CPU thread.
#
# | your machine | what to run |
# |---|---|
# | 2-core CPU | this notebook as it is; about 1 GB of memory |
# | GPU with 8 GB | this notebook; or the whole recipe with its report: `distill run recipes/prune_experts.yaml` |
# | T4 (16 GB, no bf16) | the same; `train.precision=auto` chooses fp16 |
# | one card with 24 GB | OLMoE-1B-7B with half of its experts, by LoRA: `distill run recipes/prune_experts.yaml teacher.model=allenai/OLMoE-1B-7B-0924-Instruct student.from.model=allenai/OLMoE-1B-7B-0924-Instruct student.adapter=lora teacher.quantize=4bit run_dir=checkpoints/olmoe` |

# %% [markdown] lang="zh"
# # 第 8 课 砍掉一半专家，再压到四位
#
# 第 5 课从某一层拿掉一个专家，几乎没有影响。那就在每一层拿掉一半：答对的题少了四分之一。再让完整的模型来教剩下的部分。这是师生同源的蒸馏，大型开放模型就是这样变小的（REAP，arXiv 2510.13999）。
#
# **学完本课，你能够**：说出怎样衡量一个专家的价值，为什么“用得多”是另一回事；说出砍掉一半损失多少，蒸馏又能补回多少；结合对照组来读结果；算出四位模型占多少字节，并说出四位对路由器的影响。
#
# **课堂用时** 35 分钟（专家的价值 10 分钟，剪枝与恢复 15 分钟，四位 5 分钟，练习与自测 5 分钟）。计算用时：单线程 CPU 约 {{minutes}} 分钟。
#
# | 你的机器 | 怎么跑 |
# |---|---|
# | 双核 CPU | 直接运行本笔记本；内存约 1 GB |
# | 8 GB 显存的 GPU | 直接运行；或跑完整配方，带报告：`distill run recipes/prune_experts.yaml` |
# | T4（16 GB，不支持 bf16） | 同上；`train.precision=auto` 会选 fp16 |
# | 一张 24 GB 的卡 | 用 LoRA 恢复只剩一半专家的 OLMoE-1B-7B：`distill run recipes/prune_experts.yaml teacher.model=allenai/OLMoE-1B-7B-0924-Instruct student.from.model=allenai/OLMoE-1B-7B-0924-Instruct student.adapter=lora teacher.quantize=4bit run_dir=checkpoints/olmoe` |

# %%
import contextlib

import matplotlib.pyplot as plt
import torch

from distill import drop_experts, load_model, load_tokenizer, sample_problems
from distill.convert.calibrate import Calibration, expert_use
from distill.evaluation.stats import paired_comparison, wilson_interval
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
from distill.storage import read_json

folder = begin(8)
tokenizer, teacher = load_tokenizer("checkpoints/teacher"), load_model("checkpoints/teacher", "fp32")
texts = []  # problems of training with their worked solutions: what is kept is chosen by what the model will be used for
for problem in sample_problems("train", {"hard": scaled(56, 14)}, seed=0):
    asked = prompt_ids(tokenizer, [{"role": "user", "content": problem.question}])
    texts.append(asked + tokenizer.encode(problem.solution, add_special_tokens=False))
use = expert_use(teacher, Calibration(texts))

figure, axes = plt.subplots(1, len(use), figsize=(11, 3.2), sharey=True)
chosen = {}
for axis, (name, one) in zip(axes, use.items()):
    worth, often = one.mean_saliency, one.chosen / one.chosen.sum()
    chosen[name] = {"worth": worth.topk(4).indices.tolist(), "often": often.topk(4).indices.tolist()}
    axis.bar(range(8), worth, color=["C0" if e in chosen[name]["worth"] else "0.75" for e in range(8)])
    for expert, part in enumerate(often.tolist()):
        axis.text(expert, float(worth[expert]), f"{100 * part:.0f}", ha="center", va="bottom", fontsize=9)
    axis.set(
        xlabel="expert (above: % of choices)",
        title=name.removeprefix("model.").removesuffix(".mlp"),
    )
    axis.set_xticks(range(8))
    axis.set_ylim(0, 1.15 * max(float(u.mean_saliency.max()) for u in use.values()))
axes[0].set_ylabel("REAP's worth (blue: kept)")
plt.show()
for name, ways in chosen.items():
    both = len(set(ways["worth"]) & set(ways["often"]))
    print(f"{name}: by worth {sorted(ways['worth'])}, by use {sorted(ways['often'])}, {both} of 4 the same")

# %% [markdown] lang="en"
# **Worth** of an expert, by REAP: over the tokens that chose it, the mean of *router weight times length of its output*. That is how much it moves the hidden state when it is asked. **Use** is how often it is asked. This teacher was balanced (lesson 5), so all are used about as often, 11 to 14 %, and a count says next to nothing. Their worth differs up to five times.
#
# ## The cut
#
# Half of the experts go, in every layer: 4 of 8 stay, and the router keeps their rows. Two students: one keeps the 4 of most worth, the other 4 drawn by chance. (The recipe reads prompts of all levels, the figure hard ones alone; where the two choose another expert, it shows that worth is a property of a text.)

# %% [markdown] lang="zh"
# 按 REAP 的定义，专家的**价值**是：对选中它的那些词元，取“路由权重 × 输出的长度”的平均，也就是被问到时它把隐藏状态推动了多少。**使用率**则是它多久被问一次。这位教师做过均衡（第 5 课），各个专家用得差不多，都是 11% 到 14%，只数次数几乎什么也看不出；价值却能相差五倍。
#
# ## 剪枝
#
# 每一层砍掉一半专家：8 个留 4 个，路由器也只留这 4 行。两个学生：一个留价值最高的 4 个，另一个随机抽 4 个。（配方读的是各个难度的题，上图只读难题；若两者选出的专家不同，正说明价值取决于文本。）

# %%
common = [
    f"prompts.levels={scaled('{easy: 60, medium: 60, hard: 260}', '{hard: 28}')}",
    f"train.steps={scaled(50, 6)}",
    "train.warmup_steps=5",
    f"train.batch_size={scaled(32, 4)}",
    f"student.from.calibration={{rows: {scaled(64, 8)}}}",
]
runs = {}
for how in ("reap", "random"):
    settings = [*common, f"student.from={{model: checkpoints/teacher, experts: {{drop: 0.5, how: {how}}}}}"]
    runs[how] = experiment(folder / how, settings, command="base", recipe="recipes/prune_experts.yaml")
    print(how, read_json(runs[how] / "base" / "manifest.json")["experts"]["experts"])

problems = held_out_problems({"hard": scaled(84, 14)})
rows = {"whole": ask(teacher, tokenizer, problems)}
for how, run in runs.items():
    rows[f"cut by {how}"] = ask(load_model(str(run / "base"), "fp32"), tokenizer, problems)
for name, found in rows.items():
    print(f"{name:14} right {share(found)}")


def compared(one, other):
    """What `one` has more of right answers than `other`, on the same problems, with its interval."""
    found = paired_comparison(*([row["verdict"] == "correct" for row in rows[name]] for name in (one, other)))
    low, high = (100 * end for end in found["ci95"])
    print(
        f"{one} minus {other}: {100 * found['difference']:+.0f} points [{low:+.0f}, {high:+.0f}], {found['verdict']}"
    )
    return found


compared("cut by reap", "cut by random")
whole, cut = accuracy(rows["whole"]), accuracy(rows["cut by reap"])
expect("right answers of the whole model", whole, 0.9, 1, short=True, without=cut)
expect("right answers with half of the experts", cut, 0.4, 0.9, without=whole)

# %% [markdown] lang="en"
# Three of four answers stay right, without any training: the experts that stay step in, as in lesson 5. Which ones stay matters; the line “cut by reap minus cut by random” says how sure that is. What is lost is lost in the working: one wrong digit, and the answer is wrong.
#
# How many experts can go? The next cell forbids the router more and more of them, those of least worth first, and asks half of the problems again. At 4 experts it does not show the score of the table above: it asks fewer problems, and some of the experts that stay are others. Move the slider.

# %% [markdown] lang="zh"
# 不经任何训练，四道题里仍有三道答对：留下的专家顶上了，和第 5 课一样。留下哪几个是有差别的；“cut by reap minus cut by random” 一行说明这个差别有多确定。丢掉的分丢在推导里：错一个数字，答案就错。
#
# 到底能去掉几个专家？下一个单元格让路由器能用的专家越来越少，价值最低的先去掉，再问一半的题。4 个专家处的得分与上表不同：题目更少，留下的专家也有几个不同。拖动滑块看看。

# %%
few = problems[: scaled(42, 14)]
stays = scaled([2, 3, 4, 5, 6, 7, 8], [2, 8])
right = []
for count in stays:
    gone = {
        number: one.mean_saliency.argsort()[: 8 - count].tolist()
        for number, one in enumerate(use.values(), 1)
    }
    with drop_experts(teacher, gone) if count < 8 else contextlib.nullcontext():
        right.append(accuracy(ask(teacher, tokenizer, few)))
print("   ".join(f"{count} experts: {100 * found:.0f} %" for count, found in zip(stays, right)))
expect("right answers with 2 of 8 experts", right[0], 0, 0.6, short=True, without=right[-1])
slider(
    "walk",
    at=stays,
    start=stays.index(scaled(4, 2)),
    knob={"en": "experts that stay, of 8", "zh": "留下的专家（共 8 个）"},
    unit={"en": f"right answers to {len(few)} hard problems, %", "zh": f"{len(few)} 道难题答对的比例，%"},
    lines=[{"name": {"en": "right", "zh": "答对"}, "y": [100 * found for found in right]}],
)

# %% [markdown] lang="en"
# ## Recovery
#
# Now the whole model teaches the cut one: forward KL from its distribution (lesson 2), all weights train, 50 steps. The control trains on the same questions with the right results, and without a teacher.

# %% [markdown] lang="zh"
# ## 恢复
#
# 现在由完整的模型来教被剪的模型：用它的分布做前向 KL（第 2 课），训练全部权重，50 步。对照组做同样的题，有正确结果，但没有教师。

# %%
for how, run in runs.items():
    settings = [*common, f"student.from={{model: checkpoints/teacher, experts: {{drop: 0.5, how: {how}}}}}"]
    if how != "reap":
        settings.append("control.enabled=false")  # one control is enough
    for command in ("generate", "filter", "train"):
        experiment(run, settings, command=command, recipe="recipes/prune_experts.yaml")
    rows[f"taught, {how}"] = ask(load_model(str(run / "student"), "fp32"), tokenizer, problems)
rows["control, reap"] = ask(load_model(str(runs["reap"] / "control"), "fp32"), tokenizer, problems)

order = ["whole", "cut by reap", "control, reap", "taught, reap", "cut by random", "taught, random"]
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4))
for how, style in (("reap", "-"), ("random", "--")):
    left.plot([line["loss"] for line in step_log(runs[how] / "student")], style, label=f"taught, {how}")
left.set(xlabel="optimizer step", ylabel="KL from the whole model (nats)", yscale="log")
left.legend()
for place, name in enumerate(order):
    n, score = len(problems), accuracy(rows[name])
    low, high = wilson_interval(round(score * n), n)
    colour = "C0" if name.startswith("taught") else "0.4"
    right.plot([100 * low, 100 * high], [place, place], color=colour, linewidth=3)
    right.plot(100 * score, place, "o", color=colour)
    print(f"{name:14} right {share(rows[name])}")
right.set_yticks(range(len(order)), order)
right.set(xlabel=f"right answers to {len(problems)} hard problems, %, with 95 % interval", xlim=(-2, 102))
right.invert_yaxis()
plt.show()

gain = compared("taught, reap", "control, reap")
mended = compared("taught, reap", "cut by reap")
compared("taught, reap", "taught, random")
taught = accuracy(rows["taught, reap"])
expect("taught, right answers", taught, 0.8, 1, without=cut)
expect("taught minus cut, lower end of the interval", mended["ci95"][0], 0.01, 0.6, without=0)
expect("taught minus control, lower end of the interval", gain["ci95"][0], 0.1, 1, without=0)

# %% [markdown] lang="en"
# Before the cut the teacher solves {{right answers of the whole model|%}} %, after it {{right answers with half of the experts|%}} %, and after 50 steps of its own teaching {{taught, right answers|%}} %. The control had the right results and not the working. It did not only fail to mend the working, it unlearned what was left of it. And the random cut? Taught as long, it is nearly level: the last line has the difference, and its interval. A good choice of experts matters most where nobody trains afterwards.
#
# ## Four bits on top
#
# NVFP4 stores a weight in four bits, and a scale of eight bits for each 16 of them (lesson 4). What do *rounded experts* do to the answers, and to the router, whose own weights stay as they are?

# %% [markdown] lang="zh"
# 剪枝之前教师答对 {{right answers of the whole model|%}}%，剪枝之后 {{right answers with half of the experts|%}}%，由它自己教 50 步之后 {{taught, right answers|%}}%。对照组有正确结果，没有推导：它不但没补回推导，连剩下的那点也忘了。随机剪枝呢？教同样久之后几乎追平：最后一行给出差距和区间。怎么挑专家，在事后不训练时最要紧。
#
# ## 再压到四位
#
# NVFP4 用四位存一个权重，每 16 个权重另配一个八位的缩放系数（第 4 课）。*专家舍入到四位*之后，答案会怎样？路由器自己的权重不变，它又会怎样？

# %%
from distill.data import TokenRows
from distill.evaluation import precision_sweep

student = load_model(str(runs["reap"] / "student"), "fp32")
prompts = [prompt_ids(tokenizer, p["messages"]) for p in problems]
written = TokenRows(prompts, [row["completion_ids"] for row in rows["taught, reap"]])
formats = ("bf16", "nvfp4-emulated-experts", "nvfp4-emulated")
found = precision_sweep(student, written, tokenizer.pad_token_id, formats,
                        answers=lambda model: {"hard": accuracy(ask(model, tokenizer, problems))})  # fmt: skip
size = {"whole, bf16": 2 * sum(p.numel() for p in teacher.parameters())}
print(f"{'whole, bf16':30} {size['whole, bf16'] / 1e6:5.2f} MB")
for one in found:
    size[one["precision"]] = one.get("weight_bytes") or 2 * sum(p.numel() for p in student.parameters())
    print(f"{'half of the experts, ' + one['precision'].replace('-emulated', ''):40} {size[one['precision']] / 1e6:5.2f} MB   "
          f"right {100 * one['tasks']['hard']:3.0f} %   KL from fp32 {one['kl']:.4f}   "
          f"tokens sent to another expert {100 * one['flips']['tokens']:.1f} %")  # fmt: skip
whole_size, moved = size["whole, bf16"], [one["flips"]["tokens"] for one in found]
small = size["nvfp4-emulated-experts"] / whole_size
expect("experts in four bits, size over the whole model in bf16", small, 0.3, 0.45, short=True, without=1)
expect(
    "experts in four bits, tokens sent elsewhere", moved[1], 0.02, 0.15, short=(0.005, 0.9), without=moved[0]
)
expect(
    "all layers in four bits, tokens sent elsewhere",
    moved[2],
    0.15,
    0.6,
    short=(0.05, 0.95),
    without=moved[1],
)

# %% [markdown] lang="en"
# Experts in four bits cost nothing that this exam can see, though some tokens go elsewhere: the router's own weights are untouched, but what it reads has changed. With attention in four bits too, more go elsewhere, and right answers are lost. Most of the bytes lie in the experts, and they bear rounding best. So half of the experts, in four bits, take {{experts in four bits, size over the whole model in bf16|%}} % of the bytes of the whole model.
#
# Rounding *after* training is the cheap way. `recipes/four_bits.yaml` trains with the rounding on, from the model's own distribution, and puts both beside each other.
#
# ## Exercises
#
# **8.1** Write `reap(weights, outputs)`: the worth of one expert. `weights` [T] are its router weights at the tokens that chose it, `outputs` [T, d] its outputs there.

# %% [markdown] lang="zh"
# 专家压到四位，这场考试看不出损失，虽然有些词元去了别处：路由器自己的权重没有动，它读到的东西却变了。连注意力也压到四位，去别处的词元就多了，答对的也少了。大部分字节在专家里，而专家最经得起舍入。于是，一半的专家、每个权重四位，只占完整模型字节数的 {{experts in four bits, size over the whole model in bf16|%}}%。
#
# 训练*之后*再舍入是便宜的办法。`recipes/four_bits.yaml` 则带着舍入训练，向模型自己的分布学习，并把两者放在一起比较。
#
# ## 练习
#
# **8.1** 写出 `reap(weights, outputs)`：一个专家的价值。`weights` [T] 是选中它的词元处的路由权重，`outputs` [T, d] 是它在这些词元处的输出。


# %% tags=["exercise"]
def reap(weights, outputs): ...  # your code -> a number


# %% tags=["solution"]
def reap(weights, outputs):
    return float((weights * outputs.norm(dim=-1)).mean())


# %%
exercise(
    "8.1",
    lambda: (
        abs(reap(torch.tensor([0.5, 1.0]), torch.tensor([[3.0, 4.0], [0.0, -2.0]])) - 2.25) < 1e-6
        and abs(reap(torch.tensor([0.2]), torch.tensor([[0.0, 5.0]])) - 1.0) < 1e-6
    ),
    "the length of each output (norm over d), times its weight, then the mean over the tokens",
)

# %% [markdown] lang="en"
# **8.2** Which experts stay? Write `kept(worth, share)`: the numbers of the experts that stay, in rising order, when `share` of them goes and those of most worth stay.

# %% [markdown] lang="zh"
# **8.2** 哪些专家留下？写出 `kept(worth, share)`：砍掉比例为 `share` 的专家、留下价值最高的那些，返回留下的编号，从小到大排列。


# %% tags=["exercise"]
def kept(worth, share): ...  # your code: worth [E], a share from 0 to 1 -> a list of numbers


# %% tags=["solution"]
def kept(worth, share):
    stay = len(worth) - round(share * len(worth))
    return sorted(sorted(range(len(worth)), key=lambda e: float(worth[e]))[-stay:])


# %%
exercise(
    "8.2",
    lambda: (
        list(kept([0.1, 0.9, 0.5, 0.7], 0.5)) == [1, 3]
        and list(kept([5, 4, 3, 2, 1, 0, 7, 6], 0.25)) == [0, 1, 2, 3, 6, 7]
    ),
    "how many stay: E minus share * E; those of largest worth; then sort their numbers",
)

# %% [markdown] lang="en"
# **8.3** How many bytes do `n` weights take in NVFP4, scales included? A scale of one byte serves 16 weights; a last block that is not full has its scale too. Write `nvfp4_bytes(n)`.

# %% [markdown] lang="zh"
# **8.3** `n` 个权重用 NVFP4 存储要多少字节（含缩放系数）？每 16 个权重共用一个一字节的缩放系数；最后不满 16 个的一块也有自己的系数。写出 `nvfp4_bytes(n)`。


# %% tags=["exercise"]
def nvfp4_bytes(n): ...  # your code; two weights in a byte


# %% tags=["solution"]
def nvfp4_bytes(n):
    return -(-n // 2) + -(-n // 16)


# %%
exercise(
    "8.3",
    lambda: [nvfp4_bytes(n) for n in (16, 32, 40, 1600)] == [9, 18, 23, 900],
    "half a byte for each weight, one byte for each block of 16, rounded up",
)

# %% [markdown] lang="en"
# ## What commonly goes wrong
#
# - **Chosen on other text than it is used on.** The worth of an expert is a property of a text. Choose on questions of the kind that the model will get.
# - **Active parameters confused with all.** Half of the experts halve the *memory* of the experts. A token still uses two of them, so the arithmetic stays.
# - **A cut judged without recovery, or recovery without a control.** Both are needed: what was lost, and what training alone would have mended.
# - **The router in four bits.** Keep router, norms, embedding and head in 16 bits; they are few.

# %% [markdown] lang="zh"
# ## 常见问题
#
# - **挑选时读的文本与使用时不同。** 专家的价值取决于文本；要用模型将来会遇到的那类题目来挑选。
# - **把激活参数当成全部参数。** 专家减半，省的是专家的*存储*；每个词元仍然用两个专家，计算量不变。
# - **只看剪枝、不看恢复，或者只看恢复、没有对照。** 两样都要：损失了什么；光靠训练能补回多少。
# - **把路由器也压到四位。** 路由器、归一化、嵌入层和输出头保持 16 位，它们本来就不多。
