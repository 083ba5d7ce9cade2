// Works on what the page already shows; holds no data of a run. Without it, everything but comfort is there.
"use strict";

const fromHash = () => new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : "");
const typing = (event) => event.target.closest("input:not([type=radio], [type=checkbox]), select, textarea");

// --- copying -----------------------------------------------------------------------------------------------------

async function copy(text, button, shown) {
  const said = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    if (shown) getSelection().selectAllChildren(shown); // no clipboard here: leave it selected
    button.textContent = shown ? "Selected" : "The address bar has it";
  }
  setTimeout(() => { button.textContent = said; }, 1500);
}

for (const line of document.querySelectorAll(".copyable")) {
  const button = document.createElement("button");
  const code = line.querySelector("code");
  button.type = "button";
  button.className = "copy";
  button.textContent = "Copy";
  button.addEventListener("click", () => copy(code.textContent, button, code));
  line.append(button);
}

// --- lists that can be searched, filtered, sorted, walked through and selected from ---------------------------------

class List {
  constructor(form) {
    this.form = form;
    this.list = document.getElementById(form.dataset.list);
    this.items = [...this.list.children].filter((item) => item.id);
    this.inOrder = [...this.items];
    this.words = new Map();
    this.current = document.getElementById(fromHash().get("at") || location.hash.slice(1));
    if (!this.items.includes(this.current)) this.current = null;
    this.selected = new Set((fromHash().get("selected") || "").split(" ").filter(Boolean));
    if (form.elements.only) this.addCheckboxes();
    this.restore();
    form.hidden = false;
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", () => this.apply());
    form.addEventListener("reset", () => setTimeout(() => { this.selected.clear(); this.tick(); this.apply(); }));
    form.querySelector("[data-share]")?.addEventListener("click", (event) => copy(location.href, event.target));
    this.apply();
    if (this.current) addEventListener("load", () => this.show(this.current)); // after the browser's own jump
  }

  addCheckboxes() {
    for (const item of this.items) {
      const box = document.createElement("input");
      box.type = "checkbox";
      box.className = "select";
      box.setAttribute("aria-label", "Select " + item.querySelector("a").textContent);
      box.addEventListener("change", () => this.toggle(item, box.checked));
      (item.querySelector("h3, th") || item).append(" ", box);
    }
    this.tick();
  }

  tick() {
    for (const item of this.items) {
      const box = item.querySelector(".select");
      if (box) box.checked = this.selected.has(item.id);
    }
  }

  toggle(item, wanted = !this.selected.has(item.id)) {
    if (wanted) this.selected.add(item.id); else this.selected.delete(item.id);
    this.tick();
    this.apply();
  }

  get fields() { return [...this.form.elements].filter((field) => field.name); }

  restore() {
    const known = fromHash();
    for (const field of this.fields) {
      if (!known.has(field.name)) continue;
      if (field.type === "checkbox") field.checked = known.get(field.name) === "1";
      else field.value = known.get(field.name);
    }
  }

  remember() {
    const state = fromHash(); // with what another list of the page keeps there
    for (const name of ["at", ...(this.form.elements.only ? ["selected"] : [])]) state.delete(name);
    for (const field of this.fields) {
      const value = field.type === "checkbox" ? (field.checked ? "1" : "") : field.value;
      state.delete(field.name);
      if (value && value !== field.options?.[0].value) state.set(field.name, value);
    }
    if (this.selected.size) state.set("selected", [...this.selected].join(" "));
    const at = this.current?.id;
    if ([...state].length && at) state.set("at", at);
    const hash = [...state].length ? String(state) : at || "";
    if (hash !== location.hash.slice(1)) history.replaceState(null, "", hash ? "#" + hash : location.pathname);
  }

  // A number is meant whole, any other word may be a part of one.
  holds(item, word) {
    if (!this.words.has(item)) this.words.set(item, ` ${item.dataset.text ?? item.textContent} `.toLowerCase());
    return this.words.get(item).includes(/^\d+$/.test(word) ? ` ${word} ` : word);
  }

  fits(item) {
    if (this.form.elements.only?.checked && !this.selected.has(item.id)) return false;
    return this.fields.every((field) => {
      const { match, of } = field.dataset;
      if (!match || field.value === "") return true;
      const value = item.dataset[of];
      if (match === "text") return field.value.toLowerCase().split(/\s+/).every((word) => this.holds(item, word));
      if (match === "has") return value.split("\u001f").includes(field.value);
      if (match === "is") return value === field.value;
      if (value === "") return false;
      return match === "least" ? Number(value) >= Number(field.value) : Number(value) <= Number(field.value);
    });
  }

  apply() {
    let found = 0;
    for (const item of this.items) {
      item.hidden = !this.fits(item);
      found += !item.hidden;
    }
    const [by, way] = (this.form.querySelector("[data-sort]")?.value || "").split(":");
    if (by && this.sorted !== by + way) {
      const sign = way === "up" ? 1 : -1;
      const value = (item) => item.dataset[by] === "" ? -sign * Infinity : Number(item.dataset[by]);
      this.inOrder = [...this.items].sort((a, b) => (value(a) === value(b) ? 0 : sign * (value(a) - value(b))));
      if (this.sorted || by !== Object.keys(this.items[0]?.dataset || {})[0]) this.list.append(...this.inOrder);
      this.sorted = by + way;
    }
    const output = this.form.querySelector(".found");
    if (output) output.textContent = `${found} of ${this.items.length} ${output.dataset.word}`;
    this.remember();
  }

  show(item) {
    this.current = item;
    item.scrollIntoView({ block: "center" });
    (item.querySelector("a") || item).focus({ preventScroll: true });
    this.remember();
  }

  step(by) {
    const shown = this.inOrder.filter((item) => !item.hidden);
    const focused = document.activeElement?.closest?.("[id]");
    const at = shown.indexOf(shown.includes(focused) ? focused : this.current);
    const next = shown[at < 0 ? 0 : Math.min(shown.length - 1, Math.max(0, at + by))];
    if (next) this.show(next);
  }
}

const lists = [...document.querySelectorAll("form[data-list]")].map((form) => new List(form));
addEventListener("hashchange", () => {
  const item = document.getElementById(location.hash.slice(1));
  for (const list of lists) if (list.items.includes(item)) list.show(item);
});

// --- one scale for all projections of a map, or each its own ---------------------------------------------------------

for (const form of document.querySelectorAll("form[data-scale]")) {
  const apply = () => {
    const shared = form.elements.scale.value === "shared";
    for (const tile of document.querySelectorAll("[data-contrast]")) {
      // A projection's zero is mid-grey, about which CSS contrast works.
      tile.style.filter = shared ? `contrast(${tile.dataset.contrast})` : "";
    }
  };
  form.hidden = false;
  if (fromHash().get("scale") === "shared") form.elements.scale.value = "shared";
  form.addEventListener("change", () => {
    history.replaceState(null, "", form.elements.scale.value === "shared" ? "#scale=shared" : location.pathname);
    apply();
  });
  apply();
}

// --- an occlusion map over its image ------------------------------------------------------------------------------

class Viewer {
  constructor(section) {
    const { rows, cols, stride, height, width, start } = section.dataset;
    Object.assign(this, { section, rows: +rows, cols: +cols, stride: +stride, height: +height, width: +width });
    this.stage = section.querySelector(".stage");
    this.svg = this.stage.querySelector("svg");
    this.form = section.querySelector("form");
    this.values = Object.fromEntries(["activation", "probability", "class"].map((n) => [n, section.dataset[n].split(" ")]));
    this.names = new Map([...section.querySelectorAll(".names li")].map((li) => [li.dataset.number, li.textContent]));
    [this.row, this.col] = start.split(" ").map(Number);
    this.form.hidden = false;
    section.querySelector(".readout").hidden = false;
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("input", () => this.draw());
    this.stage.addEventListener("pointermove", (event) => this.follow(event));
    this.stage.addEventListener("pointerdown", (event) => this.follow(event));
    this.stage.addEventListener("keydown", (event) => this.press(event));
    this.draw();
    this.read();
  }

  draw() {
    for (const image of this.svg.querySelectorAll(".overlay")) {
      image.setAttribute("visibility", image.dataset.map === this.form.elements.map.value ? "visible" : "hidden");
      image.setAttribute("opacity", this.form.elements.opacity.value / 100);
    }
  }

  follow(event) {
    const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(this.svg.getScreenCTM().inverse());
    this.move(Math.round((place.y - this.height / 2) / this.stride), Math.round((place.x - this.width / 2) / this.stride));
  }

  press(event) {
    const by = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!by || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    this.move(this.row + by[0], this.col + by[1]);
  }

  move(row, col) {
    this.row = Math.min(this.rows - 1, Math.max(0, row));
    this.col = Math.min(this.cols - 1, Math.max(0, col));
    for (const square of this.svg.querySelectorAll("[data-square]")) {
      square.setAttribute("x", this.col * this.stride);
      square.setAttribute("y", this.row * this.stride);
    }
    this.read();
  }

  read() {
    const at = this.row * this.cols + this.col;
    const say = (name, value) => { this.section.querySelector(`[data-read=${name}]`).textContent = value; };
    say("row", this.row);
    say("col", this.col);
    say("probability", `${(100 * this.values.probability[at]).toFixed(1)}\u00a0%`);
    say("class", this.names.get(this.values.class[at]));
    say("activation", Number(this.values.activation[at]).toPrecision(3));
  }
}

for (const section of document.querySelectorAll("[data-viewer]")) new Viewer(section);

// --- keys ----------------------------------------------------------------------------------------------------------

document.addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey) return;
  const search = document.querySelector("input[type=search]");
  if (event.key === "Escape" && event.target === search) search.blur();
  if (typing(event) || (event.target.type === "radio" && event.key.startsWith("Arrow"))) return;
  if (event.target.closest(".scroll") === event.target && event.key.startsWith("Arrow")) return; // scrolls it
  const by = { j: 1, ArrowRight: 1, k: -1, ArrowLeft: -1 }[event.key];
  const [list] = lists;
  if (event.key === "/") {
    event.preventDefault();
    if (search) search.focus(); else document.querySelector("[data-find]")?.click();
  } else if (event.key === "u") document.querySelector("a[rel=up]")?.click();
  else if (event.key === "x" && list?.current) list.toggle(list.current);
  else if (by && list) list.step(by);
  else if (by) document.querySelector(by > 0 ? "a[rel=next]" : "a[rel=prev]")?.click();
});
