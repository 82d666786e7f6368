// One listener for everything on the page that is drawn by distill/play/html.py: a token is looked at, an expert
// is dropped. `element` and `trigger` come from Gradio's HTML component.
const choose = (token) => {
  for (const other of element.querySelectorAll(".token.on")) other.classList.remove("on");
  token.classList.add("on");
  token.focus({ preventScroll: true });
  trigger("look", { model: token.dataset.model, place: Number(token.dataset.place) });
};
element.addEventListener("click", (event) => {
  const expert = event.target.closest("button.expert");
  const token = event.target.closest("button.token");
  if (expert) {
    trigger("drop", { model: expert.dataset.model, layer: expert.dataset.layer, expert: Number(expert.dataset.expert) });
  } else if (token) {
    choose(token);
    // On a narrow screen what is shown about a token lies below all answers.
    if (innerWidth < 700) document.querySelector(".look")?.scrollIntoView({ behavior: "smooth", block: "center" });
  }
});
element.addEventListener("keydown", (event) => {
  const token = event.target.closest("button.token");
  const step = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
  if (!token || !step || !token[step]) return;
  event.preventDefault();
  choose(token[step]);
});
