"use strict";
// All text of jobs is put in as text nodes, never as markup.

const PAGE_ROWS = 20;
const PAGE_ERRORS = 50;
const CACHED_CHUNKS = 60;
const DIFF_CELLS = 400000; // words × words; beyond it, all that is not a common start or end is marked
const CONTROL = /([\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff])/;
const WORDS = /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Hangul}]|\s+|[\p{L}\p{N}\p{M}_]+|./gsu;

const $ = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Text whose control and direction characters are spelt out, with what is searched for marked. */
function visible(text, sought = "") {
  const nodes = document.createDocumentFragment();
  text.split(CONTROL).forEach((part, i) => {
    if (i % 2) {
      const code = part.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      nodes.append(make("span", { class: "control" }, `U+${code}`));
    } else if (part) nodes.append(...marked(part, sought));
  });
  return nodes;
}

function marked(text, sought) {
  const lower = sought ? text.toLowerCase() : "";
  if (!sought || lower.length !== text.length || !lower.includes(sought)) return [text];
  const nodes = [];
  let from = 0;
  for (let at = lower.indexOf(sought); at >= 0; at = lower.indexOf(sought, from)) {
    nodes.push(text.slice(from, at), make("mark", {}, text.slice(at, at + sought.length)));
    from = at + sought.length;
  }
  nodes.push(text.slice(from));
  return nodes;
}

async function unpack(id) {
  const bytes = Uint8Array.from(atob($(id).textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

// ---- data

let index; // {jobs, chunk_rows, ids, sets, samples, numbers, disagreement, length, flags, errors}
const chunks = new Map(); // in the order of use

async function promptAt(number) {
  const place = Math.floor(number / index.chunk_rows);
  const chunk = chunks.get(place) ?? unpack(`chunk-${place}`);
  chunks.delete(place);
  chunks.set(place, chunk);
  if (chunks.size > CACHED_CHUNKS) chunks.delete(chunks.keys().next().value);
  return (await chunk)[number % index.chunk_rows];
}

const HAS_ERROR = 1;
const DIFFERS = 2;

// ---- side by side

const view = { numbers: [], page: 0, here: -1, hidden: new Set(), against: null, sought: "", run: 0 };

async function search() {
  const run = ++view.run;
  const filter = $("filter").value;
  const keep = {
    all: () => true,
    differ: (i) => index.flags[i] & DIFFERS,
    same: (i) => !(index.flags[i] & (DIFFERS | HAS_ERROR)),
    errors: (i) => index.flags[i] & HAS_ERROR,
  }[filter];
  let numbers = index.ids.map((_, i) => i).filter(keep);
  view.sought = $("search").value.trim().toLowerCase();
  if (view.sought) {
    const found = [];
    for (const number of numbers) {
      if (number % 1000 === 0) $("found").textContent = `Searching … ${number.toLocaleString("en")}`;
      if (contains(await promptAt(number), index.ids[number], view.sought)) found.push(number);
      if (run !== view.run) return; // a later search has begun
    }
    numbers = found;
  }
  const by = { disagreement: index.disagreement, length: index.length }[$("sort").value];
  if (by) numbers.sort((a, b) => by[b] - by[a] || a - b);
  view.numbers = numbers;
  view.page = 0;
  view.here = -1;
  await show();
}

function contains(prompt, id, sought) {
  return (
    id.toLowerCase().includes(sought) ||
    asText(prompt.asked).toLowerCase().includes(sought) ||
    prompt.answers.some((a) => a && (a.error ?? a.text).toLowerCase().includes(sought))
  );
}

const asText = (asked) =>
  typeof asked === "string" ? asked : (asked ?? []).map((m) => m.content).join("\n");

async function show() {
  const first = view.page * PAGE_ROWS;
  const numbers = view.numbers.slice(first, first + PAGE_ROWS);
  const prompts = await Promise.all(numbers.map(promptAt));
  const total = view.numbers.length;
  $("found").textContent = `${total.toLocaleString("en")} of ${index.ids.length.toLocaleString("en")} prompts`;
  $("rows").replaceChildren(...numbers.map((number, i) => row(number, prompts[i])));
  if (!total) $("rows").append(make("p", { class: "empty" }, "No prompt matches."));
  for (const id of ["pages", "pages-below"]) pager($(id), view, total, PAGE_ROWS, show);
}

function pager(place, state, total, size, redraw) {
  const last = Math.max(0, Math.ceil(total / size) - 1);
  const go = (by) => () => {
    state.page = Math.min(last, Math.max(0, state.page + by));
    state.here = -1;
    return redraw();
  };
  const button = (text, label, by, off) => {
    const made = make("button", { type: "button", "aria-label": label, onclick: go(by) }, text);
    made.disabled = off;
    return made;
  };
  place.replaceChildren(
    button("←", "Previous page", -1, state.page === 0),
    `${state.page + 1} / ${last + 1}`,
    button("→", "Next page", 1, state.page === last),
  );
}

function address(number) {
  const parts = [`row=${encodeURIComponent(index.ids[number])}`];
  if (index.samples[number]) parts.push(`sample=${index.samples[number]}`);
  if (new Set(index.sets).size > 1) parts.push(`set=${encodeURIComponent(index.sets[number])}`);
  return `#${parts.join("&")}`;
}

function row(number, prompt) {
  const several = new Set(index.sets).size > 1;
  const share = index.disagreement[number];
  const facts = [
    several ? index.sets[number] : null,
    index.samples[number] ? `sample ${index.samples[number]}` : null,
    index.flags[number] & DIFFERS ? `${(100 * share).toFixed(0)} % disagreement` : null,
    prompt.reference === null ? null : `reference: ${[prompt.reference].flat().join(" or ")}`,
  ].filter(Boolean);
  return make(
    "article",
    { class: "row", tabindex: "-1", "data-number": number },
    make(
      "header",
      {},
      make("h3", {}, make("a", { href: address(number) }, visible(index.ids[number], view.sought))),
      make("span", { class: "muted" }, visible(facts.join(" · "))),
      make("button", { type: "button", class: "print", onclick: printAlone }, "Print"),
    ),
    asked(prompt.asked),
    make("div", { class: "answers" }, ...answers(prompt)),
  );
}

function asked(value) {
  const messages = Array.isArray(value) ? value : [{ role: "", content: value ?? "(the line could not be read)" }];
  const parts = messages.flatMap((m) => [
    m.role ? make("span", { class: "role" }, visible(String(m.role))) : null,
    make("div", { dir: "auto" }, visible(String(m.content), view.sought)),
  ]);
  return make("div", { class: "asked text" }, ...parts.filter(Boolean));
}

/** Print the prompt of a button alone, on one sheet. */
function printAlone(event) {
  const alone = event.target.closest(".row");
  alone.classList.add("alone");
  fitSheet(alone);
  window.print();
  alone.classList.remove("alone");
  alone.style.zoom = "";
}

/** Make a row smaller until it fits a sheet, of A4's or Letter's shorter sides; the browser prints 96 dots an inch. */
function fitSheet(alone) {
  const [width, height] = [680, 900];
  const copy = document.body.appendChild(alone.cloneNode(true));
  copy.style.cssText = "position: absolute; visibility: hidden; font-size: 10pt";
  copy.querySelectorAll(".text").forEach((text) => (text.style.maxHeight = "none"));
  let zoom = 1;
  do {
    copy.style.width = `${width / zoom}px`;
    if (copy.offsetHeight * zoom <= height) break;
    zoom -= 0.04;
  } while (zoom > 0.2);
  copy.remove();
  alone.style.zoom = zoom;
}

/** The number of the job that a job is compared with: the one chosen for all, else its own baseline. */
const baseOf = (job) => view.against ?? index.jobs[job].baseline;

/** A card for each different answer, with the jobs that gave it; a baseline's first. */
function answers(prompt) {
  const groups = new Map();
  const silent = [];
  index.jobs.forEach((job, i) => {
    const answer = prompt.answers[i];
    if (view.hidden.has(i)) return;
    if (!answer) return silent.push(job.label);
    const key = JSON.stringify([answer.text, answer.error, answer.thinking, answer.end, baseOf(i)]);
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(i);
  });
  const isBase = (jobs) => jobs.some((i) => baseOf(i) === i);
  const cards = [...groups.values()]
    .sort((a, b) => isBase(b) - isBase(a))
    .map((jobs) => card(prompt, jobs, isBase(jobs)));
  if (silent.length) cards.push(make("p", { class: "muted silent" }, visible(`No answer by ${silent.join(", ")}`)));
  return cards;
}

function card(prompt, jobs, isBase) {
  const answer = prompt.answers[jobs[0]];
  const names = jobs.map((i) => visible(index.jobs[i].label));
  const title = make("h4", {}, ...names.map((name) => make("span", {}, name)));
  if (isBase) title.append(make("span", { class: "tag" }, "baseline"));
  if (answer.error !== null) {
    return make("div", { class: "answer wrong" }, title, make("div", { class: "text" }, visible(answer.error, view.sought)));
  }
  const other = baseOf(jobs[0]);
  const base = other !== null && !isBase ? prompt.answers[other] : null;
  const text = make("div", { class: "text", dir: "auto", tabindex: answer.text.length > 900 ? "0" : "-1" });
  if (base && base.error === null) text.append(...difference(base.text, answer.text));
  else text.append(visible(answer.text, view.sought));
  const agreement = other === index.jobs[jobs[0]].baseline ? prompt.agreement[jobs[0]] : null;
  const facts = [
    `${answer.tokens} tokens`,
    answer.end,
    base && agreement !== null ? `${(100 * agreement).toFixed(0)} % as the baseline` : null,
  ];
  const thinking = answer.thinking
    ? make("details", { class: "thinking" }, make("summary", {}, "Thinking"), make("div", { class: "text" }, visible(answer.thinking)))
    : null;
  return make("div", { class: isBase ? "answer base" : "answer" }, title, thinking, text,
    make("p", { class: "facts" }, facts.filter(Boolean).join(" · ")));
}

/** The second text: words that the first has not are inserted, words that only the first has are struck out. */
function difference(first, second) {
  const a = first.match(WORDS) ?? [];
  const b = second.match(WORDS) ?? [];
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start++;
  let end = 0;
  while (end < a.length - start && end < b.length - start && a.at(-1 - end) === b.at(-1 - end)) end++;
  const nodes = [visible(b.slice(0, start).join(""), view.sought)];
  for (const [removed, added, kept] of changes(a.slice(start, a.length - end), b.slice(start, b.length - end))) {
    if (removed) nodes.push(make("del", {}, visible(removed)));
    if (added) nodes.push(make("ins", {}, visible(added, view.sought)));
    nodes.push(visible(kept, view.sought));
  }
  nodes.push(visible(b.slice(b.length - end).join(""), view.sought));
  return nodes;
}

/** The way from a to b: [what only a has, what only b has, what both have after that], again and again. */
function changes(a, b) {
  if (a.length * b.length > DIFF_CELLS) return [[a.join(""), b.join(""), ""]];
  const width = b.length + 1;
  const longest = longestCommon(a, b, width);
  const found = [["", "", ""]];
  let blanks = ""; // between two changes they belong to both, so that a sentence is one change and not ten
  const change = (place, word) => {
    if (found.at(-1)[2]) found.push(["", "", ""]);
    const last = found.at(-1);
    if (last[0] || last[1]) [last[0], last[1]] = [last[0] + blanks, last[1] + blanks];
    else if (blanks) {
      last[2] = blanks;
      found.push(["", "", ""]);
    }
    blanks = "";
    found.at(-1)[place] += word;
  };
  for (let i = 0, j = 0; i < a.length || j < b.length; ) {
    if (i < a.length && j < b.length && a[i] === b[j]) {
      if (/^\s+$/.test(a[i])) blanks += a[i];
      else {
        found.at(-1)[2] += blanks + a[i];
        blanks = "";
      }
      i++;
      j++;
    } else if (j >= b.length || (i < a.length && longest[(i + 1) * width + j] >= longest[i * width + j + 1])) {
      change(0, a[i++]);
    } else change(1, b[j++]);
  }
  found.at(-1)[2] += blanks;
  return found;
}

/** For each pair of places, the length of the longest common subsequence of what follows them. */
function longestCommon(a, b, width) {
  const longest = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      longest[i * width + j] =
        a[i] === b[j]
          ? longest[(i + 1) * width + j + 1] + 1
          : Math.max(longest[(i + 1) * width + j], longest[i * width + j + 1]);
    }
  }
  return longest;
}

function focusRow(place) {
  const rows = [...document.querySelectorAll(".row")];
  if (!rows.length) return;
  view.here = Math.min(rows.length - 1, Math.max(0, place));
  rows.forEach((node, i) => node.classList.toggle("here", i === view.here));
  rows[view.here].focus({ preventScroll: true });
  rows[view.here].scrollIntoView({ block: "start" });
}

async function followLink() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  if (!wanted.has("row")) return;
  const number = index.ids.findIndex(
    (id, i) =>
      id === wanted.get("row") &&
      index.samples[i] === Number(wanted.get("sample") ?? 0) &&
      (!wanted.has("set") || index.sets[i] === wanted.get("set")),
  );
  if (number < 0) return;
  if (!view.numbers.includes(number)) {
    $("search").value = "";
    $("filter").value = "all";
    await search();
  }
  const place = view.numbers.indexOf(number);
  view.page = Math.floor(place / PAGE_ROWS);
  await show();
  focusRow(place % PAGE_ROWS);
}

// ---- errors

const errors = { page: 0 };

function showErrors() {
  if (!$("error-rows")) return;
  const first = errors.page * PAGE_ERRORS;
  $("error-rows").replaceChildren(
    ...index.errors.slice(first, first + PAGE_ERRORS).map(([number, job, text]) =>
      make("tr", {},
        make("td", {}, visible(index.jobs[job].label)),
        make("td", {}, make("a", { href: address(number) }, visible(index.ids[number]))),
        make("td", {}, make("div", { class: "text" }, visible(text))),
      ),
    ),
  );
  pager($("error-pages"), errors, index.errors.length, PAGE_ERRORS, showErrors);
}

// ---- the summary table

function sortTable(button) {
  const header = button.closest("th");
  const column = button.dataset.column;
  const body = button.closest("table").tBodies[0];
  const value = (line) => JSON.parse(line.dataset.values)[column] ?? null;
  const falling = header.getAttribute("aria-sort") === "ascending";
  const lines = [...body.rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === null || y === null) return (x === null) - (y === null); // what is missing comes last
    const order = typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y;
    return falling ? -order : order;
  });
  for (const other of header.parentNode.children) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", falling ? "descending" : "ascending");
  body.append(...lines);
}

// ---- light and dark, keys

function switchTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
}

async function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape" && event.target === $("search")) $("search").blur();
  if (event.target.matches("input[type=search], select, textarea")) return;
  const page = async (by) => {
    const last = Math.ceil(view.numbers.length / PAGE_ROWS) - 1;
    if (view.page + by < 0 || view.page + by > last) return;
    view.page += by;
    await show();
    focusRow(0);
  };
  const act = {
    "/": () => $("search").focus(),
    j: () => focusRow(view.here + 1),
    k: () => focusRow(view.here - 1),
    n: () => page(1),
    p: () => page(-1),
    d: switchTheme,
  }[event.key];
  if (!act) return;
  event.preventDefault();
  await act();
}

function later(act, milliseconds) {
  let timer;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(act, milliseconds);
  };
}

async function start() {
  $("theme").addEventListener("click", switchTheme);
  for (const button of document.querySelectorAll("#summary thead button")) {
    button.addEventListener("click", () => sortTable(button));
  }
  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", async () => {
      const range = document.createRange();
      range.selectNodeContents(button.previousElementSibling);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      button.textContent = document.execCommand("copy") ? "Copied" : "Selected";
    });
  }
  index = await unpack("index");
  index.jobs.forEach((job, i) => {
    const box = make("input", { type: "checkbox" });
    box.checked = true;
    box.addEventListener("change", () => {
      view.hidden[box.checked ? "delete" : "add"](i);
      show();
    });
    $("shown").append(make("label", {}, box, visible(job.label)));
    $("against").append(make("option", { value: i }, visible(job.label)));
  });
  document.querySelector(".tools").addEventListener("submit", (event) => event.preventDefault());
  $("search").addEventListener("input", later(search, 250));
  $("filter").addEventListener("change", search);
  $("sort").addEventListener("change", search);
  $("against").addEventListener("change", () => {
    view.against = $("against").value === "" ? null : Number($("against").value);
    show();
  });
  addEventListener("keydown", onKey);
  addEventListener("hashchange", followLink);
  await search();
  showErrors();
  await followLink();
  document.documentElement.dataset.ready = "true";
}

start();
