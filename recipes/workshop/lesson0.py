# %% [markdown] lang="en"
# # Lesson 0. Five minutes: what the student learned
#
# *Distillation* trains a small model, the student, on what a larger one, the teacher, writes. Here it is already done. The teacher answered 3,400 problems; the student trained on its answers for two minutes. You look at the result and ask the models yourself. Nothing is trained in this lesson.
#
# **After this lesson you can** say what the student learned, and from whom; say what the control is for; read an answer token by token; take an expert out of the teacher and see what happens.
#
# **Class time** 5 minutes, and 5 more to play. Computing: {{minutes}} minutes on one CPU thread.
#
# | your machine | what to run |
# |---|---|
# | 2-core CPU | this notebook as it is; under 1 GB of memory |
# | GPU with 8 GB | the same: these models are so small that a GPU does not help |
# | T4 (16 GB, no bf16) | the same |
# | one card with 24 GB | the same |
#
# Run the cells one after the other, with Shift+Enter. The first one is folded: it installs what is missing, and does nothing if all is there.

# %% [markdown] lang="zh"
# # 第 0 课 五分钟：学生学会了什么
#
# *蒸馏*就是用大模型（教师）写的内容来训练小模型（学生）。这里已经训练好了：教师回答了 3400 道题，学生用这些回答训练了两分钟。你来看结果，并亲自向模型提问。本课不做任何训练。
#
# **学完本课，你能够**：说出学生学会了什么、向谁学的；说出对照组的用处；逐个词元地读一个答案；从教师里去掉一个专家，看看会怎样。
#
# **课堂用时** 5 分钟，再玩 5 分钟。计算用时：单线程 CPU 约 {{minutes}} 分钟。
#
# | 你的机器 | 怎么跑 |
# |---|---|
# | 双核 CPU | 直接运行本笔记本；内存不到 1 GB |
# | 8 GB 显存的 GPU | 一样：这些模型太小，GPU 帮不上忙 |
# | T4（16 GB，不支持 bf16） | 一样 |
# | 一张 24 GB 的卡 | 一样 |
#
# 用 Shift+Enter 逐个运行单元格。第一个单元格是折叠的：缺什么它就装什么，都有就什么也不做。

# %%
import matplotlib.pyplot as plt

from distill.lessons import answer, begin, exercise, expect, players, show
from distill.storage import PROJECT_ROOT, read_json

folder = begin(0)
demo = "recipes/workshop/demo"  # a finished run of recipes/demo.yaml, without what a lesson does not need
found = read_json(PROJECT_ROOT / demo / "results.json")
results = {**found["models"], "student": found["stored"]}  # the exam of the very student that lies here

figure, axis = plt.subplots(figsize=(8, 3))
for place, name in enumerate(("base", "control", "student", "teacher")):
    hard = results[name]["hard"]
    score, (low, high) = 100 * hard["accuracy"], (100 * x for x in hard["ci95"])
    axis.barh(
        place,
        score,
        xerr=[[score - low], [high - score]],
        capsize=4,
        color="C0" if name == "student" else "C7",
    )
    axis.text(high + 1.5, place, f"{score:.0f} %", va="center")
axis.set_yticks(range(4), ["base: before", "control: no teacher", "student: taught", "teacher"])
axis.set(xlabel="right answers to 420 hard problems that none of them has seen, %", xlim=(0, 112))
axis.invert_yaxis()
plt.show()

gain = results["student"]["hard"]["accuracy"] - results["control"]["hard"]["accuracy"]
expect("student minus control, hard problems", gain, 0.5, 0.95, short=True, without=0)

# %% [markdown] lang="en"
# - **base** is the student before training. It knows problems of two digits; these have four.
# - **control** trained as long, on the same questions, with the right final answers. It had no teacher.
# - **student** trained on the teacher's answers.
#
# The lines are 95 % intervals: another exam of 420 problems would give a score within them. So the gap between student and control is the teacher's work, and not luck and not more training. What is in the teacher's answers that the right results do not have? Ask them.

# %% [markdown] lang="zh"
# - **base**（底座）是训练之前的学生。它只会两位数的题；这里是四位数。
# - **control**（对照组）训练得一样久，题目相同，也有正确的最终答案，但没有教师。
# - **student**（学生）用教师的回答训练。
#
# 细线是 95% 置信区间：换 420 道题再考一次，得分也会落在里面。所以学生与对照组的差距来自教师，不是运气，也不是因为练得更多。教师的回答里有什么，是正确结果里没有的？问问它们。

# %%
playground = players(demo)
question = "What is 7235 + 8131?"
asked = answer(playground, question)
show(asked, playground)

# %% [markdown] lang="en"
# Base fails and the student is right. Read the student's text: `5+1+0=06` adds the last digits, 5 and 1, and the carry, 0. After `=` stand the new carry and the digit. Then come the next digits, from right to left. **This working is what the student learned.** Nobody told it the method; it read about 3,400 answers of the teacher.
#
# Now click a token, above. You see what the model itself weighed, what the teacher would have said, and the *experts* of the teacher: parts of its network, of which every token uses two of eight in a layer.
#
# Only a program can say who is right on problems like this one. It says:

# %% [markdown] lang="zh"
# 底座答错了，学生答对了。读读学生写的：`5+1+0=06` 把个位的 5 和 1 与进位 0 相加，等号后面是新的进位和这一位的数字；然后从右往左算下一位。**学生学会的就是这种推导。** 没有人告诉它方法，它只是读了教师的大约 3400 个回答。
#
# 现在点一下上面的某个词元。你会看到：模型自己考虑过哪些词元，教师会怎么说，还有教师的*专家*：它们是网络的一部分，每一层有八个，每个词元只用其中两个。
#
# 这类题谁对谁错，由程序判定：

# %%
for name, one in asked.answers.items():
    print(f"{name:8} {one.verdict:10} {one.text[:70]}")
right = {name: one.verdict == "correct" for name, one in asked.answers.items()}
expect("the student is right on this problem", right["student"], 1, 1, short=True, without=right["base"])

# %% [markdown] lang="en"
# ## Take an expert away
#
# Which expert of layer 1 does the teacher use most in its answer? The next cell forbids it, and asks again. Only the teacher has experts; base and student answer as before.

# %% [markdown] lang="zh"
# ## 去掉一个专家
#
# 在第 1 层，教师回答时用得最多的是哪个专家？下一个单元格禁用它，再问一遍。只有教师有专家，底座和学生照旧回答。

# %%
from collections import Counter

layer = playground.routed[0].routers[0].name
used = Counter(expert for token in asked.answers["teacher"].tokens for expert, _ in token.experts[layer])
busiest = used.most_common(1)[0][0]
again = answer(playground, question, drop={layer: [busiest]})
print(f"without expert {busiest}, the busiest in this layer: {again.answers['teacher'].verdict}")
show(again, playground)

# %% [markdown] lang="en"
# Did the teacher need it? One problem cannot say; lesson 5 measures it on many, with an interval. Change `question` and `busiest` and run the cells again.
#
# You can also do this in a window of its own and ask your own questions. Type this in a new terminal, in the project's folder:
#
# ```
# source .venv/bin/activate
# pip install -e ".[play]"                 # once, 200 MB
# distill play recipes/workshop/demo       # then open http://127.0.0.1:7860/
# ```
#
# ## Exercises
#
# **0.1** Where was the student least certain? Set `place` to the number of that token in `asked.answers["student"].tokens`, counted from 0. A token has a `probability`.

# %% [markdown] lang="zh"
# 教师需要它吗？只看一道题说不清；第 5 课会在许多题上测量，并给出区间。改一改 `question` 和 `busiest`，再运行这些单元格。
#
# 想在单独的窗口里随便提问，可以新开一个终端，在项目文件夹里输入：
#
# ```
# source .venv/bin/activate
# pip install -e ".[play]"                 # 只需一次，200 MB
# distill play recipes/workshop/demo       # 然后打开 http://127.0.0.1:7860/
# ```
#
# ## 练习
#
# **0.1** 学生在哪里最没把握？把 `place` 设为该词元在 `asked.answers["student"].tokens` 中的序号，从 0 数起。每个词元都有 `probability`。

# %% tags=["exercise"]
place = ...  # a number from 0

# %% tags=["solution"]
tokens = asked.answers["student"].tokens
place = min(range(len(tokens)), key=lambda i: tokens[i].probability)

# %%
exercise(
    "0.1",
    lambda: (
        asked.answers["student"].tokens[place].probability
        == min(t.probability for t in asked.answers["student"].tokens)
    ),
    "min over range(len(tokens)), with key=lambda i: tokens[i].probability",
)

# %% [markdown] lang="en"
# **0.2** Of 420 hard problems, how many *more* does the student solve than the control? Set `more`. Use `results`.

# %% [markdown] lang="zh"
# **0.2** 420 道难题里，学生比对照组*多*做对几道？给 `more` 赋值，数据在 `results` 里。

# %% tags=["exercise"]
more = ...  # a number of problems

# %% tags=["solution"]
more = round(420 * (results["student"]["hard"]["accuracy"] - results["control"]["hard"]["accuracy"]))

# %%
exercise(
    "0.2",
    lambda: abs(more - round(420 * gain)) < 0.5,
    "accuracy is a share of n: multiply the difference by 420",
)

# %% [markdown] lang="en"
# ## What commonly goes wrong
#
# - **"The student is as good as the teacher."** On these seven kinds of problems, nearly. Ask for something else and both write noise.
# - **A gain without a control.** Any training changes a model. Compare with the same training without the teacher.
# - **One answer taken for a score.** Look at one answer to understand, at hundreds to judge.
#
# Next: [lesson 1](lesson1.ipynb), what is in a teacher's output besides text.

# %% [markdown] lang="zh"
# ## 常见问题
#
# - **“学生和教师一样好。”** 在这七类题上差不多。问点别的，两者都只会乱写。
# - **只看提升，没有对照。** 任何训练都会改变模型，要和没有教师的同样训练相比。
# - **拿一个答案当得分。** 看一个答案是为了理解，看几百个才能评判。
#
# 接下来：[第 1 课](lesson1.zh-CN.ipynb)，教师的输出里除了文本还有什么。
