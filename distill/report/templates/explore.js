// Sliders of the workshop (distill/lessons/shown.py): a knob is moved, the curve moves with it. Nothing is loaded.
// Each kind has its controls, and a function from their values to what is drawn: bars or lines, and a sentence.
(() => {
  const say = (words, lang) => words[lang] ?? words.en;
  const softmax = (z) => {
    const top = Math.max(...z), e = z.map((v) => Math.exp(v - top)), sum = e.reduce((a, b) => a + b, 0);
    return e.map((v) => v / sum);
  };
  const kl = (p, q) => p.reduce((sum, v, i) => sum + (v > 0 ? v * Math.log(v / Math.max(q[i], 1e-300)) : 0), 0);
  const mix = (p, q, b) => p.map((v, i) => (1 - b) * v + b * q[i]);
  // A seeded generator: the picture is the same whenever it is opened.
  const random = (seed) => () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
  const normal = (next) => Math.sqrt(-2 * Math.log(1 - next())) * Math.cos(2 * Math.PI * next());
  const fixed = (v, n = 2) => v.toFixed(n);

  // The two-humped teacher of lesson 2 on 121 points, and a bell.
  const X = Array.from({ length: 121 }, (_, i) => -6 + i / 10);
  const bell = (c, w) => softmax(X.map((x) => (-((x - c) ** 2)) / (2 * w * w)));
  const TEACHER = mix(bell(2, 0.5), bell(-2, 0.5), 0.4);
  const divergence = (q, beta) => {
    if (beta <= 0.001) return kl(TEACHER, q);
    if (beta >= 0.999) return kl(q, TEACHER);
    const m = mix(q, TEACHER, beta);
    return beta * kl(TEACHER, m) + (1 - beta) * kl(q, m);
  };
  const nearest = (beta) => {
    let best = null;
    for (let c = -3; c <= 3.001; c += 0.1)
      for (let w = 0.3; w <= 2.6; w += 0.1) {
        const q = bell(c, w), value = divergence(q, beta);
        if (!best || value < best.value) best = { c, w, q, value };
      }
    return best;
  };
  // E4M3: 3 bits of mantissa, smallest normal 2^-6, largest 448.
  const e4m3 = (x) => {
    const size = Math.min(Math.abs(x), 448);
    if (size === 0) return 0;
    const step = 2 ** (Math.max(Math.floor(Math.log2(size)), -6) - 3);
    return Math.sign(x) * Math.min(Math.round(size / step) * step, 448);
  };

  const KINDS = {
    temperature: {
      controls: [{ key: "T", min: 0.2, max: 5, step: 0.1, value: 1, name: { en: "temperature T", zh: "温度 T" } }],
      draw: ({ T }, data, lang) => {
        const p = softmax(data.scores.map((z) => z / T));
        const entropy = -p.reduce((s, v) => s + (v > 0 ? v * Math.log(v) : 0), 0);
        const twice = p.reduce((s, v) => s + v * v, 0);
        return {
          bars: p, names: data.names, top: 1, x: say({ en: "token", zh: "词元" }, lang), y: say({ en: "probability", zh: "概率" }, lang),
          text: say({ en: `Entropy ${fixed(entropy)} nats. Two samples are the same token with probability ${fixed(100 * twice, 0)} %.`,
            zh: `熵 ${fixed(entropy)} nat。两次采样得到同一个词元的概率是 ${fixed(100 * twice, 0)}%。` }, lang),
        };
      },
    },
    direction: {
      controls: [{ key: "beta", min: 0, max: 1, step: 0.05, value: 0,
        name: { en: "beta: 0 = forward KL, 1 = reverse KL", zh: "beta：0 为前向 KL，1 为反向 KL" } }],
      draw: ({ beta }, _data, lang) => {
        const best = nearest(beta), between = best.q.reduce((s, v, i) => s + (Math.abs(X[i]) < 1 ? v : 0), 0);
        return {
          lines: [{ name: say({ en: "teacher", zh: "教师" }, lang), y: TEACHER, fill: true },
            { name: say({ en: "best student", zh: "最好的学生" }, lang), y: best.q }],
          at: X, top: 0.085, x: say({ en: "token", zh: "词元" }, lang), y: say({ en: "probability", zh: "概率" }, lang),
          text: say({ en: `Centre ${fixed(best.c, 1)}, width ${fixed(best.w, 1)}. ${fixed(100 * between, 0)} % of the student lies between the humps, where the teacher says nothing.`,
            zh: `中心 ${fixed(best.c, 1)}，宽度 ${fixed(best.w, 1)}。学生有 ${fixed(100 * between, 0)}% 的概率落在两峰之间，而教师在那里什么也不说。` }, lang),
        };
      },
    },
    tail: {
      controls: [{ key: "k", min: 1, max: 256, step: 1, value: 32, name: { en: "stored tokens k of 1,000", zh: "保存的词元数 k（共 1000）" } },
        { key: "flat", min: 0.6, max: 2, step: 0.1, value: 1, name: { en: "how peaked the teacher is", zh: "教师分布有多尖" } }],
      draw: ({ k, flat }, _data, lang) => {
        const next = random(3), V = 1000;
        const p = softmax(Array.from({ length: V }, (_, i) => -flat * Math.log(i + 2)));
        const q = softmax(p.map((v) => Math.log(v) + 0.7 * normal(next)));
        const head = p.slice(0, k), mass = head.reduce((a, b) => a + b, 0), covered = q.slice(0, k).reduce((a, b) => a + b, 0);
        const cut = head.reduce((s, v, i) => s + (v / mass) * Math.log(v / mass / q[i]), 0);
        const bucket = head.reduce((s, v, i) => s + v * Math.log(v / q[i]), 0)
          + (mass < 1 ? (1 - mass) * Math.log((1 - mass) / (1 - covered)) : 0);
        const truth = kl(p, q);
        return {
          bars: [truth, cut, bucket], top: Math.max(1, cut * 1.1), x: "",
          names: say({ en: ["true KL", "tail thrown away", "tail as one bucket"], zh: ["真实 KL", "丢掉尾部", "尾部合成一格"] }, lang),
          y: say({ en: "forward KL (nats)", zh: "前向 KL（nat）" }, lang),
          text: say({ en: `${k} tokens hold ${fixed(100 * mass, 0)} % of the teacher, in ${6 * k} bytes. Thrown away, the tail makes an error of ${fixed(cut - truth)} nats; as one bucket, of ${fixed(bucket - truth)}.`,
            zh: `${k} 个词元占教师概率的 ${fixed(100 * mass, 0)}%，共 ${6 * k} 字节。丢掉尾部，误差 ${fixed(cut - truth)} nat；合成一格，误差 ${fixed(bucket - truth)} nat。` }, lang),
        };
      },
    },
    rank: {
      controls: [{ key: "r", min: 1, max: 128, step: 1, value: 16, name: { en: "rank r", zh: "秩 r" } },
        { key: "width", min: 128, max: 4096, step: 128, value: 128, name: { en: "width of the matrix", zh: "矩阵宽度" } }],
      draw: ({ r, width }, _data, lang) => {
        const ranks = Array.from({ length: 128 }, (_, i) => i + 1);
        const added = 2 * r * width, whole = width * width;
        return {
          lines: [{ name: "LoRA", y: ranks.map((i) => Math.min((100 * 2 * i) / width, 200)) },
            { name: say({ en: "the whole matrix", zh: "整个矩阵" }, lang), y: ranks.map(() => 100) }],
          at: ranks, top: Math.max(120, Math.min(200, 25600 / width)), mark: r, x: say({ en: "rank", zh: "秩" }, lang), y: say({ en: "trained, % of the matrix", zh: "训练的参数，占矩阵的 %" }, lang),
          text: say({ en: `Rank ${r} trains ${added.toLocaleString("en")} numbers of a ${width} x ${width} matrix: ${fixed((100 * added) / whole, 1)} % of its ${whole.toLocaleString("en")}.`,
            zh: `秩 ${r} 在 ${width} x ${width} 的矩阵上训练 ${added.toLocaleString("en")} 个数，是 ${whole.toLocaleString("en")} 的 ${fixed((100 * added) / whole, 1)}%。` }, lang),
        };
      },
    },
    blocks: {
      controls: [{ key: "log2", min: 3, max: 10, step: 1, value: 10, name: { en: "numbers that share one scale: 2 to the power of", zh: "共用一个缩放系数的个数：2 的几次方" } },
        { key: "outlier", min: 0, max: 22, step: 1, value: 16, name: { en: "size of one outlier: 2 to the power of", zh: "一个离群值的大小：2 的几次方" } }],
      draw: ({ log2, outlier }, _data, lang) => {
        const next = random(7), block = 2 ** log2, x = Array.from({ length: 1024 }, () => normal(next));
        x[70] = 2 ** outlier;
        const error = new Array(1024).fill(0);
        for (let start = 0; start < 1024; start += block) {
          const part = x.slice(start, start + block), scale = Math.max(...part.map(Math.abs)) / 448;
          part.forEach((v, i) => { error[start + i] = Math.min(Math.abs(e4m3(v / scale) * scale - v) / Math.abs(v), 1); });
        }
        const groups = Array.from({ length: 64 }, (_, g) => {
          const part = error.slice(16 * g, 16 * g + 16).filter((_, i) => 16 * g + i !== 70);
          return part.reduce((a, b) => a + b, 0) / part.length;
        });
        const rest = error.filter((_, i) => i !== 70), mean = rest.reduce((a, b) => a + b, 0) / rest.length;
        return {
          bars: groups, top: 1, x: say({ en: "16 neighbours a bar; the outlier is in the fifth", zh: "每根柱子是 16 个相邻的数；离群值在第五根里" }, lang),
          y: say({ en: "relative error", zh: "相对误差" }, lang),
          text: say({ en: `Mean error of the others ${fixed(100 * mean, 1)} %. ${1024 / block} scale${block === 1024 ? "" : "s"} for 1,024 numbers: ${fixed(8 + 32 / block, 2)} bits a number.`,
            zh: `其余各数的平均误差 ${fixed(100 * mean, 1)}%。1024 个数用 ${1024 / block} 个缩放系数：每个数 ${fixed(8 + 32 / block, 2)} 位。` }, lang),
        };
      },
    },
    balance: {
      controls: [{ key: "log", min: -4, max: 0, step: 0.25, value: -4, name: { en: "step of the bias u: 10 to the power of", zh: "偏置步长 u：10 的几次方" } }],
      draw: ({ log }, _data, lang) => {
        const next = random(1), E = 8, u = log <= -4 ? 0 : 10 ** log, bias = new Array(E).fill(0), curve = [];
        for (let step = 0; step < 200; step++) {
          const counts = new Array(E).fill(0);
          for (let t = 0; t < 128; t++) {
            const scores = bias.map((b, e) => 1 / (1 + Math.exp(-(1.5 - (3 * e) / 7 + normal(next)))) + b);
            const order = scores.map((s, e) => [s, e]).sort((a, b) => b[0] - a[0]);
            counts[order[0][1]]++;
            counts[order[1][1]]++;
          }
          const mean = counts.reduce((a, b) => a + b, 0) / E;
          curve.push(Math.max(...counts) / mean - 1);
          counts.forEach((n, e) => { bias[e] += u * Math.sign(mean - n); });
        }
        const end = curve.slice(-50).reduce((a, b) => a + b, 0) / 50;
        return {
          lines: [{ name: "MaxVio", y: curve }], at: curve.map((_, i) => i), top: 3, x: say({ en: "step", zh: "步" }, lang), y: "MaxVio",
          text: say({ en: `u = ${u ? u.toPrecision(2) : 0}: over the last steps the busiest expert takes ${fixed(100 * end, 0)} % more than its share.`,
            zh: `u = ${u ? u.toPrecision(2) : 0}：最后几十步里，最忙的专家比应得的份额多 ${fixed(100 * end, 0)}%。` }, lang),
        };
      },
    },
    experts: {
      controls: [{ key: "place", min: 0, max: 0, step: 1, value: 0, name: { en: "expert that is dropped", zh: "丢掉的专家" } }],
      draw: ({ place }, data, lang) => ({
        bars: data.scores.map((v) => v[0]), whiskers: data.scores.map((v) => [v[1], v[2]]), names: data.names, top: 1, mark: place,
        x: say({ en: "which expert is dropped", zh: "丢掉哪个专家" }, lang), y: say({ en: "right answers", zh: "答对的比例" }, lang),
        text: say({ en: `${data.names[place]}: ${fixed(100 * data.scores[place][0], 0)} % right, 95 % interval ${fixed(100 * data.scores[place][1], 0)} to ${fixed(100 * data.scores[place][2], 0)}.`,
          zh: `${data.names[place]}：答对 ${fixed(100 * data.scores[place][0], 0)}%，95% 区间 ${fixed(100 * data.scores[place][1], 0)} 到 ${fixed(100 * data.scores[place][2], 0)}。` }, lang),
      }),
    },
    // What a lesson measured, place by place: the slider walks along the places; `data` has the curves and the names.
    walk: {
      controls: [{ key: "place", min: 0, max: 0, step: 1, value: 0, name: (data) => data.knob, shown: (place, data) => data.at[place] }],
      draw: ({ place }, data, lang) => ({
        lines: data.lines.map(({ name, y }) => ({ name: say(name, lang), y })), at: data.at, mark: data.at[place],
        top: 1.1 * Math.max(...data.lines.flatMap(({ y }) => y)), x: say(data.knob, lang), y: say(data.unit, lang),
        text: `${say(data.knob, lang)} ${data.at[place]}: `
          + data.lines.map(({ name, y, said }) => `${say(name, lang)} ${said?.[place] ?? fixed(y[place])}`).join("; "),
      }),
    },
  };

  const WIDE = 720, NARROW = 390, HEIGHT = 260, LEFT = 62, BOTTOM = 46, TOP = 12, RIGHT = 18;
  // Round numbers from `low` to `high`, at most `most` steps apart.
  const ticks = (low, high, most) => {
    const rough = (high - low) / most, size = 10 ** Math.floor(Math.log10(rough));
    const step = size * [1, 2, 2.5, 5, 10].find((m) => m * size >= rough * 0.999);
    const found = [];
    for (let v = Math.ceil(low / step - 1e-6) * step; v <= high * 1.0001; v += step) found.push(Math.abs(v) < step / 1e6 ? 0 : v);
    return found;
  };
  const short = (v) => Number(v.toFixed(4)).toString();
  const COLOURS = ["#6b7785", "#0072b2", "#d55e00"];
  const shape = (tag, attributes, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const picture = (svg, what) => {
    svg.replaceChildren();
    // As wide as its place, so that letters keep their size on a phone.
    const WIDTH = svg.clientWidth && svg.clientWidth < 520 ? NARROW : WIDE;
    svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    const w = WIDTH - LEFT - RIGHT, h = HEIGHT - TOP - BOTTOM, y = (v) => TOP + h * (1 - Math.min(v, what.top) / what.top);
    for (const v of ticks(0, what.top, 5)) {
      svg.append(shape("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(v), y2: y(v), stroke: "currentColor", "stroke-opacity": 0.15 }));
      svg.append(shape("text", { x: LEFT - 6, y: y(v) + 4, "text-anchor": "end" }, short(v)));
    }
    if (what.bars) {
      const slot = w / what.bars.length, thin = what.bars.length > 16;
      what.bars.forEach((v, i) => {
        const left = LEFT + slot * i + slot * (thin ? 0.05 : 0.15), marked = what.mark === undefined || what.mark === i;
        svg.append(shape("rect", { x: left, y: y(v), width: slot * (thin ? 0.9 : 0.7), height: Math.max(TOP + h - y(v), 0.5), fill: "#0072b2", "fill-opacity": marked ? 0.85 : 0.35 }));
        if (what.whiskers) svg.append(shape("line", { x1: left + slot * 0.35, x2: left + slot * 0.35, y1: y(what.whiskers[i][0]), y2: y(what.whiskers[i][1]), stroke: "currentColor", "stroke-width": 2 }));
        if (!thin) {
          svg.append(shape("text", { x: LEFT + slot * (i + 0.5), y: y(v) - 4 < TOP + 8 ? TOP + 12 : y(v) - 4, "text-anchor": "middle" }, v.toFixed(2)));
          svg.append(shape("text", { x: LEFT + slot * (i + 0.5), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, what.names?.[i] ?? i));
        }
      });
    } else {
      const at = what.at, x = (v) => LEFT + (w * (v - at[0])) / (at.at(-1) - at[0]);
      what.lines.forEach((line, n) => {
        const path = line.y.map((v, i) => `${i ? "L" : "M"}${x(at[i]).toFixed(1)} ${y(v).toFixed(1)}`).join("");
        if (line.fill) svg.append(shape("path", { d: `${path}L${x(at.at(-1))} ${y(0)}L${x(at[0])} ${y(0)}Z`, fill: COLOURS[n], "fill-opacity": 0.3 }));
        else svg.append(shape("path", { d: path, fill: "none", stroke: COLOURS[n + (what.lines.length === 1)], "stroke-width": 2.5 }));
        svg.append(shape("text", { x: LEFT + 12 + (WIDTH === WIDE ? 150 : 110) * n, y: TOP + 12, style: `fill: ${COLOURS[n + (what.lines.length === 1)]}`, "font-weight": 700 }, line.name));
      });
      for (const v of ticks(at[0], at.at(-1), WIDTH === WIDE ? 8 : 5))
        svg.append(shape("text", { x: x(v), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, short(v)));
      if (what.mark !== undefined) svg.append(shape("line", { x1: x(what.mark), x2: x(what.mark), y1: TOP, y2: TOP + h, stroke: "#d55e00", "stroke-width": 2, "stroke-dasharray": "5 4" }));
    }
    svg.append(shape("text", { x: LEFT + w / 2, y: HEIGHT - 8, "text-anchor": "middle", "font-weight": 600 }, what.x));
    svg.append(shape("text", { transform: `translate(14 ${TOP + h / 2}) rotate(-90)`, "text-anchor": "middle", "font-weight": 600 }, what.y));
  };

  for (const box of document.querySelectorAll(".explore:not([data-alive])")) {
    box.dataset.alive = "yes";
    const { kind, data, lang } = JSON.parse(box.querySelector("script[type='application/json']").textContent);
    const svg = shape("svg", { viewBox: `0 0 ${WIDE} ${HEIGHT}`, role: "img" }), values = {}, told = document.createElement("p");
    const redraw = () => {
      const what = KINDS[kind].draw(values, data, lang);
      picture(svg, what);
      told.textContent = what.text;
      svg.setAttribute("aria-label", what.text);
    };
    told.setAttribute("aria-live", "polite");
    for (const control of KINDS[kind].controls) {
      const label = document.createElement("label"), input = document.createElement("input"), shown = document.createElement("output");
      const places = { experts: data.scores?.length, walk: data.at?.length }[kind], most = places ? places - 1 : control.max;
      const start = control.shown ? data.start ?? most : control.value;
      const name = typeof control.name === "function" ? control.name(data) : control.name;
      const show = () => { shown.textContent = control.shown ? control.shown(values[control.key], data) : values[control.key]; };
      Object.assign(input, { type: "range", min: control.min, max: most, step: control.step, value: start });
      values[control.key] = start;
      show();
      input.addEventListener("input", () => {
        values[control.key] = Number(input.value);
        show();
        redraw();
      });
      label.append(say(name, lang) + " ", shown, input);
      box.append(label);
    }
    box.append(svg, told);
    redraw();
    new ResizeObserver(redraw).observe(svg);
  }
})();
