// Answers of several models, token by token (distill/lessons/shown.py): a token is clicked, and what the model weighed,
// what the teacher would have said and which experts chose it are shown. Nothing is loaded.
(() => {
  const make = (tag, name, text) => {
    const node = document.createElement(tag);
    if (name) node.className = name;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const percent = (p) => (p >= 0.9995 ? "> 99.9 %" : p < 0.001 ? "< 0.1 %" : `${(100 * p).toFixed(1)} %`);
  const options = (title, list, said) => {
    const part = make("div", "part");
    part.append(make("h4", "", title));
    for (const [text, p] of list) {
      const row = make("div", text === said ? "option said" : "option");
      const bar = make("i");
      bar.style.width = `${100 * p}%`;
      const track = make("span", "track");
      track.append(bar);
      row.append(make("code", "", text), track, make("span", "p", percent(p)));
      part.append(row);
    }
    return part;
  };
  for (const box of document.querySelectorAll(".shown:not([data-alive])")) {
    box.dataset.alive = "yes";
    const data = JSON.parse(box.querySelector("script[type='application/json']").textContent), words = data.words;
    const players = make("div", "players"), look = make("div", "look");
    look.setAttribute("aria-live", "polite");
    const show = (model, place, button) => {
      for (const other of box.querySelectorAll(".on")) other.classList.remove("on");
      button.classList.add("on");
      const token = model.tokens[place];
      look.replaceChildren(make("h3", "", `${model.name} · ${words.token} ${place + 1}/${model.tokens.length} · ${token.t} · ${percent(token.p)}`));
      const sides = make("div", "sides");
      sides.append(options(words.own, token.own, token.t));
      if (token.teacher.length) sides.append(options(words.teacher, token.teacher, token.t));
      if (token.experts.length) {
        const part = make("div", "part");
        part.append(make("h4", "", token.dense ? words.theirs : words.experts));
        for (const [layer, chosen, gone] of token.experts) {
          const row = make("div", "row");
          row.append(make("span", "layer", layer));
          for (let e = 0; e < data.experts; e++) {
            const weight = chosen.find(([expert]) => expert === e)?.[1];
            const cell = make("span", gone.includes(e) ? "cell gone" : weight === undefined ? "cell" : "cell chosen", String(e));
            if (weight !== undefined) cell.append(make("small", "", ` ${Math.round(100 * weight)}`));
            row.append(cell);
          }
          part.append(row);
        }
        part.append(make("p", "hint", words.share));
        sides.append(part);
      }
      look.append(sides);
    };
    for (const model of data.models) {
      const card = make("section", "player"), head = make("header"), tokens = make("div", "tokens");
      head.append(make("h3", "", model.name), make("span", `verdict ${model.verdict}`, `${model.sign} ${model.word}`));
      card.append(head);
      if (model.change) card.append(make("p", "change", model.change));
      card.append(make("p", "final", model.final));
      model.tokens.forEach((token, place) => {
        const button = make("button", token.parts ? "token parts" : "token", token.t);
        button.style.setProperty("--d", (1 - token.p).toFixed(2));
        button.title = percent(token.p);
        button.addEventListener("click", () => show(model, place, button));
        tokens.append(button);
      });
      card.append(tokens);
      players.append(card);
    }
    box.querySelector(".plain").remove();
    box.append(players, make("p", "hint", words.hint), look);
    const first = data.models.flatMap((m, i) => m.tokens.map((t, place) => [i, place, t.parts])).find((x) => x[2]) ?? [0, 0];
    box.querySelectorAll(".player")[first[0]].querySelectorAll(".token")[first[1]]?.click();
  }
})();
