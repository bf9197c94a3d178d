"use strict";
// Equations as KaTeX sets them; without it, and where it fails, their source stays.

for (const box of document.querySelectorAll(".equation")) {
  const source = box.textContent.trim();
  try {
    katex.render(source, box, { displayMode: true });
  } catch {
    box.replaceChildren(Object.assign(document.createElement("code"), { textContent: source }));
  }
}
