# %% [markdown] lang="en"
# # Lesson 2. The loss decides what is learned
#
# Teacher and student both give a distribution over the next token. A loss says what "close" means, and when the student is too small to match everything, the loss decides what it gives up.
#
# **After this lesson you can** say what cross-entropy on text, forward KL, reverse KL and Jensen-Shannon each ask of a student; predict which one covers and which one picks; say when on-policy training helps and what it costs.
#
# **Class time** 40 minutes (15 the toy, 15 text and on-policy, 10 exercises and check). Computing: {{minutes}} minutes on one CPU thread.
#
# | your machine | what to run |
# |---|---|
# | 2-core CPU | this notebook as it is; about 1 GB of memory |
# | GPU with 8 GB | this notebook, or a 1.7B teacher and a 0.6B student, both in bf16 (3.4 + 1.2 GB of weights): `distill run recipes/demo.yaml --teacher Qwen/Qwen3-1.7B --student Qwen/Qwen3-0.6B run_dir=checkpoints/mine train.micro_batch_size=2` |
# | T4 (16 GB, no bf16) | the same with `train.precision=fp16` (`auto` chooses it) |
# | one card with 24 GB | a 4B teacher (8 GB of weights) scoring a 0.6B student live, `train.micro_batch_size=4` |

# %% [markdown] lang="zh"
# # 第 2 课 损失函数决定学到什么
#
# 教师和学生都会给出下一个词元的分布。损失函数规定什么叫“接近”；当学生太小、无法面面俱到时，由损失函数决定它放弃什么。
#
# **学完本课，你能够**：说清文本交叉熵、前向 KL、反向 KL 和 Jensen-Shannon 散度各自对学生提出什么要求；预测哪一个会“覆盖”，哪一个会“挑选”；说出 on-policy 训练何时有用、代价是什么。
#
# **课堂用时** 40 分钟（玩具例子 15 分钟，文本与 on-policy 15 分钟，练习与自测 10 分钟）。计算用时：单线程 CPU 约 {{minutes}} 分钟。
#
# | 你的机器 | 怎么跑 |
# |---|---|
# | 双核 CPU | 直接运行本笔记本；内存约 1 GB |
# | 8 GB 显存的 GPU | 直接运行；或用 bf16 的 1.7B 教师和 0.6B 学生（权重 3.4 + 1.2 GB）：`distill run recipes/demo.yaml --teacher Qwen/Qwen3-1.7B --student Qwen/Qwen3-0.6B run_dir=checkpoints/mine train.micro_batch_size=2` |
# | T4（16 GB，不支持 bf16） | 同上，加 `train.precision=fp16`（`auto` 会自动选它） |
# | 一张 24 GB 的卡 | 4B 教师（权重 8 GB）在线给 0.6B 学生打分，`train.micro_batch_size=4` |

# %%
import matplotlib.pyplot as plt
import torch

from distill import cross_entropy, forward_kl, generalized_jsd, load_model, load_tokenizer, reverse_kl
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

folder = begin(2)

# %% [markdown] lang="en"
# ## A toy one can see
#
# The "vocabulary" is 121 points on a line. The teacher has two modes: 60 % of its probability around +2, 40 % around -2. The student is one bell curve, with a centre and a width to learn: it *cannot* have two modes, as a small model cannot have all of a large one's.
#
# The losses are the toolkit's own, the ones a recipe names. Both arguments are logits [N, V].

# %% [markdown] lang="zh"
# ## 一个看得见的玩具例子
#
# “词表”是数轴上的 121 个点。教师有两个峰：60% 的概率在 +2 附近，40% 在 -2 附近。学生是一条钟形曲线，只能学中心和宽度：它*不可能*有两个峰，正如小模型装不下大模型的全部。
#
# 这里用的就是工具包自己的损失函数，也就是配方里写的那些名字。两个参数都是 logits [N, V]。

# %%
x = torch.linspace(-6, 6, 121)


def bell(centre, width):
    """Logits [1, 121] of a bell curve."""
    return (-((x - centre) ** 2) / (2 * width**2))[None]


teacher = torch.logaddexp(torch.tensor(0.6).log() + bell(2, 0.5), torch.tensor(0.4).log() + bell(-2, 0.5))
written = torch.multinomial(teacher.softmax(-1)[0], 2000, replacement=True)  # 2,000 tokens of its "text"


def fit(loss, centre=0.5, width=1.0, steps=250):
    """The bell curve that minimises `loss(logits [1, V])`, from the given start: (centre, width, logits)."""
    mu, log_width = torch.tensor(centre, requires_grad=True), torch.tensor(width).log().requires_grad_()
    optimizer = torch.optim.Adam([mu, log_width], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(bell(mu, log_width.exp())).mean().backward()
        optimizer.step()
    return float(mu.detach()), float(log_width.exp().detach()), bell(mu, log_width.exp()).detach()


losses = {
    "cross-entropy on text": lambda q: cross_entropy(q.expand(2000, -1), written),
    "forward KL": lambda q: forward_kl(q, teacher),
    "reverse KL": lambda q: reverse_kl(q, teacher),
    "JSD, beta 0.5": lambda q: generalized_jsd(q, teacher, beta=0.5),
}
fits = {name: fit(loss) for name, loss in losses.items()}

left_start = fit(losses["reverse KL"], centre=-3.0, width=0.5)  # the same loss from another start

figure, axes = plt.subplots(1, 2, figsize=(11, 3.2), sharey=True)
for axis, title in zip(
    axes, ("these cover both humps", "this one picks a hump; which one, the start decides")
):
    axis.fill_between(x, teacher.softmax(-1)[0], alpha=0.2, color="k", label="teacher")
    axis.set(title=title, xlabel="token")
for axis, label, logits, style in (
    (axes[0], "forward KL", fits["forward KL"][2], "-"),
    (axes[0], "cross-entropy on text", fits["cross-entropy on text"][2], "--"),
    (axes[0], "JSD, beta 0.5", fits["JSD, beta 0.5"][2], ":"),
    (axes[1], "reverse KL, started at 0.5", fits["reverse KL"][2], "-"),
    (axes[1], "reverse KL, started at -3", left_start[2], "--"),
):
    axis.plot(x, logits.softmax(-1)[0], style, linewidth=2.5, label=label)
axes[0].set(ylabel="probability", ylim=(0, 0.115))
for axis in axes:
    axis.legend(fontsize=9, loc="upper left")
plt.show()
covers, picks = fits["forward KL"], fits["reverse KL"]
expect("forward KL: centre", covers[0], 0.3, 0.5, short=True, without=picks[0])
expect("forward KL: width", covers[1], 1.9, 2.2, short=True, without=picks[1])
expect(
    "cross-entropy on text: width", fits["cross-entropy on text"][1], 1.9, 2.2, short=True, without=picks[1]
)
expect("reverse KL: centre", picks[0], 1.9, 2.1, short=True, without=covers[0])
expect("reverse KL: width", picks[1], 0.45, 0.6, short=True, without=covers[1])
slider("direction")

# %% [markdown] lang="en"
# - **Forward KL**, KL(teacher || student), is infinite where the teacher says something the student rules out. So the student *covers*: it puts most of its mass between the modes, where the teacher says nothing. A language model does the same when it hallucinates between two right answers.
# - **Cross-entropy on the teacher's text** lands in the same place: it is forward KL plus the teacher's entropy, estimated from samples. That is why sequence-level distillation (R1's way: only text) works at all.
# - **Reverse KL**, KL(student || teacher), costs only where the student itself speaks. So it *picks* one mode and forgets the other. Which one depends on the start, because this loss has several minima (from a start of width 1.5 the student even stays wide).
# - **Jensen-Shannon** lies between; beta moves it. From this start it still covers at 0.5. Yet the next table says that by its own measure the student that picks is nearer: gradient steps found the nearest minimum, not the best one. In this toolkit beta 0 is defined as forward and 1 as reverse KL.
#
# How much does each student cost by the other's measure? A table with a loss per column:

# %% [markdown] lang="zh"
# - **前向 KL**，即 KL(教师 || 学生)：教师会说的话，学生若排除掉，代价趋于无穷。所以学生会去*覆盖*：把大部分概率放在两峰之间，而那里教师什么也不说。语言模型在两个正确答案之间“幻觉”时就是这样。
# - **教师文本上的交叉熵**会落在同一处：它等于前向 KL 加上教师的熵，只是用样本来估计。所以只用文本的序列级蒸馏（R1 的做法）也行得通。
# - **反向 KL**，即 KL(学生 || 教师)：只在学生自己说话的地方计费。所以它会*挑选*一个峰，忘掉另一个。挑中哪一个取决于起点：它有好几个停留点（若从宽度 1.5 出发，它甚至会一直保持很宽）。
# - **Jensen-Shannon** 介于两者之间，由 beta 调节；取 0.5 时，从这个起点出发它仍在覆盖。不过下面的表显示，按它自己的尺子，挑一个峰的学生其实更近：梯度下降停在了最近的停留点，而不是最好的那个。本工具包规定 beta 为 0 即前向 KL，为 1 即反向 KL。
#
# 用别人的尺子来量，各个学生的代价是多少？每列是一种损失：

# %%
print(f"{'student of':24}{'forward KL':>12}{'reverse KL':>12}{'JSD':>8}")
for name, (_, _, q) in fits.items():
    values = [float(f(q, teacher)) for f in (forward_kl, reverse_kl, generalized_jsd)]
    print(f"{name:24}{values[0]:12.2f}{values[1]:12.2f}{values[2]:8.2f}")
by_forward, by_reverse = (
    [float(f(q[2], teacher)) for q in (picks, covers)] for f in (forward_kl, reverse_kl)
)
expect("reverse-KL student by forward KL", by_forward[0], 5, 30, short=True, without=by_forward[1])
expect("reverse-KL student by its own", by_reverse[0], 0.45, 0.57, short=True, without=by_reverse[1])

# %% [markdown] lang="en"
# That last number is ln(1/0.6) = 0.51: the student says with certainty what the teacher says with 60 %.
#
# ## On text
#
# The same losses on the real pair. One set of teacher answers, one base, the same rows in the same order; only `train.objectives` differs. One kind of problem, long additions: the base solves none of them, and 40 steps are enough to see a student become able. The control has as many steps of cross-entropy on the right results alone.

# %% [markdown] lang="zh"
# 最后这个数是 ln(1/0.6) = 0.51：教师有 60% 把握的话，学生说得斩钉截铁。
#
# ## 在文本上
#
# 把同样的损失用在真实的师生对上。同一批教师答案，同一个 base，同样的数据和顺序，只有 `train.objectives` 不同。只用一种题，长加法：底座一道也不会，40 步就足以看到学生学会。对照组用同样的步数，只在正确结果上做交叉熵。

# %%
common = [
    "prompts.families=[addition]",
    f"prompts.levels={scaled('{easy: 30, hard: 220}', '{hard: 32}')}",
    "generate.samples=1",
    f"train.steps={scaled(40, 3)}",
    "train.warmup_steps=2",
    f"train.batch_size={scaled(32, 8)}",
    "train.checkpoint_every=0",
]
data = experiment(folder / "data", common, command="generate")
experiment(data, common, command="filter")
students = {}
for name in ("cross_entropy", "forward_kl", "reverse_kl"):
    settings = [*common, f"train.objectives=[{{name: {name}}}]"]
    if name != "cross_entropy":
        settings.append("control.enabled=false")  # one control is enough
    students[name] = experiment(folder / name, settings, data=data)

for (name, run), style in zip(students.items(), ("-", "--", "-")):
    plt.plot([line["loss"] for line in step_log(run / "student")], style, label=name)
plt.yscale("log")
plt.xlabel("optimizer step")
plt.ylabel("its own loss (nats)")
plt.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
plt.show()

# %% [markdown] lang="en"
# Curves of different losses cannot be compared with each other. Fidelity can: on held-out problems, how far is each student from the teacher, on the *teacher's* answers and on its *own*?

# %% [markdown] lang="zh"
# 不同损失的曲线不能互相比较，但忠实度（fidelity）可以：在留出的题目上，每个学生离教师有多远？分别看*教师*写的答案和学生*自己*写的答案。

# %%
from distill import fidelity
from distill.evaluation import answer_rows

tokenizer = load_tokenizer("checkpoints/teacher")
master = load_model("checkpoints/teacher")
problems = held_out_problems({"hard": scaled(60, 14)}, families=["addition"])
prompts = [prompt_ids(tokenizer, p["messages"]) for p in problems]
taught = answer_rows(prompts, ask(master, tokenizer, problems), len(problems))


def judged(path):
    """{"rows", "on teacher's text", "on its own text"} of a checkpoint on the held-out problems."""
    model = load_model(str(path))
    rows = ask(model, tokenizer, problems)
    own = answer_rows(prompts, rows, len(problems))
    return {
        "rows": rows,
        "on teacher's text": fidelity(model, master, taught, tokenizer.pad_token_id),
        "on its own text": fidelity(model, master, own, tokenizer.pad_token_id),
    }


found = {"base": judged("checkpoints/base"), "control": judged(students["cross_entropy"] / "control")}
found |= {name: judged(run / "student") for name, run in students.items()}
print(
    f"{'':15}{'right':>20}{'agrees: teacher text':>22}{'own text':>10}{'forward KL':>12}{'reverse KL, own':>17}"
)
for name, one in found.items():
    there, own = one["on teacher's text"], one["on its own text"]
    print(
        f"{name:15}{share(one['rows']):>20}{there['top1_agreement']:22.3f}{own['top1_agreement']:10.3f}"
        f"{there['forward_kl']:12.3f}{own['reverse_kl']:17.3f}"
    )
agreement = {name: one["on teacher's text"]["top1_agreement"] for name, one in found.items()}
right = {name: accuracy(one["rows"]) for name, one in found.items()}
before = agreement["base"]
expect("base agrees with the teacher", before, 0.3, 0.66, short=True, without=agreement["cross_entropy"])
for name in ("cross_entropy", "forward_kl", "reverse_kl"):
    expect(f"{name}: agrees with the teacher", agreement[name], 0.8, 1, short=(0.3, 1), without=before)
for name in ("cross_entropy", "forward_kl"):
    expect(f"{name}: right answers", right[name], 0.3, 1, without=right["control"])
expect("reverse_kl: right answers", right["reverse_kl"], 0, 0.55, without=right["forward_kl"])

# %% [markdown] lang="en"
# Three things to read in this table:
#
# - **Cross-entropy and forward KL have nearly the same curve**, step by step. The teacher is nearly certain, so its text says all that its distribution says. Where a teacher hesitates (ordinary prose) they part. Measure it for *your* pair before you pay for logits.
# - **Reverse KL is far behind** after the same steps. It is the toy again: it looks only where the student itself speaks, and this base says nothing of what the teacher says. It is a loss for a student that is already nearly as good; the next section gives it such a student.
# - **The agreement hides it.** {{reverse_kl: agrees with the teacher|%}} % of tokens right, and {{reverse_kl: right answers|%}} % of answers: an answer of 30 tokens is right if all of them are. Ask for answers, not for tokens.
#
# ## On-policy
#
# A student trained on the teacher's text has never seen its own mistakes; at use it reads nothing else. On-policy distillation lets the student write and the teacher score every token of it: `train.on_policy`. It needs a live teacher, and decoding makes each step more expensive. It also needs a student that already writes something worth scoring, so we start from the cross-entropy student, its adapter merged into its base.
#
# More steps help in any case. So there is a control: as many steps from the same start, with the same loss and the same teacher, on the *teacher's* text.

# %% [markdown] lang="zh"
# 这张表要读出三点：
#
# - **交叉熵和前向 KL 每一步都重合。** 教师几乎确定无疑，它的分布要说的，文本已经说完了。教师犹豫的地方（普通文章），两者才会分开。在为 logits 付费之前，先在*你自己的*师生对上测一测。
# - **同样的步数，反向 KL 落后很多。** 这又是那个玩具例子：它只看学生自己说话的地方，而底座说的和教师说的毫不相干。它适合已经快学会的学生；下一节就给它这样一个。
# - **一致率看不出这一点。** {{reverse_kl: agrees with the teacher|%}}% 的词元一致，答对的却只有 {{reverse_kl: right answers|%}}%：三十个词元的答案，要每个都对才算对。要看答案，不要只看词元。
#
# ## On-policy（学生自己写，教师来打分）
#
# 只用教师文本训练的学生，从没见过自己的错误；而使用时它读的全是自己写的东西。On-policy 蒸馏让学生来写，教师给每个词元打分：`train.on_policy`。它需要在线的教师，解码也让每一步更贵；还要求学生写出来的东西已经值得打分，所以我们从交叉熵学生出发，先把适配器合并进底座。
#
# 多训练几步总会有帮助，所以要有对照：从同一起点出发，步数、损失和教师都相同，只是用*教师*写的文本。

# %%
import shutil

from distill import merge_adapter

start = folder / "merged"
shutil.rmtree(start, ignore_errors=True)
merge_adapter(str(students["cross_entropy"] / "student"), start)
further = [
    *common,
    "control.enabled=false",
    f"student.model={start}",
    f"train.steps={scaled(20, 3)}",
    "train.learning_rate=3e-3",
    "train.objectives=[{name: reverse_kl}]",
]
own = f"train.on_policy={{fraction: 1.0, buffer_steps: {scaled(5, 2)}, max_new_tokens: 80{scaled('', ', most_truncated: 1.0')}}}"
after = {
    "before": found["cross_entropy"],
    "teacher's text": judged(experiment(folder / "off-policy", further, data=data) / "student"),
    "its own text": judged(experiment(folder / "on-policy", [*further, own], data=data) / "student"),
}
drift = {name: one["on its own text"]["reverse_kl"] for name, one in after.items()}
for name, one in after.items():
    print(f"{name:16} right {share(one['rows']):20} reverse KL on its own text {drift[name]:.3f}")

from distill.evaluation.stats import paired_comparison

outcomes = [
    [row["verdict"] == "correct" for row in after[name]["rows"]]
    for name in ("its own text", "teacher's text")
]
compared = paired_comparison(*outcomes)
low, high = (100 * end for end in compared["ci95"])
print(
    f"own text minus teacher's text: {100 * compared['difference']:+.0f} points [{low:+.0f}, {high:+.0f}], {compared['verdict']}"
)
ratio = drift["its own text"] / drift["before"]
expect("reverse KL on its own text, after / before", ratio, 0.0, 0.95, short=(0.0, 1.6), without=1)

# %% [markdown] lang="en"
# Compare the last two lines, not the first and the last: both arms had twenty more steps. With 60 problems and one seed the difference is measured to about 15 points. `recipes/on_policy.yaml` did it on 420 problems of all kinds: 63.8 % before, 78.8 % after 100 steps on the teacher's text, 75.7 % after as many on its own text, a difference of −3.1 points [−6.5, 0.1]. Here, own text does not beat the teacher's. It costs more, and it pays where a student drifts far from what the teacher writes.

# %% [markdown] lang="zh"
# 要比的是最后两行，而不是第一行和最后一行：两组都多训练了二十步。60 道题、一个种子，这个差异只能量到大约 15 个百分点。`recipes/on_policy.yaml` 在全部题型的 420 道题上做过：之前 63.8%；在教师文本上再训练 100 步后 78.8%，在自己的文本上训练同样步数后 75.7%，相差 −3.1 个百分点 [−6.5, 0.1]。在这里，自己的文本并不胜过教师的文本。它更贵；学生离教师所写的东西很远时，它才划算。

# %% [markdown] lang="en"
# ## Exercises
#
# **2.1** Write forward KL from two rows of log-probabilities `p` (teacher) and `q` (student), both [N, V].

# %% [markdown] lang="zh"
# ## 练习
#
# **2.1** 给定两组对数概率 `p`（教师）和 `q`（学生），形状都是 [N, V]，写出前向 KL。


# %% tags=["exercise"]
def my_forward_kl(p, q): ...  # your code -> [N], in nats


# %% tags=["solution"]
def my_forward_kl(p, q):
    return (p.exp() * (p - q)).sum(-1)


# %%
one, two = torch.randn(5, 9), torch.randn(5, 9)
exercise(
    "2.1",
    lambda: torch.allclose(
        my_forward_kl(two.log_softmax(-1), one.log_softmax(-1)), forward_kl(one, two), atol=1e-5
    ),
    "sum over the vocabulary of p (log p - log q); p = exp(log p)",
)

# %% [markdown] lang="en"
# **2.2** Which start makes reverse KL end on the *smaller* mode, at -2? Set `centre`, then explain why the loss does not mind.

# %% [markdown] lang="zh"
# **2.2** 从哪里出发，反向 KL 会停在*较小*的那个峰（-2）上？给 `centre` 赋值，并解释损失为什么不在意。

# %% tags=["exercise"]
centre = ...  # a number between -6 and 6

# %% tags=["solution"]
centre = -3.0  # where the student says nothing, reverse KL costs nothing: it cannot see the larger mode

# %%
exercise(
    "2.2",
    lambda: abs(fit(losses["reverse KL"], centre=float(centre), width=0.5)[0] + 2) < 0.2,
    "the student only sees the teacher where it speaks itself; begin near -2",
)

# %% [markdown] lang="en"
# **2.3** Cross-entropy on the teacher's text minus forward KL is, up to sampling noise, a number that does not depend on the student. Compute it: set `difference`.

# %% [markdown] lang="zh"
# **2.3** 教师文本上的交叉熵减去前向 KL，除采样噪声外，是一个与学生无关的数。请算出来，赋给 `difference`。

# %% tags=["exercise"]
difference = ...  # a number in nats

# %% tags=["solution"]
log_p = teacher.log_softmax(-1)
difference = float(-(log_p.exp() * log_p).sum())  # the teacher's entropy

# %%
student = fits["forward KL"][2]
gap = float(losses["cross-entropy on text"](student).mean() - forward_kl(student, teacher))
exercise("2.3", lambda: abs(difference - gap) < 0.1, "cross-entropy = KL + entropy of the teacher")

# %% [markdown] lang="en"
# ## What commonly goes wrong
#
# - **The directions are swapped.** KL(p || q) reads "q must cover p". Here forward is KL(teacher || student); some papers and some libraries print it the other way round. Test with the toy.
# - **T² forgotten, or counted twice.** With a temperature in the loss, gradients shrink by about T². Hinton multiplies by T²; this toolkit only does so if `temperature_squared: true` says it.
# - **A mean of means.** The loss per token must be summed over the whole optimizer step and divided once, or short answers weigh more.
# - **Two vocabularies.** Divergences need the same tokens by *content*; equal sizes prove nothing. If the tokens differ, train on text only, or use the objective `uld`.
# - **On-policy from a cold start.** A student that writes nonsense is scored on nonsense. Begin with the teacher's text.

# %% [markdown] lang="zh"
# ## 常见问题
#
# - **方向弄反。** KL(p || q) 的意思是“q 必须覆盖 p”。本工具包的前向指 KL(教师 || 学生)；有些论文和库写法相反。用玩具例子验证一下。
# - **忘了 T²，或乘了两遍。** 损失里带温度时，梯度大约缩小 T² 倍。Hinton 会再乘 T²；本工具包只有写明 `temperature_squared: true` 才这样做。
# - **平均再平均。** 每个词元的损失应当在整个优化步上求和后只除一次，否则短答案的权重会偏大。
# - **两套词表。** 散度要求两边词元*内容*相同，大小相等说明不了什么。否则只能用文本，或者用 `uld`。
# - **on-policy 冷启动。** 学生写的是废话，打分打的也是废话。先用教师文本起步。
