// Runs: drops files, watches runs. Without it forms work all the same, and a page that waits is loaded anew.
"use strict";

for (const time of document.querySelectorAll("time[data-local]")) {
  time.textContent = new Date(time.dateTime).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
}

for (const form of document.querySelectorAll("form[data-ask]")) {
  form.addEventListener("submit", (event) => { if (!confirm(form.dataset.ask)) event.preventDefault(); });
}

const drop = document.querySelector("form.drop");
if (drop) {
  const input = drop.querySelector("input[type=file]"), note = drop.querySelector("[data-note]"), first = note.textContent;
  const fits = () => {
    const file = input.files[0], most = Number(drop.dataset.most);
    const over = file && file.size > most;
    note.textContent = over ? `${file.name} is ${(file.size / 1e6).toFixed(0)} MB, more than is taken.` : first;
    note.classList.toggle("wrong", Boolean(over));
    return file && !over;
  };
  const sent = () => { note.textContent = `Uploading ${input.files[0].name} …`; };
  input.addEventListener("change", fits);
  drop.addEventListener("submit", (event) => { if (fits()) sent(); else event.preventDefault(); });
  const over = (on) => (event) => {
    if (!event.dataTransfer || !event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    drop.classList.toggle("over", on);
  };
  document.addEventListener("dragover", over(true));
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.classList.remove("over"); });
  document.addEventListener("drop", (event) => {
    over(false)(event);
    if (!event.dataTransfer || !event.dataTransfer.files.length) return;
    input.files = event.dataTransfer.files;
    drop.requestSubmit();
  });
  window.addEventListener("pageshow", () => { fits(); });
}

// A column that is picked from the list is the target; the likely ones are then not.
const other = document.querySelector("select[name=other]");
if (other) {
  const likely = [...document.querySelectorAll("input[name=target]")];
  other.addEventListener("change", () => { if (other.value) likely.forEach((each) => { each.checked = false; }); });
  likely.forEach((each) => each.addEventListener("change", () => { other.value = ""; }));
}

const live = document.querySelector("#live[data-run]");
if (live) {
  const id = live.dataset.run, said = document.getElementById("said");
  const calm = matchMedia("(prefers-reduced-motion: reduce)");
  let phase = "", over = false;

  // What stays is changed, not replaced, so that bars glide; rows glide to their new places.
  const show = (html) => {
    const next = document.createElement("div");
    next.innerHTML = html;
    const rows = new Map([...live.querySelectorAll("tr[data-key]")].map((row) => [row.dataset.key, row]));
    const places = new Map([...rows].map(([key, row]) => [key, row.getBoundingClientRect().top]));
    for (const row of next.querySelectorAll("tr[data-key]")) {
      const old = rows.get(row.dataset.key);
      if (!old) continue;
      old.className = row.className;
      const bar = old.querySelector("svg"), wanted = row.querySelector("svg");
      const same = bar.children.length === wanted.children.length;
      if (same) [...wanted.children].forEach((shape, i) => {
        for (const { name, value } of shape.attributes) bar.children[i].setAttribute(name, value);
      });
      [...row.children].forEach((cell, i) => {
        if (!(same && cell.contains(wanted))) old.children[i].replaceChildren(...cell.childNodes);
      });
      row.replaceWith(old);
    }
    live.replaceChildren(...next.childNodes);
    if (!calm.matches) for (const row of live.querySelectorAll("tr[data-key]")) {
      const by = (places.get(row.dataset.key) ?? 0) - row.getBoundingClientRect().top;
      if (by && places.has(row.dataset.key)) row.animate([{ transform: `translateY(${by}px)` }, { transform: "none" }], 350);
    }
    const now = live.querySelector(".phase b");
    if (now && now.textContent !== phase) said.textContent = phase = now.textContent;
  };
  const finish = () => { if (!over) { over = true; location.reload(); } };

  const poll = async () => {
    try {
      const answer = await fetch(`/runs/${id}/live`);
      const status = answer.headers.get("run-status");
      if (answer.status === 404 || (status && status !== "queued" && status !== "running")) return finish();
      if (answer.ok) show(await answer.text());
    } catch { /* the server is away: it goes on when it is back */ }
    setTimeout(poll, 2000);
  };
  if (!window.EventSource) poll();
  else {
    const stream = new EventSource(`/runs/${id}/events`);
    let failures = 0;
    stream.addEventListener("live", (event) => { failures = 0; show(event.data); });
    stream.addEventListener("over", () => { stream.close(); finish(); });
    stream.addEventListener("error", () => {
      if (stream.readyState !== EventSource.CLOSED && ++failures < 3) return;
      stream.close();
      poll();
    });
    addEventListener("pagehide", () => stream.close());
  }
}
