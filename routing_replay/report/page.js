// Reads values under the pointer. Everything is already drawn: without this script the page stands.
"use strict";

const shown = (value) => (value === null ? "no value" : String(value));

function readLines(data, share) {
  const step = data.first + share * (data.last - data.first);
  const parts = data.lines.map((line) => {
    let nearest = 0;
    line.steps.forEach((at, i) => {
      if (Math.abs(at - step) < Math.abs(line.steps[nearest] - step)) nearest = i;
    });
    return { at: line.steps[nearest], text: `${line.label}: ${shown(line.values[nearest])}` };
  });
  return `step ${parts[0].at} · ${parts.map((part) => part.text).join(" · ")}`;
}

function readGrid(data, across, down) {
  const column = Math.min(data.steps.length - 1, Math.floor(across * data.steps.length));
  const row = Math.min(data.rows.length - 1, Math.floor(down * data.rows.length));
  const value = shown(data.grid[row][column]);
  return `step ${data.steps[column]} · layer ${data.rows[row]} · ${data.label}: ${value}`;
}

for (const figure of document.querySelectorAll("figure")) {
  const source = figure.querySelector("script");
  const area = figure.querySelector(".area");
  if (!source || !area) continue;
  const data = JSON.parse(source.textContent);
  const cursor = area.querySelector(".cursor");
  const readout = figure.querySelector(".readout");
  area.addEventListener("pointermove", (event) => {
    const box = area.getBoundingClientRect();
    const across = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const down = Math.min(1, Math.max(0, (event.clientY - box.top) / box.height));
    readout.textContent = data.lines ? readLines(data, across) : readGrid(data, across, down);
    cursor.style.left = `${100 * across}%`;
    cursor.style.opacity = 1;
  });
  area.addEventListener("pointerleave", () => {
    cursor.style.opacity = 0;
  });
}
