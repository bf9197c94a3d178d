"use strict";
// Answers while one types, copy buttons, and tables that sort and filter. Every page works without it.

for (const form of document.querySelectorAll(".search")) searches(form);
for (const box of document.querySelectorAll(".copy")) copies(box);
for (const form of document.querySelectorAll(".filters")) filters(form);

function searches(form) {
  const input = form.elements.q;
  const list = form.querySelector(".answers");
  let asked = 0;
  const links = () => [...list.querySelectorAll("a")];
  const close = () => { list.hidden = true; };

  async function answer() {
    const query = input.value.trim();
    const own = ++asked;
    if (!query) return close();
    const html = form.dataset.root === undefined
      ? await fetched(`${form.dataset.answers}?q=${encodeURIComponent(input.value)}`)
      : await (await staticSearch(form)).answers(input.value, form.dataset.root);
    if (own !== asked || html === null) return;
    list.innerHTML = html;
    list.dataset.query = query;
    list.hidden = document.activeElement !== input && !list.contains(document.activeElement);
  }

  function move(step) {
    const all = links();
    const next = all.indexOf(document.activeElement) + step;
    if (next < 0 || !all.length) input.focus();
    else all[Math.min(next, all.length - 1)].focus();
  }

  input.addEventListener("input", answer);
  input.addEventListener("focus", answer);
  form.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !list.hidden) {
      event.preventDefault(); // which would also empty the field
      input.focus();
      close();
      ++asked; // an answer that is still on its way comes too late
    }
    if (list.hidden || !["ArrowDown", "ArrowUp"].includes(event.key)) return;
    event.preventDefault();
    move(event.key === "ArrowDown" ? 1 : -1);
  });
  form.addEventListener("focusout", (event) => { if (!form.contains(event.relatedTarget)) close(); });
  list.addEventListener("mousedown", (event) => event.preventDefault()); // a click on a link must not close the list first
}

async function fetched(address) {
  try {
    const answer = await fetch(address);
    return answer.ok ? await answer.text() : null;
  } catch {
    return null; // the server is gone; the form still works once it is back
  }
}

let loading;
function staticSearch(form) {
  loading ??= new Promise((resolve) => {
    const script = document.createElement("script");
    script.src = form.dataset.answers;
    script.onload = () => resolve(window.lossarySearch);
    document.head.append(script);
  });
  return loading;
}

function copies(box) {
  const button = box.querySelector("[data-copy]");
  const code = box.querySelector("code");
  if (!button || !navigator.clipboard) return;
  button.hidden = false;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(code.textContent);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}

function filters(form) {
  const table = document.getElementById(form.dataset.for);
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const output = form.querySelector("output");
  form.hidden = false;

  function fits(row) {
    const { role, outcome, cost, size } = form.elements;
    const outcomes = row.dataset.outcome.split("|");
    return (!role.value || row.dataset.role.split(" ").includes(role.value))
      && (!outcome.value || (outcome.value === "all" ? outcomes.join() === "holds" : outcomes.includes(outcome.value)))
      && (!cost.value || (row.dataset.cost !== "" && +row.dataset.cost <= +cost.value))
      && (!size.value || +row.dataset.size <= +size.value);
  }

  function show() {
    for (const row of rows) row.hidden = !fits(row);
    const left = rows.filter((row) => !row.hidden).length;
    output.textContent = left === rows.length ? "" : `${left} of ${rows.length}`;
  }

  function sort(head, key) {
    const descending = head.getAttribute("aria-sort") === "ascending" || (!head.hasAttribute("aria-sort") && key === "held");
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const words = key === "name" || key === "role";
    const compare = (a, b) => words
      ? a.dataset[key].localeCompare(b.dataset[key])
      : (a.dataset[key] === "") - (b.dataset[key] === "") || a.dataset[key] - b.dataset[key];
    rows.sort((a, b) => (descending ? -1 : 1) * compare(a, b));
    body.append(...rows);
  }

  for (const head of table.tHead.rows[0].cells) {
    if (!head.dataset.sort) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    button.addEventListener("click", () => sort(head, head.dataset.sort));
    head.replaceChildren(button);
  }
  form.addEventListener("change", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  show(); // a reload may have kept what was chosen
}
