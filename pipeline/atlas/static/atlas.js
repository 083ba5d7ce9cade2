// Works on what the page already shows; holds no data of a run. Without it, everything but comfort is there.
"use strict";

for (const line of document.querySelectorAll(".copyable")) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    const code = line.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code); // no clipboard here: leave it selected
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  line.append(button);
}

const list = document.getElementById("map-list");
if (list) {
  const tools = document.getElementById("tools");
  const goto = document.getElementById("goto");
  const sort = document.getElementById("sort");
  const maps = () => [...list.querySelectorAll(".map")];

  const show = (map) => {
    history.replaceState(null, "", `#${map.id}`);
    map.scrollIntoView({ block: "start" });
    map.focus({ preventScroll: true });
  };
  const step = (by) => {
    const all = maps();
    const at = all.findIndex((map) => `#${map.id}` === location.hash);
    const next = all[at < 0 ? 0 : Math.min(all.length - 1, Math.max(0, at + by))];
    if (next) show(next);
  };

  tools.hidden = false;
  tools.addEventListener("submit", (event) => {
    event.preventDefault();
    const map = document.getElementById(`map-${Number(goto.value)}`);
    goto.setCustomValidity(map ? "" : "There is no map of this number");
    if (map) show(map); else goto.reportValidity();
  });
  goto.addEventListener("input", () => goto.setCustomValidity(""));
  sort.addEventListener("change", () => {
    const by = sort.value;
    const value = (map) => Number(map.dataset[by]);
    const sign = by === "number" ? 1 : -1;
    const order = (a, b) => sign * (value(a) - value(b)) || Number(a.dataset.number) - Number(b.dataset.number);
    list.append(...maps().sort(order));
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
    if (event.key === "j") step(1);
    else if (event.key === "k") step(-1);
    else if (event.key === "/") { event.preventDefault(); goto.focus(); }
  });
}
