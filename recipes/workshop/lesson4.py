# %% [markdown] lang="en"
# # Lesson 4. Number formats: what fits into 16 and 8 bits
#
# Half the bits are half the memory and, on hardware with units for them, at least twice the speed. What is lost depends on how the bits are split between range (exponent) and resolution (mantissa).
#
# **After this lesson you can** read a format's range and resolution off a plot; say why bf16 needs no loss scaler and fp16 does; work a scaler by hand; say what blocks do for FP8 and what they do not; name what stays in high precision, and why.
#
# **Class time** 35 minutes (10 formats, 10 scaler, 10 FP8, 5 exercises and check). Computing: {{minutes}} minutes on one CPU thread.
#
# | your machine | what to run |
# |---|---|
# | 2-core CPU | this notebook as it is; under 1 GB of memory. FP8 is emulated exactly, and slower than bf16 |
# | GPU with 8 GB | this notebook; `distill train recipes/demo.yaml train.precision=bf16` on Ampere (RTX 30) or later |
# | T4 (16 GB, no bf16) | `train.precision=fp16` (with scaler); `bf16` is refused, with the reason |
# | one card with 24 GB | real FP8 on Ada (RTX 4090) or later: `pip install torchao`, `train.precision=fp8`; on an RTX 3090 bf16 is the best there is |

# %% [markdown] lang="zh"
# # 第 4 课 数值格式：16 位和 8 位里装得下什么
#
# 位数减半，显存减半；硬件有相应单元时，速度至少翻倍。损失了什么，取决于这些位如何分给范围（指数）和分辨率（尾数）。
#
# **学完本课，你能够**：从图上读出一种格式的范围和分辨率；说清 bf16 为什么不需要损失缩放而 fp16 需要；手工操作一次缩放器；说出分块对 FP8 有什么帮助、又帮不了什么；列出哪些部分保持高精度，以及原因。
#
# **课堂用时** 35 分钟（格式 10 分钟，缩放器 10 分钟，FP8 10 分钟，练习与自测 5 分钟）。计算用时：单线程 CPU 约 {{minutes}} 分钟。
#
# | 你的机器 | 怎么跑 |
# |---|---|
# | 双核 CPU | 直接运行本笔记本；内存不到 1 GB。FP8 为精确模拟，比 bf16 慢 |
# | 8 GB 显存的 GPU | 直接运行；Ampere（RTX 30 系）及以后可用 `distill train recipes/demo.yaml train.precision=bf16` |
# | T4（16 GB，不支持 bf16） | `train.precision=fp16`（带缩放器）；选 `bf16` 会被拒绝并说明原因 |
# | 一张 24 GB 的卡 | Ada（RTX 4090）及以后可用真正的 FP8：`pip install torchao`，`train.precision=fp8`；RTX 3090 上 bf16 已是最好 |

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
    step_log,
)
from distill.models import prompt_ids

folder = begin(4)
formats = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8 E4M3": torch.float8_e4m3fn,
    "fp8 E5M2": torch.float8_e5m2,
}
print(f"{'':10}{'bits':>5}{'largest':>12}{'smallest normal':>17}{'step after 1':>14}")
for name, dtype in formats.items():
    info = torch.finfo(dtype)
    print(f"{name:10}{info.bits:5}{info.max:12.3g}{info.tiny:17.3g}{info.eps:14.3g}")

# %% [markdown] lang="en"
# ## The picture
#
# Round 2,000 numbers between 2⁻⁴⁰ and 2²⁰ to each format and look at the relative error. Flat part: resolution. The climb on the left: subnormal numbers lose bits, and at error 1 the number has become zero. That is **underflow**. On the right, beyond the largest number, comes overflow.

# %% [markdown] lang="zh"
# ## 一张图
#
# 取 2⁻⁴⁰ 到 2²⁰ 之间的 2000 个数，舍入到每种格式，看相对误差。平坦段是分辨率；左边的上升段是次正规数逐渐丢失位数，误差到 1 就意味着这个数变成了零，这就是**下溢**。右边超过最大值之后是上溢。

# %%
numbers = 2.0 ** torch.linspace(-40, 20, 2000)
figure, axis = plt.subplots(figsize=(9, 3.2))
for name in ("bf16", "fp16", "fp8 E4M3", "fp8 E5M2"):
    rounded = numbers.to(formats[name]).float()
    error = ((rounded - numbers).abs() / numbers).clamp(1e-5, 1)
    axis.loglog(numbers, error, ".", markersize=2, label=name, base=2)
axis.set(xlabel="number", ylabel="relative rounding error", ylim=(2**-13, 2))
axis.legend(markerscale=5, loc="center left", bbox_to_anchor=(1.01, 0.5))
plt.show()


def lost(values, dtype):
    """Share of the non-zero `values` that become zero in `dtype`."""
    values = values[values != 0]
    return float((values.to(dtype).float() == 0).float().mean())


tiny = torch.tensor(2.0**-25)
smallest = [
    float(next(n for n in (2.0 ** -torch.arange(140.0, 0, -1)).to(f) if n != 0).log2())
    for f in (torch.float16, torch.bfloat16)
]
expect("log2 of the smallest fp16 that is not 0", smallest[0], -24, -24, short=True, without=smallest[1])
expect("2^-25 in fp16", tiny.half(), 0, 0, short=True, without=tiny.bfloat16())

# %% [markdown] lang="en"
# ## Real gradients
#
# Where do a model's gradients lie? Here is the teacher on problems it has long mastered, as late in any training: the loss is tiny and so are its gradients.

# %% [markdown] lang="zh"
# ## 真实的梯度
#
# 模型的梯度落在哪里？下面用教师在它早已掌握的题目上求梯度，就像任何训练的后期：损失很小，梯度也很小。

# %%
from distill import sample_problems

tokenizer = load_tokenizer("checkpoints/teacher")
model = load_model("checkpoints/teacher", "fp32", training=True)
loss, rows = 0.0, sample_problems("train", {"hard": 14}, seed=0)
for problem in rows:
    asked = prompt_ids(tokenizer, [{"role": "user", "content": problem.question}])
    answer = tokenizer.encode(problem.solution, add_special_tokens=False)
    labels = torch.tensor([[-100] * len(asked) + answer])
    loss = loss + model(input_ids=torch.tensor([asked + answer]), labels=labels).loss / len(rows)
loss.backward()
gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
gradients = gradients[gradients != 0]
print(f"loss {loss.item():.2g}; {len(gradients):,} gradients that are not zero")

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.2))
left.hist(gradients.abs().log2().numpy(), bins=80, color="C7")
left.set_ylim(0, 1.25 * left.get_ylim()[1])
for name, place in (("fp16", -24), ("E5M2", -16), ("E4M3", -9)):
    left.axvline(place, color="C3", linewidth=1.5)
    left.text(
        place - 0.3, left.get_ylim()[1], name, rotation=90, va="top", ha="right", fontsize=9, color="C3"
    )
left.set(
    xlabel="log2 |gradient|", ylabel="count", title="left of a line: at best half of the smallest number"
)
powers = list(range(0, 33, 2))
for name in ("fp16", "fp8 E5M2", "fp8 E4M3"):
    right.plot(powers, [lost(gradients * 2.0**k, formats[name]) for k in powers], label=name)
right.plot(powers, [lost(gradients, torch.bfloat16)] * len(powers), label="bf16, unscaled")
right.set(
    xlabel="log2 of the loss scale", ylabel="share lost to zero", title="scaling shifts the histogram right"
)
right.legend()
plt.show()
away = {name: lost(gradients, dtype) for name, dtype in formats.items()}
scaled_by = lost(gradients * 65536, torch.float16)
expect("lost in bf16", away["bf16"], 0, 1e-4, short=True, without=away["fp16"])
expect("lost in fp16, unscaled", away["fp16"], 0.03, 0.9, short=True, without=away["bf16"])
expect("lost in fp16, loss times 65,536", scaled_by, 0, 0.02, short=True, without=away["fp16"])
expect("lost in FP8 E4M3, unscaled", away["fp8 E4M3"], 0.9, 1, short=True, without=away["bf16"])

# %% [markdown] lang="en"
# bf16 has fp32's range and needs no scaler; it pays with resolution (3 significant digits). fp16 has the resolution and lacks the range: multiply the *loss* by a large number, and by the chain rule every gradient moves right; divide before the optimizer step. If one overflows, skip the step and halve the scale; after many steps without overflow, double it. That is all `GradScaler` does.

# %% [markdown] lang="zh"
# bf16 的范围与 fp32 相同，不需要缩放器，代价是分辨率（约 3 位有效数字）。fp16 分辨率够，范围不够：把*损失*乘以一个大数，由链式法则，所有梯度一起右移；在优化器更新之前再除回来。若有上溢，就跳过这一步并把缩放系数减半；平静一段时间后再翻倍。`GradScaler` 做的就是这些。


# %%
def learn(scaler, steps=60):
    """Fit one vector in fp16 products on inputs of size 1e-5: losses over the steps."""
    generator = torch.Generator().manual_seed(0)
    inputs, wanted = 1e-5 * torch.randn(64, 16, generator=generator), torch.randn(16, generator=generator)
    weight = torch.zeros(16, requires_grad=True)  # the master copy stays in float32
    optimizer, history = torch.optim.Adam([weight], lr=0.1, eps=1e-15), []
    for _ in range(steps):
        optimizer.zero_grad()
        error = (inputs.half() @ weight.half()).float() - inputs @ wanted
        loss = error.square().mean()
        scaler.scale(loss).backward()  # backward through the fp16 product: here gradients underflow
        scaler.step(optimizer)
        scaler.update()
        history.append(float(loss.detach()))
    return history


plain = learn(torch.amp.GradScaler("cpu", enabled=False))
scaled_up = learn(torch.amp.GradScaler("cpu", init_scale=2.0**32, growth_interval=20))
plt.semilogy(plain, label="no scaler")
plt.semilogy(scaled_up, label="scaler, from 2^32")
plt.xlabel("step")
plt.ylabel("loss")
plt.legend()
plt.show()
ends = [curve[-1] / curve[0] for curve in (plain, scaled_up)]
expect("no scaler: last loss over first", ends[0], 0.99, 1.01, short=True, without=ends[1])
expect("scaler: last loss over first", ends[1], 0, 0.2, short=True, without=ends[0])

# %% [markdown] lang="en"
# ## FP8: one scale is not enough
#
# With 8 bits every matrix gets a scale: its largest magnitude is mapped to the format's largest number, 448. One **outlier** then pushes all others towards zero. DeepSeek-V3 gives each 1 x 128 piece of the activations and each 128 x 128 block of the weights its own scale, so an outlier hurts its neighbours only.

# %% [markdown] lang="zh"
# ## FP8：一个缩放系数不够
#
# 8 位时，每个矩阵要配一个缩放系数：把最大的绝对值映射到该格式的最大数 448。于是一个**离群值**就会把其余的数都压向零。DeepSeek-V3 给激活的每个 1 x 128 小段、权重的每个 128 x 128 小块各配一个系数，离群值便只伤害自己的邻居。

# %%
from distill.models import VARIANTS, Tile, round_trip

torch.manual_seed(0)
whole, piece = VARIANTS["tensor"].activation, VARIANTS["tiles"].activation  # one scale; one per 1 x 128
sizes = [2.0**k for k in range(0, 23)]
matrix = torch.randn(128, 512)
curves = {"one scale": [], "1 x 128 tiles": []}
for size in sizes:
    spoiled = matrix.clone()
    spoiled[3, 7] = size
    others = torch.ones_like(matrix, dtype=torch.bool)
    others[3, 7] = False
    for name, tile in (("one scale", whole), ("1 x 128 tiles", piece)):
        difference = (round_trip(spoiled, tile) - spoiled)[others]
        curves[name].append(float(difference.norm() / spoiled[others].norm()))
for name, curve in curves.items():
    plt.loglog(sizes, curve, label=name, base=2)
plt.xlabel("size of one outlier among 65,536 numbers of size 1")
plt.ylabel("relative error of the others")
plt.legend()
plt.show()
worst = curves["one scale"][-1]
expect("error without outlier", curves["one scale"][0], 0.02, 0.035, short=True, without=worst)
expect("one scale, outlier 2^22", worst, 0.7, 1.01, short=True, without=curves["1 x 128 tiles"][-1])
expect("tiles, outlier 2^22", curves["1 x 128 tiles"][-1], 0.02, 0.1, short=True, without=worst)
slider("blocks")

# %% [markdown] lang="en"
# Tiles do not change the *resolution*: without any outlier the error is the same 2 to 3 %. And sums must not run in 8 bits: products are added up in float32 (V3 promotes every 128 products).
#
# ## Does training mind?
#
# The same student, data and order in three precisions, on long additions, of which the base solves none. DeepSeek-V3 reports a loss within 0.25 % of bf16's for 16B and 230B parameters.

# %% [markdown] lang="zh"
# 分块并不提高*分辨率*：没有离群值时，误差同样是 2% 到 3%。求和也不能用 8 位：乘积要在 float32 中累加（V3 每 128 个乘积提升一次）。
#
# ## 训练会在意吗？
#
# 同样的学生、数据和顺序，用三种精度训练；题目是长加法，底座一道也不会。DeepSeek-V3 报告 16B 和 230B 参数时，损失与 bf16 相差不到 0.25%。

# %%
common = [
    "prompts.families=[addition]",
    f"prompts.levels={scaled('{easy: 30, hard: 220}', '{hard: 24}')}",
    "generate.samples=1",
    "train.objectives=[{name: cross_entropy}]",
    f"train.steps={scaled(50, 3)}",
    "train.warmup_steps=2",
    f"train.batch_size={scaled(32, 4)}",
    "train.checkpoint_every=0",
    "control.enabled=false",
]
data = experiment(folder / "data", common, command="generate")
experiment(data, common, command="filter")
problems = held_out_problems({"hard": scaled(60, 14)}, families=["addition"])
losses, rows = {}, {"base": ask(load_model("checkpoints/base"), tokenizer, problems)}
for name in ("fp32", "bf16", "fp8-emulated"):
    run = experiment(folder / name, [*common, f"train.precision={name}"], data=data)
    losses[name] = [line["loss"] for line in step_log(run / "student")]
    rows[name] = ask(load_model(str(run / "student")), tokenizer, problems)
    plt.semilogy(losses[name], label=name)
for name, found in rows.items():
    print(f"{name:14} right {share(found)}")
plt.xlabel("optimizer step")
plt.ylabel("loss (nats per token)")
plt.legend()
plt.show()
right = {name: accuracy(found) for name, found in rows.items()}
untrained = losses["bf16"][0] / (sum(losses["bf16"][-10:]) / 10)  # as far apart as a student before and after
mean = {name: sum(curve[-10:]) / len(curve[-10:]) for name, curve in losses.items()}
for name in ("fp32", "fp8-emulated"):
    expect(
        f"{name} over bf16, mean of the last 10 losses",
        mean[name] / mean["bf16"],
        0.3,
        3,
        short=False,
        without=untrained,
    )
for name in ("fp32", "bf16", "fp8-emulated"):
    expect(f"{name}: right answers", right[name], 0.4, 1, without=right["base"])

# %% [markdown] lang="en"
# Fifty steps say "the same within noise", no more: a claim of 0.25 % needs seeds and a long run, which `python recipes/benchmarks/precisions.py` makes. Note its control: how far fp32 is from bf16.
#
# What a device cannot do is refused, never silently replaced:

# %% [markdown] lang="zh"
# 五十步只能说明“在噪声范围内相同”，仅此而已：要断言 0.25%，需要多个随机种子和更长的训练，`python recipes/benchmarks/precisions.py` 做的就是这个。注意它的对照：fp32 与 bf16 相差多少。
#
# 设备做不到的，会被拒绝，绝不会悄悄替换：

# %%
from distill.errors import UserError
from distill.models import resolve_precision

for name in ("auto", "fp16", "fp8"):
    try:
        print(name, "->", resolve_precision(name, torch.device("cpu")).reason)
    except UserError as error:
        print(name, "-> refused:", error)

# %% [markdown] lang="en"
# ## Exercises
#
# **4.1** Write `loss_scale(gradients)`: the largest power of two for which no gradient overflows fp16.

# %% [markdown] lang="zh"
# ## 练习
#
# **4.1** 写出 `loss_scale(gradients)`：使所有梯度都不在 fp16 中上溢的最大 2 的幂。


# %% tags=["exercise"]
def loss_scale(gradients): ...  # your code


# %% tags=["solution"]
def loss_scale(gradients):
    return 2.0 ** torch.floor(torch.log2(65504 / gradients.abs().max())).item()


# %%
def fits(scale):
    return bool((gradients * scale).half().isfinite().all())


exercise(
    "4.1",
    lambda: fits(loss_scale(gradients)) and not fits(2 * loss_scale(gradients)),
    "the largest fp16 is 65504; divide, take the logarithm, round down",
)

# %% [markdown] lang="en"
# **4.2** Emulate one scale per row of 128 numbers: scale to 448, cast to E4M3, scale back.

# %% [markdown] lang="zh"
# **4.2** 模拟“每 128 个数一行、每行一个缩放系数”：缩放到 448，转为 E4M3，再缩放回来。


# %% tags=["exercise"]
def fp8_rows(x): ...  # your code: x [R, 128] float32 -> [R, 128] float32


# %% tags=["solution"]
def fp8_rows(x):
    scale = x.abs().amax(1, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


# %%
sample = torch.randn(5, 128)
exercise(
    "4.2",
    lambda: torch.allclose(fp8_rows(sample), round_trip(sample, Tile(1, 128)), atol=1e-6),
    "one scale a row: amax(1, keepdim=True) / 448",
)

# %% [markdown] lang="en"
# **4.3** Why master weights are float32: in bf16, adding 0.001 again and again stops at some power of two. At which? Set `stops_at`.

# %% [markdown] lang="zh"
# **4.3** 为什么主权重用 float32：在 bf16 中反复加 0.001，到某个 2 的幂就再也加不上去了。是哪个？给 `stops_at` 赋值。

# %% tags=["exercise"]
stops_at = ...  # a power of two

# %% tags=["solution"]
total = torch.tensor(0.0, dtype=torch.bfloat16)
while total + 0.001 != total:
    total += 0.001
stops_at = float(total)

# %%
at = torch.tensor([2.0**-k for k in range(10)], dtype=torch.bfloat16)
stuck = at[at + 0.001 == at].min()
exercise(
    "4.3",
    lambda: abs(float(stops_at) - float(stuck)) < 1e-9,
    "a step in bf16 is x / 128; below half a step nothing happens",
)

# %% [markdown] lang="en"
# ## What commonly goes wrong
#
# - **fp16 on a CPU.** Accelerate silently computes in float32 and reports fp16. Here it is refused.
# - **"NaN after 200 steps" in fp16.** No scaler, or gradients clipped before they were unscaled.
# - **bf16 is slower than fp32.** The device has no units for it and emulates (a T4, older CPUs). `precision: auto` asks the device.
# - **FP8 "works" and the router drifts.** Routers, norms, embedding and head stay high: a small error in a score flips a discrete choice.
# - **A comparison of one run each.** Two seeds of the *same* precision differ by more than two precisions of the same seed.

# %% [markdown] lang="zh"
# ## 常见问题
#
# - **在 CPU 上用 fp16。** Accelerate 会悄悄用 float32 计算却报告 fp16；本工具包直接拒绝。
# - **fp16 训练“两百步后 NaN”。** 没有缩放器，或者在除回缩放系数之前就做了梯度裁剪。
# - **bf16 比 fp32 还慢。** 设备没有相应单元，只能模拟（T4、较旧的 CPU）。`precision: auto` 会先问设备。
# - **FP8 “能跑”，但路由漂移。** 路由器、归一化、嵌入层和输出头保持高精度：分数上的小误差会翻转一个离散的选择。
# - **每种精度只跑一次就下结论。** *同一*精度下两个种子的差异，比同一种子下两种精度的差异还大。
