# %% [markdown] lang="en"
# # Lesson 1. What a teacher knows
#
# Distillation trains a small model on the outputs of a large one. Before any training, look at what those outputs are: texts, and behind every token of a text a whole probability distribution.
#
# **After this lesson you can** say what a teacher's output contains beyond the text; choose a sampling temperature and say what it costs; turn samples into a training set by rejection sampling, train a first student on it, and name what that leaves out.
#
# **Class time** 35 minutes (10 looking at outputs, 15 temperature, rejection sampling and a first student, 10 exercises and check). Computing: {{minutes}} minutes on one CPU thread.
#
# | your machine | what to run |
# |---|---|
# | 2-core CPU | this notebook as it is; under 1 GB of memory |
# | GPU with 8 GB | this notebook as it is, or a 1.7B teacher in bf16 (3.4 GB of weights): `distill generate recipes/demo.yaml --teacher Qwen/Qwen3-1.7B run_dir=checkpoints/lesson1-qwen generate.max_new_tokens=1024` in a terminal in the project's folder |
# | T4 (16 GB, no bf16) | the same with `teacher.dtype=fp16`; `bf16` is refused there, with the reason |
# | one card with 24 GB | an 8B teacher in bf16 (16 GB of weights), or `teacher.quantize=4bit` (5 GB) |
#
# (bf16, fp16 and 4 bits are number formats: lesson 4. A *token* is a piece of text, here mostly one character.)
#
# What the first cell uses: `begin` goes to the project's folder and gives this lesson a folder for its files; `ask` gives a row per answer with `prompt`, `text`, `verdict`, `reference` and `prompt_id`. `expect`, later, prints a number beside its range. If the number is outside its range, the lesson says so and goes on.

# %% [markdown] lang="zh"
# # 第 1 课 教师模型知道什么
#
# 蒸馏，就是用大模型的输出来训练小模型。动手训练之前，先看看这些输出里到底有什么：除了文本，每个词元（token）背后还有一整个概率分布。
#
# **学完本课，你能够**：说清教师的输出除了文本还包含什么；选择采样温度，并说出它的代价；用拒绝采样把样本变成训练集，训练出第一个学生，并指出这样做会漏掉什么。
#
# **课堂用时** 35 分钟（观察输出 10 分钟，温度、拒绝采样和第一个学生 15 分钟，练习与自测 10 分钟）。计算用时：单线程 CPU 约 {{minutes}} 分钟。
#
# | 你的机器 | 怎么跑 |
# |---|---|
# | 双核 CPU | 直接运行本笔记本；内存不到 1 GB |
# | 8 GB 显存的 GPU | 直接运行；或用 bf16 的 1.7B 教师（权重 3.4 GB）：`distill generate recipes/demo.yaml --teacher Qwen/Qwen3-1.7B run_dir=checkpoints/lesson1-qwen generate.max_new_tokens=1024`（在项目文件夹的终端里输入） |
# | T4（16 GB，不支持 bf16） | 同上，加 `teacher.dtype=fp16`；在 T4 上选 bf16 会被拒绝并说明原因 |
# | 一张 24 GB 的卡 | bf16 的 8B 教师（权重 16 GB），或 `teacher.quantize=4bit`（5 GB） |
#
# （bf16、fp16、4 位是数值格式，见第 4 课。*词元*是一小段文本，这里多半是一个字符。）
#
# 第一个单元格用到的函数：`begin` 进入项目文件夹，并给本课一个存放文件的文件夹；`ask` 每个答案返回一行，含 `prompt`、`text`、`verdict`、`reference`、`prompt_id`。后面的 `expect` 把数值打印在预期区间旁边；超出区间只是说明一下，课程照常继续。

# %%
import matplotlib.pyplot as plt
import torch

from distill import load_model, load_tokenizer
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
)

folder = begin(1)
tokenizer = load_tokenizer("checkpoints/teacher")
teacher = load_model("checkpoints/teacher")  # a small, real DeepSeek-V3: latent attention, routed experts
base = load_model("checkpoints/base")  # the future student: it has seen two-digit problems only

problems = held_out_problems({"hard": scaled(84, 28)})
for name, model in (("teacher", teacher), ("base", base)):
    row = ask(model, tokenizer, problems[:1])[0]
    print(
        f"{name:8} {row['prompt']}\n         {row['text']}   -> {row['verdict']}, answer {row['reference']}\n"
    )

# %% [markdown] lang="en"
# The teacher writes its *working* between `<think>` tags, then the answer. The public problem has only the answer. That working is what the student will learn, just as DeepSeek-R1's reasoning traces taught Qwen and Llama models. It goes digit by digit from the right. In the teacher's `6*9+2=56` the 2 is the carry that comes in; after the equals sign stand the carry that goes out, 5, and the digit of the result, 6.
#
# How often is each right? *Greedy* takes the likeliest token each time. One number is not enough: with 84 problems the 95 % interval of a score near 50 % is about ±11 points.

# %% [markdown] lang="zh"
# 教师把*推导过程*写在 `<think>` 标签之间，然后给出答案；公开的题目只有答案。学生要学的正是这段推导，就像 DeepSeek-R1 的推理轨迹教会了 Qwen 和 Llama 一样。它从右往左逐位计算。教师写的 `6*9+2=56` 里，2 是进来的进位；等号后先是送出的进位 5，再是这一位的数字 6。
#
# 两个模型各答对多少？*贪心*（greedy）每次取最可能的词元。只报一个数不够：84 道题时，若正确率在 50% 左右，95% 置信区间大约是 ±11 个百分点。

# %%
greedy = ask(teacher, tokenizer, problems)
of_base = ask(base, tokenizer, problems)
print(f"teacher {share(greedy)}\nbase    {share(of_base)}")
expect("teacher, hard problems, greedy", accuracy(greedy), 0.93, 1.0, short=True, without=accuracy(of_base))
expect("base, hard problems, greedy", accuracy(of_base), 0.0, 0.2, short=True, without=accuracy(greedy))

# %% [markdown] lang="en"
# ## Behind the text: a distribution at every token
#
# One forward pass over prompt and answer gives, at every position, the probability of each of the 391 tokens of this vocabulary. *Logits* are the scores that softmax turns into these probabilities; `KeptLogits` returns them for the answer's tokens only.
#
# Entropy says how undecided a model is: 0 nats is certainty, ln 391 = 5.97 is a die with 391 sides.

# %% [markdown] lang="zh"
# ## 文本背后：每个词元都有一个分布
#
# 把题目和答案一起做一次前向计算，每个位置上就得到词表中 391 个词元各自的概率。*logits* 是 softmax 之前的分数，经它变成概率；`KeptLogits` 只返回答案部分的 logits。
#
# 熵表示模型有多犹豫：0 nat 是完全确定，ln 391 = 5.97 则相当于掷一枚 391 面的骰子。

# %%
import numpy as np

from distill import cross_entropy
from distill.data import TokenRows
from distill.models import KeptLogits, prompt_ids


def logits_on(model, rows):
    """Logits [N, V] at every token of the answers in `rows`, and those tokens' ids [N]."""
    asked = [prompt_ids(tokenizer, [{"role": "user", "content": row["prompt"]}]) for row in rows]
    batch = TokenRows(asked, [row["completion_ids"] for row in rows]).collate(
        np.arange(len(rows)), tokenizer.pad_token_id
    )
    with torch.inference_mode(), KeptLogits(model) as kept:
        return kept(batch.input_ids, batch.attention_mask, batch.keep), batch.targets


def entropy(logits):
    """Shannon entropy in nats per row: logits [N, V] -> [N]."""
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


teacher_logits, tokens = logits_on(teacher, greedy)
base_logits, _ = logits_on(base, greedy)
of_teacher, of_base = entropy(teacher_logits).mean(), entropy(base_logits).mean()
surprise = [cross_entropy(logits, tokens).mean() for logits in (base_logits, teacher_logits)]
expect("teacher, mean entropy (nats)", of_teacher, 0.0, 0.01, short=True, without=of_base)
expect("base, mean entropy on the same text", of_base, 0.1, 0.4, short=True, without=of_teacher)
expect("base, mean -log p of the teacher's token", surprise[0], 2.0, 6.0, short=True, without=surprise[1])

row, length = greedy[0], len(greedy[0]["completion_ids"])
names = [tokenizer.decode([t]) for t in row["completion_ids"]]
figure, axis = plt.subplots(figsize=(10, 3))
for label, logits in (("base", base_logits), ("teacher", teacher_logits)):
    chosen = logits[:length].softmax(-1)[torch.arange(length), tokens[:length]]
    axis.plot(chosen, ".-", label=label)
axis.set_xticks(range(length), names, fontsize=7, rotation=90)
axis.set(ylabel="probability of this token", title=row["prompt"], ylim=(-0.05, 1.05))
axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
plt.show()

# %% [markdown] lang="en"
# The teacher is nearly certain everywhere. The base goes wrong where the longer problem begins to differ from what it knows, and its entropy stays low: it is sure and wrong. So certainty is not knowledge. Its -log p of the teacher's tokens is near that of a blind guess (5.97); this number, averaged over tokens, is the loss that training lowers.
#
# Where a teacher *does* hesitate, its second choice carries information that the text alone has not: Hinton called it dark knowledge. In language that is a synonym, or another way to go on; in arithmetic only one digit is right, so here it shows where the teacher nearly slips. Whether it helps a student of this size is a claim that `recipes/claims.yaml` tests (lesson 6).

# %% [markdown] lang="zh"
# 教师几乎处处确定。较长的题目从哪里开始不同于它所见过的，base 就从哪里乱了阵脚，熵却仍然很低：它错得很自信，可见“确定”不等于“知道”。它对教师词元的 -log p 接近瞎猜的值（5.97）；这个数对词元取平均，就是训练要降低的损失。
#
# 教师*真正*犹豫的地方，它的第二选择携带着文本里没有的信息，Hinton 称之为“暗知识”。在语言里，那是近义词或另一种说法；在算术里只有一个数字是对的，所以这里它显示教师差点出错的地方。它对这么小的学生是否有用，由 `recipes/claims.yaml` 检验（第 6 课）。

# %%
most = entropy(teacher_logits).topk(4).indices
for position in most.tolist():
    p, ids = teacher_logits[position].softmax(-1).topk(3)
    shown = ", ".join(f"{tokenizer.decode([i])!r} {q:.2f}" for q, i in zip(p.tolist(), ids.tolist()))
    print(f"wrote {tokenizer.decode([int(tokens[position])])!r}; its own choices: {shown}")

# %% [markdown] lang="en"
# ## Temperature
#
# Sampling divides the logits by a temperature T first: p = softmax(z / T). Below 1 the likeliest token gains, above 1 the distribution flattens. Why sample at all? One greedy answer per prompt is one way of saying it; several samples show the student more, as long as they stay right.

# %% [markdown] lang="zh"
# ## 温度
#
# 采样前先把 logits 除以温度 T：p = softmax(z / T)。T 小于 1，最可能的词元更突出；T 大于 1，分布变平。为什么要采样？贪心解码每题只有一种说法；多采几个样本，学生能看到更多，前提是它们仍然正确。

# %%
sharpest = teacher_logits[most[0]]
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.2))
for T in (0.5, 1.0, 2.0, 4.0):
    left.plot((sharpest / T).softmax(-1).sort(descending=True).values[:12], ".-", label=f"T = {T:g}")
left.set(xlabel="rank of the token", ylabel="probability", title="one position")
left.legend()

temperatures = scaled([0.7, 1.0, 1.5, 2.0, 2.5], [0.7, 2.0])
few = problems[:42]
samples = {T: ask(teacher, tokenizer, few, temperature=T, samples=4) for T in temperatures}
right.plot(temperatures, [accuracy(rows) for rows in samples.values()], "o-", label="correct")
different = [len({(r["prompt_id"], r["text"]) for r in rows}) / len(rows) for rows in samples.values()]
right.plot(temperatures, different, "s--", label="different answers")
right.set(xlabel="temperature", ylabel="share of samples", ylim=(0, 1.05), title="4 samples a problem")
right.legend()
plt.show()
low, high = (accuracy(samples[T]) for T in (0.7, 2.0))
expect("correct at T = 0.7", low, 0.93, 1.0, short=True, without=high)
expect(
    "different answers at T = 0.7",
    different[0],
    0.25,
    0.35,
    short=True,
    without=different[temperatures.index(2.0)],
)
expect("correct at T = 2", high, 0.4, 0.75, short=True, without=low)
top = sharpest.topk(6)
slider("temperature", scores=top.values.tolist(), names=[tokenizer.decode([i]) for i in top.indices.tolist()])

# %% [markdown] lang="en"
# At T = 0.7 four samples are mostly one answer four times: paid for, and dropped as duplicates. At T = 2 more of them differ, and of these hard problems four in ten are answered wrongly.
#
# ## Rejection sampling
#
# A verifier reads each answer, and what is wrong is not trained on. Wrong answers then cost tokens rather than quality (at this size the difference is too small to decide: lesson 6). The stages `generate` and `filter` of a recipe do this, and keep an account of what was dropped and why. Here: a small run of `recipes/demo.yaml`, a file that says all of a run's settings. It asks for one kind of problem, long additions, with T = 2 and four samples each.

# %% [markdown] lang="zh"
# T = 0.7 时，四个样本大多是同一个答案：钱花了，最后当作重复丢掉。T = 2 时不同的答案更多，但这些困难题大约四成答错。
#
# ## 拒绝采样
#
# 判题规则检查每个答案，错的不进训练集。于是错误答案多花的是词元，而不致损害质量（在这个规模上差别小到定不下来，见第 6 课）。配方（recipe）里的 `generate` 和 `filter` 两个阶段做的就是这件事，并逐条记录丢掉了什么、为什么。下面用 `recipes/demo.yaml`（一份写明运行全部设置的文件）跑一个小规模的例子：只出一种题，长加法，T = 2，每题四个样本。

# %%
from distill.data import explain
from distill.storage import read_json

settings = [
    "prompts.families=[addition]",
    f"prompts.levels={scaled('{easy: 30, hard: 130}', '{hard: 28}')}",
    "generate.samples=4",
    "generate.temperature=2.0",
    "train.objectives=[{name: cross_entropy}]",
    f"train.steps={scaled(50, 3)}",
    "train.warmup_steps=2",
    f"train.batch_size={scaled(32, 4)}",
    "train.checkpoint_every=0",
]
run = experiment(folder / "sampling", settings, command="generate")
experiment(folder / "sampling", settings, command="filter")
print(explain(run, examples=1))
counts = read_json(run / "dataset" / "manifest.json")["counts"]
asked = counts["kept"] + counts["dropped"]
duplicates = counts["dropped_by_rule"].get("duplicate", 0)
wrong = 1 - (counts["kept"] + duplicates) / asked
expect("share of samples that are not right", wrong, 0.25, 0.6, short=True, without=1 - low)
expect("share that is kept", counts["kept"] / asked, 0.2, 0.6, short=True, without=1)

# %% [markdown] lang="en"
# ## Do these rows teach?
#
# A student trains on the rows that were kept, 50 small steps of them. The base solves no long addition. The *control* trains as long, on the same questions with the right results, without what the teacher wrote. All three answer additions that nobody has seen.

# %% [markdown] lang="zh"
# ## 这些数据教得会吗？
#
# 让学生在留下的数据上训练 50 小步。底座一道长加法也不会。*对照组*（control）训练得一样久，题目相同，有正确结果，但没有教师写的内容。三者回答同一批谁也没见过的加法题。

# %%
experiment(run, settings)
unseen = held_out_problems({"hard": scaled(60, 14)}, families=["addition"])
rows = {"base": ask(base, tokenizer, unseen)}
for name in ("control", "student"):
    rows[name] = ask(load_model(str(run / name)), tokenizer, unseen)
for name, found in rows.items():
    print(f"{name:8} right {share(found)}")
print(f"\n{rows['student'][0]['prompt']}")
for name, found in rows.items():
    print(f"{name:8} {found[0]['text']}")
of_control = accuracy(rows["control"])
expect("student, right answers", accuracy(rows["student"]), 0.15, 1, without=accuracy(rows["base"]))
expect("student minus control", accuracy(rows["student"]) - of_control, 0.15, 1,
       without=accuracy(rows["base"]) - of_control)  # fmt: skip

# %% [markdown] lang="en"
# The results alone teach nothing here; the teacher's texts teach it to {{student, right answers|%}} % of problems. That is the whole of sequence-level distillation, and DeepSeek made R1's students so.
#
# What rejection sampling leaves out: problems the teacher never solves vanish from the training set, so the set is easier than the world; a right answer with wrong working passes, because only the answer is checked; and where there is no verifier there is nothing to reject with.
#
# ## Exercises
#
# **1.1** Write `tempered(logits, T)`: the probabilities at temperature T. No loops.

# %% [markdown] lang="zh"
# 光有结果，在这里什么也教不会；用教师写的文本，学生答对 {{student, right answers|%}}%。序列级蒸馏就是这么回事，DeepSeek 训练 R1 的学生用的也是它。
#
# 拒绝采样漏掉了什么：教师从来做不对的题会从训练集中消失，所以训练集比真实世界容易；推导错误但答案碰巧正确的样本会通过，因为只检查答案；没有判题规则的任务，就无从拒绝。
#
# ## 练习
#
# **1.1** 写出 `tempered(logits, T)`：温度 T 下的概率。不要用循环。


# %% tags=["exercise"]
def tempered(logits, T): ...  # your code: logits [N, V] -> probabilities [N, V]


# %% tags=["solution"]
def tempered(logits, T):
    return (logits / T).softmax(-1)


# %%
exercise(
    "1.1",
    lambda: torch.allclose(tempered(teacher_logits[:9], 2.0), torch.softmax(teacher_logits[:9] / 2, -1)),
    "divide by T, then softmax over the vocabulary",
)

# %% [markdown] lang="en"
# **1.2** With `n` samples of a problem, `c` of them right, what is the chance that `k` samples drawn from them contain a right one? (pass@k, Chen et al. 2021.) Use `math.comb`.

# %% [markdown] lang="zh"
# **1.2** 一道题采样 `n` 次，其中 `c` 次正确。从中任取 `k` 个，至少有一个正确的概率是多少？（即 pass@k，Chen 等 2021）请用 `math.comb`。

# %% tags=["exercise"]
from math import comb


def pass_at(n, c, k): ...  # your code


# %% tags=["solution"]
def pass_at(n, c, k):
    return 1 - comb(n - c, k) / comb(n, k)


# %%
from distill import pass_at_k

exercise(
    "1.2",
    lambda: all(abs(pass_at(8, c, k) - pass_at_k(8, c, k)) < 1e-12 for c in range(9) for k in (1, 2, 8)),
    "1 minus the chance that all k are wrong: comb(n - c, k) ways out of comb(n, k)",
)

# %% [markdown] lang="en"
# **1.3** Which temperature in `samples` gives the most *usable* rows, right and different from each other? Count, per temperature, the distinct pairs of `prompt_id` and `text` whose `verdict` is `"correct"`, and set `best`.

# %% [markdown] lang="zh"
# **1.3** `samples` 中哪个温度给出的*可用*样本最多，即正确且互不相同？对每个温度，数一数 `verdict` 为 `"correct"` 的不同（`prompt_id`，`text`）对，再给 `best` 赋值。

# %% tags=["exercise"]
best = ...  # one of temperatures


# %% tags=["solution"]
def usable(rows):
    return len({(r["prompt_id"], r["text"]) for r in rows if r["verdict"] == "correct"})


best = max(samples, key=lambda T: usable(samples[T]))

# %%
kept = {
    T: len({(r["prompt_id"], r["text"]) for r in rows if r["verdict"] == "correct"})
    for T, rows in samples.items()
}
exercise(
    "1.3",
    lambda: kept[best] == max(kept.values()),
    "count distinct (problem, text) pairs with verdict correct",
)

# %% [markdown] lang="en"
# ## What commonly goes wrong
#
# - **Every answer is cut off.** `max_new_tokens` is too small for a teacher that thinks: the verdict is `truncated`, and a training set of such rows teaches never to stop. Look at the counts before you train.
# - **"Twice the samples" changes nothing.** At low temperature they are duplicates; raise T, or ask more questions instead.
# - **The verifier says 0 %.** It looks for another form of answer than the model writes. Read three rows first.
# - **Score and sampling disagree.** A score at T = 0 says nothing about the text a student will read at T = 1.
#
# Next: [lesson 2](lesson2.ipynb), what a student learns from all this.

# %% [markdown] lang="zh"
# ## 常见问题
#
# - **所有答案都被截断。** 对会思考的教师来说 `max_new_tokens` 太小：判定为 `truncated`；用这种数据训练，学生就学不会停。训练之前先看计数。
# - **“样本翻倍”毫无变化。** 低温下样本大多重复；提高 T，或者干脆多出题。
# - **判题规则给出 0%。** 它期待的答案格式和模型写的不一样。先读三行数据再说。
# - **得分和采样对不上。** T = 0 的得分说明不了学生在 T = 1 时读到的文本质量。
#
# 接下来：[第 2 课](lesson2.zh-CN.ipynb)，学生从中学到什么。
