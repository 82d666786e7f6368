// Turns the leaves of the answer viewer: model, answer, layer, token. The page reads well without it.
(() => {
  const source = document.getElementById("viewer-data");
  if (!source) return;
  const { models, words } = JSON.parse(source.textContent);
  // A sentence of the page with its values filled in; they are text, never markup.
  const say = (key, values) => words[key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
  const at = (id) => document.getElementById(id);
  const now = { model: 0, answer: 0, layer: 0, token: 0 };
  const make = (tag, look, text) => {
    const element = document.createElement(tag);
    if (look) element.className = look;
    if (text !== undefined) element.textContent = text; // never markup: models wrote it
    return element;
  };
  const bytes = (text, wide) => {
    const raw = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    return wide ? new Uint16Array(raw.buffer) : raw;
  };
  const model = () => models[now.model];
  const answer = () => {
    const found = model().answers[now.answer];
    if (!found.experts) {
      found.experts = bytes(found.e, model().wide);
      found.weights = bytes(found.w, false);
    }
    return found;
  };
  // Place of one choice: experts and weights are [layer, token, rank].
  const place = (layer, token, rank) => (layer * answer().tokens.length + token) * model().k + rank;
  const colour = (expert) => "c" + (expert % 8);

  const choices = (select, words, value) => {
    select.replaceChildren(...words.map((word, index) => {
      const option = make("option", "", word);
      option.value = index;
      return option;
    }));
    select.value = value;
  };

  const showToken = (token) => {
    const a = answer(), m = model();
    now.token = token;
    for (const button of at("v-tokens").querySelectorAll("button")) {
      const chosen = Number(button.dataset.i) === token;
      button.tabIndex = chosen ? 0 : -1;
      button.classList.toggle("on", chosen);
    }
    let left = token;
    const [label] = a.runs.find(([, length]) => (left -= length) < 0);
    const table = make("table");
    const place_of = { n: token + 1, of: a.tokens.length, part: words[label] || label, token: a.tokens[token] };
    table.append(make("caption", "", say("token", place_of)));
    const head = table.createTHead().insertRow();
    head.append(make("th", "", words.layer));
    for (let rank = 0; rank < m.k; rank += 1) head.append(make("th", "", say("rank", { n: rank + 1 })));
    const body = table.createTBody();
    m.layers.forEach((name, layer) => {
      const row = body.insertRow();
      row.className = layer === now.layer ? "on" : "";
      row.append(make("td", "", name));
      for (let rank = 0; rank < m.k; rank += 1) {
        const cell = row.insertCell();
        if (rank >= m.perToken[layer]) { cell.textContent = "–"; continue; }
        const expert = a.experts[place(layer, token, rank)];
        const weight = a.weights[place(layer, token, rank)] / m.scale;
        cell.append(make("span", "chip " + colour(expert), expert));
        const idle = expert >= m.experts[layer] - m.nulls[layer] ? " " + words.idle : "";
        cell.append(" " + weight.toFixed(2) + idle);
      }
    });
    const scroll = make("div", "scroll");
    scroll.append(table);
    at("v-detail").replaceChildren(scroll);
  };

  const showTokens = () => {
    const a = answer(), m = model(), counts = new Map();
    let token = 0;
    at("v-tokens").replaceChildren(...a.runs.map(([label, length]) => {
      const run = make("div", "tokens in-" + label);
      run.append(make("span", "label", words[label] || label));
      for (const end = token + length; token < end; token += 1) {
        const chosen = [];
        for (let rank = 0; rank < Math.min(2, m.perToken[now.layer]); rank += 1) {
          chosen.push(a.experts[place(now.layer, token, rank)]);
        }
        counts.set(chosen[0], (counts.get(chosen[0]) || 0) + 1);
        const button = make("button", "token " + colour(chosen[0]));
        button.type = "button";
        button.dataset.i = token;
        button.append(make("span", "word", a.tokens[token]));
        const numbers = make("span", "numbers");
        numbers.append(make("b", "", chosen[0]));
        if (chosen.length > 1) numbers.append(" ", make("span", "", chosen[1]));
        button.append(numbers);
        run.append(button);
        if (a.tokens[token].includes("↵")) run.append(make("br"));
      }
      return run;
    }));
    const legend = [make("span", "", say("legend", { layer: m.layers[now.layer] }) + " ")];
    const order = [...counts].sort((one, two) => two[1] - one[1] || one[0] - two[0]);
    for (const [expert, count] of order.slice(0, 16)) {
      legend.push(make("span", "chip " + colour(expert), expert), ` × ${count}  `);
    }
    if (order.length > 16) legend.push(say("more", { n: order.length - 16 }));
    at("v-legend").replaceChildren(...legend);
    [...at("v-layers").children].forEach((button, layer) => {
      button.setAttribute("aria-pressed", layer === now.layer);
    });
    showToken(Math.min(now.token, a.tokens.length - 1));
  };

  // An answer by its question; the id of a problem says nothing to a reader.
  const name_of = (a) => [a.kind, a.question || a.id].filter(Boolean).join(" · ");

  const showAnswer = () => {
    const a = answer();
    const said = [[a.said, "verdict " + (a.verdict || "")], [name_of(a)]];
    if (a.reference !== undefined) said.push([say("reference", { n: a.reference })]);
    if (a.answer !== undefined) said.push([say("taken", { n: a.answer })]);
    if (a.left) said.push([say("left", { n: a.left })]);
    at("v-about").replaceChildren(...said.filter(([text]) => text).map(([text, look]) => make("span", look, text)));
    showTokens();
  };

  const showModel = () => {
    const m = model();
    choices(at("v-answer"), m.answers.map((a) => [name_of(a), a.said].filter(Boolean).join(" · ")), now.answer);
    at("v-layers").replaceChildren(...m.layers.map((name, layer) => {
      const button = make("button", "", name);
      button.type = "button";
      button.addEventListener("click", () => { now.layer = layer; showTokens(); });
      return button;
    }));
    showAnswer();
  };

  choices(at("v-model"), models.map((m) => m.title), 0);
  at("v-model").addEventListener("change", (event) => {
    Object.assign(now, { model: Number(event.target.value), answer: 0, layer: 0, token: 0 });
    showModel();
  });
  at("v-answer").addEventListener("change", (event) => {
    Object.assign(now, { answer: Number(event.target.value), token: 0 });
    showAnswer();
  });
  const chosen = (event) => {
    const button = event.target.closest("button.token");
    if (button && Number(button.dataset.i) !== now.token) showToken(Number(button.dataset.i));
  };
  for (const kind of ["click", "focusin", "pointerover"]) at("v-tokens").addEventListener(kind, chosen);
  at("v-tokens").addEventListener("keydown", (event) => {
    const last = answer().tokens.length - 1, layers = model().layers.length;
    const goal = { ArrowLeft: now.token - 1, ArrowRight: now.token + 1, Home: 0, End: last }[event.key];
    const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (goal === undefined && step === undefined) return;
    event.preventDefault();
    if (step) {
      now.layer = (now.layer + step + layers) % layers;
      showTokens();
    } else {
      showToken(Math.max(0, Math.min(last, goal)));
    }
    at("v-tokens").querySelector("button.on").focus();
  });
  at("v-controls").hidden = false;
  showModel();
})();
