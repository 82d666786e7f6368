"use strict";
// Sorts a table by the column whose head is clicked: up, down, then as it was. The page reads well without it.
(() => {
  const UNITS = { k: 1e3, M: 1e6, G: 1e9, B: 1e9, T: 1e12, P: 1e15, E: 1e18, min: 60, h: 3600, 分: 60, 分钟: 60, 小时: 3600 };
  // The first number of a cell with its unit; words stay words, and a dash is less than any number.
  const value = (cell) => {
    const text = cell.textContent.trim().replace(/−/g, "-");
    if (text === "–" || text === "") return -Infinity;
    const found = text.match(/^[<>]?\s*([+-]?[\d,]*\.?\d+)\s*([A-Za-z分小时钟]*)/);
    if (!found) return text;
    const unit = found[2] in UNITS ? found[2] : found[2].slice(0, 1);
    const scale = /^(tokens|points)/.test(found[2]) ? 1 : UNITS[unit] || 1;
    return Number(found[1].replace(/,/g, "")) * scale - (text[0] === "<" ? 1e-12 : 0);
  };
  const before = (one, two) => {
    if (typeof one === "number" && typeof two === "number") return one - two;
    return String(one).localeCompare(String(two), undefined, { numeric: true });
  };
  for (const table of document.querySelectorAll("main table")) {
    const body = table.tBodies[0], rows = [...body.rows], heads = [...(table.tHead?.rows[0]?.cells || [])];
    if (rows.length < 3) continue;
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const now = head.getAttribute("aria-sort");
        const next = now === "ascending" ? "descending" : now === "descending" ? null : "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        table.classList.toggle("sorted", next !== null);
        const order = [...rows];
        if (next) {
          head.setAttribute("aria-sort", next);
          const sign = next === "ascending" ? 1 : -1;
          order.sort((one, two) => sign * before(value(one.cells[column]), value(two.cells[column])));
        }
        body.append(...order);
      });
    });
  }
})();
