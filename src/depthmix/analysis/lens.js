// Draws the lens page from the data beside it. Texts of models reach the page by `textContent` alone.
"use strict";

const { texts, passages } = JSON.parse(document.getElementById("data").textContent);
let { lenses } = passages[0]; // of the text that is shown
let tokens = [];
const WINDOW = 48; // columns of a heat map at a time
const byId = (id) => document.getElementById(id);

// ---- colours: from the page's own to its ink, so that lightness alone says the same ------------

const LIGHT = ["#fbfaf4", "#e6f0c8", "#b5dcbd", "#74c0be", "#3f9cbb", "#2a6dab", "#213f88"];
const DARK = ["#1d232d", "#214063", "#2a6288", "#3d8a97", "#6bb398", "#b1d58e", "#f5eca0"];
const SIGNED = ["#1d3f86", "#5a76ae", "#9fabc4", "#c4c4be", "#dccf8f", "#f0de76", "#fff3a8"];
const night = matchMedia("(prefers-color-scheme: dark)");

const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

function blend(stops, share) {
  const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const lower = Math.min(Math.floor(place), stops.length - 2);
  const [from, to] = [channels(stops[lower]), channels(stops[lower + 1])];
  return from.map((channel, k) => channel + (place - lower) * (to[k] - channel));
}

function paint(element, scale, value) {
  if (value === null) {
    element.style.background = element.style.color = "";
    return;
  }
  const color = blend(scale.stops, scale.share(value));
  const [r, g, b] = color.map((c) => (c / 255 <= 0.04045 ? c / 3294.6 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  const luminance = 0.2126 * r + 0.7152 * g + 0.0722 * b;
  element.style.background = `rgb(${color.map(Math.round).join(" ")})`;
  element.style.color = luminance > 0.179 ? "#000000" : "#ffffff"; // whichever has more contrast
}

function makeScale(low, high, { signed = false, logarithmic = false } = {}) {
  const at = logarithmic ? Math.log : (value) => value;
  const span = at(high) - at(low) || 1;
  const stops = signed ? SIGNED : night.matches ? DARK : LIGHT;
  return { low, high, stops, share: (value) => (at(value) - at(low)) / span };
}

function drawLegend(box, scale, show, unit = "") {
  const bar = make("i");
  const colors = [0, 1, 2, 3, 4, 5, 6].map((k) => `rgb(${blend(scale.stops, k / 6).map(Math.round).join(" ")})`);
  bar.style.background = `linear-gradient(to right, ${colors.join(", ")})`;
  box.replaceChildren(make("span", "", show(scale.low)), bar, make("span", "", show(scale.high) + unit));
}

// ---- text --------------------------------------------------------------------------------------

function make(name, className = "", text = "") {
  const element = document.createElement(name);
  element.className = className;
  element.textContent = text;
  return element;
}

const UNSEEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]|(?! )\p{Zs}/u;
const MARKS = { "\n": "↵", "\t": "⇥" };
const PARTS = /(?:\\x[0-9a-f]{2})+|./gsu; // parts of a character that other tokens complete, as `\xf0`

// Write a token so that nothing of it is hidden or moves its neighbours.
function write(element, text, { dots = true } = {}) {
  element.textContent = "";
  let run = /^\p{M}/u.test(text) ? "◌" : "";
  const flush = () => {
    if (run) element.append(document.createTextNode(run));
    run = "";
  };
  for (const [character] of text.matchAll(PARTS)) {
    if (character === " " && dots) {
      flush();
      element.append(make("span", "space", "·"));
    } else if (character.startsWith("\\x") && character.length > 2) {
      flush();
      element.append(make("span", "code", character.replaceAll("\\x", " ").trim().toUpperCase()));
    } else if (UNSEEN.test(character)) {
      flush();
      const number = character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      const mark = MARKS[character];
      element.append(make("span", mark ? "space" : "code", mark ?? `U+${number}`));
    } else {
      run += character;
    }
  }
  flush();
  return element;
}

const number = (value, digits = 2) => value.toFixed(digits).replace(/^-0\.?0*$/, "0").replace("-", "−");
const signed = (value, digits = 2) => (value > 0 ? "+" : "") + number(value, digits);
const percent = (share) =>
  share < 0.001 ? "<0.1 %" : `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;

// ---- what is measured; token i is predicted at position i − 1 ----------------------------------

const entry = (list, i) => list?.[i - 1] ?? null;
const lateOf = (lens) => lens.readouts.filter((readout) => readout.jsd !== null);

function disagreement(lens, readout, i) {
  if (readout.jsd !== null) return entry(readout.jsd, i);
  const late = readout.ensemble ? lateOf(lens) : [];
  if (!late.length || i < 1) return null;
  return late.reduce((sum, other) => sum + other.jsd[i - 1], 0) / late.length;
}

const QUANTITIES = {
  loss: { name: "loss", unit: " nats", of: (lens, readout, i) => entry(readout.loss, i) },
  entropy: { name: "entropy of the prediction", unit: " nats", of: (lens, readout, i) => entry(readout.entropy, i) },
  jsd: { name: "JS divergence from the ensemble", unit: " nats", of: disagreement },
  depth: { name: "mean depth", unit: " layers", routed: true, of: (lens, _, i) => entry(lens.routing?.depth, i) },
  routing: { name: "routing entropy", unit: " nats", routed: true, of: (lens, _, i) => entry(lens.routing?.entropy, i) },
};
const SHADES = {
  probability: { name: "probability of the guess", show: (share) => `${100 * share} %`, of: (readout, i) => entry(readout.p, i)?.[0] ?? null },
  entropy: { name: "entropy of the prediction", unit: " nats", show: number, of: (readout, i) => entry(readout.entropy, i) },
  rank: { name: "rank of the true token", show: (rank) => rank.toLocaleString("en"), of: (readout, i) => entry(readout.rank, i) },
  kl: { name: "KL to the final layer", unit: " nats", show: number, of: (readout, i) => entry(readout.kl, i) },
};

const state = { pinned: 1, hovered: null, start: 1 };
const current = () => state.hovered ?? state.pinned;
const isTrue = (i, text) => i < tokens.length && texts[text] === tokens[i];

// ---- the text ----------------------------------------------------------------------------------

const chosen = (select) => {
  const [lens, readout] = select.value.split(":").map(Number);
  return [lenses[lens], lenses[lens].readouts[readout]];
};

function fillMenus() {
  passages.forEach(({ title }, p) => {
    const option = make("option", "", title);
    option.value = p;
    byId("passage").append(option);
  });
  byId("passage").parentElement.hidden = passages.length < 2;
  const routed = lenses.some((lens) => lens.routing);
  for (const [key, { name, routed: needsRouter }] of Object.entries(QUANTITIES)) {
    const option = make("option", "", name);
    option.value = key;
    option.disabled = !routed && (needsRouter || key === "jsd");
    byId("quantity").append(option);
  }
  for (const [key, { name }] of Object.entries(SHADES)) {
    const option = make("option", "", name);
    option.value = key;
    byId("shade").append(option);
  }
  const nothing = make("option", "", "nothing");
  nothing.value = "";
  byId("baseline").append(nothing);
  for (const select of [byId("subject"), byId("baseline")]) {
    lenses.forEach((lens, l) => {
      const group = make("optgroup");
      group.label = lens.model;
      [...lens.readouts.keys()].reverse().forEach((r) => {
        const { name } = lens.readouts[r];
        const option = make("option", "", lenses.length > 1 ? `${name} · ${lens.model}` : name);
        option.value = `${l}:${r}`;
        group.append(option);
      });
      select.append(group);
    });
  }
  byId("subject").value = `0:${lenses[0].readouts.length - 1}`;
}

function drawTokens() {
  const spans = [...tokens.keys(), tokens.length].map((i) => {
    const isNext = i === tokens.length;
    const span = isNext ? make("span", "token next", "next") : write(make("span", "token"), tokens[i], { dots: false });
    if (i === 0) span.classList.add("unread");
    span.dataset.i = i;
    span.setAttribute("role", "option");
    span.tabIndex = -1;
    return span;
  });
  byId("tokens").replaceChildren(
    ...spans.flatMap((span, i) => (/\n$/.test(tokens[i] ?? "") ? [span, make("br")] : [span])),
  );
}

// What the menus ask for, of one token: the value of one read-out, that of another, the difference.
function asked(i) {
  const quantity = QUANTITIES[byId("quantity").value];
  const own = quantity.of(...chosen(byId("subject")), i);
  const other = byId("baseline").value ? quantity.of(...chosen(byId("baseline")), i) : undefined;
  return { own, other, value: own === null || other === null ? null : own - (other ?? 0) };
}

function colorTokens() {
  const quantity = QUANTITIES[byId("quantity").value];
  const baseline = byId("baseline").value;
  const spans = [...byId("tokens").querySelectorAll(".token")];
  const values = spans.map((_, i) => asked(i).value);
  const known = values.filter((v) => v !== null);
  const show = baseline ? signed : number;
  let scale = null;
  if (baseline) {
    const reach = known.reduce((most, v) => Math.max(most, Math.abs(v)), 0) || 1;
    scale = makeScale(-reach, reach, { signed: true });
  } else if (known.length) {
    const most = known.reduce((a, b) => Math.max(a, b));
    scale = makeScale(quantity === QUANTITIES.depth ? known.reduce((a, b) => Math.min(a, b)) : 0, most);
  }
  byId("tokens-legend").replaceChildren();
  if (known.length) drawLegend(byId("tokens-legend"), scale, show, quantity.unit);
  else byId("tokens-legend").textContent = "not measured here";
  spans.forEach((span, i) => {
    paint(span, scale, values[i]);
    const said = values[i] === null ? "" : `, ${quantity.name} ${show(values[i])}`;
    span.setAttribute("aria-label", `${i < tokens.length ? tokens[i] : "next token"}${said}`);
  });
}

function guessList(readout, i) {
  const list = make("ol", "guesses");
  const shares = readout.p[i - 1];
  readout.top[i - 1].forEach((text, k) => {
    const item = make("li", isTrue(i, text) ? "true" : "");
    const bar = make("i");
    bar.style.width = `${100 * shares[k]}%`;
    item.append(bar, write(make("span", "text"), texts[text]), make("span", "share", percent(shares[k])));
    list.append(item);
  });
  return list;
}

const fate = (readout, i) => {
  const loss = entry(readout.loss, i);
  return loss === null ? "" : `rank ${entry(readout.rank, i).toLocaleString("en")} · loss ${number(loss)}`;
};

function drawDetail() {
  const i = current();
  for (const span of byId("tokens").querySelectorAll(".token")) {
    const isCurrent = Number(span.dataset.i) === i;
    span.classList.toggle("current", isCurrent);
    span.setAttribute("aria-selected", isCurrent);
    span.tabIndex = Number(span.dataset.i) === state.pinned ? 0 : -1;
  }
  const head = make("div", "head");
  const isNext = i === tokens.length;
  const label = isNext ? make("b", "", "next") : write(make("b"), tokens[i]);
  const place = isNext ? "what comes after the text" : `token ${i + 1} of ${tokens.length}`;
  const context = [...tokens.slice(0, i).join("")];
  const before = write(make("span"), context.slice(-80).join(""), { dots: false });
  const opening = context.length > 80 ? ", after “…" : ", after “";
  head.append(label, make("span", "", place));
  if (i) head.lastChild.append(document.createTextNode(opening), before, document.createTextNode("”"));
  const { own, other, value } = asked(i);
  if (value !== null && other !== undefined) {
    const { name, unit } = QUANTITIES[byId("quantity").value];
    head.append(make("span", "difference", `${name} ${number(own)} − ${number(other)} = ${signed(value)}${unit}`));
  }
  byId("detail").replaceChildren(head, ...(i ? lenses.map((lens) => describe(lens, i)) : []));
  if (!i) byId("detail").append(make("p", "note", "Nothing stands before the first token, so it is not predicted."));
}

// The late layers and the ensemble; a model without them is read out at the other's.
function shownReadouts(lens) {
  const late = new Set(lenses.flatMap((other) => lateOf(other).map((readout) => readout.name)));
  const shown = lens.readouts.filter((readout) => readout.ensemble || late.has(readout.name));
  return late.size ? shown : lens.readouts.slice(-6);
}

function describe(lens, i) {
  const box = make("div", "model card");
  const title = make("h3", "", lens.model);
  const grid = make("div", "readouts");
  grid.style.setProperty("--columns", Math.max(...lenses.map((other) => shownReadouts(other).length)));
  if (lens.routing) {
    const [depth, entropy] = [entry(lens.routing.depth, i), entry(lens.routing.entropy, i)];
    title.append(make("span", "", ` · mean depth ${number(depth)}, routing entropy ${number(entropy)}`));
    const shown = new Set(shownReadouts(lens).map((readout) => readout.layer));
    const others = lens.routing.layers
      .map((layer, route) => [layer, lens.routing.weights[i - 1][route]])
      .filter(([layer]) => !shown.has(layer))
      .map(([layer, weight]) => `layer ${layer} ${weight ? percent(weight) : "0 %"}`);
    if (others.length) title.append(make("span", "", ` · weights: ${others.join(", ")}`));
  }
  for (const readout of shownReadouts(lens)) {
    const card = make("div", "readout");
    const route = lens.routing ? lens.routing.layers.indexOf(readout.layer) : -1;
    const weight = route < 0 ? null : lens.routing.weights[i - 1][route];
    const heading = make("h4", "", readout.name);
    const bar = make("div", weight === null ? "weight none" : "weight");
    if (weight !== null) {
      heading.append(make("span", "", `weight ${weight ? percent(weight) : "0 %"}`));
      const fill = make("i");
      fill.style.width = `${100 * weight}%`;
      bar.append(fill);
    }
    card.append(heading, ...(lens.routing ? [bar] : []), guessList(readout, i), make("p", "fate", fate(readout, i)));
    grid.append(card);
  }
  box.append(title, grid);
  return box;
}

// ---- layers by tokens --------------------------------------------------------------------------

function drawMaps() {
  const shade = SHADES[byId("shade").value];
  const end = Math.min(state.start + WINDOW - 1, tokens.length);
  const columns = Array.from({ length: end - state.start + 1 }, (_, k) => state.start + k);
  const all = lenses.flatMap((lens) =>
    lens.readouts.flatMap((readout) => columns.map((i) => shade.of(readout, i)).filter((v) => v !== null)),
  );
  const most = all.reduce((a, b) => Math.max(a, b), 0);
  const isRank = shade === SHADES.rank;
  const low = isRank ? 1 : 0;
  const high = shade === SHADES.probability ? 1 : most || low + 1;
  const scale = makeScale(low, high, { logarithmic: isRank });
  drawLegend(byId("maps-legend"), scale, shade.show, shade.unit);
  byId("pager").hidden = tokens.length <= WINDOW;
  byId("range").textContent = `tokens ${state.start + 1} to ${Math.min(end + 1, tokens.length)} of ${tokens.length}`;
  byId("earlier").disabled = state.start === 1;
  byId("later").disabled = end === tokens.length;
  byId("maps").replaceChildren(...lenses.map((lens, l) => drawMap(lens, l, columns, shade, scale)));
  for (const box of document.querySelectorAll(".scroll")) box.addEventListener("scroll", scrollTogether);
}

function drawMap(lens, l, columns, shade, scale) {
  const figure = make("div", "map card");
  const scroll = make("div", "scroll");
  const table = make("table");
  table.setAttribute("role", "grid");
  table.setAttribute("aria-label", `Guesses of ${lens.model} by layer and token`);
  const header = make("tr");
  header.append(make("th", "", "layer"));
  for (const i of columns) {
    const cell = i < tokens.length ? write(make("th"), tokens[i]) : make("th", "", "next");
    cell.scope = "col";
    cell.dataset.i = i;
    header.append(cell);
  }
  const body = make("tbody");
  [...lens.readouts.keys()].reverse().forEach((r, row) => {
    const readout = lens.readouts[r];
    const line = make("tr", readout.ensemble || readout.jsd !== null ? "late" : "");
    const name = make("th", "", readout.layer === null ? readout.name : `${readout.layer}`);
    name.scope = "row";
    line.append(name);
    for (const i of columns) {
      const text = readout.top[i - 1][0];
      const cell = write(make("td", isTrue(i, text) ? "true" : ""), texts[text]);
      cell.tabIndex = row === 0 && i === columns[0] ? 0 : -1;
      Object.assign(cell.dataset, { lens: l, readout: r, i });
      paint(cell, scale, shade.of(readout, i));
      line.append(cell);
    }
    body.append(line);
  });
  table.append(make("thead"), body);
  table.tHead.append(header);
  scroll.append(table);
  if (lenses.length > 1) figure.append(make("h3", "", lens.model));
  figure.append(scroll);
  return figure;
}

function scrollTogether({ target }) {
  for (const box of document.querySelectorAll(".scroll")) {
    if (box !== target) [box.scrollLeft, box.scrollTop] = [target.scrollLeft, target.scrollTop];
  }
}

function describeCell(cell) {
  const [l, r, i] = [cell.dataset.lens, cell.dataset.readout, Number(cell.dataset.i)];
  const readout = lenses[l].readouts[r];
  const where = make("span", "where", `${lenses.length > 1 ? `${lenses[l].model}, ` : ""}${readout.name}, `);
  const token = i < tokens.length ? write(make("b"), tokens[i]) : make("b", "", "next");
  where.append(document.createTextNode("in place of "), token);
  const measures = [`entropy ${number(readout.entropy[i - 1])}`, `KL to the final layer ${number(readout.kl[i - 1])}`];
  const told = [fate(readout, i), ...measures].filter(Boolean).join(" · ");
  byId("cell").replaceChildren(where, guessList(readout, i), make("span", "where", told));
  for (const head of byId("maps").querySelectorAll("thead th[data-i]")) {
    head.classList.toggle("current", Number(head.dataset.i) === i);
  }
}

// ---- what the reader does ----------------------------------------------------------------------

function pin(i, { focus = false } = {}) {
  state.pinned = Math.min(Math.max(i, 0), tokens.length);
  state.hovered = null;
  drawDetail();
  const span = byId("tokens").querySelector(`[data-i="${state.pinned}"]`);
  if (focus) span.focus();
  const isShown = state.pinned >= state.start && state.pinned < state.start + WINDOW;
  if (!isShown && state.pinned > 0) turnTo(state.pinned - (WINDOW >> 1));
}

function turnTo(start) {
  state.start = Math.max(1, Math.min(start, tokens.length - WINDOW + 1));
  drawMaps();
}

// The token straight above or below, by where the browser has put them.
function neighbour(span, direction) {
  const from = span.getBoundingClientRect();
  const middle = (from.left + from.right) / 2;
  let best = null;
  for (const other of byId("tokens").querySelectorAll(".token")) {
    const box = other.getBoundingClientRect();
    const rise = direction * (box.top - from.top);
    if (rise < 4) continue;
    const distance = rise * 1000 + Math.abs((box.left + box.right) / 2 - middle);
    if (!best || distance < best.distance) best = { distance, i: Number(other.dataset.i) };
  }
  return best?.i ?? null;
}

const tokenAt = (event) => event.target.closest(".token");
byId("tokens").addEventListener("pointerover", (event) => {
  const span = event.pointerType === "mouse" && tokenAt(event);
  if (!span || Number(span.dataset.i) === current()) return;
  state.hovered = Number(span.dataset.i);
  drawDetail();
});
byId("tokens").addEventListener("pointerleave", () => {
  if (state.hovered === null) return;
  state.hovered = null;
  drawDetail();
});
byId("tokens").addEventListener("click", (event) => {
  const span = tokenAt(event);
  if (span) pin(Number(span.dataset.i), { focus: true });
});
byId("tokens").addEventListener("focusin", (event) => {
  const span = tokenAt(event);
  if (span && Number(span.dataset.i) !== state.pinned) pin(Number(span.dataset.i));
});
byId("tokens").addEventListener("keydown", (event) => {
  const span = tokenAt(event);
  if (!span) return;
  const i = Number(span.dataset.i);
  const goals = {
    ArrowLeft: () => i - 1,
    ArrowRight: () => i + 1,
    ArrowUp: () => neighbour(span, -1),
    ArrowDown: () => neighbour(span, 1),
    Home: () => 0,
    End: () => tokens.length,
  };
  const goal = goals[event.key]?.();
  if (goal === undefined) return;
  event.preventDefault();
  if (goal !== null) pin(goal, { focus: true });
});

const cellAt = (event) => event.target.closest("td");
for (const kind of ["pointerover", "focusin", "click"]) {
  byId("maps").addEventListener(kind, (event) => cellAt(event) && describeCell(cellAt(event)));
}
byId("maps").addEventListener("keydown", (event) => {
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  const cell = cellAt(event);
  const step = steps[event.key];
  if (!cell || !step) return;
  event.preventDefault();
  const rows = cell.closest("tbody").rows;
  const row = rows[cell.parentElement.sectionRowIndex + step[0]];
  const goal = row?.cells[cell.cellIndex + step[1]];
  if (!goal || goal.tagName !== "TD") return;
  cell.tabIndex = -1;
  goal.tabIndex = 0;
  goal.focus();
});

byId("earlier").addEventListener("click", () => turnTo(state.start - WINDOW));
byId("later").addEventListener("click", () => turnTo(state.start + WINDOW));
byId("shade").addEventListener("change", drawMaps);
for (const id of ["quantity", "subject", "baseline"]) {
  byId(id).addEventListener("change", () => {
    colorTokens();
    drawDetail();
  });
}
night.addEventListener("change", () => {
  colorTokens();
  drawMaps();
});

function show(passage) {
  ({ lenses } = passages[passage]);
  tokens = lenses[0].tokens.map((index) => texts[index]);
  Object.assign(state, { pinned: 1, hovered: null, start: 1 });
  drawTokens();
  colorTokens();
  drawMaps();
  pin(1);
  describeCell(byId("maps").querySelector("td"));
}

byId("passage").addEventListener("change", (event) => show(event.target.value));
fillMenus();
show(0);
