# %% [markdown] lang="en"
# # Lesson 3. LoRA: training a little of a model
#
# Full fine-tuning changes every weight and needs the optimizer's memory for each. LoRA freezes them all and adds to chosen matrices a product of two thin ones: W + (alpha / r) B A.
#
# **After this lesson you can** count what a LoRA trains; choose rank and placement and say what each costs; say exactly what stays frozen; merge an adapter and name the error that makes; recognise the trap that mixture-of-experts models set for LoRA.
#
# **Class time** 35 minutes (15 rank and placement, 10 merging and the trap, 10 exercises and check). Computing: {{minutes}} minutes on one CPU thread.
#
# | your machine | what to run |
# |---|---|
# | 2-core CPU | this notebook as it is; about 1 GB of memory |
# | GPU with 8 GB | this notebook, or a 1.7B student with its frozen base in 4 bits: `student.quantize=4bit student.lora.rank=16` |
# | T4 (16 GB, no bf16) | the same with `train.precision=fp16`; adapters stay float32 |
# | one card with 24 GB | an 8B student in 4 bits (about 5 GB of weights), `train.gradient_checkpointing=true train.micro_batch_size=1` |

# %% [markdown] lang="zh"
# # 第 3 课 LoRA：只训练模型的一小部分
#
# 全量微调会改动每一个权重，优化器还要为每个权重占用显存。LoRA 把它们全部冻结，只在选定的矩阵上加两个“瘦”矩阵的乘积：W + (alpha / r) B A。
#
# **学完本课，你能够**：算出一个 LoRA 训练多少参数；选择秩和位置，并说出各自的代价；准确说出什么被冻结；合并适配器，并指出由此带来的误差；识别混合专家模型给 LoRA 设下的陷阱。
#
# **课堂用时** 35 分钟（秩与位置 15 分钟，合并与陷阱 10 分钟，练习与自测 10 分钟）。计算用时：单线程 CPU 约 {{minutes}} 分钟。
#
# | 你的机器 | 怎么跑 |
# |---|---|
# | 双核 CPU | 直接运行本笔记本；内存约 1 GB |
# | 8 GB 显存的 GPU | 直接运行；或训练 1.7B 学生，冻结的底座用 4 位：`student.quantize=4bit student.lora.rank=16` |
# | T4（16 GB，不支持 bf16） | 同上，加 `train.precision=fp16`；适配器仍为 float32 |
# | 一张 24 GB 的卡 | 4 位的 8B 学生（权重约 5 GB），`train.gradient_checkpointing=true train.micro_batch_size=1` |

# %%
import shutil

import matplotlib.pyplot as plt
import torch

from distill import load_model, load_tokenizer
from distill.config import Lora
from distill.evaluation.stats import wilson_interval
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
from distill.models import add_lora, format_trainable

folder = begin(3)


def adapted(**lora):
    """The base with a fresh adapter; `lora` are the keys of a recipe's `student.lora`."""
    return add_lora(load_model("checkpoints/base", "fp32", training=True), Lora(**lora))


def trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


model = adapted(rank=16, alpha=32)
print(format_trainable(model))
whole = sum(p.numel() for p in load_model("checkpoints/base").parameters())
size = trained(model) / whole
expect("rank 16 on all linear layers: share of the base's size", size, 0.15, 0.22, short=True, without=1)
slider("rank")

# %% [markdown] lang="en"
# {{rank 16 on all linear layers: share of the base's size|%}} % of the base's size looks like a lot. It is: this base is tiny, its matrices 128 wide, and an adapter grows with width while a matrix grows with its square. On a 7B model the same rank is about 0.5 %.
#
# B starts at zero, so the adapted model *is* the base until the first step. Embedding, output head and norms stay frozen.
#
# ## Rank and placement
#
# One kind of problem, long additions, of which the base solves none: a student learns them in 50 steps. The same rows in the same order: rank 1 and rank 16 on all linear layers, rank 16 on attention alone, and full fine-tuning at two learning rates. And the control: rank 16 as well, with the right results and without the teacher's working.

# %% [markdown] lang="zh"
# 相当于底座的 {{rank 16 on all linear layers: share of the base's size|%}}%，看起来不少。确实如此：这个底座很小，矩阵只有 128 宽；适配器随宽度增长，矩阵随宽度的平方增长。在 7B 模型上，同样的秩大约只占 0.5%。
#
# B 从零开始，所以在第一步之前，加了适配器的模型*就是*底座本身。嵌入层、输出头和归一化层保持冻结。
#
# ## 秩与位置
#
# 只用一种题：长加法。底座一道也不会，学生 50 步就能学会。同样的数据、同样的顺序：所有线性层上秩 1 和秩 16，仅注意力上秩 16，以及两种学习率的全量微调。还有对照组：同样是秩 16，有正确结果，没有教师的推导。

# %%
common = [
    "prompts.families=[addition]",
    f"prompts.levels={scaled('{easy: 30, hard: 220}', '{hard: 24}')}",
    "generate.samples=1",
    "train.objectives=[{name: cross_entropy}]",
    f"train.steps={scaled(50, 3)}",
    "train.warmup_steps=2",
    f"train.batch_size={scaled(32, 8)}",
    "train.checkpoint_every=0",
    "train.precision=fp32",
]
data = experiment(folder / "data", common, command="generate")
experiment(data, common, command="filter")
arms = {
    "rank 16": ["student.lora={rank: 16, alpha: 32}"],
    "rank 1": ["student.lora={rank: 1, alpha: 2}"],
    "attention, rank 16": ["student.lora={rank: 16, alpha: 32, targets: attention}"],
    "full, 0.001": ["student.adapter=full", "train.learning_rate=1e-3"],
    "full, 0.003": ["student.adapter=full", "train.learning_rate=3e-3"],
}
runs = {}
for name, settings in arms.items():
    if name != "rank 16":
        settings = [*settings, "control.enabled=false"]  # one control is enough
    plain = name.replace(", ", "-").replace(" ", "-")
    runs[name] = experiment(folder / plain, [*common, *settings], data=data) / "student"
runs["control"] = runs["rank 16"].parent / "control"

tokenizer = load_tokenizer("checkpoints/teacher")
problems = held_out_problems({"hard": scaled(60, 14)}, families=["addition"])
rows = {"base": ask(load_model("checkpoints/base"), tokenizer, problems)}
for name, run in runs.items():
    rows[name] = ask(load_model(str(run)), tokenizer, problems)
curves = {name: [line["loss"] for line in step_log(run)] for name, run in runs.items()}
last = {name: sum(curve[-10:]) / len(curve[-10:]) for name, curve in curves.items()}
for name, found in rows.items():
    loss = f"{last[name]:.3f}" if name in last else "-"
    print(f"{name:20} loss of the last steps {loss:>6}   right {share(found)}")
for name in ("rank 1", "rank 16", "full, 0.001"):
    size = sum(p.stat().st_size for p in runs[name].glob("*.safetensors"))
    print(f"{name:20} {size / 1e6:.2f} MB on disk")

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4))
for place, name in enumerate(rows):
    colour, found = f"C{place}", accuracy(rows[name])
    if name in curves and name != "control":  # the control's loss is of other text
        left.plot(curves[name], color=colour)
    low, high = wilson_interval(round(found * len(problems)), len(problems))
    right.plot([100 * low, 100 * high], [place, place], color=colour, linewidth=3)
    right.plot(100 * found, place, "o", color=colour)
left.set(xlabel="optimizer step", ylabel="loss (nats per token)", yscale="log")
right.set_yticks(range(len(rows)), rows)
right.set(xlabel=f"right answers to {len(problems)} long additions, %, with 95 % interval", xlim=(-2, 102))
right.invert_yaxis()
plt.show()
gain = accuracy(rows["rank 16"]) - accuracy(rows["control"])
expect("rank 16: right answers", accuracy(rows["rank 16"]), 0.5, 1, without=accuracy(rows["base"]))
expect("rank 16 minus control", gain, 0.4, 1, without=accuracy(rows["base"]) - accuracy(rows["control"]))
expect("rank 16: loss of the last 10 steps", last["rank 16"], 0, 0.2, short=(0.5, 6), without=last["rank 1"])
expect("rank 1 over rank 16, loss", last["rank 1"] / last["rank 16"], 1.5, 1000, short=(0.8, 4), without=1)
expect(
    "attention alone over all layers, loss",
    last["attention, rank 16"] / last["rank 16"],
    1.02,
    1000,
    short=(0.8, 4),
    without=1,
)

# %% [markdown] lang="en"
# ## Full fine-tuning: behind or ahead?
#
# It trains five times as many numbers as rank 16. At a learning rate of 0.001 it is behind rank 16, in loss and in right answers; at 0.003 its loss is the lowest of all. So "LoRA is better" and "full is better" can both be printed from this cell. LoRA's own rate is 0.01, the recipe's default. Why is the best rate here so different? A step of Adam moves each number by about the learning rate, whatever its gradient. In 50 steps of 0.001 a weight goes 0.05 at most. LoRA's factors move ten times as far, and what reaches the weight is their *product*, times alpha / r = 2.
#
# Two things follow. Compare the two only with a learning rate tuned for each, and at the length of training that you will use. The order can turn round. `recipes/claims.yaml` was measured twice, on all kinds of problems, 100 steps, five seeds. The first time the learning rates stood at the edge of what was tried, and LoRA of rank 16 was 9.4 points ahead [5.9, 12.9]. The second time each had its own tuned rate, and full fine-tuning was 5.4 points ahead [3.6, 7.1]. And the rank decides how much can be learned at all: rank 1 solves no problem, and neither does the control, which never saw a step of the working.
#
# ## What is frozen
#
# Not "hardly changed": the same bits. We can prove it.

# %% [markdown] lang="zh"
# ## 全量微调：落后还是领先？
#
# 它训练的参数是秩 16 的五倍。学习率 0.001 时，它的损失和答对数都落后于秩 16；0.003 时，它的损失最低。所以同一个单元格既能“证明”LoRA 更好，也能“证明”全量更好。它的学习率为什么不能照搬 LoRA 的 0.01 来估计？Adam 每一步让每个参数移动大约一个学习率的距离，与梯度大小无关；学习率 0.001、50 步，一个权重最多走 0.05。LoRA 的两个因子走得远十倍，而作用到权重上的是它们的*乘积*，再乘以 alpha / r = 2。
#
# 由此得出两点。第一，比较两者时，要给各自调好学习率，并用你实际打算训练的步数。顺序可能反过来。`recipes/claims.yaml` 测过两次，都是全部题型、100 步、五个种子：第一次学习率落在所试范围的边上，秩 16 的 LoRA 领先 9.4 个百分点 [5.9, 12.9]；第二次给各自调好学习率，全量微调领先 5.4 个百分点 [3.6, 7.1]。第二，秩决定了究竟能学到多少：秩 1 一道题也做不出；对照组也是零，因为它从没见过一步推导。
#
# ## 什么被冻结了
#
# 不是“几乎没变”，而是逐位相同。可以证明：

# %%
from peft import PeftModel

before = load_model("checkpoints/base", "fp32").state_dict()
student = PeftModel.from_pretrained(load_model("checkpoints/base", "fp32"), str(runs["rank 16"]))
after = {
    name.removeprefix("base_model.model.").replace(".base_layer", ""): value
    for name, value in student.state_dict().items()
    if ".lora_" not in name
}
same = sum(torch.equal(before[name], after[name]) for name in before)
print(f"{same} of {len(before)} tensors of the base are bit for bit what they were")
fully = load_model(str(runs["full, 0.001"]), "fp32").state_dict()
moved = sum(torch.equal(before[name], fully[name]) for name in before) / len(before)
expect("share of base tensors unchanged", same / len(before), 1.0, 1.0, short=True, without=moved)

# %% [markdown] lang="en"
# ## Merging
#
# W + (alpha / r) B A can be written into W: no adapter at inference, no cost. `distill merge` does it in float32 and measures the error. Stored in bfloat16, the sum is rounded, and small updates are partly lost.

# %% [markdown] lang="zh"
# ## 合并
#
# 可以把 W + (alpha / r) B A 直接写进 W：推理时没有适配器，也没有额外开销。`distill merge` 在 float32 下合并并测量误差。若以 bfloat16 存储，求和结果会被舍入，小的更新会丢掉一部分。

# %%
from distill import merge_adapter
from distill.training import format_errors

change = {}
for dtype in ("fp32", "bf16"):
    out = folder / f"merged-{dtype}"
    shutil.rmtree(out, ignore_errors=True)
    manifest = merge_adapter(str(runs["rank 16"]), out, dtype)
    change[dtype] = manifest["merge"]["stored"]["max_abs"]
    print(f"stored as {dtype}\n{format_errors(manifest)}\n")
label = "largest change of a logit"
expect(f"merged, stored as fp32: {label}", change["fp32"], 0, 1e-3, short=True, without=change["bf16"])
expect(f"merged, stored as bf16: {label}", change["bf16"], 1e-3, 2, short=True, without=change["fp32"])

# %% [markdown] lang="en"
# ## The trap: mixtures of experts
#
# Ask PEFT to adapt the *shared* experts of a DeepSeek-V3. It knows this family and rewrites names that end in `gate_proj`, `up_proj`, `down_proj` to the *routed* experts, without a word:

# %% [markdown] lang="zh"
# ## 陷阱：混合专家模型
#
# 让 PEFT 去适配 DeepSeek-V3 的*共享*专家。它认识这个模型族，会把以 `gate_proj`、`up_proj`、`down_proj` 结尾的名字悄悄改写成*路由*专家：

# %%
from peft import LoraConfig, get_peft_model

asked = [f"shared_experts.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
wrapped = get_peft_model(
    load_model("checkpoints/teacher", "fp32", training=True), LoraConfig(r=4, target_modules=asked)
)
trains = {
    n.partition(".lora_")[0].split("layers.")[-1] for n, p in wrapped.named_parameters() if p.requires_grad
}
print("asked for:", asked, "\ntrains:   ", sorted(trains))
mine = add_lora(load_model("checkpoints/teacher", "fp32", training=True), Lora(rank=4, targets=tuple(asked)))
print("\n" + format_trainable(mine))
wanted = {n.partition(".lora_")[0] for n, p in mine.named_parameters() if p.requires_grad}
found = sum("shared" in n for n in trains)
expect("tensors of shared experts that PEFT trains", found, 0, 0, short=True, without=len(wanted))

# %% [markdown] lang="en"
# The toolkit sorts weights into groups by structure, adapts such layers by another function of PEFT (`target_parameters`), compares what trains with what was asked, and stops if they differ. And "all linear layers" leaves the routed experts frozen, 73 % of this teacher: `student.lora.experts=true` adds them.
#
# ## Exercises
#
# **3.1** How many parameters does LoRA of rank `r` add to a linear layer with `n_in` inputs and `n_out` outputs?

# %% [markdown] lang="zh"
# 本工具包按结构把权重分组，用 PEFT 的另一个功能（`target_parameters`）来适配这类层，再核对实际训练的与要求的是否一致，不一致就停下。另外，“所有线性层”并不包括路由专家（占这位教师的 73%），它们仍被冻结；要训练它们，加 `student.lora.experts=true`。
#
# ## 练习
#
# **3.1** 对一个输入 `n_in`、输出 `n_out` 的线性层，秩为 `r` 的 LoRA 增加多少参数？


# %% tags=["exercise"]
def lora_size(n_in, n_out, r): ...  # your code


# %% tags=["solution"]
def lora_size(n_in, n_out, r):
    return r * (n_in + n_out)


# %%
linear = [m for m in model.modules() if hasattr(m, "lora_A") and len(m.lora_A)]
exercise(
    "3.1",
    lambda: sum(lora_size(m.in_features, m.out_features, 16) for m in linear) == trained(model),
    "A is [r, n_in] and B is [n_out, r]",
)

# %% [markdown] lang="en"
# **3.2** Merge one layer by hand: return W with the adapter folded in.

# %% [markdown] lang="zh"
# **3.2** 手工合并一层：返回折入适配器之后的 W。


# %% tags=["exercise"]
def merged(W, A, B, alpha, r): ...  # your code: W [n_out, n_in], A [r, n_in], B [n_out, r]


# %% tags=["solution"]
def merged(W, A, B, alpha, r):
    return W + (alpha / r) * B @ A


# %%
layer = next(m for m in student.modules() if hasattr(m, "lora_A") and len(m.lora_A))
parts = (layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
exercise(
    "3.2",
    lambda: torch.allclose(merged(*parts, 32, 16), parts[0] + layer.get_delta_weight("default"), atol=1e-5),
    "the update is B @ A, scaled by alpha / r",
)

# %% [markdown] lang="en"
# **3.3** How low is the rank of what *full* fine-tuning does? Write `energy(delta, r)`: the share of the squared singular values of `delta` that the largest `r` hold.

# %% [markdown] lang="zh"
# **3.3** *全量*微调带来的更新，秩到底有多低？写出 `energy(delta, r)`：`delta` 最大的 `r` 个奇异值的平方占全部平方和的比例。


# %% tags=["exercise"]
def energy(delta, r): ...  # your code; torch.linalg.svdvals


# %% tags=["solution"]
def energy(delta, r):
    s = torch.linalg.svdvals(delta) ** 2
    return float(s[:r].sum() / s.sum())


# %%
name = "model.layers.0.mlp.down_proj.weight"
delta = fully[name] - before[name]


def low_rank():
    right = abs(energy(torch.diag(torch.tensor([3.0, 4.0])), 1) - 0.64) < 1e-5
    print(
        "share of full fine-tuning's update, by rank:",
        {r: round(energy(delta, r), 2) for r in (1, 4, 16, 64)},
    )
    return right


exercise("3.3", low_rank, "square the singular values, sort, divide")

# %% [markdown] lang="en"
# ## What commonly goes wrong
#
# - **The learning rate of full fine-tuning.** With LoRA the loss hardly moves: take about ten times as much.
# - **alpha left behind.** The scale is alpha / r: doubling r and keeping alpha halves the update. rsLoRA divides by sqrt(r) instead.
# - **"It trains", but the wrong tensors.** Count them by group before the first step, above all in a MoE.
# - **Merged into bf16, and the answers change.** Merge in float32, then cast, and measure again.
# - **Loading an adapter on another base.** It fits by shape and is nonsense. The base is named in `adapter_config.json`; `distill provenance` compares hashes.

# %% [markdown] lang="zh"
# ## 常见问题
#
# - **沿用全量微调的学习率。** LoRA 的损失几乎不动：取大约十倍。
# - **忘了同步 alpha。** 缩放系数是 alpha / r：r 翻倍而 alpha 不变，更新就减半。rsLoRA 改为除以 sqrt(r)。
# - **“在训练”，但训练的不是那些张量。** 第一步之前按组清点，混合专家模型尤其如此。
# - **合并到 bf16 之后答案变了。** 先在 float32 下合并，再转换，然后重新测量。
# - **适配器装到了别的底座上。** 形状对得上，结果却毫无意义。底座的名字写在 `adapter_config.json` 里；`distill provenance` 会核对哈希。
