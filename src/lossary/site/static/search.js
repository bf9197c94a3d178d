"use strict";
// The search of a static site: that of lossary.catalogue, word for word, over the index that stands above it here.

window.lossarySearch = (() => {
  const { papers, words, symptoms, stop } = window.lossaryIndex;
  const stopped = new Set(stop);
  const known = Object.assign(Object.create(null), words); // word -> paper, score, paper, score, ...
  const endings = ["isation", "ization", "ising", "izing", "ies", "ing", "ed", "es", "y", "s", "e"];

  const tokens = (text) => text.toLowerCase().match(/[a-z0-9]+/g) ?? [];

  function stem(word) {
    const ending = endings.find((end) => word.endsWith(end) && word.length - end.length >= 3);
    return ending ? word.slice(0, -ending.length) : word;
  }

  const stems = (text) => tokens(text).filter((word) => !stopped.has(word)).map(stem);

  function terms(query, typing) {
    const meant = [...new Set(stems(query))].filter((word) => word in known).map((word) => [word]);
    const last = tokens(query).at(-1);
    if (typing && last && /[a-z0-9]$/i.test(query) && !meant.some(([word]) => word === stem(last))) {
      meant.push(Object.keys(known).filter((word) => word.startsWith(last)));
    }
    return meant;
  }

  function search(query, typing = false) {
    const asked = new Set(stems(query));
    const meant = Object.keys(symptoms).filter((name) =>
      symptoms[name].some((phrase) => phrase.length && phrase.every((word) => asked.has(word))));
    const scores = papers.map((paper) => 12 * meant.filter((name) => paper.helps.includes(name)).length);
    for (const group of terms(query, typing)) {
      const best = new Map();
      for (const word of group) {
        const scored = known[word];
        for (let i = 0; i < scored.length; i += 2) {
          best.set(scored[i], Math.max(best.get(scored[i]) ?? 0, scored[i + 1]));
        }
      }
      for (const [paper, score] of best) scores[paper] += score;
    }
    const name = query.trim().toLowerCase().replaceAll("_", "-");
    papers.forEach((paper, i) => { if (paper.id === name) scores[i] += 100; });
    return papers
      .map((paper, i) => ({ ...paper, score: Math.round(scores[i] * 1000) / 1000 }))
      .filter((paper) => paper.score)
      .sort((a, b) => b.score - a.score || b.held - a.held || (a.id < b.id ? -1 : 1));
  }

  const escaped = (text) => text.replace(/[&<>"]/g, (letter) => `&#${letter.charCodeAt(0)};`);

  function answers(query, root) {
    const found = search(query, true).slice(0, 7);
    if (!found.length) return "<p>Nothing matches.</p>";
    return `<ul>${found.map((paper) => `<li><a href="${root}${paper.file}"><b>${escaped(paper.id)}</b>`
      + ` <span class="where">${escaped(paper.room)}</span> <span class="counts">${paper.counts}</span>`
      + `<span class="summary">${escaped(paper.summary)}</span></a></li>`).join("")}</ul>`;
  }

  function results(query) {
    return search(query).slice(0, 30).map((paper) => `<li><div><a href="${paper.file}">${escaped(paper.id)}</a>`
      + ` <span class="where">${escaped(paper.room)}</span><p>${escaped(paper.summary)}</p></div>`
      + `<div class="found"><span class="counts">${paper.counts}</span></div></li>`).join("");
  }

  return { search, answers, results };
})();

// The page of all papers becomes that of the answers.
{
  const list = document.getElementById("results");
  const query = new URLSearchParams(location.search).get("q") ?? "";
  if (list && query.trim()) {
    const found = window.lossarySearch.search(query).length;
    list.innerHTML = window.lossarySearch.results(query);
    document.getElementById("q").value = query;
    document.querySelector("[role=status]").textContent = `${found || "No"} paper${found === 1 ? "" : "s"} match${found === 1 ? "es" : ""}.`;
    document.title = `${query} · ${document.title}`;
  }
}
