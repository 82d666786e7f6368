# %% [markdown] lang="en"
# # Lesson 6. Put together: claims, cost, terms, inherited flaws
#
# In February 2025 an interview about DeepSeek went round. It says: mixed precision, mixture of experts and distillation are old, DeepSeek put them together and made a benchmark of it; a small model is cheaper anyway; $5.576M is only the GPU cost of the final run; compute still matters, though a firm with a few dozen GPUs can now take part; a provider's terms of use matter; models inherit censorship, hallucination and bias from their data. Today you judge it, sentence by sentence.
#
# **After this lesson you can** read a claims table with intervals and verdicts; rebuild the bill of $5.576M and say what it leaves out; say when distilling pays; find out whether a teacher's terms allow it; say which flaws a verifier stops and which pass.
#
# **Class time** 45 minutes (10 claims, 10 cost and terms, 5 flaws, 20 debate). Computing: {{minutes}} minutes on one CPU thread.
#
# | your machine | what to run |
# |---|---|
# | 2-core CPU | this notebook as it is; under 1 GB of memory. The full demo takes 3 minutes more: `distill demo` |
# | GPU with 8 GB | this notebook; the demo with a 1.7B teacher and a 0.6B student (lesson 2 has the command) |
# | T4 (16 GB, no bf16) | the same; `train.precision=auto` chooses fp16 |
# | one card with 24 GB | the same with an 8B teacher in 4 bits, `teacher.quantize=4bit`, and your own questions |

# %% [markdown] lang="zh"
# # 第 6 课 合在一起：说法、成本、条款与继承的缺陷
#
# 2025 年 2 月，一篇关于 DeepSeek 的访谈流传开来。文中说：混合精度、混合专家和蒸馏都是旧技术，DeepSeek 把它们结合在一起，做成了一个标杆；小模型本来就更便宜；557.6 万美元只是最后一次训练的 GPU 成本；算力依然重要，不过只有几十张 GPU 的公司也能参与了；服务商的使用条款很重要；模型会从数据中继承审查、幻觉和偏见。今天由你逐句评判。
#
# **学完本课，你能够**：读懂带区间和判定的说法表；重算 557.6 万美元这笔账，并指出它漏了什么；说出什么时候蒸馏才划算；查明教师的条款是否允许；说出哪些缺陷会被判题规则拦下，哪些会漏过。
#
# **课堂用时** 45 分钟（说法 10 分钟，成本与条款 10 分钟，缺陷 5 分钟，辩论 20 分钟）。计算用时：单线程 CPU 约 {{minutes}} 分钟。
#
# | 你的机器 | 怎么跑 |
# |---|---|
# | 双核 CPU | 直接运行本笔记本；内存不到 1 GB。完整演示另需 3 分钟：`distill demo` |
# | 8 GB 显存的 GPU | 直接运行；或用 1.7B 教师和 0.6B 学生跑演示（命令见第 2 课） |
# | T4（16 GB，不支持 bf16） | 同上；`train.precision=auto` 会选 fp16 |
# | 一张 24 GB 的卡 | 同上，教师用 4 位的 8B：`teacher.quantize=4bit`，再换上你自己的题目 |

# %%
import contextlib
import io
import json

import matplotlib.pyplot as plt

from distill.commands.cli import main
from distill.lessons import begin, exercise, expect
from distill.storage import PROJECT_ROOT, read_json

folder = begin(6)
results = PROJECT_ROOT / "recipes" / "results"


def command(*words):
    """What `distill WORDS --json` prints, read back."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main([*words, "--json"])
    return json.loads(printed.getvalue())


# %% [markdown] lang="en"
# ## Claim 1: distillation gives a small model more quality
#
# First DeepSeek's own numbers (DeepSeek-R1 paper, arXiv 2501.12948, tables 5 and 6; pass@1 in %): students trained on 800,000 texts of R1, and a 32B model that learned by reinforcement alone.

# %% [markdown] lang="zh"
# ## 说法一：蒸馏让小模型质量更高
#
# 先看 DeepSeek 自己的数字（DeepSeek-R1 论文，arXiv 2501.12948，表 5 和表 6；pass@1，%）：学生用 R1 的 80 万条文本训练；另有一个只靠强化学习的 32B 模型。

# %%
students = [  # billions of parameters: AIME 2024, MATH-500, GPQA Diamond, LiveCodeBench
    (1.5, 28.9, 83.9, 33.8, 16.9),
    (7, 55.5, 92.8, 49.1, 37.6),
    (8, 50.4, 89.1, 49.0, 39.6),
    (14, 69.7, 93.9, 59.1, 53.1),
    (32, 72.6, 94.3, 62.1, 57.2),
    (70, 70.0, 94.5, 65.2, 57.5),
]
r1, only_rl = (79.8, 97.3, 71.5, 65.9), (47.0, 91.6, 55.0, 40.2)
names = ("AIME 2024", "MATH-500", "GPQA Diamond", "LiveCodeBench")
figure, axis = plt.subplots(figsize=(8, 3.4))
for i, name in enumerate(names):
    share = [s[i + 1] / r1[i] * 100 for s in students]
    line = axis.plot(range(6), share, "o-", label=name)
    axis.plot(4.12, only_rl[i] / r1[i] * 100, "X", color=line[0].get_color(), markersize=9)
axis.set_xticks(range(6), [f"{s[0]:g} B" for s in students])
axis.set(xlabel="parameters of the student", ylabel="% of the teacher's score", ylim=(0, 105))
axis.annotate(
    "X: 32B, learned alone", (4.12, 62), (4.3, 20), fontsize=9, arrowprops={"arrowstyle": "-", "alpha": 0.5}
)
axis.legend(fontsize=8, loc="lower left", bbox_to_anchor=(1.01, 0.3))
plt.show()
kept = [students[0][i + 1] / r1[i] for i in range(4)]
alone = [only_rl[i] / r1[i] for i in range(4)]
expect(
    "the 32B student keeps of R1's AIME score",
    students[4][1] / r1[0],
    0.9,
    0.92,
    short=True,
    without=alone[0],
)
expect("the 1.5B student keeps of R1's MATH-500 score", kept[1], 0.86, 0.87, short=True, without=kept[0])

# %% [markdown] lang="en"
# More is kept by larger students and on easier tests, and at 32B distillation beats learning alone. Does the shape hold here? The committed result of `distill demo`, with the arm without which it would prove nothing: *control*, the same base and steps on final answers without a teacher.

# %% [markdown] lang="zh"
# 学生越大、测试越容易，保留得越多；在 32B 上，蒸馏胜过独自学习。这个规律在这里成立吗？下面是 `distill demo` 已提交的结果，其中有一个缺了它就什么也证明不了的对照组 *control*：同样的底座和步数，只用最终答案训练，没有教师。

# %%
demo = read_json(results / "demo.json")["models"]
for name, model in demo.items():
    cells = []
    for level in ("easy", "medium", "hard"):
        task = model["tasks"][level]
        low, high = task["ci95"]
        cells.append(f"{level} {100 * task['accuracy']:5.1f} [{100 * low:.1f}, {100 * high:.1f}]")
    print(f"{name:8}", "   ".join(cells))
hard = {name: model["tasks"]["hard"] for name, model in demo.items()}
sure = (
    hard["student"]["ci95"][0] - hard["control"]["ci95"][1]
)  # the lowest of one against the highest of the other
expect(
    "student minus control, hard, at the least",
    sure,
    0.3,
    0.9,
    short=True,
    without=hard["base"]["accuracy"] - hard["control"]["ci95"][1],
)

# %% [markdown] lang="en"
# ## The claims table
#
# One run with one seed is an anecdote. `distill bench recipes/claims.yaml` trains every arm on several seeds and judges each sentence by one rule: SUPPORTED or NOT SUPPORTED where the 95 % interval over seeds lies on one side, and stays there after a correction for the number of sentences (Holm); EQUIVALENT where the difference is shown to be too small to matter; else INCONCLUSIVE. Below are the headline claims and the inherited flaws, from the small budget: {{seeds of the claims|.0f}} seeds, as registered today.

# %% [markdown] lang="zh"
# ## 说法表
#
# 一个种子跑一次只算轶事。`distill bench recipes/claims.yaml` 用多个种子训练每个组，并按同一条规则评判每句话：若跨种子的 95% 区间全在一侧，并且按句子数目校正（Holm）之后仍然如此，判为 SUPPORTED（成立）或 NOT SUPPORTED（不成立）；若已证明差别小到无关紧要，判为 EQUIVALENT（等效）；否则为 INCONCLUSIVE（无定论）。下面列出主要说法和“继承的缺陷”一组，来自小预算的测量：{{seeds of the claims|.0f}} 个种子，登记的正是今天的文本。

# %%
found = read_json(results / "claims-small.json")
claims, controls = found["claims"], found["controls"]
group = sentence = ""
for claim in claims:
    if not claim["headline"] and claim["group"] != "Inherited flaws":
        continue  # all of them: docs/claims.md
    if claim["group"] != group:
        group = claim["group"]
        print(f"\n{group}")
    if claim["sentence"] != sentence:
        sentence = claim["sentence"]
        print(f"  “{sentence}”")
    effect, interval, unit = claim["effect"]["mean"], claim["effect"]["ci95"], claim["unit"]
    times = 100 if unit == "%" else 1
    unit = {"%": "%" if claim["relative"] else "points"}.get(unit, unit)
    shown = f"{times * effect:+.1f} [{times * interval[0]:+.1f}, {times * interval[1]:+.1f}] {unit}"
    print(f"  {claim['verdict']:14} {shown:34} {claim['hypothesis']}")
by_name = {claim["id"]: claim for claim in claims}
nulls = controls["nulls"]  # the same arm on both sides: any difference is chance
largest = max(null["effect"]["ci95"][0] for null in nulls)
taught = by_name["distillation"]["effect"]["ci95"][0]
called, spoilt = (
    controls["called"] / len(nulls),
    [dose["verdict"] == "SUPPORTED" for dose in controls["doses"]],
)
print(f"\nof {len(nulls)} comparisons of an arm with itself {controls['called']} were called different")
expect("seeds of the claims", found["seeds"], 5, 5, short=True, without=1)
expect(
    "distillation, lower end of its interval (points)", 100 * taught, 5, 40, short=True, without=100 * largest
)
expect("an arm against itself: share called different", called, 0, 0.3, short=True,
       without=sum(spoilt) / len(spoilt))  # fmt: skip

# %% [markdown] lang="en"
# Read it with three questions. What was held equal? How wide is the interval? How many claims were tested? The last lines put the judge itself on trial. An arm is compared with itself twenty times, so every difference there is chance. One in twenty is called at 5 %; here it was {{an arm against itself: share called different|%}} %. That is why the number of claims is corrected for.
#
# ## Claim 2: $5.576M is the cost of the final run
#
# The bill from the V3 paper's own table, and what it does not count.

# %% [markdown] lang="zh"
# 带着三个问题来读：哪些条件保持相同？区间有多宽？一共检验了多少条？最后几行检验的是判定方法本身：让同一个组与自己比较二十次，那里的差别全是偶然。在 5% 水平上，二十次里会有一次被判为有差别；这里是 {{an arm against itself: share called different|%}}%。所以才要按说法的数目校正。
#
# ## 说法二：557.6 万美元是最后一次训练的成本
#
# V3 论文表格里的账单，以及它没算进去的东西。

# %%
bill = command("cost", "deepseek-v3")
for name, stage in bill["stages"].items():
    print(f"{name:18} {stage['gpu_hours']:>10,.0f} H800 hours   ${stage['usd']:>10,.0f}")
print(f"{'sum':18} {bill['gpu_hours']:>10,.0f} H800 hours   ${bill['usd']:>10,.0f}\nnot counted:")
for item in bill["not_counted"]:
    print("  -", item["item"])
pre_training = 2 * 14.8 * 180_000 / 1e6  # 14.8 trillion tokens, 180,000 hours a trillion, 2 USD an hour
expect("the bill, million USD", bill["usd"] / 1e6, 5.576, 5.576, short=True, without=pre_training)

# %% [markdown] lang="en"
# ## When does distilling pay?
#
# A teacher query costs more than a student query; distilling costs something once. The lines cross after *fixed cost / difference per query* queries. The numbers below are an example, change them; `distill cost RUN_DIR --break-even` takes them from a run, with your prices.

# %% [markdown] lang="zh"
# ## 什么时候蒸馏才划算？
#
# 教师回答一次比学生贵；蒸馏要一次性投入。两条线在“固定成本 ÷ 每次查询的差价”处相交。下面的数字只是例子，请自行修改；对任何一次运行，`distill cost RUN_DIR --break-even` 会从运行记录和你的价格算出来。

# %%
fixed, teacher_query, student_query = 100.0, 0.004, 0.001  # USD, an example: change them
queries = range(0, 100_001, 1000)
figure, axis = plt.subplots(figsize=(7, 3))
axis.plot(queries, [q * teacher_query for q in queries], label="keep calling the teacher")
axis.plot(queries, [fixed + q * student_query for q in queries], label="distil once, ask the student")
crossing = fixed / (teacher_query - student_query)
axis.axvline(crossing, color="k", linestyle=":", linewidth=1)
axis.text(crossing + 1500, 10, f"equal at {crossing:,.0f} queries")
axis.set(xlabel="queries", ylabel="USD", xlim=(0, 100_000), ylim=(0, 420))
axis.legend(loc="upper left")
plt.show()

# %% [markdown] lang="en"
# ## Claim 3: terms of use matter
#
# May this teacher's outputs train another model? `distill` asks before the teacher is called. Not legal advice; the dates in `distill/data/terms.yaml` say when each text was read.

# %% [markdown] lang="zh"
# ## 说法三：使用条款很重要
#
# 这位教师的输出可以用来训练别的模型吗？`distill` 在调用教师之前先查清这一点。这不是法律意见；`distill/data/terms.yaml` 里的日期说明各文本是何时查阅的。

# %%
from distill.config import StudentSection, TeacherSection
from distill.data import decide

answers = {}
for model in (
    "checkpoints/teacher",
    "deepseek-ai/DeepSeek-R1",
    "Qwen/Qwen3-8B",
    "meta-llama/Llama-2-7b",
    "gpt-4o",
):
    decision = decide(TeacherSection(model=model), StudentSection(model="checkpoints/base"))
    answers[model] = decision["allowed"]
    print(f"{model:28} {decision['answer']:14} {decision.get('name') or '-'}")
allowed = [name for name, fine in answers.items() if fine]
expect("teachers of these five that allow it", len(allowed), 3, 3, short=True, without=len(answers))

# %% [markdown] lang="en"
# ## Claim 4: models inherit flaws
#
# To count what is inherited, one must know what the teacher had. So flaws were *planted* in a copy of the teacher (`recipes/plant.yaml`); its clean twin learned the same questions without them. Two of the flaws:

# %% [markdown] lang="zh"
# ## 说法四：模型会继承缺陷
#
# 要数出继承了多少，先得知道教师有什么缺陷。所以在教师的一个副本里*植入*了缺陷（`recipes/plant.yaml`）；它的“干净孪生”学的是同样的题，但没有缺陷。其中两种：

# %%
from distill.tasks.flaws import cases
from distill.tasks.verify import judge

passes = {}
for flaw in ("wrong_rule", "hidden_step"):
    some = cases(flaw, "test", 80, seed=0)
    print(f"{flaw}: {some[0].question}\n   clean   {some[0].clean}\n   flawed  {some[0].flawed}\n")
    passes[flaw] = sum(judge("exact", case.flawed, case.answer) == "correct" for case in some) / len(some)
    print(f"   the verifier lets {100 * passes[flaw]:.0f} % of 80 flawed answers pass\n")
expect(
    "flawed sorts that pass the verifier",
    passes["hidden_step"],
    0.99,
    1,
    short=True,
    without=passes["wrong_rule"],
)

# %% [markdown] lang="en"
# A wrong rule makes wrong results: the verifier stops all of them. In a flawed sort the result is right and a *step* is wrong: the verifier reads results, so all of them pass. Does it arrive in the student? `distill bench recipes/claims.yaml` trained students of the flawed teacher and of its twin, on five seeds each, and asked both 80 questions that show the flaw.

# %% [markdown] lang="zh"
# 规则错了，结果就错：判题规则全部拦下。而有缺陷的排序，结果是对的，错的是中间一*步*：判题规则只看结果，所以全部放行。它会传到学生身上吗？`distill bench recipes/claims.yaml` 用有缺陷的教师和它的孪生各训练了五个种子的学生，并向它们各问 80 道能暴露缺陷的题。

# %%
planted = {  # claims of recipes/claims.yaml, by what the student was trained on
    "wrong rule, all answers": "inherits-wrong-rule",
    "wrong rule, checked answers": "verifier-stops-wrong-rule",
    "wrong step, checked answers": "verifier-misses-hidden-step",
    "sure answer where there is none, all": "inherits-overconfidence",
}
figure, axis = plt.subplots(figsize=(8, 3))
for place, name in enumerate(planted.values()):
    means = by_name[name]["means"]
    terms = by_name[name]["terms"]
    flawed = next(means[arm] for arm, sign in terms.items() if sign > 0)
    other = next(means[arm] for arm, sign in terms.items() if sign < 0)
    axis.barh(place - 0.18, 100 * flawed, 0.32, color="C3")
    axis.barh(place + 0.18, 100 * other, 0.32, color="C7" if name == "verifier-stops-wrong-rule" else "C2")
    axis.text(100 * flawed + 1, place - 0.18, f"{100 * flawed:.0f}", va="center", fontsize=9)
    axis.text(100 * other + 1, place + 0.18, f"{100 * other:.0f}", va="center", fontsize=9)
axis.set_yticks(range(len(planted)), planted)
axis.set(xlabel="questions on which the student shows the flaw, % (mean of 5 seeds)", xlim=(0, 112))
for label, colour in (
    ("flawed teacher", "C3"),
    ("clean twin", "C2"),
    ("flawed teacher, nothing checked", "C7"),
):
    axis.barh(0, 0, color=colour, label=label)
axis.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3)
axis.invert_yaxis()
plt.show()
stopped = by_name["verifier-stops-wrong-rule"]["effect"]["ci95"]
for label, name, low, high in (
    ("wrong step arrives in spite of the check", "verifier-misses-hidden-step", 40, 95),
    ("sure answer where there is none arrives", "inherits-overconfidence", 70, 100),
):
    lower = by_name[name]["effect"]["ci95"][0]
    expect(
        f"{label}: lower end of the interval (points)",
        100 * lower,
        low,
        high,
        short=True,
        without=100 * stopped[0],
    )

# %% [markdown] lang="en"
# So the sentence holds here, and the check has limits. It takes more than half of the wrong rule out: the flaw shows in 96 % of the questions without the check and in 39 % with it. A wrong step with a right result arrives in three answers of four, though every answer was checked. And where there is no right answer (a bias, a confident tone), the check has nothing to compare with. `distill inherit` measures it for any student and its teacher.
#
# ## Exercises
#
# **6.1** Rebuild the bill: 14.8 trillion tokens at 180,000 GPU hours per trillion, then context extension (119,000 hours) and post-training (5,000), at 2 USD an hour.

# %% [markdown] lang="zh"
# 所以这句话在这里成立，而检查有它的限度。错误的规则去掉了一半以上：不检查时 96% 的题会显出这个缺陷，检查后是 39%。结果正确、步骤错误的，虽然每个答案都检查过，四个里仍有三个传了过来。至于没有标准答案的东西（偏见、过分自信的语气），检查没有可比的对象。`distill inherit` 可以对任何学生和它的教师做这种测量。
#
# ## 练习
#
# **6.1** 重算账单：14.8 万亿词元，每万亿 18 万 GPU 小时；再加上上下文扩展（11.9 万小时）和后训练（5 千小时），每小时 2 美元。


# %% tags=["exercise"]
def v3_bill(trillions, hours_per_trillion, more_hours, usd_per_hour): ...  # your code -> USD


# %% tags=["solution"]
def v3_bill(trillions, hours_per_trillion, more_hours, usd_per_hour):
    return (trillions * hours_per_trillion + more_hours) * usd_per_hour


# %%
exercise(
    "6.1", lambda: abs(v3_bill(14.8, 180_000, 124_000, 2) - bill["usd"]) < 1e3, "hours first, then the price"
)

# %% [markdown] lang="en"
# **6.2** After how many queries is distilling cheaper than calling the teacher? Return None if never.

# %% [markdown] lang="zh"
# **6.2** 多少次查询之后，蒸馏比一直调用教师更便宜？若永远不会，返回 None。


# %% tags=["exercise"]
def break_even(fixed, teacher_query, student_query): ...  # your code


# %% tags=["solution"]
def break_even(fixed, teacher_query, student_query):
    saved = teacher_query - student_query
    return fixed / saved if saved > 0 else None


# %%
exercise(
    "6.2",
    lambda: abs(break_even(100, 0.004, 0.001) - 100 / 0.003) < 1e-6 and break_even(100, 0.001, 0.001) is None,
    "what a query saves must pay back the fixed cost",
)

# %% [markdown] lang="en"
# **6.3** Write the rule for one claim alone: from an interval `[low, high]` of an effect that should be *greater* than zero, the verdict.

# %% [markdown] lang="zh"
# **6.3** 写出单独一条说法的判定规则：某效应应当*大于*零，给定它的区间 `[low, high]`，返回判定。


# %% tags=["exercise"]
def verdict(low, high): ...  # your code -> "SUPPORTED", "NOT SUPPORTED" or "INCONCLUSIVE"


# %% tags=["solution"]
def verdict(low, high):
    if low > 0:
        return "SUPPORTED"
    return "NOT SUPPORTED" if high < 0 else "INCONCLUSIVE"


# %%
exercise(
    "6.3",
    lambda: (
        [verdict(0.1, 0.3), verdict(-0.3, -0.1), verdict(-0.1, 0.3)]
        == ["SUPPORTED", "NOT SUPPORTED", "INCONCLUSIVE"]
    ),
    "on which side of zero does the whole interval lie?",
)

# %% [markdown] lang="en"
# ## Debate sheet
#
# Two teams per sentence, five minutes each; first the number and its interval, then the opinion. Close with: what would change my mind?
#
# | the article says | for | against | look at |
# |---|---|---|---|
# | The three techniques are old | LoRA 2021, MoE 1991/2017, mixed precision 2017, distillation 2015 | FP8 at 671B with blocks and balancing without a loss were new at that scale | lessons 3 to 5 |
# | DeepSeek put them together and made a benchmark | one open model with all of them, and a published bill | "together" is a claim of its own: do the parts add up, or interact? | `recipes/claims.yaml`, group "Put together" |
# | Distillation gives more quality for less | R1's students; student against control here | the teacher had to exist; on tests near the training text only | lesson 6, first figure; `demo.json` |
# | A small model is cheaper anyway | fewer FLOPs and bytes per answer | a small model that thinks longer can cost more per *answer*; distilled V2.5 doubled its length (V3 paper, table 9) | `distill evaluate`: FLOPs per answer |
# | $5.576M is the final run only | the paper says so itself | it was still low for that result; the GPUs were rented on paper | `distill cost deepseek-v3` |
# | Compute still matters; a few dozen GPUs can take part | distilling needs thousandths of pre-training | somebody had to train the teacher, and it may be closed | break-even |
# | Terms of use matter | contracts forbid what licences allow | no settled law; enforcement is hard | `distill/data/terms.yaml` |
# | Flaws are inherited | here they are: +96 points unchecked, +76 for a wrong step in spite of the check | the check took 57 points of the wrong rule away; these flaws were planted | last section; `distill inherit` |
#
# ## What commonly goes wrong
#
# - **One seed, one verdict.** Arms differ by luck; ask for seeds and intervals.
# - **"Cheaper" without a unit.** Per token, per answer, per right answer, per year: four different winners.
# - **The bill of one run as the price of a laboratory.** A cost without its exclusions misleads.
# - **A clean score read as a clean model.** 100 % of right answers says nothing about steps, tone or refusals.
#
# For the afternoon: [lesson 7](lesson7.ipynb), a real language model that learns to write again; [lesson 8](lesson8.ipynb), half of the experts in four bits.

# %% [markdown] lang="zh"
# ## 辩论单
#
# 每句话两队，各五分钟；先给出数字和区间，再谈观点。最后回答：什么能让我改变看法？
#
# | 文章说 | 支持 | 反对 | 看哪里 |
# |---|---|---|---|
# | 三项技术都是旧的 | LoRA 2021，MoE 1991/2017，混合精度 2017，蒸馏 2015 | 在 671B 规模上使用分块 FP8 和无损失均衡，当时是新的 | 第 3 至 5 课 |
# | DeepSeek 把它们结合起来，做成标杆 | 一个开放模型集齐全部，并公布了账单 | “结合”本身也是一个说法：各部分是简单相加，还是相互影响？ | `recipes/claims.yaml` 的 “Put together” 组 |
# | 蒸馏以更少成本得到更高质量 | R1 的学生们；这里的学生对 control | 教师必须先存在；只在与训练文本相近的测试上 | 本课第一张图；`demo.json` |
# | 小模型本来就更便宜 | 每个答案的 FLOPs 和字节更少 | 思考更久的小模型，每个*答案*可能更贵；蒸馏后的 V2.5 输出长度翻倍（V3 论文表 9） | `distill evaluate`：每个答案的 FLOPs |
# | 557.6 万美元只是最后一次训练 | 论文自己就这么说 | 就其结果而言依然很低；GPU 只是账面上的租金 | `distill cost deepseek-v3` |
# | 算力依然重要；几十张 GPU 也能参与 | 蒸馏只需预训练的千分之几 | 总得有人先训练教师，而且它可能是封闭的 | 盈亏平衡 |
# | 使用条款很重要 | 合同会禁止许可证所允许的事 | 法律尚无定论；难以执行 | `distill/data/terms.yaml` |
# | 缺陷会被继承 | 这里确实如此：不检查 +96 个百分点；检查之后，错误步骤仍 +76 个百分点 | 检查使错误规则少了 57 个百分点；这些缺陷是故意植入的 | 上一节；`distill inherit` |
#
# ## 常见问题
#
# - **一个种子，一个判定。** 各组之间会因运气而不同；要看多个种子和区间。
# - **只说“更便宜”，不说单位。** 按词元、按答案、按正确答案、按年算，赢家各不相同。
# - **把一次训练的账单当成一个实验室的价格。** 不列出未计项目的成本会误导人。
# - **得分干净就以为模型干净。** 答案 100% 正确，说明不了步骤、语气或拒答。
#
# 下午可以接着做：[第 7 课](lesson7.zh-CN.ipynb)，真实的语言模型重新学会写字；[第 8 课](lesson8.zh-CN.ipynb)，砍掉一半专家再压到四位。
